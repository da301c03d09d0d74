"""`train`: how fast a configuration trains, where its steps' time goes, and how far that is from what the machine can do.

PyTorch is imported once all configurations are valid: it takes seconds, which a wrong key need not wait for.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.status import Status

from dlrm_scale.config import DCNv2Config, DLRMConfig, RunConfig, Schedule, check_num_ranks
from dlrm_scale.config_io import apply_override, parse_config, read_tree
from dlrm_scale.errors import ConfigError
from dlrm_scale.libraries import loading_libraries
from dlrm_scale.tuning.knobs import RANKS_KEY, THREADS_KEY
from dlrm_scale.tuning.trial import short
from tools.benchmark.peaks import precision_of
from tools.benchmark.ranks import TRAIN_SILENCE_SECONDS, run_on_ranks
from tools.benchmark.tables import counted, in_digits, table_of, with_range
from tools.commands import is_positive, positive

if TYPE_CHECKING:
    from tools.benchmark.roofline import Work
    from tools.benchmark.train_ranks import RankRun

BASE, STOCK = "base", "stock TorchRec"
OUR_ALLOCATOR = "launch.allocator=ours"
SKIPS = ("data", "dense")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train a configuration for some steps, several times, in turn with variants of it, each time in processes of its own: samples a second, what\n"
        "a step's time goes to, memory, and the part used of the matrix and copy speed that the same ranks measure in the same run."
    )
    parser.epilog = (
        "example: python -m tools.benchmark train --config configs/criteo_80k.yaml --variant none train.pipeline=none --stock\n"
        "         ... --variant one_rank launch.num_ranks=1 launch.threads_per_rank=2      ... --commit main~1      ... --skip data dense"
    )
    parser.add_argument("--config", required=True, metavar="YAML")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="of the base and all variants")
    parser.add_argument("--nproc", type=positive, default=2, metavar="N", help="ranks of the base (default 2)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="of each rank (default 1)")
    parser.add_argument(
        "--variant", nargs="+", action="append", default=[], metavar=("NAME", "KEY=VALUE"),
        help=f"beside the base, also with other {RANKS_KEY} or {THREADS_KEY}; can be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--stock", nargs="*", action="append", default=[], metavar="KEY=VALUE",
        help="beside TorchRec's own DLRM in a plain loop, fp32: on the base's ranks and with the default allocator, or with other "
        f"{RANKS_KEY} or {THREADS_KEY}, or {OUR_ALLOCATOR} (as our launcher sets it); can be given several times",
    )  # fmt: skip
    parser.add_argument("--commit", metavar="REV", help="beside the base on another commit of this repository")
    parser.add_argument("--skip", nargs="+", choices=SKIPS, default=[], help="beside the base without these")
    parser.add_argument(
        "--steps", type=positive, default=40, metavar="N", help="a quarter of them warm-up (default 40)"
    )
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="(default 5)")
    parser.add_argument(
        "--trace", metavar="DIR", help="profile the base once, for ui.perfetto.dev or TensorBoard's profiler plugin"
    )


@dataclass(frozen=True)
class Variant:
    """What is trained: on `ranks` ranks, each with `threads`."""

    name: str
    config: RunConfig
    ranks: int
    threads: int
    measure: Callable[[Variant, Callable[[str], Any]], dict[str, Any]]
    skip: str = ""
    counted: dict[tuple, Work] = field(default_factory=dict)

    def work(self, ids_per_sample: dict[str, float]) -> Work:
        """Seconds to count, and the same in every repeat that reads the same."""
        from tools.benchmark.roofline import as_read, count_work

        key = tuple(ids_per_sample.items())
        if key not in self.counted:
            self.counted[key] = count_work(as_read(self.config, ids_per_sample), self.ranks)
        return self.counted[key]


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Raises ConfigError; else as `run_on_ranks`."""
    variants = variants_of(args)
    runs: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in variants}
    with other_commit(args) as at_commit, console.status("") as status:
        if at_commit:
            variants.append(at_commit)
            runs[at_commit.name] = []
        for repeat in range(args.repeats):
            for variant in variants[repeat % len(variants) :] + variants[: repeat % len(variants)]:
                tell = telling(status, f"{variant.name}, {repeat + 1} of {args.repeats}")
                tell("starting")
                runs[variant.name].append(variant.measure(variant, tell))
        table = None
        if args.trace:
            from tools.benchmark.train_ranks import trace_training

            status.update("tracing")
            base = variants[0]
            arguments = (base.config, base.threads, args.trace)
            table = run_on_ranks(
                trace_training, arguments, base.ranks, base.ranks, silence_seconds=TRAIN_SILENCE_SECONDS
            )[0]
    return {
        "config": args.config,
        "changes": args.changes,
        "steps": args.steps,
        "repeats": args.repeats,
        "variants": {name: summary(own, runs[BASE]) for name, own in runs.items()},
        "trace": args.trace,
        "costliest": table,
    }


