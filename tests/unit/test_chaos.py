import numpy as np
import pytest

from dlrm_scale.checkpoint.phases import PHASES
from tools.chaos.disk import PREFIX, Disk
from tools.chaos.faults import Damage
from tools.chaos.schedule import NUM_RANKS, full


def test_the_schedule_is_a_function_of_its_seed():
    assert full(3) == full(3) != full(4)


@pytest.mark.parametrize("seed", range(4))
def test_at_least_forty_faults_and_every_phase_on_every_rank(seed):
    jobs = full(seed)
    faults = [fault for job in jobs for launch in job.launches for fault in launch.faults]
    assert sum(job.num_faults for job in jobs) >= 40
    assert {(f.at, f.rank) for f in faults if f.strike == "kill"} >= {(p, r) for p in PHASES for r in range(NUM_RANKS)}


@pytest.mark.parametrize("seed", range(4))
def test_every_job_ends_with_a_launch_that_trains_to_the_end(seed):
    for job in full(seed):
        assert job.launches[-1].exit_code == 0 and job.launches[-1].num_ranks == NUM_RANKS
        assert all(launch.max_restarts >= 0 for launch in job.launches)


@pytest.mark.parametrize("harm", ["cut short", "flip a byte", "remove"])
def test_damage_changes_one_file(tmp_path, harm):
    contents = {name: bytes(range(64)) for name in ("__0_0.distcp", "__1_0.distcp", "manifest.json")}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    path = Damage(harm, ".distcp").do(tmp_path, np.random.default_rng(0))
    changed = [n for n, c in contents.items() if not (tmp_path / n).exists() or (tmp_path / n).read_bytes() != c]
    assert changed == [path.name] and path.name.endswith(".distcp")


def test_a_full_disk_takes_half_of_one_write_and_the_next_file_again(tmp_path, monkeypatch):
    monkeypatch.setattr(Disk, "trouble", "disk_full")
    monkeypatch.setattr(Disk, "nth", 2)
    monkeypatch.setattr(Disk, "written", 0)
    disk = Disk()
    for i in range(3):
        with disk._open(f"{PREFIX}{tmp_path}/{i}", "wb") as stream:
            if i == 1:
                with pytest.raises(OSError, match="No space left"):
                    stream.write(bytes(100))
            else:
                stream.write(bytes(100))
    assert [(tmp_path / str(i)).stat().st_size for i in range(3)] == [100, 50, 100]
