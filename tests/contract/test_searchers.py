"""What every searcher promises: one suite over ours and those that they are held against."""

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch

from dlrm_scale.cluster import Figure
from dlrm_scale.errors import ConfigError
from dlrm_scale.tuning.ensemble import Training
from dlrm_scale.tuning.featurise import Featuriser
from dlrm_scale.tuning.knobs import Point
from dlrm_scale.tuning.model_search import KnownRuns, PredictorSearcher
from dlrm_scale.tuning.predictor import Measured, NeuralPredictor
from dlrm_scale.tuning.searcher import RandomSearcher, Result, Searcher
from tests.support.requests import cluster
from tests.support.tuning import KNOBS, PLANS, SIZE, tiny_space
from tools.benchmark.search_peers import AnalyticSearcher, TPESearcher

BUDGET = 20


def quick(seed: int) -> NeuralPredictor:
    return NeuralPredictor(seed, Training(steps=8))


SEARCHERS: dict[str, Callable[[Featuriser, int], Searcher]] = {
    "random": RandomSearcher,
    "planner alone": AnalyticSearcher,
    "tpe": TPESearcher,
    "reinforce": lambda f, seed: PredictorSearcher(f, seed, "reinforce", BUDGET, make_predictor=quick),
    "evolution": lambda f, seed: PredictorSearcher(f, seed, "evolution", BUDGET, make_predictor=quick),
}
GOES_ON = [name for name in SEARCHERS if name != "tpe"]  # Optuna's sampler keeps a state of its own


@pytest.fixture(params=SEARCHERS)
def name(request) -> str:
    torch.set_num_threads(1)
    return request.param


@pytest.fixture(scope="module")
def featuriser() -> Featuriser:
    return Featuriser(tiny_space(), PLANS)


def step_ms(point: Point) -> float:
    """Larger batches, two ranks and the pipeline pay."""
    fixed = 10 if point["pipeline"] == "none" else 8
    per_sample = 0.05 / point["ranks"] * (1.3 if point.get("user") == "row_wise" else 1.0)
    return fixed + per_sample * point["batch"]


def result_of(point: Point) -> Result:
    """The largest batch does not fit, and one kind of run is killed."""
    if point["batch"] == 512:
        return Result("does not fit", reason="out of memory")
    if point.get("user") == "table_wise":
        return Result("failed", reason="rank 1 was ended by SIGKILL")
    return Result("ok", step_ms(point))


def launches(searcher: Searcher, rounds: int, k: int = 2) -> list[Point]:
    asked = []
    for _ in range(rounds):
        points = searcher.ask(k)
        asked += points
        for point in points:
            searcher.tell(point, result_of(point))
    return asked


def test_it_asks_for_new_points_of_the_space(name, featuriser):
    asked, space = launches(SEARCHERS[name](featuriser, 0), rounds=6, k=2), featuriser.space
    assert len(asked) == len(set(asked)) == 12
    assert all(space.point(point) == point for point in asked)


def test_what_is_under_way_is_not_asked_for_again(name, featuriser):
    searcher = SEARCHERS[name](featuriser, 1)
    first, second = searcher.ask(3), searcher.ask(3)
    assert len(set(first) | set(second)) == 6


def test_a_space_is_used_up_without_repeats(name, featuriser):
    searcher = SEARCHERS[name](featuriser, 2)
    asked = launches(searcher, rounds=5, k=7)
    assert len(asked) == len(set(asked)) == SIZE
    assert searcher.ask(4) == []


@pytest.mark.parametrize("name", ["random", "reinforce", "evolution"])
def test_it_keeps_to_what_is_allowed_and_learns_from_all(name, featuriser):
    """The fastest batch is ruled out half way: it is not launched again, and no longer the best."""
    torch.set_num_threads(1)
    searcher = SEARCHERS[name](featuriser, 3)
    for point in searcher.ask(8):
        searcher.tell(point, Result("ok", step_ms(point)))
    searcher.allows = lambda point: point["batch"] == 64
    asked = searcher.ask(6)
    assert len(asked) == 6 and {point["batch"] for point in asked} == {64}
    for point in asked:
        searcher.tell(point, Result("ok", step_ms(point)))
    assert searcher.best_cost == pytest.approx(min(step_ms(p) for p, _ in searcher.told if p["batch"] == 64) / 64)


def test_the_same_seed_asks_the_same(name, featuriser):
    one, two = (
        launches(SEARCHERS[name](Featuriser(featuriser.space, featuriser.plans), 3), rounds=5) for _ in range(2)
    )
    assert one == two


