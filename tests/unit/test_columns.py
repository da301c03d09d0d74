"""The rule for row-wise states of tables cut by columns, against a plain expansion to one value a column."""

import pytest
import torch

from dlrm_scale.checkpoint.columns import mean_over_columns, overlaps


def expand(values_RB: torch.Tensor, starts: list[int], num_columns: int) -> torch.Tensor:
    """(R, D): each column with its block's value."""
    ends = [*starts[1:], num_columns]
    return torch.cat(
        [
            values_RB[:, b : b + 1].repeat(1, end - start)
            for b, (start, end) in enumerate(zip(starts, ends, strict=True))
        ],
        dim=1,
    )


@pytest.mark.parametrize("starts", [[0], [0, 8], [0, 4, 12, 20]])
@pytest.mark.parametrize(("first", "width"), [(0, 24), (0, 8), (8, 16), (4, 8), (10, 4), (20, 4)])
def test_a_shard_takes_the_mean_over_its_columns(starts, first, width):
    values_RB = torch.rand(5, len(starts), generator=torch.Generator().manual_seed(1)) * 1000
    touched = overlaps(starts, 24, first, width)
    mean = mean_over_columns(values_RB[:, [block for block, _ in touched]], [columns for _, columns in touched])
    expected = expand(values_RB, starts, 24)[:, first : first + width].double().mean(1)
    torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=0)


def test_merged_shards_hold_what_one_shard_would_have_summed():
    """Row-wise Adagrad: sums of mean squares of the gradient, over the whole row or over each shard's columns."""
    gradients = torch.randn(7, 5, 24, generator=torch.Generator().manual_seed(2))  # steps, rows, columns
    by_shard = torch.stack(
        [gradients[..., a:b].square().mean(-1).sum(0) for a, b in ((0, 4), (4, 16), (16, 24))], dim=1
    )
    whole = gradients.square().mean(-1).sum(0)
    torch.testing.assert_close(mean_over_columns(by_shard, [4, 12, 8]), whole, rtol=1e-6, atol=0)
