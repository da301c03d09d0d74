"""The plans that TorchRec's planner tries, as the search emulates them, against TorchRec's planner itself."""

import math

import pytest

from dlrm_scale.sharding.bound import choice_totals
from dlrm_scale.sharding.packing import Packing
from dlrm_scale.sharding.planner import find_plan, prepare
from dlrm_scale.sharding.torchrec_plans import torchrec_plans
from tools.benchmark.stock import stock_plan
from tools.benchmark.workloads import filled, random_request, stock_options


def best_emulated_ms(request) -> float | None:
    """The least score of all plans that the emulation places, each beating the one before."""
    prepared = prepare(request, stock_options(request))
    totals, scores = choice_totals(prepared.problem, prepared.cutter), [math.inf]
    for _, placed in torchrec_plans(prepared.problem, totals, lambda: scores[-1]):
        packing = Packing(prepared.problem, scale_ms=1.0, doublings=1)
        for unit, place in enumerate(placed):
            packing.put(unit, place)
        assert packing.overflow == 0 and packing.score_ms < scores[-1] * (1 + 1e-12)
        scores.append(packing.score_ms)
    return scores[-1] if len(scores) > 1 else None


@pytest.mark.parametrize(
    ("num_tables", "num_ranks", "workload", "fill"),
    [(12, 4, "even", 0), (26, 8, "skewed", 0), (16, 16, "skewed", 0), (12, 8, "skewed", 0.5), (12, 4, "skewed", 0.9)],
)
def test_the_emulated_plans_have_torchrecs_best_score(num_tables, num_ranks, workload, fill):
    request = random_request(num_tables, num_ranks, 1, workload)
    request = filled(request, fill) if fill else request
    theirs = min(
        (a.score_ms for a in (stock_plan(request, s, 60) for s in ("best", "default")) if a.score_ms), default=None
    )
    ours = best_emulated_ms(request)
    assert (ours is None) == (theirs is None)
    if theirs is not None:
        assert ours == pytest.approx(theirs, rel=1e-9)


def test_a_plan_is_never_worse_than_torchrecs_best_even_without_a_round_of_search():
    request = random_request(30, 8, 3, "even")
    theirs = stock_plan(request, "best", 60).score_ms
    assert find_plan(request, num_rounds=0, options=stock_options(request)).plan.score_ms <= theirs * (1 + 1e-9)
