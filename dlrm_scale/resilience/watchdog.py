"""Ends a job that hangs, and says who hangs where.

A thread in each rank tells the others, through the launcher's store, where its main thread is and since when. It works
while the main thread is stuck in a collective; a rank that is stopped as a whole cannot tell, which is how the others know.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch.distributed as dist

from dlrm_scale.errors import EXIT_HUNG

Phase = Literal[
    "start", "plan", "load", "data", "input_dist", "forward", "backward", "optimizer", "log", "save", "eval"
]
LONG_PHASES = ("start", "plan", "load", "save", "eval")
STORE_SECONDS = 5.0
LOST_BEATS = 4  # a rank that has missed so many is frozen, or gone
T = TypeVar("T")


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself.

    Attributes:
        entered: phases entered so far. All ranks go through the same ones, so the rank with the fewest is the one behind.
        age_seconds: since the last progress, at `time`.
        time: by the rank's clock, which must agree with the other hosts' to within seconds.
        waits: whether the main thread is inside torch's distributed code, or in a backward pass.
        reader_waits: whether its reader thread waits for the other ranks' readers.
        where: the main thread's innermost line of Python.
    """

    phase: Phase
    step: int
    entered: int
    age_seconds: float
    time: float
    waits: bool
    reader_waits: bool
    where: str


def culprits(beats: dict[int, Beat | None], now: float, beat_seconds: float) -> tuple[list[int], str]:
    """The ranks that hold up the others, and how that is known; none where nothing tells them apart."""
    frozen = [r for r, b in beats.items() if b is None or now - b.time > LOST_BEATS * beat_seconds]
    if frozen:
        return frozen, "frozen: its process gives no sign of life"
    known = {r: b for r, b in beats.items() if b is not None}
    fewest = min(b.entered for b in known.values())
    behind = [r for r, b in known.items() if b.entered == fewest]
    if len(behind) < len(known):
        return behind, "behind: the others have gone on and wait"
    if all(b.phase == "data" for b in known.values()):
        reading = [r for r, b in known.items() if not b.reader_waits]
        if 0 < len(reading) < len(known):
            return reading, "reading: the others' readers wait for its data"
    busy = [r for r, b in known.items() if not b.waits]
    if 0 < len(busy) < len(known):
        return busy, "busy in code of its own, while the others wait in a collective"
    return [], "no rank is behind another: see the stacks"


def report(beats: dict[int, Beat | None], now: float, beat_seconds: float, stacks: str) -> str:
    """What the job's last words are."""
    ranks, why = culprits(beats, now, beat_seconds)
    named = f"rank {', '.join(map(str, ranks))} is {why}" if ranks else why
    lines = [f"error: the job hangs; {named}"]
    for rank, beat in beats.items():
        if beat is None:
            lines.append(f"  rank {rank}: never heard of")
            continue
        silent = now - beat.time
        lost = f", silent for {silent:.1f} s" if silent > LOST_BEATS * beat_seconds else ""
        doing = f"{beat.phase}, step {beat.step}, no progress for {beat.age_seconds + silent:.1f} s{lost}"
        lines.append(f"{'->' if rank in ranks else '  '}rank {rank}: {doing}, at {beat.where}")
    lines.append(f"stacks of all threads: {stacks}; exit code {EXIT_HUNG}")
    return "\n".join(lines)


