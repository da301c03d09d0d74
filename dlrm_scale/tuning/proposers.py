"""Find points of low score, where a score is free: thousands of virtual launches on the predictor."""

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from dlrm_scale.tuning.knobs import Point
from dlrm_scale.tuning.space import Space

Score = Callable[[Sequence[Point]], np.ndarray]  # lower is better; infinite where a point cannot run
Scored = dict[Point, float]


def reinforce(
    space: Space,
    score: Score,
    starts: Sequence[Point],
    rng: np.random.Generator,
    rounds: int = 12,
    batch: int = 96,
    lr: float = 0.25,
    entropy: float = 0.01,
) -> Scored:
    """REINFORCE over the factorised space: one categorical distribution a knob, pushed towards those of better rank in its batch.

    The starts are scored too, and the distributions begin a little towards them. A knob that was not active in a sample
    learns nothing from it.
    """
    names = list(space.knobs)
    logits = {name: np.zeros(len(space.choices[name])) for name in names}
    index = {name: {choice: i for i, choice in enumerate(space.choices[name])} for name in names}
    for point in starts:
        for name, value in point.items():
            logits[name][index[name][value]] += 1.0 / len(starts)
    seen: Scored = _scored(score, starts)
    for _ in range(rounds):
        parts = {name: _softmax(values) for name, values in logits.items()}
        drawn = {name: rng.choice(len(p), size=batch, p=p) for name, p in parts.items()}
        points = [space.point({n: space.choices[n][drawn[n][i]] for n in names}) for i in range(batch)]
        scores = score(points)
        seen.update(zip(points, scores.tolist(), strict=True))
        reward = np.empty(batch)
        reward[np.argsort(scores, kind="stable")] = np.linspace(
            1, -1, batch
        )  # ranks: no scale, and infinities do no harm
        for name in names:
            active = np.array([name in point for point in points])
            if not active.any():
                continue
            chosen = np.eye(len(parts[name]))[drawn[name]] - parts[name]
            pull = entropy * parts[name] * (-np.log(parts[name]) - _entropy(parts[name]))
            logits[name] += lr * ((chosen * (reward * active)[:, None]).sum(0) / np.sqrt(batch) + pull)
    return seen


def evolve(
    space: Space,
    score: Score,
    starts: Sequence[Point],
    rng: np.random.Generator,
    rounds: int = 16,
    batch: int = 64,
    tournament: int = 8,
    crossed: float = 0.3,
) -> Scored:
    """Regularised evolution: children of tournament winners replace the oldest, not the worst, `batch` at a time."""
    first = [*starts, *(space.sample(rng) for _ in range(batch - len(starts)))]
    seen = _scored(score, first)
    population = deque(first, maxlen=max(batch, len(first)))
    for _ in range(rounds):
        living = list(population)
        scores = np.array([seen[point] for point in living])
        picks = rng.integers(len(living), size=(2 * batch, tournament))
        winners = [living[i] for i in picks[np.arange(2 * batch), scores[picks].argmin(1)].tolist()]
        children = [
            space.cross(one, other, rng)
            if rng.random() < crossed
            else space.mutate(one, rng, 1 + int(rng.random() < 0.3))
            for one, other in zip(winners[:batch], winners[batch:], strict=True)
        ]
        seen.update(_scored(score, [child for child in dict.fromkeys(children) if child not in seen]))
        population.extend(children)
    return seen


PROPOSERS = {"reinforce": reinforce, "evolution": evolve}


def _scored(score: Score, points: Sequence[Point]) -> Scored:
    return dict(zip(points, score(points).tolist(), strict=True)) if points else {}


def _softmax(logits: np.ndarray) -> np.ndarray:
    parts = np.exp(logits - logits.max())
    return parts / parts.sum()


def _entropy(parts: np.ndarray) -> float:
    return float(-(parts * np.log(parts)).sum())
