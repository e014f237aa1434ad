"""A labelled set of images on disk, before any image is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from onnx_clp.errors import UsageError
from onnx_clp.evaluation.pictures import Fit, fitted
from onnx_clp.evaluation.triggers import Images

MOST_CLASSES: Final = 1 << 20

Load = Callable[[npt.NDArray[np.intp], Fit], Images]
"""From the indices of images to these images (N, H, W, C), fitted."""


@dataclass(frozen=True, slots=True, eq=False)
class Collection:
    """A labelled set of images.

    Attributes:
        kind: What it is, such as ``image folder``.
        used: The folder or file.
        labels: int64 (N,), numbers of the set's own.
        names: Of the classes, by label; None where the set does not say.
        channels: 1 or 3 where all images are alike; None where each may differ.
        size: Height and width, likewise.
        load: Reads images.
    """

    kind: str
    used: Path
    labels: npt.NDArray[np.int64]
    names: tuple[str, ...] | None
    channels: int | None
    size: tuple[int, int] | None
    load: Load


def of_arrays(
    kind: str,
    used: Path,
    images: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    names: tuple[str, ...] | None = None,
) -> Collection:
    """The collection of two arrays: uint8 (N, H, W, C) or (N, H, W), and integers (N,).

    Raises:
        UsageError: They are something else.
    """
    if images.dtype != np.uint8 or images.ndim not in {3, 4} or (images.ndim == 4 and images.shape[3] not in {1, 3}):
        raise UsageError(
            f"{used}: the images are {images.dtype} {images.shape}",
            "uint8 (N, height, width, 1 or 3) or (N, height, width) is wanted, 0 to 255",
        )
    if labels.dtype.kind not in "iu" or labels.shape not in {(len(images),), (len(images), 1)}:
        raise UsageError(
            f"{used}: the labels are {labels.dtype} {labels.shape}, the images {images.shape}",
            "an integer for each image is wanted",
        )
    if 0 in images.shape[1:3]:
        raise UsageError(f"{used}: the images are {images.shape}, without a pixel")
    pixels = images if images.ndim == 4 else images[..., None]
    numbers = labels.reshape(-1).astype(np.int64)
    if len(numbers) and numbers.min() < 0:
        raise UsageError(f"{used}: the label {numbers.min()} is negative", "classes are numbered from 0")
    if len(numbers) and numbers.max() >= MOST_CLASSES:
        raise UsageError(
            f"{used}: a label is {numbers.max()}", f"classes are numbered from 0, {MOST_CLASSES:,} at most"
        )
    height, width, channels = pixels.shape[1:]
    return Collection(
        kind,
        used,
        numbers,
        names,
        channels,
        (height, width),
        lambda chosen, fit: fitted(pixels[chosen], fit),
    )
