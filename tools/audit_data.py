"""Proves that each sample counted exactly once towards a run's final weights, over all its restarts.

python -m tools.audit_data runs/quickstart/20260102-030405
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from dlrm_scale.errors import UserError
from dlrm_scale.resilience.audit import Audit, audit


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.audit_data",
        description="Read what the ranks of every attempt of a run wrote down of their data, and say whether each sample "
        "counted once. Exit code 0: each did; 1: no.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run's folder, which holds account/")
    parser.add_argument("--json", action="store_true", help="print the whole result as JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        result = audit(args.run_dir / "account")
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    print(json.dumps(asdict(result)) if args.json else describe(result))
    return 1 if result.faults else 0


def describe(result: Audit) -> str:
    lines = [
        f"attempt {a['attempt']}: {a['ranks']} ranks, steps {a['from_step']} to {a['to_step']}" for a in result.attempts
    ]
    lines.append(
        f"the weights after step {result.num_steps} hold {result.num_samples:,} samples; {result.skipped:,} were skipped as not "
        f"finite; {result.thrown_away_steps} steps were done again"
    )
    shown = result.faults[:20]
    if len(result.faults) > len(shown):
        shown = [*shown, f"... and {len(result.faults) - 20} more (--json)"]
    return "\n".join([*lines, *(shown or ["each sample counted exactly once"])])


if __name__ == "__main__":
    sys.exit(main())