def telling(status: Status, what: str) -> Callable[[str], Any]:
    return lambda doing: status.update(f"{what}: {doing}")


# ------------------------------------------------------------ variants
def variants_of(args: argparse.Namespace) -> list[Variant]:
    """Raises ConfigError."""
    found = [variant(args, BASE, [])]
    for name, *changes in args.variant:
        found.append(variant(args, name, changes))
    found += [variant(args, f"without {skip}", [], skip=skip) for skip in args.skip]
    found += [stock_variant(args, launch) for launch in args.stock]
    refuse_equal_names([v.name for v in found])
    return found


def refuse_equal_names(names: Sequence[str]) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"there are two variants of the name {twice[0]!r}; name one of them otherwise")


def variant(args: argparse.Namespace, name: str, changes: Sequence[str], **parts: Any) -> Variant:
    launch = {RANKS_KEY: args.nproc, THREADS_KEY: args.threads}
    tree = read_tree(args.config, RunConfig, "configuration")
    for change in (*args.changes, *short(args.steps), *changes):
        key, _, value = change.partition("=")
        if key in launch:
            if not is_positive(value):
                raise ConfigError(f"{key} must be a whole number, 1 or more, but is {value!r}")
            launch[key] = int(value)
        else:
            apply_override(tree, change)
    config = parse_config(tree, f"{args.config}, {name}")
    check_num_ranks(config, launch[RANKS_KEY])
    return Variant(name, config, launch[RANKS_KEY], launch[THREADS_KEY], **{"measure": measure_here, **parts})


def stock_variant(args: argparse.Namespace, launch: Sequence[str]) -> Variant:
    """TorchRec's loop, launched so. Raises ConfigError: it cannot be, or TorchRec has no such model."""
    ours = OUR_ALLOCATOR in launch
    changes = [change for change in launch if change != OUR_ALLOCATOR]
    strange = [change for change in changes if change.partition("=")[0] not in (RANKS_KEY, THREADS_KEY)]
    if strange:
        raise ConfigError(
            f"--stock takes {RANKS_KEY}=N, {THREADS_KEY}=N and {OUR_ALLOCATOR}, but not {strange[0]!r}: nothing else of ours is in TorchRec's "
            "own loop; give changes of all variants before the options"
        )
    changes += ["train.precision=fp32", "train.tf32=false"]
    plain = variant(args, STOCK, changes, measure=partial(_measure_stock, ours))
    check_stock(plain.config)
    if not launch:
        return plain
    ranks, threads = counted(plain.ranks, "rank"), counted(plain.threads, "thread")
    return replace(plain, name=f"{STOCK}, {ranks} of {threads}{', our allocator' * ours}")


