"""What a training step of the dense arch has to do, counted, and how long a GPU of a class takes at its data sheet's peaks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dlrm_scale.config import RunConfig
from dlrm_scale.models.dense_trace import Device, count_flops, fake_dense, input_tensors, trace_dense
from dlrm_scale.models.kernels import with_torch_pffn
from tools.benchmark.peaks import Peaks


@dataclass(frozen=True)
class DenseWork:
    """Of one step on a device, sequences at max_length, by PyTorch's own operations, but on a CPU in bf16 by our kernels,
    where it can compile them: these keep and move less.

    forward_flops, backward_flops: that the model asks for, as `count_flops` counts them.
    activation_bytes: that autograd keeps at most at once.
    kept_bytes: inputs and what autograd keeps, also while layers are run again, written once and read once; parameters read
        twice, all gradients written.
    op_bytes: every operation reads its inputs and writes its outputs, as they do when none are fused.
    """

    forward_flops: int
    backward_flops: int
    activation_bytes: int
    kept_bytes: int
    op_bytes: int

    @property
    def flops(self) -> int:
        return self.forward_flops + self.backward_flops


def count_dense(config: RunConfig, batch_size: int, device: Device) -> DenseWork:
    """By running it on fake tensors: no memory, some seconds. Raises ConfigError: the features do not suit the arch."""
    config = with_torch_pffn(config)
    trace = trace_dense(config, batch_size, device)
    with fake_dense(config, batch_size, device) as (dense, inputs), _Traffic() as traffic:
        dense(*inputs).sum().backward()
    kept = trace.kept_bytes + sum(trace.layer_bytes)
    least = 2 * kept + 2 * _bytes(input_tensors(inputs)) + 3 * _bytes(list(dense.parameters()))
    return DenseWork(*count_flops(config, batch_size), trace.activation_bytes, least, traffic.num_bytes)


def limits_ms(work: DenseWork, peaks: Peaks, precision: str) -> dict[str, float | None]:
    """Of a step: no less than the first two, and about the last where no operations are fused. None: no peak of that precision."""
    flops_per_s = peaks.flops_per_s.get(precision)
    return {
        "matrix": work.flops / flops_per_s * 1e3 if flops_per_s else None,
        "kept": work.kept_bytes / peaks.copy_bytes_per_s * 1e3,
        "op_by_op": work.op_bytes / peaks.copy_bytes_per_s * 1e3,
    }


class _Traffic(TorchDispatchMode):
    """Bytes of the tensors that operations read and write; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read, written = (
            [t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in ((args, dict(kwargs or {})), out)
        )
        storages = {t.untyped_storage()._cdata for t in read}
        is_view = not func._schema.is_mutable and any(t.untyped_storage()._cdata in storages for t in written)
        if written and not is_view:
            self.num_bytes += _bytes(read) + _bytes(written)
        return out


def _bytes(tensors: list[Tensor]) -> int:
    """An expanded tensor has no more than its storage."""
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)
