"""An iopath handler for paths full://..., on a local folder that takes only so many bytes."""

import errno
import os
import shutil
from typing import Any

from iopath.common.file_io import PathHandler

PREFIX = "full://"
ROOT, LEFT = "FULL_DISK_ROOT", "FULL_DISK_BYTES_LEFT"  # environment variables: handlers are made without arguments


class FullDisk(PathHandler):
    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _local(self, path: str) -> str:
        return os.path.join(os.environ[ROOT], path.removeprefix(PREFIX))

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **_: Any) -> Any:
        stream = open(self._local(path), mode, buffering)
        return _Limited(stream) if "w" in mode else stream

    def _exists(self, path: str, **_: Any) -> bool:
        return os.path.exists(self._local(path))

    def _isdir(self, path: str, **_: Any) -> bool:
        return os.path.isdir(self._local(path))

    def _isfile(self, path: str, **_: Any) -> bool:
        return os.path.isfile(self._local(path))

    def _ls(self, path: str, **_: Any) -> list[str]:
        return os.listdir(self._local(path))

    def _mkdirs(self, path: str, **_: Any) -> None:
        os.makedirs(self._local(path), exist_ok=True)

    def _rm(self, path: str, **_: Any) -> None:
        os.remove(self._local(path))

    def _mv(self, src_path: str, dst_path: str, **_: Any) -> bool:
        shutil.move(self._local(src_path), self._local(dst_path))
        return True


class _Limited:
    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, data: Any) -> int:
        left = int(os.environ[LEFT]) - memoryview(data).nbytes
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.environ[LEFT] = str(left)
        return self.stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __enter__(self) -> "_Limited":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
