"""Space: the knobs of one search, read from configs/tuning/*.yaml, and what one choice of them means to trainer and planner.

space = load_space("configs/tuning/criteo_80k.yaml"); space.overrides(space.sample(rng))
"""

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from dlrm_scale.cluster import ClusterSpec, load_cluster
from dlrm_scale.config import RunConfig, check_num_ranks
from dlrm_scale.config_io import apply_override, leaves, parse_config, parse_tree, read_tree
from dlrm_scale.errors import ConfigError, NoPlanError
from dlrm_scale.strict import Strict
from dlrm_scale.tuning.knobs import (
    LAUNCH_KEYS,
    LAUNCH_PREFIX,
    THREADS_KEY,
    Integer,
    Knob,
    Point,
    Sharding,
    Value,
    overrides_of,
)
from dlrm_scale.tuning.plans import Plans

TRIES = 64  # random points in which a value, or the whole space, may show that it can run


class SpaceFile(Strict):
    base: str = Field(description="the configuration that overrides start from, relative to the working directory")
    cluster: str = Field(description="a file, or a name in configs/clusters")
    knobs: dict[str, Knob] = Field(min_length=1)


@dataclass(frozen=True)
class Launch:
    """How the ranks of a trial are started."""

    num_ranks: int
    threads_per_rank: int


@dataclass(frozen=True)
class Job:
    """What a point asks for, resolved."""

    config: RunConfig
    cluster: ClusterSpec
    launch: Launch


