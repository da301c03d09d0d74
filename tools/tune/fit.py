"""`fit`: learns from records and keeps what it learned."""

import argparse
import time
from typing import Any

import torch
from rich.console import Console

from dlrm_scale.errors import ConfigError
from dlrm_scale.tuning.model_search import known_runs
from dlrm_scale.tuning.plans import Plans
from dlrm_scale.tuning.predictor import NeuralPredictor
from dlrm_scale.tuning.records import read_records, records_fingerprint
from tools.tune.common import add_prior, add_records, learnable, tell


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: python -m tools.tune fit --records runs/history/records.jsonl --out predictor.pt"
    add_records(parser, required=True)
    add_prior(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="where the predictor is saved")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of its first weights (default 0)")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    torch.set_num_threads(1)  # the matrices are small: more threads only wait for each other
    history = read_records(args.records)
    found = learnable(history)
    tell(console, found.kept_apart)
    records = found.records + (found.prior if args.prior else ())
    if not any(record.outcome == "ok" for record in records):
        history.require()
        raise ConfigError("no record is of this hardware and software; --prior learns from those of others")
    known = known_runs(records, Plans())
    predictor, started = NeuralPredictor(args.seed), time.perf_counter()
    predictor.fit(known.table, known.measured)
    seconds = time.perf_counter() - started
    try:
        predictor.save(args.out, records_fingerprint(records))
    except (OSError, RuntimeError) as e:  # torch raises the latter where a folder is missing
        raise ConfigError(f"cannot write {args.out}: {e}; name another place: --out") from None
    prior = len(found.prior) if args.prior else 0
    return {"predictor": args.out, "records": len(records), "prior": prior, "fit_s": seconds}


def show(result: dict[str, Any], console: Console) -> None:
    prior = f", {result['prior']} of them of other hardware or versions" if result["prior"] else ""
    console.print(f"{result['predictor']}: learned from {result['records']} records{prior} in {result['fit_s']:.1f} s")
    console.print(f"next: python -m tools.tune suggest --predictor {result['predictor']} --space ...")
