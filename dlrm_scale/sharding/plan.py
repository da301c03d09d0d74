"""PlanRequest and Plan: what a sharding plan is asked for, and what it says, as plan.json.

The file is the only meeting point of the planner and the trainer. It carries its request, so that a plan made
for other tables or other ranks is refused with the difference.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from dlrm_scale.cluster import ClusterSpec
from dlrm_scale.config import (
    PLAIN_SPARSE_OPTIMIZERS,
    SEQUENCE_SHARDING_TYPES,
    BagShardingType,
    DenseOptimizerName,
    RunConfig,
    ShardingConfig,
    SparseOptimizerName,
    TableSharding,
    check_num_ranks,
)
from dlrm_scale.config_io import fingerprint
from dlrm_scale.errors import PlanError, first_lines
from dlrm_scale.strict import Strict
from dlrm_scale.whole_files import write_whole

DIGEST = "digest"
BY_ROW = ("row_wise", "table_row_wise", "grid_shard")
Collection = Literal["bags", "sequences"]


class TableSpec(Strict):
    """What a plan has to know of one table."""

    collection: Collection = Field(description="bags: EmbeddingBagCollection; sequences: EmbeddingCollection")
    num_embeddings: int = Field(gt=0)
    embedding_dim: int = Field(gt=0, multiple_of=4)
    data_type: Literal["fp32", "fp16", "bf16"]
    pooling: Literal["sum", "mean"]
    expected_ids_by_feature: dict[str, Annotated[float, Field(ge=0)]] = Field(
        min_length=1, description="expected ids a sample, by feature in key order"
    )


class PlanRequest(Strict):
    tables: dict[str, TableSpec] = Field(min_length=1)
    cluster: ClusterSpec
    local_batch_size: int = Field(gt=0, description="samples a rank looks up at once: of one micro-batch")
    sparse_optimizer: SparseOptimizerName
    num_dense_parameters: int = Field(ge=0, description="of the replicated dense arch")
    dense_optimizer: DenseOptimizerName
    dense_activation_bytes: int = Field(ge=0, description="of one rank's local batch; 0 where it was not traced")
    sharding: ShardingConfig = Field(description="objective and constraints")

    @property
    def group(self) -> ClusterSpec:
        """The ranks that a plan is for: all, or with `sharding.replica_groups` those of one group, numbered from 0."""
        return self.cluster.group(self.sharding.replica_groups)


class Shard(Strict):
    """A rectangle of a table, and the rank that holds it."""

    rank: int = Field(ge=0)
    row: int = Field(ge=0)
    column: int = Field(ge=0)
    num_rows: int = Field(ge=0, description="0 on ranks that row-wise shards of a short table do not reach")
    num_columns: int = Field(gt=0)


class TablePlan(Strict):
    sharding_type: BagShardingType
    compute_kernel: Literal["fused", "fused_uvm_caching", "fused_uvm", "dense"]
    cache_load_factor: float | None = Field(
        None, gt=0, le=1, description="of fused_uvm_caching: the part of its rows held in HBM"
    )
    ranks: tuple[int, ...] = Field(min_length=1)
    shards: tuple[Shard, ...] = Field(description="empty for data_parallel: every rank holds the table")


class RankLoad(Strict):
    """What the plan gives one rank (with replica groups: and its copies): time by TorchRec's cost model (bandwidths as in the request's cluster), bytes by ours."""

    device_bytes: dict[str, float] = Field(description="by kind, in the memory of the rank's device (CPU: the host's)")
    host_bytes: dict[str, float] = Field(description="by kind, in host memory beside a CUDA device; empty on CPU")
    step_ms: dict[str, float] = Field(description="by stage: forward and backward, compute and communication")

    @property
    def total_device_bytes(self) -> float:
        return sum(self.device_bytes.values())


class Plan(Strict):
    fingerprint: str = Field(description="of the request")
    request: PlanRequest
    tables: dict[str, TablePlan]
    ranks: tuple[RankLoad, ...]
    score_ms: float = Field(description="by the request's objective; lower is better")
    bound_ms: float = Field(description="no plan of this request scores less")

    @property
    def gap(self) -> float:
        """How much above the bound the score is, as a part of the bound."""
        return self.score_ms / self.bound_ms - 1 if self.bound_ms > 0 else 0.0

    def summary_rows(self) -> list[tuple[str, str, str, str]]:
        """(table, shape, sharding type, ranks) for people."""
        rows = []
        for name, plan in self.tables.items():
            spec = self.request.tables[name]
            where = "all" if plan.sharding_type == "data_parallel" else ", ".join(str(r) for r in plan.ranks)
            rows.append((name, f"{spec.num_embeddings} x {spec.embedding_dim}", plan.sharding_type, where))
        return rows

    def as_recorded(self) -> dict[str, Any]:
        """The part `plan` of a record."""
        return {
            "fingerprint": self.fingerprint,
            "sharding_types": {name: table.sharding_type for name, table in self.tables.items()},
            "ranks": [load.model_dump(mode="json") for load in self.ranks],
        }


def plan_request(
    config: RunConfig, cluster: ClusterSpec, num_dense_parameters: int, dense_activation_bytes: int = 0
) -> PlanRequest:
    """What `config` asks of a plan on `cluster`. Raises ConfigError: its ranks cannot share the data's lanes evenly."""
    check_num_ranks(config, cluster.num_ranks)
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
        num_dense_parameters=num_dense_parameters,
        dense_optimizer=config.train.dense.name,
        dense_activation_bytes=dense_activation_bytes,
        sharding=config.sharding.model_copy(update={"plan": None, "cluster": None}),
    )


