"""The doctor's rules, fed with machines and installs that are broken in one way each."""

from dataclasses import replace

import pytest

from tools.doctor.checks import check_all
from tools.doctor.cli import WIDTH, render, report
from tools.doctor.facts import Facts, Gpu, read_probe

LAPTOP = Facts(
    python=(3, 11, 7),
    executable=".venv/bin/python",
    made_by_make=False,
    pinned={"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0", "pyyaml": None},
    installed={
        "torch": "2.13.0+cpu",
        "torchrec": "1.8.0",
        "fbgemm-gpu": "1.8.0+cpu",
        "fbgemm-gpu-cpu": "1.8.0",
        "pyyaml": "6.0",
    },
    probe={
        "torch": {"error": None, "cuda_available": False, "cuda_build": None},
        "gloo": {"error": None},
        "nccl": {"error": None},
        "fbgemm_gpu": {"error": None},
        "torchrec": {"error": None},
    },
    gpus=(),
    host_address="192.168.1.7",
    shm_bytes=8 * 2**30,
    open_files=65536,
    cores=8,
    omp_num_threads=None,
    available_bytes=16 * 2**30,
    bf16_flags=(),
    compiler="/usr/bin/c++",
    commands={"torchrun": "path", "torchx": "path"},
)
GPU_BOX = replace(
    LAPTOP,
    installed=LAPTOP.installed | {"torch": "2.13.0", "fbgemm-gpu": "1.8.0", "fbgemm-gpu-cpu": None},
    probe=LAPTOP.probe
    | {
        "torch": {"error": None, "cuda_available": True, "cuda_build": "13.0"},
        "nccl": {"error": None, "version": "2.27.3"},
    },
    gpus=(Gpu("NVIDIA H200", "9.0"),) * 2,
)


def with_install(facts: Facts, **versions: str | None) -> Facts:
    return replace(facts, installed=facts.installed | {name.replace("_", "-"): v for name, v in versions.items()})


def with_probe(facts: Facts, **results: dict) -> Facts:
    return replace(facts, probe=facts.probe | results)


def findings(facts: Facts) -> dict:
    return {check.name: check for check in check_all(facts) if check.status != "ok"}


@pytest.mark.parametrize("facts", [LAPTOP, GPU_BOX], ids=["laptop", "gpu box"])
def test_nothing_is_wrong_with_a_healthy_machine(facts):
    assert findings(facts) == {}


