"""Files and lines that are there whole or not at all, whatever ends the process, and a lock on a folder."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bbb_ao.errors import ResourceError


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file under a temporary name, fsync it, and rename it to `path`.

    Raises:
        ResourceError: it cannot be written; nothing of it is left.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        fsync(partial)
        partial.replace(path)
        fsync(path.parent)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise ResourceError(
            f"{path}: file: expected to write it, got: {error}; fix: free space or permissions"
        ) from None


def append_line(path: Path, line: str) -> None:
    """Append a line of JSON, as a whole or not at all; what a kill left of the line before it is removed.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    content = f"{line}\n".encode()
    with path.open("a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        if end and file.read(1) != b"\n":
            end = path.read_bytes().rfind(b"\n") + 1
            file.truncate(end)
        if file.write(content) < len(content):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Lock:
    """A file that one living process holds; the operating system releases it when the process ends, however it does.

    Args:
        path: the lock's file, which holds the process's number for people.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def take(self) -> None:
        """Take the lock; one left by a process that is gone is taken over.

        Raises:
            ResourceError: another process holds it.
        """
        # Of Unix alone; the rest of this module is needed elsewhere, too.
        import fcntl

        while self._descriptor is None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(descriptor, 20).decode(errors="replace").strip() or "unknown"
                os.close(descriptor)
                raise ResourceError(
                    f"{self.path}: lock: expected no other process at work here, got process {owner}; "
                    "fix: wait for it, or choose another output"
                ) from None
            # The one before us may have removed the file between our two calls.
            if self.path.exists() and os.path.samestat(os.fstat(descriptor), self.path.stat()):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
                self._descriptor = descriptor
            else:
                os.close(descriptor)

    def release(self) -> None:
        """Let go of the lock; its file stays."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
