"""What counts as not finite: NaN and both infinities anywhere, and no finite number however large."""

import math

import pytest
import torch

from dlrm_scale.resilience.guards import any_bad

LOSS = torch.zeros(())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_bad_element_of_many_tensors_is_found(value, dtype):
    tensors = [torch.ones(3, 2), torch.zeros(0, 4), torch.ones(5, dtype=dtype)]
    assert not any_bad(tensors, LOSS)
    tensors[2][3] = value
    assert any_bad(tensors, LOSS)


def test_large_finite_numbers_and_nothing_at_all_are_fine():
    assert not any_bad([torch.full((1000,), torch.finfo(torch.float32).max)], LOSS)
    assert not any_bad([], LOSS) and not any_bad([torch.zeros(0, 8)], LOSS)
