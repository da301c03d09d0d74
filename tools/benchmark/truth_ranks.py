"""What a rank of `truth` does: trains one model under one plan after the other and times its steps."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch
import torch.distributed as dist

from dlrm_scale.config import RunConfig
from dlrm_scale.data.batch import RecBatch
from dlrm_scale.data.loader import take, to_batch
from dlrm_scale.data.open import open_source
from dlrm_scale.models.ranking_model import build_model
from dlrm_scale.sharding.apply import MODULE_PATHS, ShardedModel, shard_model
from dlrm_scale.sharding.plan import Plan
from dlrm_scale.training.optimizers import TrainOptimizer
from dlrm_scale.training.pipelines import make_pipeline
from dlrm_scale.training.ranks import Rank, process_group, this_rank

NUM_BATCHES = 4  # of each rank, all in memory, one after the other over and over
WARMUP_STEPS = 3  # the first fills the pipeline and traces the model; memory is first touched
DRAIN_STEPS = 2  # in the last ones the pipeline has no further batch whose ids it would exchange


@dataclass(frozen=True)
class PlanRun:
    """One rank's training under one plan. `types`: by table with a part on this rank, as TorchRec built it."""

    step_ms: list[float]
    types: dict[str, str]


def train_plans(
    tell: Callable[[int], None], config: RunConfig, plans: Sequence[Plan], order: Sequence[int], num_steps: int
) -> list[PlanRun]:
    """As one of torchrun's ranks: trains anew under `plans[i]` for each i of `order`, `num_steps` timed steps each.

    Only rank 0 tells: how many of `order` are done.
    """
    torch.set_num_threads(1)
    rank, runs = this_rank("cpu"), []
    with process_group(rank):
        batches = _batches(config, rank)
        for done, index in enumerate(order, start=1):
            runs.append(_train(config, rank, plans[index], batches, num_steps))
            gc.collect()  # pipeline and model refer to each other
            if rank.is_first:
                tell(done)
    return runs


def _batches(config: RunConfig, rank: Rank) -> list[RecBatch]:
    source = open_source(config.data, config.features, "train", config.seed)
    local = config.train.global_batch_size // rank.world_size
    blocks = [source.read_block(rank.index + i * rank.world_size) for i in range(NUM_BATCHES)]
    return [to_batch(take(rows, np.arange(local)), config.features, local, float(local)) for rows in blocks]


def _train(config: RunConfig, rank: Rank, plan: Plan, batches: list[RecBatch], num_steps: int) -> PlanRun:
    model = build_model(config, dense_device=rank.device)
    sharded = shard_model(model, plan, config, rank.device)
    sharded.train()
    total = WARMUP_STEPS + num_steps + DRAIN_STEPS
    optimizer = TrainOptimizer(sharded, config.train, total)
    pipeline = make_pipeline(config.train.pipeline, sharded, optimizer, rank.device)
    stream, step_ms = islice(cycle(batches), total), []
    dist.barrier()
    for _ in range(total):
        started = time.perf_counter()
        pipeline.progress(stream)
        step_ms.append((time.perf_counter() - started) * 1e3)
    return PlanRun(step_ms[WARMUP_STEPS : WARMUP_STEPS + num_steps], _built_types(sharded))


def _built_types(sharded: ShardedModel) -> dict[str, str]:
    """From the lookups that TorchRec made, not from the plan it was given."""
    types = {}
    for path in MODULE_PATHS.values():
        collection = sharded.module.get_submodule(path)
        for sharding_type, lookup in zip(collection._sharding_types, collection._lookups, strict=True):
            for group in getattr(lookup, "module", lookup).grouped_configs:  # replicated tables are in a DDP
                types |= {table.name: sharding_type for table in group.embedding_tables}
    return types
