"""What every predictor promises: one suite over ours and those that it is held against."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from dlrm_scale.tuning.ensemble import Training
from dlrm_scale.tuning.features import FeatureTable
from dlrm_scale.tuning.predictor import AnalyticPredictor, Measured, NeuralPredictor, Predictor
from tests.support.tuning import random_table, true_step_ms
from tools.benchmark.predictor_peers import BoostingPredictor, RidgePredictor

PREDICTORS: dict[str, Callable[[int], Predictor]] = {
    "analytic": lambda seed: AnalyticPredictor(),
    "neural": lambda seed: NeuralPredictor(seed, Training(steps=25)),
    "linear": RidgePredictor,
    "boosting": lambda seed: BoostingPredictor(seed, rounds=15),
}


@pytest.fixture(params=PREDICTORS)
def make(request) -> Callable[[int], Predictor]:
    torch.set_num_threads(1)
    return PREDICTORS[request.param]


def measured(table: FeatureTable, seed: int = 0, num_misfits: int = 0) -> Measured:
    rng = np.random.default_rng(seed)
    step_ms, fits = (
        true_step_ms(table) * np.exp(0.02 * rng.standard_normal(len(table))),
        np.ones(len(table), dtype=bool),
    )
    fits[np.argsort(-table.fill_N3.sum(1))[:num_misfits]] = False
    return Measured(np.where(fits, step_ms, np.nan), fits, np.zeros(len(table), dtype=int))


def infeasible(table: FeatureTable, row: int) -> FeatureTable:
    parts = [
        getattr(table, name).copy() for name in ("terms_NK", "extras_NE", "inputs_NF", "global_batch_N", "fill_N3")
    ]
    for part in parts:
        part[row] = np.nan
    return FeatureTable(*parts)


def test_without_data_it_is_the_analytic_model(make):
    table, predictor = random_table(50, 0), make(0)
    for fitted in (False, True):
        if fitted:
            predictor.fit(table.take(np.arange(0)), measured(table.take(np.arange(0))))
        prediction = predictor.predict(table)
        np.testing.assert_allclose(prediction.log_ms_N, np.log(table.analytic_ms_N), rtol=1e-12)
        assert (prediction.spread_N >= 0.5).all()  # and it says that it does not know


@pytest.mark.parametrize("num_runs", [1, 2, 7, 60])
def test_any_number_of_runs_will_do(make, num_runs):
    table, predictor = random_table(num_runs, 1), make(0)
    predictor.fit(table, measured(table))
    prediction = predictor.predict(random_table(40, 2))
    assert np.isfinite(prediction.log_ms_N).all() and (prediction.spread_N > 0).all()
    assert ((prediction.fits_N >= 0) & (prediction.fits_N <= 1)).all()
    low, high = prediction.interval()
    assert (low < high).all() and prediction.log_ms_MN.shape[1] == 40


def test_rows_are_predicted_by_themselves(make):
    table, predictor = random_table(60, 3), make(0)
    predictor.fit(table, measured(table, num_misfits=8))
    order = np.random.default_rng(0).permutation(60)
    whole, shuffled = predictor.predict(table), predictor.predict(table.take(order))
    np.testing.assert_allclose(shuffled.log_ms_N, whole.log_ms_N[order], rtol=1e-4)
    np.testing.assert_allclose(shuffled.fits_N, whole.fits_N[order], atol=1e-4)


def test_the_same_seed_and_runs_give_the_same_answer(make):
    table = random_table(40, 4)
    answers = []
    for _ in range(2):
        predictor = make(5)
        predictor.fit(random_table(9, 9), measured(random_table(9, 9)))  # forgotten by the next fit
        predictor.fit(table, measured(table))
        answers.append(predictor.predict(random_table(20, 6)))
    np.testing.assert_array_equal(answers[0].log_ms_N, answers[1].log_ms_N)
    np.testing.assert_array_equal(answers[0].spread_N, answers[1].spread_N)


def test_what_the_planner_refuses_never_fits_and_harms_no_other_row(make):
    table, predictor = infeasible(random_table(40, 7), row=3), make(0)
    predictor.fit(table, measured(random_table(40, 7)))
    prediction = predictor.predict(table)
    assert prediction.fits_N[3] == 0 and np.isnan(prediction.log_ms_N[3])
    assert np.isfinite(np.delete(prediction.log_ms_N, 3)).all()


def test_when_nothing_fitted_times_are_those_of_the_analytic_model(make):
    table, predictor = random_table(12, 8), make(0)
    predictor.fit(table, measured(table, num_misfits=12))
    np.testing.assert_allclose(predictor.predict(table).log_ms_N, np.log(table.analytic_ms_N))
