import pytest
import torch
from torch.nn import functional

from dlrm_scale.models.ranking_model import WeightedLoss, build_model
from tests.support.model_inputs import random_batch, run_config

CPU = torch.device("cpu")


def build(**settings: object):
    return build_model(run_config(**settings), table_device=CPU, dense_device=CPU)


def test_loss_is_the_weighted_mean_over_the_global_batch():
    """Two ranks, the second one filled up with rows of weight 0; the average of their losses is one rank's loss on all."""
    logits, labels = torch.randn(8, 2), torch.randint(0, 2, (8, 2)).float()
    weights = torch.tensor([1.0, 2, 0.5, 1, 3, 0, 0, 0])
    mean_rank_weight = weights.sum() / 2
    ranks = [
        WeightedLoss()(logits[rows], labels[rows], weights[rows], torch.zeros(4), mean_rank_weight)[0]
        for rows in (slice(0, 4), slice(4, 8))
    ]
    real = weights > 0
    per_sample = functional.binary_cross_entropy_with_logits(logits[real], labels[real], reduction="none").mean(1)
    expected = (per_sample * weights[real]).sum() / weights.sum()
    torch.testing.assert_close(sum(ranks) / 2, expected)


def test_rows_of_weight_zero_give_no_gradient():
    model, batch = build(), random_batch(run_config().features, 8)
    batch.weights_B[3:] = 0
    dense_BF = batch.dense_BF.requires_grad_()
    model(batch)[0].backward()
    assert dense_BF.grad[3:].eq(0).all() and dense_BF.grad[:3].ne(0).any()


@pytest.mark.parametrize("arch", ["interformer", "dlrm", "dlrm_dcnv2"])
def test_bf16_is_close_to_fp32_and_returns_fp32(arch):
    batch = random_batch(run_config().features, 32)
    fp32, bf16 = build(arch=arch), build(arch=arch, precision="bf16")
    bf16.load_state_dict(fp32.state_dict())
    (loss, predictions), (loss16, predictions16) = fp32(batch), bf16(batch)
    assert predictions16.logits_BT.dtype == loss16.dtype == torch.float32
    difference = (predictions16.logits_BT - predictions.logits_BT).abs().max()
    assert 0 < difference < 0.15 * predictions.logits_BT.std() + 0.05
    torch.testing.assert_close(loss16, loss, atol=0.02, rtol=0)
    loss16.backward()
    assert all(p.grad.isfinite().all() for p in bf16.parameters())


def test_predictions_are_detached_and_in_batch_order():
    model, batch = build(), random_batch(run_config().features, 8)
    predictions = model(batch)[1]
    assert not predictions.logits_BT.requires_grad
    assert torch.equal(predictions.labels_BT, batch.labels_BT) and torch.equal(predictions.weights_B, batch.weights_B)


def test_dense_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build_model(run_config(seed=3), dense_device=CPU)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = build_model(run_config(seed=3), dense_device=CPU)
    other = build_model(run_config(seed=4), dense_device=CPU)
    for name, weight in first.dense.state_dict().items():
        assert torch.equal(weight, second.dense.state_dict()[name])
    assert not torch.equal(first.dense.arch.head[0].weight, other.dense.arch.head[0].weight)
    assert all(p.is_meta for p in first.embeddings.parameters())
    assert not any(p.is_meta for p in first.dense.parameters())
