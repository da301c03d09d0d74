"""The end of `run`: the fastest points beside the base configuration, in fresh runs, for speed and for held-out quality."""

import argparse
import json
import math
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from dlrm_scale.errors import UserError
from dlrm_scale.sharding.plan import save_plan
from dlrm_scale.tuning.knobs import Point, Value
from dlrm_scale.tuning.launcher import Launcher, Limits
from dlrm_scale.tuning.plans import Plans
from dlrm_scale.tuning.trial import Trial, as_many_samples, overrides_file, samples_per_second, whole
from dlrm_scale.whole_files import write_whole
from tools.tune.common import base_job, base_trial, learning_settings, point_trial
from tools.tune.session import Session

MOST_CANDIDATES = 8
MOST_UNCERTAIN = 3  # candidates that are not faster for certain: of many that equal the base, one would pass by chance
CERTAIN_DEVIATIONS = 3.0  # of the mean gain: of three repeats that are noise alone, 1 in 20 goes so far
DEVIATIONS = 2.0  # of the difference of two means: what counts as noise
HOPELESS_DEVIATIONS = 6.0  # after one seed: no further one would mend it


@dataclass(frozen=True)
class Speed:
    """`gain`: median over the repeats of candidate over base, each repeat's two runs one right after the other."""

    base: list[float]
    candidate: list[float]

    @property
    def gains(self) -> list[float]:
        return [c / b for b, c in zip(self.base, self.candidate, strict=True)]

    @property
    def gain(self) -> float:
        return statistics.median(self.gains)

    @property
    def is_certain(self) -> bool:
        """Faster in every repeat, and on average by more than the repeats' own spread explains."""
        logs = [math.log(gain) for gain in self.gains]
        error = statistics.stdev(logs) / math.sqrt(len(logs))
        return min(logs) > 0 and statistics.fmean(logs) > CERTAIN_DEVIATIONS * error


@dataclass(frozen=True)
class Quality:
    """Held-out NE of one label, by seed; lower is better."""

    label: str
    base: list[float]
    candidate: list[float]

    @property
    def difference(self) -> float:
        return statistics.fmean(self.candidate) - statistics.fmean(self.base)

    def as_json(self) -> dict[str, Any]:
        """JSON has no infinity: an NE that is no number is null."""
        base, candidate = ([ne if math.isfinite(ne) else None for ne in s] for s in (self.base, self.candidate))
        difference, noise = (v if math.isfinite(v) else None for v in (self.difference, self.noise))
        parts = {"label": self.label, "base": base, "candidate": candidate, "difference": difference, "noise": noise}
        return {**parts, "within_noise": self.is_within_noise}

    @property
    def noise(self) -> float:
        """What the difference of means may be by the seeds alone; the spread is that of both, seeds pooled."""
        return DEVIATIONS * self._deviation() * math.sqrt(1 / len(self.base) + 1 / len(self.candidate))

    def _deviation(self) -> float:
        samples = [s for s in (self.base, self.candidate) if len(s) > 1]
        freedom = sum(len(s) - 1 for s in samples)
        return math.sqrt(sum(statistics.variance(s) * (len(s) - 1) for s in samples) / freedom) if freedom else 0.0

    @property
    def is_within_noise(self) -> bool:
        return self.difference <= self.noise

    @property
    def is_hopeless(self) -> bool:
        return len(self.base) > 1 and self.difference > HOPELESS_DEVIATIONS * self._deviation()


