"""`python -m tools.tune COMMAND`: learns from measured runs and finds faster settings of a configuration; see tools/commands.py."""

import sys
from collections.abc import Sequence

from tools.commands import run_tool

ABOUT = "Learn from measured runs, and find faster settings of a configuration. See docs/tuning.md."
COMMANDS = {
    "run": "find a faster configuration, end to end; an interrupted one goes on",
    "suggest": "name the points that promise most, offline",
    "collect": "measure points of a space, to learn from",
    "fit": "fit the predictor to records and save it",
    "evaluate": "score predictions of records that the predictor never saw",
    "report": "draw what a tuning folder holds, in one HTML page",
}
IF_INTERRUPTED = "Interrupted: what was measured is kept, trials that ran were cancelled; the same command goes on."


def main(argv: Sequence[str]) -> int:
    return run_tool("tools.tune", ABOUT, COMMANDS, argv, IF_INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
