"""A file held open and read by position."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from onnx_clp.errors import ModelFileError

WINDOW: Final = 1 << 16
"""Bytes read at once while walking: large enough that nodes come whole, small beside a payload that is jumped over."""

COPY_BLOCK: Final = 1 << 20
"""Bytes copied, compared or hashed at once."""


class ByteSource:
    """A regular file held open, read by position.

    Reading by position rather than through a memory map means that a file cut short by somebody else
    while it is read gives an error and not a bus fault.
    """

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        """Open ``path``, or take the ``descriptor`` that it was opened as.

        Raises ModelFileError where it is missing, unreadable, or no regular file.
        """
        self._descriptor = _open(path) if descriptor is None else descriptor
        status = os.fstat(self._descriptor)
        self.path = path
        self.size = status.st_size
        self.identity = (status.st_dev, status.st_ino)
        self.mode = stat.S_IMODE(status.st_mode)
        self.group = status.st_gid
        self._state = _state(status)

    def read(self, start: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``start``; raises ModelFileError where the file is shorter."""
        pieces = []
        while length > 0:
            # One system call transfers at most about 2 GiB.
            piece = os.pread(self._descriptor, min(length, 1 << 30), start)
            if not piece:
                raise ModelFileError(f"{self.path} became shorter while it was read")
            pieces.append(piece)
            start += len(piece)
            length -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read_into(self, start: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes from ``start``; raises ModelFileError where the file is shorter."""
        while len(target):
            count = os.preadv(self._descriptor, [target[: 1 << 30]], start)
            if not count:
                raise ModelFileError(f"{self.path} became shorter while it was read")
            start += count
            target = target[count:]

    def window(self, start: int) -> bytes:
        """Up to WINDOW bytes from ``start``."""
        return os.pread(self._descriptor, WINDOW, start)

    def unchanged(self) -> bool:
        """Whether the open file has still the size and the times it was opened with.

        A program can set the time of modification back, but not that of the last change (ctime). The latter moves too
        where the file gets another name or other rights, or another file takes its place: that counts as changed, since
        nobody can tell it from a change that is being hidden.
        """
        return _state(os.fstat(self._descriptor)) == self._state

    def is_at(self, path: Path) -> bool:
        """Whether ``path`` leads to the very file that is open."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), path.stat())
        except OSError:
            return False

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _state(status: os.stat_result) -> tuple[int, int, int]:
    """What of a file's status moves when its content does."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _open(path: Path) -> int:
    try:
        descriptor = open_regular(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelFileError(f"cannot open {path}: {reason}") from error
    if descriptor is None:
        raise ModelFileError(f"{path} is not a regular file")
    return descriptor


def open_regular(path: Path) -> int | None:
    """A descriptor to read the regular file ``path``; None where it is another kind of file.

    A FIFO, a device or a socket is not waited for, and nothing is done to it. Raises OSError as ``os.open`` does, and
    ValueError for a path with NUL.
    """
    # Opening a device can do something, so that it is looked at before. What takes its place in between is opened with
    # O_NONBLOCK: a FIFO that nobody writes to must not hang.
    if not stat.S_ISREG(path.stat().st_mode):
        return None
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    return None


@contextmanager
def sha256_meanwhile(source: ByteSource) -> Iterator[Callable[[], str]]:
    """Compute the SHA-256 of ``source`` in a thread; the function waits for it and gives it in hexadecimal."""
    unwanted = threading.Event()

    def digest() -> str:
        state = hashlib.sha256()
        for start in range(0, source.size, COPY_BLOCK):
            if unwanted.is_set():
                break
            state.update(source.read(start, min(COPY_BLOCK, source.size - start)))
        return state.hexdigest()

    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(digest).result
        finally:
            unwanted.set()
