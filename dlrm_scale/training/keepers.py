"""What stands by a trainer so that nothing is lost."""

from dataclasses import dataclass, field
from pathlib import Path

from dlrm_scale.resilience.account import Account
from dlrm_scale.resilience.goodput import EventLog, Kind
from dlrm_scale.resilience.watchdog import Watchdog
from dlrm_scale.training.checkpoints import RunCheckpoints


@dataclass(frozen=True)
class Keepers:
    """
    Attributes:
        account: of the samples that this rank trains on.
        checkpoints: where the run's state goes, and may come from.
        events: rank 0's.
        run_dir: where batches go that are not finite.
        left_out_steps: that an earlier attempt went back from (`train.nonfinite=rollback`); counted from 0.
    """

    watchdog: Watchdog
    account: Account | None = None
    checkpoints: RunCheckpoints | None = None
    events: EventLog | None = None
    run_dir: Path | None = None
    left_out_steps: set[int] = field(default_factory=set)

    def note(self, kind: Kind, step: int, seconds: float = 0.0) -> None:
        if self.events:
            self.events.add(kind, step, seconds)
