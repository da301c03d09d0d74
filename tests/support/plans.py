"""Plans made by hand: each table sharded as told, each rank's bytes counted from its shards."""

import math
from collections import Counter

from dlrm_scale.cluster import ClusterSpec, Figure
from dlrm_scale.config import RunConfig
from dlrm_scale.config_io import fingerprint
from dlrm_scale.sharding.plan import Plan, PlanRequest, RankLoad, Shard, TablePlan, TableSpec
from tests.support.configs import tiny_config

ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
BAG_WIDTH, SEQUENCE_WIDTH = 256, 32


def figure(value: float) -> Figure:
    return Figure(value=value, source="made up")


def cluster(device: str, num_ranks: int, ranks_per_host: int, hbm_gb: float = 141) -> ClusterSpec:
    of_cuda = {"hbm_gb": hbm_gb, "hbm_gb_per_s": 4800, "host_link_gb_per_s": 50} if device == "cuda" else {}
    common = {
        "host_memory_gb": 2000,
        "host_memory_gb_per_s": 50,
        "intra_host_gb_per_s": 400,
        "inter_host_gb_per_s": 50,
    }
    figures = {name: figure(value) for name, value in {**of_cuda, **common}.items()}
    return ClusterSpec(device=device, num_ranks=num_ranks, ranks_per_host=ranks_per_host, **figures)


def rows_cut(num_rows: int, ranks: list[int], column: int, num_columns: int) -> list[Shard]:
    block = math.ceil(num_rows / len(ranks))
    starts = [min(i * block, num_rows) for i in range(len(ranks) + 1)]
    return [
        Shard(rank=rank, row=starts[i], column=column, num_rows=starts[i + 1] - starts[i], num_columns=num_columns)
        for i, rank in enumerate(ranks)
    ]


def shards_of(kind: str, spec: TableSpec, on: ClusterSpec, first: int) -> list[Shard]:
    """Whole tables and blocks go to rank (or host) `first` and the next ones; columns are cut in two."""
    num_ranks, local = on.num_ranks, on.ranks_per_host
    rows, half = spec.num_embeddings, spec.embedding_dim // 2
    hosts = [list(range(h * local, (h + 1) * local)) for h in range(on.num_hosts)]
    host = hosts[first % len(hosts)]
    match kind:
        case "data_parallel":
            return []
        case "table_wise":
            return rows_cut(rows, [first % num_ranks], 0, spec.embedding_dim)
        case "column_wise":
            places = [first % num_ranks, (first + 1) % num_ranks]
        case "table_column_wise":
            places = [host[0], host[-1]]
        case "row_wise":
            return rows_cut(rows, list(range(num_ranks)), 0, spec.embedding_dim)
        case "table_row_wise":
            return rows_cut(rows, host, 0, spec.embedding_dim)
        case "grid_shard":
            other = hosts[(first + 1) % len(hosts)]
            return rows_cut(rows, host, 0, half) + rows_cut(rows, other, half, half)
    return [shard for i, rank in enumerate(places) for shard in rows_cut(rows, [rank], i * half, half)]


def hand_plan(request: PlanRequest, kinds: dict[str, str], kernel: str = "fused", load_factor: float = 0.25) -> Plan:
    """`kinds`: table to sharding type. Row-wise Adagrad's bytes."""
    on = request.cluster
    device = [Counter() for _ in range(on.num_ranks)]
    host = [Counter() for _ in range(on.num_ranks)]
    tables = {}
    for first, (name, kind) in enumerate(kinds.items()):
        spec = request.tables[name]
        shards = shards_of(kind, spec, on, first)
        replicated = kind == "data_parallel"
        tables[name] = TablePlan(
            sharding_type=kind,
            compute_kernel="dense" if replicated else kernel,
            cache_load_factor=load_factor if kernel == "fused_uvm_caching" and not replicated else None,
            ranks=tuple(s.rank for s in shards) or tuple(range(on.num_ranks)),
            shards=tuple(shards),
        )
        width = ELEMENT_BYTES[spec.data_type]
        for rank in range(on.num_ranks) if replicated else ():
            weights = spec.num_embeddings * spec.embedding_dim * width
            device[rank].update(weights=weights, optimizer=weights + 4 * spec.num_embeddings)
        for s in shards:
            weights = s.num_rows * s.num_columns * width
            device[s.rank].update(optimizer=4 * s.num_rows)
            if kernel == "fused":
                device[s.rank].update(weights=weights)
            else:
                host[s.rank].update(weights=weights)
            if kernel == "fused_uvm_caching":
                device[s.rank].update(weights=load_factor * weights, cache_state=s.num_rows * (4 + 16 * load_factor))
    loads = [RankLoad(device_bytes=dict(d), host_bytes=dict(h), step_ms={}) for d, h in zip(device, host, strict=True)]
    return Plan(
        fingerprint=fingerprint(request), request=request, tables=tables, ranks=tuple(loads), score_ms=1, bound_ms=1
    )


EVERY_KIND = {
    "whole": "table_wise",
    "columns": "column_wise",
    "rows": "row_wise",
    "short": "row_wise",
    "host_rows": "table_row_wise",
    "host_columns": "table_column_wise",
    "grid": "grid_shard",
    "copied": "data_parallel",
    "item": "table_wise",
    "shop": "column_wise",
    "brand": "column_wise",
    "place": "row_wise",
}


def every_kind_config() -> RunConfig:
    """A table for each sharding type of both collections; one has fewer rows than there are ranks, some have two features."""
    bags = {name: {"num_embeddings": 100 + 3 * i, "embedding_dim": BAG_WIDTH} for i, name in enumerate(EVERY_KIND)}
    events = ("item", "shop", "brand", "place")
    tables = {n: {**t, "embedding_dim": SEQUENCE_WIDTH} if n in events else t for n, t in bags.items()}
    tables["short"]["num_embeddings"] = 3
    once = [{"name": name, "table": name} for name in tables]
    again = [{"name": f"{n}_again", "table": n, "multi_hot": True} for n in ("columns", "rows", "grid", "host_rows")]
    fields = [{"name": f"past_{name}", "table": name} for name in events]
    return tiny_config(
        features={
            "tables": tables,
            "categorical": once + again,
            "sequences": [{"name": "history", "max_length": 6, "fields": fields}],
        }
    )
