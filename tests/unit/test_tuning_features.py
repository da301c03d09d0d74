"""Features: the analytic model by hand, records and candidates alike, and the cost of thousands of rows."""

import time
from dataclasses import replace

import numpy as np
import pytest

from dlrm_scale.cluster import Figure
from dlrm_scale.config_io import parse_config
from dlrm_scale.models.dense_trace import count_flops, trace_dense
from dlrm_scale.tuning.features import FLOPS_PER_S, INPUTS, SWITCHES, TERMS, FeatureTable, analytic_step_ms
from dlrm_scale.tuning.featurise import Featuriser, record_features
from dlrm_scale.tuning.model_search import OWN_GROUP, known_runs
from dlrm_scale.tuning.plans import Plans
from dlrm_scale.tuning.records import Record
from tests.support.model_inputs import run_config
from tests.support.requests import cluster
from tests.support.tuning import KNOBS, PLANS, tiny_space, tiny_tree

DCN = {"arch": "dlrm_dcnv2", "bottom_hidden": [16], "cross_layers": 1, "cross_rank": 4, "top_hidden": [16]}


@pytest.fixture(scope="module")
def plans():
    return PLANS


def test_the_dense_arch_is_traced_for_any_batch(plans):
    """From two small traces."""
    config = parse_config({**tiny_tree(), "model": DCN}, "tests")
    traced, work = trace_dense(config, 200), plans.dense(config, 200, "cpu")
    assert work.num_parameters == traced.num_parameters
    assert work.flops == sum(count_flops(config, 200))
    in_bf16 = trace_dense(
        config.model_copy(update={"train": config.train.model_copy(update={"precision": "bf16"})}), 200
    )
    assert work.activation_bytes == pytest.approx(max(traced.activation_bytes, in_bf16.activation_bytes), rel=1e-6)


def test_precisions_in_which_a_gpus_kernel_runs_are_told_apart(plans):
    """With TF32 it runs in both, without in bf16 alone."""
    pytest.importorskip("triton")
    strict = run_config(dim=16, pffn_kernel="auto")
    tf32 = strict.model_copy(update={"train": strict.train.model_copy(update={"tf32": True})})
    in_strict, in_tf32 = (plans.dense(config, 200, "cuda").activation_bytes for config in (strict, tf32))
    assert in_strict > in_tf32