class Space:
    """Raises ConfigError: a knob that the configuration does not know, or a value that it refuses at every point tried."""

    def __init__(self, file: SpaceFile, tree: dict[str, Any], cluster: ClusterSpec) -> None:
        self.file, self.tree, self.cluster = file, tree, cluster
        self.base = parse_config(tree, file.base)
        self.knobs = file.knobs
        self.choices = {name: knob.choices for name, knob in self.knobs.items()}
        self._conditions = {name: tuple(knob.when.items()) for name, knob in self.knobs.items()}
        self._check_conditions()
        self._members = {name: self._members_of(name) for name in self.knobs}
        self._check_keys()
        self._check_values()

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits that change when knobs, base configuration or cluster do."""
        file = self.file.model_dump(mode="json", exclude_defaults=True)  # a field that is added later changes nothing
        parts = [file, self.tree, self.cluster.model_dump(mode="json")]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]

    # ------------------------------------------------------------ points
    def is_active(self, name: str, values: Mapping[str, Value]) -> bool:
        """Given the values of the knobs before it; a condition on a knob that is itself not active does not hold."""
        conditions = self._conditions[name]
        return not conditions or all(knob in values and values[knob] in allowed for knob, allowed in conditions)

    def point(self, values: Mapping[str, Value]) -> Point:
        """`values` without those of knobs that are not active.

        Raises:
            ConfigError: an active knob has no value or one that it does not have; a name that is no knob.
        """
        strange = [name for name in values if name not in self.knobs]
        if strange:
            raise ConfigError(f"{strange[0]} is no knob of this space, which has {', '.join(self.knobs)}")
        kept: dict[str, Value] = {}
        for name in self.knobs:
            if not self.is_active(name, kept):
                continue
            if name not in values or values[name] not in self.choices[name]:
                given = values.get(name, "no value")
                raise ConfigError(
                    f"knob {name} is {given}, but must be one of {', '.join(map(str, self.choices[name]))}"
                )
            kept[name] = values[name]
        return Point(kept)

    def sample(self, rng: np.random.Generator) -> Point:
        kept: dict[str, Value] = {}
        for (name, choices), part in zip(self.choices.items(), rng.random(len(self.choices)).tolist(), strict=True):
            if self.is_active(name, kept):
                kept[name] = choices[int(part * len(choices))]
        return Point(kept)

    def mutate(self, point: Point, rng: np.random.Generator, num_changes: int = 1) -> Point:
        """`point` with other values of `num_changes` of its active knobs; knobs that become active are drawn."""
        free = [name for name in point if len(self.choices[name]) > 1]
        changed = set(rng.choice(free, min(num_changes, len(free)), replace=False).tolist()) if free else set()
        return self._filled({name: value for name, value in point.items() if name not in changed}, rng, point)

    def cross(self, one: Point, other: Point, rng: np.random.Generator) -> Point:
        """Each knob from either parent that has it."""
        known = {}
        for name, first in zip(self.knobs, (rng.random(len(self.knobs)) < 0.5).tolist(), strict=True):
            parents = [parent for parent in ((one, other) if first else (other, one)) if name in parent]
            if parents:
                known[name] = parents[0][name]
        return self._filled(known, rng, Point({}))

    def _filled(self, known: Mapping[str, Value], rng: np.random.Generator, not_as: Point) -> Point:
        kept: dict[str, Value] = {}
        for name, choices in self.choices.items():
            if not self.is_active(name, kept):
                continue
            others = [c for c in choices if c != not_as.get(name)] or list(choices)
            kept[name] = known[name] if name in known else others[int(rng.integers(len(others)))]
        return Point(kept)

    def neighbours(self, point: Point) -> list[Point]:
        """Every point that differs in one active knob; knobs that become active take their first value."""
        found = []
        for name in point:
            for value in self.choices[name]:
                if value != point[name]:
                    first = {knob: choices[0] for knob, choices in self.choices.items()}
                    found.append(self.point({**first, **point, name: value}))
        return found

    @cached_property
    def size(self) -> int:
        """How many points there are. Knobs that no condition looks at are multiplied, the others enumerated."""
        seen = {knob for k in self.knobs.values() for knob in k.when}
        return sum(
            int(
                np.prod(
                    [len(c) for name, c in self.choices.items() if name not in seen and self.is_active(name, parents)]
                )
            )
            for parents in self._expand([name for name in self.knobs if name in seen])
        )

    def enumerate(self) -> Iterator[Point]:
        """All points, each once; see `size` first."""
        return (Point(values) for values in self._expand(list(self.knobs)))

    def _expand(self, names: list[str], kept: dict[str, Value] | None = None) -> Iterator[dict[str, Value]]:
        kept = kept or {}
        if not names:
            yield kept
        elif not self.is_active(names[0], kept):
            yield from self._expand(names[1:], kept)
        else:
            for value in self.choices[names[0]]:
                yield from self._expand(names[1:], {**kept, names[0]: value})

    # ------------------------------------------------------------ what a point means
    def overrides(self, point: Point) -> list[str]:
        """`section.key=value`, as the trainer's command line takes them; launch keys are in `launch`."""
        found: list[str] = []
        for name, value in point.items():
            found += overrides_of(self.knobs[name], value, self._members[name])
            found += self._scaled(name, value)
        return found

    def _scaled(self, name: str, value: Value) -> list[str]:
        knob = self.knobs[name]
        if not isinstance(knob, Integer) or not knob.scales or value == self._base_values[knob.key]:
            return []
        ratio = value / self._base_values[knob.key]
        return [f"{key}={self._base_values[key] * ratio**exponent:.6g}" for key, exponent in knob.scales.items()]

    @cached_property
    def _base_values(self) -> dict[str, Any]:
        return leaves(self.base.model_dump(mode="json"))

    def launch(self, point: Point) -> Launch:
        """Of knobs with launch keys; without one, the cluster's ranks, and the threads that launchers/torchrun.sh gives them here."""
        by_key = {getattr(self.knobs[name], "key", ""): value for name, value in point.items()}
        ranks, threads = (by_key.get(key) for key in LAUNCH_KEYS)
        num_ranks = int(ranks or self.cluster.num_ranks)
        return Launch(num_ranks, int(threads or default_threads(min(num_ranks, self.cluster.ranks_per_host))))

    def tunes_threads(self, point: Point) -> bool:
        return any(getattr(self.knobs[name], "key", "") == THREADS_KEY for name in point)

    def config(self, point: Point) -> RunConfig:
        """Raises ConfigError, as `load_config` does."""
        tree = copy.deepcopy(self.tree)
        for override in self.overrides(point):
            apply_override(tree, override)
        return parse_config(tree, f"{self.file.base} with {dict(point)}")

    def job(self, point: Point) -> Job:
        """Raises ConfigError: the configuration is not valid, or its ranks cannot share the batch or are not the cluster's."""
        config, launch = self.config(point), self.launch(point)
        check_num_ranks(config, launch.num_ranks)
        return Job(config, resized(self.cluster, launch.num_ranks), launch)

    def check(self, point: Point, plans: Plans) -> str | None:
        """Why the point cannot run: its configuration is not valid, or no plan fits; None if it can."""
        try:
            job = self.job(point)
            plans.plan(job.config, job.cluster)
        except (ConfigError, NoPlanError) as e:
            return str(e)
        return None

    def require_feasible(self, plans: Plans, seed: int = 0) -> Point:
        """A point that can run. Raises ConfigError: none of those tried can, with the reasons."""
        rng, reasons = np.random.default_rng(seed), {}
        tried = list(self.enumerate()) if self.size <= TRIES else [self.sample(rng) for _ in range(TRIES)]
        for point in tried:
            reason = self.check(point, plans)
            if reason is None:
                return point
            reasons.setdefault(reason.splitlines()[-1].strip(), []).append(point)
        common = sorted(reasons.items(), key=lambda item: -len(item[1]))[:3]
        raise ConfigError(
            f"the space of {self.file.base} on {self.file.cluster} has no feasible point: {len(tried)} of {self.size:,} were tried; the commonest "
            "reasons:\n" + "\n".join(f"  {len(points)} x {reason}" for reason, points in common)
            + "\n  widen the knobs, or name a cluster with more memory"
        )  # fmt: skip

    # ------------------------------------------------------------ checks of the file
    def _check_conditions(self) -> None:
        names = list(self.knobs)
        for i, (name, knob) in enumerate(self.knobs.items()):
            for parent, values in knob.when.items():
                if parent not in names[:i]:
                    raise ConfigError(
                        f"knob {name}: when names {parent}, but a condition looks at knobs that stand before it: "
                        f"{', '.join(names[:i]) or 'none'}; move {name} below {parent}"
                    )
                strange = [v for v in values if v not in self.choices[parent]]
                if strange:
                    known = ", ".join(map(str, self.choices[parent]))
                    raise ConfigError(
                        f"knob {name}: when has {parent} = {strange[0]}, which {parent} never is; it has {known}"
                    )

    def _members_of(self, name: str) -> tuple[str, ...]:
        knob = self.knobs[name]
        try:
            return knob.members(self.base) if isinstance(knob, Sharding) else ()
        except ConfigError as e:
            raise ConfigError(f"knob {name}: {e}") from None

    def _check_keys(self) -> None:
        owner: dict[str, str] = {}
        for name, knob in self.knobs.items():
            key = getattr(knob, "key", "")
            if key.startswith(LAUNCH_PREFIX) and key not in LAUNCH_KEYS:
                raise ConfigError(f"knob {name}: no such launch key as {key}; known are {', '.join(LAUNCH_KEYS)}")
            scales = knob.scales if isinstance(knob, Integer) else {}
            for scaled in (key, *scales) if scales else ():
                value = self._base_values.get(scaled)
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise ConfigError(
                        f"knob {name}: scales needs numbers, but {scaled} of {self.file.base} is {value}; name keys that have one"
                    )
            for set_key in self._members[name] if isinstance(knob, Sharding) else (key, *scales):
                if set_key in owner:
                    raise ConfigError(
                        f"knobs {owner[set_key]} and {name} both set {set_key}; one would overwrite the other: take one out"
                    )
                owner[set_key] = name

    def _check_values(self) -> None:
        """A value may be refused beside some values of other knobs, but not beside all of them."""
        rng = np.random.default_rng(0)
        for name, choices in self.choices.items():
            for value in choices:
                refused = None
                for _ in range(TRIES):
                    refused = self._refusal(self._with(name, value, rng))
                    if refused is None:
                        break
                if refused is not None:
                    raise ConfigError(f"knob {name}: {value} is refused at each of {TRIES} points tried: {refused}")

    def _with(self, name: str, value: Value, rng: np.random.Generator) -> Point:
        """A random point at which that knob is active and has that value."""
        known = {name: value}
        for knob in reversed(list(self.knobs)):
            if knob in known:
                for parent, allowed in self.knobs[knob].when.items():
                    known.setdefault(parent, allowed[int(rng.integers(len(allowed)))])
        return self._filled(known, rng, Point({}))

    def _refusal(self, point: Point) -> str | None:
        try:
            self.job(point)
        except ConfigError as e:
            return str(e)
        return None


