"""Which faults befall which job, in which order: a function of the seed alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from dlrm_scale.checkpoint.phases import LOAD_PHASES, SAVE_PHASES
from dlrm_scale.errors import EXIT_HUNG, EXIT_RESUME
from tools.chaos.faults import Damage, Fault

T = TypeVar("T")
NUM_RANKS = 2
TWO_SAVES = 13  # batches of an attempt after which it has saved twice, and trained eight steps since the first at most
KILLED_LAUNCHER = -9  # as subprocess tells it
KILLED_RANK = 128 + 9


@dataclass(frozen=True)
class Launch:
    """One start of the launcher on a job's folder: `faults`, one an attempt, and then an attempt without."""

    faults: tuple[Fault, ...] = ()
    exit_code: int = 0
    num_ranks: int = NUM_RANKS
    damage: Damage | None = None

    @property
    def max_restarts(self) -> int:
        """A launch that is to end 0 restarts after each kill; in any other, the last fault ends it."""
        kills = sum(fault.strike == "kill" for fault in self.faults)
        return kills - (self.exit_code == KILLED_RANK)


@dataclass(frozen=True)
class Job:
    """Launches on one folder until the last one trains to the end.

    Attributes:
        same_bytes: the end must have the bytes of the unbroken run; else only the same samples, and values near it.
        num_skipped: micro-batches that it must leave out (as not finite), and so ends with weights of its own.
        expected_text: words that the output of its launches must hold.
    """

    name: str
    launches: tuple[Launch, ...]
    overrides: tuple[str, ...] = ()
    same_bytes: bool = True
    num_skipped: int = 0
    on_chaos_disk: bool = False
    expected_text: tuple[str, ...] = ()

    @property
    def num_faults(self) -> int:
        changes = sum(a.num_ranks != b.num_ranks for a, b in zip(self.launches, self.launches[1:], strict=False))
        return changes + sum(len(launch.faults) + (launch.damage is not None) for launch in self.launches)


def full(seed: int) -> list[Job]:
    """At least 40 faults: every phase on every rank, every kind of file, and the rest at places drawn by `seed`."""
    rng = np.random.default_rng(seed)

    def rank() -> int:
        return int(rng.integers(NUM_RANKS))

    def batch(low: int = 2, high: int = 9) -> int:
        return int(rng.integers(low, high))

    saves = [Fault("kill", r, phase) for phase in SAVE_PHASES for r in range(NUM_RANKS)]
    loads = [Fault("kill", r, phase) for phase in LOAD_PHASES for r in range(NUM_RANKS)]
    steps = [Fault("kill", rank(), "batch", batch()) for _ in range(4)]
    evaluations = [Fault("kill", r, "evaluation") for r in range(NUM_RANKS)]
    to_a_save = Fault("kill", rank(), "batch", TWO_SAVES)
    return [
        Job("kill in each phase of an asynchronous save", (Launch(_shuffled(rng, saves)),)),
        Job(
            "kill in each phase of a synchronous save",
            (Launch(_shuffled(rng, saves[rank() :: 2])),),
            ("checkpoint.mode=sync",),
        ),
        Job("kill in each phase of a load", (Launch((to_a_save, *_shuffled(rng, loads))),)),
        Job("kill at a step or in an evaluation", (Launch(_shuffled(rng, steps + evaluations)),)),
        Job(
            "kill the launcher, preempt the job",
            (
                Launch((Fault("kill_launcher", rank(), "batch", batch(6)),), KILLED_LAUNCHER),
                Launch((Fault("preempt", rank(), "batch", batch()),), EXIT_RESUME),
                Launch((Fault("preempt_usr1", rank(), "batch", batch()),), EXIT_RESUME),
                Launch(),
            ),
        ),
        Job(
            "freeze a rank",
            (
                Launch((Fault("freeze", 0, "batch", batch()),), EXIT_HUNG),
                Launch((Fault("freeze", 1, "write"),), EXIT_HUNG),
                Launch(),
            ),
            expected_text=("rank 0", "rank 1", "frozen"),
        ),
        _damaged(rng, rank),
        Job(
            "disk full",
            (Launch((Fault("disk_full", 0, nth=batch(1, 6)),)),),
            on_chaos_disk=True,
            expected_text=("No space left on device",),
        ),
        Job(
            "disk full on the other rank",
            (Launch((Fault("disk_full", 1, nth=1),)),),
            on_chaos_disk=True,
            expected_text=("No space left on device",),
        ),
        Job("slow disk", (Launch((Fault("slow_disk", rank()),)),), on_chaos_disk=True),
        Job("slow rank", (Launch((Fault("slow", rank(), "batch"),)),)),
        Job(
            "a batch that is not finite",
            (Launch((Fault("nan", rank(), "batch", batch()),)),),
            ("train.nonfinite=skip",),
            same_bytes=False,
            num_skipped=1,
        ),
        Job(
            "another number of ranks: 2, 1, 4, 2",
            (
                Launch((Fault("preempt", rank(), "batch", batch()),), EXIT_RESUME),
                Launch((Fault("preempt", 0, "batch", batch()),), EXIT_RESUME, num_ranks=1),
                Launch((Fault("preempt", 3, "batch", batch()),), EXIT_RESUME, num_ranks=4),
                Launch(),
            ),
            same_bytes=False,
        ),
    ]


def small(seed: int) -> list[Job]:
    """One of each sort: for the tests."""
    rng = np.random.default_rng(seed)
    faults = _shuffled(rng, [Fault("kill", 0, "rename"), Fault("kill", 1, "write"), Fault("kill", 1, "load_read")])
    return [
        Job(
            "kills, a damaged checkpoint",
            (
                Launch((Fault("kill", 1, "batch", TWO_SAVES),), KILLED_RANK),
                Launch(faults, damage=Damage("flip a byte", ".distcp")),
            ),
        ),
    ]


def _damaged(rng: np.random.Generator, rank: Callable[[], int]) -> Job:
    files = (".distcp", ".metadata", "manifest.json")
    harms = [Damage(harm, file) for file in files for harm in ("cut short", "flip a byte")]
    harms.append(Damage("remove", ".distcp"))
    kill = (Fault("kill", rank(), "batch", TWO_SAVES),)
    launches = [Launch(kill, KILLED_RANK, damage=damage) for damage in _shuffled(rng, harms)]
    return Job("damage each file of the newest checkpoint", (Launch(kill, KILLED_RANK), *launches, Launch()))


def _shuffled(rng: np.random.Generator, items: Sequence[T]) -> tuple[T, ...]:
    return tuple(items[i] for i in rng.permutation(len(items)))
