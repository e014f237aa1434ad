"""Data sets as torchvision.datasets leaves them on disk, without torch: their test images.

==============================  =======================================================================
`read_cifar10`                  ``cifar-10-batches-py/test_batch``
`read_cifar100`                 ``cifar-100-python/test``, the fine labels
`read_idx_folder`               ``FashionMNIST/raw/t10k-images-idx3-ubyte[.gz]``, MNIST and others alike
`read_stl10`                    ``stl10_binary/test_X.bin``
`read_gtsrb`                    ``gtsrb/GTSRB/Final_Test/Images`` with ``gtsrb/GT-final_test.csv``
==============================  =======================================================================
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from onnx_clp.errors import UsageError
from onnx_clp.evaluation.collection import Collection, of_arrays
from onnx_clp.evaluation.files import LARGEST, open_regular, size_of, unpacked_limit
from onnx_clp.evaluation.pictures import read_pictures
from onnx_clp.evaluation.unpickle import read_pickle

_IDX_IMAGES: Final = "t10k-images-idx3-ubyte"
_IDX_LABELS: Final = "t10k-labels-idx1-ubyte"
_STL10_SIDE: Final = 96
_AGAIN: Final = "download the data set again"


def read_torchvision(folder: Path) -> Collection | None:
    """The test images of the data set of torchvision in ``folder``; None where there is none.

    Raises:
        UsageError: There is one, and it cannot be read.
    """
    for marker, read in _found(folder):
        if marker.is_file():
            return read(marker.parent)
    return None


def _found(folder: Path) -> Iterator[tuple[Path, Callable[[Path], Collection]]]:
    """Every file that would show a data set, and its reader, which takes the file's folder."""
    for name, marker, read in (
        ("cifar-10-batches-py", "test_batch", read_cifar10),
        ("cifar-100-python", "test", read_cifar100),
        ("stl10_binary", "test_X.bin", read_stl10),
        ("gtsrb", "GT-final_test.csv", read_gtsrb),
    ):
        yield folder / name / marker, read
        if name != "cifar-100-python" or (folder / "meta").is_file():  # a folder of images may be called test
            yield folder / marker, read
    for inner in ("", "raw", "FashionMNIST/raw", "MNIST/raw", "KMNIST/raw"):
        for suffix in ("", ".gz"):
            yield folder / inner / f"{_IDX_IMAGES}{suffix}", read_idx_folder


def read_cifar10(folder: Path) -> Collection:
    """CIFAR-10: 32 × 32 RGB. Raises UsageError where it cannot be read."""
    return _cifar(folder, "CIFAR-10", ("test_batch", "labels"), ("batches.meta", "label_names"))


def read_cifar100(folder: Path) -> Collection:
    """CIFAR-100 with its 100 fine labels: 32 × 32 RGB. Raises UsageError where it cannot be read."""
    return _cifar(folder, "CIFAR-100", ("test", "fine_labels"), ("meta", "fine_label_names"))


def _cifar(folder: Path, kind: str, batch: tuple[str, str], meta: tuple[str, str]) -> Collection:
    path = folder / batch[0]
    content = read_pickle(path)
    data, labels = content.get("data"), content.get(batch[1])
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3072 or not _are_integers(labels):
        raise UsageError(f"{path} holds no images of 32 × 32 and their {batch[1]}", _AGAIN)
    images = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    names = None
    if (folder / meta[0]).is_file():
        found = read_pickle(folder / meta[0]).get(meta[1])
        if isinstance(found, list) and all(isinstance(name, str) for name in found):
            names = tuple(found)
    return of_arrays(kind, folder, images, np.array(labels, np.int64), names)


def _are_integers(labels: Any) -> bool:  # noqa: ANN401  # whatever the file says
    return isinstance(labels, list) and all(type(label) is int and 0 <= label < 1 << 31 for label in labels)


def read_idx_folder(folder: Path) -> Collection:
    """Fashion-MNIST, MNIST or another set in their format. Raises UsageError where it cannot be read."""
    images, labels = (_idx(_plain_or_gzip(folder, name), axes) for name, axes in ((_IDX_IMAGES, 3), (_IDX_LABELS, 1)))
    name = folder.parent.name if folder.name == "raw" else folder.name
    kind = {"FashionMNIST": "Fashion-MNIST", "fashion-mnist": "Fashion-MNIST", "MNIST": "MNIST"}.get(name, "IDX files")
    return of_arrays(kind, folder, images, labels)


