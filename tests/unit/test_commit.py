"""Checkpoints of a few hundred bytes: what an interrupted save leaves, what a damaged file does, what is kept."""

import os

import pytest
import torch
import torch.distributed as dist

from dlrm_scale.checkpoint import phases, tensors
from dlrm_scale.checkpoint.choose import choose
from dlrm_scale.checkpoint.commit import CheckpointFolder
from dlrm_scale.checkpoint.files import Files
from dlrm_scale.checkpoint.manifest import FORMAT, Manifest
from dlrm_scale.checkpoint.saver import Saver
from dlrm_scale.checkpoint.tensors import Part, read_parts
from dlrm_scale.checkpoint_config import CheckpointConfig
from dlrm_scale.errors import CheckpointError
from tests.support import full_disk


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Run:
    """Saves a tensor that holds the step's number; what a run would do, without the run."""

    def __init__(self, path, **settings) -> None:
        config = CheckpointConfig(dir=str(path), **settings)
        files = Files(config.path_handlers)
        self.folder = CheckpointFolder(config.dir, files, config.keep_last, config.keep_every_steps)
        self.told: list[str] = []
        self.saver = Saver(self.folder, config, 0, self.told.append)
        self.weight = torch.zeros(100, 3)

    def save(self, step: int, values: torch.Tensor | None = None) -> None:
        def describe(notes, files):
            return Manifest(
                format=FORMAT,
                step=step,
                samples_consumed=notes[0],
                data_fingerprint="data",
                world_size=1,
                config_fingerprint="config",
                config={},
                plan={},
                versions={},
                time="2026-01-01T00:00:00+00:00",
                column_blocks={},
                progress={"auc": float("nan"), "losses": [0.1]},
                files=files,
            )

        self.weight.copy_(torch.full((100, 3), float(step)) if values is None else values)
        self.saver.save(step, [Part.whole("tables/t/weight", self.weight)], 10 * step, describe)

    def value(self, step: int) -> torch.Tensor:
        weight = torch.empty(100, 3)
        read_parts(self.folder.path_of(step), [Part.whole("tables/t/weight", weight)], self.folder.files)
        return weight

    def choose(self) -> int | None:
        manifest = choose(self.folder, 0, self.saver.group, self.told.append)
        return manifest and manifest.step


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "checkpoints", mode="sync")
    yield run
    phases.on_phase.clear()


def strike_at(phase: str) -> None:
    def strike(entered: str) -> None:
        if entered == phase:
            raise KeyboardInterrupt(phase)

    phases.on_phase.append(strike)


def test_phases_come_in_their_order(run):
    seen: list[str] = []
    phases.on_phase.append(seen.append)
    run.save(1)
    assert run.choose() == 1
    assert tuple(seen) == (*phases.SAVE_PHASES, "load_verify")


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("phase", phases.SAVE_PHASES)
def test_a_save_that_ends_in_any_phase_leaves_the_newest_whole_one(tmp_path, phase, mode):
    run = Run(tmp_path, mode=mode)
    run.save(1)
    run.saver.wait()
    strike_at(phase)
    with pytest.raises(KeyboardInterrupt, match=phase):
        run.save(2)
        run.saver.wait()
    phases.on_phase.clear()
    after = Run(tmp_path, mode=mode)
    newest = 2 if phase == "prune" else 1
    assert after.choose() == newest
    assert (after.value(newest) == newest).all()
    left = after.folder.clean()
    assert bool(left) == (phase in ("write", "gather", "manifest", "rename"))
    assert after.folder.clean() == []
    after.save(2)
    after.saver.finish()
    assert after.choose() == 2 and (after.value(2) == 2).all()
    assert sorted(os.listdir(tmp_path)) == ["step_1", "step_2"]


def test_an_asynchronous_save_holds_the_state_of_its_step(tmp_path):
    """Training goes on as soon as `save` returns, and writes over the tensors while they are being written."""
    run, waiting = Run(tmp_path, mode="async"), []
    import threading

    go = threading.Event()
    phases.on_phase.append(lambda phase: phase == "write" and (waiting.append(phase), go.wait(30)))
    run.save(7)
    run.weight.fill_(-1)
    go.set()
    run.saver.finish()
    phases.on_phase.clear()
    assert waiting == ["write"]
    assert (run.value(7) == 7).all()
    plain = Run(tmp_path / "sync", mode="sync")
    plain.save(7)
    sums = [r.folder.manifest(7).files["__0_0.distcp"] for r in (run, plain)]
    assert sums[0] == sums[1]


@pytest.mark.parametrize(
    ("row", "column", "rows", "columns"), [(0, 0, 100, 3), (37, 1, 41, 2), (99, 2, 1, 1), (5, 0, 0, 3)]
)
def test_a_tensor_saved_in_pieces_is_read_in_any_rectangle(run, monkeypatch, row, column, rows, columns):
    monkeypatch.setattr(tensors, "PIECE_BYTES", 7 * 3 * 4)
    values = torch.arange(300.0).reshape(100, 3)
    assert len(list(tensors.pieces(Part.whole("tables/t/weight", values)))) == 15
    run.save(1, values)
    read = torch.full((rows, columns), -1.0)
    read_parts(run.folder.path_of(1), [Part("tables/t/weight", (100, 3), (row, column), read)], run.folder.files)
    assert torch.equal(read, values[row : row + rows, column : column + columns])


