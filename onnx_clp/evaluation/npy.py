"""One array in a file as NumPy saves it. Pickled objects are refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_clp.errors import UsageError
from onnx_clp.evaluation.files import open_regular


def load_array(path: Path) -> npt.NDArray[Any]:
    """The array in a .npy, mapped and not read. Raises UsageError where it cannot be read, or is something else."""
    try:
        _check_start(path)
        with unwarned():
            array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except UsageError:
        raise
    except Exception as error:
        # The head of a broken file makes NumPy and Python's own parser raise nearly anything.
        raise unreadable(path, error) from error
    return array


def _check_start(path: Path) -> None:
    """Raise UsageError where the file does not begin like an array: NumPy would take it for a pickle."""
    with open_regular(path) as file:
        if file.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
            raise UsageError(f"{path} is not an array as NumPy saves it", "save it with numpy.save")


@contextmanager
def unwarned() -> Iterator[None]:
    """NumPy warns of shapes that overflow, and Python of odd texts in a head: such files are refused anyway."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def unreadable(path: Path, error: BaseException) -> UsageError:
    """What to say of a file of arrays that cannot be read."""
    if isinstance(error, OSError) and error.strerror:
        return UsageError(f"{path}: {error.strerror}")
    if "allow_pickle" in str(error) or "object" in str(error):
        return UsageError(f"{path} holds Python objects, which are not loaded", "save arrays of plain numbers")
    why = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
    return UsageError(f"{path} is not an array as NumPy saves it: {why}", "save it with numpy.save or numpy.savez")
