"""Tensors of a checkpoint: each rank writes rectangles of them and reads others, through torch.distributed.checkpoint (DCP).

A rectangle is written in pieces, as DCP reads a saved item whole even where a slice of it is wanted: so reading takes no
more memory than a piece beyond the tensors that are read into, whatever the shards were when they were saved.
"""

import io
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from dlrm_scale.checkpoint.files import CheckedFileSystem, Files
from dlrm_scale.errors import CheckpointError

PIECE_BYTES = 16 << 20  # the allocator maps larger ones anew each time: measured, twice the time of a write


@dataclass(frozen=True)
class Part:
    """A rectangle of a tensor, and the memory here that it is written from or read into.

    Attributes:
        size: of the whole tensor.
        offsets: where the rectangle begins in it; it is as large as `tensor`.
    """

    key: str
    size: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: torch.Tensor

    @staticmethod
    def whole(key: str, tensor: torch.Tensor) -> "Part":
        return Part(key, tuple(tensor.shape), (0,) * tensor.dim(), tensor)


@dataclass(frozen=True)
class Saved:
    """A tensor as a checkpoint has it."""

    dtype: torch.dtype
    size: tuple[int, ...]

    def __str__(self) -> str:
        return f"{' x '.join(map(str, self.size)) or 'scalar'} {str(self.dtype).removeprefix('torch.')}"


def pieces(part: Part) -> Iterable[Part]:
    """The part in slices of rows of at most PIECE_BYTES (or one row); none of an empty part."""
    if part.tensor.numel() == 0:
        return
    if part.tensor.dim() == 0:
        yield part
        return
    num_rows = max(1, PIECE_BYTES // max(1, part.tensor[0].nbytes))
    for first in range(0, len(part.tensor), num_rows):
        offsets = (part.offsets[0] + first, *part.offsets[1:])
        yield replace(part, offsets=offsets, tensor=part.tensor[first : first + num_rows])


def share(parts: Iterable[Part], rank: int, world_size: int) -> list[Part]:
    """Of what every rank holds alike, the pieces that this rank writes."""
    every = [piece for part in parts for piece in pieces(part)]
    return every[rank::world_size]


def write_parts(folder: str, parts: list[Part], fs: CheckedFileSystem, group: dist.ProcessGroup) -> None:
    """Collective over `group`. `fs` then knows the files that this rank wrote.

    Raises:
        dcp.CheckpointException: a rank failed; on all ranks.
    """
    writer = dcp.FileSystemWriter(folder, sync_files=False, overwrite=False)  # our streams sync what they write
    writer.fs, writer.path = fs, folder
    compute_crc32 = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # ours, of whole files, take their place; both cost half the speed
    try:
        dcp.save({}, storage_writer=writer, planner=_WritePlanner(parts), process_group=group)
    finally:
        torch.serialization.set_crc32_options(compute_crc32)


def saved_tensors(folder: str, files: Files) -> dict[str, Saved]:
    """What a checkpoint's tensors are, by key."""
    metadata = _reader(folder, files).read_metadata()
    return {
        key: Saved(tensor.properties.dtype, tuple(tensor.size)) for key, tensor in metadata.state_dict_metadata.items()
    }


def read_parts(folder: str, targets: list[Part], files: Files, group: dist.ProcessGroup | None = None) -> None:
    """Fills the targets' tensors, on whatever device they are. Collective over `group`; None: this process alone.

    Raises:
        CheckpointError: a rank cannot read; on all ranks.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DCP's remark that one process reads alone
        try:
            dcp.load(
                {},
                storage_reader=_reader(folder, files),
                planner=_ReadPlanner(targets),
                process_group=group,
                no_dist=group is None,
            )
        except dcp.CheckpointException as e:
            told = "; ".join(f"rank {rank}: {type(error).__name__}: {error}" for rank, (error, _) in e.failures.items())
            raise CheckpointError(f"cannot read {folder}: {told}") from e


def _reader(folder: str, files: Files) -> dcp.FileSystemReader:
    reader = dcp.FileSystemReader(folder)
    reader.fs, reader.path = CheckedFileSystem(files), folder
    return reader


class _WritePlanner(SavePlanner):
    def __init__(self, parts: list[Part]) -> None:
        self.pieces = {(p.key, p.offsets): p for part in parts for p in pieces(part)}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(piece) for piece in self.pieces.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        for key, tensor in metadata.state_dict_metadata.items():
            written = sum(torch.Size(chunk.sizes).numel() for chunk in tensor.chunks)
            assert written == tensor.size.numel(), f"{key}: {written} of {tensor.size.numel()} numbers are written"
            places = {tuple(chunk.offsets) for chunk in tensor.chunks}
            assert len(places) == len(tensor.chunks), f"{key}: a part is written twice"
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self.pieces[write_item.index.fqn, tuple(write_item.index.offset)].tensor


def _write_item(piece: Part) -> WriteItem:
    offsets, sizes = torch.Size(piece.offsets), piece.tensor.shape
    return WriteItem(
        index=MetadataIndex(piece.key, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
            properties=TensorProperties(dtype=piece.tensor.dtype),
            size=torch.Size(piece.size),
        ),
    )


class _ReadPlanner(LoadPlanner):
    """Items name their target by its place in the list: two targets may begin at the same place of one tensor."""

    def __init__(self, targets: list[Part]) -> None:
        self.targets = targets

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        items = []
        for i, target in enumerate(self.targets):
            if target.tensor.numel() == 0:
                continue
            chunk = ChunkStorageMetadata(offsets=torch.Size(target.offsets), sizes=target.tensor.shape)
            saved = self.metadata.state_dict_metadata[target.key]
            for item in create_read_items_for_chunk_list(target.key, saved, [chunk]):
                items.append(replace(item, dest_index=MetadataIndex(target.key, target.offsets, i)))
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError(f"{read_item.storage_index.fqn} is no tensor")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        tensor = self.targets[read_item.dest_index.index].tensor
        for dim, (first, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            tensor = tensor.narrow(dim, first, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass
