"""Who this process is among the ranks, the process group, and how ranks agree on where the data ends."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dlrm_scale.config import Device
from dlrm_scale.data.loader import StepAgreement, StepStatus
from dlrm_scale.errors import ConfigError
from dlrm_scale.resilience.watchdog import restart_number


@dataclass(frozen=True)
class Rank:
    """This process, as torchrun's environment says; without one, the only rank."""

    index: int
    world_size: int
    local_index: int
    ranks_per_host: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.index == 0


def this_rank(device: Device) -> Rank:
    """Raises ConfigError if `device` is cuda and there are fewer GPUs than ranks on this host."""
    index, world_size, local_index, ranks_per_host = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    num_gpus = torch.cuda.device_count()
    kind = ("cuda" if num_gpus >= ranks_per_host else "cpu") if device == "auto" else device
    if kind == "cuda" and num_gpus < ranks_per_host:
        fewer = f"start at most {num_gpus} a host, or " if num_gpus else ""
        raise ConfigError(
            f"device is cuda, but for this host's {ranks_per_host} rank(s) there are {num_gpus} usable GPUs; {fewer}"
            "set device=cpu; python -m tools.doctor says what CUDA lacks"
        )
    torch_device = torch.device("cuda", local_index) if kind == "cuda" else torch.device("cpu")
    return Rank(index, world_size, local_index, ranks_per_host, torch_device)


def meeting_point(rank: Rank) -> dist.Store:
    """Where ranks of one start find each other; it lasts as long as it is referred to.

    Each start of the ranks by one launcher has a prefix of its own: the agent's store outlives a restart, and ranks that read the
    last attempt's addresses there hang.
    """
    if "MASTER_ADDR" in os.environ:
        store = next(dist.rendezvous("env://", rank.index, rank.world_size))[0]
    else:
        store = dist.HashStore()
    return dist.PrefixStore(f"attempt_{restart_number()}", store)


@contextmanager
def process_group(rank: Rank, store: dist.Store | None = None) -> Iterator[None]:
    """The default process group: gloo, and NCCL for tensors on GPUs."""
    store = store or meeting_point(rank)
    on_cuda = rank.device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(rank.device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        store=store,
        rank=rank.index,
        world_size=rank.world_size,
        device_id=rank.device if on_cuda else None,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def from_first_rank(value: Any) -> Any:
    """Rank 0's `value` on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather_rows(columns: torch.Tensor, rank: Rank) -> torch.Tensor | None:
    """Concatenates equally shaped CPU tensors of all ranks along dim 0 on rank 0; None on the others."""
    parts = [torch.empty_like(columns) for _ in range(rank.world_size)] if rank.is_first else None
    dist.gather(columns.contiguous(), parts, dst=0)
    return torch.cat(parts) if parts is not None else None


def sum_counts(counts: dict[str, int], rank: Rank) -> dict[str, int] | None:
    """The ranks' counters added up, on rank 0; None on the others. Collective."""
    parts: list[dict[str, int]] | None = [{} for _ in range(rank.world_size)] if rank.is_first else None
    dist.gather_object(counts, parts, dst=0)
    return dict(sum((Counter(part) for part in parts), Counter())) if parts is not None else None


def make_agree() -> Callable[[StepStatus], StepAgreement]:
    """A function by which all ranks' readers settle each step; collective, so every rank must make it at the same point.

    It is called from a reader's background thread, hence a group of its own: its messages never interleave with the
    training step's.
    """
    group = dist.new_group(backend="gloo")
    num_ranks = dist.get_world_size()

    def agree(status: StepStatus) -> StepAgreement:
        counts = (not status.ended, status.failed, status.stop)
        sums = torch.tensor([status.weight_sum, *map(float, counts)], dtype=torch.float64)
        dist.all_reduce(sums, group=group)
        weight, num_going, num_failed, num_stopping = sums.tolist()
        return StepAgreement(
            mean_rank_weight=weight / num_ranks,
            all_ended=num_going == 0,
            any_failed=num_failed > 0,
            any_stop=num_stopping > 0,
        )

    return agree
