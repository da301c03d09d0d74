"""The exact optimum of small planning problems, by mixed-integer programming (HiGHS): what the search is measured against."""

# U units  R ranks  K quantities  C channels
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from dlrm_scale.sharding.problem import Choice, Problem


@dataclass(frozen=True)
class Exact:
    """`score_ms` is None where nothing fits; `bound_ms` is what HiGHS proved when time ran out, else the score."""

    score_ms: float | None
    bound_ms: float
    is_proven: bool


def exact_optimum(problem: Problem, seconds: float) -> Exact:
    """Minimises the sum over channels of the largest rank's milliseconds over all choices and places.

    Variables: a largest value for each channel; for each unit's choice whether it is taken; for each kind of block
    and place how many blocks lie there. Raises ValueError: what is not modelled.
    """
    _check_modelled(problem)
    C, R = problem.num_channels, problem.num_ranks
    builder = _Builder(C + 2, R)
    peaks = [builder.variable(cost=1.0, upper=np.inf, whole=False) for _ in range(C)]
    for unit in problem.units:
        taken = [builder.variable(cost=0.0, upper=1, whole=True) for _ in unit.choices]
        builder.equals([(v, 1.0) for v in taken], 1.0)
        for choice, variable in zip(unit.choices, taken, strict=True):
            _place(builder, problem, choice, variable)
    for k in range(C + 2):
        for rank in range(R):
            terms = builder.load[k][rank] + ([(peaks[k], -1.0)] if k < C else [])
            builder.at_most(terms, 0.0 if k < C else float(problem.capacity[k - C]))
    return builder.solve(seconds)


def _check_modelled(problem: Problem) -> None:
    for unit in problem.units:
        ruled = not unit.allowed_R.all() or unit.apart_from
        odd = [
            c.sharding_type
            for c in unit.choices
            if c.places is not None or c.one_host or (c.scope == "host" and c.num_blocks > problem.num_hosts)
        ]
        if ruled or odd or problem.churn is not None:
            raise ValueError(f"tables {unit.tables}: a rule on places, churn, or {odd} is not in the exact model")


def _place(builder: "_Builder", problem: Problem, choice: Choice, taken: int) -> None:
    width = {"rank": 1, "host": problem.ranks_per_host, "all": problem.num_ranks}[choice.scope]
    num_places = problem.num_ranks // width
    for blocks in choice.blocks:
        demand_KW = blocks.demand_KW()
        if num_places == 1:
            builder.add_load(demand_KW * blocks.count, 0, taken)
            continue
        # As `Packing._allowed_now`: column shards may share a rank, the blocks of a grid no host
        most = blocks.count if choice.scope == "rank" else 1
        counts = [builder.variable(cost=0.0, upper=most, whole=True) for _ in range(num_places)]
        builder.equals([*((v, 1.0) for v in counts), (taken, -float(blocks.count))], 0.0)
        for place, variable in enumerate(counts):
            builder.add_load(demand_KW, place * width, variable)


class _Builder:
    def __init__(self, num_quantities: int, num_ranks: int) -> None:
        self.costs: list[float] = []
        self.uppers: list[float] = []
        self.whole: list[int] = []
        self.rows: list[tuple[list[tuple[int, float]], float, float]] = []
        self.load = [[[] for _ in range(num_ranks)] for _ in range(num_quantities)]

    def variable(self, cost: float, upper: float, whole: bool) -> int:
        self.costs.append(cost)
        self.uppers.append(upper)
        self.whole.append(int(whole))
        return len(self.costs) - 1

    def equals(self, terms: list[tuple[int, float]], value: float) -> None:
        self.rows.append((terms, value, value))

    def at_most(self, terms: list[tuple[int, float]], value: float) -> None:
        scale = max([abs(c) for _, c in terms if c] + [1e-30])  # bytes and milliseconds differ by twelve orders
        self.rows.append(([(v, c / scale) for v, c in terms], -np.inf, value / scale))

    def add_load(self, demand_KW: np.ndarray, first_rank: int, variable: int) -> None:
        for k, w in zip(*np.nonzero(demand_KW), strict=True):
            self.load[k][first_rank + w].append((variable, float(demand_KW[k, w])))

    def solve(self, seconds: float) -> Exact:
        entries = [(r, v, c) for r, (terms, _, _) in enumerate(self.rows) for v, c in terms]
        row, column, value = zip(*entries, strict=True)
        matrix = coo_array((value, (row, column)), shape=(len(self.rows), len(self.costs))).tocsr()
        result = milp(
            np.array(self.costs),
            constraints=LinearConstraint(matrix, [r[1] for r in self.rows], [r[2] for r in self.rows]),
            integrality=np.array(self.whole),
            bounds=Bounds(0, np.array(self.uppers)),
            options={"time_limit": seconds, "mip_rel_gap": 1e-6},
        )
        if result.status == 2:
            return Exact(None, np.inf, True)
        bound = result.mip_dual_bound if result.mip_dual_bound is not None else 0.0
        return Exact(None if result.x is None else float(result.fun), float(bound), result.status == 0)
