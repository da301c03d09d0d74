"""Proves from all attempts' accounts that each sample counted once towards the final weights, or names what did not.

An attempt that resumed at step k throws away what earlier attempts did from k on; what is left of all of them must be every
position of every epoch, up to the last step, exactly once.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dlrm_scale.errors import DataError
from dlrm_scale.resilience.account import FILE_NAME, Attempt, Range, Trained


@dataclass
class Audit:
    """
    Attributes:
        num_steps: that the final weights hold.
        num_samples: that counted once.
        skipped: samples that the guard dropped, and accounted for.
        thrown_away_steps: done by an attempt and done again by a later one.
        faults: empty if each sample counted once.
    """

    attempts: list[dict[str, int]]
    num_steps: int
    num_samples: int = 0
    skipped: int = 0
    thrown_away_steps: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _File:
    attempt: Attempt
    trained: list[Trained]

    @property
    def end_step(self) -> int:
        """Steps that the weights held when this rank last wrote."""
        per_epoch = self.attempt.steps_per_epoch
        return max((t.epoch * per_epoch + t.last_step + 1 for t in self.trained), default=self.attempt.resumed_at_step)


def audit(folder: Path) -> Audit:
    """
    Raises:
        DataError: there is no account, or a file of it cannot be read.
    """
    by_attempt: dict[int, list[_File]] = defaultdict(list)
    for path in sorted(folder.glob("*.jsonl")):
        if FILE_NAME.fullmatch(path.name):
            file = _read(path)
            by_attempt[file.attempt.attempt].append(file)
    if not by_attempt:
        raise DataError(f"{folder} holds no account (rank_R_attempt_A.jsonl); name the folder of a run")
    numbers = sorted(by_attempt)
    last = by_attempt[numbers[-1]]
    result = Audit(attempts=[], num_steps=max(file.end_step for file in last))
    kept: dict[int, list[tuple[Range, int, bool]]] = defaultdict(list)  # by epoch: positions, attempt, skipped
    for i, number in enumerate(numbers):
        files = by_attempt[number]
        end = min([by_attempt[n][0].attempt.resumed_at_step for n in numbers[i + 1 :]], default=result.num_steps)
        done = max(file.end_step for file in files)
        if min(end, done) > files[0].attempt.resumed_at_step:  # otherwise nothing of it is left
            _check_files(files, number, result)
        result.thrown_away_steps += max(0, done - max(end, files[0].attempt.resumed_at_step))
        header = files[0].attempt
        result.attempts.append(
            {"attempt": number, "ranks": header.world_size, "from_step": header.resumed_at_step, "to_step": done}
        )
        for file in files:
            for trained in file.trained:
                _keep(trained, file.attempt, end, kept[trained.epoch])
    _check_positions(kept, last[0].attempt, result)
    return result


def _read(path: Path) -> _File:
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        # what stands behind the last line's end was being written when the rank was killed
        first, *others = [json.loads(line) for line in lines[:-1]]
        return _File(Attempt(**first), [Trained(**other) for other in others])
    except (ValueError, TypeError) as e:
        raise DataError(f"{path} is not a rank's account of its data: {e}") from None


def _check_files(files: list[_File], number: int, result: Audit) -> None:
    header = files[0].attempt
    missing = set(range(header.world_size)) - {file.attempt.rank for file in files}
    if missing:
        result.faults.append(f"attempt {number}: no file of rank {', '.join(map(str, sorted(missing)))}")
    if len({file.attempt.resumed_at_step for file in files}) > 1:
        result.faults.append(f"attempt {number}: its ranks resumed at different steps")


def _keep(trained: Trained, attempt: Attempt, end_step: int, kept: list[tuple[Range, int, bool]]) -> None:
    """Adds the positions of steps before `end_step`. Each step takes `lane_batch_size` of a lane, the last one what is left."""
    first, last = (trained.epoch * attempt.steps_per_epoch + s for s in (trained.first_step, trained.last_step))
    if first >= end_step:
        return
    for start, stop in trained.ranges:
        lane = next(lane for lane in attempt.lane_ranges if lane[0] <= start <= stop <= lane[1])
        if last >= end_step:  # the lane's position after the last step that is kept
            stop = min(stop, lane[0] + (end_step - trained.epoch * attempt.steps_per_epoch) * attempt.lane_batch_size)
        if start < stop:
            kept.append(((start, stop), attempt.attempt, trained.skipped))


def _check_positions(kept: dict[int, list[tuple[Range, int, bool]]], attempt: Attempt, result: Audit) -> None:
    epochs, steps = divmod(result.num_steps, attempt.steps_per_epoch)
    for epoch in range(max([epochs + (steps > 0), *(e + 1 for e in kept)])):
        wanted_steps = attempt.steps_per_epoch if epoch < epochs else steps if epoch == epochs else 0
        for lane, (start, stop) in enumerate(attempt.lane_ranges):
            wanted = (start, min(stop, start + wanted_steps * attempt.lane_batch_size))
            inside = [part for part in kept[epoch] if start <= part[0][0] < stop]
            _check_lane(f"epoch {epoch}, lane {lane}", wanted, inside, result)


def _check_lane(where: str, wanted: Range, parts: Iterable[tuple[Range, int, bool]], result: Audit) -> None:
    at, attempt_before = wanted[0], -1
    for (start, stop), attempt, skipped in sorted(parts):
        if start > at:
            result.faults.append(f"{where}: positions {at:,} to {start - 1:,} are missing (before attempt {attempt})")
        elif start < at:
            twice = f"positions {start:,} to {min(at, stop) - 1:,} counted twice"
            result.faults.append(f"{where}: {twice} (attempts {attempt_before} and {attempt})")
        num_new = max(0, stop - max(at, start))
        result.num_samples += 0 if skipped else num_new
        result.skipped += num_new if skipped else 0
        at, attempt_before = max(at, stop), attempt
    if at < wanted[1]:
        result.faults.append(f"{where}: positions {at:,} to {wanted[1] - 1:,} are missing")
    elif at > wanted[1]:
        result.faults.append(f"{where}: positions {wanted[1]:,} to {at - 1:,} are behind the last step")
