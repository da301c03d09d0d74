"""Where the wall-clock time of a run went, over all its attempts: from a log of events that outlives them."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

EVENTS = "events.jsonl"  # in a run's folder
Kind = Literal["start", "ready", "progress", "save", "evaluation", "end"]


@dataclass(frozen=True)
class Event:
    """Something that rank 0 did.

    Attributes:
        kind: start: the process began; ready: resumed at `step` and about to train; progress: `step` is trained;
            save, evaluation: training stood still for `seconds`, up to `time`; end: nothing more comes of this attempt.
        time: Unix time, s.
    """

    kind: Kind
    attempt: int
    time: float
    step: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Goodput:
    """Seconds by what they were spent on; they add up to the time from the first event to the last.

    Attributes:
        useful: training steps that count towards the final weights.
        recomputed: training steps that were trained again after a resume from before them.
        startup: from a process's start to its first step: imports, plan, model, load.
        down: from an attempt's last event to the next one's start; steps it had trained since that event are in here too.
    """

    useful: float
    recomputed: float
    startup: float
    down: float
    save: float
    evaluation: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    @property
    def fraction(self) -> float:
        """The useful part; 1 before anything took time."""
        return self.useful / self.total if self.total > 0 else 1.0

    def as_json(self) -> dict[str, float]:
        """Seconds by cause, and the fraction."""
        return {f"{cause}_s": seconds for cause, seconds in asdict(self).items()} | {"fraction": self.fraction}


class EventLog:
    """A run's events.jsonl, one line an event, each on its way to the disk when `add` returns (a killed process loses none)."""

    def __init__(self, path: Path, attempt: int) -> None:
        self.path, self.attempt = path, attempt
        path.touch()
        text = path.read_bytes()
        os.truncate(path, text.rfind(b"\n") + 1)  # of a line that a kill cut short
        self.events = read_events(path)

    def add(self, kind: Kind, step: int = 0, seconds: float = 0.0, at: float | None = None) -> None:
        event = Event(kind, self.attempt, time.time() if at is None else at, step, seconds)
        self.events.append(event)
        with self.path.open("a") as f:
            f.write(json.dumps(asdict(event)) + "\n")

    def goodput(self) -> Goodput:
        return goodput(self.events)


def read_events(path: Path) -> list[Event]:
    """Every whole line; a last one that was cut short by a kill is left out."""
    lines = path.read_text().split("\n")[:-1]
    return [Event(**json.loads(line)) for line in lines]


def last_saved_step(run_dir: Path) -> int:
    """The last step that a save was begun at in the run of that folder; 0 if none was."""
    path = run_dir / EVENTS
    return max((e.step for e in read_events(path) if e.kind == "save"), default=0) if path.exists() else 0


def goodput(events: Sequence[Event]) -> Goodput:
    """Adds up the time of all attempts. Work since the last event of an attempt that was killed counts as down."""
    spent = dict.fromkeys(("useful", "recomputed", "startup", "down", "save", "evaluation"), 0.0)
    attempts = _by_attempt(events)
    for i, attempt in enumerate(attempts):
        later = [event for following in attempts[i + 1 :] for event in following]
        resumed = next((event.step for event in later if event.kind == "ready"), None)
        if later:
            spent["down"] += max(0.0, later[0].time - attempt[-1].time)
        for before, event in pairwise(attempt):
            seconds = event.time - before.time
            if event.kind == "ready":
                spent["startup"] += seconds
                continue
            stood = min(event.seconds, seconds)
            if event.kind in ("save", "evaluation"):
                spent[event.kind] += stood
            again = _part_again(before.step, event.step, resumed)
            spent["recomputed"] += (seconds - stood) * again
            spent["useful"] += (seconds - stood) * (1 - again)
    return Goodput(**spent)


def _by_attempt(events: Sequence[Event]) -> list[list[Event]]:
    attempts: dict[int, list[Event]] = {}
    for event in events:
        attempts.setdefault(event.attempt, []).append(event)
    return [attempts[number] for number in sorted(attempts)]


def _part_again(first_step: int, last_step: int, resumed_step: int | None) -> float:
    """The part of the steps after `first_step` up to `last_step` that an attempt resumed at `resumed_step` trains again."""
    if resumed_step is None or last_step <= resumed_step:
        return 0.0
    if first_step >= resumed_step:
        return 1.0
    return (last_step - resumed_step) / (last_step - first_step)
