"""Features of a run, named and versioned: the planner's numbers, the dense arch's, and how the run is started.

They come in two parts that are found apart and joined as arrays, so that thousands of candidates share a few hundred plans:
plan numbers (a job and its plan) and run numbers (what no plan depends on). `derive` makes of both
    terms    milliseconds of the analytic model, whose sum it is
    extras   counts of what the analytic model leaves out; the predictor may put a price on each
    inputs   what the residual network sees, scaled to about 1
"""

# N rows  P plan numbers  R run numbers  K terms  E extras  F inputs
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from dlrm_scale.cluster import ClusterSpec
from dlrm_scale.config import RunConfig, SyntheticSource
from dlrm_scale.sharding.cost import SENT_BYTES, plain_all_reduce_ms
from dlrm_scale.sharding.groups import SHARDING_TYPES
from dlrm_scale.sharding.options import STAGES
from dlrm_scale.sharding.plan import RankLoad
from dlrm_scale.tuning.plans import DenseWork, local_batch_size

FEATURE_VERSION = 2
ARCHS = ("interformer", "dlrm", "dlrm_dcnv2", "logistic")
# FLOP/s that a dense arch of many small products may reach: guesses, one core and one GPU; the predictor learns what is true
FLOPS_PER_S = {("cpu", "fp32"): 2e10, ("cpu", "bf16"): 2e10, ("cuda", "fp32"): 3e13, ("cuda", "bf16"): 2e14}
SWITCHES = ("compile", "activation_checkpointing", "index_dedup", "tf32")  # of `train`, which no other number shows

TERMS = (*STAGES, "dense", "all_reduce")
EXTRAS = ("micro_batches", "lookup_kernels", "collectives", "local_samples", "local_ids", "dense_parameters")
FILL_PARTS = (
    "fill_tables",
    "fill_exchange",
    "fill_dense",
)  # of what tables may take of a rank's memory, of the fullest rank
_EXCHANGED = ("inputs", "outputs")
_OF_TABLES = (
    *("num_tables", "num_sequence_tables", "ids", "max_ids", "log_rows", "log_rows_spread", "log_dim", "skew"),
    *(f"tables_{t}" for t in SHARDING_TYPES),
    *(f"ids_{t}" for t in SHARDING_TYPES),
)
_OF_JOB = (
    *(
        "global_batch",
        "accumulate",
        "ranks",
        "hosts",
        "bf16",
        "critical_path",
        "cuda",
        "memory_bw",
        "intra_bw",
        "inter_bw",
    ),
    *("flops_per_sample", "dense_parameters", "dense_ms", "all_reduce_ms"),
    *SWITCHES,
    *(f"arch_{arch}" for arch in ARCHS),
)
_OF_PLAN = (
    *(f"busiest_{s}" for s in STAGES),
    "mean_ms",
    "longest_stages_ms",
    *FILL_PARTS,
    "table_bytes",
    "kernels",
    "comms",
)
PLAN_NUMBERS = (*_OF_TABLES, *_OF_JOB, *_OF_PLAN)
RUN_NUMBERS = ("pipelined", "prefetch", "threads")
_AT = {name: i for i, name in enumerate((*PLAN_NUMBERS, *RUN_NUMBERS))}
_LOGS = (  # of these, inputs hold the logarithm
    *(
        "num_tables",
        "ids",
        "max_ids",
        "global_batch",
        "accumulate",
        "ranks",
        "hosts",
        "memory_bw",
        "intra_bw",
        "inter_bw",
    ),
    *("flops_per_sample", "dense_parameters", "table_bytes", "kernels", "prefetch", "threads"),
)
_PLAIN = (
    *(
        "num_sequence_tables",
        "log_rows",
        "log_rows_spread",
        "log_dim",
        "skew",
        "bf16",
        "critical_path",
        "cuda",
        *FILL_PARTS,
        "comms",
    ),
    *(f"tables_{t}" for t in SHARDING_TYPES),
    *(f"ids_{t}" for t in SHARDING_TYPES),
    *(f"arch_{arch}" for arch in ARCHS),
    *SWITCHES,
    "pipelined",
)
_RATIOS = ("local_batch", "local_ids", "imbalance", "longest_stages", "analytic", *(f"share_{t}" for t in TERMS))
INPUTS = (*(f"log_{name}" for name in (*_LOGS, *_RATIOS)), *_PLAIN)


