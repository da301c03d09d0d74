"""What a line of records.jsonl says of the machine and the software: written by the trainer, read by the tuner."""

import hashlib
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

FORMAT = 1
COMPARED_VERSIONS = ("torch", "torchrec", "fbgemm-gpu", "dlrm-scale")  # each can change what a step takes


def origin(num_ranks: int, threads_per_rank: int) -> dict[str, Any]:
    """The parts `format`, `hardware`, `launch` and `versions` of a record of this machine."""
    return {
        "format": FORMAT,
        "hardware": hardware_facts(),
        "launch": {"num_ranks": num_ranks, "threads_per_rank": threads_per_rank},
        "versions": software_versions(),
    }


def software_versions() -> dict[str, str]:
    return {name: version(name) for name in COMPARED_VERSIONS} | {"python": platform.python_version()}


def hardware_facts() -> dict[str, Any]:
    """The part `hardware` of a record of this machine: what makes times comparable, and its fingerprint."""
    import torch

    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    return {**facts, "fingerprint": hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
