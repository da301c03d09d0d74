"""The planner's search against exact optima, its bound against both, and the rules it must keep."""

import numpy as np
import pytest
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.perf_models import NoopPerfModel
from torchrec.distributed.planner.stats import _calculate_critical_path
from torchrec.distributed.planner.types import ParameterConstraints

from dlrm_scale.config import SparseOptimizer, TableSharding
from dlrm_scale.errors import ConfigError, PlanError
from dlrm_scale.sharding.bound import choice_totals, lower_bound
from dlrm_scale.sharding.explain import changes, explain, packing_of
from dlrm_scale.sharding.meta_world import bare_collections
from dlrm_scale.sharding.packing import Packing, Placed
from dlrm_scale.sharding.plan import PlanRequest, save_plan
from dlrm_scale.sharding.planner import find_plan, prepare
from dlrm_scale.sharding.sharders import make_sharders
from dlrm_scale.sharding.swaps import Swapper, movable
from tools.benchmark.exact import exact_optimum
from tools.benchmark.stock import topology
from tools.benchmark.workloads import filled, random_request, stock_options

SEED = 0


def with_rules(request: PlanRequest, tables=None, **rules) -> PlanRequest:
    merged = dict(request.sharding.tables) | {n: TableSharding(**r) for n, r in (tables or {}).items()}
    return request.model_copy(update={"sharding": request.sharding.model_copy(update={"tables": merged, **rules})})


def names(request: PlanRequest) -> list[str]:
    return list(request.tables)


@pytest.mark.parametrize("objective", ["busiest_rank", "critical_path"])
@pytest.mark.parametrize("fill", [None, 0.9])
def test_search_is_near_the_exact_optimum_and_the_bound_is_below_it(fill, objective):
    ratios = []
    for seed, num_ranks in ((0, 2), (2, 2), (1, 4)):
        request = random_request(num_tables=5 if num_ranks == 2 else 4, num_ranks=num_ranks, seed=seed)
        request = with_rules(filled(request, fill) if fill else request, objective=objective)
        prepared = prepare(request)
        exact = exact_optimum(prepared.problem, seconds=20)
        bound = lower_bound(prepared.problem, choice_totals(prepared.problem, prepared.cutter))
        assert exact.is_proven
        if exact.score_ms is None:
            with pytest.raises(PlanError):
                find_plan(request, num_rounds=300)
            continue
        assert bound.impossible is None and bound.ms <= exact.score_ms * (1 + 1e-6)
        plan = find_plan(request, num_rounds=600).plan
        assert plan.score_ms >= exact.score_ms * (1 - 1e-5), "the search cannot beat the optimum: one of them is wrong"
        assert plan.bound_ms <= exact.score_ms * (1 + 1e-6)
        ratios.append(plan.score_ms / exact.score_ms)
    assert len(ratios) >= 2 and max(ratios) < 1.01, ratios


@pytest.fixture(scope="module")
def request_26():
    return random_request(num_tables=26, num_ranks=16, seed=SEED)


@pytest.fixture(scope="module")
def plan_26(request_26):
    return find_plan(request_26, num_rounds=200).plan


def test_score_is_the_busiest_rank_of_the_plan_s_own_loads(plan_26):
    sums = [sum(ms for stage, ms in load.step_ms.items() if stage != "input_dist_comms") for load in plan_26.ranks]
    assert plan_26.score_ms == pytest.approx(max(sums), rel=1e-9)
    assert 0 <= plan_26.gap < 1


@pytest.mark.parametrize("objective", ["busiest_rank", "critical_path"])
def test_score_is_torchrecs_own_rating_of_the_plan(objective):
    """Its options, with its estimates, on the ranks of our plan."""
    request = with_rules(random_request(num_tables=12, num_ranks=16, seed=3), objective=objective)
    plan = find_plan(request, num_rounds=50, options=stock_options(request)).plan
    constraints = {
        name: ParameterConstraints(
            pooling_factors=list(spec.expected_ids_by_feature.values()),
            sharding_types=[plan.tables[name].sharding_type],
            compute_kernels=[plan.tables[name].compute_kernel],
        )
        for name, spec in request.tables.items()
    }
    machines = topology(request.cluster)
    enumerator = EmbeddingEnumerator(machines, request.local_batch_size, constraints)
    options = enumerator.enumerate(bare_collections(request), make_sharders(SparseOptimizer(name="sgd"), "cuda"))
    assert len({option.sharding_type for option in options}) > 1
    for option in options:
        for shard, rank in zip(option.shards, plan.tables[option.name].ranks, strict=True):
            shard.rank = rank
    if objective == "busiest_rank":
        assert NoopPerfModel(machines).rate(options) == pytest.approx(plan.score_ms, rel=1e-9)
    else:
        assert _calculate_critical_path(options).total() == pytest.approx(plan.score_ms, rel=1e-9)


