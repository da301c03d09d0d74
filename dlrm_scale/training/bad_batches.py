"""What becomes of a micro-batch that is not finite: kept in a file for tools/replay_batch, and skipped, or the run ends."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dlrm_scale.config import RunConfig
from dlrm_scale.config_io import fingerprint
from dlrm_scale.data.batch import RecBatch
from dlrm_scale.errors import DataError, DivergedError, RollbackRequested
from dlrm_scale.resilience.guards import NonFinite
from dlrm_scale.training.ranks import Rank

FORMAT = 1
ADVICE = "lower train.dense.lr and train.sparse.lr, warm up longer (train.schedule.warmup_steps) or clip (train.clip_grad_norm)"


class BadBatches:
    """Carries out `train.nonfinite`. Called by the guard on every rank, with the same finding.

    Attributes:
        num_skipped: micro-batches, of all ranks together, that were dropped.

    Args:
        left_out_steps: 0-based steps to drop whatever they hold: an earlier attempt went back from them.
    """

    def __init__(self, config: RunConfig, rank: Rank, run_dir: Path | None, left_out_steps: set[int]) -> None:
        self.config, self.rank, self.left_out_steps = config, rank, left_out_steps
        self.folder = None if run_dir is None else run_dir / "bad_batches"
        self.batch: RecBatch | None = None
        self.micro_batch = -1
        self.num_skipped = 0
        self.in_a_row = (-1, 0)  # the last bad micro-batch, and how many with it

    def go_on_from(self, num_steps: int, num_skipped: int) -> None:
        """As after so many steps, in which so many micro-batches were dropped."""
        self.micro_batch = num_steps * self.config.train.accumulate_steps - 1
        self.num_skipped = num_skipped

    def began(self, batch: RecBatch) -> bool:
        """Takes note of the micro-batch that the next backward pass is of; whether its step is to be left out."""
        self.batch = batch
        self.micro_batch += 1
        leave_out = self._step in self.left_out_steps
        self.num_skipped += leave_out
        return leave_out

    @property
    def _step(self) -> int:
        return self.micro_batch // self.config.train.accumulate_steps

    def __call__(self, bad: NonFinite) -> None:
        """
        Raises:
            DivergedError: the policy is to stop, or too many came in a row.
            RollbackRequested: the policy is to go back.
        """
        step = self._step
        kept = self._keep(bad, step)
        said = f"{bad} in step {step}"
        policy, limit = self.config.train.nonfinite, self.config.train.max_skipped
        if policy == "rollback":
            raise RollbackRequested(f"{said}; {kept}", step)
        if policy == "stop":
            raise DivergedError(f"{said}; no table or parameter has learned from it; {ADVICE}; {kept}")
        last, count = self.in_a_row
        count = count + 1 if self.micro_batch == last + 1 else 1
        self.in_a_row = (self.micro_batch, count)
        if count > limit:
            raise DivergedError(f"{said}, after {limit} in a row were skipped (train.max_skipped); {ADVICE}; {kept}")
        self.num_skipped += 1
        if self.rank.is_first:
            print(f"warning: {said}: skipped; {kept}", flush=True)

    def _keep(self, bad: NonFinite, step: int) -> str:
        """Writes this rank's part if it is one that saw it; says where all of them are."""
        if self.folder is None:
            return "not kept: the run has no folder"
        path = self.folder / f"step_{step}_rank_{self.rank.index}.pt"
        if self.rank.index in bad.seen:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_bad_batch(path, self.batch, self.config, self.rank, step, bad)
        saw = min(bad.seen)
        return f"see python -m tools.replay_batch {self.folder / f'step_{step}_rank_{saw}.pt'}"


def save_bad_batch(path: Path, batch: RecBatch, config: RunConfig, rank: Rank, step: int, bad: NonFinite) -> None:
    """One rank's micro-batch as plain tensors, with all it takes to rebuild the model that it was fed to."""
    torch.save(
        {
            "format": FORMAT,
            "step": step,
            "rank": rank.index,
            "world_size": rank.world_size,
            "seen": bad.seen,
            "config": config.model_dump_json(),
            "config_fingerprint": fingerprint(config),
            "seed": config.seed,
            "batch": {f.name: _plain(getattr(batch, f.name)) for f in fields(RecBatch)},
        },
        path,
    )


def load_bad_batch(path: str | Path) -> tuple[dict[str, Any], RecBatch]:
    """What stands beside the batch, and the batch.

    Raises:
        DataError: there is no such file, or it is none of `save_bad_batch`.
    """
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
        batch = RecBatch(**{name: _kjt(value) for name, value in saved.pop("batch").items()})
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from None
    except Exception as e:
        raise DataError(f"{path} is not a kept batch (runs write them to bad_batches/): {e}") from None
    if saved["format"] != FORMAT:
        raise DataError(f"{path} has format {saved['format']}; this version reads {FORMAT}")
    return saved, batch


def _plain(value: Any) -> Any:
    if isinstance(value, KeyedJaggedTensor):
        return {"keys": list(value.keys()), "values": value.values().cpu(), "lengths": value.lengths().cpu()}
    return None if value is None else value.cpu()


def _kjt(value: Any) -> Any:
    return KeyedJaggedTensor(**value) if isinstance(value, dict) else value
