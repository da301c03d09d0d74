"""Modules with shapes and no memory: what planning and dry runs build, and what sharded tables are made from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

META = torch.device("meta")


class NoFirstValues(TorchFunctionMode):
    """Leaves out what fills a tensor without memory with its first values: torch works that out in Python, milliseconds each."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init" or getattr(func, "__name__", "") in (
            "normal_",
            "uniform_",
        ):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules made inside are on the meta device."""
    with META, NoFirstValues():
        yield
