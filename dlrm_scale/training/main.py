"""The trainer's command line, for one process or one of torchrun's ranks.

python -m dlrm_scale.training.main --config configs/quickstart.yaml train.global_batch_size=4096
"""

import argparse
import os
import sys
import time
import traceback

from dlrm_scale.config_io import dump_config, fingerprint, load_config
from dlrm_scale.errors import (
    EXIT_CRASHED,
    EXIT_INTERRUPTED,
    EXIT_RESUME,
    LOST_PEER,
    CheckpointError,
    ConfigError,
    DivergedError,
    LostPeerError,
    PeerError,
    UserError,
)
from dlrm_scale.libraries import loading_libraries
from dlrm_scale.overrides import load_tuned
from dlrm_scale.resilience.orphan import end_with_parent
from dlrm_scale.resilience.preemption import Preemption

OTHERS_FIRST_SECONDS = 10.0
STARTED_AT = time.time()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dlrm_scale.training.main",
        description="Train the model that a configuration describes, on this process or as one of torchrun's ranks.",
        epilog="example: launchers/torchrun.sh --nproc 2 --config configs/quickstart.yaml train.max_steps=100 model.num_layers=1",
    )
    parser.add_argument("--config", required=True, metavar="YAML", help="what to train: see configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replaces one value of the configuration"
    )
    parser.add_argument(
        "--overrides",
        dest="overrides_file",
        metavar="JSON",
        help="a file of overrides that tools.tune wrote for this configuration; those of the command line come after them",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and its fingerprint, and stop"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """One of the exit codes of dlrm_scale/errors.py; 0: trained."""
    args = build_parser().parse_intermixed_args(argv)
    preemption = Preemption()
    try:
        file = args.overrides_file
        config = load_tuned(args.config, file, args.overrides) if file else load_config(args.config, args.overrides)
        if args.print_config:
            print(f"# fingerprint {fingerprint(config)}\n{dump_config(config)}", end="")
            return 0
        if "TORCHELASTIC_RUN_ID" in os.environ:  # set by a launcher
            end_with_parent()
        with preemption:
            with loading_libraries():  # takes seconds, which a wrong key need not wait for
                from dlrm_scale.training.run import run
            result = run(config, preemption, STARTED_AT)
    except UserError as e:
        return _tell(e, preemption)
    except RuntimeError as e:
        if any(lost in str(e) for lost in LOST_PEER):
            why = str(e).splitlines()[0]
            return _tell(
                LostPeerError(f"lost the connection to another rank ({why}); its own error says why"), preemption
            )
        return _crashed()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception:
        return _crashed()
    return EXIT_RESUME if result is not None and result.preempted else 0


def _crashed() -> int:
    traceback.print_exc()
    return EXIT_CRASHED


def _tell(error: UserError, preemption: Preemption) -> int:
    """Prints the error where it happened. A rank that only hears of it, or finds the same as rank 0, first lets that one speak.

    A rank that the launcher has told to end meanwhile, because of the other, need not say it.
    """
    rank = int(os.environ.get("RANK", 0))
    if isinstance(error, LostPeerError) and preemption.requested:
        return error.exit_code
    if isinstance(error, PeerError) or (isinstance(error, ConfigError | CheckpointError | DivergedError) and rank > 0):
        time.sleep(OTHERS_FIRST_SECONDS)
    where = f" (rank {rank})" if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not isinstance(error, ConfigError) else ""
    print(f"error{where}: {error}", file=sys.stderr, flush=True)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