def save_plan(plan: Plan, path: str | Path) -> None:
    """As JSON, with the digest of all the rest as its last key."""
    path, tree = Path(path), plan.model_dump(mode="json")
    write_whole(path, json.dumps(tree | {DIGEST: _digest(tree)}, indent=1) + "\n")


def _digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def load_plan(path: str | Path, request: PlanRequest) -> Plan:
    """Reads a plan and checks that it is one for `request`'s tables and ranks (its batch and constraints may differ).

    Raises:
        PlanError: unreadable, not a plan, altered by hand, or made for other tables or ranks, with the difference.
    """
    try:
        tree = json.loads(Path(path).read_bytes())
        digest = tree.pop(DIGEST, None) if isinstance(tree, dict) else None
        plan = Plan.model_validate_json(json.dumps(tree))
    except OSError as e:
        raise PlanError(
            f"cannot read the plan {path}: {e.strerror}; name a plan.json that the planner or an earlier run wrote"
        ) from None
    except ValueError as e:
        if not isinstance(e, ValidationError):
            raise PlanError(f"{path} is not a plan: it is no JSON ({e}); plan again") from None
        first = e.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PlanError(
            f"{path} is not a plan of this version: {where + ': ' if where else ''}{first['msg']}; plan again"
        ) from None
    if fingerprint(plan.request) != plan.fingerprint:
        raise PlanError(
            f"{path}: its request does not have its fingerprint {plan.fingerprint}; it was altered: plan again"
        )
    differences = _differences(plan.request, request)
    if differences:
        raise PlanError(
            f"{path} was made for another model or cluster:{first_lines(differences, 12)}"
            "\nplan again (leave sharding.plan out)"
        )
    _check_tables(plan, path)
    replicas = [n for n, t in plan.tables.items() if t.sharding_type == "data_parallel"]
    if replicas and request.sparse_optimizer not in PLAIN_SPARSE_OPTIMIZERS:
        raise PlanError(
            f"{path}: table {', '.join(replicas)} is data_parallel, which can train by {', '.join(PLAIN_SPARSE_OPTIMIZERS)}, but "
            f"train.sparse.name is {request.sparse_optimizer}; plan again"
        )
    mean_grids = [
        n for n, t in plan.tables.items() if t.sharding_type == "grid_shard" and request.tables[n].pooling == "mean"
    ]
    if mean_grids:
        raise PlanError(
            f"{path}: grid_shard of table {', '.join(mean_grids)}, which pools by mean, gives wrong sums in TorchRec 1.8.0; plan again"
        )
    if digest != _digest(tree):
        raise PlanError(
            f"{path} was altered, so that its figures need not be those of its tables; plan again, with rules in "
            "sharding.tables (types, ranks, pin, ...) for what is to be another way"
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
    had, has = planned.sharding.replica_groups, asked.sharding.replica_groups
    if had != has:
        lines.append(f"sharding.replica_groups is {had} in the plan, {has} here")
    return lines


def rule_differences(made_for: PlanRequest, asked: PlanRequest) -> list[str]:
    """How the rules that a plan was made under differ from those that are asked for now."""
    then, now = made_for.sharding, asked.sharding
    pairs = [
        (f"sharding.{name}", getattr(then, name), getattr(now, name))
        for name in ("objective", "communication", "storage_reserve", "replica_sync_steps", "together", "apart")
    ]
    for table in sorted(set(then.tables) | set(now.tables)):
        had, has = (sharding.tables.get(table, TableSharding()) for sharding in (then, now))
        pairs += [
            (f"sharding.tables.{table}.{n}", getattr(had, n), getattr(has, n)) for n in TableSharding.model_fields
        ]
    return [f"{name} is {had} there, {has} here" for name, had, has in pairs if had != has]


def _check_tables(plan: Plan, path: str | Path) -> None:
    """Each table has an entry that TorchRec can follow, whose shards cover it once, on ranks that exist."""
    if set(plan.tables) != set(plan.request.tables):
        wrong = sorted(set(plan.tables) ^ set(plan.request.tables))
        raise PlanError(f"{path}: has no entry for, or one too many for, table {', '.join(wrong)}; plan again")
    for name, spec in plan.request.tables.items():
        fault = _fault(plan.tables[name], spec, plan.request.group)
        if fault:
            raise PlanError(f"{path}: table {name}: {fault}; plan again")
    widths = {
        name: {shard.num_columns for shard in table.shards}
        for name, table in plan.tables.items()
        if plan.request.tables[name].collection == "sequences" and table.sharding_type == "column_wise"
    }
    if len(set().union(*widths.values())) > 1:
        raise PlanError(
            f"{path}: column-wise tables of sequences must all be cut to one width (TorchRec takes the first one's for all), but are "
            f"{', '.join(f'{name}: {sorted(w)}' for name, w in widths.items())}; plan again"
        )


def _fault(table: TablePlan, spec: TableSpec, cluster: ClusterSpec) -> str | None:
    """What is wrong with a table's entry."""
    replicated = table.sharding_type == "data_parallel"
    num_ranks = cluster.num_ranks
    strange = sorted({rank for rank in (*table.ranks, *(s.rank for s in table.shards)) if not 0 <= rank < num_ranks})
    if strange:
        return f"names ranks {strange} of {num_ranks}"
    if spec.collection == "sequences" and table.sharding_type not in SEQUENCE_SHARDING_TYPES:
        return f"a sequence's table cannot be sharded as {table.sharding_type}"
    if (table.compute_kernel == "dense") != replicated:
        return f"the kernel of {table.sharding_type} is not {table.compute_kernel}"
    if (table.cache_load_factor is None) != (table.compute_kernel != "fused_uvm_caching"):
        return f"cache_load_factor {table.cache_load_factor} does not go with kernel {table.compute_kernel}"
    if replicated:
        if table.shards:
            return "data_parallel has no shards, but some are given"
        everywhere = table.ranks == tuple(range(num_ranks))
        return (
            None
            if everywhere
            else f"data_parallel lies on all {num_ranks} ranks, but these are {list(table.ranks)[:8]}"
        )
    if tuple(s.rank for s in table.shards) != table.ranks:
        return f"its ranks {list(table.ranks)} are not those of its shards"
    area = sum(s.num_rows * s.num_columns for s in table.shards)
    inside = all(
        s.row + s.num_rows <= spec.num_embeddings and s.column + s.num_columns <= spec.embedding_dim
        for s in table.shards
    )
    if area != spec.num_embeddings * spec.embedding_dim or not inside or _overlap(table.shards):
        return f"its shards do not cover its {spec.num_embeddings} x {spec.embedding_dim} once"
    return _misplaced(table, spec, cluster) or (_uneven_rows(table, spec) if table.sharding_type in BY_ROW else None)


def _misplaced(table: TablePlan, spec: TableSpec, cluster: ClusterSpec) -> str | None:
    """TorchRec puts the row shards of a type on fixed ranks, whatever the plan says, and takes whole columns elsewhere."""
    ranks, local = table.ranks, cluster.ranks_per_host
    if table.compute_kernel in ("fused_uvm", "fused_uvm_caching") and cluster.device == "cpu":
        return f"kernel {table.compute_kernel} is for CUDA, but its cluster is cpu"
    if table.sharding_type == "row_wise":
        return (
            None
            if ranks == tuple(range(cluster.num_ranks))
            else f"row_wise lies on ranks 0 to {cluster.num_ranks - 1} in order, but these are {list(ranks)[:8]}"
        )
    if table.sharding_type in ("table_row_wise", "grid_shard"):
        hosts = [rank // local for rank in ranks[::local]]
        expected = tuple(host * local + i for host in hosts for i in range(local))
        one_host = table.sharding_type == "grid_shard" or len(hosts) == 1
        return (
            None
            if ranks == expected and one_host
            else f"{table.sharding_type} lies on whole hosts of {local} ranks in order, but these are {list(ranks)[:8]}"
        )
    if any(shard.num_rows != spec.num_embeddings for shard in table.shards):
        return f"{table.sharding_type} has shards of all rows"
    if table.sharding_type == "table_wise" and len(table.shards) != 1:
        return f"table_wise has one shard, but {len(table.shards)} are given"
    if table.sharding_type == "table_column_wise" and len({rank // local for rank in ranks}) > 1:
        return f"table_column_wise lies on one host, but its ranks are {list(ranks)[:8]}"
    widths = {shard.num_columns for shard in table.shards}
    if any(width % 4 for width in widths):
        return f"column shards are multiples of 4 columns wide, but are {sorted(widths)}"
    return None


def _uneven_rows(table: TablePlan, spec: TableSpec) -> str | None:
    """TorchRec sends id i to row shard i // ceil(rows / n), whatever the shards in the plan say."""
    columns = {s.column for s in table.shards}
    num_row_shards = len(table.shards) // len(columns)
    block = -(-spec.num_embeddings // num_row_shards)
    for i, shard in enumerate(table.shards):
        start = min((i % num_row_shards) * block, spec.num_embeddings)
        if (shard.row, shard.num_rows) != (start, min(block, spec.num_embeddings - start)):
            return f"row shard {i} has rows {shard.row} to {shard.row + shard.num_rows - 1}, but TorchRec sends it ids in blocks of {block}"
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
