"""Files that are there whole or not at all, whatever ends the process."""

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Under a temporary name beside it first."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
