"""The doctor's rules: each reads the facts and says what was found and, if need be, the command that mends it."""

import ipaddress
from dataclasses import dataclass
from typing import Literal

from tools.doctor.facts import Facts, Gpu

GIB = 2**30
MIN_SHM_BYTES = GIB  # below it NCCL's buffers between the ranks of one machine run out; Docker gives 64 MiB
MIN_OPEN_FILES = 1024
MIN_AVAILABLE_BYTES = 4 * GIB  # two ranks take 0.6 GiB each, before any table

NOT_TRIED = "not tried, for torch does not load"

# Compute capability -> GPUs. What fbgemm-gpu 1.8.0 has machine code for (sm_80, sm_90a, sm_100a; no PTX).
FBGEMM_TARGETS = {"8.0": "A100", "9.0": "H100, H200", "10.0": "B200"}
# sm_80 code also runs on later cards of the same generation; the "a" targets run on their own card only.
FBGEMM_COMPATIBLE = ("8.6", "8.7", "8.9")


@dataclass(frozen=True)
class Check:
    """One finding. `fault`: training will fail or be wrong. `warn`: it may be slow, or fail on a larger job.

    `remedy` is the command that mends it; empty where nothing is wrong or another check's remedy comes first.
    """

    name: str
    status: Literal["ok", "warn", "fault"]
    found: str
    remedy: str = ""


def check_all(facts: Facts) -> list[Check]:
    rules = (
        check_python,
        check_packages,
        check_build,
        *(lambda facts, step=step: check_import(facts, step) for step in ("torch", "fbgemm_gpu", "torchrec")),
        check_gpu,
        check_gloo,
        check_nccl,
        check_network,
        check_shm,
        check_open_files,
        check_threads,
        check_memory,
        check_bf16,
        check_compiler,
        check_commands,
    )
    return [rule(facts) for rule in rules]


def reinstall_command(facts: Facts) -> str:
    """The two builds of fbgemm own the same files, so all of the stack goes before it is installed again."""
    if facts.made_by_make:
        return "rm -rf .venv && make install"
    pip = f"{facts.executable} -m pip"
    requirements = "-e .[dev]" if facts.gpus else "-r requirements/cpu.txt"
    return f"{pip} uninstall -y torch torchrec fbgemm-gpu fbgemm-gpu-cpu; {pip} install {requirements}"


def check_python(facts: Facts) -> Check:
    version = ".".join(map(str, facts.python))
    if facts.python[:2] == (3, 11):
        return Check("python", "ok", version)
    remedy = "rm -rf .venv && make install PYTHON=python3.11"
    return Check("python", "fault", f"{version}, but this project runs on Python 3.11", remedy)


def check_packages(facts: Facts) -> Check:
    """Every dependency is there, and the pinned ones in exactly the version that belongs to the others."""
    missing = [name for name in facts.pinned if facts.installed[name] is None]
    if missing:
        return Check("packages", "fault", f"not installed: {', '.join(missing)}", reinstall_command(facts))
    wrong = [
        f"{name} is {facts.installed[name]}, not {version}"
        for name, version in facts.pinned.items()
        if version and facts.installed[name].split("+")[0] != version
    ]
    if wrong:
        why = "fbgemm loads only beside the torch that it was built with, torchrec only beside its fbgemm"
        return Check("packages", "fault", f"{'; '.join(wrong)} ({why})", reinstall_command(facts))
    triple = ", ".join(f"{name} {facts.installed[name]}" for name in ("torch", "torchrec", "fbgemm-gpu"))
    return Check("packages", "ok", triple)


