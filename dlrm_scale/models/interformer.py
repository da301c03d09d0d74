"""InterFormer (arXiv 2411.09852): two arches, one for the features and one for the history, that exchange summaries.

Algorithm 1, with our readings of what it leaves open in docs/interformer.md:

    X_sum = cross(X);  S = [X_sum || MaskNet(events)]
    each layer:  S_sum = cross(S);  X, S = interaction([X || S_sum]), sequence(S, X_sum);  X_sum = cross(X)
    logits = head([X_sum || cross(S)])

Modes that cut the exchange build only the modules that they need, so that each parameter always gets a gradient.
"""

# B batch  F dense features  X non-sequence tokens  E events' tokens  N = CLS + events  d token dim  T tasks
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from dlrm_scale.config import InterFormerConfig
from dlrm_scale.errors import ConfigError
from dlrm_scale.features import FeatureSchema
from dlrm_scale.models.attention import AttentionPooling, SelfAttention
from dlrm_scale.models.cross import LearnedSummary, NonSequenceSummary, SequenceSummary, num_sequence_summary
from dlrm_scale.models.dhen import InteractionArch
from dlrm_scale.models.inputs import Embedded, categorical_vectors, check_lengths, sequence_lengths, valid_mask
from dlrm_scale.models.layers import RMSNorm, TokenMix, linear, mlp
from dlrm_scale.models.length_chunks import LengthChunks, cut_by_length
from dlrm_scale.models.masknet import MaskNet
from dlrm_scale.models.pffn import build_pffn

BRANCH_SCALE = 0.1  # at the start; 0.01 and 1 did worse on Amazon reviews


class Projections(nn.Module):
    """Brings vectors of tables whose width is not d to d, by one matrix a table; the others pass."""

    def __init__(self, schema: FeatureSchema, tables: set[str], dim: int) -> None:
        super().__init__()
        widths = {name: schema.tables[name].embedding_dim for name in sorted(tables)}
        self.by_table = nn.ModuleDict({name: linear(w, dim, bias=False) for name, w in widths.items() if w != dim})

    def forward(self, table: str, vectors: Tensor) -> Tensor:
        return self.by_table[table](vectors) if table in self.by_table else vectors


class FeatureTokens(nn.Module):
    """X^(1) (Eq. 5): one token of all dense features (where there are any) and one a categorical feature.

    With `num_feature_tokens`, LCE (App. A.2.1) mixes them to that many.

    Raises:
        ConfigError: num_feature_tokens is not fewer than there are.
    """

    def __init__(self, schema: FeatureSchema, config: InterFormerConfig) -> None:
        super().__init__()
        self.schema = schema
        dim = config.dim
        self.dense = linear(len(schema.dense), dim, bias=False) if schema.dense else None
        self.project = Projections(schema, {f.table for f in schema.categorical}, dim)
        num_given = len(schema.categorical) + bool(schema.dense)
        self.num_tokens = config.num_feature_tokens or num_given
        if config.num_feature_tokens is not None and config.num_feature_tokens >= num_given:
            raise ConfigError(
                f"model.num_feature_tokens is {config.num_feature_tokens}, but the features make only {num_given} tokens; leave it out"
            )
        self.mix = TokenMix(num_given, self.num_tokens) if config.num_feature_tokens else None

    def forward(self, dense_BF: Tensor, pooled: KeyedTensor | None, embedded: Embedded | None) -> Tensor:
        vectors = categorical_vectors(self.schema, pooled, embedded)
        tokens = [self.project(f.table, v) for f, v in zip(self.schema.categorical, vectors, strict=True)]
        if self.dense is not None:
            tokens.insert(0, self.dense(dense_BF))
        tokens_BXd = torch.stack(tokens, dim=1)
        return tokens_BXd if self.mix is None else self.mix(tokens_BXd)


class EventTokens(nn.Module):
    """One token an event: all sequences' fields joined event by event, unified by MaskNet (Eq. 6).

    Sequences are joined by index from the oldest event on; an event counts when any sequence has one there.
    """

    def __init__(self, schema: FeatureSchema, config: InterFormerConfig) -> None:
        super().__init__()
        self.sequences = schema.sequences
        self.num_events = max(s.max_length for s in schema.sequences)
        self.project = Projections(schema, set(schema.sequence_tables), config.dim)
        self.unify = MaskNet(len(schema.sequence_fields), config.dim, config.mask_ratio, config.mask_activation)

    def lengths(self, embedded: Embedded) -> Tensor:
        """(B,): events of each sample."""
        return torch.stack([sequence_lengths(sequence, embedded) for sequence in self.sequences]).amax(0)

    def forward(self, embedded: Embedded, chunks: LengthChunks) -> list[Tensor]:
        """(b, E, d) for each chunk."""
        by_sequence = []
        for sequence in self.sequences:
            fields = [self.project(f.table, embedded[f.name].values()) for f in sequence.fields]
            jagged = embedded[sequence.fields[0].name]
            check_lengths(jagged, sequence.max_length)
            joined_VE = fields[0] if len(fields) == 1 else torch.cat(fields, dim=1)
            by_sequence.append(chunks.padded(joined_VE, jagged.lengths(), jagged.offsets()))
        return [self.unify(torch.cat(parts, dim=2)) for parts in zip(*by_sequence, strict=True)]


