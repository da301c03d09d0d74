"""TorchRec's train pipelines, with a backward pass of the trainer's own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.train_pipeline import (
    PrefetchTrainPipelineSparseDist,
    TrainPipelineBase,
    TrainPipelineSparseDist,
)

from dlrm_scale.sharding.apply import ShardedModel

Backward = Callable[[Tensor], None]


class LossToPass:
    """Stands in for the loss where TorchRec 1.8.0's prefetch pipeline calls `torch.sum(loss, dim=0).backward()`, which its other
    pipelines leave to `_backward`."""

    def __init__(self, loss: Tensor, backward: Backward) -> None:
        self.loss, self.pass_backward = loss, backward

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> "LossToPass":
        if function is not torch.sum:
            raise NotImplementedError(f"the prefetch pipeline calls {function} on the loss, and not only torch.sum")
        return args[0]

    def backward(self) -> None:
        self.pass_backward(self.loss)


def make_pipeline(
    name: str, model: ShardedModel, optimizer: Any, device: torch.device, backward: Backward | None = None
) -> TrainPipelineBase:
    """The pipeline that `train.pipeline` names.

    Args:
        backward: runs the backward pass of a micro-batch's loss; None: as TorchRec does.
    """
    if name == "prefetch":
        return _prefetching(model, optimizer, device, backward)
    kind = {"sparse_dist": TrainPipelineSparseDist, "none": TrainPipelineBase}[name]
    pipeline = kind(model, optimizer, device)
    if backward is not None:
        pipeline._backward = backward
    return pipeline


def _prefetching(
    model: ShardedModel, optimizer: Any, device: torch.device, backward: Backward | None
) -> PrefetchTrainPipelineSparseDist:
    if backward is None:
        return PrefetchTrainPipelineSparseDist(model, optimizer, device)

    def forward(batch: Any) -> tuple[LossToPass, Any]:
        loss, predictions = model(batch)
        return LossToPass(loss, backward), predictions

    return PrefetchTrainPipelineSparseDist(model, optimizer, device, custom_model_fwd=forward)
