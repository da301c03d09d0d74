"""Features of many points of a space at once: each distinct plan is found once, and rows are joined as arrays."""

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dlrm_scale.config import RunConfig
from dlrm_scale.errors import ConfigError, NoPlanError
from dlrm_scale.tuning.features import PLAN_NUMBERS, RUN_NUMBERS, FeatureTable, derive, plan_numbers, run_numbers
from dlrm_scale.tuning.knobs import Point
from dlrm_scale.tuning.plans import Plans, local_batch_size
from dlrm_scale.tuning.records import Record
from dlrm_scale.tuning.space import Job, Space

# Keys that neither the plan nor the dense trace depends on. Any other is taken to matter, so that no plan is taken for another key's.
PLAN_FREE_KEYS = ("train.pipeline", "data.prefetch_batches", "launch.threads_per_rank")


@dataclass(frozen=True)
class Candidates:
    """`reasons`: by index, why a point cannot run; its row is NaN."""

    table: FeatureTable
    reasons: dict[int, str]


class Featuriser:
    """Of one space; remembers what it has found."""

    def __init__(self, space: Space, plans: Plans) -> None:
        self.space, self.plans = space, plans
        of_run = [name for name, knob in space.knobs.items() if getattr(knob, "key", "") in PLAN_FREE_KEYS]
        self._run_knobs = tuple(of_run)
        self._plan_knobs = tuple(name for name in space.knobs if name not in of_run)
        self._plan_rows: dict[Hashable, np.ndarray | str] = {}
        self._run_rows: dict[Hashable, np.ndarray] = {}
        self._refused: dict[Point, str] = {}

    def refuse(self, reasons: Mapping[Point, str]) -> None:
        """From now on these points cannot run, each for its reason, whatever the planner says."""
        self._refused.update(reasons)

    def __call__(self, points: Sequence[Point]) -> Candidates:
        plan_rows, run_rows, reasons = [], [], {}
        missing = np.full(len(PLAN_NUMBERS), np.nan)
        for i, point in enumerate(points):
            plan = self._refused.get(point) or self._plan_row(point)
            if isinstance(plan, str):
                reasons[i], plan = plan, missing
            plan_rows.append(plan)
            run_rows.append(self._run_row(point, known=i not in reasons))
        rows = (np.array(plan_rows).reshape(-1, len(PLAN_NUMBERS)), np.array(run_rows).reshape(-1, len(RUN_NUMBERS)))
        return Candidates(derive(*rows), reasons)

    def _plan_row(self, point: Point) -> np.ndarray | str:
        key = tuple([point.get(name) for name in self._plan_knobs])
        row = self._plan_rows.get(key)
        if row is None:
            try:
                row = job_numbers(self.space.job(point), self.plans)
            except (ConfigError, NoPlanError) as e:
                row = str(e)
            self._plan_rows[key] = row
        return row

    def _run_row(self, point: Point, known: bool) -> np.ndarray:
        threads = self.space.launch(point).threads_per_rank  # without a knob they follow from the ranks
        key = (threads, *(point.get(name) for name in self._run_knobs))
        row = self._run_rows.get(key)
        if row is None:
            if not known:  # its configuration may be refused, but its row is never read
                return run_numbers(self.space.base, 1)
            row = self._run_rows[key] = run_numbers(self.space.config(point), threads)
        return row


def job_numbers(job: Job, plans: Plans) -> np.ndarray:
    """The plan numbers of a job. Raises ConfigError, NoPlanError: as `Plans.plan`."""
    plan = plans.plan(job.config, job.cluster)
    work = plans.dense(job.config, plan.request.local_batch_size, plan.request.cluster.device)
    types = {name: table.sharding_type for name, table in plan.tables.items()}
    return plan_numbers(job.config, job.cluster, types, plan.ranks, work)


def record_features(records: Sequence[Record], plans: Plans) -> FeatureTable:
    """Of measured runs, from the plan each was run with; one that has none (it never fitted) is planned anew, NaN if nothing fits."""
    plan_rows, run_rows = [], []
    for record in records:
        job = record.job
        if record.loads:
            work = plans.dense(job.config, local_batch_size(job.config, job.cluster), job.cluster.device)
            row = plan_numbers(job.config, job.cluster, record.sharding_types, record.loads, work)
        else:
            try:
                row = job_numbers(job, plans)
            except (ConfigError, NoPlanError):
                row = np.full(len(PLAN_NUMBERS), np.nan)
        plan_rows.append(row)
        run_rows.append(run_numbers(job.config, job.launch.threads_per_rank))
    return derive(np.array(plan_rows).reshape(-1, len(PLAN_NUMBERS)), np.array(run_rows).reshape(-1, len(RUN_NUMBERS)))


def workload_of(config: RunConfig) -> str:
    """12 hex digits of the model: its features and dense arch."""
    parts = [config.features.model_dump(mode="json"), config.model.model_dump(mode="json")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
