"""Tables cut into shards, as arrays: one entry a group of equal shards."""

from dataclasses import dataclass
from typing import get_args

import numpy as np

from dlrm_scale.cluster import ClusterSpec
from dlrm_scale.config import BagShardingType, FusedKernel

SHARDING_TYPES = get_args(BagShardingType)
KERNELS = ("dense", *get_args(FusedKernel))
ID_BYTES = 8  # FBGEMM looks up int64


@dataclass(frozen=True)
class Tables:
    """What costs and bytes depend on, by table; all arrays are (T,)."""

    num_rows: np.ndarray
    num_columns: np.ndarray
    element_bytes: np.ndarray
    is_pooled: np.ndarray  # False for tables of an EmbeddingCollection
    ids_per_rank: np.ndarray  # expected ids that one rank's samples have in the table's features
    outputs_per_rank: (
        np.ndarray
    )  # expected vectors they get back: one an id, or pooled, at most one a sample and feature


@dataclass(frozen=True)
class Options:
    """Ways to shard tables; all arrays are (O,)."""

    table: np.ndarray  # index into Tables, ascending
    type_code: np.ndarray  # index into SHARDING_TYPES
    kernel_code: np.ndarray  # index into KERNELS
    cache_load_factor: np.ndarray  # NaN unless fused_uvm_caching
    num_columns: np.ndarray  # of one shard


@dataclass(frozen=True)
class Groups:
    """Groups of equal shards, and the size of what passes through one of them; all arrays are (G,)."""

    option: np.ndarray  # index of its option, ascending
    num_shards: np.ndarray
    num_rows: np.ndarray
    num_columns: np.ndarray
    type_code: np.ndarray
    kernel_code: np.ndarray
    cache_load_factor: np.ndarray
    table_num_rows: np.ndarray
    table_num_columns: np.ndarray
    element_bytes: np.ndarray
    is_pooled: np.ndarray
    outputs_per_rank: np.ndarray
    lookups: np.ndarray  # expected ids a step
    outputs: np.ndarray  # expected vectors written a step
    all_lookups: np.ndarray  # expected ids a step in the whole table, over all ranks

    def is_type(self, *names: str) -> np.ndarray:
        """(G,) bool."""
        return _is(self.type_code, *names)

    def is_kernel(self, *names: str) -> np.ndarray:
        """(G,) bool."""
        return np.array([name in names for name in KERNELS])[self.kernel_code]

    @property
    def input_bytes(self) -> np.ndarray:
        return np.ceil(self.lookups * ID_BYTES)

    @property
    def output_bytes(self) -> np.ndarray:
        return self.outputs * self.num_columns * self.element_bytes


def cut(tables: Tables, options: Options, cluster: ClusterSpec) -> Groups:
    """Cuts as TorchRec's `calculate_shard_sizes_and_offsets`; counts ids as its estimators do.

    Rows are cut into blocks of ceil(rows / parts), so that the last block may be smaller and the parts after it empty.
    A shard of rows gets its even part of the ids; one of columns gets all of them; a replica those of its rank.
    """
    parts = _row_parts(options, cluster)
    option, num_shards, num_rows = _cut_rows(tables, options, parts, cluster.num_ranks)
    type_code, table, parts = options.type_code[option], options.table[option], parts[option]
    ranks = np.where(_is(type_code, "data_parallel"), 1, cluster.num_ranks)
    ids, vectors = tables.ids_per_rank[table], tables.outputs_per_rank[table]
    return Groups(
        option=option,
        num_shards=num_shards,
        num_rows=num_rows,
        num_columns=options.num_columns[option],
        type_code=type_code,
        kernel_code=options.kernel_code[option],
        cache_load_factor=options.cache_load_factor[option],
        table_num_rows=tables.num_rows[table],
        table_num_columns=tables.num_columns[table],
        element_bytes=tables.element_bytes[table],
        is_pooled=tables.is_pooled[table],
        outputs_per_rank=vectors,
        lookups=ids / parts * ranks,
        outputs=vectors / np.where(tables.is_pooled[table], 1, parts) * ranks,  # a part of a sum is a whole vector
        all_lookups=ids * cluster.num_ranks,
    )


def _is(type_code: np.ndarray, *names: str) -> np.ndarray:
    return np.array([name in names for name in SHARDING_TYPES])[type_code]


def _row_parts(options: Options, cluster: ClusterSpec) -> np.ndarray:
    """(O,) into how many parts rows are cut."""
    by_host = _is(options.type_code, "table_row_wise", "grid_shard")
    return np.where(_is(options.type_code, "row_wise"), cluster.num_ranks, np.where(by_host, cluster.ranks_per_host, 1))


def _cut_rows(
    tables: Tables, options: Options, parts: np.ndarray, num_ranks: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(G,) option, shards, and rows of a shard: whole blocks, then the smaller last one, then empty ones."""
    rows = tables.num_rows[options.table]
    block = -(-rows // parts)
    num_full = rows // block
    rest = rows - block * num_full
    num_empty = parts - num_full - (rest > 0)

    num_cuts = tables.num_columns[options.table] // options.num_columns
    grid = _is(options.type_code, "grid_shard")
    # In a grid, the row blocks of one column block come before those of the next; elsewhere equal shards adjoin.
    option = np.repeat(np.arange(len(parts)), np.where(grid, num_cuts, 1))
    copies = np.where(_is(options.type_code, "data_parallel"), num_ranks, np.where(grid, 1, num_cuts))

    num_shards = np.stack([num_full * copies, rest > 0, num_empty], axis=1)[option]
    num_rows = np.stack([block, rest, np.zeros_like(rest)], axis=1)[option]
    there = num_shards > 0
    return np.broadcast_to(option[:, None], there.shape)[there], num_shards[there], num_rows[there]
