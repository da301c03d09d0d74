"""The weights of a checkpoint as plain torch files: unsharded, without optimizer state, one table at a time in memory."""

from pathlib import Path

import torch

from dlrm_scale.checkpoint.files import Files
from dlrm_scale.checkpoint.manifest import Manifest
from dlrm_scale.checkpoint.tensors import Part, read_parts, saved_tensors
from dlrm_scale.config_io import dump_config, parse_config
from dlrm_scale.errors import CheckpointError


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
            write(f"table_{key.split('/')[1]}.pt", read([key])[key])
    dense = read(sorted(key for key in saved if key.startswith("dense/")))
    write("dense.pt", {key.removeprefix("dense/"): tensor for key, tensor in dense.items()})
    config = parse_config(manifest.config, path)
    (output / "config.yaml").write_text(dump_config(config))
    written["config.yaml"] = (output / "config.yaml").stat().st_size
    return written