def check_build(facts: Facts) -> Check:
    """The build of fbgemm (CUDA or CPU) is the machine's, and there is only one."""
    stand_in = facts.installed["fbgemm-gpu"]
    cuda_wheel = stand_in is not None and not stand_in.endswith("+cpu")
    cpu_wheel = facts.installed["fbgemm-gpu-cpu"] is not None
    if not cuda_wheel and not cpu_wheel:
        return Check("fbgemm build", "fault", "none is installed", reinstall_command(facts))
    if cuda_wheel and cpu_wheel:
        found = "the CUDA and the CPU build of fbgemm are both installed and overwrite each other's files"
        return Check("fbgemm build", "fault", found, reinstall_command(facts))
    if cuda_wheel and not facts.gpus:
        found = "fbgemm-gpu's CUDA wheel on a machine without a GPU: it cannot load here"
        return Check("fbgemm build", "fault", found, reinstall_command(facts))
    if cpu_wheel and facts.gpus:
        found = f"the CPU build of fbgemm on a machine with {len(facts.gpus)} GPU(s): tables cannot live on them"
        return Check("fbgemm build", "fault", found, reinstall_command(facts))
    return Check("fbgemm build", "ok", "CUDA" if cuda_wheel else "CPU")


def check_import(facts: Facts, step: str) -> Check:
    result = facts.probe.get(step)
    if result is None:
        return Check(f"import {step}", "fault", NOT_TRIED)
    if result["error"]:
        return Check(f"import {step}", "fault", result["error"], reinstall_command(facts))
    return Check(f"import {step}", "ok", "loads and works")


def check_gpu(facts: Facts) -> Check:
    if not facts.gpus:
        return Check("gpu", "ok", "none: training runs on the CPU")
    names = ", ".join(sorted({f"{gpu.name} (compute {gpu.compute_capability})" for gpu in facts.gpus}))
    needed = ", ".join(f"{capability} ({cards})" for capability, cards in FBGEMM_TARGETS.items())
    alien = [gpu for gpu in facts.gpus if not _has_code(gpu)]
    if alien:
        found = f"{names}: fbgemm's wheel has code for {needed} only, and none that could be compiled for another"
        return Check(
            "gpu", "fault", found, "launchers/torchrun.sh --nproc 2 --config configs/quickstart.yaml device=cpu"
        )
    torch = facts.probe.get("torch", {"error": "absent"})
    if not torch["error"] and not torch["cuda_available"]:
        build = f"built for CUDA {torch['cuda_build']}" if torch["cuda_build"] else "a build without CUDA"
        found = f"{len(facts.gpus)} x {names}, but torch cannot use them: it is {build}"
        remedy = (
            "update the NVIDIA driver (nvidia-smi shows the newest CUDA it serves)"
            if torch["cuda_build"]
            else reinstall_command(facts)
        )
        return Check("gpu", "fault", found, remedy)
    close = [gpu for gpu in facts.gpus if gpu.compute_capability in FBGEMM_COMPATIBLE]
    if close:
        found = f"{len(facts.gpus)} x {names}: runs fbgemm's sm_80 code, which nobody tried here"
        return Check("gpu", "warn", found, f"{facts.executable} -m pytest tests/gpu")
    return Check("gpu", "ok", f"{len(facts.gpus)} x {names}")


def _has_code(gpu: Gpu) -> bool:
    return gpu.compute_capability in FBGEMM_TARGETS or gpu.compute_capability in FBGEMM_COMPATIBLE


def check_gloo(facts: Facts) -> Check:
    result = facts.probe.get("gloo")
    if result is None:
        return Check("gloo", "fault", NOT_TRIED)
    if result["error"]:
        remedy = "GLOO_SOCKET_IFNAME=lo make doctor  # if that passes, export it (on a cluster: your network's name, see ip addr)"
        return Check("gloo", "fault", result["error"], remedy)
    return Check("gloo", "ok", "two processes met and added")


def check_nccl(facts: Facts) -> Check:
    if not facts.gpus:
        return Check("nccl", "ok", "not needed without a GPU")
    result = facts.probe.get("nccl")
    if result is None:
        return Check("nccl", "fault", NOT_TRIED)
    if result["error"]:
        return Check("nccl", "fault", result["error"], "NCCL_DEBUG=INFO make doctor")
    return Check("nccl", "ok", result.get("version", "not tried, for torch sees no GPU"))