@dataclass(frozen=True)
class FeatureTable:
    terms_NK: np.ndarray
    extras_NE: np.ndarray
    inputs_NF: np.ndarray
    global_batch_N: np.ndarray
    fill_N3: np.ndarray  # by FILL_PARTS, as the planner counts; a sum of 1 is the most that it allows

    @property
    def analytic_ms_N(self) -> np.ndarray:
        return self.terms_NK.sum(1)

    @property
    def feasible_N(self) -> np.ndarray:
        """False where the planner has no plan: such rows are NaN."""
        return np.isfinite(self.terms_NK[:, 0])

    def __len__(self) -> int:
        return len(self.fill_N3)

    def take(self, index_N: np.ndarray) -> "FeatureTable":
        return FeatureTable(*(getattr(self, f.name)[index_N] for f in fields(self)))

    @staticmethod
    def join(tables: Sequence["FeatureTable"]) -> "FeatureTable":
        return FeatureTable(*(np.concatenate([getattr(t, f.name) for t in tables]) for f in fields(FeatureTable)))


def plan_numbers(
    config: RunConfig, cluster: ClusterSpec, types: dict[str, str], loads: Sequence[RankLoad], work: DenseWork
) -> np.ndarray:
    """(P,) in the order of PLAN_NUMBERS. `types` and `loads`: of the plan, by table and by rank."""
    numbers = {**_table_numbers(config, types), **_job_numbers(config, cluster, work)}
    return np.array([{**numbers, **_load_numbers(config, cluster, types, loads)}[name] for name in PLAN_NUMBERS])


def run_numbers(config: RunConfig, threads_per_rank: int) -> np.ndarray:
    """(R,) in the order of RUN_NUMBERS."""
    pipelined = float(config.train.pipeline != "none")
    return np.array([pipelined, float(config.data.prefetch_batches), float(threads_per_rank)])


def derive(plan_NP: np.ndarray, run_NR: np.ndarray) -> FeatureTable:
    """The analytic model is the sum of `terms`, for one optimizer step:

    micro-batches x (the busiest rank's stages in the planner's cost model + FLOPs / (stated FLOP/s x threads) + a ring
    all-reduce of the dense gradients). Nothing overlaps and starting an operation costs nothing.
    """
    x = np.concatenate([plan_NP, run_NR], axis=1)

    def of(name: str) -> np.ndarray:
        return x[:, _AT[name]]

    micro, local = of("accumulate"), of("global_batch") / of("accumulate") / of("ranks")
    threads = np.where(of("cuda") > 0, 1.0, of("threads"))
    stages = [of(f"busiest_{stage}") * micro for stage in STAGES]
    terms_NK = np.stack([*stages, of("dense_ms") * micro / threads, of("all_reduce_ms") * micro], axis=1)
    extras_NE = np.stack(
        [micro, micro * of("kernels"), micro * of("comms"), micro * local / 1e3, micro * local * of("ids") / 1e5,
         of("dense_parameters") / 1e6], axis=1,
    )  # fmt: skip
    analytic, busiest = terms_NK.sum(1), sum(of(f"busiest_{stage}") for stage in STAGES)
    ratios = [local, local * of("ids"), busiest / of("mean_ms"), of("longest_stages_ms") / busiest, analytic]
    ratios += [term / analytic + 1e-3 for term in terms_NK.T]
    logs = [np.log(np.maximum(value, 1e-9)) for value in (*map(of, _LOGS), *ratios)]
    inputs_NF, fill_N3 = np.stack([*logs, *map(of, _PLAIN)], axis=1), np.stack([*map(of, FILL_PARTS)], axis=1)
    return FeatureTable(terms_NK, extras_NE, inputs_NF, of("global_batch"), fill_N3)


def analytic_step_ms(
    config: RunConfig,
    cluster: ClusterSpec,
    types: dict[str, str],
    loads: Sequence[RankLoad],
    work: DenseWork,
    threads_per_rank: int,
) -> float:
    """Of one optimizer step; see `derive`."""
    numbers = plan_numbers(config, cluster, types, loads, work)
    return float(derive(numbers[None], run_numbers(config, threads_per_rank)[None]).analytic_ms_N[0])


