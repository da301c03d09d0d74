"""What this rank holds of a sharded model's tables: views of FBGEMM's own memory, weights and fused optimizer state."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torchrec.optim.fused import FusedOptimizerModule

from dlrm_scale.errors import PlanError

# Optimizer -> its states by FBGEMM's name, and whether they have one number a row (of a shard) or one a weight.
TABLE_STATES = {
    "rowwise_adagrad": {"sum": "row"},
    "adagrad": {"sum": "weight"},
    "sgd": {},
    "adam": {"exp_avg": "weight", "exp_avg_sq": "weight"},
    "partial_rowwise_adam": {"exp_avg": "weight", "exp_avg_sq": "row"},
    "lamb": {"exp_avg": "weight", "exp_avg_sq": "weight"},
}


# n rows, c columns of the shard
@dataclass(frozen=True)
class LocalShard:
    """A rectangle of a table that begins at (row, column).

    Attributes:
        weight: (n, c).
        states: by FBGEMM's name, (n,) or (n, c).
    """

    table: str
    row: int
    column: int
    weight: torch.Tensor
    states: dict[str, torch.Tensor]


def local_shards(model: nn.Module) -> list[LocalShard]:
    """The shards here that have rows, except for replicated tables. Rows that a cache holds are written back first."""
    shards = []
    for kernel in _fused_kernels(model):
        kernel.emb_module.flush()
        weights = kernel.emb_module.split_embedding_weights()
        states = kernel.emb_module.get_optimizer_state() or [{} for _ in weights]
        for table, weight, state in zip(kernel.config.embedding_tables, weights, states, strict=True):
            if weight.numel():
                row, column = table.local_metadata.shard_offsets
                shards.append(LocalShard(table.name, row, column, weight, state))
    return shards


def refuse_empty_kernels(model: nn.Module, rank: int) -> None:
    """FBGEMM 1.8.0 takes a kernel whose tables all have no row on this rank for one of a GPU, and the first lookup on a CPU fails.

    Raises:
        PlanError: there is such a kernel.
    """
    for kernel in _fused_kernels(model):
        if not any(num_rows for num_rows, *_ in kernel.emb_module.embedding_specs):
            names = [table.name for table in kernel.config.embedding_tables]
            raise PlanError(
                f"rank {rank} would hold no row of table {', '.join(names)}, which has fewer rows than are needed to reach all ranks, and "
                f"FBGEMM's CPU kernels cannot run without one; allow table_wise: sharding.tables.{names[0]}.types=[table_wise]"
            )


def forget_caches(model: nn.Module) -> None:
    """To be called before shards are written to: rows that a cache holds would win over what is written."""
    for kernel in _fused_kernels(model):
        kernel.emb_module.flush()
        kernel.emb_module.reset_cache_states()


def table_forwards(model: nn.Module) -> int | None:
    """How often the tables were looked up: Adam and LAMB correct their bias by it. None: no sharded table is here."""
    counts = {int(kernel.emb_module.iter.item()) for kernel in _fused_kernels(model)}
    assert len(counts) <= 1, counts
    return next(iter(counts), None)


def set_table_forwards(model: nn.Module, count: int) -> None:
    for kernel in _fused_kernels(model):
        kernel.emb_module.iter.fill_(count)
        kernel.emb_module.iter_cpu.fill_(count)  # FBGEMM takes it from `iter` only while it is 0


def _fused_kernels(model: nn.Module) -> Iterator[FusedOptimizerModule]:
    """TorchRec keeps a collection's lookups in a plain list, where `modules()` does not see them."""
    for collection in model.modules():
        for lookup in getattr(collection, "_lookups", ()):
            for kernel in lookup.modules():
                if isinstance(kernel, FusedOptimizerModule):
                    assert isinstance(kernel.emb_module, SplitTableBatchedEmbeddingBagsCodegen), type(kernel.emb_module)
                    yield kernel
