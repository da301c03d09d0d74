"""The embedding tables of a schema, in TorchRec's two collections.

Kept apart from the dense archs because TorchRec shards and pipelines it: the train pipeline traces `forward` with torch.fx,
so it holds nothing but the two lookups.
"""

from contextlib import nullcontext

import torch
from torch import nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from dlrm_scale.features import FeatureSchema
from dlrm_scale.meta import META, without_memory

_DATA_TYPE = {"fp32": DataType.FP32, "fp16": DataType.FP16}
_POOLING = {"sum": PoolingType.SUM, "mean": PoolingType.MEAN}


class Embeddings(nn.Module):
    """Tables of `schema`; on the meta device they have shapes and no memory.

    Attributes:
        ebc: pools the tables that no sequence reads, each feature to one vector a sample; None without such tables.
        ec: looks up the tables that a sequence reads, one vector an id; None without such tables.
    """

    def __init__(self, schema: FeatureSchema, device: torch.device = META) -> None:
        super().__init__()
        bag_tables = [
            EmbeddingBagConfig(**_columns(schema, name, device), pooling=_POOLING[table.pooling])
            for name, table in schema.tables.items()
            if name not in schema.sequence_tables
        ]
        id_tables = [
            EmbeddingConfig(**_columns(schema, name, device))
            for name in schema.tables
            if name in schema.sequence_tables
        ]
        with without_memory() if device == META else nullcontext():
            self.ebc = EmbeddingBagCollection(bag_tables, device=device) if bag_tables else None
            self.ec = EmbeddingCollection(id_tables, device=device) if id_tables else None

    def forward(
        self, bags: KeyedJaggedTensor | None, sequences: KeyedJaggedTensor | None
    ) -> tuple[KeyedTensor | None, dict[str, JaggedTensor] | None]:
        """Vectors by feature name: pooled ones of `bags`, one an id of `sequences`. Sharded, both are awaitables."""
        pooled = None if self.ebc is None else self.ebc(bags)
        embedded = None if self.ec is None else self.ec(sequences)
        return pooled, embedded


def _columns(schema: FeatureSchema, name: str, device: torch.device) -> dict:
    table = schema.tables[name]
    return {
        "name": name,
        "num_embeddings": table.num_embeddings,
        "embedding_dim": table.embedding_dim,
        "feature_names": list(schema.features_of(name)),
        "data_type": _DATA_TYPE[table.data_type],
        # what is sharded from meta is filled by `initialise_tables`: TorchRec need not draw all numbers before
        "init_fn": _leave if device == META else None,
    }


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight
