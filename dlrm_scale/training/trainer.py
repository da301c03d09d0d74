"""The step loop: load, step, log, evaluate."""

import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from dlrm_scale.checkpoint.interval import SaveSchedule
from dlrm_scale.config import RunConfig
from dlrm_scale.data.batch import RecBatch
from dlrm_scale.models.ranking_model import Predictions
from dlrm_scale.resilience.guards import Guard
from dlrm_scale.resilience.straggler import OwnTime, Streak, slowest
from dlrm_scale.resilience.watchdog import Watchdog
from dlrm_scale.sharding.apply import ShardedModel
from dlrm_scale.training.bad_batches import BadBatches
from dlrm_scale.training.clock import StepClock
from dlrm_scale.training.device import set_product_precision
from dlrm_scale.training.keepers import Keepers
from dlrm_scale.training.monitor import Board, Metrics, PredictionStore, RunningLoss, peak_memory_bytes
from dlrm_scale.training.optimizers import TrainOptimizer
from dlrm_scale.training.pipelines import make_pipeline
from dlrm_scale.training.progress import Progress
from dlrm_scale.training.ranks import Rank, from_first_rank, gather_rows, sum_counts
from dlrm_scale.training.readers import EvalReader, TrainReader
from dlrm_scale.training.result import TrainResult
from dlrm_scale.training.state import RankState

LOGS_OF_A_STRAGGLER = 3  # in a row, before the console names it


def due(step: int, every: int) -> bool:
    """Whether something that happens `every` steps happens after `step` steps; never for every = 0."""
    return every > 0 and step > 0 and step % every == 0


