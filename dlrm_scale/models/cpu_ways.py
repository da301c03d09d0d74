"""Where products take the way of their own that they have in bf16 on a CPU (bf16_linear.py), and how to do without it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_left_out = False


def takes_cpu_way(x: Tensor) -> bool:
    return x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and not _left_out


@contextmanager
def ways_of_cuda() -> Iterator[None]:
    """Tensors of the CPU are worked on as those of a GPU: PyTorch built for CPUs has no fake ones of CUDA to count on."""
    global _left_out
    _left_out = True
    try:
        yield
    finally:
        _left_out = False
