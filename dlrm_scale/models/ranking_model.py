"""RankingModel: tables, dense arch and loss; what the trainer trains and the planner plans.

`forward` touches the batch only by attribute and calls three modules, because TorchRec's train pipeline traces it. Whatever
needs real tensors (autocast, the loss) lies inside those that hold no table, which the tracer leaves whole.
"""

# B batch  F dense features  T tasks
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchrec.sparse.jagged_tensor import KeyedTensor

from dlrm_scale.config import DCNv2Config, DLRMConfig, InterFormerConfig, LogisticConfig, RunConfig
from dlrm_scale.data.batch import RecBatch
from dlrm_scale.meta import META, without_memory
from dlrm_scale.models.compiled import compile_arch
from dlrm_scale.models.dcn import DCNv2
from dlrm_scale.models.dlrm import DLRM
from dlrm_scale.models.embeddings import Embeddings
from dlrm_scale.models.inputs import Embedded, in_bf16, wait
from dlrm_scale.models.interformer import InterFormer
from dlrm_scale.models.kernels import choose_kernels
from dlrm_scale.models.logistic import Logistic
from dlrm_scale.models.recompute import recompute_layers

Precision = Literal["fp32", "bf16"]
_ARCHS = {InterFormerConfig: InterFormer, DLRMConfig: DLRM, DCNv2Config: DCNv2, LogisticConfig: Logistic}


class Predictions(NamedTuple):
    """What the metrics need of one batch, detached from the graph. `logits_BT` is fp32."""

    logits_BT: Tensor
    labels_BT: Tensor
    weights_B: Tensor
    groups_B: Tensor


class DensePart(nn.Module):
    """The arch on finished lookups, its products in bf16 if asked; logits come back in fp32."""

    def __init__(self, arch: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.arch = arch
        self.bf16 = precision == "bf16"

    def forward(self, dense_BF: Tensor, pooled: KeyedTensor | None, embedded: Embedded | None) -> Tensor:
        pooled, embedded = wait(pooled), wait(embedded)
        if self.bf16:
            dense_BF, pooled, embedded = in_bf16(dense_BF, pooled, embedded)
        with torch.autocast(dense_BF.device.type, torch.bfloat16, enabled=self.bf16):
            logits_BT = self.arch(dense_BF, pooled, embedded)
        return logits_BT.float()


class WeightedLoss(nn.Module):
    """Binary cross-entropy, averaged over tasks and weighted over samples, in fp32.

    sum_b weights_b mean_t BCE_bt / mean_rank_weight: the ranks' average of it is the weighted mean over the global batch,
    so rows of weight 0 count for nothing.
    """

    def forward(
        self, logits_BT: Tensor, labels_BT: Tensor, weights_B: Tensor, groups_B: Tensor, mean_rank_weight: Tensor
    ) -> tuple[Tensor, Predictions]:
        loss_BT = functional.binary_cross_entropy_with_logits(logits_BT, labels_BT, reduction="none")
        loss = loss_BT.mean(1) @ weights_B / mean_rank_weight
        return loss, Predictions(logits_BT.detach(), labels_BT, weights_B, groups_B)


class RankingModel(nn.Module):
    """
    Args:
        embeddings: the tables; sharded in place by `DistributedModelParallel`.
        arch: (dense_BF, pooled, embedded) -> logits_BT.
        precision: of the arch's products; tables, norms, softmax and loss stay fp32.
    """

    def __init__(self, embeddings: Embeddings, arch: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.dense = DensePart(arch, precision)
        self.loss = WeightedLoss()

    @property
    def num_dense_parameters(self) -> int:
        return sum(p.numel() for p in self.dense.parameters())

    def forward(self, batch: RecBatch) -> tuple[Tensor, Predictions]:
        """The scalar loss of this rank, and its predictions."""
        pooled, embedded = self.embeddings(batch.bags, batch.sequences)
        logits_BT = self.dense(batch.dense_BF, pooled, embedded)
        return self.loss(logits_BT, batch.labels_BT, batch.weights_B, batch.groups_B, batch.mean_rank_weight)


def build_model(config: RunConfig, *, table_device: torch.device = META, dense_device: torch.device) -> RankingModel:
    """The model of a run; raises ConfigError: the features do not suit the arch, or the device a kernel that is asked for."""
    embeddings = Embeddings(config.features, table_device)
    if dense_device == META:
        with without_memory():
            arch = build_arch(config)
    else:
        arch = build_arch(config).to(dense_device)
        choose_kernels(arch, config, dense_device)
        if config.train.compile:
            compile_arch(arch, on_cpu=dense_device.type == "cpu")
    return RankingModel(embeddings, arch, config.train.precision)


def build_arch(config: RunConfig) -> nn.Module:
    """The dense arch, on the CPU (inside `without_memory`: without values). Its weights depend on `config.seed` alone; this leaves the global generator as it was.

    Raises:
        ConfigError: the features do not suit the arch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # on the CPU: every device starts from the same weights
        arch = _ARCHS[type(config.model)](config.features, config.model)
    if config.train.activation_checkpointing:
        recompute_layers(arch)
    return arch
