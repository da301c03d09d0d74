"""What `data` times: a rank's reading by the loader, and a plain loop over the same files."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dlrm_scale.config import RunConfig
from dlrm_scale.data.loader import Reader, agree_alone, batches
from dlrm_scale.data.order import Order
from dlrm_scale.data.source import Rows, Source
from tools.benchmark.plain_reading import plain_batches


@dataclass(frozen=True)
class Pass:
    """One reading of a rank's rows. CPU seconds are the process's, of all threads; `parts` is empty for the plain loop."""

    rows: int
    wall_seconds: float
    cpu_seconds: float
    parts: dict[str, float]


class Stopwatch:
    """CPU seconds spent inside what it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        begun = time.process_time()
        try:
            return function(*arguments)
        finally:
            self.seconds += time.process_time() - begun

    def each(self, items: Iterator[Any]) -> Iterator[Any]:
        nothing = object()
        while (item := self.call(next, items, nothing)) is not nothing:
            yield item


class TimedSource:
    """A source whose reading is timed."""

    def __init__(self, source: Source, reading: Stopwatch) -> None:
        self._source, self._reading = source, reading
        self.fingerprint, self.block_starts = source.fingerprint, source.block_starts

    @property
    def mended(self) -> dict[str, int]:
        return self._source.mended

    def read_block(self, block: int) -> Rows:
        return self._reading.call(self._source.read_block, block)


def read_once(config: RunConfig, source: Source, num_ranks: int, max_rows: int) -> Pass:
    """The first rank's epoch."""
    reading, choosing = Stopwatch(), Stopwatch()
    batch, accumulate = config.train.global_batch_size, config.train.accumulate_steps
    order = Order(
        source,
        lanes=config.data.lanes,
        global_batch_size=batch,
        shuffle_window_blocks=config.data.shuffle_window_blocks,
        seed=config.seed,
        max_rows=max_rows,
    )
    reader = Reader(TimedSource(source, reading), order, range(config.data.lanes // num_ranks), accumulate)
    made = batches(
        choosing.each(reader.steps(0)),
        config.features,
        micro_batch_size=batch // num_ranks // accumulate,
        accumulate_steps=accumulate,
        agree=agree_alone,
    )
    lanes = [order.lane_range(lane) for lane in reader.owned_lanes]
    wall, cpu = _exhaust(made)
    parts = {
        "read": reading.seconds,
        "shuffle": choosing.seconds - reading.seconds,
        "batch": cpu - choosing.seconds,
    }
    return Pass(sum(map(len, lanes)), wall, cpu, parts)


def read_plainly(config: RunConfig, num_rows: int) -> Pass:
    """Whole blocks until so many rows are read; where the files hold fewer, they are read again from the first on."""
    rows = 0

    def until_enough() -> Iterator[int]:
        nonlocal rows
        while True:
            for num in plain_batches(config):
                rows += num
                yield num
                if rows >= num_rows:
                    return

    wall, cpu = _exhaust(until_enough())
    return Pass(rows, wall, cpu, {})


def _exhaust(items: Iterator[Any]) -> tuple[float, float]:
    """Wall and CPU seconds until the last item."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in items:
        pass
    return time.perf_counter() - wall, time.process_time() - cpu
