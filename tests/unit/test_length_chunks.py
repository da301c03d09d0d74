"""Batches cut by length: what comes out is what one padded batch gives, in the samples' own order."""

import pytest
import torch

from dlrm_scale.config import RunConfig
from dlrm_scale.models import length_chunks
from dlrm_scale.models.length_chunks import CHUNK_SAMPLES, LengthChunks, cut_by_length
from dlrm_scale.models.ranking_model import build_model
from tests.support.model_inputs import FEATURES, random_batch, run_config, with_checkpointing, with_features

MAX_LENGTH, NUM_SAMPLES = 9, 61
CPU = torch.device("cpu")


def jagged(lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(int(lengths_B.sum()), 3), torch.cat((torch.zeros(1, dtype=torch.long), lengths_B.cumsum(0)))


@pytest.mark.parametrize("num_samples", [1, CHUNK_SAMPLES, CHUNK_SAMPLES + 1, 3 * CHUNK_SAMPLES + 40])
@pytest.mark.parametrize("longest", [0, 1, MAX_LENGTH])
def test_padded_events_and_their_gradients_are_those_of_one_batch(num_samples, longest):
    torch.manual_seed(num_samples)
    lengths_B = torch.randint(0, longest + 1, (num_samples,))
    values_VE, offsets = jagged(lengths_B)
    values_VE.requires_grad_()
    chunks = cut_by_length(lengths_B, MAX_LENGTH)
    padded = chunks.padded(values_VE, lengths_B, offsets)
    assert [len(part) for part in padded] == chunks.sizes and sum(chunks.sizes) == num_samples
    assert [part.shape[1] for part in padded] == chunks.longest
    wide = torch.cat([torch.nn.functional.pad(part, (0, 0, 0, MAX_LENGTH - part.shape[1])) for part in padded])
    expected = torch.zeros(num_samples, MAX_LENGTH, 3)
    for sample, events in enumerate(values_VE.split(lengths_B.tolist())):
        expected[sample, : len(events)] = events
    assert torch.equal(chunks.unsort(wide), expected)
    weights = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad((chunks.unsort(wide) * weights).sum(), values_VE)
    is_event = torch.arange(MAX_LENGTH) < lengths_B[:, None]
    assert torch.equal(gradient, weights[is_event])


def test_no_chunk_is_padded_beyond_its_own_longest():
    lengths_B = torch.randint(0, 100, (5 * CHUNK_SAMPLES,))
    chunks = cut_by_length(lengths_B, 100)
    by_chunk = chunks.split(chunks.sort(lengths_B))
    assert [int(own.max()) for own in by_chunk] == chunks.longest
    assert (
        sum(size * longest for size, longest in zip(chunks.sizes, chunks.longest, strict=True)) < 1.3 * lengths_B.sum()
    )


def test_lengths_that_cannot_be_read_make_one_chunk():
    assert cut_by_length(torch.ones(1000, device="meta"), 7) == LengthChunks([1000], [7])


def outputs(config: RunConfig, chunk_samples: int) -> dict[str, torch.Tensor]:
    """Logits and the gradients of all parameters. Two sequences of unequal length; samples without any event."""
    torch.manual_seed(1)  # of the tables
    model = build_model(config, table_device=CPU, dense_device=CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(length_chunks, "CHUNK_SAMPLES", chunk_samples)
        loss, predictions = model(random_batch(config.features, NUM_SAMPLES))
        loss.backward()
    return {"logits": predictions.logits_BT, **{name: p.grad for name, p in model.named_parameters()}}


def chunks_config(**model: object) -> RunConfig:
    second = {"name": "seen", "max_length": 4, "fields": [{"name": "seen_item", "table": "item"}]}
    return run_config(with_features(sequences=[*FEATURES["sequences"], second]), **model)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("model", [{}, {"pffn": "gdpa"}, {"mode": "s2n", "pma_sees_cls": False}], ids=str)
def test_a_model_gives_the_same_with_chunks_as_with_padding(model, recompute):
    config = chunks_config(**model)
    config = with_checkpointing(config) if recompute else config
    plain, cut = (outputs(config, chunk_samples) for chunk_samples in (NUM_SAMPLES, 16))
    for name in plain:
        torch.testing.assert_close(cut[name], plain[name], atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("model", [{}, {"pffn": "gdpa"}, {"mode": "s2n", "pma_sees_cls": False}], ids=str)
def test_chunks_in_bf16_differ_by_the_rounding_of_their_sums_only(model, recompute):
    config = chunks_config(precision="bf16", **model)
    config = with_checkpointing(config) if recompute else config
    plain, cut = (outputs(config, chunk_samples) for chunk_samples in (NUM_SAMPLES, 16))
    assert torch.equal(cut["logits"], plain["logits"])
    for name in plain:
        assert (cut[name] - plain[name]).norm() <= 2**-7 * plain[name].norm(), name
