"""`python -m tools.benchmark COMMAND`: measures machines and this project; see tools/commands.py."""

import sys
from collections.abc import Sequence

from tools.commands import run_tool

COMMANDS = {
    "checkpoint": "what saving costs a run, beside a plain write",
    "communication": "the collectives of a configuration's step in each precision, and their share of it",
    "cluster": "memory and collectives of this machine, as a cluster file",
    "data": "rows a second of the loader alone, a core, beside a plain loop over the same files",
    "growth": "samples a second as batch, tables, rows and sequences grow",
    "model": "the dense arch alone: forward and backward, its variants, and how far each is from the limit",
    "plan": "our planner beside TorchRec's",
    "predictor": "the tuner's predictor on workloads it never saw, beside simpler ones",
    "replay_table": "points of a tuning space, really measured, for searchers to be compared on",
    "search": "the tuner's searchers: how many launches until a point is near the best",
    "train": "samples a second of a configuration, beside variants, stock TorchRec or another commit",
    "truth": "predicted step times beside those of real training",
}


def main(argv: Sequence[str]) -> int:
    return run_tool("tools.benchmark", "Measure machines and this project.", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
