"""Records of measured runs: reads the lines that runs add to records.jsonl, and says of each one it cannot use why.

history = read_records(["runs/records.jsonl"]); usable, prior = history.split(hardware, versions)
"""

import gzip
import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from dlrm_scale.cluster import ClusterSpec
from dlrm_scale.config import RunConfig
from dlrm_scale.config_io import parse_config, parse_tree
from dlrm_scale.errors import ConfigError
from dlrm_scale.record_format import COMPARED_VERSIONS, FORMAT
from dlrm_scale.sharding.plan import RankLoad
from dlrm_scale.strict import Strict
from dlrm_scale.tuning.knobs import Value
from dlrm_scale.tuning.space import Job, Launch

Outcome = Literal["ok", "does not fit", "failed"]
OUTCOMES = ("ok", "does not fit", "failed")
_LOADS = TypeAdapter(tuple[RankLoad, ...])


class Trial(Strict):
    """The part `trial` of a record that a tuner's launch left."""

    space: str = Field(description="fingerprint of the space")
    point: dict[str, Value]
    steps: int = Field(gt=0, description="optimizer steps that it was given: its fidelity")
    seed: int = 0


@dataclass(frozen=True)
class Record:
    """One run. `step_ms` is the median and NaN unless it is ok; `loads` and `sharding_types` are empty where no plan was found.

    Attributes:
        hardware: fingerprint of the machine; None where the run did not say.
    """

    where: str  # file:line
    job: Job
    outcome: Outcome
    reason: str
    step_ms: float
    step_ms_spread: float  # (p90 - p10) / p50 of the run's steps
    num_steps: int
    loads: tuple[RankLoad, ...]
    sharding_types: Mapping[str, str]
    versions: Mapping[str, str]
    hardware: str | None
    trial: Trial | None
    repeats_ms: tuple[float, ...] = ()  # medians of the runs that step_ms is the median of; empty for a single run


@dataclass(frozen=True)
class Problem:
    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class Split:
    """`prior`: of other hardware or versions; for a first guess only, and `why` counts what differs."""

    usable: tuple[Record, ...]
    prior: tuple[Record, ...]
    why: Mapping[str, int]


@dataclass(frozen=True)
class History:
    records: tuple[Record, ...]
    problems: tuple[Problem, ...]

    def split(self, hardware: str, versions: Mapping[str, str]) -> Split:
        usable, prior, why = [], [], {}
        for record in self.records:
            differences = list(_differences(record, hardware, versions))
            (prior if differences else usable).append(record)
            for difference in differences:
                why[difference] = why.get(difference, 0) + 1
        return Split(tuple(usable), tuple(prior), why)

    def require(self, least: int = 1) -> None:
        """Raises ConfigError: fewer runs were measured, with what was wrong with the others."""
        measured = sum(record.outcome == "ok" for record in self.records)
        if measured >= least:
            return
        failed = len(self.records) - measured
        lines = [f"  {problem}" for problem in self.problems[:5]]
        if failed:
            reasons = sorted({r.reason for r in self.records if r.outcome != "ok"})
            lines.append(f"  {failed} runs did not fit or failed: {'; '.join(reasons[:3])}")
        raise ConfigError(
            f"{measured} measured runs, but {least} are needed; {len(self.problems)} lines cannot be used\n"
            + "\n".join([*lines, "  measure some, or go on with the analytic model alone"])
        )


def _differences(record: Record, hardware: str, versions: Mapping[str, str]) -> Iterator[str]:
    if record.hardware is None:
        yield "hardware not told"
    elif record.hardware != hardware:
        yield f"hardware {record.hardware}, here {hardware}"
    for name in COMPARED_VERSIONS:
        if record.versions.get(name) != versions.get(name):
            yield f"{name} {record.versions.get(name, 'not told')}, here {versions.get(name, 'missing')}"


def read_records(paths: Sequence[str | Path]) -> History:
    """Raises ConfigError: a file that cannot be read. A line that cannot be used is a `Problem`, not an error."""
    records, problems = [], []
    for path in paths:
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                records.append(parse_record(json.loads(line), where))
            except (ValueError, KeyError, TypeError) as e:  # ConfigError is a ValueError
                problems.append(Problem(where, _why(e)))
    return History(tuple(records), tuple(problems))


