"""Samples in order of their sequences' length, cut into chunks: each is padded to its own longest sequence only.

    lengths   5 1 4 1        order 1 3 2 0        chunks   |a ....|   |c c c c|
                                                           |b     |   |d d d d d|

On a CPU the work on sequences is mostly memory traffic: a chunk's tensors stay in the cores' caches, and padding is not computed.
Where a length cannot be read without a wait (CUDA) or at all (fake tensors, a graph being compiled), there is one chunk, as it is,
padded to max_length. Either way a sample's result is the same up to rounding.
"""

# B batch  b samples of a chunk  V all events of the batch
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

CHUNK_SAMPLES = (
    256  # of 64 events x 64 columns in bf16: 2 MB a tensor, a core's second cache; 64 is 15 % slower, 128 as fast
)


class _Permute(torch.autograd.Function):
    """Rows at `index`; backward those at `inverse`, where autograd's own adds them up one by one."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, *ctx.saved_tensors), None, None


def _inverse(index: Tensor) -> Tensor:
    inverse = torch.empty_like(index)
    inverse[index] = torch.arange(len(index), device=index.device)
    return inverse


@dataclass(frozen=True)
class LengthChunks:
    """
    Attributes:
        sizes: samples of each chunk.
        longest: what each chunk is padded to; at least 1.
        order_B, inverse_B: where each sample stood before, and now stands; None: samples stay as they are.
    """

    sizes: list[int]
    longest: list[int]
    order_B: Tensor | None = None
    inverse_B: Tensor | None = None

    def sort(self, rows_B: Tensor) -> Tensor:
        return rows_B if self.order_B is None else _Permute.apply(rows_B, self.order_B, self.inverse_B)

    def unsort(self, rows_B: Tensor) -> Tensor:
        return rows_B if self.order_B is None else _Permute.apply(rows_B, self.inverse_B, self.order_B)

    def split(self, rows_B: Tensor) -> list[Tensor]:
        """Sorted rows by chunk."""
        return [rows_B] if len(self.sizes) == 1 else list(rows_B.split(self.sizes))

    def padded(self, values_VE: Tensor, lengths_B: Tensor, offsets_B1: Tensor) -> list[Tensor]:
        """(b, longest, E) for each chunk: events of the unsorted batch, sorted, left-aligned, zeros behind the last."""
        if self.order_B is not None:
            lengths_B = lengths_B[self.order_B].long()
            index_V, starts_B1 = _events_of(lengths_B, offsets_B1[:-1][self.order_B])
            values_VE, offsets_B1 = _Permute.apply(values_VE, index_V, _inverse(index_V)), starts_B1
        if len(self.sizes) == 1:
            return [_pad(values_VE, offsets_B1, self.longest[0])]
        ends = torch.tensor([0, *self.sizes]).cumsum(0)
        starts = offsets_B1[ends]
        parts = values_VE.split(starts.diff().tolist())
        rows = [offsets_B1[a : b + 1] - offsets_B1[a] for a, b in pairwise(ends)]
        return [_pad(*chunk) for chunk in zip(parts, rows, self.longest, strict=True)]


def cut_by_length(lengths_B: Tensor, max_length: int) -> LengthChunks:
    num_samples = len(lengths_B)
    readable = lengths_B.device.type == "cpu" and not isinstance(lengths_B, FakeTensor)
    if torch.compiler.is_compiling() or not readable:
        return LengthChunks([num_samples], [max_length])
    if num_samples <= CHUNK_SAMPLES:
        return LengthChunks([num_samples], [max(1, int(lengths_B.max()))])
    sorted_B, order_B = lengths_B.sort(stable=True)
    chunks = sorted_B.split(CHUNK_SAMPLES)
    longest = [max(1, int(chunk[-1])) for chunk in chunks]
    return LengthChunks([len(chunk) for chunk in chunks], longest, order_B, _inverse(order_B))


def _events_of(lengths_B: Tensor, starts_B: Tensor) -> tuple[Tensor, Tensor]:
    """Where the events of samples that start at `starts_B` stand, sample by sample, and the new offsets."""
    offsets_B1 = torch.cat((lengths_B.new_zeros(1), lengths_B.cumsum(0)))
    shift_V = torch.repeat_interleave(starts_B - offsets_B1[:-1], lengths_B)
    return shift_V + torch.arange(len(shift_V)), offsets_B1


def _pad(values_VE: Tensor, offsets_b1: Tensor, length: int) -> Tensor:
    return torch.ops.fbgemm.jagged_to_padded_dense(values_VE, [offsets_b1], [length], 0.0)
