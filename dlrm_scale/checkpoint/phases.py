"""The named points of a save and a load, in their order. A watchdog notes them, a chaos run strikes at them."""

from collections.abc import Callable

SAVE_PHASES = ("stage", "write", "gather", "manifest", "rename", "prune")
LOAD_PHASES = ("load_verify", "load_read")
PHASES = SAVE_PHASES + LOAD_PHASES

on_phase: list[Callable[[str], None]] = []  # all but "stage" of an asynchronous save come from its own thread


def enter(phase: str) -> None:
    """Every rank enters every phase, also where only rank 0 has something to do."""
    assert phase in PHASES, phase
    for hook in on_phase:
        hook(phase)
