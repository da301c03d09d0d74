"""A run's folder: new, or one whose run is gone on with; held by one run at a time."""

import fcntl
import json
import os
import re
import shlex
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from dlrm_scale.config import RunConfig
from dlrm_scale.config_io import dump_config, fingerprint, leaves, load_config
from dlrm_scale.errors import ConfigError
from dlrm_scale.training.report import append_line
from dlrm_scale.whole_files import write_whole

STARTED = "DLRM_SCALE_STARTED"  # YYYYmmdd-HHMMSS, set by the launcher: {time} is the same in every attempt
LOCK, CONFIG, RECORD, LEFT_OUT = ".lock", "config.yaml", "record.json", "left_out_steps.json"
# What a resumed run may change: it decides where and how long a run trains, and what it shows, not what it learns from what.
MAY_DIFFER = (
    *("device", "sharding", "eval", "log", "checkpoint", "output", "resilience"),
    *(
        "train.max_steps",
        "train.epochs",
        "train.nonfinite",
        "train.max_skipped",
        "train.pipeline",
        "train.compile",
        "train.activation_checkpointing",
        "train.index_dedup",
        "train.all_reduce.bucket_mb",
    ),
    "model.pffn_kernel",
    *("data.prefetch_batches", "data.max_held_rows", "data.preflight_rows"),
)
MUST_AGREE = ("sharding.communication",)  # though it is in one of those


class RunFolder:
    """Rank 0 opens it before anything else, and holds it as long as the process lives (or until `close`).

    Attributes:
        holds_run: whether a run was begun here, with a configuration that this one may go on with.

    Raises:
        ConfigError: another run holds it; it is of a run with another configuration, with each difference; of no run, and not
            empty; it cannot be written.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config, self.path = config, _run_dir(config)
        self.locks: dict[Path, IO[str]] = {}
        self.holds_run = (self.path / CONFIG).exists()
        try:
            if self.holds_run:
                self._take_lock()
                refuse_differences(_plain(load_config(self.path / CONFIG)), _plain(config), str(self.path))
            elif self.path.is_dir() and any(
                p.name != LOCK and not p.name.startswith(f".{CONFIG}") for p in self.path.iterdir()
            ):
                raise ConfigError(
                    f"output.dir {self.path} is neither new, empty, nor a run's folder (it has no {CONFIG}); name another: "
                    "output.dir=runs/another"
                )
        except OSError as e:
            raise self._unwritable(e) from None

    def claim(self) -> None:
        """Makes the folder, if it is not there, and writes the configuration. Raises ConfigError."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            text = f"# fingerprint {fingerprint(self.config)}\n{dump_config(self.config)}"
            write_whole(self.path / CONFIG, text)
            records = Path(self.config.output.records)
            records.parent.mkdir(parents=True, exist_ok=True)
            records.open("a").close()
        except OSError as e:
            raise self._unwritable(e) from None

    def hold(self, folder: Path) -> None:
        """Keeps other runs out of another folder that this run alone may write to. Raises ConfigError: one is in there."""
        if not folder.resolve().is_relative_to(self.path.resolve()):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self.locks[folder] = _lock(folder, "checkpoint.dir")
            except OSError as e:
                raise self._unwritable(e, "checkpoint.dir=...") from None

    def close(self) -> None:
        for lock in self.locks.values():
            lock.close()
        self.locks = {}

    def is_finished(self) -> bool:
        """Whether the run has ended, and was not made longer since. Its record is then in `output.records`."""
        path = self.path / RECORD
        if not (self.holds_run and path.exists()):
            return False
        line = path.read_text()
        train = json.loads(line)["config"]["train"]
        if (train["max_steps"], train["epochs"]) != (self.config.train.max_steps, self.config.train.epochs):
            return False
        records = Path(self.config.output.records)
        if not records.exists() or line not in records.read_text():
            append_line(records, line)
        return True

    def left_out(self) -> set[int]:
        """Steps that the run has gone back from, and leaves out."""
        path = self.path / LEFT_OUT
        return set(json.loads(path.read_text())) if path.exists() else set()

    def leave_out(self, steps: set[int]) -> None:
        write_whole(self.path / LEFT_OUT, json.dumps(sorted(steps)))

    def finish(self, line: str) -> None:
        """Leaves the run's record here, and then in `output.records`: a run that dies in between is told by `is_finished`."""
        write_whole(self.path / RECORD, line)
        append_line(self.config.output.records, line)

    def _take_lock(self) -> None:
        if self.path not in self.locks:
            self.locks[self.path] = _lock(self.path, "output.dir")

    def _unwritable(self, e: OSError, keys: str = "output.dir=... output.records=...") -> ConfigError:
        return ConfigError(f"cannot write to {e.filename or self.path}: {e.strerror}; name another place: {keys}")


def _lock(folder: Path, key: str) -> IO[str]:
    lock = (folder / LOCK).open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ConfigError(
            f"{key} {folder} is in use by a run that is still going; wait for it, stop it, or name another folder: {key}=..."
        ) from None
    return lock


def refuse_differences(then: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """Raises ConfigError that lists each key by which two configurations differ and may not."""
    lines = differences(then, now)
    if lines:
        raise ConfigError(
            f"{where} is of a run with another configuration:\n  "
            + "\n  ".join(lines)
            + "\ngo on with its own, or begin another run: output.dir=runs/another "
            "(checkpoint.warm_start={path: ...} takes over the weights)"
        )


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for each key that decides what is learned and is not the same."""
    had, has = leaves(then), leaves(now)
    keys = [key for key in sorted(set(had) | set(has)) if had.get(key) != has.get(key)]
    return [
        f"{key}: {had.get(key, 'not set')} there, {has.get(key, 'not set')} now"
        for key in keys
        if decides_learning(key)
    ]


def decides_learning(key: str) -> bool:
    """Whether a dotted key of the configuration does, beyond rounding."""

    def within(sections: tuple[str, ...]) -> bool:
        return any(key == section or key.startswith(f"{section}.") for section in sections)

    return within(MUST_AGREE) or not within(MAY_DIFFER)


def _run_dir(config: RunConfig) -> Path:
    unknown = set(re.findall(r"{.*?}", config.output.dir)) - {"{name}", "{time}"}
    if unknown:
        raise ConfigError(f"output.dir has {', '.join(sorted(unknown))}; what is filled in is {{name}} and {{time}}")
    started = os.environ.get(STARTED) or datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path(config.output.dir.replace("{name}", config.name).replace("{time}", started))


def how_to_go_on(config: RunConfig, run_dir: Path) -> str:
    """What trains on from the newest checkpoint; where {time} names the folder that holds it, the same command begins anew."""
    begins_anew = "{time}" in config.output.dir and "{run}" in config.checkpoint.dir
    return f"the same command with {shlex.quote(f'output.dir={run_dir}')}" if begins_anew else "the same command"


def _plain(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")
