"""The rules of a warm start: which tensors begin with another run's values, and what no rule covers."""

from dlrm_scale.checkpoint.tensors import Saved
from dlrm_scale.checkpoint_config import WarmStart
from dlrm_scale.training.state import mismatches


def apply_rules(rules: WarmStart, saved: dict[str, Saved], expected: dict[str, Saved]) -> tuple[set[str], list[str]]:
    """(keys that keep their first values, faults): what does not match and no rule covers, and rules that cover nothing."""
    tables_here, tables_there = _tables(expected), _tables(saved)
    faults = [f"new_tables: {t} is in the checkpoint" for t in rules.new_tables if t in tables_there]
    faults += [f"new_tables: {t} is no table of this model" for t in rules.new_tables if t not in tables_here]
    faults += [f"dropped_tables: {t} is a table of this model" for t in rules.dropped_tables if t in tables_here]
    faults += [f"dropped_tables: {t} is not in the checkpoint" for t in rules.dropped_tables if t not in tables_there]
    for table in rules.grown_tables:
        had, has = (side.get(f"tables/{table}/weight") for side in (saved, expected))
        if not (had and has and had.size[0] < has.size[0]):
            faults.append(f"grown_tables: {table} has {had or 'no table'} in the checkpoint, {has or 'no table'} here")
    every = set(saved) | set(expected)
    unused = [p for p in rules.fresh_dense if not any(_is_dense_under(p, key) for key in every)]
    faults += [f"fresh_dense: no dense parameter begins with {prefix}" for prefix in unused]
    fresh = {key for key in every if _is_fresh(key, rules)}
    left = {
        key: tensor for key, tensor in saved.items() if key not in fresh and _table(key) not in rules.dropped_tables
    }
    wanted = {key: tensor for key, tensor in expected.items() if key not in fresh}
    for table in rules.grown_tables:
        for key in [key for key in left if _table(key) == table and key in wanted]:
            had, has = left[key], wanted[key]
            if had.dtype == has.dtype and had.size[0] < has.size[0] and had.size[1:] == has.size[1:]:
                del left[key], wanted[key]
    return fresh, faults + mismatches(left, wanted)


def _is_fresh(key: str, rules: WarmStart) -> bool:
    is_optimizer = key.startswith("dense_optimizer/") or (_table(key) is not None and not key.endswith("/weight"))
    return (
        _table(key) in rules.new_tables
        or (is_optimizer and rules.fresh_optimizer)
        or any(_is_dense_under(prefix, key) for prefix in rules.fresh_dense)
    )


def _is_dense_under(prefix: str, key: str) -> bool:
    return key.startswith((f"dense/{prefix}", f"dense_optimizer/{prefix}"))


def _table(key: str) -> str | None:
    return key.split("/")[1] if key.startswith("tables/") else None


def _tables(keys: dict[str, Saved]) -> set[str]:
    return {_table(key) for key in keys} - {None}
