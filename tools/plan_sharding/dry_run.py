"""Builds the real modules of one rank of a plan, without its memory, its GPUs or its other ranks, and checks the plan against them."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torchrec.distributed.planner.planners import (
    validate_modules_inclusion_in_sharding_plan,
    validate_rank_assignment,
)
from torchrec.distributed.planner.types import PlannerError, Topology
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan

from dlrm_scale.config import RunConfig, SparseOptimizer
from dlrm_scale.errors import PlanError, UserError
from dlrm_scale.meta import META
from dlrm_scale.models.dense_trace import trace_dense
from dlrm_scale.models.embeddings import Embeddings
from dlrm_scale.sharding.apply import ShardedModel, shard_on_meta, to_torchrec
from dlrm_scale.sharding.meta_world import bare_collections, meta_world
from dlrm_scale.sharding.plan import Plan, PlanRequest, TablePlan
from dlrm_scale.sharding.problem import SCOPES
from dlrm_scale.sharding.sharders import make_sharders
from dlrm_scale.training.optimizers import ReplicatedTableOptimizer

BYTES_TOLERANCE = 0.05  # of what is built
TABLE_BYTES = ("weights", "optimizer", "cache_state")
NAMES_SHOWN = 4
Value = TypeVar("Value")


@dataclass(frozen=True)
class Check:
    """What the plan says and what the modules are, in words; `ok` is decided on the values behind them."""

    what: str
    predicted: str
    built: str
    ok: bool


@dataclass(frozen=True)
class DryRun:
    rank: int
    group: int | None  # of replica groups, the one that it is a rank of; all are built alike
    rows: tuple[Check, ...]

    @property
    def subject(self) -> str:
        return f"rank {self.rank}" + ("" if self.group is None else f" of replica group {self.group}")

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)


def dry_run(config: RunConfig | None, plan: Plan, rank: int) -> DryRun:
    """Checks `plan` against what TorchRec and FBGEMM build for `rank`; what does not agree is a row that is not ok.

    Args:
        config: the run that the plan is for; None: the tables of the plan's request alone, without a dense arch.

    Raises:
        PlanError: no such rank. ConfigError: the device has no such optimizer.
        RuntimeError: this process is a rank of a real group.
    """
    num_ranks = plan.request.group.num_ranks
    if not 0 <= rank < num_ranks:
        raise PlanError(f"the plan has ranks 0 to {num_ranks - 1}, but the dry run is asked for rank {rank}")
    optimizer = SparseOptimizer(name=plan.request.sparse_optimizer) if config is None else config.train.sparse
    rows: list[Check] = []
    with meta_world(plan, rank):
        try:
            model = nn.Module()
            model.embeddings = bare_collections(plan.request) if config is None else Embeddings(config.features)
            rows += _validator_rows(model, plan, optimizer)
            if all(row.ok for row in rows):
                rows += _built_rows(shard_on_meta(model, plan, optimizer), plan, rank, optimizer)
        except UserError:
            raise
        except (AssertionError, KeyError, RuntimeError, ValueError) as e:
            said = f"{type(e).__name__}: {e}".strip()
            rows.append(Check(f"TorchRec builds the modules of rank {rank}", "builds", said, False))
    if config is not None:
        rows += _dense_rows(plan.request, config)
    return DryRun(rank, 0 if plan.request.sharding.replica_groups > 1 else None, tuple(rows))


def _built_rows(model: ShardedModel, plan: Plan, rank: int, optimizer: SparseOptimizer) -> list[Check]:
    built = list(built_shardings(model.module.embeddings))
    rows = [*_shard_rows(plan, rank, built), *_bytes_rows(plan, rank, built, optimizer)]
    if plan.request.cluster.device == "cpu":
        rows += _kernel_rows(built)
    for sharding in built:
        rows += _collective_rows(plan, rank, sharding)
    return rows


# ---------------------------------------------------------------- what was built
@dataclass(frozen=True)
class BuiltShard:
    table: str
    row: int
    column: int
    num_rows: int
    num_columns: int
    data_type: str
    compute_kernel: str

    def __str__(self) -> str:
        return f"{self.num_rows} x {self.num_columns} {self.data_type} {self.compute_kernel}"


@dataclass(frozen=True)
class BuiltSharding:
    """All tables of a collection that are sharded in one way: one exchange of ids, one of vectors."""

    collection: str
    sharding_type: str
    sharding: Any
    kernels: tuple[nn.Module, ...]  # TorchRec's, each with one FBGEMM module of this rank
    output_dist: nn.Module
    column_wise_width: int | None  # of each shard, of an EmbeddingCollection


def built_shardings(embeddings: nn.Module) -> Iterator[BuiltSharding]:
    ebc, ec = embeddings.ebc, embeddings.ec
    if ebc is not None:
        for kind, sharding, lookup, output_dist in zip(
            ebc._sharding_types, ebc._embedding_shardings, ebc._lookups, ebc._output_dists, strict=True
        ):
            kernels = getattr(lookup, "module", lookup)._emb_modules
            yield BuiltSharding("bags", kind, sharding, tuple(kernels), output_dist, None)
    if ec is not None:
        for (kind, sharding), lookup, output_dist in zip(
            ec._sharding_type_to_sharding.items(), ec._lookups, ec._output_dists, strict=True
        ):
            kernels = tuple(lookup._emb_modules)
            yield BuiltSharding("sequences", kind, sharding, kernels, output_dist, ec._local_embedding_dim)


def built_shards(built: list[BuiltSharding]) -> Iterator[BuiltShard]:
    for sharding in built:
        for kernel in sharding.kernels:
            tbe = kernel.emb_module
            for table, spec in zip(kernel.config.embedding_tables, tbe.embedding_specs, strict=True):
                row, column = (0, 0) if table.local_metadata is None else table.local_metadata.shard_offsets
                data_type = tbe.weights_precision.name.lower()
                yield BuiltShard(table.name, row, column, spec[0], spec[1], data_type, table.compute_kernel.value)


def built_bytes(built: list[BuiltSharding], optimizer: SparseOptimizer) -> Counter[tuple[str, str]]:
    """Bytes by (tier, kind): the tiers of `RankLoad`, device and host."""
    total: Counter[tuple[str, str]] = Counter()
    for sharding in built:
        for kernel in sharding.kernels:
            replicated = sharding.sharding_type == "data_parallel"
            total += _replicated_bytes(kernel.emb_module, optimizer) if replicated else _fused_bytes(kernel.emb_module)
    return total


def _fused_bytes(tbe: nn.Module) -> Counter[tuple[str, str]]:
    total: Counter[tuple[str, str]] = Counter()
    for state, kind in (("weights", "weights"), ("momentum1", "optimizer"), ("momentum2", "optimizer")):
        if hasattr(tbe, f"{state}_physical_offsets"):  # else the optimizer has no such state, but a dummy of one number
            total["device", kind] += getattr(tbe, f"{state}_dev").nbytes
            total["device", kind] += getattr(tbe, f"{state}_host").nbytes  # of CPU kernels: the host is their device
            total["host", kind] += getattr(tbe, f"{state}_uvm").nbytes
    if tbe.lxu_cache_weights.numel():
        total["device", "weights"] += tbe.lxu_cache_weights.nbytes
        aside = (tbe.lxu_cache_state, tbe.lxu_state, tbe.cache_index_table_map)
        total["device", "cache_state"] += sum(tensor.nbytes for tensor in aside)
    return total


def _replicated_bytes(tbe: nn.Module, optimizer: SparseOptimizer) -> Counter[tuple[str, str]]:
    """The gradient counts under optimizer: both are there for the step alone."""
    tables = [
        nn.Parameter(torch.empty(num_rows, num_columns, dtype=tbe.weights.dtype, device=META))
        for num_rows, num_columns in tbe.embedding_specs
    ]
    for table in tables:
        table.grad = torch.empty_like(table)
    steps = ReplicatedTableOptimizer(tables, optimizer)
    steps.step()
    state = sum(tensor.nbytes for table in tables for tensor in steps.state[table].values())
    gradients = sum(table.grad.nbytes for table in tables)
    return Counter({("device", "weights"): tbe.weights.nbytes, ("device", "optimizer"): gradients + state})


# ---------------------------------------------------------------- checks
def _validator_rows(model: nn.Module, plan: Plan, optimizer: SparseOptimizer) -> Iterator[Check]:
    cluster, given = plan.request.group, to_torchrec(plan)
    topology = Topology(
        world_size=cluster.num_ranks, compute_device=cluster.device, local_world_size=cluster.ranks_per_host
    )
    placed = {
        path: EmbeddingModuleShardingPlan({name: p for name, p in module.items() if p.sharding_spec is not None})
        for path, module in given.plan.items()
    }
    validators = {
        "TorchRec's validator of modules": lambda: validate_modules_inclusion_in_sharding_plan(
            given, model, make_sharders(optimizer, cluster.device)
        ),
        "TorchRec's validator of ranks": lambda: validate_rank_assignment(ShardingPlan(placed), topology),
    }
    for what, validate in validators.items():
        try:
            validate()
            yield Check(what, "accepts", "accepts", True)
        except PlannerError as e:
            yield Check(what, "accepts", str(e), False)


def _shard_rows(plan: Plan, rank: int, built: list[BuiltSharding]) -> Iterator[Check]:
    """One row for each shard that the plan or the modules have on this rank."""
    predicted = {}
    for name, table in plan.tables.items():
        spec = plan.request.tables[name]
        rectangles = [(s.row, s.column, s.num_rows, s.num_columns) for s in table.shards if s.rank == rank]
        if table.sharding_type == "data_parallel":
            rectangles = [(0, 0, spec.num_embeddings, spec.embedding_dim)]
        for row, column, *size in rectangles:
            predicted[name, row, column] = BuiltShard(name, row, column, *size, spec.data_type, table.compute_kernel)
    there = {(s.table, s.row, s.column): s for s in built_shards(built)}
    for key in {**predicted, **there}:
        name, row, column = key
        expected, found = predicted.get(key), there.get(key)
        what = f"table {name}: shard from row {row}, column {column}"
        yield Check(what, str(expected or "not here"), str(found or "not here"), expected == found)


def _kernel_rows(built: list[BuiltSharding]) -> Iterator[Check]:
    """FBGEMM 1.8.0 takes a kernel without a row for one of a GPU: the first lookup on a CPU fails."""
    for sharding in built:
        for kernel in sharding.kernels if sharding.sharding_type != "data_parallel" else ():
            num_rows = sum(spec[0] for spec in kernel.emb_module.embedding_specs)
            what = f"{sharding.collection} {sharding.sharding_type}: rows of a kernel"
            yield Check(what, "1 or more", f"{num_rows:,}", num_rows > 0)


def _bytes_rows(plan: Plan, rank: int, built: list[BuiltSharding], optimizer: SparseOptimizer) -> Iterator[Check]:
    there = built_bytes(built, optimizer)
    load = plan.ranks[rank]
    predicted = {("device", kind): load.device_bytes.get(kind, 0.0) for kind in TABLE_BYTES}
    predicted |= {("host", kind): load.host_bytes.get(kind, 0.0) for kind in TABLE_BYTES}
    for tier, kind in predicted:
        if predicted[tier, kind] or there[tier, kind]:
            yield _bytes_row(f"bytes of {kind}, {tier} memory", predicted[tier, kind], there[tier, kind])
    yield _bytes_row("bytes of tables, all memory", sum(predicted.values()), there.total())


def _bytes_row(what: str, predicted: float, built: float) -> Check:
    return Check(what, f"{predicted:,.0f}", f"{built:,.0f}", abs(predicted - built) <= BYTES_TOLERANCE * built)


def _collective_rows(plan: Plan, rank: int, built: BuiltSharding) -> Iterator[Check]:
    """The exchanges of one sharding type: which id lists go to which rank, cut where, and how many columns come back."""
    if built.sharding_type == "data_parallel":
        return
    tables = {
        name: table
        for name, table in plan.tables.items()
        if plan.request.tables[name].collection == built.collection and table.sharding_type == built.sharding_type
    }
    label = f"{built.collection} {built.sharding_type}"
    input_dist = built.sharding.create_input_dist(torch.device("cpu"))  # on meta its numbers could not be read
    features, columns = _predicted_exchange(plan, tables)
    yield _by_rank_row(f"{label}: id lists to each rank", features, lists_to_rank(plan, built, input_dist), rank)
    if built.collection == "bags":
        yield _by_rank_row(f"{label}: columns from each rank", columns, columns_from_rank(plan, built), rank)
    else:
        sent = built.output_dist._dist._local_split
        own = len(features[rank])
        yield Check(f"{label}: id lists that rank {rank} answers", str(own), str(sent), own == sent)
        if built.sharding_type == "column_wise":
            yield _width_row(label, tables, built)
    if SCOPES[built.sharding_type] != "rank":
        yield _cut_row(plan, label, tables, built, input_dist)


def _predicted_exchange(plan: Plan, tables: dict[str, TablePlan]) -> tuple[list[list[str]], list[int]]:
    """By rank: the features whose ids it is sent, and the columns it sends back for a sample."""
    features: list[list[str]] = [[] for _ in range(plan.request.group.num_ranks)]
    columns = [0] * len(features)
    for name, table in tables.items():
        of_table = list(plan.request.tables[name].expected_ids_by_feature)
        for shard in table.shards:
            features[shard.rank] += of_table
            columns[shard.rank] += shard.num_columns * len(of_table)
    return [sorted(names) for names in features], columns


def lists_to_rank(plan: Plan, built: BuiltSharding, input_dist: nn.Module) -> list[list[str]]:
    """Ranks of one place (a rank, a host, all) are sent the same lists, which the sharding names once."""
    cluster, names, splits = plan.request.group, built.sharding.feature_names(), input_dist._dist._splits
    ranks_of_place = {"rank": 1, "host": cluster.ranks_per_host, "all": cluster.num_ranks}[SCOPES[built.sharding_type]]
    lists, start = [], 0
    for first in range(0, cluster.num_ranks, ranks_of_place):
        lists += [sorted(names[start : start + splits[rank]]) for rank in range(first, first + ranks_of_place)]
        start += splits[first]
    return lists


def columns_from_rank(plan: Plan, built: BuiltSharding) -> list[int]:
    cluster, output = plan.request.group, built.output_dist
    match SCOPES[built.sharding_type]:
        case "rank":
            return list(output._dim_sum_per_rank)
        case "host":
            return [dim_sum for dim_sum in output._dim_sum_per_node for _ in range(cluster.ranks_per_host)]
        case "all":
            return [sum(output._embedding_dims)] * cluster.num_ranks


def _width_row(label: str, tables: dict[str, TablePlan], built: BuiltSharding) -> Check:
    """TorchRec takes the first shard's width for that of all."""
    widths = sorted({shard.num_columns for table in tables.values() for shard in table.shards})
    expected = ", ".join(map(str, widths))
    return Check(
        f"{label}: columns of every shard", expected, str(built.column_wise_width), widths == [built.column_wise_width]
    )


