"""What a rank of `replay_table` does: trains one point of a space after the other, as the trainer does, and times its steps."""

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dlrm_scale.config import RunConfig
from dlrm_scale.data.open import open_source
from dlrm_scale.models.ranking_model import build_model
from dlrm_scale.sharding.apply import shard_model
from dlrm_scale.sharding.plan import Plan
from dlrm_scale.training.monitor import Board, percentiles
from dlrm_scale.training.progress import Progress
from dlrm_scale.training.ranks import Rank, process_group, this_rank
from dlrm_scale.training.readers import TrainReader
from dlrm_scale.training.state import seed_generators
from dlrm_scale.training.trainer import Trainer


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
            step_ms = _train(*jobs[index], rank)
            gc.collect()  # pipeline and model refer to each other
            if rank.is_first:
                tell((index, step_ms))


def _train(config: RunConfig, plan: Plan, rank: Rank) -> dict[str, float]:
    """The trainer's own loop and readers; nothing is written, saved or evaluated."""
    seed_generators(config.seed, rank, 0)
    reader = TrainReader(config, rank, open_source(config.data, config.features, "train", config.seed))
    model = shard_model(
        build_model(config, dense_device=rank.device), plan, config.train.sparse, rank.device, config.seed
    )
    trainer = Trainer(config, rank, model, reader, None, Board(None), Progress(None, reader.num_steps))
    return percentiles([ms["step"] for ms in trainer.train().step_ms])
