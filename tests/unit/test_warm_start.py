"""The rules of a warm start on lists of tensors: what is taken over, what begins anew, and what no rule covers."""

import pytest
import torch

from dlrm_scale.checkpoint.tensors import Saved
from dlrm_scale.checkpoint_config import WarmStart
from dlrm_scale.training.warm_start import apply_rules

F32 = torch.float32


def tensors(user_rows: int = 10, tables: tuple[str, ...] = ("user", "item"), head: int = 4) -> dict[str, Saved]:
    rows = {"user": user_rows}
    found = {}
    for table in tables:
        found[f"tables/{table}/weight"] = Saved(F32, (rows.get(table, 5), 8))
        found[f"tables/{table}/sum"] = Saved(F32, (rows.get(table, 5), 1))
    for name, size in (("arch.body", (3, 3)), ("arch.head", (head, 1))):
        found[f"dense/{name}"] = Saved(F32, size)
        found[f"dense_optimizer/{name}/exp_avg"] = Saved(F32, size)
    return found


def apply(saved, expected, **rules):
    return apply_rules(WarmStart(path="somewhere", **rules), saved, expected)


def test_the_same_model_takes_over_everything():
    assert apply(tensors(), tensors()) == (set(), [])


@pytest.mark.parametrize(
    ("here", "rules", "fresh"),
    [
        (tensors(tables=("user", "item", "city")), {"new_tables": ["city"]}, {"tables/city/weight", "tables/city/sum"}),
        (tensors(user_rows=15), {"grown_tables": ["user"]}, set()),
        (tensors(tables=("user",)), {"dropped_tables": ["item"]}, set()),
        (tensors(head=9), {"fresh_dense": ["arch.head"]}, {"dense/arch.head", "dense_optimizer/arch.head/exp_avg"}),
    ],
)
def test_each_rule_covers_its_own_change_and_without_it_the_change_is_listed(here, rules, fresh):
    rules = {name: tuple(value) for name, value in rules.items()}
    assert apply(tensors(), here, **rules) == (fresh, [])
    _, faults = apply(tensors(), here)
    changed = next(iter(rules.values()))[0]
    assert faults and all(changed in fault for fault in faults)
    _, unused = apply(tensors(), tensors(), **rules)
    assert (unused == []) == ("fresh_dense" in rules), "a rule that covers nothing is a slip"


def test_a_fresh_optimizer_ignores_the_other_ones_state():
    there = {key.replace("/sum", "/exp_avg"): tensor for key, tensor in tensors().items()}
    fresh, faults = apply(there, tensors(), fresh_optimizer=True)
    assert faults == [] and "tables/user/weight" not in fresh and "tables/user/sum" in fresh
    _, faults = apply(there, tensors())
    assert "tables/user/sum: not in the checkpoint" in faults
    assert "tables/user/exp_avg: in the checkpoint, not in this model" in faults


def test_a_shrunk_or_widened_table_is_no_grown_one():
    _, faults = apply(tensors(user_rows=15), tensors(), grown_tables=("user",))
    assert any(fault.startswith("grown_tables: user") for fault in faults)
    wider = tensors(user_rows=15) | {"tables/user/weight": Saved(F32, (15, 16))}
    _, faults = apply(tensors(), wider, grown_tables=("user",))
    assert faults == ["tables/user/weight: 10 x 8 float32 in the checkpoint, 15 x 16 float32 here"]
