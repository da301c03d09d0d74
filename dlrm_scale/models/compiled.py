"""A dense arch by torch.compile; as it is, and saying so, where it cannot be compiled."""

import warnings
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException


def compile_arch(arch: nn.Module, on_cpu: bool) -> None:
    """Replaces the `forward` of the arch, or of its regions, so that parameters keep their names and hooks run outside of what is compiled.

    Args:
        arch: where it has `regions` (modules, and modules that see sequences), these are compiled one by one: layers of one
            class share their code, and how a batch is cut into chunks of other lengths stays outside.
    """
    plain, of_sequences = arch.regions if hasattr(arch, "regions") else ([arch], [])
    for module in plain:
        module.forward = _Compiled(module, dynamic=None)
    for module in of_sequences:
        module.forward = _Compiled(module, dynamic=on_cpu or None)  # elsewhere, all sequences are padded to one length


class _Compiled:
    def __init__(self, module: nn.Module, dynamic: bool | None) -> None:
        self.name, self.plain = type(module).__name__, module.forward
        self.forward = torch.compile(module.forward, dynamic=dynamic)

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
