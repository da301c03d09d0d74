"""`communication`: the collectives of a configuration's step, one by one: bytes and ms in each precision, and their share of the step."""

import argparse
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from dlrm_scale.communication_config import CommunicationPrecision
from dlrm_scale.config import RunConfig, check_num_ranks
from dlrm_scale.config_io import load_config
from dlrm_scale.meta import META
from dlrm_scale.models.ranking_model import build_model
from dlrm_scale.sharding.cost import SENT_BYTES
from dlrm_scale.sharding.plan import BY_ROW, Plan
from dlrm_scale.training.ranks import from_first_rank, process_group, this_rank
from dlrm_scale.tuning.trial import short
from tools.benchmark.bandwidth import ID_BYTES, finish_of
from tools.benchmark.cluster import positive
from tools.benchmark.ranks import run_on_ranks
from tools.benchmark.timing import Case, time_interleaved
from tools.benchmark.train_ranks import TRAIN_SILENCE_SECONDS, plan_of, train

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
STEPS = 16  # of the training run whose step the exchanges are a share of


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run the collectives of a configuration's step alone, by its plan, in fp32, fp16 and bf16, with the casts there and back; then\n"
        "train some steps to say which share of a step they would be if nothing overlapped them."
    )
    parser.epilog = "example: python -m tools.benchmark communication --config configs/benchmark/dlrm_dcnv2.yaml"
    parser.add_argument("--config", required=True, metavar="YAML")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="of the configuration")
    parser.add_argument("--nproc", type=positive, default=2, metavar="N", help="ranks, all of one host (default 2)")
    parser.add_argument("--seconds", type=positive, default=10, metavar="N", help="begin no round later (default 10)")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Raises ConfigError; else as `run_on_ranks`."""
    config = load_config(args.config, (*short(STEPS), *args.changes))
    check_num_ranks(config, args.nproc)
    arguments, num_ranks = (config, args.seconds), args.nproc
    with console.status("starting") as status:
        found, step_ms = run_on_ranks(
            measure, arguments, num_ranks, num_ranks, status.update, silence_seconds=TRAIN_SILENCE_SECONDS
        )[0]
    rows = [{**asdict(m.exchange), "num_bytes": m.num_bytes, "ms": m.ms} for m in found]
    micro_batches = config.train.accumulate_steps  # each makes all of them, the all-reduces too
    alone_ms = micro_batches * sum(m.ms[m.exchange.used or "int64"] for m in found)
    return {
        "config": args.config,
        "rows": rows,
        "micro_batches": micro_batches,
        "step_ms": step_ms,
        "alone_ms": alone_ms,
        "share": alone_ms / step_ms,
    }


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


def show(result: dict[str, Any], console: Console) -> None:
    grid = Table(title="one rank's exchanges of a micro-batch, each alone; ms with casts", title_justify="left")
    for column in ("what", "collective", "MB now", "in", *DTYPES):
        grid.add_column(column, justify="left" if column in ("what", "collective") else "right")
    for row in result["rows"]:
        used = row["used"] or "int64"
        shown = [f"{row['ms'][p]:.2f}" if p in row["ms"] else "" for p in DTYPES]
        if row["used"] is None:
            shown[0] = f"{row['ms']['int64']:.2f}"
        grid.add_row(row["what"], row["collective"], f"{row['num_bytes'][used] / 1e6:.2f}", used, *shown)
    console.print(grid)
    console.print(
        f"together {result['alone_ms']:.1f} ms in {result['micro_batches']} micro-batch(es), {result['share']:.0%} of a step of "
        f"{result['step_ms']:.1f} ms if nothing overlapped them",
        highlight=False,
    )
    console.print(
        "next, where 16 bits take less: sharding.communication={forward: fp16, backward: bf16} train.all_reduce.precision=bf16"
    )
