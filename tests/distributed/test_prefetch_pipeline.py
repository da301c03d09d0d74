"""The prefetch pipeline's order of work on two CPU ranks: its losses are the other pipelines', and so is the guard's backward pass.

CPU ranks have no caches and no streams, so the filling of caches is left out: TorchRec's pipeline runs with what else its
`prefetch_embeddings` does, which is to wait for a batch's exchanged ids. With caches: tests/gpu/test_training.py.
"""

from typing import Any
from unittest import mock

import pytest
import torch
from torchrec.distributed.train_pipeline import train_pipelines

from dlrm_scale.config import RunConfig
from dlrm_scale.errors import ConfigError
from dlrm_scale.sharding.plan import Plan
from dlrm_scale.training.device import check_caches
from dlrm_scale.training.pipelines import LossToPass
from dlrm_scale.training.trainer import TrainResult
from tests.distributed.test_training_loop import loop_config, train
from tests.support.twin import make_plan


def wait_for_ids(context: Any, modules: list[Any], *streams: Any) -> None:
    for module in modules:
        name = module.forward._name
        context.module_input_post_prefetch[name] = context.input_dist_tensors_requests.pop(name).wait()
        context.module_contexts_post_prefetch[name] = context.module_contexts.pop(name)


def train_prefetching(config: RunConfig, plan: Plan) -> tuple[TrainResult, dict[str, torch.Tensor]]:
    with mock.patch.object(train_pipelines, "prefetch_embeddings", wait_for_ids):
        return train(config, plan)


@pytest.mark.parametrize("settings", [{}, {"accumulate_steps": 2}], ids=["plain", "accumulated"])
def test_prefetching_leaves_losses_and_parameters_bitwise(two_ranks, settings):
    prefetch, plain = (
        loop_config(train={"pipeline": name, **settings}, eval={"every_steps": 5}) for name in ("prefetch", "none")
    )
    plan = make_plan(plain, 2, 2)
    (mine, dense), _ = two_ranks.run(train_prefetching, prefetch, plan)
    (other, dense_of_other), _ = two_ranks.run(train, plain, plan)
    assert mine.losses == other.losses and mine.losses[-1] < mine.losses[0]
    assert mine.eval_metrics == other.eval_metrics  # tables too have learned the same
    assert all(torch.equal(dense[name], dense_of_other[name]) for name in dense_of_other)


def test_what_else_is_done_with_the_loss_is_refused():
    passed = []
    loss = LossToPass(torch.ones(1), passed.append)
    torch.sum(loss, dim=0).backward()
    assert passed == [loss.loss]
    with pytest.raises(NotImplementedError, match="mean"):
        torch.mean(loss)


def test_a_plan_without_caches_has_nothing_to_prefetch():
    config = loop_config(train={"pipeline": "prefetch"})
    with pytest.raises(ConfigError, match=r"holds no table as fused_uvm_caching.*train\.pipeline=sparse_dist"):
        check_caches(config.train, make_plan(config, 2, 2))