def damage(run: Run, step: int, how: str) -> str:
    """Returns the name of the damaged file."""
    folder = run.folder.path_of(step)
    name = "manifest.json" if how.endswith("manifest") else "__0_0.distcp"
    path = f"{folder}/{name}"
    data = bytearray(open(path, "rb").read())
    if how.startswith("delete"):
        os.remove(path)
        return name
    if how.startswith("cut"):
        data = data[:-1]
    elif how == "flip in the manifest":
        data[data.index(b"samples_consumed") + 20] ^= 1
    else:
        data[len(data) // 2] ^= 1
    with open(path, "wb") as f:
        f.write(data)
    return name


@pytest.mark.parametrize(
    "how", ["cut", "flip", "delete", "cut the manifest", "flip in the manifest", "delete the manifest"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(run, how):
    for step in (1, 2):
        run.save(step)
    name = damage(run, 2, how)
    assert run.choose() == 1
    assert len(run.told) == 1 and "step 2" in run.told[0] and f"step_2/{name}" in run.told[0]
    run.save(2)  # trained again
    run.save(3)
    assert run.folder.steps() == [3, 2]
    assert (run.value(2) == 2).all() and run.choose() == 3


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
def test_no_single_flipped_bit_of_a_small_file_goes_unnoticed(run, name):
    run.save(1)
    path = f"{run.folder.path_of(1)}/{name}"
    whole = open(path, "rb").read()
    manifest = run.folder.manifest(1)
    for at in range(0, len(whole), max(1, len(whole) // 60)):
        data = bytearray(whole)
        data[at] ^= 4
        with open(path, "wb") as f:
            f.write(data)
        if name != "manifest.json":
            assert run.folder.fault(1, manifest, [name]), at
            continue
        try:
            altered = run.folder.manifest(1)
        except CheckpointError:
            continue
        assert altered == manifest or repr(altered) == repr(manifest), at  # a space between two values
    with open(path, "wb") as f:
        f.write(whole)
    assert run.choose() == 1


def test_all_damaged_is_an_error_that_names_each(run):
    for step in (1, 2):
        run.save(step)
        damage(run, step, "flip")
    with pytest.raises(CheckpointError, match=r"(?s)step_2/.*step_1/.*output\.dir"):
        run.choose()


def test_a_strange_file_does_no_harm_and_is_told(run):
    run.save(1)
    open(f"{run.folder.path_of(1)}/.DS_Store", "w").close()
    assert run.choose() == 1
    assert run.folder.strangers(1, run.folder.manifest(1)) == [".DS_Store"]


def test_kept_are_the_newest_and_every_nth(tmp_path):
    run = Run(tmp_path, mode="sync", keep_last=2, keep_every_steps=30)
    kept = {}
    for step in range(10, 101, 10):
        run.save(step)
        kept[step] = run.folder.steps()
    assert kept[20] == [20, 10] and kept[30] == [30, 20]
    assert kept[60] == [60, 50, 30] and kept[100] == [100, 90, 60, 30]


def test_a_checkpoint_found_bad_is_not_counted_as_kept(run):
    for step in (10, 20, 30):
        run.save(step)
    damage(run, 30, "flip")
    assert run.choose() == 20
    run.save(25)
    assert run.folder.steps() == [25, 20]


def test_newer_checkpoints_that_nobody_found_bad_are_not_deleted(tmp_path):
    run = Run(tmp_path, mode="sync", keep_last=1)
    for step in (30, 10):
        run.save(step)
    assert run.folder.steps() == [30, 10]


def test_a_full_disk_leaves_the_checkpoint_before_and_says_so_until_too_many_fail(tmp_path, monkeypatch):
    monkeypatch.setenv(full_disk.ROOT, str(tmp_path))
    monkeypatch.setenv(full_disk.LEFT, "20000")
    handler = "tests.support.full_disk:FullDisk"
    run = Run("full://checkpoints", mode="async", path_handlers=(handler,), max_failures=2, keep_last=9)
    run.save(1)
    run.saver.wait()
    assert run.told == [] and run.folder.steps() == [1]
    monkeypatch.setenv(full_disk.LEFT, "100")
    run.save(2)
    run.saver.wait()
    assert run.folder.steps() == [1]
    assert "step 2" in run.told[0] and "No space left" in run.told[0] and "rank 0" in run.told[0]
    assert run.saver.results[-1].error and run.saver.results[-1].num_bytes == 0
    monkeypatch.setenv(full_disk.LEFT, "20000")
    run.save(3)
    run.saver.wait()
    assert run.folder.steps() == [3, 1], "a success in between starts the count anew"
    monkeypatch.setenv(full_disk.LEFT, "100")
    run.save(4)
    run.save(5)
    with pytest.raises(CheckpointError, match=r"2 saves in a row failed.*No space left.*start the same command again"):
        run.saver.wait()
    assert run.choose() == 3


def test_a_run_whose_last_save_failed_does_not_end_well(tmp_path, monkeypatch):
    monkeypatch.setenv(full_disk.ROOT, str(tmp_path))
    monkeypatch.setenv(full_disk.LEFT, "0")
    run = Run("full://c", mode="sync", path_handlers=("tests.support.full_disk:FullDisk",))
    run.save(1)
    with pytest.raises(CheckpointError, match="the last step could not be saved"):
        run.saver.finish()
