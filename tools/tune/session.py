"""A tuning folder: what was asked, what runs, what was measured. Whatever ends the process, the next call goes on from it.

state.json      the search between two launches    history.jsonl   records that it learned from before it began
records.jsonl   one line a trial                   trials/         a folder a trial
best.json, best_plan.json, result.json             hparams/        for TensorBoard
"""

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from dlrm_scale.errors import ConfigError
from dlrm_scale.tuning.launcher import POLL_SECONDS, Ended, Launcher
from dlrm_scale.tuning.records import append_record, read_text
from dlrm_scale.tuning.space import Space
from dlrm_scale.tuning.trial import Trial, samples_per_second
from dlrm_scale.whole_files import write_whole

STATE, RECORDS, HISTORY, LOCK = "state.json", "records.jsonl", "history.jsonl", ".lock"


class Session:
    """Raises ConfigError: another process works in the folder; it is of another space; it cannot be written."""

    def __init__(self, folder: str | Path, space: Space, console: Console) -> None:
        self.folder, self.space, self.console = Path(folder), space, console
        try:
            (self.folder / "trials").mkdir(parents=True, exist_ok=True)
            self.lock = (self.folder / LOCK).open("a")
        except OSError as e:
            raise ConfigError(f"cannot write to {folder}: {e.strerror}; name another place: --folder") from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another tools.tune works in {folder}; wait for it, stop it, or name another --folder"
            ) from None
        self.records = read_lines(self.folder / RECORDS)
        self.by_name = {record["tuning"]["name"]: record for record in self.records if "tuning" in record}
        self.failed_earlier = {name for name, record in self.by_name.items() if record["outcome"] != "ok"}
        self.saved = self._state()

    def _state(self) -> dict[str, Any]:
        path = self.folder / STATE
        if not path.exists():
            return {}
        state = json.loads(path.read_text())
        if state["space"] != self.space.fingerprint:
            raise ConfigError(
                f"{self.folder} is of space {state['space']}, but this one (with its base configuration and cluster) is "
                f"{self.space.fingerprint}; go on with the files as they were, or name another --folder"
            )
        return state

    def require_same(self, **facts: Any) -> None:
        """Raises ConfigError: the folder was begun with others, and what is measured from now on would not compare."""
        before = self.saved.get("begun_with", {})
        for name, value in facts.items():
            if name in before and before[name] != value:
                raise ConfigError(
                    f"{self.folder} was begun with {name} {before[name]}, but now {name} is {value}, and figures of both would mix; go on "
                    "as it was begun, or name another --folder"
                )
        self.save(begun_with={**before, **facts})

    def save(self, **parts: Any) -> None:
        self.saved = {**self.saved, **parts, "space": self.space.fingerprint}
        write_whole(self.folder / STATE, json.dumps(self.saved))

    def keep_history(self, paths: list[str]) -> list[Path]:
        """Copies of these records, made once: what a search learned from must not change while it goes on.

        Raises:
            ConfigError: a file cannot be read; or the search has begun, with other records than these.
        """
        kept = self.folder / HISTORY
        # a last line that was cut off must not run into the next file's first
        lines = b"".join(read_text(path) + b"\n" for path in paths)
        if not kept.exists():
            write_whole(kept, lines)
        elif paths and kept.read_bytes() != lines:
            raise ConfigError(
                f"the search in {self.folder} began with other records than --records names now; it keeps a copy of them, so go on "
                "without --records, or begin anew in another --folder"
            )
        return [kept]

    def forget(self, trials: list[Trial]) -> None:
        """Has them launched again; their records stay in the file."""
        for trial in trials:
            self.by_name.pop(trial.name, None)

    def add(self, trial: Trial, record: dict[str, Any]) -> None:
        append_record(self.folder / RECORDS, record)
        self.records.append(record)
        self.by_name[trial.name] = record
        write_hparams(self.folder / "hparams" / trial.name, trial, record)

    def measure(
        self,
        launcher: Launcher,
        next_trial: Callable[[], Trial | None],
        on_end: Callable[[Ended], None],
        best: Callable[[], float],
        line: Callable[[], str],
    ) -> None:
        """Launches what `next_trial` gives, as many at once as have room, until it gives no more and all have ended."""
        waiting: Trial | None = None
        with self.console.status("") if self.console.is_terminal else nullcontext() as status:
            while True:
                while launcher.may_start:  # else it is too early to choose: what runs may teach something
                    waiting = waiting or next_trial()
                    if waiting is None or not launcher.has_room(waiting):
                        break
                    launcher.launch(waiting)
                    waiting = None
                if not launcher.running:
                    return
                for ended in launcher.poll(best()):
                    self.add(ended.trial, ended.record)
                    on_end(ended)
                if status is not None:
                    status.update(line())
                if launcher.running:
                    time.sleep(POLL_SECONDS)

    def measure_named(self, launcher: Launcher, trials: list[Trial], line: str) -> Iterator[dict[str, Any]]:
        """Records of these trials, in their order and one at a time; those that were measured by an earlier call are not launched again."""
        for trial in trials:
            if trial.name not in self.by_name or trial.name in self.failed_earlier:
                self.failed_earlier.discard(trial.name)
                left = iter([trial])
                self.measure(
                    launcher, lambda left=left: next(left, None), lambda ended: None, lambda: 0.0, lambda: line
                )
            yield self.by_name[trial.name]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a records file; `tuning.records` says of the others what is wrong with them."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def write_hparams(folder: Path, trial: Trial, record: dict[str, Any]) -> None:
    """One run of TensorBoard's HPARAMS table."""
    point = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in (trial.point or {}).items()}
    metrics = {"samples_per_s": samples_per_second(record), "measured": float(record["outcome"] == "ok")}
    if record["outcome"] == "ok":
        metrics["step_ms"] = record["step_ms"]["p50"]
    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        writer.add_hparams({"trial": trial.name, **point}, metrics, run_name=".")
