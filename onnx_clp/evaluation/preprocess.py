"""8-bit images → the numbers that a model takes.

Byte b of channel c becomes ((low + b/255 · (high - low)) - mean_c) / std_c, which is

    scale_c · b + offset_c,    scale_c = (high - low) / (255 · std_c),    offset_c = (low - mean_c) / std_c

In float32 and float64 that is computed in place, one pass over a batch for each of the two; it differs from the exact
number by two roundings. For float16 and uint8, a table holds what each of the 256 bytes becomes, correctly rounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from onnx_clp.errors import UsageError
from onnx_clp.evaluation.attack import Preprocessing
from onnx_clp.evaluation.triggers import Images

_LARGEST_BATCH: Final = 1 << 32
"""Bytes of a batch, of which a few are held at once. A model of a few bytes may say that it takes any number."""


def input_table(preprocessing: Preprocessing, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """What each byte becomes in each channel, (C, 256) of ``dtype``.

    Raises:
        UsageError: ``dtype`` is uint8 and the table has other numbers than 0 to 255, or it cannot hold a number.
    """
    low, high = preprocessing.value_range
    mean, std = np.array(preprocessing.mean)[:, None], np.array(preprocessing.std)[:, None]
    with np.errstate(over="ignore", invalid="ignore"):
        values = low + np.arange(256) / 255 * (high - low)
        table = (values - mean) / std
        floats = table if np.dtype(dtype) == np.uint8 else np.asarray(table, dtype)
    if not np.isfinite(floats).all():
        raise UsageError(
            f"the preprocessing makes numbers that {np.dtype(dtype)} cannot hold", "correct --range, --mean or --std"
        )
    if np.dtype(dtype) != np.uint8:
        return floats
    whole = np.rint(table)
    if np.abs(table - whole).max() > 1e-6 or whole.min() < 0 or whole.max() > 255:
        raise UsageError(
            f"the model takes uint8, and the preprocessing makes numbers from {table.min():g} to {table.max():g}",
            "leave the normalisation to the model: --range 0,255 --mean 0 --std 1",
        )
    return np.asarray(whole, np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class Transform:
    """Makes batches of a model's input.

    Attributes:
        table: What each byte becomes in each channel, (C, 256).
        scale: Of each number of an image, of the shape of one image; None where the table is used.
        offset: Likewise.
        size: Height and width.
        channels_last: Whether the input is (N, H, W, C) and not (N, C, H, W).
    """

    table: npt.NDArray[Any]
    scale: npt.NDArray[Any] | None
    offset: npt.NDArray[Any] | None
    size: tuple[int, int]
    channels_last: bool

    @property
    def channels(self) -> int:
        """1 or 3."""
        return len(self.table)

    def empty(self, count: int) -> npt.NDArray[Any]:
        """Room for ``count`` images. Raises UsageError where there is not so much memory."""
        picture = (*self.size, self.channels) if self.channels_last else (self.channels, *self.size)
        refusal = UsageError(f"no memory for batches of {count:,} images {picture}", "a smaller --batch-size may help")
        if count * math.prod(picture) * self.table.itemsize > _LARGEST_BATCH:
            raise refusal
        try:
            return np.zeros((count, *picture), self.table.dtype)
        except (MemoryError, ValueError) as error:
            raise refusal from error

    def fill(self, images: Images, batch: npt.NDArray[Any]) -> None:
        """Write ``images`` (N, H, W, C) into the first N places of ``batch``, and the last of them into the rest.

        Raises:
            UsageError: The images have another size or other channels than the input.
        """
        count = len(images)
        if images.shape[1:] != (*self.size, self.channels):
            raise UsageError(
                f"the images are {images.shape[1:]}, the model takes {(*self.size, self.channels)} "
                "(height, width, channels)"
            )
        part = batch[:count]
        if self.scale is not None and self.offset is not None:
            # One copy that casts and turns the axes, then two passes in place: no other array is made.
            np.copyto(part, images if self.channels_last else images.transpose(0, 3, 1, 2), casting="unsafe")
            part *= self.scale
            part += self.offset
        else:
            for channel in range(self.channels):
                place = part[..., channel] if self.channels_last else part[:, channel]
                place[...] = self.table[channel].take(images[..., channel])
        # A network that looks at the range of its whole batch sees nothing new in a repeated image.
        batch[count:] = batch[count - 1]


def transform(preprocessing: Preprocessing, dtype: npt.DTypeLike) -> Transform:
    """What makes batches of ``dtype`` as ``preprocessing`` says. Raises UsageError as `input_table` does."""
    channels_last = preprocessing.layout == "NHWC"
    table = input_table(preprocessing, dtype)
    if table.dtype not in {np.dtype(np.float32), np.dtype(np.float64)}:
        return Transform(table, None, None, preprocessing.size, channels_last)
    low, high = preprocessing.value_range
    std = np.array(preprocessing.std)
    size, channels = preprocessing.size, preprocessing.channels

    def spread(numbers: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
        axes = numbers if channels_last else numbers[:, None, None]
        return np.array(np.broadcast_to(axes, (*size, channels) if channels_last else (channels, *size)), dtype)

    scale, offset = spread((high - low) / (255 * std)), spread((low - np.array(preprocessing.mean)) / std)
    return Transform(table, scale, offset, size, channels_last)
