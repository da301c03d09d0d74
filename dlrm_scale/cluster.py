"""ClusterSpec: the machines a plan is made for, each number with the place it comes from."""

import os
from typing import Literal

from pydantic import Field

from dlrm_scale.strict import Strict


class Figure(Strict):
    """A number and its source: a datasheet, a measurement (with its command), what the system reports, or a guess."""

    value: float = Field(gt=0)
    source: str = Field(min_length=3)


class ClusterSpec(Strict):
    """`num_ranks` equal ranks, `ranks_per_host` to a host. A rank's memory is its own share of the host's."""

    device: Literal["cpu", "cuda"]
    num_ranks: int = Field(gt=0)
    ranks_per_host: int = Field(gt=0)
    memory_bytes: Figure = Field(
        description="where a rank's tables live: HBM of one GPU, or a CPU rank's share of host memory"
    )
    memory_bandwidth_bytes_per_ms: Figure
    intra_host_bandwidth_bytes_per_ms: Figure = Field(description="one rank to the others of its host")
    inter_host_bandwidth_bytes_per_ms: Figure = Field(description="one rank to ranks of other hosts")


def this_cluster(num_ranks: int, ranks_per_host: int, device: Literal["cpu", "cuda"]) -> ClusterSpec:
    """The cluster of equal hosts that this host is one of: memory as the system reports it, bandwidths guessed."""
    gb_per_s = 1e9 / 1e3
    if device == "cuda":
        import torch

        memory = Figure(value=torch.cuda.get_device_properties(0).total_memory, source="reported by the CUDA driver")
        bandwidths = {"memory": 2000 * gb_per_s, "intra_host": 300 * gb_per_s, "inter_host": 25 * gb_per_s}
    else:
        host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory = Figure(value=host_bytes // ranks_per_host, source="the host's memory over its ranks")
        bandwidths = {"memory": 20 * gb_per_s, "intra_host": 2 * gb_per_s, "inter_host": 1 * gb_per_s}
    guesses = {
        f"{name}_bandwidth_bytes_per_ms": Figure(value=value, source="guess") for name, value in bandwidths.items()
    }
    return ClusterSpec(
        device=device, num_ranks=num_ranks, ranks_per_host=ranks_per_host, memory_bytes=memory, **guesses
    )
