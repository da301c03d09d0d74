"""A small space that plans in milliseconds, and feature tables with a known truth."""

import copy
from typing import Any

import numpy as np

from dlrm_scale.cluster import ClusterSpec
from dlrm_scale.config_io import parse_tree
from dlrm_scale.tuning.features import PLAN_NUMBERS, RUN_NUMBERS, FeatureTable, derive
from dlrm_scale.tuning.plans import Plans
from dlrm_scale.tuning.space import Space, SpaceFile
from tests.support.configs import TINY
from tests.support.requests import cluster

KNOBS: dict[str, dict[str, Any]] = {
    "ranks": {"kind": "categorical", "key": "launch.num_ranks", "values": [1, 2]},
    "batch": {"kind": "integer", "key": "train.global_batch_size", "low": 64, "high": 512, "log": True},
    "pipeline": {"kind": "categorical", "key": "train.pipeline", "values": ["sparse_dist", "none"]},
    "user": {
        "kind": "sharding",
        "tables": ["user"],
        "values": ["any", "row_wise", "table_wise"],
        "when": {"ranks": [2]},
    },
}
PLANS = Plans()  # shared: the same few requests are planned over and over
SIZE = 8 + 24  # on one rank, on two


def tiny_tree() -> dict[str, Any]:
    tree = copy.deepcopy(TINY)
    tree["model"] = {"arch": "logistic"}  # traced in no time
    return tree


def tiny_space(knobs: dict[str, Any] | None = None, machines: ClusterSpec | None = None) -> Space:
    """Of KNOBS, or of others."""
    file = {"base": "tiny.yaml", "cluster": "tests", "knobs": KNOBS if knobs is None else knobs}
    machines = machines or cluster("cpu", 2, 2)
    return Space(parse_tree(file, SpaceFile, "tuning space", "space.yaml"), tiny_tree(), machines)


def random_table(num_rows: int, seed: int) -> FeatureTable:
    """Rows as of one workload on one machine, at several batch sizes and accumulations."""
    rng = np.random.default_rng(seed)
    numbers = {name: np.ones(num_rows) for name in (*PLAN_NUMBERS, *RUN_NUMBERS)}
    accumulate, local = rng.integers(1, 5, num_rows), 2.0 ** rng.integers(5, 11, num_rows)
    numbers |= {
        "accumulate": accumulate,
        "global_batch": local * accumulate * 2,
        "ranks": np.full(num_rows, 2.0),
        "kernels": rng.integers(1, 6, num_rows),
        "busiest_fwd_compute": local * rng.uniform(0.5, 2, num_rows) / 100,
        "dense_ms": local / 100,
        "mean_ms": local / 200,
        "longest_stages_ms": local / 50,
        "fill_tables": rng.uniform(0.1, 0.6, num_rows),
        "fill_exchange": local / 1024 * 0.4,
        "fill_dense": np.full(num_rows, 0.02),
        "pipelined": rng.integers(0, 2, num_rows),
    }
    for name in ("fwd_comms", "bwd_compute", "bwd_comms", "prefetch_compute", "input_dist_comms", "replica_sync"):
        numbers[f"busiest_{name}"] = np.zeros(num_rows)
    columns = [np.stack([numbers[n] for n in names], axis=1).astype(float) for names in (PLAN_NUMBERS, RUN_NUMBERS)]
    return derive(*columns)


def true_step_ms(table: FeatureTable) -> np.ndarray:
    """Of `random_table`: the analytic time, dense part at half the stated speed, and 5 ms a micro-batch that it leaves out."""
    return table.analytic_ms_N + table.terms_NK[:, -2] + 5 * table.extras_NE[:, 0]
