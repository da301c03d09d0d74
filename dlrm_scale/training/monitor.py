"""What people watch: TensorBoard's event files, the window of recent predictions, memory."""

import resource
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from dlrm_scale.models.ranking_model import Predictions
from dlrm_scale.training.metrics import binary_metrics
from dlrm_scale.training.ranks import Rank, gather_rows

Metrics = dict[str, dict[str, float]]  # by label, then by metric


@dataclass
class RunningLoss:
    """This rank's losses since the last log, added up on its device without a wait for it."""

    sum: torch.Tensor
    num_steps: int = 0
    num_micro_batches: int = 0

    def add(self, loss: torch.Tensor) -> None:
        self.sum += loss
        self.num_micro_batches += 1

    def clear(self) -> None:
        self.sum.zero_()
        self.num_steps = self.num_micro_batches = 0


class PredictionStore:
    """This rank's predictions: the latest `max_local_rows`, or (None) all since it was made.

    They stay on their device until they are asked for, so that adding a batch never waits for the device.
    """

    def __init__(self, labels: tuple[str, ...], with_groups: bool, max_local_rows: int | None) -> None:
        self.labels = labels
        self.with_groups = with_groups
        self.max_local_rows = max_local_rows
        self.batches: deque[Predictions] = deque()
        self.num_rows = 0

    def add(self, predictions: Predictions) -> None:
        self.batches.append(predictions)
        self.num_rows += len(predictions.weights_B)
        while (
            self.max_local_rows
            and len(self.batches) > 1
            and self.num_rows - len(self.batches[0].weights_B) >= self.max_local_rows
        ):
            self.num_rows -= len(self.batches.popleft().weights_B)

    def clear(self) -> None:
        self.batches.clear()
        self.num_rows = 0

    def metrics(self, rank: Rank) -> Metrics | None:
        """Metrics by label over all ranks' predictions, on rank 0; None on the others. Collective."""
        if not self.batches:
            return {} if rank.is_first else None
        floats = [torch.cat([b.weights_B[:, None], b.labels_BT, b.logits_BT], dim=1) for b in self.batches]
        floats_N = gather_rows(torch.cat(floats).float().cpu(), rank)
        groups_N = gather_rows(torch.cat([b.groups_B for b in self.batches]).cpu(), rank) if self.with_groups else None
        if floats_N is None:
            return None
        columns = floats_N.numpy()
        num_tasks = len(self.labels)
        groups = groups_N.numpy() if groups_N is not None else None
        return {
            label: binary_metrics(columns[:, 1 + num_tasks + t], columns[:, 1 + t], columns[:, 0], groups)
            for t, label in enumerate(self.labels)
        }


class Board:
    """TensorBoard's event files of a run, written by rank 0; on other ranks every call does nothing.

    Args:
        resumed_at: the step that a run goes on from: what an earlier attempt logged after it is no longer shown.
    """

    def __init__(self, run_dir: Path | None, resumed_at: int | None = None) -> None:
        purge = None if resumed_at is None else resumed_at + 1
        self.writer = SummaryWriter(str(run_dir), purge_step=purge) if run_dir else None

    def scalars(self, prefix: str, values: dict[str, float], step: int) -> None:
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(f"{prefix}/{name}", value, step)

    def metrics(self, prefix: str, metrics: Metrics, step: int) -> None:
        for label, values in metrics.items():
            self.scalars(f"{prefix}/{label}", values, step)

    def text(self, tag: str, text: str) -> None:
        if self.writer:
            self.writer.add_text(tag, text, 0)

    def flush(self) -> None:
        """Puts what was logged so far where a kill cannot take it."""
        if self.writer:
            self.writer.flush()

    def close(self) -> None:
        if self.writer:
            self.writer.close()


def peak_memory_bytes(device: torch.device) -> dict[str, int]:
    """Peaks of this process since its start: resident host memory, and allocated GPU memory where there is a GPU."""
    peaks = {"host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peaks["gpu_bytes"] = torch.cuda.max_memory_allocated(device)
    return peaks


def percentiles(values: list[float]) -> dict[str, float]:
    """p10, p50 and p90; empty for no values."""
    return {f"p{q}": float(np.percentile(values, q)) for q in (10, 50, 90)} if values else {}
