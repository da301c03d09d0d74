"""What a rank of `communication` does: runs the exchanges of a step one by one, then trains."""

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dlrm_scale.communication_config import CommunicationPrecision
from dlrm_scale.config import RunConfig
from dlrm_scale.meta import META
from dlrm_scale.models.ranking_model import build_model
from dlrm_scale.sharding.cost import SENT_BYTES
from dlrm_scale.sharding.plan import BY_ROW, Plan
from dlrm_scale.training.ranks import from_first_rank, process_group, this_rank
from tools.benchmark.bandwidth import ID_BYTES, finish_of
from tools.benchmark.timing import Case, time_interleaved
from tools.benchmark.train_ranks import plan_of, train

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Exchange:
    """A collective of one micro-batch. `numbers`: of one rank's whole buffer, as `bandwidth` counts it. `used`: the configured precision."""

    what: str
    collective: str
    numbers: int
    used: CommunicationPrecision | None  # None: int64 ids


@dataclass(frozen=True)
class Measured:
    exchange: Exchange
    num_bytes: dict[str, int]  # by precision
    ms: dict[str, float]  # median of the slowest rank's, casts there and back included


def exchanges(config: RunConfig, plan: Plan, num_dense_parameters: int) -> list[Exchange]:
    """Of one micro-batch on ranks of one host, with the expected ids; those of nothing left out."""
    request, sharding = plan.request, config.sharding.communication
    ranks, batch = request.cluster.num_ranks, request.local_batch_size
    ids = whole = summed = 0.0
    replicated: Counter[CommunicationPrecision] = Counter()
    for name, table in plan.tables.items():
        spec = request.tables[name]
        if table.sharding_type == "data_parallel":
            # of all rows, whatever was looked up
            replicated[spec.data_type] += spec.num_embeddings * spec.embedding_dim
            continue
        per_sample = spec.expected_ids_by_feature.values()
        by_row, pooled = table.sharding_type in BY_ROW, spec.collection == "bags"
        vectors = batch * (len(per_sample) if pooled else sum(per_sample))
        num_cuts = len({shard.column for shard in table.shards})
        ids += batch * sum(per_sample) * num_cuts
        if by_row and pooled:
            summed += vectors * ranks * spec.embedding_dim  # partial sums for all ranks
        else:
            whole += vectors * spec.embedding_dim
    dense = config.train.all_reduce.precision
    every = [
        Exchange("ids", "all-to-all", round(ids), None),
        Exchange("rows forward", "all-to-all", round(whole), sharding.forward),
        Exchange("sums forward", "reduce-scatter", round(summed), sharding.forward),
        Exchange("gradients of rows", "all-to-all", round(whole), sharding.backward),
        Exchange("gradients of sums", "all-gather", round(summed), sharding.backward),
        *(Exchange("gradients of replicated tables", "all-reduce", n, kind) for kind, n in replicated.items()),
        Exchange("dense gradients", "all-reduce", num_dense_parameters, dense),
    ]
    return [e for e in every if e.numbers]


def measure(tell: Callable[[str], Any], config: RunConfig, seconds: float) -> tuple[list[Measured], float]:
    """As one of torchrun's ranks: each exchange in each precision, and the median ms of a step; the same on every rank."""
    torch.set_num_threads(1)
    rank = this_rank(config.device)
    with process_group(rank):
        plan = plan_of(config, rank)
        there = exchanges(config, plan, build_model(config, dense_device=META).num_dense_parameters)
        tell("exchanging")
        cases = {}
        for exchange in there:
            for precision in ("int64",) if exchange.used is None else DTYPES:
                call = _call(exchange, precision, rank.device)
                cases[exchange, precision] = Case(call, finish=finish_of(rank.device))
        seconds_of = time_interleaved(cases, seconds, align=dist.barrier, agree=from_first_rank)
        slowest = torch.tensor([statistics.median(s) for s in seconds_of.values()], dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        ms_of = dict(zip(seconds_of, (1e3 * slowest).tolist(), strict=True))
        tell("training")
        result = train(config, plan, rank)
        found = []
        for exchange in there:
            ms = {precision: t for (of, precision), t in ms_of.items() if of == exchange}
            num_bytes = {p: exchange.numbers * SENT_BYTES.get(p, ID_BYTES) for p in ms}
            found.append(Measured(exchange, num_bytes, ms))
        return found, statistics.median(ms["step"] for ms in result.step_ms)


def _call(exchange: Exchange, precision: str, device: torch.device) -> Callable[[], Any]:
    """The collective on a buffer of its size; fp32 values are cast for it and back."""
    ranks = dist.get_world_size()
    part = -(-exchange.numbers // ranks)
    dtype = DTYPES.get(precision, torch.int64)
    given = torch.int64 if exchange.used is None else torch.float32
    whole, one = (torch.zeros(n, dtype=given, device=device) for n in (part * ranks, part))

    def call() -> torch.Tensor:
        sent = (one if exchange.collective == "all-gather" else whole).to(dtype)
        if exchange.collective == "all-to-all":
            received = torch.empty_like(sent)
            dist.all_to_all_single(received, sent)
        elif exchange.collective == "reduce-scatter":
            received = sent.new_empty(part)
            dist.reduce_scatter_tensor(received, sent)
        elif exchange.collective == "all-gather":
            received = sent.new_empty(part * ranks)
            dist.all_gather_into_tensor(received, sent)
        else:
            received = sent
            dist.all_reduce(received)
        return received.to(given)

    return call
