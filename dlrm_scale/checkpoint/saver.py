"""Saves a run's state: now, or from a copy in host memory while training goes on; all ranks succeed or none does."""

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from dlrm_scale.checkpoint import phases
from dlrm_scale.checkpoint.commit import CheckpointFolder
from dlrm_scale.checkpoint.files import CheckedFileSystem
from dlrm_scale.checkpoint.manifest import FileSum, Manifest
from dlrm_scale.checkpoint.tensors import Part, write_parts
from dlrm_scale.checkpoint_config import CheckpointConfig
from dlrm_scale.errors import CheckpointError

# From every rank's note, by rank, and the files: the manifest. Called on rank 0.
Describe = Callable[[list[Any], dict[str, FileSum]], Manifest]


@dataclass
class SaveResult:
    """What became of one save; the same on every rank but for the times.

    Attributes:
        stall_s: how long training stood still.
        write_s: from the first byte to the commit.
        num_bytes: of all files; 0 if it failed.
    """

    step: int
    error: str | None = None
    stall_s: float = 0.0
    write_s: float = 0.0
    num_bytes: int = 0


class SaveFailedError(Exception):
    """A rank met an OSError; raised on every rank."""


class Saver:
    """Making one is collective, and so is every call. `tell` shows a line to the user (rank 0's)."""

    def __init__(
        self, folder: CheckpointFolder, config: CheckpointConfig, rank: int, tell: Callable[[str], None]
    ) -> None:
        self.folder, self.config, self.rank, self.tell = folder, config, rank, tell
        self.group = dist.new_group(backend="gloo")  # its own: an asynchronous save talks beside the training step
        self.buffers: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self.thread: threading.Thread | None = None
        self.crash: BaseException | None = None
        self.last: SaveResult | None = None
        self.results: list[SaveResult] = []
        self.num_failures = 0

    def save(self, step: int, parts: list[Part], note: Any, describe: Describe) -> None:
        """Saves the state that `parts` hold now. Waits for the save before this one.

        Args:
            note: what `describe` is to know of this rank.

        Raises:
            CheckpointError: the saves before this one failed `max_failures` times in a row.
        """
        started = time.perf_counter()
        self.wait()
        phases.enter("stage")
        result = SaveResult(step)
        if self.config.mode == "sync":
            self._run(result, parts, note, describe)
            result.stall_s = time.perf_counter() - started
            self.wait()
            return
        arguments = (result, self._copy(parts), note, describe)
        self.thread = threading.Thread(target=self._run, args=arguments, name="checkpoint", daemon=True)
        self.thread.start()
        result.stall_s = time.perf_counter() - started

    def wait(self) -> None:
        """Waits for a save under way and counts what became of it. Raises as `save` does."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.crash is not None:
            raise self.crash
        result, self.last = self.last, None
        if result is None:
            return
        self.results.append(result)
        self.num_failures = self.num_failures + 1 if result.error else 0
        if self.num_failures >= self.config.max_failures:
            raise CheckpointError(
                f"{self.num_failures} saves in a row failed, which checkpoint.max_failures does not allow; the last, of step "
                f"{result.step}: {result.error}; {self._way_out()}"
            )

    def finish(self) -> None:
        """Waits for the last save. Raises CheckpointError: it failed."""
        self.wait()
        if self.results and (error := self.results[-1].error):
            raise CheckpointError(f"the last step could not be saved: {error}; {self._way_out()}")

    def drain(self) -> None:
        """Lets a save under way end, before the process does for another reason."""
        if self.thread is not None:
            self.thread.join()

    def _way_out(self) -> str:
        return (
            f"make {self.folder.path} writable, with room, and start the same command again with this run's output.dir: it goes on "
            "from the newest checkpoint there"
        )

    def _copy(self, parts: list[Part]) -> list[Part]:
        """The parts in host memory, in buffers that the next save uses again."""
        copies = []
        for part in parts:
            buffer = self.buffers.get((part.key, part.offsets))
            if buffer is None or buffer.shape != part.tensor.shape:
                pin = part.tensor.is_cuda
                buffer = torch.empty(part.tensor.shape, dtype=part.tensor.dtype, pin_memory=pin)
                self.buffers[part.key, part.offsets] = buffer
            buffer.copy_(part.tensor, non_blocking=True)
            copies.append(replace(part, tensor=buffer))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _run(self, result: SaveResult, parts: list[Part], note: Any, describe: Describe) -> None:
        """The save proper; everything it talks over is `self.group`."""
        started = time.perf_counter()
        try:
            result.num_bytes = self._write(result.step, parts, note, describe)
        except SaveFailedError as e:
            result.error = str(e)
            self.tell(
                f"WARNING: the checkpoint of step {result.step} could not be saved: {e}\n"
                f"WARNING: training goes on; until a save succeeds, what is lost in a crash grows"
            )
        except BaseException as e:  # a lost peer, or a fault of ours: the main thread raises it
            self.crash = e
        result.write_s = time.perf_counter() - started
        self.last = result

    def _write(self, step: int, parts: list[Part], note: Any, describe: Describe) -> int:
        temporary = None
        try:
            temporary = self._on_first(lambda: self.folder.begin(step))
            phases.enter("write")
            written = self._write_tensors(temporary, parts)
            phases.enter("gather")
            seen = self._everywhere(lambda: (note, written))
            manifest = None
            if self.rank == 0:
                files = {name: file for _, files in seen for name, file in files.items()}
                manifest = describe([note for note, _ in seen], files)
            phases.enter("manifest")
            self._on_first(lambda: self.folder.add_manifest(temporary, manifest))
            phases.enter("rename")
            self._on_first(lambda: self.folder.commit(temporary, step))
        except SaveFailedError:
            if self.rank == 0 and temporary is not None:
                with contextlib.suppress(OSError):  # the next run cleans up too
                    self.folder.files.remove_folder(temporary)
            raise
        phases.enter("prune")
        try:
            self._on_first(lambda: self.folder.prune(step))
        except SaveFailedError as e:
            self.tell(f"WARNING: old checkpoints in {self.folder.path} could not be deleted: {e}")
        return sum(file.size for _, files in seen for file in files.values())

    def _write_tensors(self, temporary: str, parts: list[Part]) -> dict[str, FileSum]:
        fs, failure = CheckedFileSystem(self.folder.files), None
        try:
            write_parts(temporary, parts, fs, self.group)
        except dcp.CheckpointException as e:
            failure = e
            mine = e.failures.get(self.rank, (None, None))[0]
            fs.error = fs.error or (mine if isinstance(mine, OSError) else None)

        def report() -> None:
            if fs.error is not None:
                raise fs.error

        self._everywhere(report)
        if failure is not None:
            raise RuntimeError("a checkpoint could not be written, and not because of a file") from failure
        return fs.written

    def _everywhere(self, work: Callable[[], Any]) -> list[Any]:
        """What `work` returns on each rank, by rank. Raises SaveFailedError on all if it meets an OSError on one."""
        value, error = None, None
        try:
            value = work()
        except OSError as e:
            error = f"rank {self.rank}: {e}"
        outcomes: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(outcomes, (value, error), group=self.group)
        errors = [error for _, error in outcomes if error]
        if errors:
            raise SaveFailedError("; ".join(errors[:3]) + (f"; and {len(errors) - 3} more ranks" if errors[3:] else ""))
        return [value for value, _ in outcomes]

    def _on_first(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on rank 0, which alone does it. Raises as `_everywhere` does."""
        return self._everywhere(lambda: work() if self.rank == 0 else None)[0]