class Trainer:
    """Trains a sharded model over a reader's steps. Every rank makes one and calls `train`; rank 0 reports.

    Args:
        keepers: None: nothing is watched, saved or written down.
    """

    def __init__(
        self,
        config: RunConfig,
        rank: Rank,
        model: ShardedModel,
        train_reader: TrainReader,
        eval_reader: EvalReader | None,
        board: Board,
        progress: Progress,
        keepers: Keepers | None = None,
    ) -> None:
        self.config, self.rank, self.model, self.board, self.progress = config, rank, model, board, progress
        set_product_precision(config.train, rank.device)
        self.train_reader, self.eval_reader = train_reader, eval_reader
        self.optimizer = TrainOptimizer(model, config.train, train_reader.num_steps)
        self.keepers = keepers or Keepers(Watchdog(rank.index, rank.world_size, 0, 0))
        self.watchdog = self.keepers.watchdog
        self.bad_batches = BadBatches(config, rank, self.keepers.run_dir, self.keepers.left_out_steps)
        tables = model.module.embeddings
        trained_after = [*self.optimizer.dense_parameters, *self.optimizer.replicated_tables.values()]
        collections = [c for c in (tables.ebc, tables.ec) if c is not None]
        self.clock = StepClock(rank.device)
        self.guard = Guard(collections, trained_after, self.bad_batches, lambda: self.clock.end("dense_backward"))
        self.own_time, self.slow = OwnTime(rank.device), Streak(config.resilience.straggler_ratio)
        self.window = PredictionStore(
            config.features.labels,
            config.features.group is not None,
            max(1, config.log.window_samples // rank.world_size),
        )
        self.loss = RunningLoss(torch.zeros((), device=rank.device))
        self.result = TrainResult()
        self.logged = (0, 0.0)  # timed samples and seconds at the last log
        self.stepped = (0.0, 0)  # seconds and steps of this attempt, logging, evaluation and saves apart
        self.warm_from = config.log.warmup_steps
        self.saves = SaveSchedule(config.checkpoint.every_steps, config.checkpoint.mtbf_hours * 3600)
        self._watch_stages()

    @property
    def rank_state(self) -> RankState:
        return RankState(self.rank, self.config.seed, self.loss, self.window)

    def train(self) -> TrainResult:
        """Runs the steps that are left, logs, evaluates and saves on the way and after the last one."""
        train, result, total = self.config.train, self.result, self.train_reader.num_steps
        if self.keepers.checkpoints:
            self.watchdog.enter("load")
            self.keepers.checkpoints.restore(self)
            self.bad_batches.go_on_from(result.num_steps, result.skipped_micro_batches)
        self.keepers.note("ready", result.num_steps)
        self.saves.begin(result.num_steps)
        self.saved_step = result.num_steps
        self.warm_from = result.num_steps + self.config.log.warmup_steps
        between_evaluations = (self.eval_reader and self.config.eval.every_steps) or total
        if self.keepers.account:
            self.train_reader.reader.on_read = self.keepers.account.read
        self.train_reader.agree = self.watchdog.watched(self.train_reader.agree)
        with self.train_reader.batches(result.samples_consumed) as batches:
            optimizer = _Watched(self.optimizer, self.clock, self.watchdog)
            timed = self._fetched(self.clock.timed(batches))
            while result.num_steps < total:
                # A pipeline of its own up to each evaluation: it must run empty, as it holds exchanged ids of the batches it
                # has begun, and an empty one does not start again.
                device, backward = self.rank.device, self.guard.backward
                pipeline = make_pipeline(train.pipeline, self.model, optimizer, device, backward)
                until_evaluation = between_evaluations - result.num_steps % between_evaluations
                num_steps = min(until_evaluation, total - result.num_steps)
                stop = result.num_steps + num_steps
                any_step = self._run_steps(pipeline, islice(timed, num_steps * train.accumulate_steps), stop)
                result.preempted = self._stopped_before(stop)
                if result.preempted or not any_step:
                    break  # or the data ended before its own count of rows
                if isinstance(pipeline, TrainPipelineSparseDist):
                    pipeline.detach()
                self._evaluate()
                if self._save_is_due() or result.num_steps == total:
                    self._save()
        if result.preempted and result.num_steps > self.saved_step:
            self._save()
        if self.keepers.checkpoints:
            self.watchdog.enter("save")
            self.keepers.checkpoints.finish()
        self.keepers.note("end", result.num_steps)
        return result

    def _stopped_before(self, step: int) -> bool:
        """Whether a signal has ended the batches short of `step`."""
        return self.train_reader.stopped and self.result.num_steps < step

    def _fetched(self, batches: Iterator[RecBatch]) -> Iterator[RecBatch]:
        while True:
            self.watchdog.enter("data")
            batch = next(batches, None)
            self.watchdog.enter("input_dist")
            if batch is None:
                return
            yield batch

    def _run_steps(self, pipeline: Any, batches: Iterator[RecBatch], stop: int) -> bool:
        """Steps to the end of `batches`, which is step `stop`; whether there was one. Step `stop` is saved once it is evaluated."""
        log, first = self.config.log, self.result.num_steps
        self.model.train()
        self._start_span()
        while self._step(pipeline, batches):
            step = self.result.num_steps
            save = step < stop and self._save_is_due()
            if due(step, log.every_steps) or step == self.warm_from or save:
                self._end_span()
                if due(step, log.every_steps):
                    self._log()
                if save:
                    self._save()
                self._start_span()
        self._end_span()
        if self.loss.num_steps and not self._stopped_before(stop):  # a run that goes on later logs where it would have
            self._log()
        return self.result.num_steps > first

    def _save_is_due(self) -> bool:
        return self.keepers.checkpoints is not None and self.saves.is_due(self.result.num_steps)

    def _save(self) -> None:
        if self.keepers.checkpoints:
            self.watchdog.enter("save")
            started = time.perf_counter()
            if self.keepers.account:
                self.keepers.account.flush()
            self.keepers.checkpoints.save(self)
            self.saved_step = self.result.num_steps
            stall_seconds = time.perf_counter() - started
            self.keepers.note("save", self.result.num_steps, stall_seconds)
            if self.saves.measures:
                steps = self.saves.interval_steps(stall_seconds, self.stepped[0] / self.stepped[1])
                self.saves.measured(self.result.num_steps, from_first_rank(steps))

    def _step(self, pipeline: Any, batches: Iterator[RecBatch]) -> bool:
        """One optimizer step; False if the data had ended."""
        self.clock.begin()
        try:
            for _ in range(self.config.train.accumulate_steps):
                self._count(pipeline.progress(batches))
        except StopIteration:
            return False
        self.clock.finish()
        self.result.num_steps += 1
        self.watchdog.step = self.result.num_steps
        self.result.skipped_micro_batches = self.bad_batches.num_skipped
        self.result.samples_consumed = self.train_reader.consumed_after(self.result.num_steps)
        self.loss.num_steps += 1
        self.progress.advance(self.result.num_steps)
        return True

    def _count(self, predictions: Predictions) -> None:
        """Adds what the micro-batch just trained on showed; nothing of one that was dropped."""
        if self.keepers.account:
            self.keepers.account.trained(skipped=self.guard.dropped)
        if not self.guard.dropped:
            self.window.add(predictions)
            self.loss.add(self.guard.loss)

    def _start_span(self) -> None:
        self.span = (time.perf_counter(), self.result.num_steps, self.result.samples_consumed)

    def _end_span(self) -> None:
        """Counts the time, steps and samples since `_start_span`; in the result, unless they belong to the warm-up."""
        if self.rank.device.type == "cuda":
            torch.cuda.synchronize(self.rank.device)
        started, steps_before, samples_before = self.span
        seconds = time.perf_counter() - started
        self.stepped = (self.stepped[0] + seconds, self.stepped[1] + self.result.num_steps - steps_before)
        if self.result.num_steps > self.warm_from:
            self.result.timed_seconds += seconds
            self.result.timed_samples += self.result.samples_consumed - samples_before

    def _log(self) -> None:
        """Collective: losses and window metrics of all ranks, to TensorBoard and the progress line."""
        self.watchdog.enter("log")
        step = self.result.num_steps
        loss = self._mean_loss()
        self._report_stragglers()
        if self.keepers.account:
            self.keepers.account.flush()
        self.keepers.note("progress", step)
        self.result.losses.append(loss)
        steps_ms = self.clock.drain()
        warm = [ms for i, ms in enumerate(reversed(steps_ms)) if step - i > self.warm_from][::-1]
        self.result.step_ms += warm
        metrics = self.window.metrics(self.rank)
        mended = sum_counts(self.train_reader.reader.mended, self.rank)
        if metrics is None or mended is None:
            return
        self.result.mended = mended
        self.board.scalars("train", {"loss": loss}, step)
        self.board.metrics("train", metrics, step)
        mean_ms = {stage: sum(ms[stage] for ms in steps_ms) / len(steps_ms) for stage in steps_ms[0]}
        self.board.scalars("time_ms", mean_ms, step)
        self.board.scalars("learning_rate", self.optimizer.learning_rates, step)
        self.board.scalars("memory", peak_memory_bytes(self.rank.device), step)
        if self.keepers.events:
            self.board.scalars("goodput", self.keepers.events.goodput().as_json(), step)
        self.board.scalars("guard", {"skipped_micro_batches": self.bad_batches.num_skipped}, step)
        self.board.scalars("data", {"samples_consumed": self.result.samples_consumed, **mended}, step)
        samples_per_second = self._speed_since_last_log()
        if samples_per_second:
            self.board.scalars("speed", {"samples_per_s": samples_per_second}, step)
        self.progress.log(step, loss, metrics, samples_per_second)

    def _mean_loss(self) -> float:
        """Over all ranks and the micro-batches since the last log; NaN if the guard dropped them all."""
        steps = self.loss.num_micro_batches / self.config.train.accumulate_steps
        loss = self.loss.sum / steps if steps else torch.full_like(self.loss.sum, float("nan"))
        dist.all_reduce(loss)
        self.loss.clear()
        return loss.item() / self.rank.world_size

    def _report_stragglers(self) -> None:
        ms_by_rank = gather_rows(torch.tensor([self.own_time.drain()]), self.rank)
        if ms_by_rank is None or len(ms_by_rank) == 1:
            return
        rank, ratio = slowest(ms_by_rank.tolist())
        step = self.result.num_steps
        self.board.scalars("straggler", {"slowest_rank": rank, "slowest_over_median": ratio}, step)
        if self.slow.add(rank, ratio) == LOGS_OF_A_STRAGGLER:
            self.progress.note(
                f"step {step}: rank {rank} takes {ratio:.1f} x the others' time for the dense forward pass"
            )

    def _speed_since_last_log(self) -> float | None:
        samples, seconds = self.result.timed_samples - self.logged[0], self.result.timed_seconds - self.logged[1]
        self.logged = (self.result.timed_samples, self.result.timed_seconds)
        return samples / seconds if seconds else None

    def _evaluate(self) -> None:
        """Collective: metrics over the held-out split, to TensorBoard and the result."""
        if self.eval_reader is None:
            return
        started = time.perf_counter()
        metrics = evaluate(self.config, self.rank, self.model, self.eval_reader, self.watchdog)
        mended = sum_counts(self.eval_reader.reader.mended, self.rank)
        self.keepers.note("evaluation", self.result.num_steps, time.perf_counter() - started)
        if metrics is not None and mended is not None:
            self.result.eval_mended = mended
            self.result.eval_metrics = metrics
            self.board.metrics("eval", metrics, self.result.num_steps)
            self.progress.log_eval(self.result.num_steps, metrics)

    def _watch_stages(self) -> None:
        """Marks the stages' borders at the model's forward, and the span of it that waits for no other rank."""

        def before_forward(module: Any, args: tuple[RecBatch]) -> None:
            if self.model.training:
                self.watchdog.enter("forward")
                self.clock.end("input_dist")
                self.guard.leave_out = self.bad_batches.began(args[0])

        def before_arch(module: Any, args: Any) -> None:
            if self.model.training:
                self.clock.end("embedding_forward")
                self.own_time.start()

        def after_forward(module: Any, args: Any, output: Any) -> None:
            if self.model.training:
                self.own_time.stop()
                self.clock.end("dense_forward")
                self.watchdog.enter("backward")

        self.model.register_forward_pre_hook(before_forward)
        self.model.module.dense.arch.register_forward_pre_hook(before_arch)
        self.model.register_forward_hook(after_forward)


class _Watched:
    """The optimizer as the pipeline calls it, marking the ends of its stages."""

    def __init__(self, optimizer: TrainOptimizer, clock: StepClock, watchdog: Watchdog) -> None:
        self.optimizer, self.clock, self.watchdog = optimizer, clock, watchdog

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.clock.end("embedding_backward")
        self.watchdog.enter("optimizer")
        self.optimizer.step()
        self.clock.end("optimizer")
        self.watchdog.enter("input_dist")


@torch.no_grad()
def evaluate(
    config: RunConfig, rank: Rank, model: ShardedModel, reader: EvalReader, watchdog: Watchdog
) -> Metrics | None:
    """Metrics by label over the held-out split on rank 0, None on the others. Collective; leaves the model in eval mode."""
    watchdog.enter("eval")
    model.eval()
    store = PredictionStore(config.features.labels, config.features.group is not None, max_local_rows=None)
    with reader.batches() as batches:
        for batch in batches:
            watchdog.enter("eval")
            _, predictions = model.module(batch.to(rank.device))
            store.add(predictions)
    return store.metrics(rank)
