"""Two checkpoints compared tensor by tensor."""

import math

import pytest
import torch

from dlrm_scale.checkpoint.tensors import Saved
from tools.checkpoint import compare
from tools.checkpoint.compare import _difference, row_blocks


@pytest.mark.parametrize(
    ("a", "b", "difference"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [1.5, -2.0], 4.0),
        ([math.nan, 2.0], [math.nan, 2.0], 0.0),
        ([math.nan, 2.0], [1.0, 2.0], math.inf),
        ([math.inf, 2.0], [math.inf, 2.0], 0.0),
        ([math.inf, 2.0], [-math.inf, 2.0], math.inf),
    ],
)
def test_the_largest_difference_of_two_tensors(a, b, difference):
    assert _difference(torch.tensor(a), torch.tensor(b)) == difference


@pytest.mark.parametrize("size", [(), (7,), (1000, 3), (5, 10, 2), (0, 4)])
def test_blocks_of_rows_cover_a_tensor_once_in_bounded_memory(monkeypatch, size):
    monkeypatch.setattr(compare, "BLOCK_BYTES", 100)
    covered = torch.zeros(size)
    for offsets, shape in row_blocks(Saved(torch.float32, size)):
        assert torch.Size(shape).numel() * 4 <= max(100, torch.Size(size[1:]).numel() * 4)
        covered[tuple(slice(o, o + n) for o, n in zip(offsets, shape, strict=True))] += 1
    assert (covered == 1).all()
