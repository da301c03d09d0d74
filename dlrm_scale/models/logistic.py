"""Logistic regression: the floor that every other arch must beat.

One linear layer over all embeddings and dense values. Each id adds a number of its own to the logit (its row times the layer's
weights), so the function class is that of a logistic regression on one-hot ids; a sequence adds the mean over its events.
"""

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from dlrm_scale.config import LogisticConfig
from dlrm_scale.features import FeatureSchema
from dlrm_scale.models.inputs import Embedded, categorical_vectors, sequence_means
from dlrm_scale.models.layers import linear


class Logistic(nn.Module):
    def __init__(self, schema: FeatureSchema, config: LogisticConfig) -> None:
        super().__init__()
        self.schema = schema
        width = sum(schema.tables[f.table].embedding_dim for f in (*schema.categorical, *schema.sequence_fields))
        self.out = linear(len(schema.dense) + width, len(schema.labels))

    def forward(self, dense_BF: Tensor, pooled: KeyedTensor | None, embedded: Embedded | None) -> Tensor:
        """Logits (B, T) of dense features (B, F), pooled vectors (B, d_table) and events by feature name."""
        vectors = categorical_vectors(self.schema, pooled, embedded) + sequence_means(self.schema, embedded)
        return self.out(torch.cat((dense_BF, *vectors), dim=1))
