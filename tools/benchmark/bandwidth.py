"""What a rank measures of its cluster: memory, the link to the device, collectives. Bytes count as TorchRec's cost model has them.

A lookup reads ids and rows and writes one pooled row a bag (`_default_fwd_comp`). A collective counts, for one rank, the
whole buffer that `_compute_collective_comms` gets: what it sends to all ranks in an all-to-all, its partial sums for all
ranks in a reduce-scatter, what it receives from all in an all-gather, the gradient in an all-reduce; its own part too.
Both are in torchrec/distributed/planner/estimator/estimator.py, release 1.8.0.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.functional import embedding_bag

from tools.benchmark.timing import Case, time_interleaved

MIB = 2**20
MESSAGE_BYTES = (2**16, 2**18, 2**20, 2**22, 2**24, 2**26)
COPY_BYTES = 128 * MIB
TABLE_BYTES = 512 * MIB  # far over any cache
NUM_BAGS, IDS_PER_BAG = 32_768, 10  # 160 MiB of 512-byte rows a call: the next call finds none of them in a cache
CUDA_SCALE = 8  # its caches, and what keeps it busy, are larger
RANK_BYTES = (
    TABLE_BYTES + 3 * COPY_BYTES + 2 * MESSAGE_BYTES[-1] + 1024 * MIB
)  # of host memory; the last is the process
ID_BYTES = 8


@dataclass(frozen=True)
class Thing:
    """`of` is how many ranks take part in one (a collective), or 1; all ranks do it at once."""

    name: str
    of: int
    num_bytes: int


@dataclass(frozen=True)
class Samples:
    """Seconds of one call in each round, each of that round's slowest rank."""

    thing: Thing
    seconds: list[float]


def measure(tell: Callable[[tuple[int, float]], None], device_type: str, seconds: float) -> list[Samples]:
    """As one of torchrun's ranks; the same on every rank. Only rank 0 tells: rounds done, seconds passed."""
    rank, num_ranks, ranks_per_host = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_ranks))
    device = torch.device("cuda", rank) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo")
    cases = dict(_memory_cases(torch.device("cpu"), "host"))
    if device_type == "cuda":
        cases |= _memory_cases(device, "HBM")
        cases |= _link_cases(device)
    for size in sorted({ranks_per_host, num_ranks}):
        cases |= _collective_cases(device, dist.new_subgroups(size)[0], size)
    times = time_interleaved(
        cases,
        seconds,
        align=lambda: dist.all_reduce(torch.zeros(1)),
        agree=_from_first_rank,
        tell=lambda num_rounds, elapsed: tell((num_rounds, elapsed)) if rank == 0 else None,
    )
    seconds_CN = torch.tensor(list(times.values()), dtype=torch.float64)  # cases, rounds
    dist.all_reduce(seconds_CN, op=dist.ReduceOp.MAX)
    dist.destroy_process_group()
    return [Samples(thing, row) for thing, row in zip(times, seconds_CN.tolist(), strict=True)]


def _from_first_rank(go_on: bool) -> bool:
    verdict = torch.tensor([int(go_on)])
    dist.broadcast(verdict, src=0)
    return bool(verdict.item())


def finish_of(device: torch.device) -> Callable[[], None]:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def _memory_cases(device: torch.device, memory: str) -> Iterator[tuple[Thing, Case]]:
    scale = CUDA_SCALE if device.type == "cuda" else 1
    finish = finish_of(device)
    source, target = (torch.ones(scale * COPY_BYTES // 4, device=device) for _ in range(2))
    yield (
        Thing(f"{memory} copy, read + write", 1, 2 * scale * COPY_BYTES),
        Case(lambda: target.copy_(source), finish=finish),
    )
    weights = torch.ones(scale * TABLE_BYTES // 4, device=device)
    num_bags = scale * NUM_BAGS
    offsets = torch.arange(num_bags, device=device) * IDS_PER_BAG
    for row_bytes in (256, 512):
        table = weights.view(-1, row_bytes // 4)
        ids = torch.randint(len(table), (num_bags * IDS_PER_BAG,), device=device)
        moved = ids.numel() * (ID_BYTES + row_bytes) + num_bags * row_bytes
        yield (
            Thing(f"{memory} lookup, {row_bytes} B rows", 1, moved),
            Case(
                lambda ids=ids, table=table: embedding_bag(ids, table, offsets, mode="sum"),
                finish=finish,
            ),
        )


def _link_cases(device: torch.device) -> Iterator[tuple[Thing, Case]]:
    host, hbm = torch.ones(COPY_BYTES // 4).pin_memory(), torch.ones(COPY_BYTES // 4, device=device)
    for name, source, target in (("host to HBM", host, hbm), ("HBM to host", hbm, host)):
        call = lambda source=source, target=target: target.copy_(source, non_blocking=True)  # noqa: E731
        yield Thing(name, 1, COPY_BYTES), Case(call, finish=finish_of(device))


def _collective_cases(device: torch.device, group: dist.ProcessGroup, size: int) -> Iterator[tuple[Thing, Case]]:
    """As TorchRec calls them; gloo has them all."""
    whole, other = (torch.zeros(MESSAGE_BYTES[-1] // 4, device=device) for _ in range(2))
    for message_bytes in MESSAGE_BYTES:
        part = message_bytes // 4 // size
        a, b, b_part = whole[: part * size], other[: part * size], other[:part]
        calls = {
            "all-to-all": lambda a=a, b=b: dist.all_to_all_single(b, a, group=group),
            "reduce-scatter": lambda a=a, b=b_part: dist.reduce_scatter_tensor(b, a, group=group),
            "all-gather": lambda a=a, b=b_part: dist.all_gather_into_tensor(a, b, group=group),
            "all-reduce": lambda a=a: dist.all_reduce(a, group=group),
        }
        calls_per_sample = max(1, MIB // message_bytes)
        for name, call in calls.items():
            yield Thing(name, size, part * size * 4), Case(call, calls_per_sample, finish_of(device))
