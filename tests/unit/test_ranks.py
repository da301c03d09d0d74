"""Who a process is, from the launcher's environment; and that a restarted attempt shares no key with the one before."""

import pytest
import torch
import torch.distributed as dist

from dlrm_scale.errors import ConfigError
from dlrm_scale.training.ranks import Rank, from_first_rank, process_group, this_rank

CPU = torch.device("cpu")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RESTART_COUNT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def second_of_two(monkeypatch):
    """The environment of the second rank on the third of three hosts with two ranks each."""
    for name, value in (("RANK", 5), ("WORLD_SIZE", 6), ("LOCAL_RANK", 1), ("LOCAL_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))


def has_gpus(monkeypatch, num_gpus: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)


def test_without_a_launcher_this_is_the_only_rank(monkeypatch):
    has_gpus(monkeypatch, 0)
    assert this_rank("auto") == Rank(index=0, world_size=1, local_index=0, ranks_per_host=1, device=CPU)
    assert this_rank("cpu").is_first


def test_rank_is_what_the_launcher_says(second_of_two):
    rank = this_rank("cpu")
    assert rank == Rank(index=5, world_size=6, local_index=1, ranks_per_host=2, device=CPU)
    assert not rank.is_first


@pytest.mark.parametrize(
    "device, num_gpus, expected",
    [
        ("auto", 0, CPU),
        ("auto", 1, CPU),  # two ranks on this host: one of them would have no GPU
        ("auto", 2, torch.device("cuda", 1)),
        ("cuda", 2, torch.device("cuda", 1)),
        ("cuda", 8, torch.device("cuda", 1)),
        ("cpu", 8, CPU),
    ],
)
def test_device_needs_a_gpu_for_each_rank_of_the_host(second_of_two, monkeypatch, device, num_gpus, expected):
    has_gpus(monkeypatch, num_gpus)
    assert this_rank(device).device == expected


@pytest.mark.parametrize("num_gpus, way_out", [(0, "device=cpu"), (1, "at most 1 a host")])
def test_cuda_without_gpus_for_all_ranks_is_refused(second_of_two, monkeypatch, num_gpus, way_out):
    has_gpus(monkeypatch, num_gpus)
    with pytest.raises(ConfigError, match=rf"2 rank\(s\) there are {num_gpus} usable GPUs") as e:
        this_rank("cuda")
    assert way_out in str(e.value)


def test_process_group_of_one_plain_process_ends_with_its_block():
    with pytest.raises(RuntimeError, match="training failed"), process_group(this_rank("cpu")):
        assert dist.get_world_size() == 1 and from_first_rank({"plan": 1}) == {"plan": 1}
        raise RuntimeError("training failed")
    assert not dist.is_initialized()


def test_a_restarted_attempt_shares_no_key_with_the_one_before(monkeypatch):
    agents_store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # outlives its attempts
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(agents_store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    keys_of_attempt = []
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        before = set(agents_store.list_keys())
        with process_group(this_rank("cpu")):
            keys_of_attempt.append(set(agents_store.list_keys()) - before)
    assert keys_of_attempt[0]  # the rank's address
    assert len(keys_of_attempt[1]) == len(keys_of_attempt[0])
