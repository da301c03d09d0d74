"""Models, spaces and simulated runs that predictors and searchers are compared on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dlrm_scale.cluster import ClusterSpec
from dlrm_scale.config_io import parse_tree
from dlrm_scale.errors import ConfigError
from dlrm_scale.tuning.features import FeatureTable
from dlrm_scale.tuning.featurise import Featuriser, record_features, workload_of
from dlrm_scale.tuning.knobs import Point
from dlrm_scale.tuning.plans import Plans
from dlrm_scale.tuning.records import History, Record, read_records
from dlrm_scale.tuning.simulator import NOISE, simulate
from dlrm_scale.tuning.space import Space, SpaceFile

FILL = (0.75, 1.1)  # of a rank's memory, the fullest of some points by the planner's count: some runs do not fit
# on CUDA alone: many CPUs have no instructions for bf16, and there it takes several times as long
_PRECISION = {"precision": {"kind": "categorical", "key": "train.precision", "values": ["fp32", "bf16"]}}


@dataclass(frozen=True)
class MeasuredRuns:
    """Runs of one workload. `step_ms_N`: what counts as the truth, NaN where it does not fit; `noise`: of one measurement of it."""

    name: str
    table: FeatureTable
    step_ms_N: np.ndarray
    fits_N: np.ndarray
    noise: float = 0.0

    def measure(self, index: int, rng: np.random.Generator) -> float:
        return float(self.step_ms_N[index] * np.exp(self.noise * rng.standard_normal()))


def random_space(seed: int, cluster: ClusterSpec, num_types: int = 4) -> Space:
    """A random model: 6 to 12 tables, one of three archs, and what may be tuned of it on `cluster`."""
    rng = np.random.default_rng(seed)
    batch = int(rng.choice([512, 1024])) * (4 if cluster.device == "cuda" else 1) * cluster.num_ranks
    tree = _model(rng, cluster, seed, batch)
    sizes = sorted(t["num_embeddings"] for t in tree["features"]["tables"].values())
    middle = sizes[len(sizes) // 2]
    types = ["any", "table_wise", "row_wise", "data_parallel"][:num_types]
    knobs = {
        "batch": {
            "kind": "integer", "key": "train.global_batch_size", "low": batch // 4, "high": batch * 2, "log": True
        },
        "accumulate": {"kind": "categorical", "key": "train.accumulate_steps", "values": [1, 2]},
        "pipeline": {"kind": "categorical", "key": "train.pipeline", "values": ["sparse_dist", "none"]},
        "prefetch": {"kind": "integer", "key": "data.prefetch_batches", "low": 1, "high": 8, "log": True},
        **(_PRECISION if cluster.device == "cuda" else {}),
        "small": {"kind": "sharding", "rows": [0, middle], "values": types},
        "large": {"kind": "sharding", "rows": [middle, 10**12], "values": types[:3]},
    }  # fmt: skip
    file = {"base": tree["name"], "cluster": "simulated", "knobs": knobs}
    return Space(parse_tree(file, SpaceFile, "tuning space", "the benchmark's space"), tree, cluster)


def _model(rng: np.random.Generator, cluster: ClusterSpec, seed: int, batch: int) -> dict[str, Any]:
    num_tables, dim = int(rng.integers(6, 13)), int(rng.choice([32, 64, 128]))
    scale = 1.5 if cluster.device == "cuda" else 0.0
    rows = (10 ** rng.uniform(3, 5.5 + scale, num_tables)).astype(int).tolist()
    ids = np.maximum(1, np.exp(rng.normal(0.8, 1.0, num_tables))).round(1).tolist()
    names = [f"table_{i}" for i in range(num_tables)]
    arch = ("dlrm_dcnv2", "dlrm", "interformer")[seed % 3]
    features: dict[str, Any] = {
        "tables": {n: {"num_embeddings": r, "embedding_dim": dim} for n, r in zip(names, rows, strict=True)},
        "dense": [{"name": "age"}],
        "categorical": [
            {"name": n, "table": n, "multi_hot": i > 1, "pooling_factor": i} for n, i in zip(names, ids, strict=True)
        ],
    }
    width = int(rng.choice([128, 256, 512]))
    model: dict[str, Any] = {
        "interformer": {"dim": 32, "num_heads": 2, "mode": "sole", "num_layers": 2, "head_hidden": [width, 64]},
        "dlrm": {"bottom_hidden": [width], "top_hidden": [2 * width, width]},
        "dlrm_dcnv2": {"bottom_hidden": [width], "cross_rank": 64, "top_hidden": [2 * width, width]},
    }[arch]
    source = {"kind": "synthetic", "num_train": 10**6, "num_eval": 1, "id_skew": round(float(rng.uniform(0, 1.5)), 2)}
    return {
        "name": f"workload_{seed}",
        "device": cluster.device,
        "features": features,
        "data": {"source": source, "lanes": cluster.num_ranks},
        "model": {"arch": arch, **model},
        "train": {"global_batch_size": batch},
    }


def tight_memory(space: Space, plans: Plans, seed: int) -> Space:
    """The space on a cluster with so little memory that the fullest of some random points does not fit."""
    rng = np.random.default_rng(seed)
    bytes_of = []
    for point in (space.sample(rng) for _ in range(8)):
        job = space.job(point)
        bytes_of.append(max(load.total_device_bytes for load in plans.plan(job.config, job.cluster).ranks))
    gb = max(bytes_of) / float(rng.uniform(*FILL)) / 1e9
    cluster = space.cluster
    name, value = ("hbm_gb", gb) if cluster.device == "cuda" else ("host_memory_gb", gb * cluster.ranks_per_host)
    figure = getattr(cluster, name).model_copy(update={"value": value})
    return Space(space.file, space.tree, cluster.model_copy(update={name: figure}))


def simulated_workload(seed: int, cluster: ClusterSpec, plans: Plans, num_points: int) -> MeasuredRuns:
    """Random points of a random model."""
    space = tight_memory(random_space(seed, cluster), plans, seed)
    rng = np.random.default_rng(seed)
    points = list(dict.fromkeys(space.sample(rng) for _ in range(num_points)))
    return simulate_points(f"workload_{seed}", Featuriser(space, plans), points)[1]


def simulate_points(name: str, featuriser: Featuriser, points: Sequence[Point]) -> tuple[list[Point], MeasuredRuns]:
    """Those that the planner does not refuse, and their runs. Raises ConfigError: it refuses all."""
    candidates = featuriser(points)
    kept = [i for i in range(len(points)) if i not in candidates.reasons]
    if not kept:
        raise ConfigError(f"{name}: the planner refuses every point: {next(iter(candidates.reasons.values()))}")
    step_ms, fits = [], []
    for i in kept:
        job = featuriser.space.job(points[i])
        plan = featuriser.plans.plan(job.config, job.cluster)
        found = simulate(
            job, plan, featuriser.plans.dense(job.config, plan.request.local_batch_size, plan.request.cluster.device)
        )
        fits.append(found.needed <= 1)
        step_ms.append(found.step_ms if found.needed <= 1 else np.nan)
    table = candidates.table.take(np.array(kept))
    return [points[i] for i in kept], MeasuredRuns(name, table, np.array(step_ms), np.array(fits), NOISE)


def of_one_kind(paths: Sequence[str]) -> History:
    """Raises ConfigError: none was measured, a line cannot be used, or they are of several kinds of machine or versions."""
    history = read_records(paths)
    history.require()
    if history.problems:
        raise ConfigError(f"{len(history.problems)} records cannot be used: {history.problems[0]}; take them out")
    first = history.records[0]
    split = history.split(first.hardware or "", first.versions)
    if split.prior:
        raise ConfigError(
            f"{len(split.prior)} of {len(history.records)} records are not of the machine and software of the first, so their times do not "
            f"compare: {next(iter(split.why))}; give files of one kind"
        )
    return history


def measured_runs(paths: Sequence[str], plans: Plans) -> list[MeasuredRuns]:
    """Records of files, by workload; those of failed runs are left out. Raises ConfigError: see `of_one_kind`."""
    history = of_one_kind(paths)
    by_workload: dict[str, list[Record]] = {}
    for record in history.records:
        if record.outcome != "failed":
            by_workload.setdefault(workload_of(record.job.config), []).append(record)
    runs = []
    for records in by_workload.values():
        step_ms, fits = np.array([r.step_ms for r in records]), np.array([r.outcome == "ok" for r in records])
        runs.append(MeasuredRuns(records[0].job.config.name, record_features(records, plans), step_ms, fits))
    return runs
