"""Where a step's time goes, without stopping the device to look."""

import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch

# The tables' stages hold what is exchanged for them. Gradients of replicated parameters are exchanged in dense_backward, those of
# replicated tables too, and they step in optimizer; sharded tables step in embedding_backward.
STAGES = (
    "data_wait",
    "input_dist",
    "embedding_forward",
    "dense_forward",
    "dense_backward",
    "embedding_backward",
    "optimizer",
)


class StepClock:
    """Collects the milliseconds of each stage of each step.

    A step is `begin`, then for each micro-batch the stages in their order, each closed by `end(stage)`. On CUDA the borders
    are events on the current stream, read at `drain` only. The wait for data is the host's: what a step's reader kept it
    waiting, and part of no other stage.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.steps: list[tuple[list[tuple[str, Any]], float]] = []
        self.borders: list[tuple[str, Any]] = []
        self.data_wait_ms = 0.0

    def begin(self) -> None:
        self.borders = [("", self._now())]
        self.data_wait_ms = 0.0

    def end(self, stage: str) -> None:
        self.borders.append((stage, self._now()))

    def finish(self) -> None:
        self.end("")
        self.steps.append((self.borders, self.data_wait_ms))

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """`batches`, with the time that each one is waited for."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.data_wait_ms += (time.perf_counter() - start) * 1e3
            if batch is None:
                return
            yield batch

    def drain(self) -> list[dict[str, float]]:
        """Milliseconds by stage, and of the whole "step", of each step since the last call."""
        if self.on_cuda:
            torch.cuda.synchronize()
        steps = [self._milliseconds(borders, wait) for borders, wait in self.steps]
        self.steps = []
        return steps

    def _now(self) -> Any:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self.on_cuda else (end - start) * 1e3

    def _milliseconds(self, borders: list[tuple[str, Any]], data_wait_ms: float) -> dict[str, float]:
        stages = dict.fromkeys(STAGES, 0.0)
        for (_, start), (stage, end) in pairwise(borders):
            if stage:
                stages[stage] += self._between(start, end)
        stages["data_wait"] = data_wait_ms
        if not self.on_cuda:
            stages["input_dist"] = max(0.0, stages["input_dist"] - data_wait_ms)  # the reader is called in that span
        stages["step"] = self._between(borders[0][1], borders[-1][1])
        return stages