def cores() -> int:
    """Of this machine, as far as this process may use them."""
    return len(os.sched_getaffinity(0))


def default_threads(ranks_per_host: int) -> int:
    """The rule of launchers/torchrun.sh."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, cores() // ranks_per_host))


def resized(cluster: ClusterSpec, num_ranks: int) -> ClusterSpec:
    """The cluster with fewer ranks: on one host as long as they fit there. Raises ConfigError: it has not so many, or hosts in part."""
    if num_ranks == cluster.num_ranks:
        return cluster
    per_host = min(num_ranks, cluster.ranks_per_host)
    if num_ranks > cluster.num_ranks or num_ranks % per_host:
        raise ConfigError(
            f"launch.num_ranks is {num_ranks}, but the cluster has {cluster.num_ranks} ranks, {cluster.ranks_per_host} to a host; "
            "take at most so many, and whole hosts"
        )
    return cluster.model_copy(update={"num_ranks": num_ranks, "ranks_per_host": per_host})


def load_space(path: str | Path) -> Space:
    """Raises ConfigError: every problem found, each with file and dotted key; what `Space` refuses."""
    file = parse_tree(read_tree(path, SpaceFile, "tuning space"), SpaceFile, "tuning space", str(path))
    try:
        return Space(file, read_tree(file.base, RunConfig, "configuration"), load_cluster(file.cluster))
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from None
