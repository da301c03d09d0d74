"""`python -m tools.benchmark COMMAND`: measures machines and this project.

Each command is a module of this folder with
    add_arguments(parser)
    run(args, console) -> dict     what --json prints; progress goes to `console`
    show(result, console)          the same to read
"""

import argparse
import importlib
import json
import sys

from rich.console import Console

from dlrm_scale.errors import UserError
from dlrm_scale.libraries import loading_libraries

COMMANDS = {
    "checkpoint": "what saving costs a run, beside a plain write",
    "cluster": "memory and collectives of this machine, as a cluster file",
    "plan": "our planner beside TorchRec's",
    "predictor": "the tuner's predictor on workloads it never saw, beside simpler ones",
    "replay_table": "points of a tuning space, really measured, for searchers to be compared on",
    "search": "the tuner's searchers: how many launches until a point is near the best",
    "truth": "predicted step times beside those of real training",
}


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """Only the chosen command's module is loaded: some take seconds."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmark", description="Measure machines and this project.")
    commands = parser.add_subparsers(metavar="command", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == chosen:
            module = importlib.import_module(f"tools.benchmark.{name}")
            module.add_arguments(command)
            command.add_argument("--json", action="store_true", help="print the result as JSON")
            command.set_defaults(module=module)
    return parser


def main(argv: list[str]) -> int:
    """0: measured; 1: it failed; 2: the command line is not valid."""
    with loading_libraries():
        parser = build_parser(argv[0] if argv else None)
    args = parser.parse_args(argv)
    console = Console(stderr=args.json)
    try:
        result = args.module.run(args, console)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        return 130
    print(json.dumps(result, indent=1)) if args.json else args.module.show(result, console)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
