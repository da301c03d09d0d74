"""DLRM-DCNv2: DLRM with low-rank cross layers instead of dot products, as MLPerf trains it."""

from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from dlrm_scale.config import DCNv2Config
from dlrm_scale.features import FeatureSchema
from dlrm_scale.models.dlrm import DenseAndSparse
from dlrm_scale.models.inputs import Embedded
from dlrm_scale.models.interactions import LowRankCross
from dlrm_scale.models.layers import mlp


class DCNv2(nn.Module):
    """Cross layers over all tokens side by side, then the top MLP (ReLU)."""

    def __init__(self, schema: FeatureSchema, config: DCNv2Config) -> None:
        super().__init__()
        self.tokens = DenseAndSparse(schema, config.bottom_hidden)
        width = self.tokens.num_tokens * self.tokens.dim
        self.cross = LowRankCross(width, config.cross_layers, config.cross_rank)
        self.top = mlp((width, *config.top_hidden, len(schema.labels)), nn.ReLU)

    def forward(self, dense_BF: Tensor, pooled: KeyedTensor | None, embedded: Embedded | None) -> Tensor:
        """Logits (B, T) of dense features (B, F), pooled vectors (B, D) and events by feature name."""
        tokens_BND = self.tokens(dense_BF, pooled, embedded)
        return self.top(self.cross(tokens_BND.flatten(1)))
