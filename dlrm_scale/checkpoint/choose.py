"""Which checkpoint a run goes on from: the newest whose every file is what was written."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from dlrm_scale.checkpoint import phases
from dlrm_scale.checkpoint.commit import CheckpointFolder
from dlrm_scale.checkpoint.manifest import Manifest
from dlrm_scale.errors import CheckpointError


def choose(
    folder: CheckpointFolder,
    rank: int,
    group: dist.ProcessGroup,
    tell: Callable[[str], None],
    steps: list[int] | None = None,
) -> Manifest | None:
    """The manifest of the newest valid checkpoint (of `steps`, if given); None if there are none at all. Collective.

    The ranks share the reading. Each one skipped is told of with the reason, and added to `folder.bad_steps`.

    Raises:
        CheckpointError: there are some, but none is valid; on all ranks.
    """
    world_size = dist.get_world_size(group)
    steps = _from_first(steps if steps is not None else folder.steps() if rank == 0 else None, group)
    reasons = []
    for step in steps:
        phases.enter("load_verify")
        found = _from_first(_read(folder, step) if rank == 0 else None, group)
        if isinstance(found, Manifest):
            by_size = sorted(found.files, key=lambda name: (-found.files[name].size, name))
            faults: list[str | None] = [None] * world_size
            dist.all_gather_object(faults, folder.fault(step, found, by_size[rank::world_size]), group=group)
            reason = next(filter(None, faults), None)
        else:
            reason = found
        if reason is None:
            return found
        reasons.append(reason)
        folder.bad_steps.add(step)
        tell(f"WARNING: skipped the checkpoint of step {step}: {reason}")
    if reasons:
        raise CheckpointError(
            f"no checkpoint in {folder.path} can be gone on from:\n  "
            + "\n  ".join(reasons)
            + "\nrestore one of them, or start anew in another folder: output.dir=..."
        )
    return None


def _read(folder: CheckpointFolder, step: int) -> Manifest | str:
    try:
        return folder.manifest(step)
    except CheckpointError as e:
        return str(e)


def _from_first(value: Any, group: dist.ProcessGroup) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]
