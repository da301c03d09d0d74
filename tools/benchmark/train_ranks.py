"""What a rank of `train` and of `replay_table` does: trains as the trainer does, with nothing written, saved or evaluated."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, tensorboard_trace_handler

from dlrm_scale.config import RunConfig
from dlrm_scale.data.batch import RecBatch
from dlrm_scale.data.open import open_source
from dlrm_scale.models.ranking_model import RankingModel, build_model
from dlrm_scale.sharding.apply import shard_model
from dlrm_scale.sharding.plan import Plan
from dlrm_scale.training.clock import STAGES
from dlrm_scale.training.device import check_device
from dlrm_scale.training.monitor import Board, peak_memory_bytes
from dlrm_scale.training.progress import Progress
from dlrm_scale.training.ranks import Rank, from_first_rank, process_group, this_rank
from dlrm_scale.training.readers import TrainReader
from dlrm_scale.training.result import TrainResult
from dlrm_scale.training.run import make_plan
from dlrm_scale.training.state import seed_generators
from dlrm_scale.training.trainer import Trainer
from tools.benchmark.peaks import Peaks
from tools.benchmark.roofline import measure_peaks

KEPT_BATCHES = 8  # of each rank, where data is skipped
ROWS_OF_TRACE = 15


class CountingReader(TrainReader):
    """Counts the ids of each feature in the batches that it gives."""

    @contextmanager
    def batches(self, samples_consumed: int = 0) -> Iterator[Iterator[RecBatch]]:
        self.num_samples, self.num_ids = 0, Counter[str]()
        with super().batches(samples_consumed) as read:
            yield map(self._counted, read)

    def _counted(self, batch: RecBatch) -> RecBatch:
        self.num_samples += batch.local_batch_size
        for ids in (batch.bags, batch.sequences):
            if ids is not None:
                by_key = ids.lengths().view(len(ids.keys()), -1).sum(1).tolist()
                self.num_ids.update(dict(zip(ids.keys(), by_key, strict=True)))
        return batch

    @property
    def ids_per_sample(self) -> dict[str, float]:
        return {name: ids / self.num_samples for name, ids in self.num_ids.items()}


class InMemory(CountingReader):
    """The first batches over and over: what is left of a step when no data has to be read."""

    def batches(self, samples_consumed: int = 0) -> AbstractContextManager[Iterator[RecBatch]]:
        total = self.num_steps * self.accumulate_steps
        with super().batches(samples_consumed) as read:
            kept = list(islice(read, min(total, KEPT_BATCHES)))
        return nullcontext(islice(cycle(kept), total))


class NoArch(nn.Module):
    """In the place of a dense arch: means of what the tables give, so that all of them are looked up and stepped."""

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.scale_T = nn.Parameter(torch.ones(num_tasks))

    def forward(self, dense_BF: Tensor, pooled: Any, embedded: Any) -> Tensor:
        mean_B1 = dense_BF.new_zeros(len(dense_BF), 1)
        if pooled is not None:
            mean_B1 = mean_B1 + pooled.values().mean(1, keepdim=True)
        for jagged in (embedded or {}).values():
            mean_B1 = mean_B1 + jagged.values().sum() / max(1, jagged.values().numel())
        return mean_B1 * self.scale_T


def reader_of(config: RunConfig, rank: Rank, skip: str = "") -> CountingReader:
    """Collective."""
    reader_type = InMemory if skip == "data" else CountingReader
    return reader_type(config, rank, open_source(config.data, config.features, "train", config.seed))


def train(
    config: RunConfig, plan: Plan, rank: Rank, skip: str = "", reader: CountingReader | None = None
) -> TrainResult:
    """The trainer's own loop and readers, without `skip`. Collective."""
    seed_generators(config.seed, rank, 0)
    reader = reader or reader_of(config, rank, skip)
    model = _without_arch(config, rank) if skip == "dense" else build_model(config, dense_device=rank.device)
    sharded = shard_model(model, plan, config, rank.device)
    return Trainer(config, rank, sharded, reader, None, Board(None), Progress(None, reader.num_steps)).train()


def _without_arch(config: RunConfig, rank: Rank) -> RankingModel:
    model = build_model(config, dense_device=rank.device)
    model.dense.arch = NoArch(len(config.features.labels)).to(rank.device)
    return model


@dataclass(frozen=True)
class RankRun:
    """One run, as one rank saw it; peaks are of all ranks together."""

    samples_per_s: float
    step_ms: list[float]
    stage_ms: dict[str, float]  # medians
    peak_memory: dict[str, int]
    peaks: Peaks
    ids_per_sample: dict[str, float] = field(default_factory=dict)  # of each feature; empty: not counted


def measure_training(tell: Callable[[str], Any], config: RunConfig, threads: int, skip: str) -> RankRun:
    """As one of torchrun's ranks."""
    torch.set_num_threads(threads)
    rank = this_rank(config.device)
    with process_group(rank):
        tell("training")
        plan, reader = plan_of(config, rank), reader_of(config, rank, skip)
        result = train(config, plan, rank, skip, reader)
        stage_ms = {stage: statistics.median(ms[stage] for ms in result.step_ms) for stage in STAGES}
        memory = peak_memory_bytes(rank.device)  # before the measurement of the machine takes its own
        tell("measuring the machine")
        step_ms = [ms["step"] for ms in result.step_ms]
        peaks = measure_peaks(rank.device)
        return RankRun(result.samples_per_second or 0.0, step_ms, stage_ms, memory, peaks, reader.ids_per_sample)


def plan_of(config: RunConfig, rank: Rank) -> Plan:
    """As the trainer plans. Collective. Raises ConfigError: the device lacks what is asked for, as the trainer says it."""
    check_device(config, rank.device)
    return from_first_rank(make_plan(config, rank) if rank.is_first else None)


def trace_training(tell: Callable[[str], Any], config: RunConfig, threads: int, folder: str) -> str:
    """Profiles a run; returns the costliest operations as a table."""
    torch.set_num_threads(threads)
    rank = this_rank(config.device)
    on_cuda = rank.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with process_group(rank):
        plan = plan_of(config, rank)
        tell("tracing")
        handler = tensorboard_trace_handler(folder, f"rank_{rank.index}")
        with profile(activities=activities, on_trace_ready=handler) as profiler:
            train(config, plan, rank)
        sort = "self_cuda_time_total" if on_cuda else "self_cpu_time_total"
        return profiler.key_averages().table(sort_by=sort, row_limit=ROWS_OF_TRACE, max_name_column_width=50)
