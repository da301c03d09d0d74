"""A trainer's checkpoints: what is saved when, and what a run goes on from."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from dlrm_scale.checkpoint import phases
from dlrm_scale.checkpoint.choose import choose
from dlrm_scale.checkpoint.commit import CheckpointFolder
from dlrm_scale.checkpoint.files import Files
from dlrm_scale.checkpoint.manifest import FORMAT, NAME, FileSum, Manifest
from dlrm_scale.checkpoint.saver import Saver
from dlrm_scale.checkpoint.tensors import Saved, read_parts, saved_tensors
from dlrm_scale.config import RunConfig
from dlrm_scale.config_io import fingerprint
from dlrm_scale.errors import CheckpointError, ConfigError, first_lines
from dlrm_scale.sharding.local_tables import set_table_forwards, table_forwards
from dlrm_scale.sharding.plan import Plan
from dlrm_scale.training.monitor import Board
from dlrm_scale.training.ranks import Rank, from_first_rank
from dlrm_scale.training.readers import TrainReader
from dlrm_scale.training.state import ModelState, agree_on_forwards, mismatches, of_ranks
from dlrm_scale.training.warm_start import apply_rules

if TYPE_CHECKING:
    from dlrm_scale.training.trainer import Trainer

PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "dlrm-scale")
SHOWN_MISMATCHES = 40


def checkpoint_folder(config: RunConfig, run_dir: str) -> CheckpointFolder:
    """Raises ConfigError: a path handler cannot be made."""
    settings = config.checkpoint
    path = settings.dir.replace("{run}", run_dir).rstrip("/")
    return CheckpointFolder(path, Files(settings.path_handlers), settings.keep_last, settings.keep_every_steps)


class RunCheckpoints:
    """Saves one trainer's state and restores it. Every call is collective, making one included, which removes what
    interrupted saves left.

    Attributes:
        resumed: the checkpoint that the run goes on from; None: it begins.

    Raises:
        CheckpointError: there are checkpoints, but no valid one.
    """

    def __init__(
        self,
        config: RunConfig,
        rank: Rank,
        folder: CheckpointFolder,
        tell: Callable[[str], None],
    ) -> None:
        self.config, self.rank, self.folder, self.tell = config, rank, folder, tell
        if rank.is_first:
            try:
                folder.clean()
            except OSError as e:
                tell(f"WARNING: what an interrupted save left in {folder.path} cannot be removed: {e}")
        self.saver = Saver(folder, config.checkpoint, rank.index, tell)
        self.resumed = choose(folder, rank.index, self.saver.group, tell)
        self.num_shown = 0
        self.board: Board | None = None
        self.plan: Plan | None = None

    def attach(self, plan: Plan, board: Board) -> None:
        """Tells which plan the model is sharded by, and where the cost of saves is shown."""
        self.plan, self.board = plan, board

    def save(self, trainer: Trainer) -> None:
        """Saves the state between two steps. Raises CheckpointError: too many saves failed in a row."""
        model = ModelState(self.plan, trainer.model, trainer.optimizer)
        assert trainer.optimizer.micro_batch == 0, "a save in the middle of an optimizer step"
        in_loss = {"steps": trainer.loss.num_steps, "micro_batches": trainer.loss.num_micro_batches}
        progress = trainer.result.progress() | {"in_loss": in_loss}
        step, samples = trainer.result.num_steps, trainer.result.samples_consumed
        identity = trainer.train_reader.reader.order.identity

        def describe(notes: list[tuple[int | None, tuple[int, dict]]], files: dict[str, FileSum]) -> Manifest:
            forwards, counted = zip(*notes, strict=True)
            epoch = max(epoch for epoch, _ in counted)
            windows: dict[int, dict[str, int]] = {}
            for of_epoch, by_window in counted:
                for window, counts in by_window.items() if of_epoch == epoch else ():
                    windows.setdefault(window, {}).update(counts)  # one rank counts it; others may know it as done
            return Manifest(
                format=FORMAT,
                step=step,
                samples_consumed=samples,
                data_fingerprint=identity,
                world_size=self.rank.world_size,
                config_fingerprint=fingerprint(self.config),
                config=self.config.model_dump(mode="json"),
                plan=self.plan.model_dump(mode="json"),
                versions={p: version(p) for p in PACKAGES},
                time=datetime.now(UTC).isoformat(timespec="seconds"),
                column_blocks=model.column_blocks,
                progress=progress
                | {
                    "table_forwards": agree_on_forwards(list(forwards)),
                    "counted": {"epoch": epoch, "windows": {str(w): windows[w] for w in sorted(windows)}},
                },
                files=files,
            )

        note = (table_forwards(trainer.model.module), trainer.train_reader.reader.counted())
        self.saver.save(step, model.parts(self.rank) + trainer.rank_state.parts(), note, describe)
        self._show()
        self.board.flush()  # a resume from here does not log again what came before

    def finish(self) -> None:
        """Waits for the last save. Raises CheckpointError: it failed."""
        self.saver.finish()
        self._show()

    def check_reader(self, reader: TrainReader) -> None:
        """That the reader can go on where the checkpoint was taken; before the run's folder says that it does.

        Raises:
            CheckpointError: the checkpoint is of other data.
            ConfigError: it is of a step behind the reader's last one.
        """
        if self.resumed is None:
            return
        manifest, folder, identity = self.resumed, self.folder.path_of(self.resumed.step), reader.reader.order.identity
        if manifest.data_fingerprint != identity:
            raise CheckpointError(
                f"{folder} was trained on other data ({manifest.data_fingerprint}) than data.source gives now "
                f"({identity}), so its position means nothing here; restore the data, or begin another run "
                f"from its weights: checkpoint.warm_start={{path: {folder}}} output.dir=..."
            )
        if manifest.step > reader.num_steps:
            raise ConfigError(
                f"{folder} is of step {manifest.step:,}, but train.max_steps and train.epochs end this run at step {reader.num_steps:,}, so that "
                "nothing is left to train; raise them, or begin another run: output.dir=runs/another"
            )

    def restore(self, trainer: Trainer) -> None:
        """Puts the trainer where the checkpoint was taken, or gives it another run's weights, or leaves it as it is.

        Raises:
            CheckpointError: the checkpoint is not of this model; all differences are listed.
        """
        if self.resumed is None:
            if self.config.checkpoint.warm_start:
                self._warm_start(trainer)
            return
        manifest, folder = self.resumed, self.folder.path_of(self.resumed.step)
        reader = trainer.train_reader.reader
        saved = self._saved_tensors(folder, self.folder.files)
        model = ModelState(self.plan, trainer.model, trainer.optimizer)
        of_model = {key: tensor for key, tensor in saved.items() if not of_ranks(key)}
        check(mismatches(of_model, model.expected(manifest.column_blocks)), folder)
        readings = [model.reading(saved, manifest.column_blocks, set()), trainer.rank_state.reading(saved, manifest)]
        self._read(folder, self.folder.files, readings)
        progress = manifest.progress
        set_table_forwards(trainer.model.module, progress["table_forwards"])
        trainer.optimizer.go_on_from(manifest.step)
        trainer.result.go_on_from(progress)
        windows = {int(w): c if self.rank.is_first else {} for w, c in progress["counted"]["windows"].items()}
        reader.count_from(progress["counted"]["epoch"], windows)
        self.tell(f"resumed from {folder}: {manifest.step:,} steps, {manifest.samples_consumed:,} samples")

    def _warm_start(self, trainer: Trainer) -> None:
        rules = self.config.checkpoint.warm_start
        files = self.folder.files
        path, steps = from_first_rank(find_checkpoints(rules.path, files) if self.rank.is_first else None)
        source = CheckpointFolder(path, files)
        manifest = choose(source, self.rank.index, self.saver.group, self.tell, steps)
        if manifest is None:
            raise CheckpointError(f"checkpoint.warm_start.path {rules.path} holds no checkpoint")
        folder = source.path_of(manifest.step)
        saved = self._saved_tensors(folder, files)
        model = ModelState(self.plan, trainer.model, trainer.optimizer)
        of_model = {key: tensor for key, tensor in saved.items() if not of_ranks(key)}
        fresh, faults = apply_rules(rules, of_model, model.expected(manifest.column_blocks))
        check(
            faults, folder, "say so by a rule of checkpoint.warm_start: new_tables, grown_tables, dropped_tables, ..."
        )
        self._read(folder, files, [model.reading(saved, manifest.column_blocks, fresh)])
        if not rules.fresh_optimizer:
            set_table_forwards(trainer.model.module, manifest.progress["table_forwards"])
        self.tell(f"began with the weights of {folder}")

    def _saved_tensors(self, folder: str, files: Files) -> dict[str, Saved]:
        saved, error = None, None
        if self.rank.is_first:
            try:
                saved = saved_tensors(folder, files)
            except OSError as e:
                error = str(e)
        saved, error = from_first_rank((saved, error))
        if error:
            raise CheckpointError(f"cannot read {folder}: {error}")
        return saved

    def _read(self, folder: str, files: Files, readings: list[Any]) -> None:
        phases.enter("load_read")
        read_parts(folder, [target for r in readings for target in r.targets], files, self.saver.group)
        for reading in readings:
            reading.finish()
        dist.barrier(self.saver.group)

    def _show(self) -> None:
        """Puts the saves that have ended since the last call on the board."""
        for result in self.saver.results[self.num_shown :]:
            figures = {"stall_s": result.stall_s, "write_s": result.write_s, "bytes": result.num_bytes}
            self.board.scalars("checkpoint", figures | {"failed": float(result.error is not None)}, result.step)
        self.num_shown = len(self.saver.results)


def check(faults: list[str], folder: str, way_out: str = "") -> None:
    """Raises CheckpointError that lists the faults, if there are any."""
    if faults:
        raise CheckpointError(
            f"{folder} does not fit this model:{first_lines(faults, SHOWN_MISMATCHES)}"
            + (f"\n{way_out}" if way_out else "")
        )


def find_checkpoints(path: str, files: Files) -> tuple[str, list[int] | None]:
    """(folder of checkpoints, its steps or None for all) of a step folder, a folder of checkpoints or a run folder."""
    path = path.rstrip("/")
    parent, _, name = path.rpartition("/")
    if files.exists(f"{path}/{NAME}") and name.startswith("step_") and name[5:].isdigit():
        return parent or ".", [int(name[5:])]
    inner = f"{path}/checkpoints"
    return (path, None) if CheckpointFolder(path, files).steps() else (inner, None)
