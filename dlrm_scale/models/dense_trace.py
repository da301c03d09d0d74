"""What the dense arch costs at a batch size, found by running it on fake tensors: shapes and types, no memory."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

from dlrm_scale.config import RunConfig
from dlrm_scale.features import FeatureSchema
from dlrm_scale.meta import NoFirstValues
from dlrm_scale.models.attention import AttentionPooling, SelfAttention
from dlrm_scale.models.inputs import Embedded
from dlrm_scale.models.kernels import choose_kernels, with_torch_pffn
from dlrm_scale.models.ranking_model import DensePart, build_arch
from dlrm_scale.models.recompute import recomputed_layers

Inputs = tuple[Tensor, KeyedTensor | None, Embedded | None]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class DenseTrace:
    """Of one rank's micro-batch.

    Attributes:
        kept_bytes: of what autograd keeps at the end of the forward pass, each storage once; without parameters, and without
            the lookups and dense features, which are the inputs.
        layer_bytes: of what each layer under activation checkpointing keeps while it is run again.
    """

    num_parameters: int
    kept_bytes: int
    layer_bytes: tuple[int, ...]

    @property
    def activation_bytes(self) -> int:
        """At most at once: one layer at a time is run again."""
        return self.kept_bytes + max(self.layer_bytes, default=0)


def trace_dense(config: RunConfig, local_batch_size: int, device: Device = "cpu") -> DenseTrace:
    """The forward pass of the dense arch of `config`, with every sequence at its max_length and in one chunk.

    So `activation_bytes` is the largest that a batch can need; shorter sequences save only before they are padded. On a GPU
    weights cast to bf16 are among what is kept. Kernels of our own, which keep less, count where this machine has what compiles
    them: a C++ compiler, and Triton for GPUs.

    Raises:
        ConfigError: the features do not suit the arch.
    """
    with fake_dense(config, local_batch_size, device) as (dense, inputs):
        kept = KeptStorages([*dense.parameters(), *input_tensors(inputs)])
        in_layers = _note_layers(dense)
        with kept:
            dense(*inputs)
        num_parameters = sum(p.numel() for p in dense.parameters())
    return DenseTrace(num_parameters, kept.num_bytes, tuple(layer.num_bytes for layer in in_layers))


@contextmanager
def fake_dense(config: RunConfig, local_batch_size: int, device: Device = "cpu") -> Iterator[tuple[DensePart, Inputs]]:
    """The dense arch and its inputs as fake tensors of the CPU, worked on as those of `device`. Raises as `trace_dense`."""
    with FakeTensorMode():
        with NoFirstValues():
            dense = DensePart(build_arch(config), config.train.precision)
        choose_kernels(dense.arch, config, torch.device(device), to_run=False)
        if device == "cuda":
            for norm in (module for module in dense.modules() if isinstance(module, nn.RMSNorm)):
                norm.forward = partial(norm_of_cuda, norm)
        yield dense, lookups(config.features, local_batch_size)


def norm_of_cuda(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """There it is one operation, as a layer norm is anywhere, which reads, writes and keeps as much but for a mean a row."""
    return functional.layer_norm(x.float(), norm.normalized_shape, norm.weight)


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
    """Of the products (a multiplication and an addition are two) in the forward and in the backward pass; sequences full.

    Those that the model's equations ask for, whatever a kernel of ours or a trick of the CPU's does in their place, and not those
    that checkpointing or attention does again.
    """
    plain = config.train.model_copy(update={"activation_checkpointing": False, "precision": "fp32"})
    config = with_torch_pffn(config).model_copy(update={"train": plain})
    with fake_dense(config, local_batch_size, "cuda") as (dense, inputs):
        for module in dense.modules():
            if isinstance(module, SelfAttention):
                module.forward = partial(_attention_products, module)
            elif isinstance(module, AttentionPooling) and _keys_are_less_work(module):
                module.forward = partial(_pooling_products, module)
        with FlopCounterMode(display=False) as counter:
            logits_BT = dense(*inputs)
            forward_flops = counter.get_total_flops()
            logits_BT.sum().backward()
    return forward_flops, counter.get_total_flops() - forward_flops


def _attention_products(attention: SelfAttention, tokens_BNd: Tensor, lengths_B: Tensor) -> Tensor:
    """Eq. 3 without what is no product: softmax, mask and rotation."""
    return attention.out(_mixed(*_heads(attention.qkv(tokens_BNd), 3, attention.num_heads)))


def _pooling_products(pooling: AttentionPooling, tokens_BNd: Tensor, valid_BN: Tensor) -> Tensor:
    """Eq. 4 with keys and values, likewise."""
    (query_HQh,) = _heads(pooling.queries_Qd, 1, pooling.num_heads)
    return pooling.out(_mixed(query_HQh, *_heads(pooling.kv(tokens_BNd), 2, pooling.num_heads)))


def _keys_are_less_work(pooling: AttentionPooling) -> bool:
    """Than the arch's own way, in which each query sees whole tokens once a head."""
    num_queries, dim = pooling.queries_Qd.shape
    return dim + num_queries < num_queries * pooling.num_heads


def _heads(x: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """(..., N, parts x H x h) as `parts` of (..., H, N, h)."""
    return x.unflatten(-1, (parts, num_heads, -1)).movedim(-3, 0).transpose(-3, -2).unbind()


def _mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) @ v).transpose(-3, -2).flatten(-2)


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
