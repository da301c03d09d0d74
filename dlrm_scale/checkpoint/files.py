"""All file access of checkpoints: local paths, and whatever iopath handlers are registered. The one owner of a PathManager."""

import contextlib
import importlib
import io
import os
import shutil
import zlib
from collections.abc import Iterator
from typing import Any

from iopath.common.file_io import PathHandler, PathManager
from torch.distributed.checkpoint.filesystem import FileSystemBase

from dlrm_scale.checkpoint.manifest import FileSum
from dlrm_scale.errors import ConfigError

READ_BYTES = 8 << 20
SEND_BYTES = 16 << 20  # the disk begins with so many while the next are summed up; a third of a save's time, measured


def is_local(path: str) -> bool:
    return "://" not in path


class Files:
    """Paths without a scheme are local: what is written there is on disk (fsync) when a call returns, and a rename is atomic.

    A path with a scheme goes to the handler registered for it; how durable and atomic that is, is the handler's matter.

    Args:
        handlers: `module:Class` of iopath PathHandlers, made without arguments.

    Raises:
        ConfigError: a handler that cannot be imported, or is none.
    """

    def __init__(self, handlers: tuple[str, ...] = ()) -> None:
        self.manager = PathManager()
        for handler in handlers:
            self.manager.register_handler(_make_handler(handler))

    def exists(self, path: str) -> bool:
        return self.manager.exists(path)

    def names_in(self, folder: str) -> list[str]:
        """What a folder holds, sorted; nothing if there is no such folder."""
        return sorted(self.manager.ls(folder)) if self.manager.isdir(folder) else []

    def make_folder(self, folder: str) -> None:
        self.manager.mkdirs(folder)

    def open(self, path: str, mode: str) -> Any:
        return self.manager.open(path, mode)

    def read(self, path: str) -> bytes:
        with self.open(path, "rb") as f:
            return f.read()

    def write(self, path: str, data: bytes) -> FileSum:
        with CheckedStream(self, path) as stream:
            stream.write(data)
        return stream.sum

    def sum_of(self, path: str) -> FileSum:
        """Reads the whole file."""
        size, crc = 0, 0
        with self.open(path, "rb") as f:
            while block := f.read(READ_BYTES):
                size, crc = size + len(block), zlib.crc32(block, crc)
        return FileSum(size=size, crc32=crc)

    def size_of(self, path: str) -> int:
        with self.open(path, "rb") as f:
            return f.seek(0, io.SEEK_END)

    def rename(self, path: str, new_path: str) -> None:
        if is_local(path):
            os.rename(path, new_path)  # iopath's mv would copy what it cannot rename, and only log what goes wrong
        elif self.manager.mv(path, new_path) is False:
            raise OSError(f"the path handler could not rename {path} to {new_path}")

    def remove(self, path: str) -> None:
        self.manager.rm(path)

    def remove_folder(self, folder: str) -> None:
        """With all it holds. Handlers have no call for folders: their files go, an empty folder may stay."""
        if is_local(folder):
            shutil.rmtree(folder)
            return
        for name in self.names_in(folder):
            inner = f"{folder}/{name}"
            self.remove_folder(inner) if self.manager.isdir(inner) else self.remove(inner)

    def sync_folder(self, folder: str) -> None:
        """Makes new names in a local folder survive a power cut."""
        if not is_local(folder):
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class CheckedStream:
    """A new file that is summed up while it is written, and synced when closed.

    Attributes:
        error: the first OSError. torch.save may turn it into a RuntimeError that does not tell.
    """

    def __init__(self, files: Files, path: str) -> None:
        self.stream, self.sync = files.open(path, "wb"), is_local(path)
        self.size, self.crc, self.error, self.closed = 0, 0, None, False
        self.sent = 0

    @property
    def sum(self) -> FileSum:
        return FileSum(size=self.size, crc32=self.crc)

    def write(self, data: Any) -> int:
        try:
            self.stream.write(data)
        except OSError as e:
            self.error = self.error or e
            raise
        num_bytes = memoryview(data).nbytes
        self.size, self.crc = self.size + num_bytes, zlib.crc32(data, self.crc)
        if self.sync and self.size - self.sent >= SEND_BYTES:
            # The kernel starts to write what it is told will not be read, where it would wait for the sync.
            os.posix_fadvise(self.stream.fileno(), self.sent, self.size - self.sent, os.POSIX_FADV_DONTNEED)
            self.sent = self.size
        return num_bytes

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self.stream.flush()

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        try:
            with self.stream:
                if self.sync:
                    self.stream.flush()
                    os.fsync(self.stream.fileno())
        except OSError as e:
            self.error = self.error or e
            raise

    def __enter__(self) -> "CheckedStream":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif not self.closed:
            self.closed = True
            with contextlib.suppress(OSError):  # of a file that is given up
                self.stream.close()


class CheckedFileSystem(FileSystemBase):
    """`Files` as torch.distributed.checkpoint wants it.

    Attributes:
        written: size and checksum by name of every file written through it.
        error: the first OSError.
    """

    def __init__(self, files: Files) -> None:
        self.files = files
        self.written: dict[str, FileSum] = {}
        self.error: OSError | None = None

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        path = os.fspath(path)
        if mode == "rb":
            with self.files.open(path, mode) as stream:
                yield stream
            return
        stream = None
        try:
            with CheckedStream(self.files, path) as stream:
                yield stream
        except BaseException as e:
            told = stream.error if stream else None
            self.error = self.error or told or (e if isinstance(e, OSError) else None)
            raise
        self.written[path.rsplit("/", 1)[-1]] = stream.sum

    def concat_path(self, path: str | os.PathLike, suffix: str) -> str:
        return f"{os.fspath(path)}/{suffix}"

    def init_path(self, path: str | os.PathLike) -> str:
        return os.fspath(path)

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        path, new_path = os.fspath(path), os.fspath(new_path)
        self.files.rename(path, new_path)
        self.written[new_path.rsplit("/", 1)[-1]] = self.written.pop(path.rsplit("/", 1)[-1])

    def mkdir(self, path: str | os.PathLike) -> None:
        self.files.make_folder(os.fspath(path))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    def exists(self, path: str | os.PathLike) -> bool:
        return self.files.exists(os.fspath(path))

    def rm_file(self, path: str | os.PathLike) -> None:
        self.files.remove(os.fspath(path))


def _make_handler(name: str) -> PathHandler:
    module, _, cls = name.partition(":")
    try:
        handler = getattr(importlib.import_module(module), cls)()
    except (ImportError, AttributeError, TypeError) as e:
        raise ConfigError(f"checkpoint.path_handlers: cannot make {name}: {e}") from None
    if not isinstance(handler, PathHandler):
        raise ConfigError(f"checkpoint.path_handlers: {name} is no iopath PathHandler")
    return handler
