"""A made-up machine: what a step might take on a cluster that is not here, with costs that do not add up.

It exists to compare searchers and predictors where the analytic model is wrong in known ways. No term is measured, and no
result on it is a claim about real hardware: for that, measure records and give them to the benchmarks. The planner's estimate
of each rank's lookups and collectives is taken as the ideal, and these are put on top, since each is known to exist and is
missing from the analytic model:

    kernels        starting one costs a fixed time, forward and twice backward; a small one does not reach the bandwidth
    collectives    each has a latency, and short messages do not reach the bandwidth; all wait for the slowest rank
    skew           hot rows are in cache, so lookups are faster; cut by rows, the first block gets more of them
    dense arch     its FLOP/s grow with the batch and saturate; threads help less than evenly, and never beyond the cores;
                   bf16 is faster on CUDA, and slower on a CPU without such instructions
    overlap        the pipeline hides the ids' exchange and the readers behind compute, at a fixed cost a micro-batch;
                   a part of the dense all-reduce hides behind the backward pass
    readers        each sample costs host time; prefetched batches even out its bursts
    stragglers     the slowest of many ranks is slower than the mean
    noise          of a measurement: log-normal
    memory         fragments and buffers beyond what the planner counts
"""

from dataclasses import dataclass

import numpy as np

from dlrm_scale.cluster import ClusterSpec
from dlrm_scale.config import RunConfig, SyntheticSource
from dlrm_scale.sharding.plan import Plan
from dlrm_scale.tuning.plans import DenseWork
from dlrm_scale.tuning.space import Job


@dataclass(frozen=True)
class Machine:
    """Constants of a device, all made up."""

    kernel_ms: float
    half_kernel_ms: float  # a kernel of this ideal time takes twice as long
    collective_ms: float
    half_message_ms: float
    flops_per_s: float  # of a thread (cpu) or a device, at large batches
    half_batch: float  # samples at which half of it is reached
    bf16_speed: float
    reader_us: float  # of host time a sample
    pipeline_ms: float
    step_ms: float  # optimizer, Python
    cores_per_host: int


MACHINES = {
    "cpu": Machine(0.12, 0.2, 0.5, 0.3, 1.4e10, 60, 0.6, 4.0, 0.8, 4.0, 2),
    "cuda": Machine(0.035, 0.02, 0.06, 0.03, 4e13, 900, 3.2, 0.35, 0.25, 1.2, 64),
}
NOISE = 0.03  # standard deviation of the logarithm of a measured time


@dataclass(frozen=True)
class Simulated:
    """`step_ms`: without noise. `needed`: of a rank's memory, the fullest one's; above 1 it does not fit."""

    step_ms: float
    needed: float


def simulate(job: Job, plan: Plan, work: DenseWork) -> Simulated:
    """`work`: of one rank's micro-batch."""
    machine, cluster = MACHINES[job.cluster.device], job.cluster
    lookups_R, exchange = _lookups_ms(job.config, cluster, plan, machine), _exchange_ms(plan, machine, cluster)
    dense_ms = _dense_ms(job, work, machine)
    all_reduce = 0.0
    if cluster.num_ranks > 1:
        bandwidth = min(cluster.intra_host_gb_per_s.value, cluster.inter_host_gb_per_s.value) * 1e6
        all_reduce = machine.collective_ms + 8 * work.num_parameters / bandwidth
    compute = float(lookups_R.max()) + exchange["vectors"] + dense_ms + max(0.0, all_reduce - 0.4 * dense_ms)
    local, prefetch = plan.request.local_batch_size, job.config.data.prefetch_batches
    readers = machine.reader_us * local / 1e3 * (1 + 0.5 / prefetch)
    if job.config.train.pipeline == "none":
        micro = compute + exchange["ids"] + 0.3 * readers
    else:
        micro = max(compute + machine.pipeline_ms, exchange["ids"] + readers)
    straggler = 1 + 0.025 * np.log2(cluster.num_ranks)
    step = job.config.train.accumulate_steps * micro * straggler + machine.step_ms
    return Simulated(float(step), _needed(plan))


def _lookups_ms(config: RunConfig, cluster: ClusterSpec, plan: Plan, machine: Machine) -> np.ndarray:
    """(ranks,) forward, backward and update of all tables of a rank."""
    source = config.data.source
    skew = source.id_skew if isinstance(source, SyntheticSource) else 1.0
    cached = 1 / (1 + 0.5 * skew)
    by_row = [
        name for name, t in plan.tables.items() if t.sharding_type in ("row_wise", "table_row_wise", "grid_shard")
    ]
    sequences = config.features.sequence_tables
    ms = []
    for rank, load in enumerate(plan.ranks):
        kernels = {
            (name in sequences, table.sharding_type)
            for name, table in plan.tables.items()
            if table.sharding_type == "data_parallel" or rank in table.ranks
        }
        num = max(1, len(kernels))
        ideal = (load.step_ms["fwd_compute"] + load.step_ms["bwd_compute"]) * cached
        first_block = 1 + 0.4 * skew * len(by_row) / len(plan.tables) if rank % cluster.ranks_per_host == 0 else 1.0
        ms.append(ideal * first_block + 3 * num * machine.kernel_ms + num * machine.half_kernel_ms)
    return np.array(ms)


def _exchange_ms(plan: Plan, machine: Machine, cluster: ClusterSpec) -> dict[str, float]:
    """Of ids, and of vectors and their gradients: every rank waits for the slowest."""
    if cluster.num_ranks == 1:
        return {"ids": 0.0, "vectors": 0.0}
    types = {table.sharding_type for table in plan.tables.values()} - {"data_parallel"}
    latency = len(types) * (machine.collective_ms + machine.half_message_ms)
    ids = max(load.step_ms["input_dist_comms"] for load in plan.ranks)
    forward, backward = (max(load.step_ms[stage] for load in plan.ranks) for stage in ("fwd_comms", "bwd_comms"))
    return {"ids": 2 * latency + ids, "vectors": 2 * latency + forward + backward}


def _dense_ms(job: Job, work: DenseWork, machine: Machine) -> float:
    local = job.config.train.global_batch_size // job.config.train.accumulate_steps // job.cluster.num_ranks
    speed = machine.flops_per_s * local / (local + machine.half_batch)
    if job.config.train.precision == "bf16":
        speed *= machine.bf16_speed
    if job.cluster.device == "cpu":
        threads = job.launch.threads_per_rank
        asked = threads * job.cluster.ranks_per_host
        speed *= threads**0.8 * min(1.0, machine.cores_per_host / asked)
    return work.flops / speed * 1e3


def _needed(plan: Plan) -> float:
    fullest = max(load.total_device_bytes for load in plan.ranks)
    exchanged = max(load.device_bytes["inputs"] + load.device_bytes["outputs"] for load in plan.ranks)
    room = plan.request.cluster.table_bytes_per_rank
    return (1.12 * fullest + 1.5 * exchanged) / room + 0.06