def check_stock(config: RunConfig) -> None:
    """Raises ConfigError: TorchRec has no such model, or the plain loop would do less than the configuration asks for."""
    features, train = config.features, config.train
    tables = features.tables.values()
    suits = (
        isinstance(config.model, DLRMConfig | DCNv2Config)
        and not features.sequences
        and len({table.embedding_dim for table in tables}) == 1
        and all(table.data_type == "fp32" and table.pooling == "sum" for table in tables)
        and len(features.bag_keys) == len(features.tables)
        and len(features.labels) == 1
        and bool(features.dense)
    )
    plain = (
        (train.sparse.name, train.dense.name, train.accumulate_steps) == ("rowwise_adagrad", "adam", 1)
        and not (train.sparse.weight_decay or train.dense.weight_decay or train.clip_grad_norm)
        and train.schedule == Schedule()
    )
    if not (suits and plain):
        raise ConfigError(
            "--stock is TorchRec's own DLRM or DLRM_DCN in a plain loop: it needs model.arch dlrm or dlrm_dcnv2, dense features, no "
            "sequences, one categorical feature for each table, fp32 tables of one embedding_dim that sum, one label, rowwise_adagrad "
            "and adam without weight_decay, clip_grad_norm, schedule or accumulate_steps; leave --stock out, or change the configuration"
        )


def measure_here(variant: Variant, tell: Callable[[str], Any]) -> dict[str, Any]:
    with loading_libraries():
        from tools.benchmark.train_ranks import measure_training
    arguments = (variant.config, variant.threads, variant.skip)
    ranks = run_on_ranks(
        measure_training, arguments, variant.ranks, variant.ranks, tell, silence_seconds=TRAIN_SILENCE_SECONDS
    )
    return figures(variant, ranks)


def _measure_stock(our_allocator: bool, variant: Variant, tell: Callable[[str], Any]) -> dict[str, Any]:
    """As its users start it, not by our launcher, unless its allocator is to be ours."""
    with loading_libraries():
        from tools.benchmark.stock_loop import measure_stock
    ranks = run_on_ranks(
        measure_stock,
        (variant.config, variant.threads),
        variant.ranks,
        variant.ranks,
        tell,
        plain_allocator=not our_allocator,
        silence_seconds=TRAIN_SILENCE_SECONDS,
    )
    return figures(variant, ranks)


@contextmanager
def other_commit(args: argparse.Namespace) -> Iterator[Variant | None]:
    """The base as the code of `args.commit` trains it: this same command there, once a repeat."""
    if args.commit is None:
        yield None
        return
    if subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", f"{args.commit}^{{commit}}"], capture_output=True, check=False
    ).returncode:
        raise ConfigError(f"--commit {args.commit}: this repository has no such commit; git log --oneline lists them")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        _git("worktree", "add", "--detach", str(tree), args.commit)
        command = [sys.executable, "-P", "-m", "tools.benchmark", "train", "--config", args.config, *args.changes]
        command += ["--nproc", str(args.nproc), "--threads", str(args.threads), "--steps", str(args.steps)]

        def measure(variant: Variant, tell: Callable[[str], Any]) -> dict[str, Any]:
            tell("training")
            environment = {**os.environ, "PYTHONPATH": str(tree)}
            done = subprocess.run(
                [*command, "--repeats", "1", "--json"], env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise ConfigError(f"the benchmark does not run at {args.commit}: {done.stderr.strip()[-2000:]}")
            return json.loads(done.stdout)["variants"][BASE]["runs"][0]

        try:
            yield variant(args, f"at {args.commit}", [], measure=measure)
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*words: str) -> None:
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"git {' '.join(words)}: {done.stderr.strip()}")