def check_network(facts: Facts) -> Check:
    if facts.host_address is None:
        remedy = 'echo "127.0.0.1 $(hostname)" | sudo tee -a /etc/hosts'
        return Check("network", "warn", "this machine's own name does not resolve, which gloo asks for", remedy)
    if ipaddress.ip_address(facts.host_address).is_loopback:
        found = f"the hostname is {facts.host_address}: fine on one machine; on several, set GLOO_SOCKET_IFNAME"
        return Check("network", "ok", found)
    return Check("network", "ok", f"the hostname is {facts.host_address}")


def check_shm(facts: Facts) -> Check:
    remedy = "sudo mount -o remount,size=8g /dev/shm  # in Docker: docker run --shm-size=8g"
    if facts.shm_bytes is None:
        return Check("/dev/shm", "warn", "there is none, and the ranks of a machine exchange data in it", remedy)
    if facts.shm_bytes < MIN_SHM_BYTES:
        found = f"{facts.shm_bytes / 2**20:.0f} MiB, but the ranks of a machine want {MIN_SHM_BYTES // 2**20} MiB"
        return Check("/dev/shm", "warn", found, remedy)
    return Check("/dev/shm", "ok", f"{facts.shm_bytes / GIB:.1f} GiB")


def check_open_files(facts: Facts) -> Check:
    if facts.open_files is None:
        return Check("open files", "ok", "no limit")
    if facts.open_files < MIN_OPEN_FILES:
        found = f"at most {facts.open_files} a process; connections and checkpoint files want {MIN_OPEN_FILES}"
        return Check("open files", "warn", found, "ulimit -n 65536")
    return Check("open files", "ok", f"at most {facts.open_files} a process")


def check_threads(facts: Facts) -> Check:
    cores, threads = f"{facts.cores} core(s)", facts.omp_num_threads
    if threads is None:
        return Check("threads", "ok", f"{cores}; OMP_NUM_THREADS is unset: the launcher sets cores / ranks")
    if not threads.isdecimal() or not 1 <= int(threads) <= facts.cores:
        found = f"{cores}, but OMP_NUM_THREADS is '{threads}'; ranks x threads should not pass the cores"
        return Check("threads", "warn", found, "unset OMP_NUM_THREADS")
    return Check("threads", "ok", f"{cores}; OMP_NUM_THREADS is {threads}, for each rank")


def check_memory(facts: Facts) -> Check:
    found = f"{facts.available_bytes / GIB:.1f} GiB available"
    if facts.available_bytes < MIN_AVAILABLE_BYTES:
        remedy = "ps aux --sort=-rss | head  # shows what to end; or start the container with more memory"
        return Check("memory", "warn", f"{found}; the quickstart wants {MIN_AVAILABLE_BYTES // GIB} GiB", remedy)
    return Check("memory", "ok", found)


def check_bf16(facts: Facts) -> Check:
    if facts.bf16_flags:
        return Check("cpu bf16", "ok", f"{', '.join(facts.bf16_flags)}: train.precision=bf16 is fast on the CPU")
    return Check("cpu bf16", "ok", "none: on the CPU keep train.precision=fp32")


def check_compiler(facts: Facts) -> Check:
    if facts.compiler is None:
        found = "no C++ compiler ($CXX, or c++): train.compile cannot work, and attention and PFFN in bf16 are slow on a CPU"
        return Check("c++", "warn", found, "sudo apt-get install g++")
    return Check("c++", "ok", facts.compiler)


def check_commands(facts: Facts) -> Check:
    missing = [command for command, where in facts.commands.items() if where is None]
    if missing:
        return Check("commands", "warn", f"not installed: {', '.join(missing)}", reinstall_command(facts))
    there = ", ".join(facts.commands)
    if "bin" in facts.commands.values():
        activate = f"source {facts.executable.rpartition('/')[0]}/activate"
        return Check("commands", "ok", f"{there} are installed; to type them without a path: {activate}")
    return Check("commands", "ok", f"{there} are on the PATH")
