"""What a rank of `checkpoint` does: builds a sharded model and saves its state in every way, round after round."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dlrm_scale.checkpoint.commit import CheckpointFolder
from dlrm_scale.checkpoint.files import Files
from dlrm_scale.checkpoint.manifest import FORMAT, FileSum, Manifest
from dlrm_scale.checkpoint.saver import Saver
from dlrm_scale.checkpoint.tensors import Part
from dlrm_scale.config import RunConfig
from dlrm_scale.models.ranking_model import build_model
from dlrm_scale.sharding.apply import shard_model
from dlrm_scale.training.optimizers import TrainOptimizer
from dlrm_scale.training.ranks import Rank, from_first_rank, process_group, this_rank
from dlrm_scale.training.run import make_plan
from dlrm_scale.training.state import ModelState

COMPUTE_SIZE = 256  # of the square matrices that a rank multiplies while a save is written
ALONE_SECONDS = 0.5


@dataclass
class SavedOnRank:
    """Seconds by round on one rank.

    Attributes:
        first_stall_s: of the first asynchronous save, not counted in `stall_s`.
        async_s: from the call to the commit.
        compute_speed: matrix products a second while an asynchronous save is written, over those before it.
        sync_extra_bytes, async_extra_bytes: of resident memory at its peak, beyond what was there before any save.
    """

    state_bytes: int
    first_stall_s: float = 0.0
    sync_s: list[float] = field(default_factory=list)
    stall_s: list[float] = field(default_factory=list)
    async_s: list[float] = field(default_factory=list)
    plain_s: list[float] = field(default_factory=list)
    compute_speed: list[float] = field(default_factory=list)
    sync_extra_bytes: int = 0
    async_extra_bytes: int = 0


def measure(tell: Callable[[int], None], config: RunConfig, folder: str, num_rounds: int) -> SavedOnRank:
    """As one of torchrun's ranks. Only rank 0 tells: rounds done. A first round is not counted."""
    torch.set_num_threads(1)
    rank = this_rank("cpu")
    with process_group(rank):
        state = _state(config, rank)
        parts = state.parts(rank)
        result = SavedOnRank(sum(part.tensor.nbytes for part in parts))
        sync, background = (_saver(config, f"{folder}/{mode}", mode, rank.index) for mode in ("sync", "async"))
        resident = _reset_peak()
        for round_ in range(num_rounds + 1):
            dist.barrier()
            seconds = _timed(lambda step=round_ + 1: sync.save(step, state.parts(rank), None, _describe))
            if round_ == 0:
                result.sync_extra_bytes = _peak() - resident
            dist.barrier()
            plain = _timed(lambda: _plain_write(f"{folder}/plain_{rank.index}", parts))
            dist.barrier()
            before = _products_per_second(lambda started: time.perf_counter() - started < ALONE_SECONDS)
            dist.barrier()
            started = time.perf_counter()
            stall = _timed(lambda step=round_ + 1: background.save(step, state.parts(rank), None, _describe))
            during = _products_per_second(lambda _: background.thread.is_alive())
            background.wait()
            written = time.perf_counter() - started
            if round_ == 0:
                result.first_stall_s = stall
            else:
                result.sync_s.append(seconds)
                result.plain_s.append(plain)
                result.stall_s.append(stall)
                result.async_s.append(written)
                result.compute_speed.append(during / before)
            if rank.is_first:
                tell(round_)
        result.async_extra_bytes = _peak() - resident
    return result


def _state(config: RunConfig, rank: Rank) -> ModelState:
    plan = from_first_rank(make_plan(config, rank) if rank.is_first else None)
    model = build_model(config, dense_device=rank.device)
    sharded = shard_model(model, plan, config, rank.device)
    return ModelState(plan, sharded, TrainOptimizer(sharded, config.train, 1))


def _saver(config: RunConfig, path: str, mode: str, rank: int) -> Saver:
    settings = config.checkpoint.model_copy(update={"mode": mode, "max_failures": 1})
    return Saver(CheckpointFolder(path, Files(), keep_last=1), settings, rank, lambda line: None)


def _describe(notes: list[Any], files: dict[str, FileSum]) -> Manifest:
    return Manifest(
        format=FORMAT,
        step=1,
        samples_consumed=0,
        data_fingerprint="",
        world_size=len(notes),
        config_fingerprint="",
        config={},
        plan={},
        versions={},
        time="",
        column_blocks={},
        progress={},
        files=files,
    )


def _plain_write(path: str, parts: list[Part]) -> None:
    """What a disk takes at best: the same bytes from the same memory, one file a rank, no checksum."""
    with open(path, "wb", buffering=0) as f:
        for part in parts:
            f.write(part.tensor.detach().contiguous().numpy())
        os.fsync(f.fileno())


def _products_per_second(go_on: Callable[[float], bool]) -> float:
    a, b = torch.ones(COMPUTE_SIZE, COMPUTE_SIZE), torch.ones(COMPUTE_SIZE, COMPUTE_SIZE)
    started, count = time.perf_counter(), 0
    while go_on(started) or count == 0:
        a @ b
        count += 1
    return count / (time.perf_counter() - started)


def _timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _reset_peak() -> int:
    """Begins the kernel's count of this process's peak anew; the bytes resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
