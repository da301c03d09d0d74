"""Non-finite losses and gradients, agreed on by all ranks before any optimizer has applied them.

Sharded tables step inside their backward pass, so that pass must not begin before the verdict. It is cut in two:

    lookups -> | leaves -> dense arch -> loss        1. backward from the loss to the leaves and the dense parameters
               |                                     2. one all-reduce: is anything of anyone not finite?
    tables  <- | the leaves' gradients               3. backward from the leaves to the tables, or drop the micro-batch

What arrives at a table is bitwise what one backward pass would have brought there.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torchrec.distributed.types import Awaitable

LOSS, LOOKUPS, DENSE = "the loss", "a gradient of the embeddings", "a gradient of the dense parameters"
LOOKUPS_OF = {  # TorchRec 1.8.0's names for the lookups under way, one for each sharding type of a collection
    "EmbeddingBagCollectionAwaitable": "_awaitables",
    "EmbeddingCollectionAwaitable": "_awaitables_per_sharding",
}


@dataclass(frozen=True)
class NonFinite:
    """A micro-batch that must not be learned from; equal on every rank.

    Attributes:
        seen: by rank what is not finite in its own part. Where no rank's own part shows it (a sum overflowed in a dense
            gradient), every rank, as all hold the averaged gradient.
        losses: by rank, this micro-batch's.
    """

    seen: dict[int, list[str]]
    losses: dict[int, float]

    def __str__(self) -> str:
        whole = [f"{loss} on rank {rank}" for rank, loss in self.losses.items() if LOSS in self.seen.get(rank, ())]
        if whole:
            return f"the loss is {', '.join(whole[:8])}" + (f" and {len(whole) - 8} more" if len(whole) > 8 else "")
        what = ", ".join(dict.fromkeys(part for parts in self.seen.values() for part in parts))
        return f"{what} is not finite on rank {', '.join(map(str, self.seen))}"


class _Cut(Awaitable[Tensor]):
    """A lookup under way whose result starts a graph of its own."""

    def __init__(self, lookup: Awaitable[Tensor], cuts: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.lookup, self.cuts = lookup, cuts

    def _wait_impl(self) -> Tensor:
        value = self.lookup.wait()
        leaf = value.detach().requires_grad_()
        self.cuts.append((value, leaf))
        return leaf


class Guard:
    """Runs the backward passes of a sharded model and drops those that are not finite. Every rank makes one.

    Args:
        collections: the sharded embedding collections.
        parameters: what steps after the backward pass: dense parameters and replicated tables.
        on_bad: called on every rank with what was found, before the micro-batch is dropped; it may raise.
        on_verdict: called before the tables' part of each backward pass begins, or is left out.

    Attributes:
        loss: of the last micro-batch on this rank, detached.
        dropped: whether the last micro-batch was. Its gradients are as they were before it (None, at a step's first
            micro-batch, so that an optimizer finds nothing to do), and no table or optimizer state has changed.
        leave_out: set by the caller to have the next micro-batch dropped, whatever it holds.
    """

    def __init__(
        self,
        collections: Iterable[nn.Module],
        parameters: Iterable[nn.Parameter],
        on_bad: Callable[[NonFinite], None],
        on_verdict: Callable[[], None] = lambda: None,
    ) -> None:
        self.parameters, self.on_bad, self.on_verdict = list(parameters), on_bad, on_verdict
        self.cuts: list[tuple[Tensor, Tensor]] = []
        self.iterations: dict[SplitTableBatchedEmbeddingBagsCodegen, int] = {}  # before the last forward pass
        self.loss = torch.zeros(())
        self.dropped = self.leave_out = False
        for collection in collections:
            collection.register_forward_pre_hook(self._note_iterations)
            collection.register_forward_hook(self._cut_lookups)

    def backward(self, losses: Tensor) -> None:
        """The backward pass of a micro-batch's loss, or of none of it. Collective."""
        before = [None if p.grad is None else p.grad.clone() for p in self.parameters]  # None but in mid-accumulation
        self.loss = losses.detach()
        torch.sum(losses, dim=0).backward()
        cuts, self.cuts = [(value, leaf.grad) for value, leaf in self.cuts if leaf.grad is not None], []
        bad = self._agree([gradient for _, gradient in cuts])
        self.on_verdict()
        self.dropped = self.leave_out or bad is not None
        if not self.dropped:
            torch.autograd.backward([value for value, _ in cuts], [gradient for _, gradient in cuts])
            return
        self._drop(before)
        if not self.leave_out:
            self.on_bad(bad)

    def _agree(self, lookup_gradients: list[Tensor]) -> NonFinite | None:
        """What is not finite anywhere. One all-reduce of two numbers, and more only where something is."""
        own = {LOSS: [self.loss], LOOKUPS: lookup_gradients}
        averaged = {DENSE: [p.grad for p in self.parameters if p.grad is not None]}  # the same on every rank
        own_bad, all_bad = (torch.stack([any_bad(t, self.loss) for t in p.values()]) for p in (own, averaged))
        flags = torch.stack([own_bad.any(), all_bad.any()]).float()
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        seen_by_someone, in_averaged = flags.tolist()
        if not seen_by_someone and not in_averaged:
            return None
        bad = own_bad if seen_by_someone else all_bad
        what = [name for name, is_bad in zip(own if seen_by_someone else averaged, bad.tolist(), strict=True) if is_bad]
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, (what, self.loss.item()))
        return NonFinite(
            {rank: seen for rank, (seen, _) in enumerate(said) if seen},
            {rank: loss for rank, (_, loss) in enumerate(said)},
        )

    def _drop(self, before: list[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, before, strict=True):
            if gradient is None:
                parameter.grad = None
            else:
                parameter.grad.copy_(gradient)  # in place: it is a view of DDP's bucket
        for kernel, iteration in self.iterations.items():
            if int(kernel.iter_cpu) != iteration:  # FBGEMM counts Adam's and LAMB's steps in the forward pass
                kernel.iter_cpu.fill_(iteration)
                kernel.iter.sub_(1)

    def _note_iterations(self, module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            self.iterations |= {kernel: int(kernel.iter_cpu) for kernel in fused_kernels(module)}

    def _cut_lookups(self, module: nn.Module, args: Any, output: Any) -> None:
        """Sets a cut behind each sharded lookup. Replicated tables' gradients wait for the optimizer, so they need none."""
        if not torch.is_grad_enabled():
            return
        name = LOOKUPS_OF[type(output).__name__]
        cut = [
            lookup if sharding_type == "data_parallel" else _Cut(lookup, self.cuts)
            for sharding_type, lookup in zip(module._sharding_types, getattr(output, name), strict=True)
        ]
        setattr(output, name, cut)


def any_bad(tensors: list[Tensor], like: Tensor) -> Tensor:
    """A bool scalar on `like`'s device: whether any element is not finite. On CUDA without a wait for it."""
    tensors = [t for t in tensors if t.numel()]  # a batch without ids has empty ones
    # A sum without a fault proves all its terms finite, and takes a tenth of the norm's time on a CPU.
    if not tensors or (like.device.type == "cpu" and all(math.isfinite(t.sum().item()) for t in tensors)):
        return torch.zeros((), dtype=torch.bool, device=like.device)
    largest = torch._foreach_norm(tensors, float("inf"))  # not finite if any element is not
    return ~torch.isfinite(torch.stack([norm.float() for norm in largest])).all()


def fused_kernels(collection: nn.Module) -> list[SplitTableBatchedEmbeddingBagsCodegen]:
    """FBGEMM's modules of a sharded collection."""
    lookups = (module for lookup in collection._lookups for module in lookup.modules())
    return [m for m in lookups if isinstance(m, SplitTableBatchedEmbeddingBagsCodegen)]
