"""Ranks that stay up between tests: importing torchrec takes seconds, a test on warm ranks takes milliseconds."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class RankPool:
    """`world_size` gloo processes in `num_hosts` pretended hosts, each with an initialised default process group."""

    def __init__(self, world_size: int, num_hosts: int = 1) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.world_size = world_size
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            per_host = world_size // num_hosts
            environment = {
                "RANK": rank,
                "WORLD_SIZE": world_size,
                "LOCAL_RANK": rank % per_host,
                "LOCAL_WORLD_SIZE": per_host,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": 1,
            }
            process = context.Process(target=_serve, args=(theirs, environment), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, timeout_seconds: float = 90) -> list[Any]:
        """`function(*args)` on every rank at once; the results by rank. `function` must be importable.

        Raises:
            AssertionError: with the first failing rank's traceback. TimeoutError: a rank did not answer (the pool is closed).
        """
        for pipe in self.pipes:
            pipe.send((function, args))
        results, failures = [], []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(timeout_seconds if not failures else 5):
                self.close()
                raise TimeoutError(f"rank {rank} gave no answer in {timeout_seconds} s" + "".join(failures))
            ok, result = pipe.recv()
            results.append(result)
            if not ok:
                failures.append(f"\n--- rank {rank} ---\n{result}")
        assert not failures, failures[0]
        return results

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(pipe: Connection, environment: dict[str, Any]) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    from dlrm_scale.libraries import loading_libraries

    with loading_libraries():
        import torch
        import torch.distributed as dist
        import torchrec  # noqa: F401  every test needs it
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*args)))
        except BaseException:  # whatever it is, the test must hear of it
            pipe.send((False, traceback.format_exc()))