CPU_REINSTALL = (
    ".venv/bin/python -m pip uninstall -y torch torchrec fbgemm-gpu fbgemm-gpu-cpu; "
    ".venv/bin/python -m pip install -r requirements/cpu.txt"
)
CUDA_REINSTALL = CPU_REINSTALL.replace("-r requirements/cpu.txt", "-e .[dev]")
V100, L40, GH200 = (Gpu("Tesla V100", "7.0"), Gpu("NVIDIA L40", "8.9"), Gpu("some later card", "12.0"))
FAULTY = {
    "an old Python": (replace(LAPTOP, python=(3, 10, 4)), "python", "fault", "3.10.4", "PYTHON=python3.11"),
    "a torch of another pair": (
        with_install(LAPTOP, torch="2.12.0+cpu"),
        *("packages", "fault", "torch is 2.12.0+cpu, not 2.13.0", CPU_REINSTALL),
    ),
    "an fbgemm of another pair, on GPUs": (
        with_install(GPU_BOX, fbgemm_gpu="1.7.0"),
        *("packages", "fault", "fbgemm-gpu is 1.7.0, not 1.8.0", CUDA_REINSTALL),
    ),
    "an unpinned package is missing": (
        with_install(LAPTOP, pyyaml=None),
        *("packages", "fault", "pyyaml", CPU_REINSTALL),
    ),
    "make's own .venv is broken": (
        replace(with_install(LAPTOP, torch="2.12.0"), made_by_make=True),
        *("packages", "fault", "2.12.0", "rm -rf .venv && make install"),
    ),
    "the CUDA wheel without a GPU": (
        with_install(LAPTOP, fbgemm_gpu="1.8.0", fbgemm_gpu_cpu=None),
        *("fbgemm build", "fault", "without a GPU", CPU_REINSTALL),
    ),
    "both builds of fbgemm": (
        with_install(LAPTOP, fbgemm_gpu="1.8.0"),
        *("fbgemm build", "fault", "overwrite", CPU_REINSTALL),
    ),
    "the CPU build on GPUs": (
        with_install(GPU_BOX, fbgemm_gpu="1.8.0+cpu", fbgemm_gpu_cpu="1.8.0"),
        *("fbgemm build", "fault", "2 GPU(s)", CUDA_REINSTALL),
    ),
    "an undefined symbol": (
        with_probe(LAPTOP, fbgemm_gpu={"error": "OSError: undefined symbol: _ZN3c106detail"}),
        *("import fbgemm_gpu", "fault", "undefined symbol", CPU_REINSTALL),
    ),
    "a card before sm_80": (replace(GPU_BOX, gpus=(V100,)), "gpu", "fault", "V100 (compute 7.0)", "device=cpu"),
    "a card after sm_100a": (replace(GPU_BOX, gpus=(GH200,)), "gpu", "fault", "compute 12.0", "device=cpu"),
    "a mixed machine": (replace(GPU_BOX, gpus=(*GPU_BOX.gpus, V100)), "gpu", "fault", "V100", "device=cpu"),
    "a card close to sm_80": (replace(GPU_BOX, gpus=(L40,)), "gpu", "warn", "sm_80", "tests/gpu"),
    "an old driver": (
        with_probe(GPU_BOX, torch={"error": None, "cuda_available": False, "cuda_build": "13.0"}),
        *("gpu", "fault", "CUDA 13.0", "driver"),
    ),
    "a torch without CUDA on GPUs": (
        with_probe(GPU_BOX, torch={"error": None, "cuda_available": False, "cuda_build": None}),
        *("gpu", "fault", "without CUDA", CUDA_REINSTALL),
    ),
    "gloo finds no interface": (
        with_probe(LAPTOP, gloo={"error": "RuntimeError: no interface"}),
        *("gloo", "fault", "no interface", "GLOO_SOCKET_IFNAME"),
    ),
    "NCCL fails": (
        with_probe(GPU_BOX, nccl={"error": "DistBackendError: unhandled system error"}),
        *("nccl", "fault", "unhandled", "NCCL_DEBUG=INFO"),
    ),
    "a hostname without address": (replace(LAPTOP, host_address=None), "network", "warn", "resolve", "/etc/hosts"),
    "Docker's /dev/shm": (replace(LAPTOP, shm_bytes=64 * 2**20), "/dev/shm", "warn", "64 MiB", "--shm-size"),
    "no /dev/shm": (replace(LAPTOP, shm_bytes=None), "/dev/shm", "warn", "none", "mount"),
    "few open files": (replace(LAPTOP, open_files=256), "open files", "warn", "256", "ulimit -n 65536"),
    "too many threads": (replace(LAPTOP, omp_num_threads="64"), "threads", "warn", "'64'", "unset OMP_NUM_THREADS"),
    "threads not a number": (replace(LAPTOP, omp_num_threads="all"), "threads", "warn", "'all'", "unset"),
    "little memory": (replace(LAPTOP, available_bytes=2**30), "memory", "warn", "1.0 GiB", "ps aux"),
    "no compiler": (replace(LAPTOP, compiler=None), "c++", "warn", "bf16", "install g++"),
    "no torchx": (
        replace(LAPTOP, commands={"torchrun": "path", "torchx": None}),
        *("commands", "warn", "torchx", CPU_REINSTALL),
    ),
}


@pytest.mark.parametrize(("facts", "name", "status", "found", "remedy"), FAULTY.values(), ids=FAULTY)
def test_one_broken_thing_is_found_and_only_that(facts, name, status, found, remedy):
    wrong = findings(facts)
    assert list(wrong) == [name]
    assert wrong[name].status == status
    assert found in wrong[name].found
    assert remedy in wrong[name].remedy


@pytest.mark.parametrize("case", FAULTY)
def test_the_table_fits_80_columns_and_names_what_is_wrong_last(case):
    result = report(check_all(FAULTY[case][0]))
    lines = render(result).splitlines()
    assert max(len(line) for line in lines if "->" not in line) <= WIDTH
    assert FAULTY[case][1] in " ".join(lines[lines.index("") :])
    assert result["status"] == FAULTY[case][2]


def test_when_torch_does_not_load_the_rest_is_not_tried_and_one_command_is_shown():
    output = '{"step": "torch", "begins": true}\n{"step": "torch", "error": "ImportError: libtorch.so"}\n'
    facts = replace(LAPTOP, probe=read_probe(output, died="unused"))
    wrong = findings(facts)
    assert list(wrong) == ["import torch", "import fbgemm_gpu", "import torchrec", "gloo"]
    assert render(report(check_all(facts))).count("->") == 1 + 1  # the command, and "marked ->" in the last line


def test_a_probe_that_dies_blames_the_step_it_was_at():
    output = (
        '{"step": "torch", "begins": true}\n{"step": "torch", "error": null, "cuda_available": false, "cuda_build": null}\n'
        'a library prints this\n{"step": "gloo", "begins": true}\n'
    )
    results = read_probe(output, died="died of signal 11")
    assert results["torch"]["error"] is None
    assert results["gloo"] == {"error": "died of signal 11"}
    assert "fbgemm_gpu" not in results
