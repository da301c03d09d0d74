"""A tool of several commands: `python -m tools.PACKAGE COMMAND`. Each command is a module of the package with

add_arguments(parser)          sets the parser's epilog to an example, too
run(args, console) -> dict     what --json prints; progress goes to `console`
show(result, console)          the same to read, and what to do next
"""

import argparse
import importlib
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence

from rich.console import Console

from dlrm_scale.errors import EXIT_FAILED, EXIT_INTERRUPTED, UserError
from dlrm_scale.libraries import loading_libraries

WIDTH = 80
PLAIN = {"markup": False, "emoji": False, "highlight": False, "soft_wrap": True}  # names may hold brackets


def run_tool(
    package: str, about: str, commands: Mapping[str, str], argv: Sequence[str], if_interrupted: str = "Interrupted."
) -> int:
    """`commands`: a line on each. 0: done; 1: no answer, or it failed; 2: the command line or a file is not valid; 130: interrupted."""
    with loading_libraries():
        parser = build_parser(package, about, commands, argv[0] if argv else None)
    args = parser.parse_args(argv)
    console = Console(stderr=args.json, **PLAIN)
    try:
        result = args.module.run(args, console)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except OSError as e:  # a full disk, a folder that is gone: what the commands do not name themselves
        print(f"error: {e.filename or 'a file'}: {e.strerror or e}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print(if_interrupted, file=sys.stderr)
        return EXIT_INTERRUPTED
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        args.module.show(result, console)
    return result.get("exit_code", 0)


def folded(prose: str) -> str:
    """Help is shown as it stands, and consoles of the tools fold nothing, so that a command can be copied whole (`PLAIN`)."""
    return textwrap.fill(prose, WIDTH, break_on_hyphens=False)


def is_positive(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


def positive(text: str) -> int:
    if not is_positive(text):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, but is {text}")
    return int(text)


def build_parser(package: str, about: str, commands: Mapping[str, str], chosen: str | None) -> argparse.ArgumentParser:
    """Only the chosen command's module is loaded: some take seconds."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {package}",
        description=about,
        epilog=f"example: python -m {package} {next(iter(commands))} --help",
    )
    parsers = parser.add_subparsers(metavar="command", required=True)
    for name, summary in commands.items():
        command = parsers.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == chosen:
            module = importlib.import_module(f"{package}.{name}")
            module.add_arguments(command)
            command.description = folded(command.description)
            command.add_argument("--json", action="store_true", help="print the result as JSON")
            command.set_defaults(module=module)
    return parser
