"""Which sharding types, kernels and column widths each table may have."""

from typing import Literal, NamedTuple

from dlrm_scale.config import PLAIN_SPARSE_OPTIMIZERS, SEQUENCE_SHARDING_TYPES, TableSharding
from dlrm_scale.errors import ConfigError
from dlrm_scale.sharding.groups import KERNELS, SHARDING_TYPES
from dlrm_scale.sharding.plan import PlanRequest

ColumnWidths = Literal["all", "stock"]

COLUMN_TYPES = ("column_wise", "table_column_wise", "grid_shard")
LEAST_COLUMNS = 32  # of a column shard, where min_partition does not say; narrower rows read no faster
STOCK_LEAST_COLUMNS = 128  # TorchRec's MIN_CW_DIM
STOCK_CACHE_LOAD_FACTOR = 0.2  # TorchRec's UVM_CACHING_RATIO
FREE = TableSharding()


class Choice(NamedTuple):
    sharding_type: str
    num_columns: int  # of one shard
    kernel: str
    cache_load_factor: float  # NaN unless fused_uvm_caching


def table_choices(name: str, request: PlanRequest, widths: ColumnWidths) -> list[Choice]:
    """The options of one table, in the order of SHARDING_TYPES, widest shards first; see `enumerate_options`.

    Raises:
        ConfigError: a constraint asks for what the table, the device or the optimizer does not have.
    """
    spec = request.tables[name]
    constraint = request.sharding.tables.get(name, FREE)
    types = _types(name, request, constraint, widths)
    if widths == "all":
        empty = empty_cuts(request, spec.num_embeddings)
        types = [t for t in types if t not in empty] or types
    kernels = _kernels(name, request, constraint, widths)
    choices = []
    for sharding_type in types:
        if sharding_type == "data_parallel":
            choices.append(Choice(sharding_type, spec.embedding_dim, "dense", float("nan")))
            continue
        for num_columns in _widths_of_type(sharding_type, name, request, types, widths):
            choices += [Choice(sharding_type, num_columns, *kernel) for kernel in kernels]
    return choices


def _types(name: str, request: PlanRequest, constraint: TableSharding, widths: ColumnWidths) -> list[str]:
    """In the order of SHARDING_TYPES."""
    spec, where = request.tables[name], f"sharding.tables.{name}.types"
    of_collection = SHARDING_TYPES if spec.collection == "bags" else SEQUENCE_SHARDING_TYPES
    replicates = request.sparse_optimizer in PLAIN_SPARSE_OPTIMIZERS
    if constraint.types is None:
        left_out = set() if replicates else {"data_parallel"}
        # TorchRec tries grid_shard only where it is named
        if widths == "stock" or spec.pooling == "mean":
            left_out |= {"grid_shard"}
        return [t for t in SHARDING_TYPES if t in of_collection and t not in left_out]
    unknown = [t for t in constraint.types if t not in of_collection]
    if unknown:
        raise ConfigError(
            f"{where} has {', '.join(unknown)}, but a sequence reads {name}, and a sequence's table can be sharded only "
            f"as {', '.join(of_collection)}; leave the others out"
        )
    if "data_parallel" in constraint.types and not replicates:
        raise ConfigError(
            f"{where} has data_parallel, which can train by {', '.join(PLAIN_SPARSE_OPTIMIZERS)}, but train.sparse.name "
            f"is {request.sparse_optimizer}; leave it out, or change the optimizer"
        )
    if "grid_shard" in constraint.types and spec.pooling == "mean":
        raise ConfigError(
            f"{where} has grid_shard, which TorchRec 1.8.0 computes wrong for pooling: mean; leave it out, or set "
            f"features.tables.{name}.pooling=sum"
        )
    return [t for t in SHARDING_TYPES if t in constraint.types]


