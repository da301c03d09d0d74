"""From a source to this rank's batches: lanes read in order, agreed on by all ranks, batched, ahead of time.

with prefetch(batches(reader.steps(epoch), schema, ...), depth=4) as stream:
    for batch in stream: ...
"""

import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dlrm_scale.data.batch import RecBatch
from dlrm_scale.data.order import Order, Window
from dlrm_scale.data.packed import PackedIds, pack
from dlrm_scale.data.source import Jagged, Rows, Source
from dlrm_scale.errors import PeerError
from dlrm_scale.features import FeatureSchema

T = TypeVar("T")


@dataclass(frozen=True)
class StepStatus:
    """What one rank has for a step."""

    weight_sum: float
    ended: bool
    failed: bool
    stop: bool = False  # asked to, by a signal


@dataclass(frozen=True)
class StepAgreement:
    """What all ranks have for it."""

    mean_rank_weight: float
    all_ended: bool
    any_failed: bool
    any_stop: bool = False


def agree_alone(status: StepStatus) -> StepAgreement:
    """The agreement of one process with itself."""
    return StepAgreement(status.weight_sum, status.ended, status.failed, status.stop)


class Reader:
    """Reads the lanes that one rank owns.

    Args:
        accumulate_steps: micro-batches of a step. Each lane gives its part to each of them, so that a micro-batch too holds
            the same samples at any number of ranks: sharded tables step at every one.

    Attributes:
        mended: what policy changed in the rows read of the epoch under way. A window that several lanes read counts for the
            one that holds its first row, so that over all ranks and a whole epoch each row counts once.
        on_read: called with (epoch, micro-batch of the epoch, positions [start, stop) of each lane) before each yield.
    """

    def __init__(self, source: Source, order: Order, owned_lanes: range, accumulate_steps: int = 1) -> None:
        assert order.lane_batch_size % accumulate_steps == 0, (order.lane_batch_size, accumulate_steps)
        self.source, self.order, self.owned_lanes = source, order, owned_lanes
        self.accumulate_steps = accumulate_steps
        lanes = [order.lane_range(lane) for lane in owned_lanes]
        self._owned_positions = range(lanes[0].start, lanes[-1].stop)
        self._open: dict[Window, tuple[Rows, np.ndarray | None]] = {}
        self._counted: tuple[int, dict[int, dict[str, int]]] = (0, {})
        self._earlier = self._counted
        self.on_read: Callable[[int, int, list[tuple[int, int]]], None] | None = None

    @property
    def mended(self) -> Counter[str]:
        return sum((Counter(counts) for counts in self.counted()[1].values()), Counter())

    def counted(self) -> tuple[int, dict[int, dict[str, int]]]:
        """The epoch that is being read, and what was changed in each window counted so far, by where the window starts.

        May be called while another thread reads.
        """
        epoch, windows = self._counted
        return epoch, dict(list(windows.items()))

    def count_from(self, epoch: int, windows: dict[int, dict[str, int]]) -> None:
        """Goes on counting from what `counted` gave: these windows of that epoch are not counted again."""
        self._earlier = (epoch, windows)

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[Rows]:
        """This rank's rows of each micro-batch from step `first_step` on: as many as all steps have, the last ones maybe empty.

        Raises:
            DataError: a bad value, when it is read.
        """
        windows = self.order.windows(epoch)
        starts = np.array([w.start for w in windows])
        num_rows = self.order.lane_batch_size // self.accumulate_steps
        self._open.clear()
        self._counted = (epoch, dict(self._earlier[1]) if self._earlier[0] == epoch else {})
        left = [
            self.order.lane_range(lane)[first_step * self.accumulate_steps * num_rows :] for lane in self.owned_lanes
        ]
        for micro_batch in range(
            first_step * self.accumulate_steps, self.order.steps_per_epoch * self.accumulate_steps
        ):
            parts, ranges = [], []
            for lane, positions in enumerate(left):
                left[lane] = positions[num_rows:]
                parts += self._read(windows, starts, positions[:num_rows], left)
                ranges.append((positions.start, positions[:num_rows].stop))
            if self.on_read:
                self.on_read(epoch, micro_batch, ranges)
            yield concatenate(parts) if parts else take(self._rows_of(windows[0])[0], np.arange(0))

    def _read(
        self, windows: list[Window], starts: np.ndarray, positions: range, left: Sequence[range]
    ) -> Iterator[Rows]:
        """The rows at consecutive positions of the epoch's order, in parts that each lie in one window.

        Args:
            left: what each lane reads after this; a window that none of them stands in is closed once it is read to its end.
        """
        at = positions.start
        while at < positions.stop:
            window = windows[int(np.searchsorted(starts, at, side="right")) - 1]
            stop = window.start + window.num_rows
            end = min(positions.stop, stop)
            rows, permutation = self._rows_of(window)
            within = slice(at - window.start, end - window.start)
            part = take(rows, np.arange(within.start, within.stop) if permutation is None else permutation[within])
            if end == stop and not any(lane and window.start <= lane.start < stop for lane in left):
                self._open.pop(window, None)
            yield part
            at = end

    def _rows_of(self, window: Window) -> tuple[Rows, np.ndarray | None]:
        """A window's rows, and in which order to take them. Kept while a lane stands in it, so at most one for each lane here.

        A lane that ends inside a window which the next lane has read on from reads it a second time.
        """
        opened = self._open.get(window)
        if opened is None:
            before = Counter(self.source.mended)
            rows = concatenate([self._block(block) for block in window.blocks])
            counted = self._counted[1]
            if window.start in self._owned_positions and window.start not in counted:
                counted[window.start] = dict(Counter(self.source.mended) - before)
            opened = self._open[window] = (rows, window.permutation())
        return opened

    def _block(self, block: int) -> Rows:
        rows, wanted = self.source.read_block(block), int(self.order.block_rows[block])
        return rows if rows.num_rows == wanted else take(rows, np.arange(wanted))


