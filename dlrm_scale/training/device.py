"""What a configuration asks of its device, checked before anything is planned or built."""

import torch

from dlrm_scale.config import RunConfig, TrainConfig
from dlrm_scale.errors import ConfigError
from dlrm_scale.models.kernels import fuses_pffn
from dlrm_scale.sharding.plan import Plan


def check_device(config: RunConfig, device: torch.device) -> None:
    """Raises ConfigError: `device` does not have what `config` asks for."""
    train = config.train
    if device.type != "cuda" and train.tf32:
        raise ConfigError("train.tf32 is true, but only CUDA has TF32; leave it out, or set device=cuda")
    if device.type != "cuda" and train.pipeline == "prefetch":
        raise ConfigError(
            "train.pipeline is prefetch, which fills the caches of tables in host memory, but only CUDA has such; "
            "set train.pipeline=sparse_dist, or device=cuda"
        )
    fuses_pffn(config, device)


def check_caches(train: TrainConfig, plan: Plan) -> None:
    """Raises ConfigError: train.pipeline fills caches ahead, and `plan` has none."""
    if train.pipeline == "prefetch" and not any(t.compute_kernel == "fused_uvm_caching" for t in plan.tables.values()):
        raise ConfigError(
            "train.pipeline is prefetch, but the plan holds no table as fused_uvm_caching, so that there is no cache to fill; set "
            "train.pipeline=sparse_dist, or sharding.tables={NAME: {kernels: [fused_uvm_caching]}}"
        )


def set_product_precision(train: TrainConfig, device: torch.device) -> None:
    """Of fp32 matrix products on CUDA, in this process."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = train.tf32
