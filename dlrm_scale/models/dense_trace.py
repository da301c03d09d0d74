"""What the dense arch costs at a batch size, found by running it on fake tensors: shapes and types, no memory."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

from dlrm_scale.config import RunConfig
from dlrm_scale.features import FeatureSchema
from dlrm_scale.meta import NoFirstValues
from dlrm_scale.models.inputs import Embedded
from dlrm_scale.models.ranking_model import DensePart, build_arch
from dlrm_scale.models.recompute import recomputed_layers

Inputs = tuple[Tensor, KeyedTensor | None, Embedded | None]


@dataclass(frozen=True)
class DenseTrace:
    """Of one rank's micro-batch.

    Attributes:
        activation_bytes: of what autograd keeps at the end of the forward pass, each storage once; without parameters, and
            without the lookups and dense features, which are the inputs. With activation checkpointing, plus what the largest
            layer keeps while it is run again.
        forward_flops: of the products (a multiplication and an addition are two), as `FlopCounterMode` counts.
    """

    num_parameters: int
    activation_bytes: int
    forward_flops: int


def trace_dense(config: RunConfig, local_batch_size: int) -> DenseTrace:
    """The forward pass of the dense arch of `config`, with every sequence at its max_length.

    So `activation_bytes` is the largest that a batch can need; shorter sequences save only before they are padded. The fake
    tensors are on the CPU: of the CPU's fused attention and autocast rules, which keep what those of CUDA keep but for
    logarithms of sums and casts of small tensors.

    Raises:
        ConfigError: the features do not suit the arch.
    """
    with FakeTensorMode():
        dense, inputs = _dense_and_inputs(config, local_batch_size)
        kept = KeptStorages([*dense.parameters(), *input_tensors(inputs)])
        in_layers = _note_layers(dense)
        with _counter() as counter, kept:
            dense(*inputs)
        num_parameters = sum(p.numel() for p in dense.parameters())
    largest_layer_bytes = max((layer.num_bytes for layer in in_layers), default=0)
    return DenseTrace(num_parameters, kept.num_bytes + largest_layer_bytes, counter.get_total_flops())


def _note_layers(dense: DensePart) -> list["KeptStorages"]:
    """Has each layer that will be run again note what that keeps, in the place of throwing it away."""
    noted = []
    for layer in recomputed_layers(dense.arch):
        kept = KeptStorages(dense.parameters())
        noted.append(kept)
        layer.plain = partial(_run_noted, layer.plain, kept)
    return noted


def _run_noted(plain: Callable[..., Any], kept: "KeptStorages", *args: Any) -> Any:
    with kept:
        return plain(*args)


def count_flops(config: RunConfig, local_batch_size: int) -> tuple[int, int]:
    """Of the products in the forward and in the backward pass, as `trace_dense` counts them; takes three times as long.

    Without those of activation checkpointing, which are no work that the model asks for.
    """
    config = config.model_copy(update={"train": config.train.model_copy(update={"activation_checkpointing": False})})
    with FakeTensorMode():
        return run_counted(*_dense_and_inputs(config, local_batch_size))


def _dense_and_inputs(config: RunConfig, local_batch_size: int) -> tuple[DensePart, Inputs]:
    with NoFirstValues():
        dense = DensePart(build_arch(config), config.train.precision)
    return dense, lookups(config.features, local_batch_size)


def lookups(schema: FeatureSchema, batch_size: int) -> Inputs:
    """What `DensePart` takes: dense features, pooled vectors and events, fp32 as FBGEMM gives them; sequences full."""
    dense_BF = torch.zeros(batch_size, len(schema.dense))
    pooled = embedded = None
    if schema.bag_keys:
        dims = [schema.tables[schema.table_of[key]].embedding_dim for key in schema.bag_keys]
        pooled = KeyedTensor(list(schema.bag_keys), dims, torch.zeros(batch_size, sum(dims), requires_grad=True))
    if schema.sequence_keys:
        lengths = {f.name: s.max_length for s in schema.sequences for f in s.fields}
        embedded = {
            key: _full(batch_size, lengths.get(key, 1), schema.tables[schema.table_of[key]].embedding_dim)
            for key in schema.sequence_keys
        }
    return dense_BF, pooled, embedded


def _full(batch_size: int, length: int, dim: int) -> JaggedTensor:
    return JaggedTensor(
        torch.zeros(batch_size * length, dim, requires_grad=True),
        lengths=torch.full((batch_size,), length),
        offsets=torch.arange(batch_size + 1) * length,
    )


def input_tensors(inputs: Inputs) -> list[Tensor]:
    dense_BF, pooled, embedded = inputs
    tensors = [dense_BF] if pooled is None else [dense_BF, pooled.values()]
    for jagged in (embedded or {}).values():
        tensors += [jagged.values(), jagged.lengths(), jagged.offsets()]
    return tensors


class KeptStorages:
    """While entered, notes every storage that autograd keeps for the backward pass, but those of `left_out`."""

    def __init__(self, left_out: Iterable[Tensor]) -> None:
        self.left_out = {tensor.untyped_storage()._cdata for tensor in left_out}
        self.storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes up twice
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.left_out:
            self.storages[storage._cdata] = storage
        return tensor

    @property
    def num_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())

    def __enter__(self) -> None:
        self.hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)


Shape = tuple[int, ...]


def _attention_flops(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


_CPU_ATTENTION = {  # the counter itself knows the kernels of CUDA only
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)


def run_counted(dense: DensePart, inputs: Inputs) -> tuple[int, int]:
    """The FLOPs of the forward pass, and of the backward pass from the sum of the logits."""
    with _counter() as counter:
        logits_BT = dense(*inputs)
        forward_flops = counter.get_total_flops()
        logits_BT.sum().backward()
    return forward_flops, counter.get_total_flops() - forward_flops
