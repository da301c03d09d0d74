"""Whether a job that met faults ended as the unbroken one did: tensors, metrics, losses, samples."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dlrm_scale.checkpoint.commit import CheckpointFolder
from dlrm_scale.checkpoint.files import Files
from dlrm_scale.errors import CheckpointError, DataError
from dlrm_scale.resilience.audit import audit
from tools.chaos.job import Ended
from tools.chaos.schedule import Job
from tools.checkpoint.compare import compare

NEAR = 5e-4  # largest difference at another number of ranks, where sums have another order: docs/reliability.md
WEIGHTS = ("tables/", "dense/")
OUTCOME = ("num_steps", "samples_consumed", "losses", "metrics", "mended", "eval_mended", "skipped_micro_batches")


@dataclass(frozen=True)
class Verdict:
    """What a job lost. `problems` is empty where that is nothing but time.

    Attributes:
        largest_difference: of all tensors of the last checkpoint (of the weights alone, at other numbers of ranks) from the
            unbroken run's; None where there is nothing to compare.
        seconds_lost: beyond the unbroken run's.
    """

    job: str
    num_faults: int
    num_launches: int
    seconds: float
    seconds_lost: float
    largest_difference: float | None
    problems: list[str]

    @property
    def holds(self) -> bool:
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"holds": self.holds}


def judge(job: Job, launches: list[Ended], run: Path, unbroken: Path, unbroken_seconds: float) -> Verdict:
    problems = [launch.problem for launch in launches if launch.problem]
    largest = None
    if not problems:
        output = "".join(launch.output for launch in launches)
        problems += [f"nothing said '{text}'" for text in job.expected_text if text not in output]
        problems += ["a rank ended with a traceback"] * ("Traceback (most recent call last)" in output)
        try:
            problems += audit(run / "account").faults
            problems += _of_records(job, _record(run), _record(unbroken))
            if not job.num_skipped:
                largest = _largest_difference(job, run, unbroken, problems)
        except (CheckpointError, DataError, OSError) as e:
            problems.append(str(e))
    seconds = sum(launch.seconds for launch in launches)
    lost = seconds - unbroken_seconds
    return Verdict(job.name, job.num_faults, len(launches), seconds, lost, largest, problems)


def _record(run: Path) -> dict[str, Any]:
    lines = (run.parent / f"{run.name}.jsonl").read_text().splitlines()
    return json.loads(lines[-1])


def _of_records(job: Job, record: dict[str, Any], unbroken: dict[str, Any]) -> list[str]:
    if record["outcome"] != "ok":
        return [f"the record says {record['outcome']}"]
    if job.num_skipped:
        skipped = record["skipped_micro_batches"]
        return [] if skipped == job.num_skipped else [f"{skipped} micro-batches were skipped, not {job.num_skipped}"]
    exact = OUTCOME if job.same_bytes else ("num_steps", "samples_consumed")
    return [f"{name} is {record[name]}, not {unbroken[name]}" for name in exact if record[name] != unbroken[name]]


def _largest_difference(job: Job, run: Path, unbroken: Path, problems: list[str]) -> float:
    files, sides = Files(), []
    for path in (run, unbroken):
        folder = CheckpointFolder(str(path / "checkpoints"), files)
        sides.append((folder, folder.manifest(folder.steps()[0])))
    rows = compare(*sides, files)
    if not job.same_bytes:
        rows = [row for row in rows if row["key"].startswith(WEIGHTS)]
    problems += [f"{row['key']}: {row['note']}" for row in rows if row["note"]]
    largest = max(row["difference"] or 0.0 for row in rows)
    most = 0.0 if job.same_bytes else NEAR
    worst = [row for row in rows if (row["difference"] or 0.0) > most]
    problems += [f"{row['key']} differs by {row['difference']:.3g}" for row in worst]
    return largest