def _cut_row(
    plan: Plan, label: str, tables: dict[str, TablePlan], built: BuiltSharding, input_dist: nn.Module
) -> Check:
    """TorchRec cuts a table's rows into buckets by itself, and sends the i-th to the i-th rank (of the host, or of all)."""
    cluster = plan.request.group
    num_buckets = cluster.num_ranks if SCOPES[built.sharding_type] == "all" else cluster.ranks_per_host
    predicted, there = {}, defaultdict(set)
    table_of = {f: name for name in tables for f in plan.request.tables[name].expected_ids_by_feature}
    for name, table in tables.items():
        predicted[name] = {(s.rank % num_buckets, s.row, s.row + s.num_rows) for s in table.shards}
    block_sizes = input_dist._feature_block_sizes_tensor.tolist()
    for feature, block in zip(built.sharding.feature_names(), block_sizes, strict=True):
        num_rows = plan.request.tables[table_of[feature]].num_embeddings
        starts = [min(i * block, num_rows) for i in range(num_buckets + 1)]
        there[table_of[feature]] |= {(i, starts[i], starts[i + 1]) for i in range(num_buckets)}
    wrong = [name for name in tables if predicted[name] != there[name]]
    shown = wrong[0] if wrong else next(iter(tables))
    agreed = predicted[shown] & there[shown] if wrong else set()
    words = [
        _few([f"{first} to {end} on {i}" for i, first, end in sorted(cuts[shown] - agreed)])
        for cuts in (predicted, there)
    ]
    return Check(f"{label}: rows that each rank is sent ids of", *(f"{shown}: {said}" for said in words), not wrong)


