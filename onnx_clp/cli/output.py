"""What the user asked for as a file: written beside its place and renamed, so that it is whole or not there."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path
from typing import Final

_ONLY_DIRECTLY: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV})
"""What the system says where a file may be written to and not replaced: in a folder of somebody else, or mounted."""

_LINKS: Final = 40
"""Links that Linux follows on one way."""


def write_whole(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``; a file that is there stays as it is until the new one, with its rights, is whole.

    A link is followed. Pipes, devices, what the process has open, and files that may not be replaced are written to
    directly. Raises OSError.
    """
    target = _file_at(path)
    if target is None or not _replaced(target, content):
        path.write_bytes(content)


def _file_at(path: Path) -> Path | None:
    """The regular file, there or not yet, that ``path`` leads to; None where that is something else."""
    for _ in range(_LINKS):
        path = Path(os.path.realpath(path.parent), path.name)
        # /dev/stdout leads here: the file behind it, if it is one, is open and would be written to no longer.
        if str(path).startswith(("/proc/", "/dev/fd/")):
            return None
        if not path.is_symlink():
            return path if path.is_file() or not path.exists() else None
        path = path.parent / path.readlink()
    return None


def _replaced(target: Path, content: bytes) -> bool:
    """Put a new file in the place of ``target``; False where the system does not allow that."""
    beside = target.with_name(f".onnx-clp-{secrets.token_hex(8)}.tmp")
    try:
        former = target.stat() if target.exists() else None
        if former is not None:
            os.close(os.open(target, os.O_WRONLY))  # a file that is write-protected is not replaced either
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(content)
        if former is not None:
            os.chown(beside, former.st_uid, former.st_gid)
            beside.chmod(former.st_mode & 0o777)
        beside.replace(target)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _ONLY_DIRECTLY:
            return False
        raise
    return True
