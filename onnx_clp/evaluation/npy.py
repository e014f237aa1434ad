"""One array in a file as NumPy saves it. Pickled objects are refused."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from onnx_clp.errors import UsageError
from onnx_clp.evaluation.files import open_regular

BROKEN: Final = (ValueError, EOFError, SyntaxError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError)
"""What NumPy and zipfile raise of a file that is none of theirs."""


def load_array(path: Path) -> npt.NDArray[Any]:
    """The array in a .npy, mapped and not read. Raises UsageError where it cannot be read, or is something else."""
    try:
        with open_regular(path) as file:
            if file.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
                raise UsageError(f"{path} is not an array as NumPy saves it", "save it with numpy.save")
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, MemoryError, OverflowError, *BROKEN) as error:
        raise unreadable(path, error) from error
    return array


def unreadable(path: Path, error: BaseException) -> UsageError:
    """What to say of a file of arrays that cannot be read."""
    if isinstance(error, OSError) and error.strerror:
        return UsageError(f"{path}: {error.strerror}")
    if "allow_pickle" in str(error) or "object" in str(error):
        return UsageError(f"{path} holds Python objects, which are not loaded", "save arrays of plain numbers")
    why = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
    return UsageError(f"{path} is not an array as NumPy saves it: {why}", "save it with numpy.save or numpy.savez")
