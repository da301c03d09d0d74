"""What a run measured."""

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from dlrm_scale.training.monitor import Metrics

KEPT = ("num_steps", "samples_consumed", "losses", "eval_metrics", "mended", "eval_mended", "skipped_micro_batches")


@dataclass
class TrainResult:
    """What a run measured, over all its attempts; times are of this attempt.

    Timed samples and seconds leave out the first `log.warmup_steps`, logging, evaluation and saves.
    """

    num_steps: int = 0
    samples_consumed: int = 0
    timed_samples: int = 0
    timed_seconds: float = 0.0
    step_ms: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    eval_metrics: Metrics = field(default_factory=dict)
    mended: dict[str, int] = field(default_factory=dict)
    eval_mended: dict[str, int] = field(default_factory=dict)
    skipped_micro_batches: int = 0
    preempted: bool = False  # a signal ended it before its last step

    @property
    def samples_per_second(self) -> float | None:
        return self.timed_samples / self.timed_seconds if self.timed_seconds else None

    def progress(self) -> dict[str, Any]:
        """What the next attempt must know; a copy."""
        return {name: deepcopy(getattr(self, name)) for name in KEPT}

    def go_on_from(self, progress: dict[str, Any]) -> None:
        for name in KEPT:
            setattr(self, name, progress[name])
