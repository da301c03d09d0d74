"""When nothing fits: the smallest changes that would, each tried."""

from collections.abc import Callable, Iterable, Iterator

from dlrm_scale.cluster import ClusterSpec
from dlrm_scale.config import TableSharding
from dlrm_scale.errors import UserError
from dlrm_scale.sharding.plan import PlanRequest
from dlrm_scale.sharding.planner import find_plan

MOST_HOSTS = 64  # times as many as there are
QUICK_ROUNDS, QUICK_SECONDS = 100, 5.0
SHOWN_TABLES = 4


def ways_to_fit(request: PlanRequest) -> Iterator[str]:
    """One line for each single change after which a plan was found: types set free, other kernels, fp16, more hosts."""
    yield from filter(None, (way(request) for way in (_freed_types, _spilled, _half_precision, _more_hosts)))


def _fits(request: PlanRequest) -> bool:
    quick = request.sharding.model_copy(update={"search_seconds": min(QUICK_SECONDS, request.sharding.search_seconds)})
    try:
        find_plan(request.model_copy(update={"sharding": quick}), num_rounds=QUICK_ROUNDS)
    except UserError:
        return False
    return True


def _freed_types(request: PlanRequest) -> str | None:
    """Row- and column-wise for as few tables as possible, the largest first."""

    def freed(rules: TableSharding) -> TableSharding:
        return rules.model_copy(update={"types": None, "min_partition": None})

    return _fewest_tables(
        request,
        lambda rules: rules.types is not None,
        freed,
        "leave types and min_partition out (any way to shard) for",
    )


def _spilled(request: PlanRequest) -> str | None:
    """Tables in host memory, cached in HBM, as few as possible, the largest first."""
    if request.cluster.device == "cpu":
        return None

    def spilled(rules: TableSharding) -> TableSharding:
        return rules.model_copy(update={"kernels": None})

    return _fewest_tables(
        request,
        lambda rules: rules.kernels is not None,
        spilled,
        "allow kernels fused_uvm_caching and fused_uvm (host memory) for",
    )


def _fewest_tables(
    request: PlanRequest,
    applies: Callable[[TableSharding], bool],
    change: Callable[[TableSharding], TableSharding],
    advice: str,
) -> str | None:
    rules = request.sharding.tables
    largest_first = _largest_first(request, (name for name in rules if applies(rules[name])))

    def changed(count: int) -> PlanRequest:
        tables = rules | {name: change(rules[name]) for name in largest_first[:count]}
        return request.model_copy(update={"sharding": request.sharding.model_copy(update={"tables": tables})})

    count = _least(lambda n: _fits(changed(n)), len(largest_first))
    if count is None:
        return None
    return f"{advice} {'table' if count == 1 else 'tables'} {_shown(largest_first[:count])} in sharding.tables"


def _half_precision(request: PlanRequest) -> str | None:
    wide = _largest_first(request, (name for name, table in request.tables.items() if table.data_type == "fp32"))

    def halved(count: int) -> PlanRequest:
        tables = {
            name: table.model_copy(update={"data_type": "fp16"}) if name in wide[:count] else table
            for name, table in request.tables.items()
        }
        return request.model_copy(update={"tables": tables})

    count = _least(lambda n: _fits(halved(n)), len(wide))
    if count is None:
        return None
    if count == len(wide):
        return "data_type: fp16 for all tables"
    return f"data_type: fp16 for the largest {count} of {len(wide)} tables: {_shown(wide[:count])}"


def _largest_first(request: PlanRequest, names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda n: -request.tables[n].num_embeddings * request.tables[n].embedding_dim)


def _shown(names: list[str]) -> str:
    more = len(names) - SHOWN_TABLES
    return ", ".join(names[:SHOWN_TABLES]) + (f" and {more} more" if more > 0 else "")


def _more_hosts(request: PlanRequest) -> str | None:
    cluster = request.cluster

    def grown(count: int) -> PlanRequest:
        return request.model_copy(update={"cluster": _with_hosts(cluster, cluster.num_hosts + count)})

    count = _least(lambda n: _fits(grown(n)), cluster.num_hosts * (MOST_HOSTS - 1))
    if count is None:
        return None
    hosts = cluster.num_hosts + count
    return f"{hosts} hosts ({hosts * cluster.ranks_per_host} ranks) instead of {cluster.num_hosts}, at the same local batch"


def _with_hosts(cluster: ClusterSpec, num_hosts: int) -> ClusterSpec:
    return cluster.model_copy(update={"num_ranks": num_hosts * cluster.ranks_per_host})


def _least(holds: Callable[[int], bool], most: int) -> int | None:
    """The least n in 1 .. most for which `holds(n)`, by doubling and halving (it holds for all larger ones); None: not even `most`."""
    high = 1
    while high < most and not holds(high):
        high *= 2
    high = min(high, most)
    if most < 1 or not holds(high):
        return None
    low = high // 2  # known not to hold, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
