"""The benchmarks of predictors and searchers: scores by hand, and what they refuse."""

import argparse
import json
from itertools import pairwise

import numpy as np
import pytest
from rich.console import Console

from dlrm_scale.errors import ConfigError
from dlrm_scale.tuning.featurise import Featuriser
from dlrm_scale.tuning.predictor import Prediction
from dlrm_scale.tuning.records import History
from dlrm_scale.tuning.scores import scores
from dlrm_scale.tuning.searcher import RandomSearcher
from tests.support.tuning import PLANS, random_table, tiny_space, true_step_ms
from tools.benchmark import predictor as predictor_benchmark
from tools.benchmark import search as search_benchmark
from tools.benchmark.__main__ import main
from tools.benchmark.search import Replay, _launches_until, search


def prediction(log_ms_N: np.ndarray, spread: float = 0.1, fits_N: np.ndarray | None = None) -> Prediction:
    spread_N = np.full(len(log_ms_N), spread)
    return Prediction(log_ms_N[None], log_ms_N, spread_N, np.ones(len(log_ms_N)) if fits_N is None else fits_N)


def test_a_perfect_prediction_has_perfect_scores():
    table = random_table(60, 0)
    truth = true_step_ms(table)
    found = scores(prediction(np.log(truth)), table, truth, np.ones(60, dtype=bool))
    assert [found[name] for name in ("tau", "tau_top", "coverage")] == pytest.approx([1, 1, 1])
    assert found["mape"] == pytest.approx(0) and found["regret_1"] == found["regret_10"] == 0
    assert np.isnan(found["false_fits"])


def test_a_prediction_that_is_upside_down_has_the_worst():
    table = random_table(60, 1)
    truth = true_step_ms(table)
    cost = truth / table.global_batch_N
    upside_down = np.log(table.global_batch_N) - np.log(cost)
    found = scores(prediction(upside_down, 1e-6), table, truth, np.ones(60, dtype=bool))
    assert found["tau"] == pytest.approx(-1) and found["coverage"] == 0
    assert found["regret_1"] == pytest.approx(cost.max() / cost.min() - 1)


def test_what_is_put_first_but_does_not_fit_is_no_gain():
    table = random_table(60, 2)
    truth = true_step_ms(table)
    order = np.argsort(truth / table.global_batch_N)
    fits = np.ones(60, dtype=bool)
    fits[order[:1]] = False
    step_ms, cost = np.where(fits, truth, np.nan), np.where(fits, truth / table.global_batch_N, np.nan)
    blind = scores(prediction(np.log(truth)), table, step_ms, fits)
    warned = scores(prediction(np.log(truth), fits_N=np.where(fits, 1.0, 1e-3)), table, step_ms, fits)
    assert blind["false_fits"] == 1 and blind["regret_1"] == pytest.approx(np.nanmedian(cost) / np.nanmin(cost) - 1)
    assert warned["false_fits"] == 0 and warned["regret_1"] == 0 == blind["regret_5"]


@pytest.fixture(scope="module")
def replay() -> Replay:
    """A step takes as long as its batch is large, and one sample less on two ranks."""
    featuriser = Featuriser(tiny_space(), PLANS)
    points = list(featuriser.space.enumerate())
    step_ms = {p: np.nan if p["batch"] == 512 else 1.0 + p["batch"] / p["ranks"] for p in points}
    return Replay(
        "hand made",
        featuriser,
        step_ms,
        {p: ms / p["batch"] for p, ms in step_ms.items()},
        {p: [ms] for p, ms in step_ms.items()},
    )


def test_regret_falls_to_nothing_when_all_was_launched(replay):
    regret = search(RandomSearcher(replay.featuriser, 0), replay, launches=40, parallel=3, seed=0)
    assert len(regret) == 40 and all(a >= b for a, b in pairwise(regret))
    assert regret[-1] == 0 and regret[0] > 0
    assert replay.best == (1 + 256 / 2) / 256


@pytest.mark.parametrize(("regret", "until"), [([0.5, 0.1, 0.02], 3), ([0.0, 0.0], 1), ([0.5, 0.3], np.inf)])
def test_launches_until_near_the_best(regret, until):
    assert _launches_until(np.array(regret), 0.02) == until


def search_arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    search_benchmark.add_arguments(parser)
    return parser.parse_args(argv)


def test_a_table_of_too_few_runs_is_refused(tmp_path, monkeypatch, replay):
    monkeypatch.setattr(search_benchmark, "load_space", lambda path: replay.featuriser.space)
    monkeypatch.setattr(search_benchmark, "of_one_kind", lambda paths: History((), ()))
    with pytest.raises(ConfigError, match="0 of the 32 points"):
        search_benchmark.run(search_arguments("--records", "r.jsonl", "--space", "s.yaml"), Console(quiet=True))


def test_records_without_their_space_are_refused(capsys):
    assert main(["search", "--records", "r.jsonl"]) == 2
    assert "--records and --space go together" in capsys.readouterr().err


def test_one_workload_cannot_be_split_by_workload(monkeypatch, tmp_path, capsys):
    from tools.benchmark.tuning_workloads import MeasuredRuns

    table = random_table(30, 3)
    runs = MeasuredRuns("one", table, true_step_ms(table), np.ones(30, dtype=bool))
    monkeypatch.setattr(predictor_benchmark, "measured_runs", lambda paths, plans: [runs])
    monkeypatch.setattr(predictor_benchmark, "_cost", lambda data: {})  # of 300 records and 10,000 rows
    sizes = ["--sizes", "0", "12", "--seeds", "1", "--predictors", "analytic", "ours"]
    assert main(["predictor", "--records", "r.jsonl", *sizes]) == 2
    assert "set --by-row" in capsys.readouterr().err
    assert main(["predictor", "--records", "r.jsonl", "--by-row", "--json", *sizes]) == 0
    result = json.loads(capsys.readouterr().out)
    mape = {(c["records"], c["predictor"]): c["mape"]["mean"] for c in result["cells"]}
    assert mape[0, "ours"] == pytest.approx(mape[0, "analytic"]) and mape[12, "ours"] < 0.5 * mape[12, "analytic"]
