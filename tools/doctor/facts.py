"""What the doctor knows about this machine and install, gathered without importing anything that needs more than the standard library."""

import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from dlrm_scale.host import available_bytes, cpp_compiler

ROOT = Path(__file__).parents[2]
PROBE_SECONDS = 120
BF16_FLAGS = ("avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Gpu:
    name: str
    compute_capability: str  # "9.0"


@dataclass(frozen=True)
class Facts:
    """Everything that the checks look at.

    Attributes:
        python: version of the interpreter.
        executable: the interpreter, as one types it.
        made_by_make: the environment is `make`'s .venv, or there is none yet.
        pinned: dependency -> the exact version that pyproject.toml asks for; None: any version may do.
        installed: dependency, and fbgemm-gpu-cpu -> installed version; None: not installed.
        probe: step of `tools.doctor.probe` -> its result; a step that never ran is absent.
        gpus: what the driver lists, whether or not torch can use it.
        host_address: what the hostname resolves to; None: it does not.
        shm_bytes: size of /dev/shm; None: there is none.
        open_files: soft limit of open files of one process; None: unlimited.
        cores: cores that this process may use.
        omp_num_threads: the variable's value; None: unset.
        available_bytes: memory that can be had now.
        bf16_flags: the processor's flags for bfloat16.
        compiler: the C++ compiler's command; None: there is none.
        commands: launcher -> whether the shell finds it ("path"), or only its folder has it ("bin"), or nothing (None).
    """

    python: tuple[int, int, int]
    executable: str
    made_by_make: bool
    pinned: dict[str, str | None]
    installed: dict[str, str | None]
    probe: dict[str, dict]
    gpus: tuple[Gpu, ...]
    host_address: str | None
    shm_bytes: int | None
    open_files: int | None
    cores: int
    omp_num_threads: str | None
    available_bytes: int
    bf16_flags: tuple[str, ...]
    compiler: str | None
    commands: dict[str, Literal["path", "bin"] | None]


def gather() -> Facts:
    pinned = _pinned()
    installed = {name: _installed(name) for name in (*pinned, "fbgemm-gpu-cpu")}
    in_venv = sys.prefix != sys.base_prefix
    return Facts(
        python=sys.version_info[:3],
        executable=_executable(),
        made_by_make=Path(sys.prefix) == ROOT / ".venv" if in_venv else installed["torch"] is None,
        pinned=pinned,
        installed=installed,
        probe=_probe(),
        gpus=_gpus(),
        host_address=_host_address(),
        shm_bytes=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
        open_files=_open_files(),
        cores=len(os.sched_getaffinity(0)),
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        available_bytes=available_bytes(),
        bf16_flags=_bf16_flags(),
        compiler=_compiler(),
        commands={command: _where(command) for command in ("torchrun", "torchx")},
    )


def _executable() -> str:
    here = Path.cwd()
    python = Path(sys.executable)
    return str(python.relative_to(here)) if python.is_relative_to(here) else str(python)


def _pinned() -> dict[str, str | None]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    parts = [re.fullmatch(r"([\w.-]+)(?:==([\w.]+)|.*)", line) for line in project["dependencies"]]
    return {part[1]: part[2] for part in parts}


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _where(command: str) -> Literal["path", "bin"] | None:
    if shutil.which(command):
        return "path"
    return "bin" if Path(sys.executable).with_name(command).exists() else None


def _probe() -> dict[str, dict]:
    command = [sys.executable, "-W", "ignore", "-m", "tools.doctor.probe"]
    died = "died without a word"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS)
        output = done.stdout
        if done.stderr.strip():
            died = done.stderr.strip().splitlines()[-1]
        if done.returncode < 0:
            died = f"died of signal {-done.returncode}"
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode()
        died = f"did not end within {PROBE_SECONDS} s"
    return read_probe(output, died)


def read_probe(output: str, died: str) -> dict[str, dict]:
    """Step -> result from the probe's output; a step that began and has no result failed because the probe `died`."""
    results: dict[str, dict] = {}
    for line in output.splitlines():
        if line.startswith('{"step"'):
            result = json.loads(line)
            step = result.pop("step")
            results[step] = {"error": died} if result.pop("begins", False) else result
    return results


def _gpus() -> tuple[Gpu, ...]:
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(Gpu(*(part.strip() for part in line.rsplit(",", 1))) for line in listed.splitlines() if "," in line)


def _host_address() -> str | None:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def _open_files() -> int | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def _compiler() -> str | None:
    program, *words = cpp_compiler()
    found = shutil.which(program)
    return found and " ".join([found, *words])


def _bf16_flags() -> tuple[str, ...]:
    if platform.machine() != "x86_64":
        return ()
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return tuple(flag for flag in BF16_FLAGS if flag in flags)
