"""DLRM (arXiv 1906.00091): dot products between all pairs of embeddings and the dense features' token."""

# B batch  F dense features  N tokens  D embedding dim  T tasks
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from dlrm_scale.config import DLRMConfig
from dlrm_scale.errors import ConfigError
from dlrm_scale.features import FeatureSchema
from dlrm_scale.models.inputs import Embedded, categorical_vectors, sequence_means
from dlrm_scale.models.interactions import PairwiseDots
from dlrm_scale.models.layers import mlp


class DenseAndSparse(nn.Module):
    """The tokens of both DLRM archs: the bottom MLP's output (where there are dense features), then one token a categorical
    feature and one a sequence field, the mean of its events. All tables have one embedding_dim (RunConfig holds it).

    -> (B, N, D)
    """

    def __init__(self, schema: FeatureSchema, bottom_hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.schema = schema
        self.dim = next(iter(schema.tables.values())).embedding_dim
        self.bottom = None
        if schema.dense:
            self.bottom = nn.Sequential(mlp((len(schema.dense), *bottom_hidden, self.dim), nn.ReLU), nn.ReLU())
        self.num_tokens = bool(schema.dense) + len(schema.categorical) + len(schema.sequence_fields)

    def forward(self, dense_BF: Tensor, pooled: KeyedTensor | None, embedded: Embedded | None) -> Tensor:
        tokens = [] if self.bottom is None else [self.bottom(dense_BF)]
        tokens += categorical_vectors(self.schema, pooled, embedded)
        tokens += sequence_means(self.schema, embedded)
        return torch.stack(tokens, dim=1)


class DLRM(nn.Module):
    """Dots of all token pairs beside the dense token, through the top MLP; ReLU throughout.

    Raises:
        ConfigError: fewer than two tokens.
    """

    def __init__(self, schema: FeatureSchema, config: DLRMConfig) -> None:
        super().__init__()
        self.tokens = DenseAndSparse(schema, config.bottom_hidden)
        if self.tokens.num_tokens < 2:
            raise ConfigError(
                f"model.arch dlrm pairs tokens, but features gives {self.tokens.num_tokens} (all dense features are one); "
                "add a feature or take model.arch=logistic"
            )
        self.dots = PairwiseDots(self.tokens.num_tokens)
        width = self.dots.num_pairs + (self.tokens.dim if schema.dense else 0)
        self.top = mlp((width, *config.top_hidden, len(schema.labels)), nn.ReLU)

    def forward(self, dense_BF: Tensor, pooled: KeyedTensor | None, embedded: Embedded | None) -> Tensor:
        """Logits (B, T) of dense features (B, F), pooled vectors (B, D) and events by feature name."""
        tokens_BND = self.tokens(dense_BF, pooled, embedded)
        dots_BP = self.dots(tokens_BND)
        if self.tokens.bottom is None:
            return self.top(dots_BP)
        return self.top(torch.cat((tokens_BND[:, 0], dots_BP), dim=1))
