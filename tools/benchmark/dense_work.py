"""What a training step of the dense arch has to do, counted, and how long a GPU of a class takes at its data sheet's peaks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dlrm_scale.config import RunConfig
from dlrm_scale.meta import NoFirstValues
from dlrm_scale.models.dense_trace import KeptStorages, input_tensors, lookups, run_counted
from dlrm_scale.models.ranking_model import DensePart, build_arch
from tools.benchmark.roofline import Peaks

# Peaks of dense products (data sheets print twice as much, "with sparsity", for tf32 and bf16) and of HBM:
# "NVIDIA A100 Tensor Core GPU" (80GB SXM), "NVIDIA H100 Tensor Core GPU" (SXM), "NVIDIA H200 Tensor Core GPU" (SXM), and an eighth
# of "NVIDIA DGX B200".
GPU_CLASSES = {
    "A100": Peaks({"fp32": 19.5e12, "tf32": 156e12, "bf16": 312e12}, 2.039e12),
    "H100": Peaks({"fp32": 67e12, "tf32": 494.5e12, "bf16": 989.5e12}, 3.35e12),
    "H200": Peaks({"fp32": 67e12, "tf32": 494.5e12, "bf16": 989.5e12}, 4.8e12),
    "B200": Peaks({"fp32": 75e12, "tf32": 1.125e15, "bf16": 2.25e15}, 8e12),
}


@dataclass(frozen=True)
class DenseWork:
    """Of one step, sequences at max_length, by PyTorch's own operations (one of our kernels keeps and moves less).

    kept_bytes: inputs and what autograd keeps, written once and read once; parameters read twice, all gradients written.
    op_bytes: every operation reads its inputs and writes its outputs, as they do when none are fused. Operators are the CPU's,
        where a norm is several.
    """

    forward_flops: int
    backward_flops: int
    activation_bytes: int
    kept_bytes: int
    op_bytes: int

    @property
    def flops(self) -> int:
        return self.forward_flops + self.backward_flops


def count_dense(config: RunConfig, batch_size: int) -> DenseWork:
    """By running it on fake tensors: no memory, some seconds. Raises ConfigError: the features do not suit the arch."""
    with FakeTensorMode():
        with NoFirstValues():
            dense = DensePart(build_arch(config), config.train.precision)
        inputs = lookups(config.features, batch_size)
        parameters, given = list(dense.parameters()), input_tensors(inputs)
        kept, traffic = KeptStorages([*parameters, *given]), _Traffic()
        with kept, traffic:
            forward_flops, backward_flops = run_counted(dense, inputs)
        least = 2 * kept.num_bytes + 2 * _bytes(given) + 3 * _bytes(parameters)
    return DenseWork(forward_flops, backward_flops, kept.num_bytes, least, traffic.num_bytes)


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
