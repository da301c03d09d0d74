"""The step loop: load, step, log, evaluate."""

import math
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist

from dlrm_scale.config import RunConfig
from dlrm_scale.data.batch import RecBatch
from dlrm_scale.errors import DivergedError
from dlrm_scale.sharding.apply import ShardedModel
from dlrm_scale.training.checkpoints import RunCheckpoints
from dlrm_scale.training.clock import StepClock
from dlrm_scale.training.monitor import Board, Metrics, PredictionStore, RunningLoss, peak_memory_bytes
from dlrm_scale.training.optimizers import TrainOptimizer
from dlrm_scale.training.progress import Progress
from dlrm_scale.training.ranks import Rank, sum_counts
from dlrm_scale.training.readers import EvalReader, TrainReader
from dlrm_scale.training.result import TrainResult
from dlrm_scale.training.state import RankState

PIPELINES = {"sparse_dist": TrainPipelineSparseDist, "none": TrainPipelineBase}


def due(step: int, every: int) -> bool:
    """Whether something that happens `every` steps happens after `step` steps; never for every = 0."""
    return every > 0 and step > 0 and step % every == 0


class Trainer:
    """Trains a sharded model over a reader's steps. Every rank makes one and calls `train`; rank 0 reports.

    Args:
        checkpoints: where the run's state goes, and may come from; None: nothing is saved.
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
        checkpoints: RunCheckpoints | None = None,
    ) -> None:
        self.config, self.rank, self.model, self.board, self.progress = config, rank, model, board, progress
        self.train_reader, self.eval_reader = train_reader, eval_reader
        self.optimizer = TrainOptimizer(model, config.train, train_reader.num_steps)
        self.clock = StepClock(rank.device)
        self.window = PredictionStore(
            config.features.labels,
            config.features.group is not None,
            max(1, config.log.window_samples // rank.world_size),
        )
        self.loss = RunningLoss(torch.zeros((), device=rank.device))
        self.result = TrainResult()
        self.checkpoints = checkpoints
        self.logged = (0, 0.0)  # timed samples and seconds at the last log
        self.warm_from = config.log.warmup_steps
        self._watch_stages()

    @property
    def rank_state(self) -> RankState:
        return RankState(self.rank, self.config.seed, self.loss, self.window)

    def train(self) -> TrainResult:
        """Runs the steps that are left, logs, evaluates and saves on the way and after the last one."""
        train, result, total = self.config.train, self.result, self.train_reader.num_steps
        if self.checkpoints:
            self.checkpoints.restore(self)
        self.warm_from = result.num_steps + self.config.log.warmup_steps
        between_evaluations = (self.eval_reader and self.config.eval.every_steps) or total
        with self.train_reader.batches(result.samples_consumed) as batches:
            optimizer = _Watched(self.optimizer, self.clock)
            timed = self.clock.timed(batches)
            while result.num_steps < total:
                # A pipeline of its own up to each evaluation: it must run empty, as it holds exchanged ids of the batches it
                # has begun, and an empty one does not start again.
                pipeline = PIPELINES[train.pipeline](self.model, optimizer, self.rank.device)
                until_evaluation = between_evaluations - result.num_steps % between_evaluations
                num_steps = min(until_evaluation, total - result.num_steps)
                stop = result.num_steps + num_steps
                if not self._run_steps(pipeline, islice(timed, num_steps * train.accumulate_steps), stop):
                    break  # the data ended before its own count of rows
                if isinstance(pipeline, TrainPipelineSparseDist):
                    pipeline.detach()
                self._evaluate()
                if self._save_is_due() or result.num_steps == total:
                    self._save()
        if self.checkpoints:
            self.checkpoints.finish()
        return result

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
        if self.loss.num_steps:
            self._log()
        return self.result.num_steps > first

    def _save_is_due(self) -> bool:
        return self.checkpoints is not None and due(self.result.num_steps, self.config.checkpoint.every_steps)

    def _save(self) -> None:
        if self.checkpoints:
            self.checkpoints.save(self)

    def _step(self, pipeline: Any, batches: Iterator[RecBatch]) -> bool:
        """One optimizer step; False if the data had ended."""
        self.clock.begin()
        try:
            for _ in range(self.config.train.accumulate_steps):
                self.window.add(pipeline.progress(batches))
        except StopIteration:
            return False
        self.clock.finish()
        self.result.num_steps += 1
        self.result.samples_consumed = self.train_reader.consumed_after(self.result.num_steps)
        self.loss.num_steps += 1
        self.progress.advance(self.result.num_steps)
        return True

    def _start_span(self) -> None:
        self.span = (time.perf_counter(), self.result.samples_consumed)

    def _end_span(self) -> None:
        """Counts the time and samples since `_start_span`, unless they belong to the warm-up."""
        if self.rank.device.type == "cuda":
            torch.cuda.synchronize(self.rank.device)
        started, samples_before = self.span
        if self.result.num_steps > self.warm_from:
            self.result.timed_seconds += time.perf_counter() - started
            self.result.timed_samples += self.result.samples_consumed - samples_before

    def _log(self) -> None:
        """Collective: losses and window metrics of all ranks, to TensorBoard and the progress line."""
        step = self.result.num_steps
        loss = self.loss.sum / self.loss.num_steps
        dist.all_reduce(loss)
        loss = loss.item() / self.rank.world_size
        self.loss.sum.zero_()
        self.loss.num_steps = 0
        if not math.isfinite(loss):  # the same on every rank
            raise DivergedError(
                f"the loss is {loss} in the steps up to {step}; lower train.dense.lr and train.sparse.lr, warm up longer "
                "(train.schedule.warmup_steps) or clip (train.clip_grad_norm)"
            )
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
        self.board.scalars("data", {"samples_consumed": self.result.samples_consumed, **mended}, step)
        samples_per_second = self._speed_since_last_log()
        if samples_per_second:
            self.board.scalars("speed", {"samples_per_s": samples_per_second}, step)
        self.progress.log(step, loss, metrics, samples_per_second)

    def _speed_since_last_log(self) -> float | None:
        samples, seconds = self.result.timed_samples - self.logged[0], self.result.timed_seconds - self.logged[1]
        self.logged = (self.result.timed_samples, self.result.timed_seconds)
        return samples / seconds if seconds else None

    def _evaluate(self) -> None:
        """Collective: metrics over the held-out split, to TensorBoard and the result."""
        if self.eval_reader is None:
            return
        metrics = evaluate(self.config, self.rank, self.model, self.eval_reader)
        mended = sum_counts(self.eval_reader.reader.mended, self.rank)
        if metrics is not None and mended is not None:
            self.result.eval_mended = mended
            self.result.eval_metrics = metrics
            self.board.metrics("eval", metrics, self.result.num_steps)
            self.progress.log_eval(self.result.num_steps, metrics)

    def _watch_stages(self) -> None:
        """Marks the stages' borders at the model's forward, and sums its losses without a wait for the device."""

        def before_forward(module: Any, args: Any) -> None:
            if self.model.training:
                self.clock.end("input_dist")

        def after_forward(module: Any, args: Any, output: tuple[torch.Tensor, Any]) -> None:
            if self.model.training:
                self.clock.end("forward")
                self.loss.sum += output[0].detach()

        self.model.register_forward_pre_hook(before_forward)
        self.model.register_forward_hook(after_forward)


class _Watched:
    """The optimizer as the pipeline calls it, marking the ends of its stages."""

    def __init__(self, optimizer: TrainOptimizer, clock: StepClock) -> None:
        self.optimizer, self.clock = optimizer, clock

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.clock.end("backward")
        self.optimizer.step()
        self.clock.end("optimizer")


@torch.no_grad()
def evaluate(config: RunConfig, rank: Rank, model: ShardedModel, reader: EvalReader) -> Metrics | None:
    """Metrics by label over the held-out split on rank 0, None on the others. Collective; leaves the model in eval mode."""
    model.eval()
    store = PredictionStore(config.features.labels, config.features.group is not None, max_local_rows=None)
    with reader.batches() as batches:
        for batch in batches:
            _, predictions = model.module(batch.to(rank.device))
            store.add(predictions)
    return store.metrics(rank)