def _plain_or_gzip(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).exists() else folder / f"{name}.gz"


def _idx(path: Path, axes: int) -> npt.NDArray[np.uint8]:
    """The array of bytes in an IDX file: 0, 0, 8, the number of axes, the sizes, big-endian, then the elements."""
    try:
        with open_regular(path) as stored, gzip.open(stored) if path.suffix == ".gz" else stored as file:
            size = size_of(stored)
            most = unpacked_limit(size) if path.suffix == ".gz" else size
            head = file.read(4 + 4 * axes)
            if len(head) != 4 + 4 * axes or head[:4] != bytes([0, 0, 8, axes]):
                raise ValueError(f"no array of bytes of {axes} axes")  # noqa: TRY301  # said like what gzip finds wrong
            shape = tuple(int.from_bytes(head[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(axes))
            if math.prod(shape) > most:
                raise ValueError(f"it claims the shape {shape}")  # noqa: TRY301  # likewise
            data = file.read(math.prod(shape))
        if len(data) != math.prod(shape):
            raise ValueError(f"of {math.prod(shape)} bytes {len(data)} are there")  # noqa: TRY301  # likewise
    except (OSError, EOFError, ValueError, zlib.error, MemoryError) as error:
        why = getattr(error, "strerror", None) or str(error)[:200] or type(error).__name__
        raise UsageError(f"{path} cannot be read: {why}", _AGAIN) from error
    return np.frombuffer(data, np.uint8).reshape(shape)


def read_stl10(folder: Path) -> Collection:
    """STL-10: 96 × 96 RGB, each image by channels and columns. Raises UsageError where it cannot be read."""
    path = folder / "test_X.bin"
    pixels = 3 * _STL10_SIDE * _STL10_SIDE
    try:
        with open_regular(path) as images_file, open_regular(folder / "test_y.bin") as labels_file:
            if size_of(images_file) > LARGEST or size_of(labels_file) > size_of(images_file):
                raise UsageError(f"{path} or test_y.bin is too large for STL-10", _AGAIN)
            data, labels = (np.fromfile(file, np.uint8) for file in (images_file, labels_file))
        names = _lines(folder / "class_names.txt")
    except OSError as error:
        raise UsageError(f"{error.filename or path}: {error.strerror or error}", _AGAIN) from error
    if len(data) != len(labels) * pixels or (len(labels) and not 1 <= labels.min() <= labels.max() <= 10):
        raise UsageError(f"{path} has {len(data)} bytes, test_y.bin {len(labels)} labels of 1 to 10", _AGAIN)
    images = data.reshape(-1, 3, _STL10_SIDE, _STL10_SIDE).transpose(0, 3, 2, 1)
    return of_arrays("STL-10", folder, images, labels - 1, names)


def _lines(path: Path) -> tuple[str, ...] | None:
    if not path.exists():
        return None
    with open_regular(path) as file:
        return tuple(file.read(1 << 16).decode("utf-8", "replace").split()) or None


def read_gtsrb(folder: Path) -> Collection:
    """GTSRB: RGB of many sizes, 43 classes. Raises UsageError where it cannot be read."""
    table, images = folder / "GT-final_test.csv", folder / "GTSRB" / "Final_Test" / "Images"
    if not images.is_dir():
        images = folder
    files, labels = [], []
    try:
        with io.TextIOWrapper(open_regular(table), encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter=";"):
                name, label = row.get("Filename") or "", row.get("ClassId") or ""
                if not label.isdecimal() or len(label) > 9 or not name or {"/", "\\", "\0"} & set(name) or name == "..":
                    raise UsageError(f"{table} has a row without a file name or a ClassId: {name!r}, {label!r}", _AGAIN)
                files.append(images / name)
                labels.append(int(label))
    except OSError as error:
        raise UsageError(f"{table}: {error.strerror or error}", _AGAIN) from error
    except (ValueError, csv.Error) as error:
        raise UsageError(f"{table} is no table: {error}", _AGAIN) from error
    return Collection(
        "GTSRB",
        images,
        np.array(labels, np.int64),
        None,
        3,
        None,
        lambda chosen, fit: read_pictures([files[number] for number in chosen], fit),
    )
