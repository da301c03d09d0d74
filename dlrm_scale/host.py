"""This host's memory and compiler, by the standard library alone: the doctor asks where nothing else may be installed."""

import os
import shlex
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")  # of a container, cgroup v2
MEMINFO = Path("/proc/meminfo")


def host_bytes() -> int:
    """The machine's memory, or a container's limit where that is less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(physical, _cgroup_bytes("max") or physical)


def available_bytes() -> int:
    """The kernel's estimate of what can be had now, or what a container's limit leaves, where that is less."""
    kib = next(int(line.split()[1]) for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
    limit, used = _cgroup_bytes("max"), _cgroup_bytes("current")
    return kib * 1024 if limit is None or used is None else min(kib * 1024, max(0, limit - used))


def _cgroup_bytes(name: str) -> int | None:
    try:
        return int((CGROUP / f"memory.{name}").read_text())
    except (OSError, ValueError):  # no cgroup v2, or the limit is "max"
        return None


def cpp_compiler() -> list[str]:
    """The words of the C++ compiler's command: of $CXX, as in `ccache g++`, or else c++."""
    named = os.environ.get("CXX", "")
    try:
        return shlex.split(named) or ["c++"]
    except ValueError:  # a quote that is not closed: no command, as whoever looks for it will find
        return [named]
