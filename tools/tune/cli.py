"""`python -m tools.tune COMMAND`: learns from measured runs and finds faster settings of a configuration.

Each command is a module of this folder with
    EXAMPLE                        one command line, shown by --help
    add_arguments(parser)
    run(args, console) -> dict     what --json prints; progress goes to `console`
    show(result, console)          the same to read, and one line that says what to do next
"""

import argparse
import importlib
import json
import sys

from rich.console import Console

from dlrm_scale.errors import EXIT_INTERRUPTED, UserError

COMMANDS = {
    "collect": "measure points of a space, to learn from",
    "fit": "fit the predictor to records and save it",
    "suggest": "name the points that promise most, offline",
    "run": "find a faster configuration, end to end; an interrupted one goes on",
    "evaluate": "score predictions of records that the predictor never saw",
    "report": "draw what a tuning folder holds, in one HTML page",
}
PLAIN = {"markup": False, "emoji": False, "highlight": False, "soft_wrap": True}  # names may hold brackets


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """Only the chosen command's module is loaded."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.tune",
        description="Learn from measured runs, and find faster settings of a configuration. See docs/tuning.md.",
        epilog="example: python -m tools.tune run --space configs/tuning/quickstart.yaml --folder runs/tune_quickstart --launches 20",
    )
    commands = parser.add_subparsers(metavar="command", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == chosen:
            module = importlib.import_module(f"tools.tune.{name}")
            command.epilog = f"example: {module.EXAMPLE}"
            module.add_arguments(command)
            command.add_argument("--json", action="store_true", help="print the result as JSON")
            command.set_defaults(module=module)
    return parser


def main(argv: list[str]) -> int:
    """0: done; 1: no answer, or it failed; 2: the command line or a file is not valid; 130: interrupted."""
    args = build_parser(argv[0] if argv else None).parse_args(argv)
    console = Console(stderr=args.json, **PLAIN)
    try:
        result = args.module.run(args, console)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print(
            "Interrupted: what was measured is kept, trials that ran were cancelled; the same command goes on.",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        args.module.show(result, console)
    return result.get("exit_code", 0)