def _table_numbers(config: RunConfig, types: dict[str, str]) -> dict[str, float]:
    schema, source = config.features, config.data.source
    tables = list(schema.tables)
    ids = {name: sum(schema.expected_ids[f] for f in schema.features_of(name)) for name in tables}
    log_rows = np.log10([schema.tables[name].num_embeddings for name in tables])
    all_ids = sum(ids.values())
    of_type = {t: [name for name in tables if types[name] == t] for t in SHARDING_TYPES}
    return {
        "num_tables": len(tables),
        "num_sequence_tables": len(schema.sequence_tables) / len(tables),
        "ids": all_ids,
        "max_ids": max(ids.values()),
        "log_rows": float(log_rows.mean()),
        "log_rows_spread": float(log_rows.std()),
        "log_dim": float(np.log2([schema.tables[name].embedding_dim for name in tables]).mean()) / 4,
        "skew": source.id_skew
        if isinstance(source, SyntheticSource)
        else 1.0,  # real ids: Zipf's law, the usual finding
        **{f"tables_{t}": len(names) / len(tables) for t, names in of_type.items()},
        **{f"ids_{t}": sum(ids[name] for name in names) / all_ids for t, names in of_type.items()},
    }


def _job_numbers(config: RunConfig, cluster: ClusterSpec, work: DenseWork) -> dict[str, float]:
    train, local = config.train, local_batch_size(config, cluster)
    memory = cluster.host_memory_gb_per_s if cluster.device == "cpu" else cluster.hbm_gb_per_s
    gradient_bytes = work.num_parameters * SENT_BYTES[train.all_reduce.precision]
    return {
        "global_batch": train.global_batch_size,
        "accumulate": train.accumulate_steps,
        "ranks": cluster.num_ranks,
        "hosts": cluster.num_hosts,
        "bf16": float(train.precision == "bf16"),
        "critical_path": float(config.sharding.objective == "critical_path"),
        "cuda": float(cluster.device == "cuda"),
        "memory_bw": memory.value,
        "intra_bw": cluster.intra_host_gb_per_s.value,
        "inter_bw": cluster.inter_host_gb_per_s.value,
        "flops_per_sample": work.flops / local,
        "dense_parameters": work.num_parameters,
        "dense_ms": work.flops / FLOPS_PER_S[cluster.device, train.precision] * 1e3,
        "all_reduce_ms": plain_all_reduce_ms(gradient_bytes, cluster) if cluster.num_ranks > 1 else 0.0,
        **{name: float(getattr(train, name)) for name in SWITCHES},
        **{f"arch_{arch}": float(config.model.arch == arch) for arch in ARCHS},
    }


def _load_numbers(
    config: RunConfig, cluster: ClusterSpec, types: dict[str, str], loads: Sequence[RankLoad]
) -> dict[str, float]:
    ms_RS = np.array([[load.step_ms.get(stage, 0.0) for stage in STAGES] for load in loads])
    busiest = ms_RS[int(ms_RS.sum(1).argmax())]
    fullest = max(loads, key=lambda load: load.total_device_bytes)
    exchanged_bytes = sum(fullest.device_bytes.get(kind, 0.0) for kind in _EXCHANGED)
    dense_bytes = sum(size for kind, size in fullest.device_bytes.items() if kind.startswith("dense_"))
    table_bytes = fullest.total_device_bytes - exchanged_bytes - dense_bytes
    room = cluster.table_bytes_per_rank * (1 - config.sharding.storage_reserve)
    collection = config.features.sequence_tables
    lookups = Counter((name in collection, kind) for name, kind in types.items())
    exchanged = {group for group in lookups if group[1] != "data_parallel"} if cluster.num_ranks > 1 else set()
    return {
        **{f"busiest_{stage}": float(ms) for stage, ms in zip(STAGES, busiest, strict=True)},
        "mean_ms": float(ms_RS.sum(1).mean()),
        "longest_stages_ms": float(ms_RS.max(0).sum()),
        "fill_tables": table_bytes / room,
        "fill_exchange": exchanged_bytes / room,
        "fill_dense": dense_bytes / room,
        "table_bytes": table_bytes,
        "kernels": len(lookups),  # FBGEMM looks up the tables of one type and collection in one kernel
        "comms": len(exchanged),
    }
