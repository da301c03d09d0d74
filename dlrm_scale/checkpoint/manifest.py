"""manifest.json: what a checkpoint is of, and the size and checksum of each of its files."""

import hashlib
import json
from typing import Any

from pydantic import Field, ValidationError

from dlrm_scale.errors import CheckpointError
from dlrm_scale.strict import Strict

FORMAT = 1
NAME = "manifest.json"


class FileSum(Strict):
    size: int = Field(ge=0, description="bytes")
    crc32: int = Field(ge=0, lt=2**32)


class Manifest(Strict):
    format: int
    step: int = Field(gt=0, description="optimizer steps done")
    samples_consumed: int = Field(ge=0, description="the data position")
    data_fingerprint: str
    world_size: int = Field(gt=0)
    config_fingerprint: str
    config: dict[str, Any] = Field(description="resolved")
    plan: dict[str, Any]
    versions: dict[str, str]
    time: str = Field(description="UTC, ISO 8601")
    column_blocks: dict[str, list[int]] = Field(
        description="by table: the first column of each block that a row-wise optimizer state has one value of"
    )
    progress: dict[str, Any] = Field(description="the trainer's own: losses so far, metrics, counters")
    files: dict[str, FileSum] = Field(description="every other file of the checkpoint, by name")

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files.values())


def dump(manifest: Manifest) -> bytes:
    """JSON whose first key is the digest of the rest, so that a manifest vouches for itself too."""
    body = manifest.model_dump(mode="python")  # JSON mode would lose NaN, which a metric may be
    return json.dumps({"sha256": _digest(body), "manifest": body}, indent=1).encode()


def parse(data: bytes, path: str) -> Manifest:
    """Raises CheckpointError: it is cut short, altered, or of another version."""
    try:
        tree = json.loads(data)
        body, digest = tree["manifest"], tree["sha256"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is not a whole manifest") from None
    if _digest(body) != digest:
        raise CheckpointError(f"{path} was altered: its content does not have its checksum")
    if body.get("format") != FORMAT:
        raise CheckpointError(f"{path} is of format {body.get('format')}, but this version reads format {FORMAT}")
    try:
        return Manifest.model_validate_json(json.dumps(body))
    except ValidationError as e:
        raise CheckpointError(f"{path}: {e.errors(include_url=False)[0]['msg']}") from None


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
