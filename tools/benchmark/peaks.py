"""What machines can do at most: as measured, or by data sheets."""

from dataclasses import dataclass

from dlrm_scale.config import TrainConfig


@dataclass(frozen=True)
class Peaks:
    """Of all ranks together."""

    flops_per_s: dict[
        str, float
    ]  # by precision: a large matrix product; no bf16 on a CPU without instructions for it, tf32 on CUDA only
    copy_bytes_per_s: float  # read + write


# Peaks of dense products (data sheets print twice as much, "with sparsity", for tf32 and bf16) and of HBM:
# "NVIDIA A100 Tensor Core GPU" (80GB SXM), "NVIDIA H100 Tensor Core GPU" (SXM), "NVIDIA H200 Tensor Core GPU" (SXM), and an eighth
# of "NVIDIA DGX B200".
GPU_CLASSES = {
    "A100": Peaks({"fp32": 19.5e12, "tf32": 156e12, "bf16": 312e12}, 2.039e12),
    "H100": Peaks({"fp32": 67e12, "tf32": 494.5e12, "bf16": 989.5e12}, 3.35e12),
    "H200": Peaks({"fp32": 67e12, "tf32": 494.5e12, "bf16": 989.5e12}, 4.8e12),
    "B200": Peaks({"fp32": 75e12, "tf32": 1.125e15, "bf16": 2.25e15}, 8e12),
}


def precision_of(train: TrainConfig) -> str:
    """The key of `Peaks.flops_per_s` that a configuration's products are held against."""
    return "tf32" if train.tf32 else train.precision