class Verifier:
    def __init__(self, session: Session, launcher: Launcher, plans: Plans, args: argparse.Namespace) -> None:
        self.session, self.launcher, self.plans, self.args = session, launcher, plans, args
        self.space, self.console = session.space, session.console
        self.tried: list[dict[str, Any]] = []
        self.worse: set[tuple[tuple[str, Value], ...]] = set()  # learning settings

    def go(self) -> dict[str, Any]:
        """The verdict, as result.json keeps it; a second call goes on with what was measured since.

        Raises:
            UserError: the base configuration fails in a repeat.
        """
        # one at a time and to the end: runs beside each other, or cut short, are not comparable
        limits = self.launcher.limits
        self.launcher.limits = Limits(limits.time_limit_s, hopeless=0.0, parallel=1)
        try:
            for name, point in self.candidates():
                if self.is_worse(point) or name in {t["trial"] for t in self.tried}:
                    continue
                if len(self.tried) == MOST_CANDIDATES or self._num_uncertain == MOST_UNCERTAIN:
                    break
                self.tried.append(self._try(name, point))
                if self.tried[-1]["accepted"]:
                    return self._accept(name, point, self.tried)
        finally:
            self.launcher.limits = limits
        return self._finish({"accepted": None, "tried": self.tried, "exit_code": 1})

    @property
    def _num_uncertain(self) -> int:
        return sum(not t.get("certain", True) for t in self.tried)

    @property
    def may_find_more(self) -> bool:
        """Whether points were left out for their quality, so that others may still win."""
        return bool(self.worse) and len(self.tried) < MOST_CANDIDATES and self._num_uncertain < MOST_UNCERTAIN

    def is_worse(self, point: Point) -> bool:
        """Whether a point that learns the same has failed in quality."""
        return learning_settings(self.space, point) in self.worse

    def candidates(self) -> list[tuple[str, Point]]:
        """Measured points that were faster than the base, the fastest first."""
        by_name, asked = self.session.by_name, self.session.saved["asked"]
        base = samples_per_second(by_name["base"])
        speeds = {name: samples_per_second(by_name[name]) for name in asked if name in by_name}
        faster = sorted((name for name, speed in speeds.items() if speed > base), key=lambda name: -speeds[name])
        return [(name, self.space.point(asked[name])) for name in faster]

    def _try(self, name: str, point: Point) -> dict[str, Any]:
        found: dict[str, Any] = {"trial": name, "point": dict(point), "accepted": False}
        speed = self._speed(name, point)
        if speed is None:
            return {**found, "why": "it failed when it was measured again"}
        found["speed"] = {**asdict(speed), "gain": speed.gain, "least": min(speed.gains), "most": max(speed.gains)}
        found["certain"] = speed.is_certain
        if not speed.is_certain:
            return {
                **found,
                "why": "measured again, it is not faster in every repeat by more than their spread explains",
            }
        qualities = self._quality(name, point) if self.args.quality_seeds else []
        if qualities is None:
            return {**found, "why": "a whole run of it failed"}
        found["quality"] = [q.as_json() for q in qualities]
        worse = [q for q in qualities if not q.is_within_noise]
        if worse:
            self.worse.add(learning_settings(self.space, point))
            q = worse[0]
            return {
                **found,
                "why": f"held-out NE of {q.label} is worse by {q.difference:.4f}, beyond the noise of {q.noise:.4f}",
            }
        return {**found, "accepted": True}

    def _speed(self, name: str, point: Point) -> Speed | None:
        steps, trials = self.args.steps, []
        for repeat in range(self.args.repeats):
            pair = [
                base_trial(f"{name}_again_{repeat}_base", self.space, steps),
                point_trial(f"{name}_again_{repeat}", self.space, self.plans, point, steps),
            ]
            if any(trial.name not in self.session.by_name for trial in pair):
                self.session.forget(pair)  # of a pair that was cut in two, each half saw another hour of the machine
            trials += pair if repeat % 2 == 0 else pair[::-1]
        records = list(self.session.measure_named(self.launcher, trials, f"measuring {name} and the base again"))
        base = [throughput(r) for r, t in zip(records, trials, strict=True) if t.point is None]
        candidate = [throughput(r) for r, t in zip(records, trials, strict=True) if t.point is not None]
        if not all(base):
            raise UserError(f"the base configuration failed when it was measured again: {_reason(records)}")
        if not all(candidate):
            return None
        speed = Speed(base, candidate)
        self.console.print(
            f"{name} again: {speed.gain:.2f} x the base, {min(speed.gains):.2f} to {max(speed.gains):.2f} in {len(base)} repeats"
        )
        return speed

    def _quality(self, name: str, point: Point) -> list[Quality] | None:
        """One for each label; none where nothing is held out; None if a run of the candidate failed."""
        base = [self._whole(f"base_whole_{seed}", None, seed) for seed in range(self.args.quality_seeds)]
        if any(r["outcome"] != "ok" for r in base):
            raise UserError(f"a whole run of the base configuration failed: {_reason(base)}")
        own: list[dict[str, Any]] = []
        qualities: list[Quality] = []
        for seed in range(self.args.quality_seeds):
            own.append(self._whole(f"{name}_whole_{seed}", point, seed))
            if own[-1]["outcome"] != "ok":
                return None
            qualities = [Quality(label, ne_of(base, label), ne_of(own, label)) for label in base[0]["metrics"]]
            if any(q.is_hopeless for q in qualities):
                break
        for q in qualities:
            self.console.print(
                f"{name} held-out NE of {q.label}: {statistics.fmean(q.candidate):.4f}, base {statistics.fmean(q.base):.4f}, difference "
                f"{q.difference:+.4f}, noise {q.noise:.4f} ({len(q.candidate)} of {len(q.base)} seeds)"
            )
        return qualities

    def _whole(self, name: str, point: Point | None, seed: int) -> dict[str, Any]:
        base = base_job(self.space)
        job = base if point is None else self.space.job(point)
        plan = None if point is None else self.plans.plan(job.config, job.cluster)
        trial = Trial(name, self.space, job, point, plan, whole(job, base, seed), 0, seed)
        return next(self.session.measure_named(self.launcher, [trial], f"whole run {name}"))

    def _accept(self, name: str, point: Point, tried: list[dict[str, Any]]) -> dict[str, Any]:
        folder, job = self.session.folder, self.space.job(point)
        save_plan(self.plans.plan(job.config, job.cluster), folder / "best_plan.json")
        changes = as_many_samples(job, base_job(self.space))  # what was checked is what is trained
        file = overrides_file(self.space, point, job.launch, folder / "best_plan.json", changes)
        write_whole(folder / "best.json", f"{file.model_dump_json(indent=1)}\n")
        best = {"best": str(folder / "best.json"), "hosts": job.cluster.num_hosts}
        return self._finish({"accepted": name, **best, "tried": tried, "exit_code": 0})

    def _finish(self, verdict: dict[str, Any]) -> dict[str, Any]:
        result = {
            **verdict,
            "config": self.space.file.base,
            "space": self.space.fingerprint,
            "launches": sum(name in self.session.by_name for name in self.session.saved["asked"]),
            "quality_checked": bool(self.args.quality_seeds),
            "folder": str(self.session.folder),
        }
        write_whole(self.session.folder / "result.json", f"{json.dumps(result, indent=1)}\n")
        return result


