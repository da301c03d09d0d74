"""Row-wise optimizer states (one number a row) of tables that are cut by columns.

FBGEMM keeps one number for each row of each column shard, made from that shard's columns alone: a state is a function of the
column that is constant over each shard, saved as (R rows, B blocks) with the blocks' first columns. A shard that is loaded
takes the mean of that function over its columns. The sum (row-wise Adagrad), or the running mean (row-wise Adam), of the mean
of g * g is linear in it: so where shards merge, the mean is exactly what the merged shard would have had; where one is split,
the parts inherit its value; where nothing changes, nothing does.
"""

import torch


def overlaps(block_starts: list[int], num_columns: int, first: int, width: int) -> list[tuple[int, int]]:
    """(block, columns of it) for each saved block that columns first .. first + width - 1 touch, in order."""
    ends = [*block_starts[1:], num_columns]
    touched = []
    for block, (start, end) in enumerate(zip(block_starts, ends, strict=True)):
        columns = min(end, first + width) - max(start, first)
        if columns > 0:
            touched.append((block, columns))
    return touched


def mean_over_columns(values_RB: torch.Tensor, widths: list[int]) -> torch.Tensor:
    """(R,) means over blocks of these widths; in float64, rounded once."""
    weights_B = torch.tensor(widths, dtype=torch.float64, device=values_RB.device)
    return (values_RB.double() @ weights_B / weights_B.sum()).to(values_RB.dtype)