def test_same_seed_same_plan_and_no_rule_of_the_clock(request_26, plan_26):
    again = find_plan(request_26, num_rounds=200).plan
    assert again.model_dump_json() == plan_26.model_dump_json()


def test_more_rounds_are_never_worse_and_a_short_limit_is_told(request_26, plan_26):
    hurried = with_rules(request_26, search_seconds=0.01)
    planned = find_plan(hurried, num_rounds=1_000_000)
    assert planned.found.cut_short
    assert find_plan(request_26, num_rounds=300).plan.score_ms <= plan_26.score_ms * (1 + 1e-9)


def test_every_rule_on_places_is_kept(request_26):
    n = names(request_26)
    request = with_rules(
        request_26,
        tables={
            n[0]: {"types": ("table_wise",), "ranks": (3, 5)},
            n[1]: {"avoid_hosts": (0,)},
            n[2]: {"hosts": (1,), "types": ("table_row_wise",)},
            n[3]: {"types": ("table_wise",), "pin": (7,)},
            n[4]: {"types": ("table_row_wise",), "pin": tuple(range(8, 16))},
            n[5]: {"avoid_ranks": (0, 1, 2)},
        },
        together=((n[6], n[7], n[8]),),
        apart=((n[9], n[10], n[11]),),
    )
    plan = find_plan(request, num_rounds=100).plan
    at = {name: set(plan.tables[name].ranks) for name in n}
    assert at[n[0]] <= {3, 5} and len(at[n[0]]) == 1
    assert at[n[1]] <= set(range(8, 16)) and at[n[2]] == set(range(8, 16))
    assert at[n[3]] == {7} and plan.tables[n[4]].ranks == tuple(range(8, 16))
    assert not at[n[5]] & {0, 1, 2}
    assert at[n[6]] == at[n[7]] == at[n[8]] and len(at[n[6]]) == 1
    assert not (at[n[9]] & at[n[10]] or at[n[10]] & at[n[11]] or at[n[9]] & at[n[11]])


@pytest.mark.parametrize(
    ("tables", "rules", "said"),
    [
        ({"nope": {"types": ("row_wise",)}}, {}, r"sharding.tables names table nope.*table_0000"),
        ({}, {"together": (("table_0000", "nope"),)}, r"sharding.together names table nope"),
        ({}, {"apart": (("table_0000",),)}, r"sharding.apart has the group \[table_0000\]: give two"),
        ({}, {"together": (("table_0000", "table_0001"),), "apart": (("table_0001", "table_0000"),)}, r"both have tables"),
        ({"table_0000": {"pin": (99,)}}, {}, r"table_0000.pin has \[99\], but the cluster has 0 to 15"),
        ({"table_0000": {"ranks": (1,), "avoid_ranks": (1,)}}, {}, r"leave table table_0000 no rank"),
        ({"table_0000": {"ranks": (1,), "pin": (2,)}}, {}, r"pin puts a shard on rank \[2\]"),
        ({"table_0000": {"pin": (3,)}, "table_0001": {"avoid_ranks": (3,)}}, {"together": (("table_0000", "table_0001"),)}, r"pin puts it on rank \[3\], which .* together with it"),
        ({"table_0000": {"pin": (2,)}, "table_0002": {"pin": (2,)}}, {"together": (("table_0000", "table_0001"),), "apart": (("table_0001", "table_0002"),)}, r"both are pinned to rank \[2\]"),
        ({"table_0000": {"pin": (2,)}, "table_0001": {"pin": (2,)}}, {"apart": (("table_0000", "table_0001"),)}, r"both are pinned to rank \[2\]"),
        ({"table_0000": {"pin": (2,)}, "table_0001": {"pin": (3,)}}, {"together": (("table_0000", "table_0001"),)}, r"their pins are \[\[2\], \[3\]\]"),
    ],
)  # fmt: skip
def test_contradictory_rules_are_refused_with_the_values(request_26, tables, rules, said):
    with pytest.raises(ConfigError, match=said) as e:
        find_plan(with_rules(request_26, tables, **rules), num_rounds=1)
    assert e.value.exit_code == 2


