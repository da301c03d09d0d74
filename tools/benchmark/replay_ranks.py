"""What a rank of `replay_table` does: trains one point of a space after the other, as the trainer does, and times its steps."""

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dlrm_scale.config import RunConfig
from dlrm_scale.sharding.plan import Plan
from dlrm_scale.training.monitor import percentiles
from dlrm_scale.training.ranks import process_group, this_rank
from tools.benchmark.train_ranks import train


def train_points(
    tell: Callable[[tuple[int, dict[str, float]]], Any],
    jobs: Sequence[tuple[RunConfig, Plan]],
    order: Sequence[int],
    threads: int,
) -> None:
    """Rank 0 tells of each job of `order`: its number, and the percentiles of its steps behind the warm-up."""
    torch.set_num_threads(threads)
    rank = this_rank(jobs[0][0].device)
    with process_group(rank):
        for index in order:
            result = train(*jobs[index], rank)
            gc.collect()  # pipeline and model refer to each other
            if rank.is_first:
                tell((index, percentiles([ms["step"] for ms in result.step_ms])))
