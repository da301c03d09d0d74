"""Predicts a step's time, and whether a run fits, from features; says how sure it is.

predictor = NeuralPredictor(seed=0); predictor.fit(table, Measured(...)); predictor.predict(other_table)
"""

# N rows  M members
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dlrm_scale.errors import ConfigError
from dlrm_scale.tuning.ensemble import FITS_SHARPNESS, Ensemble, Inputs, Targets, Training, train
from dlrm_scale.tuning.features import EXTRAS, FEATURE_VERSION, INPUTS, TERMS, FeatureTable

NUM_MEMBERS, NUM_FOLDS, HIDDEN = 20, 5, 32
COVERAGE, NORMAL_QUANTILE = 0.9, 1.645
PRIOR_SPREAD = 1.0  # of the logarithm of the analytic time, with no data: a factor of e either way
LEAST_SPREAD = 0.02
CLIP = 4.0  # standardised inputs beyond it were hardly seen


@dataclass(frozen=True)
class Measured:
    """Of the rows of a table. `step_ms_N` is NaN where the run did not fit; `group_N` numbers the workloads."""

    step_ms_N: np.ndarray
    fits_N: np.ndarray
    group_N: np.ndarray


@dataclass(frozen=True)
class Prediction:
    """`log_ms_MN`: one row a member, spread as far apart as the errors found; its mean and deviation are the other two."""

    log_ms_MN: np.ndarray
    log_ms_N: np.ndarray
    spread_N: np.ndarray
    fits_N: np.ndarray  # probability

    def interval(self) -> tuple[np.ndarray, np.ndarray]:
        """The middle 90 %, in milliseconds."""
        half = NORMAL_QUANTILE * self.spread_N
        return np.exp(self.log_ms_N - half), np.exp(self.log_ms_N + half)


class Predictor(Protocol):
    def fit(self, table: FeatureTable, measured: Measured) -> None:
        """Learns anew from these runs alone; none is allowed."""
        ...

    def predict(self, table: FeatureTable) -> Prediction:
        """Rows that the planner has no plan for are NaN, with no chance of fitting."""
        ...


class AnalyticPredictor:
    """The analytic model as it is: learns nothing."""

    def fit(self, table: FeatureTable, measured: Measured) -> None:
        pass

    def predict(self, table: FeatureTable) -> Prediction:
        return analytic(table)


def analytic(table: FeatureTable) -> Prediction:
    log_ms_N = np.log(table.analytic_ms_N)
    logit_N = FITS_SHARPNESS * (1 - table.fill_N3.sum(1))
    spread_N = np.full(len(table), PRIOR_SPREAD)
    return Prediction(log_ms_N[None], log_ms_N, spread_N, _fits_probability(table, logit_N))