# ------------------------------------------------------------ figures
def figures(variant: Variant, ranks: Sequence[RankRun]) -> dict[str, Any]:
    """Of one run. mfu and mbu: counted FLOPs and embedding bytes a second, over what the ranks measured right after it."""
    first, config = ranks[0], variant.config
    ids_per_sample = {
        name: statistics.mean(rank.ids_per_sample[name] for rank in ranks) for name in first.ids_per_sample
    }
    work = variant.work(ids_per_sample)
    steps_per_s = first.samples_per_s / config.train.global_batch_size
    p10, p50, p90 = np.percentile(first.step_ms, (10, 50, 90)).tolist()
    counts_flops = variant.skip != "dense"
    return {
        "samples_per_s": first.samples_per_s,
        "step_ms": {"p10": p10, "p50": p50, "p90": p90},
        "stage_ms": first.stage_ms,
        "peak_memory": [rank.peak_memory for rank in ranks],
        "ids_per_sample": ids_per_sample,
        "work": asdict(work),
        "peaks": asdict(first.peaks),
        "mfu": {
            precision: steps_per_s * work.dense_flops / peak if counts_flops else None
            for precision, peak in first.peaks.flops_per_s.items()
        },
        "mbu": steps_per_s * work.embedding_bytes / first.peaks.copy_bytes_per_s,
        "precision": precision_of(config.train),
    }


def summary(runs: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`over_base`: of each repeat's two runs."""
    speeds = [run["samples_per_s"] for run in runs]
    ratios = [run["samples_per_s"] / other["samples_per_s"] for run, other in zip(runs, base, strict=True)]
    return {"samples_per_s": spread(speeds), "over_base": spread(ratios), "runs": list(runs)}


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


# ------------------------------------------------------------ to read
def show(result: dict[str, Any], console: Console) -> None:
    repeats = result["repeats"]
    about = f"{result['config']}, {counted(result['steps'], 'step')}, {counted(repeats, 'repeat')}"
    medians = ": medians, of ratios least..most" if repeats > 1 else ""
    grid = table_of(f"{about}{medians}; GB: host, a rank", "samples/s", "over base", "ms p50 / p90", "MFU", "MBU", "GB")
    for name, found in result["variants"].items():
        speed, ratio, runs = found["samples_per_s"], found["over_base"], found["runs"]
        mfu = _median(run["mfu"].get(run["precision"]) for run in runs)
        p50, p90 = (_median(run["step_ms"][p] for run in runs) for p in ("p50", "p90"))
        grid.add_row(
            name,
            f"{speed['median']:,.0f}",
            "" if name == BASE else with_range(ratio, ".2f", repeats),
            f"{in_digits(p50)} / {in_digits(p90)}",
            "-" if mfu is None else f"{mfu:.1%}",
            f"{_median(run['mbu'] for run in runs):.1%}",
            in_digits(_median(max(m["host_bytes"] for m in run["peak_memory"]) for run in runs) / 1e9),
        )
    console.print(grid)
    names = list(result["variants"][BASE]["runs"][0]["stage_ms"])
    columns = [stage.replace("embedding", "table").replace("_", "\n") for stage in names]
    stages = table_of("median ms of a step, by stage", *columns)
    for name, found in result["variants"].items():
        if found["runs"][0]["stage_ms"]:
            stages.add_row(
                name, *(in_digits(_median(run["stage_ms"][stage] for run in found["runs"])) for stage in names)
            )
    console.print(stages)
    peaks = result["variants"][BASE]["runs"][0]["peaks"]
    flops = ", ".join(f"{precision} {rate / 1e9:,.0f} GFLOP/s" for precision, rate in peaks["flops_per_s"].items())
    console.print(f"this machine, all ranks at once: {flops}, copy {peaks['copy_bytes_per_s'] / 1e9:,.1f} GB/s")
    if result["costliest"]:
        console.print(result["costliest"])
    next_step = (
        f"open {result['trace']}/*.json in https://ui.perfetto.dev"
        if result["trace"]
        else "add --trace DIR"
        if any(name.startswith("without") for name in result["variants"])
        else "add --skip data dense, or --trace DIR"
    )
    console.print(f"next: {next_step}")


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
