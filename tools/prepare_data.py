"""Turns public data sets into files that a configuration of configs/ trains on.

python -m tools.prepare_data amazon --input ../shared/data/amazon_electronics_2023 --output prepared/amazon_electronics
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from dlrm_scale.errors import DataError, UserError
from tools import amazon_reviews, criteo_files

CRITEO_WRITERS = {"npy": criteo_files.write_npy, "parquet": criteo_files.write_parquet}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.prepare_data",
        description="Turn public data sets into files to train on.",
        epilog="example: python -m tools.prepare_data amazon --input reviews/ --output prepared/amazon_electronics",
    )
    kinds = parser.add_subparsers(dest="kind", required=True)

    amazon = kinds.add_parser("amazon", help="reviews -> click samples with behaviour histories, as DIN makes them")
    amazon.add_argument("--input", type=Path, required=True, help="folder of {train,val,test,items}.parquet")
    amazon.add_argument("--output", type=Path, required=True, help="folder to write to; same-named files are replaced")
    amazon.add_argument("--negatives", type=_positive, default=1, help="sampled items a review (default: 1)")
    amazon.add_argument("--max-history", type=_positive, default=50, help="most recent events kept (default: 50)")
    amazon.add_argument("--seed", type=int, default=0, help="of the negatives (default: 0)")
    amazon.set_defaults(run=run_amazon)

    criteo = kinds.add_parser("criteo", help="raw click logs -> files that need not fit in memory")
    criteo.add_argument("--input", type=Path, required=True, help="one day, .tsv or .tsv.gz")
    criteo.add_argument("--output", type=Path, required=True, help="folder to write to; same-named files are replaced")
    criteo.add_argument(
        "--format", choices=sorted(CRITEO_WRITERS), required=True, help="npy: as torchrec's tools write"
    )
    criteo.set_defaults(run=run_criteo)
    return parser


def run_amazon(args: argparse.Namespace) -> str:
    summary = amazon_reviews.prepare(args.input, args.output, args.negatives, args.max_history, args.seed)
    rows = ", ".join(f"{split} {num:,}" for split, num in summary.num_rows.items())
    tables = ", ".join(f"{table} {num:,}" for table, num in summary.num_embeddings.items())
    return (
        f"rows: {rows}\n"
        f"left out: {summary.num_without_history:,} reviews without an earlier one, "
        f"{summary.num_repeats:,} repeated reviews of an item\n"
        f"num_embeddings of the tables: {tables}\n"
        f"next: set data.source.train.paths to {args.output / 'train.parquet'}, or take configs/amazon_electronics.yaml, "
        f"which reads prepared/amazon_electronics"
    )


def run_criteo(args: argparse.Namespace) -> str:
    if not args.input.is_file():
        raise DataError(f"there is no file {args.input}; --input takes one .tsv or .tsv.gz")
    args.output.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.completed:,.0f} rows read"), TimeElapsedColumn())
    with Progress(SpinnerColumn(), *columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("rows", total=None)
        write = CRITEO_WRITERS[args.format]
        files = write(args.input, args.output, lambda num_rows: progress.advance(task, num_rows))
    kind = "kind: criteo, format: npy" if args.format == "npy" else "kind: parquet"
    return f"next: set data.source to {{{kind}, train: {{paths: [{files[0]}]}}}}"


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        print(args.run(args))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except OSError as e:
        print(f"error: cannot write to {args.output}: {e}", file=sys.stderr)
        return 1
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"must be positive, but is {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
