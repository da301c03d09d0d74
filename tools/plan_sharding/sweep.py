"""Plans for several world sizes or batch sizes, to see where more of either stops paying."""

from typing import Any

from dlrm_scale.errors import ConfigError, NoPlanError
from dlrm_scale.sharding.planner import find_plan
from tools.plan_sharding.jobs import Job
from tools.plan_sharding.show import fullest_rank

KINDS = ("ranks", "local_batch")


def read_sweep(what: str, job: Job) -> list[tuple[int, int]]:
    """(ranks, local batch size) of each plan: `ranks=8,16,32` keeps the global batch, `local_batch=512,1024` the ranks.

    Raises:
        ConfigError: not such a list, ranks that do not fill hosts or do not divide the global batch.
    """
    kind, _, text = what.partition("=")
    try:
        values = [int(value) for value in text.split(",")]
    except ValueError:
        values = []
    if kind not in KINDS or not values or min(values) < 1:
        raise ConfigError(f"--sweep reads ranks=8,16,32 or local_batch=512,1024, but is {what!r}")
    cluster = job.request.cluster
    if kind == "local_batch":
        return [(cluster.num_ranks, value) for value in values]
    global_batch = job.request.local_batch_size * cluster.num_ranks
    for value in values:
        if value > cluster.ranks_per_host and value % cluster.ranks_per_host:
            raise ConfigError(
                f"--sweep ranks={value}: hosts have {cluster.ranks_per_host} ranks; give a multiple of {cluster.ranks_per_host}, "
                "or fewer for a part of one host"
            )
        if global_batch % value:
            raise ConfigError(
                f"--sweep ranks={value}: the global batch of {global_batch:,} is not a multiple of {value}; sweep ranks that divide "
                "it, or set another batch"
            )
    return [(value, global_batch // value) for value in values]


def sweep_row(job: Job, num_ranks: int, local_batch_size: int, seed: int) -> dict[str, Any]:
    """Plans once. Raises ConfigError: the configuration cannot run on so many ranks, or at such a batch."""
    per_host = min(job.request.cluster.ranks_per_host, num_ranks)
    cluster = job.request.cluster.model_copy(update={"num_ranks": num_ranks, "ranks_per_host": per_host})
    request = job.resize(cluster, local_batch_size).request
    row = {
        "num_ranks": num_ranks,
        "local_batch_size": local_batch_size,
        "global_batch_size": local_batch_size * num_ranks,
    }
    try:
        plan = find_plan(request, seed=seed).plan
    except NoPlanError as e:
        return row | {"fits": False, "reason": str(e)}
    return row | {
        "fits": True,
        "score_ms": plan.score_ms,
        "gap": plan.gap,
        "samples_per_second": row["global_batch_size"] / plan.score_ms * 1e3,
        "fullest_device_bytes": plan.ranks[fullest_rank(plan)].total_device_bytes,
    }
