"""fp16 tables under steps too small for them: lost when rounded to the nearest, kept on average when rounded by chance."""

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn

from dlrm_scale.config import SparseOptimizer
from dlrm_scale.errors import ConfigError
from dlrm_scale.sharding.sharders import make_sharders
from dlrm_scale.training.optimizers import ReplicatedTableOptimizer, round_by_chance
from tests.support.configs import tiny_config

ROWS, DIM, STEPS = 500, 32, 40
LR = 2e-5  # a tenth of half the distance from 1 to the next smaller fp16, 2^-12


def test_the_mean_stays_and_only_neighbours_are_taken():
    for value in (1.00001, 0.3, -7.7, 6e-8, 2.5e-5, 0.0, 1024.7, 1.0):
        exact = torch.full((200_000,), value)
        rounded = round_by_chance(exact, torch.Generator().manual_seed(0))
        assert rounded.dtype == torch.float16 and len(rounded.unique()) <= 2
        gap = float(rounded.float().max() - rounded.float().min())
        assert abs(float(rounded.double().mean() - exact.double().mean())) < 0.01 * gap + 1e-12, value
        nearest = exact.half().float()
        assert ((rounded.float() - exact).abs() < (nearest - exact).abs() + gap + 1e-12).all()


def test_what_fp16_holds_is_kept():
    held = torch.randn(10_000).half()
    assert torch.equal(round_by_chance(held.float(), torch.Generator().manual_seed(0)), held)


def trained(stochastic_rounding: bool) -> torch.Tensor:
    """A replicated table of ones after small SGD steps of gradient 1; the mean step is exact iff it was rounded by chance."""
    table = nn.Parameter(torch.ones(ROWS, DIM, dtype=torch.float16))
    config = SparseOptimizer(name="sgd", lr=LR, stochastic_rounding=stochastic_rounding)
    optimizer = ReplicatedTableOptimizer([table], config)
    for step in range(STEPS):
        table.grad = torch.ones_like(table)
        optimizer.num_steps = step
        optimizer.step()
    return table.detach().float()


def test_small_steps_of_replicated_tables_move_them_on_average():
    assert torch.equal(trained(False), torch.ones(ROWS, DIM))
    by_chance = trained(True)
    assert float(1 - by_chance.mean()) == pytest.approx(STEPS * LR, rel=0.05)
    assert len(by_chance.unique()) > 2


def test_every_rank_rounds_replicas_alike():
    assert torch.equal(trained(True), trained(True))


@pytest.mark.parametrize(
    "optimizer", [EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_ROWWISE_ADAGRAD]
)
def test_fbgemms_cpu_kernels_ignore_it(optimizer):
    """If this fails, they no longer do: allow stochastic_rounding on CPU."""
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        [(ROWS, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=optimizer,
        learning_rate=LR,
        weights_precision=SparseType.FP16,
        stochastic_rounding=True,
    )
    weights = tbe.split_embedding_weights()[0]
    weights.fill_(1.0)
    for _ in range(STEPS):
        tbe(torch.arange(ROWS), torch.arange(ROWS + 1)).sum().backward()
    assert torch.equal(weights, torch.ones_like(weights))


def test_where_it_would_be_ignored_it_is_refused():
    by_chance = SparseOptimizer(stochastic_rounding=True)
    with pytest.raises(ConfigError, match="CPU kernels ignore it"):
        make_sharders(by_chance, "cpu")
    assert all(s.fused_params["stochastic_rounding"] for s in make_sharders(by_chance, "cuda"))
    assert not any(s.fused_params["stochastic_rounding"] for s in make_sharders(SparseOptimizer(), "cuda"))
    with pytest.raises(ConfigError, match="all tables are fp32"):
        tiny_config(train={"sparse": {"stochastic_rounding": True}})