class SequenceArch(nn.Module):
    """Eq. 9: S' = MHA(PFFN(X_sum, S)), each in a pre-norm residual branch unless `paper_literal`.

    A branch is scaled by a learned vector that starts small (LayerScale, arXiv 2103.17239, Eq. 5), so that the tokens first
    pass almost as they are: without it the per-sample PFFN overfits small data before the rest has learned.

    (B, N, d), X_sum (B, C, d), lengths_B, CLS tokens included -> (B, N, d)
    """

    def __init__(self, config: InterFormerConfig, num_tokens: int) -> None:
        super().__init__()
        self.literal = config.paper_literal
        self.pffn = build_pffn(config, num_tokens)
        self.attention = None
        if config.attention:
            self.attention = SelfAttention(config.dim, config.num_heads, num_tokens, config.rope_base)
        self.pffn_norm = None if self.pffn is None else self._pre_norm(config.dim)
        self.attention_norm = None if self.attention is None else self._pre_norm(config.dim)
        self.pffn_scale_d = None if self.pffn is None else self._branch_scale(config.dim)
        self.attention_scale_d = None if self.attention is None else self._branch_scale(config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens_BNd: Tensor, summary_BCd: Tensor, lengths_B: Tensor) -> Tensor:
        if self.pffn is not None:
            tokens_BNd = self._add(tokens_BNd, self.pffn(summary_BCd, self.pffn_norm(tokens_BNd)), self.pffn_scale_d)
        if self.attention is not None:
            branch_BNd = self.attention(self.attention_norm(tokens_BNd), lengths_B)
            tokens_BNd = self._add(tokens_BNd, branch_BNd, self.attention_scale_d)
        return tokens_BNd

    def _pre_norm(self, dim: int) -> nn.Module:
        return nn.Identity() if self.literal else RMSNorm(dim)

    def _branch_scale(self, dim: int) -> nn.Parameter | None:
        return None if self.literal else nn.Parameter(torch.full((dim,), BRANCH_SCALE))

    def _add(self, tokens_BNd: Tensor, branch_BNd: Tensor, scale_d: nn.Parameter | None) -> Tensor:
        branch_BNd = self.dropout(branch_BNd)
        return branch_BNd if scale_d is None else tokens_BNd + scale_d * branch_BNd


class EarlyPooling(nn.Module):
    """One token of all events, for mode `sole`: their mean, an MLP over the padded sequence, or attention by one query."""

    def __init__(self, config: InterFormerConfig, num_events: int) -> None:
        super().__init__()
        self.kind = config.early_pooling
        if self.kind == "mlp":
            self.pool = mlp((num_events * config.dim, config.dim, config.dim), nn.SiLU)
        elif self.kind == "mha":
            self.pool = AttentionPooling(config.dim, config.num_heads, num_queries=1)

    def forward(self, events_BEd: Tensor, lengths_B: Tensor) -> Tensor:
        valid_BE = valid_mask(lengths_B, events_BEd.shape[1])
        if self.kind == "mha":
            return self.pool(events_BEd, valid_BE)
        events_BEd = events_BEd * valid_BE.unsqueeze(2)
        if self.kind == "mlp":
            return self.pool(events_BEd.flatten(1)).unsqueeze(1)
        return events_BEd.sum(1, keepdim=True) / lengths_B.clamp(min=1)[:, None, None]


