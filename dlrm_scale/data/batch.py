"""RecBatch: what a rank trains on in one step, as TorchRec's pipelines want it (`Pipelineable`)."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


# B samples  F dense features  T tasks
@dataclass
class RecBatch(Pipelineable):
    """One rank's share of a global batch.

    Attributes:
        dense_BF: float32, already transformed; F may be 0.
        bags: ids of the `EmbeddingBagCollection`, keys in `schema.bag_keys` order; None without such features.
        sequences: ids of the `EmbeddingCollection`, keys in `schema.sequence_keys` order (events oldest first);
            None without such features.
        labels_BT: float32, 0 or 1.
        weights_B: float32; rows that only fill up the last batch have weight 0.
        groups_B: int64 group key of each sample; 0 throughout when the schema has none.
        mean_rank_weight: float32 scalar, the weights' sum over all ranks divided by the number of ranks. Dividing each
            rank's weighted loss by it makes the ranks' average the weighted mean over the global batch.
    """

    dense_BF: Tensor
    bags: KeyedJaggedTensor | None
    sequences: KeyedJaggedTensor | None
    labels_BT: Tensor
    weights_B: Tensor
    groups_B: Tensor
    mean_rank_weight: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "RecBatch":
        return RecBatch(*(None if v is None else v.to(device=device, non_blocking=non_blocking) for v in self._parts()))

    def pin_memory(self) -> "RecBatch":
        return RecBatch(*(None if v is None else v.pin_memory() for v in self._parts()))

    def record_stream(self, stream: torch.Stream) -> None:
        for value in self._parts():
            if value is not None:
                value.record_stream(stream)

    @property
    def local_batch_size(self) -> int:
        return self.labels_BT.shape[0]

    def _parts(self) -> list:
        return [getattr(self, f.name) for f in fields(self)]
