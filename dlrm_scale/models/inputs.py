"""From looked-up embeddings to dense tensors, read by feature name and never by position.

The column order of a sharded `KeyedTensor` depends on the plan; these are the only functions that look inside one.
"""

# B batch  T padded events  D a table's embedding dim
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.types import Awaitable
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

from dlrm_scale.features import FeatureSchema, Sequence

Embedded = dict[str, JaggedTensor]


def wait(lookup: Any) -> Any:
    """The result of a lookup, whether or not it is still under way on other ranks."""
    return lookup.wait() if isinstance(lookup, Awaitable) else lookup


def in_bf16(
    dense_BF: Tensor, pooled: KeyedTensor | None, embedded: Embedded | None
) -> tuple[Tensor, KeyedTensor | None, Embedded | None]:
    """The arch's inputs cast once, so that no elementwise operation behind them mixes precisions (on a CPU ten times slower)."""
    if pooled is not None:
        pooled = KeyedTensor(
            pooled.keys(), pooled.length_per_key(), pooled.values().bfloat16(), key_dim=pooled.key_dim()
        )
    if embedded is not None:
        embedded = {
            name: JaggedTensor(jagged.values().bfloat16(), lengths=jagged.lengths(), offsets=jagged.offsets())
            for name, jagged in embedded.items()
        }
    return dense_BF.bfloat16(), pooled, embedded


def categorical_vectors(schema: FeatureSchema, pooled: KeyedTensor | None, embedded: Embedded | None) -> list[Tensor]:
    """One (B, D_table) for each of `schema.categorical`, in that order; a sample without an id gets zeros."""
    of = {} if pooled is None else pooled.to_dict()  # one split: its backward is one concatenation
    of |= {f.name: _single_id(embedded[f.name]) for f in schema.sequence_id_features}
    return [of[f.name] for f in schema.categorical]


def sequence_means(schema: FeatureSchema, embedded: Embedded | None) -> list[Tensor]:
    """One (B, D_table) for each of `schema.sequence_fields`: the mean of its events; no events give zeros."""
    means = []
    for sequence in schema.sequences:
        for f in sequence.fields:
            jagged = embedded[f.name]
            events_BTD = pad_events(jagged, sequence.max_length)
            means.append(events_BTD.sum(1) / jagged.lengths().clamp(min=1).unsqueeze(1))
    return means


def pad_events(jagged: JaggedTensor, max_length: int) -> Tensor:
    """Pads a field's events: (B, max_length, D), left-aligned, the oldest first, zeros behind the last.

    No sample may have more than max_length (the loader keeps the latest ones).
    """
    check_lengths(jagged, max_length)
    return torch.ops.fbgemm.jagged_to_padded_dense(jagged.values(), [jagged.offsets()], [max_length], 0.0)


def check_lengths(jagged: JaggedTensor, max_length: int) -> None:
    """Padding would cut longer ones without a word."""
    torch._assert_async((jagged.lengths() <= max_length).all(), "a sample has more events than its max_length")


def valid_mask(lengths_B: Tensor, num_slots: int) -> Tensor:
    """(B, num_slots) bool: True where a left-aligned sequence of that length holds an event."""
    return torch.arange(num_slots, device=lengths_B.device) < lengths_B.unsqueeze(1)


def sequence_lengths(sequence: Sequence, embedded: Embedded) -> Tensor:
    """(B,): events of each sample; the fields of one sequence are equally long."""
    return embedded[sequence.fields[0].name].lengths()


def _single_id(jagged: JaggedTensor) -> Tensor:
    return pad_events(jagged, max_length=1).squeeze(1)
