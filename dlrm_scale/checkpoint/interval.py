"""How often to save: what a save costs against what a failure would lose."""

import math

FIRST_SAVE_STEPS = 100  # after the start or a resume, where the cost of a save is not known yet


def best_interval_seconds(save_seconds: float, mtbf_seconds: float) -> float:
    """Training time between two saves that loses the least, for failures at random with a mean of `mtbf_seconds` between them.

    Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps" (2006), eq. 37; to first order it is
    Young's (1974) sqrt(2 * save * mtbf).
    """
    if save_seconds >= 2 * mtbf_seconds:
        return mtbf_seconds
    ratio = save_seconds / (2 * mtbf_seconds)
    return math.sqrt(2 * save_seconds * mtbf_seconds) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_seconds


class SaveSchedule:
    """The steps after which to save.

    Args:
        every_steps: at its multiples; 0: never; None: as `measured` says, first `FIRST_SAVE_STEPS` after `begin`.
    """

    def __init__(self, every_steps: int | None, mtbf_seconds: float) -> None:
        self.every_steps, self.mtbf_seconds = every_steps, mtbf_seconds
        self.next_step = FIRST_SAVE_STEPS

    @property
    def measures(self) -> bool:
        return self.every_steps is None

    def begin(self, step: int) -> None:
        self.next_step = step + FIRST_SAVE_STEPS

    def is_due(self, step: int) -> bool:
        if self.every_steps is None:
            return step >= self.next_step
        return self.every_steps > 0 and step > 0 and step % self.every_steps == 0

    def interval_steps(self, save_seconds: float, step_seconds: float) -> int:
        """The best interval, in whole steps."""
        return max(1, round(best_interval_seconds(save_seconds, self.mtbf_seconds) / step_seconds))

    def measured(self, step: int, interval_steps: int) -> None:
        """`step` has been saved, and this many steps later is the next time; the same on every rank."""
        self.next_step = step + interval_steps
