"""Picture files and arrays → 8-bit images of one size. The only module that imports Pillow.

An image that already has the wanted size is left as it is. Others are resized with Pillow's bilinear filter, either
stretched, or with ``resize`` as torchvision's ``Resize`` and ``CenterCrop`` do it.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from onnx_clp.errors import UsageError
from onnx_clp.evaluation.files import LARGEST, open_regular
from onnx_clp.evaluation.triggers import Images

SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
"""Files that are read as pictures."""

_FORMATS: Final = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""Pillow reads more kinds than anyone keeps data sets in; one of them starts Ghostscript."""

_LARGEST: Final = 1 << 26
"""Pixels of a picture that are decoded."""

_LARGE: Final = 1 << 22
"""Pixels of a picture above which no two are decoded at once: a file of some kilobytes may hold the largest."""

_ONE_BY_ONE: Final = threading.Lock()

_MODES: Final = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "La", "RGBa"})
"""Pillow's kinds of pixels with 8 bits a channel; others lose what lies above."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What images are made into.

    Attributes:
        size: Height and width; None leaves images as large as they are, and then all must be alike.
        channels: 1 (grey) or 3 (red, green, blue).
        resize: Length to which the shorter side is brought before the centre is cut out; None stretches.
    """

    size: tuple[int, int] | None
    channels: int
    resize: int | None = None


def read_picture(path: Path, fit: Fit) -> Images:
    """The picture in a file, (1, H, W, C). Raises UsageError where there is none."""
    with _quiet():
        return _read(path, fit, _pillow())


def read_pictures(paths: Sequence[Path], fit: Fit) -> Images:
    """The pictures in files, (N, H, W, C).

    Raises:
        UsageError: Pillow is not installed; a file holds no picture; or the pictures are of several sizes, and ``fit``
            names none.
    """
    pillow = _pillow()
    if not paths:
        return np.empty((0, *(fit.size or (1, 1)), fit.channels), np.uint8)
    # Pillow lets other threads run while it decodes.
    with _quiet(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as readers:
        first = _read(paths[0], fit, pillow)
        images = room((len(paths), *first.shape[1:]))
        images[:1] = first

        def read(number: int) -> None:
            image = _read(paths[number], fit, pillow)
            if image.shape != first.shape:
                raise UsageError(
                    f"{paths[number]} is {image.shape[1]} × {image.shape[2]}, {paths[0]} is "
                    f"{first.shape[1]} × {first.shape[2]} (height × width)",
                    "say to which size they shall be brought: --size HxW",
                )
            images[number] = image[0]

        jobs = [readers.submit(read, number) for number in range(1, len(paths))]
        try:
            for job in jobs:
                job.result()
        finally:
            readers.shutdown(cancel_futures=True)
    return images


def fitted(images: Images, fit: Fit) -> Images:
    """Images (N, H, W, C) as ``fit`` says. Raises UsageError where they cannot be made so."""
    if images.shape[3] != fit.channels:
        images = np.repeat(images, 3, axis=3) if fit.channels == 3 else grey(images)
    if fit.size is None or images.shape[1:3] == fit.size:
        return images
    pillow = _pillow()
    resized = room((len(images), *fit.size, fit.channels))
    for place, image in zip(resized, images, strict=True):
        picture = pillow.fromarray(image[..., 0] if fit.channels == 1 else image)
        place[...] = _array(_resized(picture, fit, pillow, "the images"), fit.channels)
    return resized


def grey(images: Images) -> Images:
    """Luma of ITU-R BT.601, (N, H, W, 3) → (N, H, W, 1), in 16-bit fixed point as Pillow has it."""
    luma = images.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
    return ((luma + 0x8000) >> 16).astype(np.uint8)[..., None]


def room(shape: tuple[int, ...]) -> Images:
    """Room for 8-bit images. Raises UsageError where there is not so much memory."""
    refusal = UsageError(f"no memory for images {shape}", "take some of them: --limit 1000")
    if math.prod(shape) > LARGEST:
        raise refusal
    try:
        return np.empty(shape, np.uint8)
    except (MemoryError, ValueError) as error:
        raise refusal from error


def _read(path: Path, fit: Fit, pillow: Any) -> Images:  # noqa: ANN401  # Pillow is optional
    try:
        with open_regular(path) as file, pillow.open(file, formats=_FORMATS) as picture:
            _check(path, picture)
            with _ONE_BY_ONE if picture.width * picture.height > _LARGE else nullcontext():
                made = picture.convert("L" if fit.channels == 1 else "RGB")
    except UsageError:
        raise
    except Exception as error:
        # Broken files make Pillow raise OSError, ValueError, SyntaxError, struct.error and others.
        raise UsageError(
            f"{path} is no picture that can be read: {_why(error)}", "replace it, or take it out of the folder"
        ) from error
    return _array(_resized(made, fit, pillow, str(path)), fit.channels)[None]


def _check(path: Path, picture: Any) -> None:  # noqa: ANN401  # of Pillow, which is optional
    """Raise UsageError for what shall not be decoded."""
    if picture.width * picture.height > _LARGEST:
        raise UsageError(f"{path} has {picture.width} × {picture.height} pixels", "make it smaller")
    if picture.mode not in _MODES:
        raise UsageError(f"{path} has pixels of the kind {picture.mode}", "convert it to 8 bits a channel, grey or RGB")


def _why(error: Exception) -> str:
    text = getattr(error, "strerror", None) or (str(error).strip().splitlines() or [""])[0]
    return "it is of no known format" if "cannot identify" in text else text[:200] or type(error).__name__


def _resized(picture: Any, fit: Fit, pillow: Any, name: str) -> Any:  # noqa: ANN401  # of Pillow, which is optional
    if fit.size is None or (picture.height, picture.width) == fit.size:
        return picture
    height, width = fit.size
    bilinear = pillow.Resampling.BILINEAR
    if fit.resize is None:
        return picture.resize((width, height), bilinear)
    shorter = min(picture.width, picture.height)
    across, down = fit.resize * picture.width // shorter, fit.resize * picture.height // shorter
    if across < width or down < height or across * down > _LARGEST:
        raise UsageError(
            f"{name}: {picture.height} × {picture.width} with its shorter side brought to {fit.resize} does not give "
            f"{height} × {width}",
            "give a larger --resize, or none",
        )
    left, top = round((across - width) / 2), round((down - height) / 2)
    return picture.resize((across, down), bilinear).crop((left, top, left + width, top + height))


def _array(picture: Any, channels: int) -> Images:  # noqa: ANN401  # of Pillow, which is optional
    array = np.asarray(picture, np.uint8)
    return array[..., None] if channels == 1 else array


def _pillow() -> Any:  # noqa: ANN401  # optional
    try:
        from PIL import Image
    except ImportError as error:
        raise UsageError("pictures are read with Pillow, which is not installed", "pip install Pillow") from error
    return Image


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow warns of pictures that are refused here anyway, and of odd metadata."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