def test_a_pin_that_no_option_has_and_a_row_wise_table_on_few_ranks_are_refused(request_26):
    with pytest.raises(PlanError, match=r"table_0000.pin gives 3 ranks"):
        find_plan(with_rules(request_26, {"table_0000": {"types": ("table_wise",), "pin": (1, 2, 3)}}), num_rounds=1)
    with pytest.raises(PlanError, match=r"no way is left to shard table table_0000.*row_wise.*all ranks"):
        find_plan(with_rules(request_26, {"table_0000": {"types": ("row_wise",), "ranks": (1,)}}), num_rounds=1)


def test_tables_apart_are_placed_however_few_ranks_there_are():
    request = random_request(num_tables=6, num_ranks=4, seed=5)
    n = names(request)
    plan = find_plan(with_rules(request, apart=(tuple(n[:4]),)), num_rounds=200).plan
    at = [set(plan.tables[name].ranks) for name in n[:4]]
    assert sum(map(len, at)) == len(set.union(*at))
    ruled = {n[1]: {"types": ("table_wise",), "ranks": (0,)}, n[0]: {"types": ("table_wise",)}}
    plan = find_plan(with_rules(request, ruled, apart=((n[0], n[1]),)), num_rounds=20).plan
    assert plan.tables[n[1]].ranks == (0,) and plan.tables[n[0]].ranks != (0,)
    with pytest.raises(ConfigError, match=r"keeps 5 tables apart.*has 4 ranks"):
        find_plan(with_rules(request, apart=(tuple(n[:5]),)), num_rounds=1)


def test_a_grid_on_fewer_hosts_than_column_blocks_and_a_request_that_costs_nothing():
    request = random_request(num_tables=2, num_ranks=16, seed=1)
    name = names(request)[0]
    wide = request.tables[name].model_copy(update={"embedding_dim": 256})
    rules = request.sharding.model_copy(update={"tables": {}})
    one = request.model_copy(update={"tables": {name: wide}, "sharding": rules})
    plan = find_plan(with_rules(one, {name: {"types": ("grid_shard",), "hosts": (0,)}}), num_rounds=20).plan
    assert set(plan.tables[name].ranks) == set(range(8))
    idle = wide.model_copy(update={"expected_ids_by_feature": {name: 0.0}})
    free = with_rules(one.model_copy(update={"tables": {name: idle}}), objective="critical_path")
    assert find_plan(free.model_copy(update={"sparse_optimizer": "adam"}), num_rounds=5).plan.score_ms >= 0


def test_what_does_not_fit_is_proven_or_named(request_26):
    small = request_26.cluster.model_copy(
        update={"hbm_gb": request_26.cluster.hbm_gb.model_copy(update={"value": 0.2})}
    )
    with pytest.raises(PlanError, match=r"no sharding plan fits.*at least [\d.]+ GB") as e:
        find_plan(request_26.model_copy(update={"cluster": small}), num_rounds=10)
    assert e.value.exit_code == 1


def test_keeping_close_moves_less_and_costs_no_more_than_it_saves(request_26, plan_26, tmp_path):
    save_plan(plan_26, tmp_path / "plan.json")
    grown = request_26.model_copy(update={"local_batch_size": request_26.local_batch_size * 2})
    free = find_plan(grown, seed=1, num_rounds=100).plan
    close = find_plan(
        with_rules(grown, keep_close_to=str(tmp_path / "plan.json"), churn_ms_per_gb=1e6), seed=1, num_rounds=100
    ).plan
    assert not changes(plan_26, close), "at such a price nothing may move"
    first = names(request_26)[0]
    other = {"types": ("table_wise" if plan_26.tables[first].sharding_type == "row_wise" else "row_wise",)}
    halfway = find_plan(
        with_rules(grown, {first: other}, keep_close_to=str(tmp_path / "plan.json"), churn_ms_per_gb=1e3), num_rounds=20
    ).plan
    assert changes(plan_26, halfway), "it must move"
    busiest = max(sum(ms for s, ms in load.step_ms.items() if s != "input_dist_comms") for load in halfway.ranks)
    assert halfway.score_ms == pytest.approx(busiest), "what moving costs is in the choice, not in the score"
    assert sum(c.moved_bytes for c in changes(plan_26, free)) > 0


