"""Random plans that fit: what predicted and measured step times are compared over."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dlrm_scale.errors import ConfigError, PlanError
from dlrm_scale.sharding.bound import choice_totals, lower_bound
from dlrm_scale.sharding.packing import Packing, Placed
from dlrm_scale.sharding.plan import Plan, PlanRequest
from dlrm_scale.sharding.planner import Prepared, make_plan, prepare
from dlrm_scale.sharding.search import FITS, Found

OBJECTIVES = ("busiest_rank", "critical_path")
DRAWS_PER_PLAN = 200


@dataclass(frozen=True)
class ScoredPlan:
    """`predicted_ms` by objective."""

    plan: Plan
    predicted_ms: dict[str, float]


def random_plan(prepared: Prepared, rng: np.random.Generator) -> tuple[Placed, ...] | None:
    """Each unit in any of its choices at any place its rules allow, all alike likely; None: it does not fit."""
    packing = Packing(prepared.problem, scale_ms=1.0, doublings=1)
    for unit in rng.permutation(len(prepared.problem.units)).tolist():
        choice = int(rng.integers(len(prepared.problem.units[unit].choices)))
        placed = packing.random_place(unit, choice, rng)
        if placed is None:
            return None
        packing.put(unit, placed)
    return tuple(packing.placed) if packing.overflow <= FITS else None


def draw_plans(request: PlanRequest, num_plans: int, seed: int) -> list[ScoredPlan]:
    """Distinct random plans, scored by both objectives, each from the same draw of units and places.

    Raises:
        ConfigError: the request has fewer distinct plans that fit, or they are too rare.
        PlanError: as `prepare`, or no plan can fit.
    """
    by_objective = {name: prepare(_with_objective(request, name)) for name in OBJECTIVES}
    first = by_objective[OBJECTIVES[0]]
    bound = lower_bound(first.problem, choice_totals(first.problem, first.cutter))
    if bound.impossible:
        raise PlanError(f"no sharding plan fits: {bound.impossible}")
    rng, seen, plans = np.random.default_rng(seed), set(), []
    for _ in range(num_plans * DRAWS_PER_PLAN):
        if len(plans) == num_plans:
            break
        placed = random_plan(first, rng)
        if placed is None or placed in seen:
            continue
        seen.add(placed)
        predicted = {name: _score_ms(prepared, placed) for name, prepared in by_objective.items()}
        found = Found(placed=placed, score_ms=predicted[OBJECTIVES[0]], overflow=0.0, from_start="random")
        plans.append(ScoredPlan(make_plan(_with_objective(request, OBJECTIVES[0]), first, found, bound), predicted))
    if len(plans) < num_plans:
        raise ConfigError(
            f"--plans is {num_plans}, but {num_plans * DRAWS_PER_PLAN} draws gave {len(plans)} distinct plans that fit on "
            f"{request.cluster.num_ranks} ranks; take at most that many"
        )
    return plans


def _with_objective(request: PlanRequest, objective: str) -> PlanRequest:
    return request.model_copy(update={"sharding": request.sharding.model_copy(update={"objective": objective})})


def _score_ms(prepared: Prepared, placed: Sequence[Placed]) -> float:
    packing = Packing(prepared.problem, scale_ms=1.0, doublings=1)
    for unit, place in enumerate(placed):
        packing.put(unit, place)
    return packing.score_ms
