"""What each rank trained on: positions of the epoch's order, by attempt. tools/audit_data proves from it that each counted once.

A file is `account/rank_R_attempt_A.jsonl`: one line on the attempt, then one for the steps between two flushes.

    {"rank": 0, "world_size": 2, "resumed_at_step": 20, "lane_ranges": [[0, 500], [500, 1000]], ...}
    {"epoch": 0, "first_step": 20, "last_step": 39, "ranges": [[320, 480]], "skipped": false}
"""

import json
import os
import re
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

FILE_NAME = re.compile(r"rank_(\d+)_attempt_(\d+)\.jsonl")
Range = tuple[int, int]  # [start, stop)


@dataclass(frozen=True)
class Attempt:
    """The first line of a rank's file.

    Attributes:
        attempt: counts the starts of a run, by the same launcher or a new one.
        resumed_at_step: steps that the state holds with which it started; 0 for a fresh one.
        lane_ranges: of every lane of an epoch, the positions it covers.
    """

    attempt: int
    rank: int
    world_size: int
    resumed_at_step: int
    steps_per_epoch: int
    lane_batch_size: int
    lane_ranges: list[Range]


@dataclass
class Trained:
    """Consecutive micro-batches of one epoch: of each of the rank's lanes one range. Steps count from the epoch's first.

    `skipped`: the guard dropped them, so they are accounted for and count for nothing.
    """

    epoch: int
    first_step: int
    last_step: int
    ranges: list[Range]
    skipped: bool

    def continued_by(self, other: "Trained") -> bool:
        return (self.epoch, self.skipped) == (other.epoch, other.skipped) and all(
            mine[1] == theirs[0] for mine, theirs in zip(self.ranges, other.ranges, strict=True)
        )

    def extend(self, other: "Trained") -> None:
        self.last_step = other.last_step
        self.ranges = [(mine[0], theirs[1]) for mine, theirs in zip(self.ranges, other.ranges, strict=True)]


class Account:
    """This rank's file of this attempt. `read` is called by the reader's thread, the rest by the main thread."""

    def __init__(self, folder: Path, attempt: Attempt, accumulate_steps: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.attempt, self.accumulate_steps = attempt.attempt, accumulate_steps
        self.pending: deque[tuple[int, int, list[Range]]] = deque()  # read, not yet trained on
        self.trained_on: list[Trained] = []
        path = folder / f"rank_{attempt.rank}_attempt_{attempt.attempt}.jsonl"
        self.file = path.open("x", encoding="utf-8")
        self.file.write(json.dumps(asdict(attempt)) + "\n")
        self.flush()

    def read(self, epoch: int, micro_batch: int, ranges: list[Range]) -> None:
        """Notes what the next micro-batch of this rank holds; `micro_batch` counts from the epoch's first."""
        self.pending.append((epoch, micro_batch, ranges))

    def trained(self, skipped: bool = False) -> None:
        """The oldest micro-batch read has been trained on, or skipped."""
        epoch, micro_batch, ranges = self.pending.popleft()
        step = micro_batch // self.accumulate_steps
        latest = Trained(epoch, step, step, ranges, skipped)
        if self.trained_on and self.trained_on[-1].continued_by(latest):
            self.trained_on[-1].extend(latest)
        else:
            self.trained_on.append(latest)

    def flush(self) -> None:
        """Makes what was trained on so far durable. Call it before a checkpoint of these steps commits."""
        self.file.write("".join(json.dumps(asdict(t)) + "\n" for t in self.trained_on))
        self.trained_on = []
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.flush()
        self.file.close()


def next_attempt(folder: Path) -> int:
    """The first number that no attempt in `folder` has; rank 0 decides it for all."""
    names = [FILE_NAME.fullmatch(path.name) for path in folder.glob("*.jsonl")]
    return 1 + max((int(name[2]) for name in names if name), default=-1)