def test_explain_puts_the_plan_back_and_prices_each_option(request_26, plan_26):
    prepared = prepare(request_26)
    assert packing_of(prepared, plan_26).score_ms == pytest.approx(plan_26.score_ms)
    table = names(request_26)[0]
    costs = explain(prepared, plan_26, table)
    assert len(costs) == len(prepared.cutter.options_of(0)) and sum(c.is_chosen for c in costs) == 1
    chosen = next(c for c in costs if c.is_chosen)
    assert chosen.sharding_type == plan_26.tables[table].sharding_type
    assert chosen.score_ms == pytest.approx(plan_26.score_ms)
    assert np.isclose(chosen.all_shards_ms, chosen.largest_shard_ms * chosen.num_shards)
    with pytest.raises(PlanError, match="no table nope"):
        explain(prepared, plan_26, "nope")


def packed(prepared, plan) -> Packing:
    packing = packing_of(prepared, plan)
    packing.sharpen(4)
    return packing


def test_swaps_lower_the_score_and_move_whole_shards_only(request_26):
    plan = find_plan(request_26, num_rounds=0).plan
    prepared = prepare(request_26)
    packing = packed(prepared, plan)
    # One shard too many on the busiest rank, so that there is something to gain
    pressed = packing.pressed_rank()
    for unit, placed in enumerate(packing.placed):
        if prepared.problem.units[unit].choices[placed.choice].scope == "rank" and pressed not in placed.places:
            packing.take(unit)
            packing.put(unit, Placed(placed.choice, (pressed, *placed.places[1:])))
            break
    before, was = packing.smooth, list(packing.placed)
    assert Swapper(prepared.problem).swap_down(packing, 5) >= 1 and packing.smooth < before
    assert [p.choice for p in packing.placed] == [p.choice for p in was]
    anew = Packing(prepared.problem, packing.scale_ms, doublings=4)
    for unit, placed in enumerate(packing.placed):
        anew.put(unit, placed)
    np.testing.assert_allclose(packing.use_KR, anew.use_KR, rtol=1e-9, atol=1e-6)


def test_swaps_leave_what_rules_bind(request_26):
    name = next(iter(request_26.tables))
    ruled = with_rules(request_26, tables={name: {"ranks": tuple(range(request_26.group.num_ranks - 1))}})
    prepared = prepare(ruled)
    swapper = Swapper(prepared.problem)
    bound = [not movable(unit) for unit in prepared.problem.units]
    assert sum(bound) == 1
    choices = [len(unit.choices) for unit in prepared.problem.units]
    at = int(np.cumsum([0, *choices])[bound.index(True)])
    for pool in swapper.pools.values():
        assert pool.count_N.any() and not pool.count_N[at : at + choices[bound.index(True)]].any()


def test_where_time_is_even_memory_is_levelled():
    """Two tables decide the time; the others, large and hardly read, could lie anywhere."""
    request = random_request(num_tables=16, num_ranks=8, seed=2)
    tables = {
        name: spec.model_copy(
            update={
                "num_embeddings": 2_000_000,
                "embedding_dim": 64,
                "expected_ids_by_feature": {name: 500.0 if i < 2 else 0.001},
            }
        )
        for i, (name, spec) in enumerate(request.tables.items())
    }
    request = request.model_copy(update={"tables": tables})
    rules = {name: {"types": ("table_wise",), "kernels": ("fused",)} for name in tables}
    plan = find_plan(with_rules(request, rules), num_rounds=100).plan
    bytes_R = np.array([load.total_device_bytes for load in plan.ranks])
    assert bytes_R.max() < 1.6 * bytes_R.mean(), (
        "16 equal tables on 8 ranks: two each, at most one more beside the hot two"
    )


def test_column_shards_may_share_a_rank_and_a_grid_s_blocks_no_host():
    request = random_request(num_tables=1, num_ranks=16, seed=1)
    name = names(request)[0]
    spec = request.tables[name].model_copy(update={"embedding_dim": 512})
    request = request.model_copy(update={"tables": {name: spec}})
    prepared = prepare(with_rules(request, {name: {"types": ("column_wise", "grid_shard"), "min_partition": 128}}))
    packing, rng = Packing(prepared.problem, scale_ms=1.0, doublings=1), np.random.default_rng(0)
    drawn = {"rank": set(), "host": set()}
    for index, choice in enumerate(prepared.problem.units[0].choices):
        if choice.num_blocks > 1:
            drawn[choice.scope] |= {
                len(set(packing.random_place(0, index, rng).places)) - choice.num_blocks for _ in range(100)
            }
    assert min(drawn["rank"]) < 0 and drawn["host"] == {0}
