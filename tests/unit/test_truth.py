"""The truth benchmark's arithmetic: random plans that keep the rules, which runs are a plan's, and how orders agree."""

import argparse
import math

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from dlrm_scale.cluster import this_cluster
from dlrm_scale.config import ShardingConfig, TableSharding
from dlrm_scale.errors import ConfigError, PlanError
from dlrm_scale.models.ranking_model import build_model
from dlrm_scale.sharding.bound import choice_totals, lower_bound
from dlrm_scale.sharding.explain import packing_of
from dlrm_scale.sharding.plan import PlanRequest, load_plan, plan_request, save_plan
from dlrm_scale.sharding.planner import prepare
from dlrm_scale.sharding.problem import SCORED_STAGES
from tools.benchmark import truth
from tools.benchmark.random_plans import OBJECTIVES, draw_plans
from tools.benchmark.rank_correlation import agreement, repeat_agreement
from tools.benchmark.truth import repeat_ms, workload
from tools.benchmark.truth_ranks import PlanRun


def request_of(num_ranks: int, ranks_per_host: int, **sharding) -> PlanRequest:
    config = workload(num_ranks, 64, seed=0)
    parameters = build_model(config, dense_device=torch.device("meta")).num_dense_parameters
    request = plan_request(config, this_cluster(num_ranks, ranks_per_host, "cpu"), parameters)
    return request.model_copy(update={"sharding": ShardingConfig(**sharding)})


@pytest.mark.parametrize(("num_ranks", "ranks_per_host"), [(2, 2), (4, 4), (4, 2)])
def test_random_plans_differ_can_be_loaded_and_score_as_the_planner_scores(tmp_path, num_ranks, ranks_per_host):
    request = request_of(num_ranks, ranks_per_host)
    scored = draw_plans(request, 10, seed=3)
    assert len({s.plan.model_dump_json() for s in scored}) == 10
    for objective in OBJECTIVES:
        prepared = prepare(request.model_copy(update={"sharding": ShardingConfig(objective=objective)}))
        bound = lower_bound(prepared.problem, choice_totals(prepared.problem, prepared.cutter))
        for s in scored:
            assert s.predicted_ms[objective] == pytest.approx(packing_of(prepared, s.plan).score_ms)
            assert s.predicted_ms[objective] >= bound.ms * (1 - 1e-9)
    for s in scored:
        save_plan(s.plan, tmp_path / "plan.json")
        load_plan(tmp_path / "plan.json", s.plan.request)
        busiest = max(sum(load.step_ms[stage] for stage in SCORED_STAGES) for load in s.plan.ranks)
        assert s.predicted_ms["busiest_rank"] == pytest.approx(busiest)
    kinds = {table.sharding_type for s in scored for table in s.plan.tables.values()}
    assert {"data_parallel", "table_wise", "column_wise", "row_wise"} <= kinds


def test_random_plans_keep_the_rules_on_places():
    rules = {"user": TableSharding(types=("table_wise",), ranks=(1, 3)), "page": TableSharding(pin=(2,))}
    request = request_of(4, 4, tables=rules, apart=(("user", "topic"),), together=(("tag", "word"),))
    first_of_user = set()
    for s in draw_plans(request, 20, seed=0):
        ranks = {name: set(table.ranks) for name, table in s.plan.tables.items()}
        assert ranks["user"] <= {1, 3} and ranks["page"] == {2} and ranks["tag"] == ranks["word"]
        assert not ranks["user"] & ranks["topic"]
        first_of_user |= ranks["user"]
    assert first_of_user == {1, 3}


def test_the_same_seed_draws_the_same_plans():
    request = request_of(2, 2)
    assert draw_plans(request, 5, seed=1) == draw_plans(request, 5, seed=1) != draw_plans(request, 5, seed=2)


def test_too_few_plans_are_told():
    all_pinned = {name: TableSharding(types=("row_wise",)) for name in request_of(2, 2).tables}
    with pytest.raises(ConfigError, match=r"--plans is 3, but 600 draws gave 1 distinct plans that fit on 2 ranks"):
        draw_plans(request_of(2, 2, tables=all_pinned), 3, seed=0)


def test_nothing_is_drawn_where_no_plan_fits():
    request = request_of(2, 2)
    tiny = request.cluster.host_memory_gb.model_copy(update={"value": 1e-6})
    request = request.model_copy(update={"cluster": request.cluster.model_copy(update={"host_memory_gb": tiny})})
    with pytest.raises(PlanError, match="no sharding plan fits"):
        draw_plans(request, 3, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plans", "2"], "--plans is 2, but must be at least 3"),
        (["--repeats", "1"], "--repeats is 1, but must be at least 2"),
        (["--nproc", "1"], "--nproc is 1, but on one rank all plans are the same"),
        (["--local-batch", "5000"], "--local-batch is 5000, but must be at most 4096"),
        (["--seed", "-1"], "--seed is -1, but must be 0 or more"),
        (["--cluster", "FOUR"], "has 4 cpu ranks, but 2 cpu ranks train here"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, arguments, message):
    four = tmp_path / "four.yaml"
    four.write_text(yaml.safe_dump(this_cluster(4, 4, "cpu").model_dump(mode="json", exclude_defaults=True)))
    parser = argparse.ArgumentParser()
    truth.add_arguments(parser)
    args = parser.parse_args([str(four) if a == "FOUR" else a for a in arguments])
    with pytest.raises(ConfigError, match=message):
        truth.run(args, Console(quiet=True))


def test_a_runs_time_is_the_median_step_of_the_slowest_rank_and_goes_to_its_plan():
    by_rank = [
        [PlanRun([1.0, 9.0, 2.0], {}), PlanRun([20.0, 20.0, 20.0], {}), *[PlanRun([i] * 3, {}) for i in (30.0, 40.0)]],
        [PlanRun([3.0, 1.0, 4.0], {}), PlanRun([10.0, 10.0, 10.0], {}), *[PlanRun([5.0] * 3, {}) for _ in range(2)]],
    ]
    assert repeat_ms(by_rank, [1, 0, 0, 1], 2).tolist() == [[20.0, 4.0], [30.0, 40.0]]


def test_agreement_of_known_orders():
    up = list(range(12))
    same = agreement(up, [10 * x for x in up], 0)
    assert (same.tau, same.low, same.high) == pytest.approx((1, 1, 1)) and same.p_value < 1e-6
    reversed_ = agreement(up, up[::-1], 0)
    assert (reversed_.tau, reversed_.low, reversed_.high) == pytest.approx((-1, -1, -1))
    one_swap = agreement(up, [1, 0, *up[2:]], 0)
    assert one_swap.tau == pytest.approx(1 - 2 / math.comb(12, 2)) and one_swap.low < one_swap.tau < 1
    noise = agreement(up, np.random.default_rng(0).random(12).tolist(), 0)
    assert noise.low < 0 < noise.high


def test_repeats_alike_agree_and_noise_takes_from_it():
    ms_P = np.arange(10.0)
    assert repeat_agreement(np.stack([ms_P, 2 * ms_P, ms_P + 1])) == pytest.approx(1)
    noisy = repeat_agreement(np.stack([ms_P, ms_P[[1, 0, *range(2, 10)]], ms_P]))
    assert noisy == pytest.approx(1 - 2 / 3 * 2 / 45)
