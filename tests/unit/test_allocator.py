"""That freed memory stays with a process started so: the C library is asked for the same block again and again."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from dlrm_scale.allocator import VARIABLE, keep_freed_memory

ROUNDS, BLOCK_BYTES, PAGE_BYTES = 10, 2**26, 4096
USE_A_BLOCK = f"""
import ctypes, resource
c = ctypes.CDLL(None)
c.malloc.restype, c.memset.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]
def use():
    block = c.malloc(ctypes.c_size_t({BLOCK_BYTES}))
    c.memset(block, 1, {BLOCK_BYTES})
    c.free(block)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({ROUNDS}):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(environment: dict[str, str]) -> int:
    return int(subprocess.check_output([sys.executable, "-c", USE_A_BLOCK], env=environment))


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc")
def test_a_block_that_was_freed_costs_no_page_faults_when_it_is_used_again():
    plain = {name: value for name, value in os.environ.items() if name != VARIABLE}
    keeping = dict(plain)
    keep_freed_memory(keeping)
    assert page_faults(keeping) < 100
    assert (
        page_faults(plain | {VARIABLE: "glibc.malloc.mmap_threshold=131072"}) > ROUNDS * BLOCK_BYTES / PAGE_BYTES / 600
    )


def test_what_the_user_has_set_stays():
    environment = {VARIABLE: "glibc.malloc.arena_max=1"}
    keep_freed_memory(environment)
    assert environment == {VARIABLE: "glibc.malloc.arena_max=1"}


def test_a_machine_with_gpus_keeps_the_default(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    environment: dict[str, str] = {}
    keep_freed_memory(environment)
    assert environment == {}
