"""The sharders that both the planner and `DistributedModelParallel` are given, and the fused optimizer's parameters in them."""

from typing import Any

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardingType
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

from dlrm_scale.config import PLAIN_SPARSE_OPTIMIZERS, SEQUENCE_SHARDING_TYPES, SparseOptimizer
from dlrm_scale.errors import ConfigError

FUSED_OPTIMIZERS = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
    "adam": EmbOptimType.ADAM,
    "partial_rowwise_adam": EmbOptimType.PARTIAL_ROWWISE_ADAM,
    "lamb": EmbOptimType.LAMB,
}


class BagSharder(EmbeddingBagCollectionSharder):
    """All sharding types on every device: stock TorchRec offers the row-wise ones for CUDA only, though the CPU runs them.

    `replicates` tells whether a replicated table could train by the same rule as a sharded one.
    """

    def __init__(self, fused_params: dict[str, Any], replicates: bool) -> None:
        super().__init__(fused_params=fused_params)
        self.replicates = replicates

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return [t.value for t in ShardingType if self.replicates or t != ShardingType.DATA_PARALLEL]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return _kernels(sharding_type)


class SequenceSharder(EmbeddingCollectionSharder):
    def sharding_types(self, compute_device_type: str) -> list[str]:
        return list(SEQUENCE_SHARDING_TYPES)

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return _kernels(sharding_type)


def _kernels(sharding_type: str) -> list[str]:
    kernel = EmbeddingComputeKernel
    return [kernel.DENSE.value if sharding_type == ShardingType.DATA_PARALLEL.value else kernel.FUSED.value]


def make_sharders(
    optimizer: SparseOptimizer, device_type: str, prefetch: bool = False
) -> list[BagSharder | SequenceSharder]:
    """`prefetch`: for a pipeline that fills caches ahead. Raises ConfigError for what the device's kernels do not have, or would ignore."""
    if device_type == "cpu" and optimizer.name not in PLAIN_SPARSE_OPTIMIZERS:
        raise ConfigError(
            f"train.sparse.name is {optimizer.name}, which FBGEMM has for CUDA only; on CPU take one of {', '.join(PLAIN_SPARSE_OPTIMIZERS)}"
        )
    if device_type == "cpu" and optimizer.weight_decay:
        raise ConfigError(
            f"train.sparse.weight_decay is {optimizer.weight_decay}, which FBGEMM's CPU kernels ignore; set it to 0 on CPU"
        )
    fused: dict[str, Any] = {
        "optimizer": FUSED_OPTIMIZERS[optimizer.name],
        "learning_rate": optimizer.lr,
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
    }
    if prefetch:
        fused["prefetch_pipeline"] = True  # locks a batch's rows in the cache until its backward pass
    if optimizer.weight_decay and optimizer.name == "rowwise_adagrad":
        fused["weight_decay_mode"] = WeightDecayMode.L2  # without a mode, this kernel ignores weight_decay
    replicates = optimizer.name in PLAIN_SPARSE_OPTIMIZERS
    return [BagSharder(dict(fused), replicates), SequenceSharder(fused_params=dict(fused))]
