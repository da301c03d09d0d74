"""The user's constraints on places, checked and turned into the search's units."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from dlrm_scale.config import PLAIN_SPARSE_OPTIMIZERS
from dlrm_scale.errors import ConfigError, NoPlanError
from dlrm_scale.sharding.plan import PlanRequest
from dlrm_scale.sharding.problem import Blocks, Choice, Cutter, Unit, with_places


def check_rules(request: PlanRequest) -> None:
    """Raises ConfigError for rules that contradict each other or name what is not there."""
    sharding, cluster = request.sharding, request.group
    _check_replicas(request)
    groups = [("together", g) for g in sharding.together] + [("apart", g) for g in sharding.apart]
    named = [("tables", (name,)) for name in sharding.tables] + groups
    for rule, tables in named:
        unknown = [name for name in tables if name not in request.tables]
        if unknown:
            raise ConfigError(
                f"sharding.{rule} names table {', '.join(unknown)}, which is not one of the tables: {_shown(request.tables)}; correct its name or take it out"
            )
    for rule, tables in groups:
        if len(set(tables)) != len(tables) or len(tables) < 2:
            raise ConfigError(
                f"sharding.{rule} has the group [{', '.join(tables)}]: give two or more tables, each once"
            )
    of_group: dict[str, tuple[str, ...]] = {}
    for tables in sharding.together:
        for name in tables:
            if name in of_group:
                raise ConfigError(f"sharding.together has table {name} in two groups; join them to one")
            of_group[name] = tables
    for tables in sharding.apart:
        if len(tables) > cluster.num_ranks:
            raise ConfigError(
                f"sharding.apart keeps {len(tables)} tables apart ({', '.join(tables)}), but the cluster has {cluster.num_ranks} ranks; "
                "name no more tables than ranks"
            )
        for a, b in combinations(tables, 2):
            if a in of_group and b in of_group[a]:
                raise ConfigError(f"sharding.together and sharding.apart both have tables {a} and {b}; take one out")
            _check_pins_apart(request, of_group.get(a, (a,)), of_group.get(b, (b,)))
    for name, rules in sharding.tables.items():
        for field, limit in (("ranks", cluster.num_ranks), ("avoid_ranks", cluster.num_ranks), ("pin", cluster.num_ranks),
                             ("hosts", cluster.num_hosts), ("avoid_hosts", cluster.num_hosts)):  # fmt: skip
            strange = [place for place in getattr(rules, field) or () if not 0 <= place < limit]
            if strange:
                raise ConfigError(f"sharding.tables.{name}.{field} has {strange}, but the cluster has 0 to {limit - 1}")
        allowed = np.flatnonzero(allowed_ranks(request, name))
        if not len(allowed):
            raise ConfigError(
                f"sharding.tables.{name}: ranks, avoid_ranks, hosts and avoid_hosts together leave table {name} no rank; "
                "take one of them out"
            )
        if rules.pin is not None and not set(rules.pin) <= set(allowed.tolist()):
            wrong = sorted(set(rules.pin) - set(allowed.tolist()))
            raise ConfigError(
                f"sharding.tables.{name}: pin puts a shard on rank {wrong}, which ranks, hosts or avoid_* of the same table forbid"
            )


def _check_replicas(request: PlanRequest) -> None:
    """`DMPCollection.sync` averages weights and the state that is called `sum`, and no other."""
    if request.sharding.replica_groups > 1 and request.sparse_optimizer not in PLAIN_SPARSE_OPTIMIZERS:
        raise ConfigError(
            f"sharding.replica_groups is {request.sharding.replica_groups}, but TorchRec 1.8.0 averages copies of tables that train by "
            f"{', '.join(PLAIN_SPARSE_OPTIMIZERS)} only, and train.sparse.name is {request.sparse_optimizer}; change one of them"
        )


def _check_pins_apart(request: PlanRequest, a: tuple[str, ...], b: tuple[str, ...]) -> None:
    """Of two tables, each with those that must be with it."""
    pins = [{rank for name in group for rank in _pin(request, name) or ()} for group in (a, b)]
    if pins[0] & pins[1]:
        raise ConfigError(
            f"sharding.apart keeps tables {', '.join(a)} and {', '.join(b)} apart, but both are pinned to rank "
            f"{sorted(pins[0] & pins[1])}; take one of these rules out"
        )


def _check_group_pin(request: PlanRequest, group: tuple[str, ...], allowed: np.ndarray) -> None:
    for name in group:
        forbidden = sorted(rank for rank in _pin(request, name) or () if not allowed[rank])
        if forbidden:
            raise ConfigError(
                f"sharding.tables.{name}: pin puts it on rank {forbidden}, which ranks, hosts or avoid_* of a table that must be "
                f"together with it ({', '.join(group)}) forbid; take one of these rules out"
            )


def allowed_ranks(request: PlanRequest, table: str) -> np.ndarray:
    """(R,) bool."""
    cluster, rules = request.group, request.sharding.tables.get(table)
    allowed = np.ones(cluster.num_ranks, dtype=bool)
    if rules is None:
        return allowed
    host_of = np.arange(cluster.num_ranks) // cluster.ranks_per_host
    if rules.ranks is not None:
        allowed &= np.isin(np.arange(cluster.num_ranks), rules.ranks)
    if rules.hosts is not None:
        allowed &= np.isin(host_of, rules.hosts)
    allowed[list(rules.avoid_ranks)] = False
    return allowed & ~np.isin(host_of, rules.avoid_hosts)


def make_units(request: PlanRequest, cutter: Cutter) -> tuple[Unit, ...]:
    """Raises NoPlanError: rules leave a table, or tables that must be together, without any option."""
    names = cutter.options.table_names
    index = {name: i for i, name in enumerate(names)}
    grouped = {name for group in request.sharding.together for name in group}
    members = [(name,) for name in names if name not in grouped] + [tuple(g) for g in request.sharding.together]
    unit_of = {name: u for u, group in enumerate(members) for name in group}
    apart: dict[int, set[int]] = {}
    for group in request.sharding.apart:
        for a, b in combinations({unit_of[name] for name in group}, 2):
            apart.setdefault(a, set()).add(b)
            apart.setdefault(b, set()).add(a)
    units = []
    for u, group in enumerate(members):
        allowed = np.logical_and.reduce([allowed_ranks(request, name) for name in group])
        _check_group_pin(request, group, allowed)
        tables = tuple(index[name] for name in group)
        choices = _choices(request, cutter, tables, group)
        if not allowed.all() or u in apart:
            choices = [c for c in choices if c.scope != "all"]
        if any(c.scope == "host" for c in choices) and not allowed.reshape(-1, cutter.ranks_per_host).all(axis=1).any():
            choices = [c for c in choices if c.scope != "host"]
        if not choices or not allowed.any():
            raise NoPlanError(
                f"no way is left to shard {'tables' if len(group) > 1 else 'table'} {', '.join(group)} under {_rules_of(request, group)}: "
                "together means whole tables on one rank, table_wise; row_wise and data_parallel need all ranks, and table_row_wise and "
                "grid_shard all of a host; allow more types or ranks"
            )
        units.append(Unit(tables, tuple(choices), allowed, tuple(sorted(apart.get(u, ())))))
    return tuple(units)


def _rules_of(request: PlanRequest, names: Sequence[str]) -> str:
    """What `sharding` says of these tables, as it is set."""
    said = [
        f"sharding.tables.{name}.{key}={value}"
        for name in names
        if name in request.sharding.tables
        for key, value in request.sharding.tables[name].model_dump(mode="json", exclude_defaults=True).items()
    ]
    for kind in ("together", "apart"):
        groups = [list(group) for group in getattr(request.sharding, kind) if set(group) & set(names)]
        said += [f"sharding.{kind}={groups}"] if groups else []
    return ", ".join(said).replace("'", "") or "no rule of its own"


def _choices(request: PlanRequest, cutter: Cutter, tables: tuple[int, ...], names: tuple[str, ...]) -> list[Choice]:
    if len(tables) > 1:
        return _joined(request, cutter, tables, names)
    choices = [cutter.choice(option) for option in cutter.options_of(tables[0])]
    pin = _pin(request, names[0])
    if pin is None:
        return choices
    pinned = []
    for choice in choices:
        num_shards = max(1, len(cutter.shards(choice.options[0])))
        places = cutter.places(choice.scope, pin) if len(pin) == num_shards else None
        if places is not None and (not choice.one_host or len({p // cutter.ranks_per_host for p in places}) == 1):
            pinned.append(with_places(choice, places))
    if not pinned:
        raise NoPlanError(
            f"sharding.tables.{names[0]}.pin gives {len(pin)} {'rank' if len(pin) == 1 else 'ranks'} {list(pin)}, but no option of table {names[0]} has that many shards "
            "there; pin one rank for table_wise, one a shard for column_wise, all ranks of hosts in order for table_row_wise"
        )
    return pinned


def _joined(request: PlanRequest, cutter: Cutter, tables: tuple[int, ...], names: tuple[str, ...]) -> list[Choice]:
    """Whole tables on one rank, all with the same kernel."""
    options = cutter.options
    pins = {pin for name in names if (pin := _pin(request, name)) is not None}
    if len(pins) > 1 or any(len(pin) != 1 for pin in pins):
        raise ConfigError(
            f"sharding.together has tables {', '.join(names)}, but their pins are {sorted(map(list, pins))}; pin one of them, to one rank"
        )
    by_kernel: list[dict[tuple[str, float], int]] = []
    for table in tables:
        whole = [o for o in cutter.options_of(table) if options.option_type[o] == "table_wise"]
        by_kernel.append(
            {
                (str(options.option_kernel[o]), float(np.nan_to_num(options.option_cache_load_factor[o]))): o
                for o in whole
            }
        )
    shared = [kernel for kernel in by_kernel[0] if all(kernel in other for other in by_kernel)]
    choices = []
    for kernel in shared:
        members = tuple(other[kernel] for other in by_kernel)
        demand_K1 = sum(cutter.choice(o).blocks[0].demand_Kg for o in members)
        choice = Choice(members, "table_wise", (Blocks(1, demand_K1, np.ones(1, dtype=int)),))
        choices.append(with_places(choice, pin) if (pin := next(iter(pins), None)) else choice)
    return choices


def _pin(request: PlanRequest, table: str) -> tuple[int, ...] | None:
    rules = request.sharding.tables.get(table)
    return None if rules is None else rules.pin


def _shown(names: Sequence[str]) -> str:
    shown = list(names)[:8]
    return ", ".join(shown) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
