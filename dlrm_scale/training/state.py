"""All that a run goes on from, as tensors whose keys and shapes do not depend on plan or world size, and back.

    tables/<table>/weight            (R, D)
    tables/<table>/<state>           (R, D), or (R, B): one number a row and column block (checkpoint/columns.py)
    dense/<parameter>                as it is
    dense_optimizer/<parameter>/<s>  as it is
    ranks/<what>                     (W, n): one row a rank
    window/<what>                    (K, G, ...): the latest K micro-batches of G samples, rows in the global order

Saves happen between optimizer steps, so there are no accumulated gradients to keep.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dlrm_scale.checkpoint.columns import mean_over_columns, overlaps
from dlrm_scale.checkpoint.manifest import Manifest
from dlrm_scale.checkpoint.tensors import Part, Saved, share
from dlrm_scale.models.ranking_model import Predictions
from dlrm_scale.sharding.apply import ShardedModel
from dlrm_scale.sharding.local_tables import TABLE_STATES, forget_caches, local_shards
from dlrm_scale.sharding.plan import Plan
from dlrm_scale.training.monitor import PredictionStore, RunningLoss
from dlrm_scale.training.optimizers import TrainOptimizer
from dlrm_scale.training.ranks import Rank

TORCH_DTYPE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Reading:
    """What is to be read, and what is to be done once it is."""

    targets: list[Part]
    then: list[Callable[[], None]]

    def finish(self) -> None:
        for step in self.then:
            step()


@dataclass(frozen=True)
class ModelState:
    """Weights and optimizer state of a sharded model on this rank."""

    plan: Plan
    model: ShardedModel
    optimizer: TrainOptimizer

    @property
    def column_blocks(self) -> dict[str, list[int]]:
        """By table: the first column of each block of columns that its shards make."""
        return {
            name: sorted({shard.column for shard in table.shards}) or [0] for name, table in self.plan.tables.items()
        }

    def parts(self, rank: Rank) -> list[Part]:
        """What this rank writes: its shards, and its share of what all hold."""
        blocks, parts = self.column_blocks, []
        for shard in local_shards(self.model):
            spec = self.plan.request.tables[shard.table]
            size = (spec.num_embeddings, spec.embedding_dim)
            parts.append(Part(_table_key(shard.table), size, (shard.row, shard.column), shard.weight))
            for state, tensor in shard.states.items():
                if tensor.dim() == 2:
                    parts.append(Part(_table_key(shard.table, state), size, (shard.row, shard.column), tensor))
                else:
                    starts = blocks[shard.table]
                    part_size, at = (size[0], len(starts)), (shard.row, starts.index(shard.column))
                    parts.append(Part(_table_key(shard.table, state), part_size, at, tensor[:, None]))
        return parts + share(self._replicated(), rank.index, rank.world_size)

    def _replicated(self) -> list[Part]:
        """What every rank holds whole: replicated tables, the dense arch, and their optimizers' state."""
        parts = []
        for table, weight in self.optimizer.replicated_tables.items():
            parts.append(Part.whole(_table_key(table), weight.detach()))
            for state, tensor in self.optimizer.replicated.state[weight].items():
                parts.append(Part.whole(_table_key(table, state), tensor))
        for name, parameter in self._dense().items():
            parts.append(Part.whole(f"dense/{name}", parameter.detach()))
            for state, tensor in self.optimizer.dense.state[parameter].items():
                parts.append(Part.whole(f"dense_optimizer/{name}/{state}", tensor))
        return parts

    def _dense(self) -> dict[str, torch.nn.Parameter]:
        prefix = "dense."
        named = self.model.module.named_parameters()
        return {name.removeprefix(prefix): p for name, p in named if name.startswith(prefix)}

    def expected(self, column_blocks: dict[str, list[int]]) -> dict[str, Saved]:
        """What a checkpoint with these column blocks must hold to fit this model, the same on every rank."""
        expected = {}
        for name, spec in self.plan.request.tables.items():
            size = (spec.num_embeddings, spec.embedding_dim)
            expected[_table_key(name)] = Saved(TORCH_DTYPE[spec.data_type], size)
            for state, per in TABLE_STATES[self.plan.request.sparse_optimizer].items():
                of_rows = (size[0], len(column_blocks.get(name, [0])))
                expected[_table_key(name, state)] = Saved(torch.float32, of_rows if per == "row" else size)
        replicated = {f"tables/{name}/" for name in self.optimizer.replicated_tables}
        for part in self._replicated():
            if not part.key.startswith(tuple(replicated)):
                expected[part.key] = Saved(part.tensor.dtype, part.size)
        return expected

    def reading(self, saved: dict[str, Saved], column_blocks: dict[str, list[int]], fresh: set[str]) -> Reading:
        """Reads into the model in place all of its tensors but those of `fresh`.

        A table that is saved with fewer rows fills its first rows; a row-wise state of other blocks follows checkpoint/columns.py.
        """
        forget_caches(self.model)
        reading = Reading([], [])
        for part in self._replicated():
            table = part.key.split("/")[1] if part.key.startswith("tables/") else None
            if part.key in fresh:
                continue
            if table is not None and part.size[1:] == (1,):
                self._read_rowwise(reading, part.key, 0, 0, part.tensor, saved, column_blocks[table], table)
            elif table is not None:
                _read_rows(reading, part, saved)
            else:
                reading.targets.append(part)
        for shard in local_shards(self.model):
            size = self.plan.request.tables[shard.table]
            for key, tensor in [(_table_key(shard.table), shard.weight)] + [
                (_table_key(shard.table, state), tensor) for state, tensor in shard.states.items()
            ]:
                if key in fresh:
                    continue
                if tensor.dim() == 1:
                    blocks = column_blocks[shard.table]
                    column, width = shard.column, shard.weight.shape[1]
                    self._read_rowwise(
                        reading, key, shard.row, column, tensor[:, None], saved, blocks, shard.table, width
                    )
                else:
                    whole = (size.num_embeddings, size.embedding_dim)
                    _read_rows(reading, Part(key, whole, (shard.row, shard.column), tensor), saved)
        return reading

    def _read_rowwise(
        self,
        reading: Reading,
        key: str,
        row: int,
        column: int,
        state_R1: torch.Tensor,
        saved: dict[str, Saved],
        block_starts: list[int],
        table: str,
        width: int | None = None,
    ) -> None:
        num_columns = self.plan.request.tables[table].embedding_dim
        touched = overlaps(block_starts, num_columns, column, width or num_columns)
        first, size = touched[0][0], saved[key].size
        state_R1 = state_R1[: max(0, size[0] - row)]
        if len(touched) == 1:
            reading.targets.append(Part(key, size, (row, first), state_R1))
            return
        values_RB = torch.empty(len(state_R1), len(touched), device=state_R1.device)
        reading.targets.append(Part(key, size, (row, first), values_RB))
        widths = [columns for _, columns in touched]
        reading.then.append(lambda: state_R1.copy_(mean_over_columns(values_RB, widths)[:, None]))


