"""What a rank of `replay_table` does: trains one point of a space after the other, as the trainer does, and times its steps."""

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from dlrm_scale.config import RunConfig
from dlrm_scale.sharding.plan import Plan
from dlrm_scale.training.monitor import percentiles
from dlrm_scale.training.ranks import meeting_point, process_group, this_rank
from tools.benchmark.train_ranks import train


def train_points(
    tell: Callable[[tuple[int, dict[str, float]]], Any],
    jobs: Sequence[tuple[RunConfig, Plan]],
    order: Sequence[int],
    threads: int,
    num_timed: int,
) -> None:
    """Rank 0 tells of each job of `order`: its number, and the percentiles of the first `num_timed` steps behind the warm-up."""
    torch.set_num_threads(threads)
    rank = this_rank(jobs[0][0].device)
    store = meeting_point(rank)
    for number, index in enumerate(order):
        # a group of its own: what a run leaves in one (groups, and their threads) slows down the next, by half after 150
        with process_group(rank, dist.PrefixStore(f"run_{number}", store)):
            step_ms = [ms["step"] for ms in train(*jobs[index], rank).step_ms[:num_timed]]
            gc.collect()  # pipeline and model refer to each other
        if rank.is_first:
            tell((index, percentiles(step_ms)))
