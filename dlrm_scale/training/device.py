"""What a configuration asks of its device, checked before anything is planned or built."""

import torch

from dlrm_scale.config import RunConfig, TrainConfig
from dlrm_scale.errors import ConfigError
from dlrm_scale.models.kernels import fuses_pffn


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


def set_product_precision(train: TrainConfig, device: torch.device) -> None:
    """Of fp32 matrix products on CUDA, in this process."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = train.tf32
