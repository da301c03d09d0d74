"""The weights of a checkpoint as plain torch files: unsharded, without optimizer state, one table at a time in memory; and back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dlrm_scale.checkpoint.files import Files
from dlrm_scale.checkpoint.manifest import Manifest
from dlrm_scale.checkpoint.tensors import Part, read_parts, saved_tensors
from dlrm_scale.config_io import dump_config, parse_config
from dlrm_scale.errors import CheckpointError, DataError

DENSE = "dense.pt"
SHOWN_FAULTS = 3


def export(path: str, manifest: Manifest, files: Files, output: Path) -> dict[str, int]:
    """Writes table_<name>.pt (one tensor), dense.pt (a state dict of the dense arch) and config.yaml; bytes by file.

    Raises:
        CheckpointError: the folder is not empty.
    """
    output.mkdir(parents=True, exist_ok=True)
    if any(output.iterdir()):
        raise CheckpointError(f"--output {output} is not empty; name a new folder")
    saved = saved_tensors(path, files)
    written: dict[str, int] = {}

    def read(keys: list[str]) -> dict[str, torch.Tensor]:
        tensors = {key: torch.empty(saved[key].size, dtype=saved[key].dtype) for key in keys}
        read_parts(path, [Part.whole(key, tensor) for key, tensor in tensors.items()], files)
        return tensors

    def write(name: str, value: object) -> None:
        torch.save(value, output / name)
        written[name] = (output / name).stat().st_size

    for key in sorted(saved):
        if key.startswith("tables/") and key.endswith("/weight"):
            write(_table_file(key.split("/")[1]), read([key])[key])
    dense = read(sorted(key for key in saved if key.startswith("dense/")))
    write(DENSE, {key.removeprefix("dense/"): tensor for key, tensor in dense.items()})
    config = parse_config(manifest.config, path)
    (output / "config.yaml").write_text(dump_config(config))
    written["config.yaml"] = (output / "config.yaml").stat().st_size
    return written


def load_exported(folder: Path, tables: dict[str, torch.Tensor], dense: dict[str, torch.Tensor]) -> None:
    """Fills the tensors, of tables and of the dense arch's parameters by name, with those of a folder that `export` wrote.

    Raises:
        DataError: a file, table or parameter is missing, of another shape, or one too many. What fits is filled by then.
    """
    faults = list(_fill_all(folder, tables, dense)) if folder.is_dir() else ["there is no such folder"]
    if faults:
        more = [f"and {len(faults) - SHOWN_FAULTS} more"] if len(faults) > SHOWN_FAULTS else []
        raise DataError(
            f"{folder} does not hold this model's weights: {'; '.join(faults[:SHOWN_FAULTS] + more)}; "
            "python -m tools.checkpoint export RUN_DIR --output FOLDER makes a folder that --weights takes"
        )


def _fill_all(folder: Path, tables: dict[str, torch.Tensor], dense: dict[str, torch.Tensor]) -> Iterator[str]:
    """A few words on each thing that does not fit."""
    by_file = {_table_file(name): weight for name, weight in tables.items()}
    for name, weight in by_file.items():
        saved = _read(folder / name)
        yield from [saved] if isinstance(saved, str) else _fill(name, weight, saved)
    surplus = sorted({path.name for path in folder.glob(_table_file("*"))} - set(by_file))
    yield from (f"{name} is of no table of this model" for name in surplus)
    saved = _read(folder / DENSE)
    if not isinstance(saved, dict):
        yield saved if isinstance(saved, str) else f"{DENSE} holds no state dict"
        return
    for name, parameter in dense.items():
        yield from _fill(f"{DENSE}: {name}", parameter, saved[name]) if name in saved else [f"{DENSE} has no {name}"]
    yield from (
        f"{DENSE}: {name} is no parameter of this model" for name in sorted(saved.keys() - dense.keys(), key=str)
    )


def _fill(what: str, weight: torch.Tensor, saved: Any) -> list[str]:
    if not isinstance(saved, torch.Tensor):
        return [f"{what} is no tensor"]
    if saved.shape != weight.shape:
        return [f"{what} has the shape {list(saved.shape)}, the model's has {list(weight.shape)}"]
    if saved.dtype != weight.dtype:
        return [f"{what} is {saved.dtype}, the model's is {weight.dtype}"]
    weight.copy_(saved)
    return []


def _read(path: Path) -> Any:
    """What a file holds, or, as a string, why that is not known."""
    try:
        # mapped, so that a large table is in memory once, not twice
        return torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as e:
        return f"{path.name} cannot be read: {e.strerror or e}"
    except Exception:  # torch's own words fill a screen, and advise to trust the file
        return f"{path.name} cannot be read: it is no whole file of torch.save"


def _table_file(table: str) -> str:
    return f"table_{table}.pt"
