"""Every way to shard every table, with its cost and bytes, as arrays: what the search chooses from."""

from dataclasses import dataclass

import numpy as np

from dlrm_scale.errors import ConfigError
from dlrm_scale.sharding.choices import Choice, ColumnWidths, empty_cuts, table_choices
from dlrm_scale.sharding.cost import replica_sync_ms, shard_ms
from dlrm_scale.sharding.groups import KERNELS, SHARDING_TYPES, Options, Tables, cut
from dlrm_scale.sharding.plan import PlanRequest
from dlrm_scale.sharding.storage import shard_bytes

STAGES = (
    *("fwd_compute", "fwd_comms", "bwd_compute", "bwd_comms", "prefetch_compute", "input_dist_comms"),  # TorchRec's
    "replica_sync",  # a step's part of averaging the copies of replica groups
)
BYTE_KINDS = ("weights", "optimizer", "cache_state", "inputs", "outputs")
ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class OptionSet:
    """O options, each a table's sharding type, kernel and cut, made of G groups of equal shards.

    An option's groups, and the shards in them, are in the order of their place in the table: row blocks from the top,
    column blocks from the left, and for grid_shard all row blocks of the first column block first. A shard may have
    no rows (row-wise with fewer rows than ranks). data_parallel is one group of num_ranks whole tables.
    """

    table_names: tuple[str, ...]
    option_table: np.ndarray  # (O,) index into table_names, ascending
    option_type: np.ndarray  # (O,) sharding type
    option_kernel: np.ndarray  # (O,) compute kernel
    option_cache_load_factor: np.ndarray  # (O,) NaN unless fused_uvm_caching
    group_option: np.ndarray  # (G,) index of its option, ascending
    group_num_shards: np.ndarray  # (G,)
    group_num_rows: np.ndarray  # (G,) of one shard
    group_num_columns: np.ndarray  # (G,) of one shard
    group_ms: np.ndarray  # (G, len(STAGES)) of one shard
    group_device_bytes: np.ndarray  # (G, len(BYTE_KINDS)) of one shard, in HBM (cpu: in host memory)
    group_host_bytes: np.ndarray  # (G, len(BYTE_KINDS)) of one shard, in host memory beside a CUDA device (cpu: 0)


def enumerate_options(request: PlanRequest, column_widths: ColumnWidths = "all") -> OptionSet:
    """All options of all tables, with their cost (`cost.py`) and bytes (`storage.py`).

    A table of an EmbeddingBagCollection may have every sharding type: data_parallel (kernel `dense`) only where a plain
    twin of the fused optimizer exists, grid_shard never for pooling mean, which TorchRec 1.8.0 sums wrong. A table of
    an EmbeddingCollection has SEQUENCE_SHARDING_TYPES. The other types have `fused` on cpu, and all of fused, fused_uvm
    and fused_uvm_caching (once for each cache_load_factor) on cuda. `request.sharding.tables` narrows this by table.

    "stock" is what TorchRec's EmbeddingEnumerator tries: column shards of the one width nearest above min_partition (or
    128), grid_shard only where a constraint names it, and the cache load factor 0.2 unless a constraint gives others
    than the default.

    "all" cuts a bag's columns also into halves, quarters and so on, down to min_partition (or 32; grid_shard 128).
    TorchRec takes any widths that are multiples of 4, also several shards of a table on one rank. In one
    EmbeddingCollection, though, all column-wise tables must have one width: its tables are cut at TorchRec's width
    only. There are never more column shards than ranks. grid_shard is offered to every bag table that sums where each column block can have a host of its own. Where
    both types are allowed, the one that adds nothing is left out: table_column_wise (column_wise costs the same and may
    be placed the same way), uncut column_wise (table_wise), uncut grid_shard (table_row_wise), and table_row_wise on
    one host (row_wise). On CPUs a type that would leave a rank without a row of the table is offered only where no other is allowed (`empty_cuts`).

    Raises:
        ConfigError: a type or kernel that the collection, the optimizer or the
            device does not have; a min_partition that does not divide the dim; bf16 on cuda; for "all", sequences'
            tables whose column shards would have several widths.
    """
    options = _options(request, column_widths)
    if column_widths == "all":
        _check_sequence_widths(request, options)
    groups = cut(_tables(request), options, request.group)
    device_bytes, host_bytes = shard_bytes(groups, request.group, request.sparse_optimizer)
    ms = shard_ms(groups, request.group, request.cluster, request.sharding.communication)
    ms["replica_sync"] = replica_sync_ms(groups, request, device_bytes, host_bytes)
    return OptionSet(
        table_names=tuple(request.tables),
        option_table=options.table,
        option_type=np.array(SHARDING_TYPES)[options.type_code],
        option_kernel=np.array(KERNELS)[options.kernel_code],
        option_cache_load_factor=options.cache_load_factor,
        group_option=groups.option,
        group_num_shards=groups.num_shards,
        group_num_rows=groups.num_rows,
        group_num_columns=groups.num_columns,
        group_ms=np.stack([ms[stage] for stage in STAGES], axis=1),
        group_device_bytes=np.stack([device_bytes[kind] for kind in BYTE_KINDS], axis=1),
        group_host_bytes=np.stack([host_bytes[kind] for kind in BYTE_KINDS], axis=1),
    )


