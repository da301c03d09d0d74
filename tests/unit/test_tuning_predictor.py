"""Our predictor: what it learns, how sure it says it is, and that it is saved whole."""

import time

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from dlrm_scale.errors import ConfigError
from dlrm_scale.tuning import predictor as module
from dlrm_scale.tuning.ensemble import Ensemble, Inputs
from dlrm_scale.tuning.features import EXTRAS, FEATURE_VERSION, INPUTS, TERMS
from dlrm_scale.tuning.predictor import Measured, NeuralPredictor
from tests.support.tuning import random_table, true_step_ms

NOISE = 0.05


def runs(num_runs: int, seed: int, noise: float = NOISE):
    table = random_table(num_runs, seed)
    fits = table.fill_N3.sum(1) < 0.7  # the planner allows 1
    step_ms = true_step_ms(table) * np.exp(noise * np.random.default_rng(seed).standard_normal(num_runs))
    return table, Measured(np.where(fits, step_ms, np.nan), fits, np.zeros(num_runs, dtype=int))


@pytest.fixture(scope="module")
def fitted() -> NeuralPredictor:
    predictor = NeuralPredictor(seed=1)
    predictor.fit(*runs(80, 0))
    return predictor


def test_an_untrained_network_is_the_analytic_model():
    table = random_table(30, 0)
    ensemble = Ensemble(3, len(TERMS), len(EXTRAS), len(INPUTS), 8, torch.Generator().manual_seed(0))
    arrays = (table.terms_NK, table.extras_NE, table.inputs_NF, np.log(table.global_batch_N), table.fill_N3)
    log_ms_MN, logit_MN = ensemble(Inputs(*(torch.from_numpy(a.astype(np.float32)) for a in arrays)))
    for member, logit in zip(log_ms_MN, logit_MN, strict=True):
        np.testing.assert_allclose(member.detach().numpy(), np.log(table.analytic_ms_N), atol=1e-5)
        np.testing.assert_array_equal(logit.detach().numpy() > 0, table.fill_N3.sum(1) < 1)


def test_it_learns_costs_that_the_analytic_model_leaves_out(fitted):
    table, truth = random_table(200, 5), true_step_ms(random_table(200, 5))
    prediction = fitted.predict(table)
    error = np.abs(np.exp(prediction.log_ms_N) / truth - 1)
    before = np.abs(table.analytic_ms_N / truth - 1)
    assert np.median(before) > 0.3 and np.median(error) < 0.06
    cost, predicted = truth / table.global_batch_N, prediction.log_ms_N - np.log(table.global_batch_N)
    assert (
        kendalltau(cost, predicted).statistic
        > 0.9
        > kendalltau(cost, table.analytic_ms_N / table.global_batch_N).statistic
    )


def test_nine_in_ten_measurements_lie_in_the_interval(fitted):
    """New runs with the noise of the old ones."""
    table, measured = runs(400, 6)
    low, high = fitted.predict(table).interval()
    inside = ((low <= measured.step_ms_N) & (measured.step_ms_N <= high))[measured.fits_N]
    assert 0.84 <= inside.mean() <= 0.99
    assert np.median(high / low) < 1.4  # and not by being wide


def test_it_is_less_sure_of_what_it_has_not_seen(fitted):
    table = random_table(100, 7)
    far = random_table(100, 7)
    far.inputs_NF[:, INPUTS.index("skew")] = 3.0
    far.inputs_NF[:, INPUTS.index("log_accumulate")] = 6.0
    assert np.median(fitted.predict(far).spread_N) > 1.2 * np.median(fitted.predict(table).spread_N)


def test_members_are_spread_as_far_as_the_interval_says(fitted):
    prediction = fitted.predict(random_table(50, 8))
    np.testing.assert_allclose(prediction.log_ms_MN.std(0), prediction.spread_N, rtol=1e-3)
    np.testing.assert_allclose(prediction.log_ms_MN.mean(0), prediction.log_ms_N, atol=1e-9)


def test_it_learns_that_memory_is_short_before_the_planner_says_so(fitted):
    table, measured = runs(300, 9)
    expected = fitted.predict(table).fits_N >= 0.5
    assert (~measured.fits_N).sum() > 20 and (table.fill_N3.sum(1) < 1).mean() > 0.9
    assert expected[~measured.fits_N].mean() < 0.25 and expected[measured.fits_N].mean() > 0.9


def test_300_records_are_refitted_in_seconds():
    table, measured = runs(300, 10)
    started = time.process_time()
    NeuralPredictor().fit(table, measured)
    assert time.process_time() - started < 3


def test_a_saved_predictor_predicts_the_same(tmp_path, fitted):
    table = random_table(30, 11)
    fitted.save(tmp_path / "predictor.pt", "abc")
    again = NeuralPredictor.load(tmp_path / "predictor.pt", "abc")
    for name in ("log_ms_MN", "spread_N", "fits_N"):
        np.testing.assert_array_equal(getattr(again.predict(table), name), getattr(fitted.predict(table), name))


def test_one_that_has_not_learned_is_saved_too(tmp_path):
    NeuralPredictor().save(tmp_path / "p.pt", "none")
    table = random_table(5, 0)
    np.testing.assert_allclose(
        NeuralPredictor.load(tmp_path / "p.pt").predict(table).log_ms_N, np.log(table.analytic_ms_N)
    )


def test_another_feature_version_or_other_records_are_refused(tmp_path, fitted, monkeypatch):
    path = tmp_path / "predictor.pt"
    fitted.save(path, "abc")
    with pytest.raises(ConfigError, match="learned from records abc, but these are def"):
        NeuralPredictor.load(path, "def")
    monkeypatch.setattr(module, "FEATURE_VERSION", 99)
    with pytest.raises(ConfigError, match=f"feature version {FEATURE_VERSION}, but this code has 99"):
        NeuralPredictor.load(path)


@pytest.mark.parametrize("content", [b"", b"not a predictor"])
def test_a_file_that_is_no_predictor_is_refused(tmp_path, content):
    (tmp_path / "p.pt").write_bytes(content)
    with pytest.raises(ConfigError, match="no saved predictor"):
        NeuralPredictor.load(tmp_path / "p.pt")
    with pytest.raises(ConfigError, match="cannot read the predictor"):
        NeuralPredictor.load(tmp_path / "none.pt")