def empty_cuts(request: PlanRequest, num_rows: int) -> tuple[str, ...]:
    """The types that would leave a CPU rank without a row of such a table; offered only where no other type is allowed.

    FBGEMM 1.8.0 takes a kernel without any row for one of a GPU and fails on a CPU (see `local_tables.refuse_empty_kernels`). Another table may share the
    kernel of such a rank, which is not known before the plan is; and so few rows gain nothing by a cut.
    """
    cluster = request.group
    if cluster.device != "cpu":
        return ()
    ranks_of = {
        "row_wise": cluster.num_ranks,
        **dict.fromkeys(("table_row_wise", "grid_shard"), cluster.ranks_per_host),
    }
    return tuple(kind for kind, ranks in ranks_of.items() if (ranks - 1) * -(-num_rows // ranks) >= num_rows)


def _kernels(
    name: str, request: PlanRequest, constraint: TableSharding, widths: ColumnWidths
) -> list[tuple[str, float]]:
    """(kernel, cache_load_factor) of all types but data_parallel."""
    spec, cluster = request.tables[name], request.group
    of_device = ("fused",) if cluster.device == "cpu" else KERNELS[1:]
    if request.sharding.replica_groups > 1:  # `DMPCollection.sync` averages rows without those that wait in a cache
        of_device = tuple(kernel for kernel in of_device if kernel != "fused_uvm_caching")
    if constraint.kernels is not None and constraint.types == ("data_parallel",):
        raise ConfigError(
            f"sharding.tables.{name}.kernels is {', '.join(constraint.kernels)}, but its types are data_parallel alone, which has a kernel of its "
            "own; leave kernels out, or allow another type"
        )
    unknown = [kernel for kernel in constraint.kernels or () if kernel not in of_device]
    if unknown:
        raise ConfigError(
            f"sharding.tables.{name}.kernels has {', '.join(unknown)}, which {cluster.device} does not have"
            f"{' with replica groups' if request.sharding.replica_groups > 1 else ''}; "
            f"take {', '.join(of_device)}, or leave it out"
        )
    if cluster.device == "cuda" and spec.data_type == "bf16":
        raise ConfigError(
            f"table {name} has data_type bf16, which FBGEMM 1.8.0 does not have on CUDA (it refuses cache_precision bf16); "
            "take fp16 or fp32"
        )
    factors = constraint.cache_load_factors
    if widths == "stock" and factors == FREE.cache_load_factors:
        factors = (STOCK_CACHE_LOAD_FACTOR,)
    kernels = []
    for kernel in of_device:
        if constraint.kernels is None or kernel in constraint.kernels:
            own_factors = dict.fromkeys(factors) if kernel == "fused_uvm_caching" else (float("nan"),)
            kernels += [(kernel, factor) for factor in own_factors]
    return kernels


def _widths_of_type(
    sharding_type: str, name: str, request: PlanRequest, types: list[str], widths: ColumnWidths
) -> list[int]:
    """Columns of one shard, widest first; none where another of `types` does the same (see `enumerate_options`)."""
    dim, num_hosts = request.tables[name].embedding_dim, request.group.num_hosts
    same_on_one_host = sharding_type == "table_row_wise" and num_hosts == 1 and "row_wise" in types
    within_column_wise = sharding_type == "table_column_wise" and "column_wise" in types
    if widths == "all" and (same_on_one_host or within_column_wise):
        return []
    if sharding_type not in COLUMN_TYPES:
        return [dim]
    cuts = _column_widths(name, request, sharding_type, widths)
    if widths == "stock":
        return cuts
    if sharding_type == "grid_shard":
        spread = [width for width in cuts if dim // width <= num_hosts]
        cuts = spread or (
            cuts[:1] if types == ["grid_shard"] else []
        )  # where nothing else is allowed, blocks share hosts
    uncut = "table_row_wise" if sharding_type == "grid_shard" else "table_wise"
    return [width for width in cuts if width < dim or uncut not in types]


def _column_widths(name: str, request: PlanRequest, sharding_type: str, widths: ColumnWidths) -> list[int]:
    """TorchRec's own cut (`_find_base_dim`), and for `all` a bag's halves, quarters and so on; widest first."""
    spec = request.tables[name]
    dim = spec.embedding_dim
    least = request.sharding.tables.get(name, FREE).min_partition
    if least is not None and dim % least:
        fits = [width for width in range(4, dim + 1, 4) if dim % width == 0]
        raise ConfigError(
            f"sharding.tables.{name}.min_partition is {least}, which does not divide embedding_dim {dim} of table {name}; "
            f"take one of {', '.join(map(str, fits))}"
        )
    stock_least = least or STOCK_LEAST_COLUMNS
    stock = next((width for width in range(stock_least, dim) if dim % width == 0 and width % 4 == 0), dim)
    if widths == "stock" or spec.collection == "sequences":
        return [stock]
    # Row-wise costs have no penalty for narrow rows, so that narrow grid blocks would look cheaper than they are
    least = least or (STOCK_LEAST_COLUMNS if sharding_type == "grid_shard" else LEAST_COLUMNS)
    halves = [dim >> k for k in range(1, dim.bit_length()) if dim % (1 << k) == 0]
    cuts = {stock} | {width for width in halves if width % 4 == 0 and width >= least}
    spread = {width for width in cuts if dim // width <= request.group.num_ranks}  # two shards on a rank gain nothing
    return sorted(spread or cuts, reverse=True)
