"""Open the files of a data set or an attack: regular files only, and no more unpacked than a file may unpack to."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO, Final

from onnx_clp.errors import UsageError
from onnx_clp.model import source

LARGEST: Final = 1 << 34
"""Bytes of images that are held in memory: the 50,000 validation images of ImageNet take half of it."""

UNPACKED: Final = 1 << 28
"""Bytes that any packed file may unpack to, however small it is: what a scan may hold too."""

UNPACKED_PER_BYTE: Final = 64
"""Bytes that a packed byte may unpack to: handwritten digits unpack to 5, drawings to 30; zeros would to 1,000."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read its bytes.

    Raises:
        OSError: There is none, or it cannot be read. A FIFO, a device or a socket is not waited for.
    """
    descriptor = source.open_regular(path)
    if descriptor is None:
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def size_of(file: BinaryIO) -> int:
    """Bytes of an open file."""
    return os.fstat(file.fileno()).st_size


def unpacked_limit(packed: int) -> int:
    """Bytes that a file of ``packed`` bytes may unpack to."""
    return min(LARGEST, UNPACKED + UNPACKED_PER_BYTE * packed)


def beside(document: Path, name: str) -> Path:
    """The file ``name`` in the folder of ``document``, which names it.

    Raises:
        UsageError: It is a link that leads out of the folder. That of a Hugging Face cache may lead to the files of the
            same repository.
    """
    path = document.parent / name
    try:
        folder, target = document.parent.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:  # links that lead in a circle
        raise UsageError(f"{path} leads nowhere", f"{document.name} names it") from error
    if not target.is_relative_to(folder) and not any(target.is_relative_to(blobs) for blobs in _blobs(document)):
        raise UsageError(f"{path} is a link that leads out of the folder", f"{document.name} names it: copy it there")
    return path


def _blobs(document: Path) -> list[Path]:
    """Where a Hugging Face cache keeps the files of models--name/snapshots/revision."""
    ancestors = document.absolute().parents
    found = (folder.parent for folder in ancestors if folder.name == "snapshots")
    return [(folder / "blobs").resolve() for folder in found if folder.name.startswith(("models--", "datasets--"))][:1]