def throughput(record: dict[str, Any]) -> float:
    """Samples a second over the whole timed span, waits for data and all: what the median step does not show. 0: not measured."""
    return record["samples_per_second"] if record["outcome"] == "ok" else 0.0


def ne_of(records: Sequence[dict[str, Any]], label: str) -> list[float]:
    """A run whose NE is no number is worse than any."""
    values = [record["metrics"][label]["ne"] for record in records]
    return [math.inf if value is None else value for value in values]


def _reason(records: Sequence[dict[str, Any]]) -> str:
    return next((r["reason"] for r in records if r["outcome"] != "ok"), "")


def show_verdict(result: dict[str, Any], console: Console) -> None:
    for tried in result["tried"]:
        if not tried["accepted"]:
            console.print(f"{tried['trial']} is not taken: {tried['why']}")
    if result["accepted"] is None:
        what = (
            "Nothing measured was faster than the base"
            if not result["tried"]
            else "None of the fastest stood up to being measured again"
        )
        console.print(f"{what}, in {result['launches']} launches.")
        console.print(f"next: more --launches on the same --folder {result['folder']}, or wider knobs in a new one")
        return
    best = result["tried"][-1]
    speed = best["speed"]
    console.print(
        f"{best['trial']}: {speed['gain']:.2f} x the base ({statistics.median(speed['base']):,.0f} -> "
        f"{statistics.median(speed['candidate']):,.0f} samples/s; {speed['least']:.2f} to {speed['most']:.2f} in {len(speed['base'])} interleaved repeats)"
    )
    for q in best["quality"]:
        console.print(
            f"held-out NE of {q['label']}: {statistics.fmean(q['candidate']):.4f}, base {statistics.fmean(q['base']):.4f}: within noise "
            f"({q['difference']:+.4f}, noise {q['noise']:.4f}, {len(q['candidate'])} seeds each)"
        )
    if not best["quality"]:
        console.print(
            "quality was not compared"
            + (": the base configuration holds nothing out" if result["quality_checked"] else "")
        )
    for key, value in best["point"].items():
        console.print(f"  {key} = {value}")
    hosts = result["hosts"]
    where = f"--nnodes {hosts} --node-rank N --rdzv-endpoint HOST0:29400 " if hosts > 1 else ""
    console.print(
        f"next{', on each host' if hosts > 1 else ''}: launchers/torchrun.sh {where}--config {shlex.quote(result['config'])} "
        f"--overrides {shlex.quote(result['best'])}"
    )