def read_text(path: str | Path) -> bytes:
    """Of a records file, which may be compressed (.gz). Raises ConfigError: it cannot be read."""
    try:
        content = Path(path).read_bytes()
        return gzip.decompress(content) if Path(path).suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as e:  # the latter for a .gz that is cut off or altered
        raise ConfigError(f"cannot read the records {path}: {getattr(e, 'strerror', None) or e}") from None


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"is no whole line of JSON ({error.msg} at column {error.colno}): cut off as it was written, or altered"
    if isinstance(error, UnicodeDecodeError):
        return "is not UTF-8"
    if isinstance(error, KeyError):
        return f"has no {error.args[0]}"
    return str(error)


def parse_record(line: Any, where: str) -> Record:
    """Raises ValueError, KeyError, TypeError: what is wrong with it."""
    if not isinstance(line, dict):
        raise ValueError(f"is {type(line).__name__}, not a record")
    if line["format"] != FORMAT:
        raise ValueError(f"format is {line['format']}, but this version reads {FORMAT}")
    outcome = line["outcome"]
    if outcome not in OUTCOMES:
        raise ValueError(f"outcome is {outcome!r}, but must be one of {', '.join(OUTCOMES)}")
    if outcome != "ok" and not line.get("reason"):
        raise ValueError(f"outcome is {outcome}, but no reason is given")
    step_ms, spread = _times(line["step_ms"]) if outcome == "ok" else (math.nan, math.nan)
    config: RunConfig = parse_config(line["config"], "its config")
    cluster = parse_tree(line["cluster"], ClusterSpec, "cluster", "its cluster")
    plan, trial = line.get("plan"), line.get("trial")
    versions, launch, hardware = (_object(line, name) for name in ("versions", "launch", "hardware"))
    threads = int(launch.get("threads_per_rank", 1))
    if outcome == "ok" and not plan:
        raise KeyError("plan")
    if plan and set(plan["sharding_types"]) != set(config.features.tables):
        raise ValueError("its plan is of other tables than its config")
    try:
        return Record(
            where=where,
            job=Job(config, cluster, Launch(cluster.num_ranks, threads)),
            outcome=outcome,
            reason=str(line.get("reason") or ""),
            step_ms=step_ms,
            step_ms_spread=spread,
            repeats_ms=tuple(map(float, line.get("repeats_ms") or ())),
            num_steps=int(line.get("num_steps") or 0),
            loads=_LOADS.validate_json(json.dumps(plan["ranks"])) if plan else (),
            sharding_types=plan["sharding_types"] if plan else {},
            versions=versions,
            hardware=None if line.get("hardware") is None else hardware["fingerprint"],
            trial=None if trial is None else Trial.model_validate_json(json.dumps(trial)),
        )
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from None


def _object(line: dict[str, Any], name: str) -> dict[str, Any]:
    """That part of a record; empty where it is null or absent."""
    part = line.get(name)
    if part is not None and not isinstance(part, dict):
        raise ValueError(f"{name} is {part!r}, but must be an object")
    return part or {}


def _times(step_ms: Any) -> tuple[float, float]:
    """Median and spread. JSON has no NaN: a time that does not exist is null."""
    times = [step_ms.get(name) for name in ("p10", "p50", "p90")] if isinstance(step_ms, dict) else [None]
    wrong = [t for t in times if isinstance(t, bool) or not isinstance(t, int | float) or not 0 < t < math.inf]
    if wrong:
        raise ValueError(
            f"step_ms must have p10, p50 and p90 above 0, but is {step_ms}: too few steps behind the warm-up, or a run that was cut off"
        )
    p10, p50, p90 = times
    return p50, (p90 - p10) / p50


def append_record(path: str | Path, record: dict[str, Any]) -> None:
    """Adds a line that is on disk when this returns; first ends a line that a killed process left open."""
    line = json.dumps(record, allow_nan=False) + "\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def records_fingerprint(records: Sequence[Record]) -> str:
    """12 hex digits of what a predictor learned from: order does not matter."""
    lines = sorted(
        json.dumps([r.job.config.model_dump(mode="json"), r.job.launch.__dict__, r.outcome, None if r.outcome != "ok" else r.step_ms])
        for r in records
    )  # fmt: skip
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