def take(rows: Rows, index: np.ndarray) -> Rows:
    """The rows at `index`, in that order."""
    return Rows(
        dense_RF=rows.dense_RF.take(index, axis=0),
        ids=_packed(rows).take(index),
        labels_RT=rows.labels_RT.take(index, axis=0),
        weights_R=rows.weights_R.take(index),
        groups_R=rows.groups_R.take(index),
    )


def concatenate(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, one part behind the other."""
    if len(parts) == 1:
        return replace(parts[0], ids=_packed(parts[0]))
    columns = ("dense_RF", "labels_RT", "weights_R", "groups_R")
    return Rows(
        ids=pack([part.ids for part in parts], [part.num_rows for part in parts]),
        **{c: np.concatenate([getattr(part, c) for part in parts]) for c in columns},
    )


def _packed(rows: Rows) -> PackedIds:
    return rows.ids if isinstance(rows.ids, PackedIds) else pack([rows.ids], [rows.num_rows])


def batches(
    micro_batches: Iterator[Rows],
    schema: FeatureSchema,
    *,
    micro_batch_size: int,
    accumulate_steps: int,
    agree: Callable[[StepStatus], StepAgreement],
) -> Iterator[RecBatch]:
    """Micro-batches of rows as batches of one size, filled up with rows of weight 0; `accumulate_steps` of them are a step.

    All ranks end together: one whose rows have ended goes on with batches of weight 0 until the last rank's have, and when
    one is asked to stop, no rank gives out the step that they then agree on. Each
    batch is given the weight of its whole step, so that the micro-batches' losses add up to the global batch's mean.

    Raises:
        DataError: from reading; the other ranks hear of it before it is raised, and raise PeerError.
    """
    while True:
        try:
            step = list(islice(micro_batches, accumulate_steps))
        except BaseException:
            agree(StepStatus(0.0, ended=True, failed=True))
            raise
        weight_sum = float(sum(rows.weights_R.sum(dtype=np.float64) for rows in step))
        agreed = agree(StepStatus(weight_sum, ended=not step, failed=False))
        if agreed.any_failed:
            raise PeerError("another rank could not read its data; its own error says why")
        if agreed.all_ended or agreed.any_stop:
            return
        step += [_no_rows(schema)] * (accumulate_steps - len(step))
        for rows in step:
            # a step of total weight 0 teaches nothing whatever it is divided by
            yield to_batch(rows, schema, micro_batch_size, agreed.mean_rank_weight or 1.0)


def _no_rows(schema: FeatureSchema) -> Rows:
    nothing = Jagged(np.zeros(0, np.int64), np.zeros(1, np.int64))
    return Rows(
        dense_RF=np.zeros((0, len(schema.dense)), np.float32),
        ids={key: nothing for key in (*schema.bag_keys, *schema.sequence_keys)},
        labels_RT=np.zeros((0, len(schema.labels)), np.float32),
        weights_R=np.zeros(0, np.float32),
        groups_R=np.zeros(0, np.int64),
    )


def to_batch(rows: Rows, schema: FeatureSchema, batch_size: int, mean_rank_weight: float) -> RecBatch:
    """`rows`, filled up to `batch_size` with rows of weight 0 that hold no id. A full batch shares the memory of `rows`."""
    missing = batch_size - rows.num_rows
    assert missing >= 0, (batch_size, rows.num_rows)
    ids = _packed(rows)

    def filled(column: np.ndarray) -> torch.Tensor:
        if missing:
            column = np.concatenate([column, np.zeros((missing, *column.shape[1:]), column.dtype)])
        return torch.from_numpy(column)

    return RecBatch(
        dense_BF=filled(rows.dense_RF),
        bags=_keyed_jagged(ids, schema.bag_keys, batch_size),
        sequences=_keyed_jagged(ids, schema.sequence_keys, batch_size),
        labels_BT=filled(rows.labels_RT),
        weights_B=filled(rows.weights_R),
        groups_B=filled(rows.groups_R),
        mean_rank_weight=torch.tensor(mean_rank_weight, dtype=torch.float32),
    )


def _keyed_jagged(ids: PackedIds, keys: tuple[str, ...], batch_size: int) -> KeyedJaggedTensor | None:
    if not keys:
        return None
    values, lengths_KB = ids.keyed(keys, batch_size)
    return KeyedJaggedTensor(
        keys=list(keys), values=torch.from_numpy(values), lengths=torch.from_numpy(lengths_KB.ravel())
    )


@contextmanager
def prefetch(items: Iterator[T], depth: int) -> Iterator[Iterator[T]]:
    """Runs `items` in a background thread, at most `depth` items ahead of the one last taken; leaving the context stops it.

    What `items` raises is raised to the consumer in its place.
    """
    ready: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    free = threading.Semaphore(depth)
    stop = threading.Event()

    def work() -> None:
        try:
            while True:
                free.acquire()
                if stop.is_set():
                    return
                ready.put((next(items), None))
        except BaseException as e:  # StopIteration too
            ready.put((None, e))

    def consume() -> Iterator[T]:
        while True:
            item, end = ready.get()
            if isinstance(end, StopIteration):
                return
            if end is not None:
                raise end
            free.release()
            yield item

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        yield consume()
    finally:
        stop.set()
        free.release()
        thread.join(timeout=5)  # a read that takes longer ends by itself
