"""A space of knobs: what its points are, what they mean to the trainer, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest

from dlrm_scale.cluster import Figure
from dlrm_scale.errors import ConfigError
from dlrm_scale.tuning.space import Launch, load_space, resized
from tests.support.requests import cluster
from tests.support.tuning import KNOBS, PLANS, SIZE, tiny_space

ROOT = Path(__file__).parents[2]


@pytest.fixture
def space():
    return tiny_space()


def test_every_point_is_enumerated_once(space):
    points = list(space.enumerate())
    assert len(points) == len(set(points)) == space.size == SIZE
    rng = np.random.default_rng(0)
    assert {space.sample(rng) for _ in range(2000)} == set(points)


def test_a_knob_whose_condition_does_not_hold_is_absent(space):
    for point in space.enumerate():
        assert ("user" in point) == (point["ranks"] == 2)
    both = space.point({"ranks": 1, "batch": 64, "pipeline": "none", "user": "any"})
    assert both == space.point({"ranks": 1, "batch": 64, "pipeline": "none"})


def test_points_survive_json_and_hash_alike(space):
    for point in space.enumerate():
        again = space.point(json.loads(json.dumps(dict(point))))
        assert again == point and hash(again) == hash(point) and {point: 1}[again] == 1


def test_overrides_say_to_the_configuration_what_the_point_says(space, monkeypatch):
    point = space.point({"ranks": 2, "batch": 128, "pipeline": "none", "user": "row_wise"})
    config = space.config(point)
    assert (config.train.global_batch_size, config.train.pipeline) == (128, "none")
    assert config.sharding.tables["user"].types == ("row_wise",)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(16)))
    assert space.launch(point) == Launch(num_ranks=2, threads_per_rank=8) and not space.tunes_threads(point)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert space.launch(point).threads_per_rank == 3  # launchers/torchrun.sh keeps to it, too
    assert sorted(space.overrides(point)) == [
        "sharding.tables.user.types=[row_wise]", "train.global_batch_size=128", "train.pipeline=none"
    ]  # fmt: skip


def test_any_leaves_a_table_to_the_planner():
    tree_types = tiny_space().config(tiny_space().point({"ranks": 2, "batch": 64, "pipeline": "none", "user": "any"}))
    assert tree_types.sharding.tables["user"].types is None


@pytest.mark.parametrize("num_changes", [1, 2])
def test_a_mutation_changes_so_many_of_the_active_knobs(space, num_changes):
    rng, known = np.random.default_rng(1), set(space.enumerate())
    for point in known:
        child = space.mutate(point, rng, num_changes)
        changed = [name for name in point if name in child and child[name] != point[name]]
        assert child in known and len(changed) + ("user" in point and "user" not in child) >= num_changes
        if child["ranks"] == point["ranks"]:
            assert len(changed) == num_changes


def test_a_child_has_each_knob_of_a_parent(space):
    rng = np.random.default_rng(2)
    for _ in range(50):
        one, other = space.sample(rng), space.sample(rng)
        child = space.cross(one, other, rng)
        for name, value in child.items():
            assert value in (one.get(name), other.get(name))


def test_neighbours_differ_in_one_knob(space):
    point = space.point({"ranks": 2, "batch": 64, "pipeline": "none", "user": "any"})
    near = space.neighbours(point)
    assert len(near) == len(set(near)) == 1 + 3 + 1 + 2
    for other in near:
        assert sum(point[name] != other.get(name) for name in ("ranks", "batch", "pipeline")) <= 1


def test_the_fingerprint_changes_with_the_space():
    other = {**KNOBS, "batch": {**KNOBS["batch"], "high": 128}}
    prints = {
        tiny_space().fingerprint,
        tiny_space(other).fingerprint,
        tiny_space(machines=cluster("cpu", 4, 2)).fingerprint,
    }
    assert len(prints) == 3 and tiny_space().fingerprint in prints


def test_log_floats_are_evenly_apart_in_their_logarithm():
    space = tiny_space({"lr": {"kind": "log_float", "key": "train.sparse.lr", "low": 0.001, "high": 0.1, "steps": 5}})
    assert space.choices["lr"] == (0.001, 0.003162, 0.01, 0.03162, 0.1)
    assert space.config(space.point({"lr": 0.003162})).train.sparse.lr == 0.003162


def batch_that_scales(**exponents):
    low_high = {"low": 64, "high": 1024, "log": True}
    return {"batch": {"kind": "integer", "key": "train.global_batch_size", **low_high, "scales": exponents}}


def test_rates_follow_the_batch_by_their_exponents():
    space = tiny_space(batch_that_scales(**{"train.dense.lr": 0.5, "train.sparse.lr": 1.0}))
    base, large = space.config(space.point({"batch": 64})).train, space.config(space.point({"batch": 1024})).train
    assert base.dense.lr == space.base.train.dense.lr and space.overrides(space.point({"batch": 64})) == [
        "train.global_batch_size=64"
    ]
    assert large.dense.lr == pytest.approx(4 * base.dense.lr) and large.sparse.lr == pytest.approx(16 * base.sparse.lr)


def categorical(key, *values, **more):
    return {"kind": "categorical", "key": key, "values": list(values), **more}


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"batch": categorical("train.global_batchsize", 64)}, ["knob batch", "the nearest is global_batch_size"]),
        ({"ranks": categorical("launch.ranks", 1)}, ["launch.ranks", "launch.num_ranks"]),
        ({"batch": categorical("train.global_batch_size", 64, 66)}, ["knob batch", "66 is refused", "multiple of data.lanes"]),
        ({"ranks": categorical("launch.num_ranks", 3)}, ["3 is refused", "data.lanes"]),
        ({"ranks": categorical("launch.num_ranks", 4)}, ["4 is refused", "the cluster has 2 ranks"]),
        ({"a": categorical("seed", 1, when={"b": [1]}), "b": categorical("launch.num_ranks", 1)}, ["move a below b"]),
        ({"a": categorical("seed", 1), "b": categorical("launch.num_ranks", 1, when={"a": [7]})}, ["a = 7, which a never is"]),
        ({"a": categorical("seed", 1), "b": categorical("seed", 2)}, ["knobs a and b both set seed"]),
        ({"a": categorical("seed", 1, 1)}, ["1 twice"]),
        (batch_that_scales(**{"model.arch": 1.0}), ["scales needs numbers", "model.arch"]),
        ({**batch_that_scales(seed=1.0), "a": categorical("seed", 1)}, ["knobs batch and a both set seed"]),
        ({"a": {"kind": "integer", "key": "seed", "low": 3, "high": 2}}, ["low <= high"]),
        ({"a": {"kind": "integer", "key": "seed", "low": 3, "high": 9, "multiple": 2}}, ["multiple of `multiple`"]),
        ({"a": {"kind": "sharding", "tables": ["usr"], "values": ["any"]}}, ["usr", "user"]),
        ({"a": {"kind": "sharding", "rows": [900, 1000], "values": ["any"]}}, ["no table has so many", "20 to 500"]),
        ({"a": {"kind": "sharding", "tables": ["user"], "values": ["rowwise"]}}, ["rowwise", "row_wise"]),
        ({"a": {"kind": "sharding", "values": ["any"]}}, ["either by `tables` or by `rows`"]),
        ({"a": {"kind": "sharding", "tables": ["item"], "values": ["data_parallel"]}}, ["data_parallel is refused", "sequence"]),
        ({}, ["knobs"]),
    ],
)  # fmt: skip
def test_a_wrong_space_is_refused_with_the_way_out(knobs, said):
    with pytest.raises(ConfigError) as error:
        tiny_space(knobs)
    assert all(part in str(error.value) for part in said), str(error.value)


def test_a_value_that_only_some_points_take_is_kept():
    """256 samples in 3 micro-batches are refused, 192 are not."""
    knobs = {
        "batch": categorical("train.global_batch_size", 192, 256),
        "parts": categorical("train.accumulate_steps", 1, 3),
    }
    space, plans = tiny_space(knobs), PLANS
    reasons = {(p["batch"], p["parts"]): space.check(p, plans) for p in space.enumerate()}
    assert {at for at, reason in reasons.items() if reason} == {(256, 3)}
    assert "multiple of data.lanes (4) x train.accumulate_steps (3)" in reasons[256, 3]


def test_a_point_without_a_plan_says_why():
    small = cluster("cpu", 2, 2).model_copy(update={"host_memory_gb": Figure(value=3e-5, source="test")})
    space = tiny_space(machines=small)
    assert "no sharding plan fits" in space.check(next(space.enumerate()), PLANS)
    with pytest.raises(ConfigError, match="no feasible point: 32 of 32 were tried") as error:
        space.require_feasible(PLANS)
    assert "keeps" in str(error.value) and "more memory" in str(error.value)


def test_a_feasible_point_is_found(space):
    assert space.check(space.require_feasible(PLANS), PLANS) is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rank": 1}, "rank is no knob"),
        ({"ranks": 1, "batch": 65, "pipeline": "none"}, "batch is 65"),
        ({"ranks": 2, "batch": 64, "pipeline": "none"}, "user is no value"),
    ],
)
def test_a_point_of_another_space_is_refused(space, values, said):
    with pytest.raises(ConfigError, match=said):
        space.point(values)


def test_a_cluster_is_cut_to_whole_hosts():
    machines = cluster("cuda", 16, 8)
    assert [(c.num_ranks, c.ranks_per_host) for c in (resized(machines, n) for n in (16, 8, 4))] == [
        (16, 8),
        (8, 8),
        (4, 4),
    ]
    with pytest.raises(ConfigError, match="whole hosts"):
        resized(machines, 12)


@pytest.mark.parametrize("name", ["criteo_80k", "quickstart"])
def test_shipped_spaces_load(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    space = load_space(f"configs/tuning/{name}.yaml")
    sample = space.sample(np.random.default_rng(0))
    assert space.size > 5_000 and space.config(sample).name == name


def test_a_space_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the tuning space"):
        load_space(tmp_path / "none.yaml")
