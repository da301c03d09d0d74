"""One rank's full disk ends the save for all, and the next save finds the ranks in step."""

import os

import torch

from dlrm_scale.checkpoint.commit import CheckpointFolder
from dlrm_scale.checkpoint.files import Files
from dlrm_scale.checkpoint.manifest import FORMAT, Manifest
from dlrm_scale.checkpoint.saver import Saver
from dlrm_scale.checkpoint.tensors import Part, read_parts
from dlrm_scale.checkpoint_config import CheckpointConfig
from dlrm_scale.training.ranks import this_rank
from tests.support import full_disk

ROWS = 64


def save_thrice(root: str, full_on: int, mode: str) -> tuple[list[str | None], list[list[int]], list[str]]:
    """Steps 1 to 3, the disk of rank `full_on` being full at 2: (errors, checkpoints after each, files of lost saves)."""
    rank = this_rank("cpu")
    os.environ[full_disk.ROOT] = root
    handlers = ("tests.support.full_disk:FullDisk",)
    folder = CheckpointFolder("full://checkpoints", Files(handlers), keep_last=9)
    saver = Saver(folder, CheckpointConfig(mode=mode, path_handlers=handlers), rank.index, lambda line: None)
    weight = torch.empty(ROWS // rank.world_size, 4)

    def describe(notes, files):
        return Manifest(
            format=FORMAT,
            step=notes[0],
            samples_consumed=0,
            data_fingerprint="",
            world_size=rank.world_size,
            config_fingerprint="",
            config={},
            plan={},
            versions={},
            time="2026-01-01T00:00:00+00:00",
            column_blocks={},
            progress={},
            files=files,
        )

    seen = []
    for step in (1, 2, 3):
        os.environ[full_disk.LEFT] = "100" if step == 2 and rank.index == full_on else "1000000"
        weight.fill_(step + rank.index / 10)
        part = Part("tables/t/weight", (ROWS, 4), (rank.index * len(weight), 0), weight)
        saver.save(step, [part], step, describe)
        saver.wait()
        torch.distributed.barrier()
        seen.append(folder.steps())
    left = [name for place, _, names in os.walk(f"{root}/checkpoints") for name in names if ".tmp" in place]
    whole = torch.empty(ROWS, 4)
    read_parts(folder.path_of(3), [Part.whole("tables/t/weight", whole)], folder.files, saver.group)
    assert whole[:, 0].unique().tolist() == torch.tensor([3 + r / 10 for r in range(rank.world_size)]).tolist()
    return [result.error for result in saver.results], seen, left


def check(ranks, root, full_on: int, mode: str) -> None:
    for errors, seen, left in ranks.run(save_thrice, str(root), full_on, mode):
        assert errors[0] is None and errors[2] is None
        assert errors[1].startswith(f"rank {full_on}: ") and "No space left" in errors[1]
        assert seen == [[1], [1], [3, 1]]
        assert left == []


def test_a_full_disk_on_the_rank_that_commits(two_ranks, tmp_path):
    check(two_ranks, tmp_path, 0, "async")


def test_a_full_disk_on_another_rank(two_ranks, tmp_path):
    check(two_ranks, tmp_path, 1, "sync")


def test_a_full_disk_on_the_last_of_four(four_ranks, tmp_path):
    check(four_ranks, tmp_path, 3, "async")
