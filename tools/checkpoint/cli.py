"""`python -m tools.checkpoint`: what checkpoints there are, whether they are whole, how two differ, and plain weights of one."""

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dlrm_scale.checkpoint.commit import CheckpointFolder
from dlrm_scale.checkpoint.files import Files
from dlrm_scale.checkpoint.manifest import Manifest
from dlrm_scale.errors import CheckpointError, UserError
from dlrm_scale.training.checkpoints import find_checkpoints
from tools.checkpoint.compare import compare
from tools.checkpoint.export import export

PLACE = "a step folder, a folder of checkpoints, or a run folder"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.checkpoint", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--path-handler", action="append", default=[], metavar="MODULE:CLASS", help="an iopath handler to register"
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, run, what in (
        ("list", run_list, "the checkpoints in a folder, newest first; reads no tensors"),
        ("verify", run_verify, "read every file and compare size and checksum; exit 1 if one is bad"),
    ):
        sub = verbs.add_parser(verb, help=what)
        sub.add_argument("path", help=PLACE)
        sub.set_defaults(run=run)
    diff = verbs.add_parser("diff", help="largest difference of each tensor; exit 0 if all are the same, 1 if not")
    diff.add_argument("first", help=f"{PLACE} (its newest)")
    diff.add_argument("second")
    diff.set_defaults(run=run_diff)
    out = verbs.add_parser("export", help="plain weights, one file a table, for use without this project")
    out.add_argument("path", help=f"{PLACE} (its newest)")
    out.add_argument("--output", type=Path, required=True, help="a new or empty folder")
    out.set_defaults(run=run_export)
    return parser


def main(argv: list[str] | None = None) -> int:
    """0: done, and nothing is wrong; 1: a checkpoint is bad or two differ; 2: usage."""
    args = build_parser().parse_args(argv)
    try:
        report, text, code = args.run(args, Files(tuple(args.path_handler)))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except OSError as e:
        print(f"error: {e.filename or 'a file'}: {e.strerror or e}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=1) if args.json else text)
    return code


def run_list(args: argparse.Namespace, files: Files) -> tuple[Any, str, int]:
    folder, steps = _find(args.path, files)
    rows, code = [], 0
    for step in steps:
        try:
            manifest = folder.manifest(step)
            row = _row(manifest) | {"fault": _size_fault(folder, manifest)}
        except CheckpointError as e:
            row = {"step": step, "fault": str(e)}
        code = max(code, int(row["fault"] is not None))
        rows.append(row)
    lines = [f"{'step':>10}  {'samples':>14}  {'ranks':>5}  {'bytes':>16}  {'age':>10}  state"]
    for row in rows:
        if "bytes" in row:
            head = (
                f"{row['step']:>10}  {row['samples']:>14,}  {row['ranks']:>5}  {row['bytes']:>16,}  {row['age']:>10}  "
            )
        else:
            head = f"{row['step']:>10}  {'':>14}  {'':>5}  {'':>16}  {'':>10}  "
        lines.append(head + (f"BAD: {row['fault']}" if row["fault"] else "complete"))
    return rows, "\n".join(lines), code


def run_verify(args: argparse.Namespace, files: Files) -> tuple[Any, str, int]:
    folder, steps = _find(args.path, files)
    rows, lines, code = [], [], 0
    for step in steps:
        strangers: list[str] = []
        try:
            manifest = folder.manifest(step)
            faults = [f for name in sorted(manifest.files) if (f := folder.fault(step, manifest, [name]))]
            strangers = folder.strangers(step, manifest)
        except CheckpointError as e:
            faults = [str(e)]
        rows.append({"step": step, "valid": not faults, "faults": faults, "unknown_files": strangers})
        code = max(code, int(bool(faults)))
        lines.append(f"step {step}: " + ("BAD" if faults else "valid"))
        lines += [f"  {fault}" for fault in faults]
        lines += [f"  note: {name} is not of the checkpoint; nothing reads it" for name in strangers]
    return rows, "\n".join(lines), code


def run_diff(args: argparse.Namespace, files: Files) -> tuple[Any, str, int]:
    sides = [_newest(path, files) for path in (args.first, args.second)]
    rows = compare(*sides, files)
    different = [row for row in rows if row["difference"] != 0]
    lines = [f"{row['key']}: {row['note'] or 'differs by up to {:.3g}'.format(row['difference'])}" for row in different]
    same = len(rows) - len(different)
    lines.append(f"{same} of {len(rows)} tensors are the same, bit for bit")
    return rows, "\n".join(lines), int(bool(different))


def run_export(args: argparse.Namespace, files: Files) -> tuple[Any, str, int]:
    folder, manifest = _newest(args.path, files)
    written = export(folder.path_of(manifest.step), manifest, files, args.output)
    text = "\n".join(f"{name}  {size:,} bytes" for name, size in written.items())
    return written, f"{text}\nwritten to {args.output}; torch.load(..., weights_only=True) reads each", 0


def _find(path: str, files: Files) -> tuple[CheckpointFolder, list[int]]:
    where, steps = find_checkpoints(path, files)
    folder = CheckpointFolder(where, files)
    steps = folder.steps() if steps is None else steps
    if not steps:
        raise CheckpointError(f"{path} holds no checkpoint; name {PLACE}")
    return folder, steps


def _newest(path: str, files: Files) -> tuple[CheckpointFolder, Manifest]:
    folder, steps = _find(path, files)
    manifest = folder.manifest(steps[0])
    if fault := folder.fault(steps[0], manifest, sorted(manifest.files)):
        raise CheckpointError(fault)
    return folder, manifest


def _row(manifest: Manifest) -> dict[str, Any]:
    age = datetime.now(UTC) - datetime.fromisoformat(manifest.time)
    return {
        "step": manifest.step,
        "samples": manifest.samples_consumed,
        "ranks": manifest.world_size,
        "bytes": manifest.num_bytes,
        "time": manifest.time,
        "age": str(age).split(".")[0],
    }


def _size_fault(folder: CheckpointFolder, manifest: Manifest) -> str | None:
    """Of files that are gone or cut short; what is in them, `verify` reads."""
    for name, wanted in sorted(manifest.files.items()):
        path = f"{folder.path_of(manifest.step)}/{name}"
        try:
            if (size := folder.files.size_of(path)) != wanted.size:
                return f"{path} has {size} bytes, but {wanted.size} were written"
        except OSError as e:
            return f"{path} cannot be read: {e.strerror or e}"
    return None