def test_the_analytic_step_is_the_sum_of_its_parts(plans):
    """On one rank: nothing is exchanged, so a step is lookups and dense arch, once a micro-batch."""
    space = tiny_space()
    for accumulate, threads in ((1, 1), (2, 4)):
        point = space.point({"ranks": 1, "batch": 64, "pipeline": "none"})
        job = space.job(point)
        config = job.config.model_copy(
            update={"train": job.config.train.model_copy(update={"accumulate_steps": accumulate})}
        )
        plan = plans.plan(config, job.cluster)
        work = plans.dense(config, 64 // accumulate, "cpu")
        types = {name: table.sharding_type for name, table in plan.tables.items()}
        ms = analytic_step_ms(config, job.cluster, types, plan.ranks, work, threads)
        dense_ms = work.flops / FLOPS_PER_S["cpu", "fp32"] / threads * 1e3
        assert ms == pytest.approx(accumulate * (sum(plan.ranks[0].step_ms.values()) + dense_ms))


def test_a_record_has_the_features_of_its_point(plans):
    space = tiny_space()
    points = list(space.enumerate())
    candidates = Featuriser(space, plans)(points)
    records = [record_of(space.job(point), plans) for point in points]
    recorded = record_features(records, plans)
    for name in ("terms_NK", "extras_NE", "inputs_NF", "global_batch_N", "fill_N3"):
        np.testing.assert_array_equal(getattr(candidates.table, name), getattr(recorded, name))


def record_of(job, plans) -> Record:
    plan = plans.plan(job.config, job.cluster)
    types = {name: table.sharding_type for name, table in plan.tables.items()}
    return Record("r:1", job, "ok", "", 1.0, 0.1, 20, plan.ranks, types, {}, None, None)


def test_a_record_without_a_plan_is_planned(plans):
    space = tiny_space()
    job = space.job(space.point({"ranks": 2, "batch": 64, "pipeline": "none", "user": "any"}))
    full = record_of(job, plans)
    bare = Record("r:1", job, "does not fit", "killed", np.nan, np.nan, 0, (), {}, {}, None, None)
    tables = [record_features([record], plans) for record in (full, bare)]
    np.testing.assert_array_equal(tables[0].inputs_NF, tables[1].inputs_NF)


def test_knobs_that_no_plan_depends_on_cost_no_plan():
    plans, space = Plans(), tiny_space()
    featuriser = Featuriser(space, plans)
    points = list(space.enumerate())
    featuriser([p for p in points if p["pipeline"] == "none"])
    planned = len(plans)
    table = featuriser(points).table
    assert len(plans) == planned == 4 + 12
    assert set(table.inputs_NF[:, INPUTS.index("pipelined")]) == {0.0, 1.0}


def test_what_the_planner_refuses_has_a_reason_and_no_features(plans):
    """A batch of 512 needs more memory than one of 64."""
    room = cluster("cpu", 2, 2).model_copy(update={"host_memory_gb": Figure(value=2.5e-4, source="test")})
    space = tiny_space(machines=room)
    points = list(space.enumerate())
    candidates = Featuriser(space, plans)(points)
    refused = set(candidates.reasons)
    assert 0 < len(refused) < len(points)
    assert max(points[i]["batch"] for i in refused) == 512 and all("fits" in r for r in candidates.reasons.values())
    assert [i for i, ok in enumerate(candidates.table.feasible_N) if not ok] == sorted(refused)
    assert np.isfinite(candidates.table.inputs_NF[candidates.table.feasible_N]).all()


def test_ten_thousand_candidates_take_less_than_a_second(plans):
    space = tiny_space()
    featuriser, rng = Featuriser(space, plans), np.random.default_rng(0)
    featuriser(list(space.enumerate()))
    points = [space.sample(rng) for _ in range(10_000)]
    started = time.process_time()
    table = featuriser(points).table
    assert time.process_time() - started < 0.7 and len(table) == 10_000


def test_tables_join_and_part(plans):
    space = tiny_space()
    table = Featuriser(space, plans)(list(space.enumerate())).table
    halves = [table.take(np.arange(0, 10)), table.take(np.arange(10, len(table)))]
    np.testing.assert_array_equal(FeatureTable.join(halves).terms_NK, table.terms_NK)
    assert table.terms_NK.shape == (space.size, len(TERMS)) and table.inputs_NF.shape == (space.size, len(INPUTS))


def test_batch_and_threads_are_in_the_features(plans):
    threads = {"kind": "categorical", "key": "launch.threads_per_rank", "values": [1, 2]}
    space = tiny_space({**KNOBS, "threads": threads})
    point = {"ranks": 1, "batch": 128, "pipeline": "none"}
    one, two = Featuriser(space, plans)([space.point({**point, "threads": n}) for n in (1, 2)]).table.terms_NK
    assert two[TERMS.index("dense")] == one[TERMS.index("dense")] / 2 and one.sum() > two.sum()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((f"train.{name}", True) for name in SWITCHES if name != "activation_checkpointing"),
        *(
            ("train.precision", "bf16"),
            ("train.all_reduce.precision", "bf16"),
            ("sharding.communication.forward", "bf16"),
        ),
        *(("data.prefetch_batches", 8), ("sharding.objective", "critical_path")),
    ],
)
def test_points_that_differ_in_what_changes_a_steps_time_look_different(plans, key, value):
    space = tiny_space({"knob": {"kind": "categorical", "key": key, "values": [value]}})
    there = space.job(space.point({"knob": value}))
    base = replace(there, config=space.base)
    one, other = (record_features([record_of(job, plans)], plans).inputs_NF for job in (base, there))
    assert not np.array_equal(one, other)


def test_records_become_known_runs_by_workload(plans):
    space = tiny_space()
    job = space.job(space.point({"ranks": 2, "batch": 64, "pipeline": "none", "user": "any"}))
    deeper = job.config.model_copy(update={"features": job.config.features.model_copy(update={"dense": ()})})
    own, failed = record_of(job, plans), replace(record_of(job, plans), outcome="failed", step_ms=np.nan)
    other = record_of(replace(job, config=deeper), plans)
    misfit = replace(own, outcome="does not fit", step_ms=np.nan)
    known = known_runs([other, own, failed, misfit], plans, space.base)
    assert known.measured.group_N.tolist() == [1, OWN_GROUP, OWN_GROUP] and len(known.table) == 3
    assert known.measured.fits_N.tolist() == [True, True, False] and np.isnan(known.measured.step_ms_N[2])
    assert len(known_runs([failed], plans).table) == 0
