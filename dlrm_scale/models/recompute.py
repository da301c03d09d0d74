"""Activation checkpointing: layers whose inner tensors are thrown away forward and computed anew backward."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_layers(arch: nn.Module) -> None:
    """Has each element of the arch's lists of layers keep only its inputs for the backward pass.

    The gradients are bitwise those without: dropout draws the same numbers again, autocast casts the same way. Replaces the
    layers' `forward`, so that parameters keep their names.
    """
    for layers in arch.children():
        for layer in layers if isinstance(layers, nn.ModuleList) else ():
            layer.forward = Recomputed(layer.forward)


class Recomputed:
    """A layer's `forward` under `checkpoint`. `plain` is what it runs, and runs again."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self.plain = plain

    def __call__(self, *args: Any) -> Any:
        return checkpoint(self.plain, *args, use_reentrant=False)


def recomputed_layers(arch: nn.Module) -> list[Recomputed]:
    return [module.forward for module in arch.modules() if isinstance(module.forward, Recomputed)]