class InterFormer(nn.Module):
    """The dense arch: all modes with two arches (int, s2n, n2s, sep), and sole, which has only the interaction arch.

    Raises:
        ConfigError: the schema has sequences only, or too few tokens for dot products.
    """

    def __init__(self, schema: FeatureSchema, config: InterFormerConfig) -> None:
        super().__init__()
        if not schema.dense and not schema.categorical:
            raise ConfigError(
                "model.arch interformer needs a dense or categorical feature beside the sequences, but features has none; "
                "add one to features.dense or features.categorical"
            )
        self.features = FeatureTokens(schema, config)
        self.events = EventTokens(schema, config) if schema.sequences else None
        self.two_arches = config.mode != "sole"
        if self.two_arches:
            self._build_two_arches(config)
        else:
            self._build_sole(config)
        num_summary = config.num_cls + (num_sequence_summary(config) if self.two_arches else 0)
        self.head = mlp((num_summary * config.dim, *config.head_hidden, len(schema.labels)), nn.SiLU, config.dropout)

    def _build_two_arches(self, config: InterFormerConfig) -> None:
        num_x, num_layers = self.features.num_tokens, config.num_layers
        self.num_cls = config.num_cls
        num_tokens = config.num_cls + self.events.num_events
        x_to_s, self.s_to_x = config.mode in ("int", "n2s"), config.mode in ("int", "s2n")
        num_told = num_sequence_summary(config) if self.s_to_x else 0
        # The first summary also makes the CLS tokens; the later ones only feed the PFFN.
        num_x_summaries = 1 if config.pffn == "none" else num_layers
        self.x_summaries = nn.ModuleList(
            NonSequenceSummary(num_x, config) if x_to_s else LearnedSummary(config) for _ in range(num_x_summaries)
        )
        self.s_summaries = nn.ModuleList(SequenceSummary(config) for _ in range(num_layers if self.s_to_x else 0))
        self.interactions = nn.ModuleList(InteractionArch(num_x + num_told, num_x, config) for _ in range(num_layers))
        self.sequences = nn.ModuleList(SequenceArch(config, num_tokens) for _ in range(num_layers))
        self.final_x, self.final_s = NonSequenceSummary(num_x, config), SequenceSummary(config)

    def _build_sole(self, config: InterFormerConfig) -> None:
        self.early_pooling = EarlyPooling(config, self.events.num_events) if self.events is not None else None
        num_x = self.features.num_tokens + (self.early_pooling is not None)
        self.interactions = nn.ModuleList(InteractionArch(num_x, num_x, config) for _ in range(config.num_layers))
        self.final_x = NonSequenceSummary(num_x, config)

    @property
    def regions(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """What `compile_arch` compiles: modules that see each sample once, and modules that see sequences.

        Not the summaries of sequences: torch 2.13 compiles them anew for each length, and gives up after eight.
        """
        plain = [self.features, *self.interactions, self.final_x, self.head]
        if not self.two_arches:
            return plain, []
        return [*plain, *self.x_summaries], [self.events.unify, *self.sequences]

    def forward(self, dense_BF: Tensor, pooled: KeyedTensor | None, embedded: Embedded | None) -> Tensor:
        """Logits (B, T) of dense features (B, F), pooled vectors (B, d_table) and events by feature name."""
        x_BXd = self.features(dense_BF, pooled, embedded)
        forward = self._forward_two_arches if self.two_arches else self._forward_sole
        return self.head(forward(x_BXd, embedded).flatten(1))

    def _forward_two_arches(self, x_BXd: Tensor, embedded: Embedded) -> Tensor:
        lengths_B = self.events.lengths(embedded)
        chunks = cut_by_length(lengths_B, self.events.num_events)
        x_BXd, lengths_B = chunks.sort(x_BXd), chunks.sort(lengths_B)
        lengths, num_tokens = chunks.split(lengths_B), chunks.split(lengths_B + self.num_cls)
        summary_BCd = self.x_summaries[0](x_BXd)
        heads_and_events = zip(chunks.split(summary_BCd), self.events(embedded, chunks), strict=True)
        s = [torch.cat(parts, dim=1) for parts in heads_and_events]  # by chunk, as all that is of sequences
        valid = [valid_mask(own, tokens.shape[1]) for own, tokens in zip(num_tokens, s, strict=True)]
        for layer, (interaction, sequence) in enumerate(zip(self.interactions, self.sequences, strict=True)):
            if 0 < layer < len(self.x_summaries):
                summary_BCd = self.x_summaries[layer](x_BXd)
            seen_BYd = x_BXd
            if self.s_to_x:
                seen_BYd = torch.cat((x_BXd, _each(self.s_summaries[layer], s, valid, lengths)), dim=1)
            # Neither reads the other's result: both take this layer's summaries.
            x_BXd, s = interaction(seen_BYd), [*map(sequence, s, chunks.split(summary_BCd), num_tokens)]
        return chunks.unsort(torch.cat((self.final_x(x_BXd), _each(self.final_s, s, valid, lengths)), dim=1))

    def _forward_sole(self, x_BXd: Tensor, embedded: Embedded | None) -> Tensor:
        if self.early_pooling is not None:
            lengths_B = self.events.lengths(embedded)
            (events_BEd,) = self.events(embedded, LengthChunks([len(lengths_B)], [self.events.num_events]))
            x_BXd = torch.cat((x_BXd, self.early_pooling(events_BEd, lengths_B)), dim=1)
        for interaction in self.interactions:
            x_BXd = interaction(x_BXd)
        return self.final_x(x_BXd)


def _each(summary: SequenceSummary, *by_chunk: list[Tensor]) -> Tensor:
    """The summary of each chunk, one below the other: (B, Y, d)."""
    parts = list(map(summary, *by_chunk))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
