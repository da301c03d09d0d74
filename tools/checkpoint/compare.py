"""Two checkpoints, tensor by tensor and block of rows by block of rows, so that memory stays bounded."""

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
    rows = []
    for key in sorted(set(tensors[0]) | set(tensors[1])):
        had, has = (side.get(key) for side in tensors)
        note, difference = None, None
        if had is None or has is None:
            note = f"only in {paths[0] if has is None else paths[1]}"
        elif had != has:
            note = f"{had} and {has}"
        else:
            difference = max((_difference(a, b) for a, b in _blocks(key, had, paths, files)), default=0.0)
            note = None if difference == difference else "differs by NaN"
        rows.append({"key": key, "difference": difference if note is None else None, "note": note})
    return rows


def _blocks(key: str, saved: Saved, paths: list[str], files: Files) -> Any:
    for offset, shape in row_blocks(saved):
        pair = []
        for path in paths:
            tensor = torch.empty(shape, dtype=saved.dtype)
            read_parts(path, [Part(key, saved.size, offset, tensor)], files)
            pair.append(tensor)
        yield pair


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
    return apart.max().item()
