"""PlanRequest and Plan: what a sharding plan is asked for, and what it says, as plan.json.

The file is the only meeting point of the planner and the trainer. It carries its request, so that a plan made
for other tables or other ranks is refused with the difference.
"""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from dlrm_scale.cluster import ClusterSpec
from dlrm_scale.config import SEQUENCE_SHARDING_TYPES, BagShardingType, RunConfig, TableSharding
from dlrm_scale.config_io import fingerprint
from dlrm_scale.errors import PlanError
from dlrm_scale.strict import Strict

Collection = Literal["bags", "sequences"]


class TableSpec(Strict):
    """What a plan has to know of one table."""

    collection: Collection = Field(description="bags: EmbeddingBagCollection; sequences: EmbeddingCollection")
    num_embeddings: int
    embedding_dim: int
    data_type: str
    pooling: str
    expected_ids_by_feature: dict[str, float] = Field(description="expected ids a sample, by feature in key order")


class PlanRequest(Strict):
    tables: dict[str, TableSpec]
    cluster: ClusterSpec
    local_batch_size: int
    sparse_optimizer: str
    constraints: dict[str, TableSharding]
    storage_reserve: float


class Shard(Strict):
    """A rectangle of a table, and the rank that holds it."""

    rank: int = Field(ge=0)
    row: int = Field(ge=0)
    column: int = Field(ge=0)
    num_rows: int = Field(gt=0)
    num_columns: int = Field(gt=0)


class TablePlan(Strict):
    sharding_type: BagShardingType
    compute_kernel: Literal["fused", "dense"]
    ranks: tuple[int, ...] = Field(min_length=1)
    shards: tuple[Shard, ...] = Field(description="empty for data_parallel: every rank holds the table")


class RankLoad(Strict):
    """What the plan gives one rank, by TorchRec's cost model (bandwidths as in the request's cluster)."""

    table_bytes: int = Field(description="weights, optimizer state and input/output buffers of its shards")
    step_ms: dict[str, float] = Field(description="forward and backward, compute and communication")


class Plan(Strict):
    fingerprint: str = Field(description="of the request")
    request: PlanRequest
    tables: dict[str, TablePlan]
    ranks: tuple[RankLoad, ...]

    def summary_rows(self) -> list[tuple[str, str, str, str]]:
        """(table, shape, sharding type, ranks) for people."""
        rows = []
        for name, plan in self.tables.items():
            spec = self.request.tables[name]
            where = "all" if plan.sharding_type == "data_parallel" else ", ".join(str(r) for r in plan.ranks)
            rows.append((name, f"{spec.num_embeddings} x {spec.embedding_dim}", plan.sharding_type, where))
        return rows


def plan_request(config: RunConfig, cluster: ClusterSpec) -> PlanRequest:
    schema = config.features
    return PlanRequest(
        tables={
            name: TableSpec(
                collection="sequences" if name in schema.sequence_tables else "bags",
                num_embeddings=table.num_embeddings,
                embedding_dim=table.embedding_dim,
                data_type=table.data_type,
                pooling=table.pooling,
                expected_ids_by_feature={f: schema.expected_ids[f] for f in schema.features_of(name)},
            )
            for name, table in schema.tables.items()
        },
        cluster=cluster,
        local_batch_size=config.train.global_batch_size // config.train.accumulate_steps // cluster.num_ranks,
        sparse_optimizer=config.train.sparse.name,
        constraints=config.sharding.tables,
        storage_reserve=config.sharding.storage_reserve,
    )


def save_plan(plan: Plan, path: str | Path) -> None:
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(plan.model_dump_json(indent=1) + "\n")
    temporary.replace(path)


