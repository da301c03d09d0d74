"""A run's data as its ranks read it: which rows, in how many steps, agreed on by all ranks."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import islice

from dlrm_scale.config import RunConfig
from dlrm_scale.data.batch import RecBatch
from dlrm_scale.data.loader import Reader, StepAgreement, StepStatus, batches, prefetch
from dlrm_scale.data.order import Order
from dlrm_scale.data.source import Rows, Source
from dlrm_scale.errors import ConfigError
from dlrm_scale.resilience.preemption import Preemption
from dlrm_scale.training.ranks import Rank, make_agree


class TrainReader:
    """This rank's micro-batches of every epoch, up to the step at which a signal to any rank stops all. Making one is collective.

    Attributes:
        stopped: whether that has come to pass, at a step some way ahead of the trainer's.
    """

    def __init__(self, config: RunConfig, rank: Rank, source: Source, preemption: Preemption | None = None) -> None:
        self.config, self.accumulate_steps, self.device = config, config.train.accumulate_steps, rank.device
        self.agree_with_ranks, self.agree = make_agree(), self._agree_or_stop
        self.preemption, self.stopped = preemption, False
        self.reader = _reader(
            config,
            rank,
            source,
            config.train.global_batch_size,
            shuffle_window_blocks=config.data.shuffle_window_blocks,
            accumulate_steps=self.accumulate_steps,
        )
        self.micro_batch_size = config.train.global_batch_size // rank.world_size // self.accumulate_steps
        all_steps = self.reader.order.steps_per_epoch * config.train.epochs
        self.num_steps = min(all_steps, config.train.max_steps or all_steps)

    def batches(self, samples_consumed: int = 0) -> AbstractContextManager[Iterator[RecBatch]]:
        """Those that come after so many samples. Raises ConfigError: that is not the end of a step."""
        return _batches(self, self._rows(*self.reader.order.locate(samples_consumed)))

    def consumed_after(self, num_steps: int) -> int:
        """Samples that all ranks have trained on after so many steps: the data position."""
        epoch, step = divmod(num_steps - 1, self.reader.order.steps_per_epoch)
        return self.reader.order.consumed_after(epoch, step)

    def _agree_or_stop(self, status: StepStatus) -> StepAgreement:
        requested = self.preemption is not None and self.preemption.requested is not None
        agreed = self.agree_with_ranks(replace(status, stop=requested))
        self.stopped = self.stopped or agreed.any_stop
        return agreed

    def _rows(self, first_epoch: int, first_step: int) -> Iterator[Rows]:
        epochs = (
            self.reader.steps(epoch, first_step if epoch == first_epoch else 0)
            for epoch in range(first_epoch, self.config.train.epochs)
        )
        steps_left = self.num_steps - first_epoch * self.reader.order.steps_per_epoch - first_step
        return islice((rows for epoch in epochs for rows in epoch), max(0, steps_left) * self.accumulate_steps)


class EvalReader:
    """This rank's batches of the held-out split, as large as training's micro-batches. Making one is collective."""

    def __init__(self, config: RunConfig, rank: Rank, source: Source) -> None:
        self.config, self.agree, self.accumulate_steps, self.device = config, make_agree(), 1, rank.device
        batch = config.train.global_batch_size // config.train.accumulate_steps
        self.reader = _reader(config, rank, source, batch, shuffle_window_blocks=0, max_rows=config.eval.max_samples)
        self.micro_batch_size = batch // rank.world_size

    def batches(self) -> AbstractContextManager[Iterator[RecBatch]]:
        return _batches(self, self.reader.steps(0))


def _reader(
    config: RunConfig,
    rank: Rank,
    source: Source,
    global_batch_size: int,
    *,
    shuffle_window_blocks: int,
    max_rows: int | None = None,
    accumulate_steps: int = 1,
) -> Reader:
    order = Order(
        source,
        lanes=config.data.lanes,
        global_batch_size=global_batch_size,
        shuffle_window_blocks=shuffle_window_blocks,
        seed=config.seed,
        max_rows=max_rows,
    )
    lanes = config.data.lanes // rank.world_size
    _check_memory(config, order, lanes)
    return Reader(source, order, range(rank.index * lanes, (rank.index + 1) * lanes), accumulate_steps)


def _check_memory(config: RunConfig, order: Order, lanes_per_rank: int) -> None:
    """Each lane holds one decoded window: blocks (of Parquet: row groups) that are large make that the whole memory."""
    window_rows = max(window.num_rows for window in order.windows(0))
    held_rows = min(order.num_rows, lanes_per_rank * window_rows)
    if held_rows > config.data.max_held_rows:
        raise ConfigError(
            f"a rank would hold {held_rows:,} decoded rows: {lanes_per_rank} lanes x windows of {window_rows:,} rows "
            f"(data.shuffle_window_blocks={config.data.shuffle_window_blocks} blocks of up to {int(order.block_rows.max()):,}), more "
            f"than data.max_held_rows ({config.data.max_held_rows:,}); write the files with smaller row groups (8192 to 65536 "
            "rows), set fewer data.lanes or data.shuffle_window_blocks, or raise data.max_held_rows if the memory is there"
        )


def _batches(of: TrainReader | EvalReader, rows: Iterator[Rows]) -> AbstractContextManager[Iterator[RecBatch]]:
    """From page-locked memory where they go to a GPU: only from there does a copy run beside what the trainer does."""
    stream = batches(
        rows,
        of.config.features,
        micro_batch_size=of.micro_batch_size,
        accumulate_steps=of.accumulate_steps,
        agree=of.agree,
    )
    if of.device.type == "cuda":
        stream = (batch.pin_memory() for batch in stream)
    return prefetch(stream, of.config.data.prefetch_batches)
