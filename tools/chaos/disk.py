"""A disk that gets full, or slow: an iopath handler for chaos://<local path>."""

import errno
import os
import shutil
import time
from typing import IO, Any

from iopath.common.file_io import PathHandler

PREFIX = "chaos://"
SLOW_SECONDS = 0.3  # of each file that is opened for writing on a slow disk


class Disk(PathHandler):
    """Local files. With `trouble` "disk_full", the nth file that this process writes (and no other) does not fit.

    A write that does not fit leaves half of its bytes behind, as a full disk does.
    """

    trouble: str = ""
    nth: int = 1
    written: int = 0

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **_: Any) -> str:
        return path.removeprefix(PREFIX)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **_: Any) -> IO[Any]:
        stream = open(self._get_local_path(path), mode, buffering)  # the caller closes it
        if "w" not in mode:
            return stream
        Disk.written += 1
        if Disk.trouble == "slow_disk":
            time.sleep(SLOW_SECONDS)
        if Disk.trouble == "disk_full" and Disk.written == Disk.nth:
            return _Full(stream)  # type: ignore[return-value]
        return stream

    def _exists(self, path: str, **_: Any) -> bool:
        return os.path.exists(self._get_local_path(path))

    def _isfile(self, path: str, **_: Any) -> bool:
        return os.path.isfile(self._get_local_path(path))

    def _isdir(self, path: str, **_: Any) -> bool:
        return os.path.isdir(self._get_local_path(path))

    def _ls(self, path: str, **_: Any) -> list[str]:
        return os.listdir(self._get_local_path(path))

    def _mkdirs(self, path: str, **_: Any) -> None:
        os.makedirs(self._get_local_path(path), exist_ok=True)

    def _rm(self, path: str, **_: Any) -> None:
        path = self._get_local_path(path)
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)

    def _mv(self, src_path: str, dst_path: str, **_: Any) -> bool:
        os.rename(self._get_local_path(src_path), self._get_local_path(dst_path))
        return True


class _Full:
    """A stream whose first write fails half-way."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.stream.write(view[: len(view) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __enter__(self) -> "_Full":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