def _by_rank_row(what: str, predicted: list[Any], built: list[Any], rank: int) -> Check:
    """Shows `rank`, or the first rank that differs."""
    wrong = [r for r in range(len(predicted)) if predicted[r] != built[r]]
    shown = wrong[0] if wrong else rank
    return Check(what, _at(predicted, shown), _at(built, shown), not wrong)


def _at(by_rank: list[Any], rank: int) -> str:
    value = by_rank[rank]
    if isinstance(value, int):
        return f"{sum(by_rank)} in all; rank {rank}: {value}"
    names = f" ({_few(value)})" if value else ""
    return f"{sum(map(len, by_rank))} in all; rank {rank}: {len(value)}{names}"


def _few(values: list[Any]) -> str:
    more = [f"and {len(values) - NAMES_SHOWN} more"] if len(values) > NAMES_SHOWN else []
    return ", ".join([*map(str, values[:NAMES_SHOWN]), *more])


def _dense_rows(request: PlanRequest, config: RunConfig) -> Iterator[Check]:
    trace = trace_dense(config, request.local_batch_size, request.cluster.device)
    there, predicted = trace.num_parameters, request.num_dense_parameters
    yield Check("dense arch: parameters", f"{predicted:,}", f"{there:,}", predicted == there)
    if request.dense_activation_bytes:
        yield _bytes_row("dense arch: bytes of activations", request.dense_activation_bytes, trace.activation_bytes)
    else:
        yield Check("dense arch: bytes of activations", "not traced", f"{trace.activation_bytes:,}", True)