@pytest.mark.parametrize("name", [n for n in SEARCHERS if n != "planner alone"])
def test_another_seed_asks_otherwise(name, featuriser):
    assert launches(SEARCHERS[name](featuriser, 4), rounds=3) != launches(SEARCHERS[name](featuriser, 5), rounds=3)


@pytest.mark.parametrize("name", GOES_ON)
def test_a_restored_search_goes_on_as_the_unbroken_one(name, featuriser):
    """Saved with a launch under way, whose result comes to the restored one."""
    unbroken, broken = (SEARCHERS[name](featuriser, 6) for _ in range(2))
    launches(unbroken, rounds=4)
    launches(broken, rounds=4)
    [left, right] = unbroken.ask(2)
    broken.ask(2)
    text = json.dumps(broken.state(), allow_nan=False)
    restored = SEARCHERS[name](Featuriser(featuriser.space, PLANS), 6)
    restored.restore(json.loads(text))
    assert json.dumps(restored.state()) == text
    for searcher in (unbroken, restored):
        searcher.tell(right, result_of(right))
        searcher.tell(left, result_of(left))
    assert launches(restored, rounds=3) == launches(unbroken, rounds=3)


def test_the_state_of_another_search_is_refused(name, featuriser):
    state = SEARCHERS[name](featuriser, 7).state()
    with pytest.raises(ConfigError, match="seed is 7 there, 8 here"):
        SEARCHERS[name](featuriser, 8).restore(state)
    other = Featuriser(tiny_space({k: KNOBS[k] for k in ("ranks", "batch", "pipeline")}), featuriser.plans)
    with pytest.raises(ConfigError, match="space is"):
        SEARCHERS[name](other, 7).restore(state)
    with pytest.raises(ConfigError, match="kind is"):
        SEARCHERS["random" if name != "random" else "evolution"](featuriser, 7).restore(state)


def test_a_point_that_was_not_asked_for_may_be_told(name, featuriser):
    searcher = SEARCHERS[name](featuriser, 9)
    told = [point for point in featuriser.space.enumerate() if point["batch"] == 64]
    for point in told:
        searcher.tell(point, result_of(point))
    asked = launches(searcher, rounds=2)
    assert len(asked) == 4 and not set(asked) & set(told)


@pytest.mark.parametrize("outcome", ["does not fit", "failed"])
def test_it_goes_on_when_every_launch_fails(name, featuriser, outcome):
    searcher, asked = SEARCHERS[name](featuriser, 10), []
    for _ in range(5):
        for point in searcher.ask(2):
            searcher.tell(point, Result(outcome, reason="killed"))
            asked.append(point)
    assert len(set(asked)) == 10


def test_what_the_planner_refuses_is_never_asked_for(name):
    room = cluster("cpu", 2, 2).model_copy(update={"host_memory_gb": Figure(value=2.5e-4, source="test")})
    featuriser = Featuriser(tiny_space(machines=room), PLANS)
    points = list(featuriser.space.enumerate())
    refused = {points[i] for i in featuriser(points).reasons}
    searcher = SEARCHERS[name](featuriser, 11)
    asked = launches(searcher, rounds=4, k=4)
    assert refused and not refused & set(asked) and len(asked) == min(16, SIZE - len(refused))


def test_it_is_asked_for_one_point_at_least(name, featuriser):
    with pytest.raises(ConfigError, match="not 0"):
        SEARCHERS[name](featuriser, 0).ask(0)


@pytest.mark.parametrize(
    ("outcome", "ms"), [("ok", None), ("ok", float("nan")), ("ok", 0.0), ("failed", 3.0), ("lost", None)]
)
def test_a_result_without_sense_is_refused(outcome, ms):
    with pytest.raises(ConfigError, match="outcome"):
        Result(outcome, ms)


@pytest.mark.parametrize("name", ["reinforce", "evolution"])
def test_a_history_spares_the_first_launches(name, featuriser):
    """All but the best points are known, with times that the analytic model does not see."""
    points = [p for p in featuriser.space.enumerate() if p["batch"] < 256]
    table = featuriser(points).table
    times = np.array([step_ms(p) for p in points])
    history = KnownRuns(table, Measured(times, np.ones(len(points), dtype=bool), np.zeros(len(points), dtype=int)))
    make = PredictorSearcher(
        featuriser, 12, name, BUDGET, history, lambda seed: NeuralPredictor(seed, Training(steps=60))
    )
    assert all(point["batch"] >= 256 for point in make.ask(3))
    with pytest.raises(ConfigError, match="history is"):
        PredictorSearcher(featuriser, 12, name, BUDGET).restore(make.state())
