"""Runs a function on ranks of this machine, each a process of its own; says which of them died, and never waits for ever."""

import multiprocessing
import os
import pickle
import signal
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from dlrm_scale.allocator import VARIABLE, keep_freed_memory
from dlrm_scale.errors import LOST_PEER, SHORT_OF_MEMORY, PeerError, UserError
from dlrm_scale.libraries import loading_libraries
from dlrm_scale.resilience.orphan import end_with_parent

SILENCE_SECONDS = 120.0  # loading the libraries takes up to 20 on a busy machine, a call of a benchmark less
TRAIN_SILENCE_SECONDS = 900.0  # training says nothing while it fills tables, and while an arch is first compiled
SETTLE_SECONDS = 2.0  # in which ranks end by themselves, and others notice that one is gone


class NoMemoryError(PeerError):
    """A rank's memory ran out: it said so itself, or the kernel killed it."""


def run_on_ranks(
    work: Callable[..., Any],
    arguments: tuple,
    num_ranks: int,
    ranks_per_host: int,
    told: Callable[[Any], Any] = lambda message: None,
    plain_allocator: bool = False,
    silence_seconds: float | None = None,
) -> list[Any]:
    """`work(tell, *arguments)` on every rank at once, with torchrun's environment variables; what it returns, by rank.

    They get memory as our launcher's ranks do, or with `plain_allocator` as any process does.

    `work` must be importable. What a rank says with `tell` reaches `told` here; one of them must speak every now and then.

    Raises:
        NoMemoryError: of a rank.
        PeerError: a rank was killed, or all were silent for `silence_seconds` (None: SILENCE_SECONDS).
        UserError: as a rank raised it.
        RuntimeError: another exception on a rank, with its traceback.
    """
    context, job = multiprocessing.get_context("spawn"), pickle.dumps((work, arguments))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pipes: dict[Connection, int] = {}
    processes: list[BaseProcess] = []
    try:
        for index in range(num_ranks):
            ours, theirs = context.Pipe(duplex=False)
            environment = {
                "RANK": index,
                "WORLD_SIZE": num_ranks,
                "LOCAL_RANK": index,  # they may pretend to be several hosts, but share this one's GPUs
                "LOCAL_WORLD_SIZE": ranks_per_host,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            process = context.Process(target=_serve, args=(theirs, environment, job), daemon=True)
            with nullcontext() if plain_allocator else _freed_memory_kept():
                process.start()
            theirs.close()
            pipes[ours] = index
            processes.append(process)
        results = _results(pipes, processes, told, silence_seconds or SILENCE_SECONDS)
        for process in processes:  # killed at once, one leaves its semaphores behind, which Python warns of
            process.join(SETTLE_SECONDS)
        return results
    finally:
        for process in processes:
            process.kill()
            process.join()


@contextmanager
def _freed_memory_kept() -> Iterator[None]:
    before = os.environ.get(VARIABLE)
    keep_freed_memory(os.environ)
    yield
    if before is None:
        os.environ.pop(VARIABLE, None)


def _results(
    pipes: dict[Connection, int], processes: list[BaseProcess], told: Callable[[Any], Any], silence_seconds: float
) -> list[Any]:
    results: list[Any] = [None] * len(processes)
    while pipes:
        ready = wait(list(pipes), silence_seconds)
        if not ready:
            raise PeerError(
                f"the {len(processes)} ranks gave no sign for {silence_seconds:.0f} s and were ended; "
                "take fewer, or see whether gloo works here: python -m tools.doctor"
            )
        for pipe in ready:
            index = pipes[pipe]
            try:
                kind, value = pipe.recv()
            except EOFError:
                kind, value = "failed", "it ended without a word"
            if kind == "told":
                told(value)
            elif kind == "done":
                results[index] = value
                del pipes[pipe]
            else:
                raise _failure(pipes, processes, {index: value})
    return results


def _failure(pipes: dict[Connection, int], processes: list[BaseProcess], said: dict[int, str | UserError]) -> Exception:
    """A rank that was killed is the cause of what the others say, and so is one whose own fault another was the first to notice."""
    for process in processes:
        process.join(SETTLE_SECONDS / len(processes))
    killed = {i: p.exitcode for i, p in enumerate(processes) if p.exitcode is not None and p.exitcode < 0}
    if killed:
        rank, code = min(killed.items())
        cause = signal.Signals(-code).name
        if cause == "SIGKILL":
            return NoMemoryError(
                f"rank {rank} was ended by {cause}; the kernel does so where memory runs out: take fewer ranks"
            )
        return PeerError(f"rank {rank} was ended by {cause}")
    for pipe, index in pipes.items():
        for kind, value in _rest(pipe):
            if kind == "failed":
                said[index] = value
    rank, what = min(said.items(), key=lambda item: _distance(item[1]))
    if isinstance(what, UserError):
        return what
    lines = [line.strip() for line in what.splitlines() if SHORT_OF_MEMORY.search(line)]
    if lines:
        return NoMemoryError(f"rank {rank} has no memory left: {lines[-1]}; take fewer ranks")
    return RuntimeError(f"rank {rank} failed: {what}")


def _rest(pipe: Connection) -> Iterator[tuple[str, Any]]:
    try:
        while pipe.poll():
            yield pipe.recv()
    except EOFError:
        pass


def _distance(what: str | UserError) -> int:
    """From the cause: the largest is of a rank that only lost another one."""
    return 0 if isinstance(what, UserError) else 1 + any(lost in what for lost in LOST_PEER)


def _serve(pipe: Connection, environment: dict[str, Any], job: bytes) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the one that started these ends them
    end_with_parent()
    os.environ.update({name: str(value) for name, value in environment.items()})
    try:
        with loading_libraries():
            work, arguments = pickle.loads(job)
        pipe.send(("done", work(lambda message: pipe.send(("told", message)), *arguments)))
    except UserError as e:
        pipe.send(("failed", e))
    except Exception:
        pipe.send(("failed", traceback.format_exc()))
