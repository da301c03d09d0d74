"""What this machine could do at most, measured on all ranks at once, and what a training step asks of it, counted."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dlrm_scale.config import RunConfig
from dlrm_scale.models.dense_trace import count_flops
from dlrm_scale.sharding.options import ELEMENT_BYTES
from dlrm_scale.sharding.storage import OPTIMIZER_STATES, STATE_BYTES
from dlrm_scale.training.ranks import from_first_rank
from dlrm_scale.training.run import cpu_has_bf16
from tools.benchmark.bandwidth import ID_BYTES, finish_of
from tools.benchmark.peaks import Peaks
from tools.benchmark.timing import Case, time_interleaved

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
# rows and columns: large enough to reach the peak; on a CPU (two threads, bf16) 1024 get two thirds to four fifths of it, 4096 no more
MATRIX = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}  # far over any cache
SECONDS = 1.5
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Work:
    """Of one optimizer step of all ranks together.

    dense_flops: of the products in forward and backward pass, as FlopCounterMode counts; every sequence as long as the mean one, so
        that padding is no work.
    embedding_bytes: ids and rows read, pooled rows written, their gradients read, rows and optimizer state read and written.
        Every id counts, as if no two of a batch were the same row, and nothing for exchanges.
    """

    dense_flops: int
    embedding_bytes: int


def peak_cases(device: torch.device) -> dict[str, Case]:
    """By precision a large matrix product, and a copy: what `peaks_of` takes the seconds of."""
    size, on_cuda = MATRIX[device.type], device.type == "cuda"
    cases = {}
    for precision, dtype in DTYPES.items():
        if precision == "bf16" and not on_cuda and not cpu_has_bf16():
            continue  # one product would take minutes
        if precision == "tf32" and not on_cuda:
            continue
        a, b, out = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(3))

        def multiply(a=a, b=b, out=out, tf32=precision == "tf32") -> None:
            torch.backends.cuda.matmul.allow_tf32 = tf32
            torch.mm(a, b, out=out)

        cases[precision] = Case(multiply, finish=finish_of(device))
    source, target = (torch.ones(COPY_BYTES[device.type] // FLOAT_BYTES, device=device) for _ in range(2))
    cases["copy"] = Case(lambda: target.copy_(source), finish=finish_of(device))
    return cases


def peaks_of(seconds: Mapping[str, float], device: torch.device, num_ranks: int) -> Peaks:
    """`seconds`: of one call of each of `peak_cases`, which all ranks made at once."""
    flops, moved = num_ranks * 2 * MATRIX[device.type] ** 3, num_ranks * 2 * COPY_BYTES[device.type]
    return Peaks({name: flops / s for name, s in seconds.items() if name in DTYPES}, moved / seconds["copy"])


def measure_peaks(device: torch.device) -> Peaks:
    """Collective. The best round counts, and in it the slowest rank: what else the machine does lowers no peak."""
    seconds = time_interleaved(peak_cases(device), SECONDS, align=dist.barrier, agree=from_first_rank)
    slowest = torch.tensor(list(seconds.values()), dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    best = slowest.amin(1).tolist()
    return peaks_of(dict(zip(seconds, best, strict=True)), device, dist.get_world_size())


def count_work(config: RunConfig, num_ranks: int) -> Work:
    micro_batches = config.train.accumulate_steps
    local = config.train.global_batch_size // num_ranks // micro_batches
    return Work(sum(count_flops(_without_padding(config), local)) * num_ranks * micro_batches, embedding_bytes(config))


def as_read(config: RunConfig, ids_per_sample: Mapping[str, float]) -> RunConfig:
    """Expecting as many ids of each feature as its batches had on average; empty: `config` as it is."""
    tree = config.model_dump()
    counted = [(f["name"], f) for f in tree["features"]["categorical"]]
    counted += [(s["fields"][0]["name"], s) for s in tree["features"]["sequences"]]
    for name, feature in counted:
        if name in ids_per_sample:
            feature["pooling_factor"] = max(ids_per_sample[name], 1e-6)  # a configuration expects more than none
    return RunConfig.model_validate(tree)


def _without_padding(config: RunConfig) -> RunConfig:
    tree = config.model_dump()
    for sequence, of_tree in zip(config.features.sequences, tree["features"]["sequences"], strict=True):
        of_tree |= {"max_length": max(1, round(sequence.expected_length)), "pooling_factor": None}
    return RunConfig.model_validate(tree)


def embedding_bytes(config: RunConfig) -> int:
    schema, batch = config.features, config.train.global_batch_size
    states_by_weight, states_by_row = OPTIMIZER_STATES[config.train.sparse.name]
    total = 0.0
    for name, table in schema.tables.items():
        row = table.embedding_dim * ELEMENT_BYTES[table.data_type]
        out = table.embedding_dim * FLOAT_BYTES
        state = (states_by_row + states_by_weight * table.embedding_dim) * STATE_BYTES
        for feature in schema.features_of(name):
            ids = schema.expected_ids[feature]
            vectors = ids if name in schema.sequence_tables else 1  # a pooled one a sample, or one an id
            total += ids * (ID_BYTES + row) + vectors * out  # forward
            total += vectors * out + ids * 2 * (row + state)  # backward
    return round(total * batch)
