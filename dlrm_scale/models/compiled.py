"""A dense arch by torch.compile; as it is, and saying so, where it cannot be compiled."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._functorch import config as functorch_config


def compile_arch(arch: nn.Module, on_cpu: bool) -> None:
    """Replaces the `forward` of the arch, or of its regions, so that parameters keep their names and hooks run outside of what is compiled.

    Args:
        arch: where it has `regions` (modules, and modules that see sequences), these are compiled one by one: layers of one
            class share their code, and how a batch is cut into chunks of other lengths stays outside.
    """
    # By itself the backward graph is compiled in the first backward pass, where it is too late to go on without.
    functorch_config.force_non_lazy_backward_lowering = True
    plain, of_sequences = arch.regions if hasattr(arch, "regions") else ([arch], [])
    compiled = _CompiledArch(type(arch).__name__)
    for module in plain:
        module.forward = compiled.region(module.forward, dynamic=None)
    for module in of_sequences:  # on a CPU each chunk has a length of its own
        module.forward = compiled.region(module.forward, dynamic=on_cpu or None)


class _CompiledArch:
    def __init__(self, name: str) -> None:
        self.name, self.is_plain = name, False

    def region(self, plain: Callable[..., Any], dynamic: bool | None) -> Callable[..., Any]:
        compiled = torch.compile(plain, dynamic=dynamic)

        def forward(*args: Any) -> Any:
            if not self.is_plain:
                try:
                    return compiled(*args)
                except TorchDynamoException as e:  # no C++ compiler or Triton, or an operation that it does not know
                    self._give_up(e)
            return plain(*args)

        return forward

    def _give_up(self, e: TorchDynamoException) -> None:
        self.is_plain = True
        lines = [line.strip() for line in str(e).splitlines()]
        why = next((line for line in lines if line and not line.endswith("raised:")), type(e).__name__)
        warnings.warn(f"train.compile: {self.name} runs as it is, since it cannot be compiled: {why}", stacklevel=2)
