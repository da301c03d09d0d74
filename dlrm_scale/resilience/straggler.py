"""Which rank the others wait for: the dense arch's forward pass has no exchange in it, so its time is a rank's own."""

import statistics
import time
from typing import Any

import torch


class OwnTime:
    """Milliseconds between `start` and `stop`, by the device's clock; no wait for the device until `drain`."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.spans: list[tuple[Any, Any]] = []

    def start(self) -> None:
        self.started = self._now()

    def stop(self) -> None:
        self.spans.append((self.started, self._now()))

    def drain(self) -> float:
        """The mean span since the last call; 0 without one."""
        if self.on_cuda:
            torch.cuda.synchronize()
        ms = [start.elapsed_time(end) if self.on_cuda else (end - start) * 1e3 for start, end in self.spans]
        self.spans = []
        return sum(ms) / len(ms) if ms else 0.0

    def _now(self) -> Any:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Streak:
    """How many times in a row the same rank was the slowest, by more than `ratio`: once is chance."""

    def __init__(self, ratio: float) -> None:
        self.ratio, self.rank, self.length = ratio, -1, 0

    def add(self, rank: int, over_median: float) -> int:
        """The length of the streak that ends with this observation; 0 for one that is not slow."""
        if over_median <= self.ratio:
            self.length = 0
        else:
            self.length = self.length + 1 if rank == self.rank else 1
        self.rank = rank
        return self.length


def slowest(ms_by_rank: list[float]) -> tuple[int, float]:
    """The slowest rank, and its time over the others' median; for two ranks or more."""
    rank = max(range(len(ms_by_rank)), key=ms_by_rank.__getitem__)
    others = statistics.median(ms for r, ms in enumerate(ms_by_rank) if r != rank)
    return rank, ms_by_rank[rank] / others if others else 1.0
