"""A dense arch by torch.compile; as it is, and saying so, where it cannot be compiled."""

import warnings
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException


def compile_arch(arch: nn.Module) -> None:
    """Replaces the arch's `forward`, so that parameters keep their names and hooks run outside of what is compiled."""
    arch.forward = _Compiled(arch)


class _Compiled:
    def __init__(self, arch: nn.Module) -> None:
        self.name, self.plain = type(arch).__name__, arch.forward
        self.forward = torch.compile(arch.forward)

    def __call__(self, *args: Any) -> Any:
        if self.forward is self.plain:
            return self.plain(*args)
        try:
            return self.forward(*args)
        except TorchDynamoException as e:  # no C++ compiler or Triton, or an operation that it does not know
            self.forward = self.plain
            why = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
            warnings.warn(f"train.compile: {self.name} runs as it is, since it cannot be compiled: {why}", stacklevel=1)
            return self.plain(*args)