def load_plan(path: str | Path, request: PlanRequest) -> Plan:
    """Reads a plan and checks that it is one for `request`'s tables and ranks (its batch and constraints may differ).

    Raises:
        PlanError: unreadable, not a plan, altered by hand, or made for other tables or ranks, with the difference.
    """
    try:
        plan = Plan.model_validate_json(Path(path).read_bytes())
    except OSError as e:
        raise PlanError(
            f"cannot read the plan {path}: {e.strerror}; sharding.plan names a plan.json of an earlier run"
        ) from None
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PlanError(f"{path} is not a plan of this version: {where}: {first['msg']}; plan again") from None
    if fingerprint(plan.request) != plan.fingerprint:
        raise PlanError(
            f"{path}: its request does not have its fingerprint {plan.fingerprint}; it was altered: plan again"
        )
    differences = _differences(plan.request, request)
    if differences:
        shown = differences[:12] + ([f"... and {len(differences) - 12} more"] if len(differences) > 12 else [])
        raise PlanError(
            f"{path} was made for another model or cluster:\n  "
            + "\n  ".join(shown)
            + "\nplan again (leave sharding.plan out)"
        )
    _check_tables(plan, path)
    mean_grids = [
        n for n, t in plan.tables.items() if t.sharding_type == "grid_shard" and request.tables[n].pooling == "mean"
    ]
    if mean_grids:
        raise PlanError(
            f"{path}: grid_shard of table {', '.join(mean_grids)}, which pools by mean, gives wrong sums in TorchRec 1.8.0; plan again"
        )
    return plan


def _differences(planned: PlanRequest, asked: PlanRequest) -> list[str]:
    lines = []
    for name in sorted(set(planned.tables) | set(asked.tables)):
        if name not in asked.tables:
            lines.append(f"table {name}: in the plan, not in this model")
        elif name not in planned.tables:
            lines.append(f"table {name}: in this model, not in the plan")
        else:
            for field in ("collection", "num_embeddings", "embedding_dim", "data_type"):
                had, has = getattr(planned.tables[name], field), getattr(asked.tables[name], field)
                if had != has:
                    lines.append(f"table {name}: {field} is {had} in the plan, {has} in this model")
    for field in ("device", "num_ranks", "ranks_per_host"):
        had, has = getattr(planned.cluster, field), getattr(asked.cluster, field)
        if had != has:
            lines.append(f"cluster: {field} is {had} in the plan, {has} here")
    return lines


def _check_tables(plan: Plan, path: str | Path) -> None:
    """Each table has an entry that TorchRec can follow, whose shards cover it once, on ranks that exist."""
    if set(plan.tables) != set(plan.request.tables):
        wrong = sorted(set(plan.tables) ^ set(plan.request.tables))
        raise PlanError(f"{path}: has no entry for, or one too many for, table {', '.join(wrong)}; plan again")
    for name, spec in plan.request.tables.items():
        fault = _fault(plan.tables[name], spec, plan.request.cluster.num_ranks)
        if fault:
            raise PlanError(f"{path}: table {name}: {fault}; plan again")


def _fault(table: TablePlan, spec: TableSpec, num_ranks: int) -> str | None:
    """What is wrong with a table's entry."""
    replicated = table.sharding_type == "data_parallel"
    strange = sorted({rank for rank in (*table.ranks, *(s.rank for s in table.shards)) if not 0 <= rank < num_ranks})
    if strange:
        return f"names ranks {strange} of {num_ranks}"
    if spec.collection == "sequences" and table.sharding_type not in SEQUENCE_SHARDING_TYPES:
        return f"a sequence's table cannot be sharded as {table.sharding_type}"
    if table.compute_kernel != ("dense" if replicated else "fused"):
        return f"the kernel of {table.sharding_type} is not {table.compute_kernel}"
    if replicated:
        return "data_parallel has no shards, but some are given" if table.shards else None
    if tuple(s.rank for s in table.shards) != table.ranks:
        return f"its ranks {list(table.ranks)} are not those of its shards"
    area = sum(s.num_rows * s.num_columns for s in table.shards)
    inside = all(
        s.row + s.num_rows <= spec.num_embeddings and s.column + s.num_columns <= spec.embedding_dim
        for s in table.shards
    )
    if area != spec.num_embeddings * spec.embedding_dim or not inside or _overlap(table.shards):
        return f"its shards do not cover its {spec.num_embeddings} x {spec.embedding_dim} once"
    return None


def _overlap(shards: tuple[Shard, ...]) -> bool:
    ordered = sorted(shards, key=lambda s: (s.column, s.row))
    return any(
        a.column < b.column + b.num_columns
        and b.column < a.column + a.num_columns
        and a.row < b.row + b.num_rows
        and b.row < a.row + a.num_rows
        for i, a in enumerate(ordered)
        for b in ordered[i + 1 :]
    )