class Watchdog:
    """Watches this rank's main thread, and the other ranks through the store that the launcher hosts.

    The main thread calls `enter` at each phase; that is all it pays. When it has entered none for `seconds` (`long_seconds`
    in LONG_PHASES), and no other rank is in a longer phase with time left, the ranks that can write their stacks into
    `folder`, one prints the report, and all end with EXIT_HUNG. `seconds` = 0: no thread, nothing is watched.
    """

    def __init__(self, rank: int, world_size: int, seconds: float, long_seconds: float) -> None:
        self.rank, self.world_size = rank, world_size
        self.seconds, self.long_seconds = seconds, long_seconds
        self.beat_seconds = min(5.0, max(0.2, seconds / 10))
        self.folder: Path | None = None  # until there is a run folder, stacks go to stderr
        self.step = 0
        self.phase: Phase = "start"
        self.entered = 0
        self.since = time.monotonic()
        self.reader_waits = False
        self.main_thread = threading.get_ident()
        self.store: dist.Store | None = None
        self.ended = threading.Event()

    def enter(self, phase: Phase) -> None:
        """The main thread's progress."""
        self.phase = phase
        self.entered += 1
        self.since = time.monotonic()

    def watched(self, agree: Callable[[Any], T]) -> Callable[[Any], T]:
        """A reader's agreement with the other ranks' readers, so that a report can tell waiting from reading."""

        def watched_agree(status: Any) -> T:
            self.reader_waits = True
            try:
                return agree(status)
            finally:
                self.reader_waits = False

        return watched_agree

    def __enter__(self) -> "Watchdog":
        if self.seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self.ended.wait(self.beat_seconds):
            now = time.monotonic()
            if now - last > LOST_BEATS * self.beat_seconds:
                self.since = now  # this whole process was stopped; that time is nobody's fault
            last = now
            with suppress(dist.DistError, RuntimeError):  # no store: this rank can still look at itself
                self._tell()
            if now - self.since > self._patience(self.phase) or self._told_to_end():
                beats = self._beats()
                if not any(b and self._has_time(b) for b in beats.values()) or self._told_to_end():
                    self._end(beats)

    def _patience(self, phase: Phase) -> float:
        return self.long_seconds if phase in LONG_PHASES else self.seconds

    def _has_time(self, beat: Beat) -> bool:
        """Whether a rank that gives signs of life is in a phase that may still take its time."""
        silent = time.time() - beat.time
        return silent < LOST_BEATS * self.beat_seconds and beat.age_seconds + silent < self._patience(beat.phase)

    def _own_beat(self) -> Beat:
        frame = sys._current_frames().get(self.main_thread)
        code = frame.f_code if frame else None
        where = f"{_short(code.co_filename)}:{frame.f_lineno} {code.co_name}" if frame and code else "its end"
        return Beat(
            phase=self.phase,
            step=self.step,
            entered=self.entered,
            age_seconds=time.monotonic() - self.since,
            time=time.time(),
            waits=bool(code) and any(part in code.co_filename for part in ("/torch/", "/torchrec/")),
            reader_waits=self.reader_waits,
            where=where,
        )

    def _tell(self) -> None:
        if self.store is None and "MASTER_ADDR" in os.environ:
            client = dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=STORE_SECONDS),
            )
            self.store = dist.PrefixStore(f"watchdog/{restart_number()}", client)
        if self.store is not None:
            self.store.set(str(self.rank), json.dumps(asdict(self._own_beat())))

    def _told_to_end(self) -> bool:
        try:
            return self.store is not None and self.store.check(["hung"])
        except (dist.DistError, RuntimeError):
            return False

    def _beats(self) -> dict[int, Beat | None]:
        """Every rank's last beat, None of one never heard of; only this rank's where the store does not answer."""
        own: dict[int, Beat | None] = {self.rank: self._own_beat()}
        if self.store is None:
            return own
        try:
            keys = [str(rank) for rank in range(self.world_size)]
            return {
                int(k): Beat(**json.loads(self.store.get(k))) if self.store.check([k]) else None for k in keys
            } | own
        except (dist.DistError, RuntimeError):
            return own

    def _end(self, beats: dict[int, Beat | None]) -> None:
        """Every rank that can comes here within a beat of the first; one of them speaks, after all have written."""
        speaks, now = True, time.time()
        with suppress(dist.DistError, RuntimeError):
            if self.store is not None:
                self.store.set("hung", "")
                speaks = self.store.add("speaker", 1) == 1
        self._write_stacks()
        if speaks:
            stacks = str(self.folder / f"stacks_{restart_number()}_rank_*.txt") if self.folder else "above"
            print(report(beats, now, self.beat_seconds, stacks), file=sys.stderr, flush=True)
        time.sleep(2 * self.beat_seconds)  # the first to leave makes the launcher end the others
        os._exit(EXIT_HUNG)

    def _write_stacks(self) -> None:
        if self.folder is None:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            return
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"stacks_{restart_number()}_rank_{self.rank}.txt").open("w") as f:
                faulthandler.dump_traceback(f, all_threads=True)


def restart_number() -> str:
    """How often this launcher has started its ranks again; launchers/elastic.py sets it, the same on every host."""
    return os.environ.get("DLRM_SCALE_RESTART", os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _short(path: str) -> str:
    return "/".join(Path(path).parts[-3:])
