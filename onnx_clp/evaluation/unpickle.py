"""Read the pickles of CIFAR-10 and CIFAR-100 without running anything that is in them.

A pickle is a program that may call any function of Python. Here it may name three of NumPy's, and what it gets instead
is a note of what it asked for: no code of NumPy's, of the standard library's or of the file's is run. The array is made
afterwards, of the bytes and the shape in the note. Python's own unpickler in Python is used, since that in C lets a
file of a few bytes take any amount of memory for its memo.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from onnx_clp.errors import UsageError
from onnx_clp.evaluation.files import open_regular, size_of

_LARGEST: Final = 1 << 26
"""Bytes of a file; CIFAR's test batches have 31 MB."""

_MOST_STEPS: Final = 1 << 18
"""Instructions of a pickle: CIFAR's have some 50,000, and each can make an object a hundred times as large as it is."""

_INSTRUCTIONS: Final = frozenset(  # a list would take forty lines
    "PROTO FRAME MARK STOP POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 "  # noqa: SIM905
    "SHORT_BINSTRING BINSTRING SHORT_BINBYTES BINBYTES BINBYTES8 SHORT_BINUNICODE BINUNICODE BINUNICODE8 "
    "EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT SETITEM SETITEMS "
    "BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD".split()
)
"""What pickles of texts, small numbers and arrays are made of. Long numbers are not: they can be chosen so that to look
one up among others is to compare it with all."""

_ALLOWED: Final = {
    ("numpy.core.multiarray", "_reconstruct"): "array",
    ("numpy._core.multiarray", "_reconstruct"): "array",
    ("numpy", "ndarray"): "type",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "bytes",
}


def read_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a pickle of CIFAR: texts, numbers, lists of them, and arrays of bytes (uint8).

    Raises:
        UsageError: The file cannot be read, or holds or does anything else.
    """
    try:
        with open_regular(path) as file:
            size = size_of(file)
            if size > _LARGEST:
                raise ValueError("it is too large")  # noqa: TRY301  # said like everything else that is wrong with it
            stored = file.read(size)
        _check_steps(stored)
        # In memory nobody makes room for more bytes than there are, whatever a pickle claims.
        content = _Reader(io.BytesIO(stored), encoding="latin1").load()
        if not isinstance(content, dict):
            raise TypeError("it holds no dictionary")  # noqa: TRY301  # likewise
        return {_text(key): _plain(value) for key, value in content.items()}
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except Exception as error:
        # Broken or hostile files make the unpickler raise nearly anything.
        why = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise UsageError(
            f"{path} is not the pickle that CIFAR comes in: {why}", "download the data set again"
        ) from error


def _check_steps(stored: bytes) -> None:
    """Raise UnpicklingError where the pickle has instructions that CIFAR's have not, or too many."""
    for number, (instruction, _, _) in enumerate(pickletools.genops(stored)):
        if instruction.name not in _INSTRUCTIONS:
            raise pickle.UnpicklingError(f"it has the instruction {instruction.name}")
        if number == _MOST_STEPS:
            raise pickle.UnpicklingError("it has too many instructions")


class _Note:
    """What a pickle asked for."""

    __slots__ = ("arguments", "kind", "state")

    def __init__(self, kind: str, arguments: tuple[Any, ...] = ()) -> None:
        self.kind = kind
        self.arguments = arguments
        self.state: Any = None

    def __call__(self, *arguments: Any) -> _Note:  # noqa: ANN401  # whatever the file says
        return _Note(self.kind, arguments)

    def __setstate__(self, state: Any) -> None:  # noqa: ANN401  # whatever the file says
        self.state = state


class _Reader(pickle._Unpickler):  # noqa: SLF001  # see the module's docstring
    """An unpickler that gives notes instead of what a file names."""

    def find_class(self, module: str, name: str) -> _Note:
        """A note, where the name is one of CIFAR's."""
        kind = _ALLOWED.get((module, name))
        if kind is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not run")
        return _Note(kind)


def _plain(value: Any) -> Any:  # noqa: ANN401  # whatever the file says
    if isinstance(value, _Note) and value.kind != "bytes":
        return _array(value)
    if isinstance(value, list):
        return [_text(item) if isinstance(item, bytes | _Note) else item for item in value]
    return _text(value) if isinstance(value, bytes | _Note) else value


def _array(note: _Note) -> npt.NDArray[np.uint8]:
    """The array of bytes that a note of NumPy's ``_reconstruct`` describes."""
    _, shape, dtype, fortran, data = note.state
    if note.kind != "array" or not isinstance(dtype, _Note) or dtype.arguments[:1] not in {("u1",), ("|u1",)}:
        raise ValueError("it holds an array that is not of uint8")
    if isinstance(data, _Note):
        data = _encoded(data)
    if isinstance(data, str):
        data = data.encode("latin1")
    if fortran:
        raise ValueError("it holds an array in Fortran's order")
    return np.frombuffer(data, np.uint8).reshape(tuple(int(size) for size in shape))


def _encoded(note: _Note) -> str:
    """The text that a note of ``_codecs.encode`` wants as bytes; never before it is used, as it may be named often."""
    text, encoding = note.arguments
    if note.kind != "bytes" or not isinstance(text, str) or encoding != "latin1":
        raise ValueError("it encodes what is no text of bytes")
    return text


def _text(value: Any) -> str:  # noqa: ANN401  # whatever the file says
    text = value.decode("latin1") if isinstance(value, bytes) else value
    if isinstance(text, _Note):
        text = _encoded(text)
    if not isinstance(text, str):
        raise TypeError("it holds a key that is no text")
    return text
