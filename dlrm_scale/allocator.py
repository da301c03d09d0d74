"""How glibc should give memory to a process that trains on a CPU. What launches ranks sets it: the library reads it once, at their start.

PyTorch frees and asks for tensors of megabytes at every operation. By default each goes back to the kernel, which clears it
anew, 4 KiB at a time: more than half of a bf16 step (docs/results/speed.md). Kept, and in pages of 2 MiB, they cost next to nothing.
"""

from collections.abc import MutableMapping

VARIABLE = "GLIBC_TUNABLES"
TUNABLES = {
    "hugetlb": 1,  # asks for transparent huge pages (glibc 2.35)
    "mmap_threshold": 2**32,  # smaller tensors come from the heap,
    "trim_threshold": 2**36,  # which keeps what is freed,
    "top_pad": 2**26,  # and grows by this much at once
}
SETTING = ":".join(f"glibc.malloc.{name}={value}" for name, value in TUNABLES.items())


def keep_freed_memory(environment: MutableMapping[str, str]) -> None:
    """For the processes that will be started with `environment`; what a user has set there stays.

    Not on a machine with GPUs that this process can use: what it does to the host memory of their jobs was not measured.
    """
    import torch  # here: the launcher keeps the libraries' warnings quiet while it loads them

    if torch.cuda.device_count():
        return
    environment.setdefault(VARIABLE, SETTING)