def _read_rows(reading: Reading, part: Part, saved: dict[str, Saved]) -> None:
    size = saved[part.key].size
    reading.targets.append(Part(part.key, size, part.offsets, part.tensor[: max(0, size[0] - part.offsets[0])]))


def _table_key(table: str, state: str = "weight") -> str:
    return f"tables/{table}/{state}"


@dataclass(frozen=True)
class RankState:
    """What each rank keeps beside the model: its generators, its sum of losses, its predictions."""

    rank: Rank
    seed: int
    loss: RunningLoss
    window: PredictionStore

    def parts(self) -> list[Part]:
        rank = self.rank
        rows = {"torch_rng": torch.get_rng_state(), "loss_sum": self.loss.sum.reshape(1)}
        if rank.device.type == "cuda":
            rows["cuda_rng"] = torch.cuda.get_rng_state(rank.device)
        parts = [
            Part(f"ranks/{name}", (rank.world_size, len(row)), (rank.index, 0), row[None]) for name, row in rows.items()
        ]
        if not self.window.batches:  # nothing was learned from yet: all micro-batches so far were skipped
            return parts
        for name, columns in zip(Predictions._fields, zip(*self.window.batches, strict=True), strict=True):
            stacked = torch.stack(columns)
            local = stacked.shape[1]
            size = (len(stacked), local * rank.world_size, *stacked.shape[2:])
            offsets = (0, rank.index * local, *(0,) * (stacked.dim() - 2))
            parts.append(Part(f"window/{name}", size, offsets, stacked))
        return parts

    def reading(self, saved: dict[str, Saved], manifest: Manifest) -> Reading:
        """At another world size: losses are shared out evenly, rows by their place in the global micro-batch, and the generators
        begin anew from seed, rank and step."""
        reading = Reading([], [])
        self._read_losses(reading, saved, manifest)
        self._read_generators(reading, saved, manifest)
        self._read_window(reading, saved)
        return reading

    def _read_losses(self, reading: Reading, saved: dict[str, Saved], manifest: Manifest) -> None:
        device = self.loss.sum.device
        if manifest.world_size == self.rank.world_size:
            mine = torch.empty(1, 1, device=device)
            reading.targets.append(Part("ranks/loss_sum", saved["ranks/loss_sum"].size, (self.rank.index, 0), mine))
        else:
            mine = torch.empty(saved["ranks/loss_sum"].size, device=device)
            reading.targets.append(Part.whole("ranks/loss_sum", mine))
        reading.then.append(lambda: self.loss.sum.copy_(mine.mean()))
        in_loss = manifest.progress["in_loss"]
        self.loss.num_steps, self.loss.num_micro_batches = in_loss["steps"], in_loss["micro_batches"]

    def _read_generators(self, reading: Reading, saved: dict[str, Saved], manifest: Manifest) -> None:
        seed_generators(self.seed, self.rank, manifest.step)
        if manifest.world_size != self.rank.world_size:
            return
        setters = {"torch_rng": torch.set_rng_state}
        if self.rank.device.type == "cuda":
            setters["cuda_rng"] = lambda state: torch.cuda.set_rng_state(state, self.rank.device)
        for name, set_state in setters.items():
            key = f"ranks/{name}"
            if key in saved:  # a run that moves from CPU to CUDA has no generator there to go on with
                row = torch.empty(1, saved[key].size[1], dtype=torch.uint8)
                reading.targets.append(Part(key, saved[key].size, (self.rank.index, 0), row))
                reading.then.append(lambda row=row, set_state=set_state: set_state(row[0]))

    def _read_window(self, reading: Reading, saved: dict[str, Saved]) -> None:
        columns = {}
        for name in Predictions._fields if any(key.startswith("window/") for key in saved) else ():
            key = f"window/{name}"
            dtype, (num_batches, global_batch, *rest) = saved[key].dtype, saved[key].size
            local = global_batch // self.rank.world_size
            columns[name] = torch.empty(num_batches, local, *rest, dtype=dtype, device=self.rank.device)
            offsets = (0, self.rank.index * local, *(0,) * len(rest))
            reading.targets.append(Part(key, saved[key].size, offsets, columns[name]))

        def refill() -> None:
            self.window.clear()
            for batch in zip(*columns.values(), strict=True):
                self.window.add(Predictions(*batch))

        reading.then.append(refill)