def _tables(request: PlanRequest) -> Tables:
    specs, batch = request.tables.values(), request.local_batch_size
    pooled = [spec.collection == "bags" for spec in specs]
    ids = [sum(ids * batch for ids in spec.expected_ids_by_feature.values()) for spec in specs]
    bags = [sum(min(1.0, ids) * batch for ids in spec.expected_ids_by_feature.values()) for spec in specs]
    return Tables(
        num_rows=np.array([spec.num_embeddings for spec in specs]),
        num_columns=np.array([spec.embedding_dim for spec in specs]),
        element_bytes=np.array([ELEMENT_BYTES[spec.data_type] for spec in specs]),
        is_pooled=np.array(pooled),
        ids_per_rank=np.array(ids, dtype=float),
        outputs_per_rank=np.where(pooled, bags, ids),
    )


def _options(request: PlanRequest, column_widths: ColumnWidths) -> Options:
    """Tables that are alike share one list of choices."""
    choices: list[Choice] = []
    first_and_count: dict[tuple, tuple[int, int]] = {}
    of_table = np.empty((len(request.tables), 2), dtype=np.int64)
    for i, (name, spec) in enumerate(request.tables.items()):
        alike = (
            spec.collection,
            spec.embedding_dim,
            spec.pooling,
            spec.data_type,
            request.sharding.tables.get(name),
            empty_cuts(request, spec.num_embeddings),
        )
        if alike not in first_and_count:
            own = table_choices(name, request, column_widths)
            first_and_count[alike] = len(choices), len(own)
            choices += own
        of_table[i] = first_and_count[alike]
    first, count = of_table.T
    table = np.repeat(np.arange(len(count)), count)
    choice = np.arange(len(table)) - np.repeat(np.cumsum(count) - count - first, count)
    return Options(
        table=table,
        type_code=np.array([SHARDING_TYPES.index(c.sharding_type) for c in choices])[choice],
        kernel_code=np.array([KERNELS.index(c.kernel) for c in choices])[choice],
        cache_load_factor=np.array([c.cache_load_factor for c in choices])[choice],
        num_columns=np.array([c.num_columns for c in choices])[choice],
    )


def _check_sequence_widths(request: PlanRequest, options: Options) -> None:
    """TorchRec 1.8.0 gives an EmbeddingCollection one column width, its first table's, and FBGEMM refuses a mix."""
    of_sequence = np.array([spec.collection == "sequences" for spec in request.tables.values()])[options.table]
    cut_columns = np.flatnonzero(of_sequence & (options.type_code == SHARDING_TYPES.index("column_wise")))
    widths, first = np.unique(options.num_columns[cut_columns], return_index=True)
    if len(widths) > 1:
        names = [list(request.tables)[table] for table in options.table[cut_columns[first]]]
        raise ConfigError(
            "column_wise shards of the tables that sequences read must all have one width, but "
            + ", ".join(f"those of {name} have {width} columns" for name, width in zip(names, widths, strict=True))
            + "; give these tables one and the same min_partition in sharding.tables, or leave column_wise out of their "
            "types"
        )