class NeuralPredictor:
    """An ensemble (see ensemble.py), each member trained without one fold of the runs; from the errors on what members did
    not see comes the spread. With no data it is the analytic model."""

    def __init__(self, seed: int = 0, training: Training | None = None) -> None:
        self.seed, self.training = seed, training or Training()
        self.ensemble: Ensemble | None = None
        self.mean_F = self.scale_F = np.zeros(len(INPUTS))
        self.scale_E = np.ones(len(EXTRAS))
        self.floor, self.stretch = 0.0, 1.0

    def fit(self, table: FeatureTable, measured: Measured) -> None:
        known = np.flatnonzero(table.feasible_N)
        table, fits_N, group_N = table.take(known), measured.fits_N[known], measured.group_N[known]
        step_ms_N = measured.step_ms_N[known]
        if not len(known) or not fits_N.any():  # nothing was timed; that all failed is no news of times
            self.ensemble = None
            return
        generator = torch.Generator().manual_seed(self.seed)
        self._scale(table, fits_N, step_ms_N)
        ensemble = Ensemble(NUM_MEMBERS, len(TERMS), len(EXTRAS), len(INPUTS), HIDDEN, generator)
        log_ms_N = np.where(fits_N, np.log(np.where(fits_N, step_ms_N, 1.0)), 0.0)
        x, y = self._inputs(table), Targets(*map(torch.from_numpy, (log_ms_N.astype(np.float32), fits_N, group_N)))
        folds_N = _folds(group_N, np.random.default_rng(self.seed))
        unseen_MN = torch.from_numpy(np.arange(NUM_MEMBERS)[:, None] % NUM_FOLDS == folds_N[None])
        train(ensemble, x, y, (~unseen_MN).float(), self.training, generator)
        self.ensemble = ensemble
        with torch.no_grad():
            log_ms_MN = ensemble(x)[0].double().numpy()
        self._calibrate(log_ms_MN[:, fits_N], log_ms_N[fits_N], unseen_MN.numpy()[:, fits_N])

    def _scale(self, table: FeatureTable, fits_N: np.ndarray, step_ms_N: np.ndarray) -> None:
        """An extra is worth a typical part of a step where its price is 1."""
        self.mean_F = table.inputs_NF.mean(0)
        self.scale_F = np.maximum(table.inputs_NF.std(0), 0.05)
        self.scale_E = np.median(step_ms_N[fits_N]) / np.maximum(table.extras_NE.mean(0), 1e-9)

    def _inputs(self, table: FeatureTable) -> Inputs:
        inputs_NF = np.clip((table.inputs_NF - self.mean_F) / self.scale_F, -CLIP, CLIP)
        arrays = (
            table.terms_NK,
            table.extras_NE * self.scale_E,
            inputs_NF,
            np.log(table.global_batch_N),
            table.fill_N3,
        )
        return Inputs(*(torch.from_numpy(a.astype(np.float32)) for a in arrays))

    def _calibrate(self, log_ms_MN: np.ndarray, log_ms_N: np.ndarray, unseen_MN: np.ndarray) -> None:
        """A floor and a factor for the members' deviation, so that 90 % of the errors on unseen runs lie within."""
        count_N = unseen_MN.sum(0)
        mean_N = (log_ms_MN * unseen_MN).sum(0) / count_N
        error_N = np.abs(mean_N - log_ms_N)
        deviation_N = np.sqrt((np.square(log_ms_MN - mean_N) * unseen_MN).sum(0) / count_N)
        self.floor = max(LEAST_SPREAD, 0.5 * float(np.median(error_N)))
        ratio_N = error_N / np.hypot(deviation_N, self.floor)
        # the quantile of few errors is itself unsure: the finite-sample one of conformal prediction
        part = min(1.0, COVERAGE * (1 + 1 / len(ratio_N)))
        self.stretch = max(0.5, float(np.quantile(ratio_N, part)) / NORMAL_QUANTILE)

    def predict(self, table: FeatureTable) -> Prediction:
        if self.ensemble is None:
            return analytic(table)
        with torch.no_grad():
            log_ms_MN, logit_MN = (a.double().numpy() for a in self.ensemble(self._inputs(table)))
        mean_N = log_ms_MN.mean(0)
        spread_N = self.stretch * np.hypot(_deviation(log_ms_MN), self.floor)
        apart_MN = (log_ms_MN - mean_N) * (spread_N / np.maximum(log_ms_MN.std(0), 1e-9))
        return Prediction(mean_N + apart_MN, mean_N, spread_N, _fits_probability(table, logit_MN.mean(0)))

    def save(self, path: str | Path, records: str) -> None:
        """`records`: the fingerprint of what it learned from."""
        state = None if self.ensemble is None else self.ensemble.state_dict()
        numbers = {name: getattr(self, name) for name in ("floor", "stretch", "seed")}
        arrays = {name: torch.from_numpy(getattr(self, name)) for name in ("mean_F", "scale_F", "scale_E")}
        parts = {"feature_version": FEATURE_VERSION, "features": [*TERMS, *EXTRAS, *INPUTS], "records": records}
        torch.save({**parts, "state": state, "numbers": numbers, "arrays": arrays}, path)

    @staticmethod
    def load(path: str | Path, records: str | None = None) -> "NeuralPredictor":
        """`records`: if given, it must have learned from just these.

        Raises:
            ConfigError: no such file, no predictor, of another feature version, or of other records.
        """
        saved = _read(path)
        if (saved["feature_version"], saved["features"]) != (FEATURE_VERSION, [*TERMS, *EXTRAS, *INPUTS]):
            raise ConfigError(
                f"{path} is of feature version {saved['feature_version']}, but this code has {FEATURE_VERSION}; fit it anew from its records"
            )
        if records is not None and saved["records"] != records:
            raise ConfigError(
                f"{path} learned from records {saved['records']}, but these are {records}; fit it anew, or name the records it is of"
            )
        predictor = NeuralPredictor(saved["numbers"]["seed"])
        predictor.floor, predictor.stretch = saved["numbers"]["floor"], saved["numbers"]["stretch"]
        for name, tensor in saved["arrays"].items():
            setattr(predictor, name, tensor.numpy())
        if saved["state"] is not None:
            sizes = NUM_MEMBERS, len(TERMS), len(EXTRAS), len(INPUTS), HIDDEN
            predictor.ensemble = Ensemble(*sizes, torch.Generator())
            predictor.ensemble.load_state_dict(saved["state"])
        return predictor


def _read(path: str | Path) -> dict[str, Any]:
    try:
        saved = torch.load(path, weights_only=True)
        if isinstance(saved, dict) and "feature_version" in saved:
            return saved
    except OSError as e:
        raise ConfigError(f"cannot read the predictor {path}: {e.strerror}") from None
    except Exception as e:  # torch.load raises what the bytes happen to break
        raise ConfigError(f"{path} is no saved predictor ({type(e).__name__}); fit one from records") from None
    raise ConfigError(f"{path} is no saved predictor; fit one from records")


def _folds(group_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N,) fold of each run: whole workloads where there are enough, since the next one may be new; else single runs."""
    groups = np.unique(group_N)
    if len(groups) >= NUM_FOLDS:
        fold_of = dict(zip(groups.tolist(), (rng.permutation(len(groups)) % NUM_FOLDS).tolist(), strict=True))
        return np.array([fold_of[g] for g in group_N.tolist()])
    return rng.permutation(len(group_N)) % NUM_FOLDS


def _deviation(log_ms_MN: np.ndarray) -> np.ndarray:
    """(N,) of members that learned from the same runs: what calibration can see, too, since of a run that was left out it has those
    members alone. Between folds they differ more."""
    return np.sqrt(log_ms_MN.reshape(-1, NUM_FOLDS, log_ms_MN.shape[1]).var(0).mean(0))


def _fits_probability(table: FeatureTable, logit_N: np.ndarray) -> np.ndarray:
    return np.where(table.feasible_N, 1 / (1 + np.exp(-logit_N)), 0.0)
