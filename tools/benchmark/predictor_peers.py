"""What our predictor is held against: ridge regression and gradient boosting, both of the residual over the analytic model."""

import numpy as np

from dlrm_scale.tuning.features import FeatureTable
from dlrm_scale.tuning.predictor import NORMAL_QUANTILE, Measured, Prediction, analytic

NUM_FOLDS, PENALTY = 5, 3.0
LEAST_BOOSTED = 10


class _Residual:
    """Fits log(measured / analytic) on the same inputs as ours; its spread is that of the errors on folds left out."""

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.model, self.classes, self.spread = seed, None, None, 0.0

    def fit(self, table: FeatureTable, measured: Measured) -> None:
        known = table.feasible_N & measured.fits_N
        self.model = self.classes = None
        if known.sum() < LEAST_BOOSTED:
            return
        x, y = table.inputs_NF[known], np.log(measured.step_ms_N[known] / table.analytic_ms_N[known])
        folds = np.random.default_rng(self.seed).permutation(len(y)) % NUM_FOLDS
        errors = np.concatenate(
            [
                y[folds == k] - self._fitted(x[folds != k], y[folds != k]).predict(x[folds == k])
                for k in range(NUM_FOLDS)
            ]
        )
        self.spread = float(np.quantile(np.abs(errors), 0.9)) / NORMAL_QUANTILE
        self.model = self._fitted(x, y)
        feasible = table.feasible_N
        if (~measured.fits_N[feasible]).sum() >= 3:
            self.classes = self._classes(table.inputs_NF[feasible], measured.fits_N[feasible])

    def predict(self, table: FeatureTable) -> Prediction:
        prior = analytic(table)
        if self.model is None:
            return prior
        feasible = table.feasible_N
        log_ms_N = prior.log_ms_N.copy()
        log_ms_N[feasible] += self.model.predict(table.inputs_NF[feasible])
        fits_N = prior.fits_N.copy()
        if self.classes is not None:
            fits_N[feasible] = self.classes.predict_proba(table.inputs_NF[feasible])[:, 1]
        return Prediction(log_ms_N[None], log_ms_N, np.full(len(table), self.spread), fits_N)


class RidgePredictor(_Residual):
    def _fitted(self, x, y):
        from sklearn.linear_model import Ridge
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        return make_pipeline(StandardScaler(), Ridge(PENALTY)).fit(x, y)

    def _classes(self, x, fits):
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        return make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(x, fits)


class BoostingPredictor(_Residual):
    def __init__(self, seed: int = 0, rounds: int = 150) -> None:
        super().__init__(seed)
        self.rounds = rounds

    def _fitted(self, x, y):
        from sklearn.ensemble import HistGradientBoostingRegressor

        return HistGradientBoostingRegressor(
            max_iter=self.rounds, min_samples_leaf=5, learning_rate=0.08, random_state=self.seed, early_stopping=False
        ).fit(x, y)

    def _classes(self, x, fits):
        from sklearn.ensemble import HistGradientBoostingClassifier

        return HistGradientBoostingClassifier(
            max_iter=self.rounds, min_samples_leaf=5, random_state=self.seed, early_stopping=False
        ).fit(x, fits)