def seed_generators(seed: int, rank: Rank, step: int) -> None:
    """Those of dropout and of stochastic rounding; weights and data have generators of their own."""
    digest = hashlib.sha256(f"{seed}/{rank.index}/{step}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big") if step else seed * 1_000_003 + rank.index)


def mismatches(saved: dict[str, Saved], expected: dict[str, Saved]) -> list[str]:
    """One line for each tensor that the checkpoint lacks, has too many, or has of another shape or type."""
    lines = [f"{key}: not in the checkpoint" for key in sorted(set(expected) - set(saved))]
    lines += [f"{key}: in the checkpoint, not in this model" for key in sorted(set(saved) - set(expected))]
    both = sorted(set(saved) & set(expected))
    lines += [f"{k}: {saved[k]} in the checkpoint, {expected[k]} here" for k in both if saved[k] != expected[k]]
    return lines


def of_ranks(key: str) -> bool:
    """Whether a tensor's shape depends on the run that saved it, and on no model."""
    return key.startswith(("ranks/", "window/"))


def agree_on_forwards(counts: list[int | None]) -> int:
    """The ranks' common number of table look-ups; 0 where no rank has a sharded table."""
    known = {count for count in counts if count is not None}
    assert len(known) <= 1, known
    return next(iter(known), 0)
