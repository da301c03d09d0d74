"""The sharders that both the planner and `DistributedModelParallel` are given: the fused optimizer's parameters in them, and
in what precision their rows travel."""

from typing import Any

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardingType
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.types import QuantizedCommCodecs

import dlrm_scale.sharding.index_dedup  # noqa: F401  what `use_index_dedup` needs on a CPU
from dlrm_scale.communication_config import PLAIN, Communication
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


Codecs = dict[str, QuantizedCommCodecs] | None  # by collective; None: everything in fp32


class BagSharder(EmbeddingBagCollectionSharder):
    """All sharding types on every device: stock TorchRec offers the row-wise ones for CUDA only, though the CPU runs them.

    `replicates` tells whether a replicated table could train by the same rule as a sharded one.
    """

    def __init__(self, fused_params: dict[str, Any], codecs: Codecs, replicates: bool) -> None:
        super().__init__(fused_params=fused_params, qcomm_codecs_registry=codecs)
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
    optimizer: SparseOptimizer,
    device_type: str,
    communication: Communication = PLAIN,
    prefetch: bool = False,
    index_dedup: bool = False,
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
    if device_type == "cpu" and optimizer.stochastic_rounding:
        raise ConfigError(
            "train.sparse.stochastic_rounding is true, but FBGEMM 1.8.0's CPU kernels ignore it and round to the nearest; set it to false on "
            "CPU, or give tables whose steps are small data_type: fp32"
        )
    fused: dict[str, Any] = {
        "optimizer": FUSED_OPTIMIZERS[optimizer.name],
        "learning_rate": optimizer.lr,
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "stochastic_rounding": optimizer.stochastic_rounding,  # FBGEMM's own default is true
    }
    if prefetch:
        fused["prefetch_pipeline"] = True  # locks a batch's rows in the cache until its backward pass
    if optimizer.weight_decay and optimizer.name == "rowwise_adagrad":
        fused["weight_decay_mode"] = WeightDecayMode.L2  # without a mode, this kernel ignores weight_decay
    replicates = optimizer.name in PLAIN_SPARSE_OPTIMIZERS
    codecs = _codecs(communication)
    return [
        BagSharder(dict(fused), codecs, replicates),
        SequenceSharder(fused_params=dict(fused), qcomm_codecs_registry=codecs, use_index_dedup=index_dedup),
    ]


def _codecs(communication: Communication) -> Codecs:
    """Asked for without a device: told that it is the CPU, TorchRec 1.8.0 replaces bf16 by fp16, though gloo has bf16."""
    forward, backward = CommType(communication.forward), CommType(communication.backward)
    return get_qcomm_codecs_registry(QCommsConfig(forward_precision=forward, backward_precision=backward))
