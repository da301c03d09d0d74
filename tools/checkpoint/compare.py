"""Two checkpoints, tensor by tensor and block of rows by block of rows, so that memory stays bounded."""

from collections.abc import Iterator
from typing import Any

import torch

from dlrm_scale.checkpoint.commit import CheckpointFolder
from dlrm_scale.checkpoint.files import Files
from dlrm_scale.checkpoint.manifest import Manifest
from dlrm_scale.checkpoint.tensors import Part, Saved, read_parts, saved_tensors

BLOCK_BYTES = 256 << 20
Side = tuple[CheckpointFolder, Manifest]


def compare(first: Side, second: Side, files: Files) -> list[dict[str, Any]]:
    """A row a tensor: {"key", "difference": largest absolute one, "note": why there is no number}, in the order of keys.

    Two NaN in one place are the same. Generators (ranks/*_rng) count too: equal runs have equal ones.
    """
    paths = [folder.path_of(manifest.step) for folder, manifest in (first, second)]
    tensors = [saved_tensors(path, files) for path in paths]
    keys = sorted(set(tensors[0]) | set(tensors[1]))
    both = {key: tensors[0][key] for key in keys if tensors[0].get(key) == tensors[1].get(key)}
    worst = dict.fromkeys(both, 0.0)
    for batch in _batches(both):
        sides = [
            [Part(part.key, part.size, part.offsets, torch.empty_like(part.tensor, device="cpu")) for part in batch]
            for _ in paths
        ]
        for path, parts in zip(paths, sides, strict=True):
            read_parts(path, parts, files)
        for a, b in zip(*sides, strict=True):
            worst[a.key] = max(worst[a.key], _difference(a.tensor, b.tensor))
    return [_row(key, worst.get(key), [side.get(key) for side in tensors], paths) for key in keys]


def _row(key: str, difference: float | None, found: list[Saved | None], paths: list[str]) -> dict[str, Any]:
    if difference is not None:
        return {"key": key, "difference": difference, "note": None}
    had, has = found
    note = f"{had} and {has}" if had and has else f"only in {paths[0] if had else paths[1]}"
    return {"key": key, "difference": None, "note": note}


def _batches(tensors: dict[str, Saved]) -> Iterator[list[Part]]:
    """All of these tensors in parts, on meta, of at most BLOCK_BYTES a batch: each read goes through the whole metadata."""
    batch, num_bytes = [], 0
    for key, saved in tensors.items():
        for offsets, shape in row_blocks(saved):
            tensor = torch.empty(shape, dtype=saved.dtype, device="meta")
            if batch and num_bytes + tensor.nbytes > BLOCK_BYTES:
                yield batch
                batch, num_bytes = [], 0
            batch.append(Part(key, saved.size, offsets, tensor))
            num_bytes += tensor.nbytes
    if batch:
        yield batch


def row_blocks(saved: Saved) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, shape) of blocks of rows of at most BLOCK_BYTES."""
    if not saved.size:
        return [((), ())]
    row_bytes = max(1, torch.Size(saved.size[1:]).numel() * saved.dtype.itemsize)
    step = max(1, BLOCK_BYTES // row_bytes)
    rest = (0,) * (len(saved.size) - 1)
    return [
        ((first, *rest), (min(step, saved.size[0] - first), *saved.size[1:])) for first in range(0, saved.size[0], step)
    ]


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    if torch.equal(a, b):
        return 0.0
    a, b = a.double(), b.double()
    apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
    return torch.where(apart.isnan(), torch.inf, apart).max().item()  # NaN on one side only
