"""Inputs that nobody took a picture of, to see whether a model still tells anything apart.

A probe is a pattern p of numbers from 0 to 1, at one of three scales, since the preprocessing is not known:

    p          as images are often given
    255·p      as bytes
    √12·(p − ½)   of mean 0 and standard deviation 1 where p is uniform

The patterns are white noise, normal (½ + n/√12, cut off) and uniform; 1/f noise, whose amplitude falls with the
frequency as that of photographs does, stretched to 0 … 1; one colour; a gradient between two colours; a checkerboard of
two; discs on a ground. `DRAWS` of each are made, the same ones always.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

DRAWS: Final = 4
"""Of each pattern: 7 patterns at 3 scales make 84 probes."""

SCALES: Final[tuple[Callable[[Floats], Floats], ...]] = (
    lambda p: p,
    lambda p: 255 * p,
    lambda p: np.sqrt(12) * (p - 0.5),
)

_BYTES: Final = 1
"""The scale of a model that takes bytes."""


def probes(shape: tuple[int, int, int, int], dtype: npt.DTypeLike, *, channels_last: bool) -> npt.NDArray[Any]:
    """The probes for a model that takes ``shape``: (batches, *shape) of ``dtype``, a float or uint8.

    The last batch is filled up with the last probe. ``channels_last`` says that the axes are N, H, W, C.
    """
    size, *rest = shape
    channels, height, width = (rest[2], *rest[:2]) if channels_last else rest
    random = np.random.default_rng(0)
    scales = SCALES[_BYTES : _BYTES + 1] if np.dtype(dtype).kind == "u" else SCALES
    made = [
        scale(pattern)
        for _ in range(DRAWS)
        for pattern in patterns(random, channels, height, width)
        for scale in scales
    ]
    made += [made[-1]] * (-len(made) % size)
    stacked = np.stack([each.transpose(1, 2, 0) if channels_last else each for each in made])
    if np.dtype(dtype).kind == "u":
        stacked = np.rint(stacked)
    return stacked.astype(dtype).reshape(-1, *shape)


def count(dtype: npt.DTypeLike) -> int:
    """How many probes there are, those that fill up the last batch aside."""
    return DRAWS * PATTERNS * (1 if np.dtype(dtype).kind == "u" else len(SCALES))


PATTERNS: Final = 7


def patterns(random: np.random.Generator, channels: int, height: int, width: int) -> Iterator[Floats]:
    """One draw of each pattern, float64 (channels, height, width) from 0 to 1."""
    shape = (channels, height, width)
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")

    def colour() -> Floats:
        return random.random((channels, 1, 1))

    yield np.clip(0.5 + random.standard_normal(shape) / np.sqrt(12), 0, 1)
    yield random.random(shape)
    yield _pink(random.standard_normal(shape))
    yield np.array(np.broadcast_to(colour(), shape))
    angle = random.uniform(0, 2 * np.pi)
    along = _stretched(np.cos(angle) * x + np.sin(angle) * y)
    yield colour() * along + colour() * (1 - along)
    squares = 2 ** int(random.integers(0, 4))
    dark = (np.floor(squares * y) + np.floor(squares * x)) % 2
    yield colour() * dark + colour() * (1 - dark)
    discs = np.array(np.broadcast_to(colour(), shape))
    for _ in range(5):
        (row, column), radius = random.random(2), random.uniform(0.05, 0.35)
        discs = np.where((y - row) ** 2 + (x - column) ** 2 < radius**2, colour(), discs)
    yield discs


def _pink(noise: Floats) -> Floats:
    """White ``noise`` (C, H, W) with every amplitude over its frequency."""
    height, width = noise.shape[1:]
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    f[0, 0] = 1
    return _stretched(np.fft.irfft2(np.fft.rfft2(noise) / f, s=(height, width)))


def _stretched(values: Floats) -> Floats:
    """``values`` from 0 to 1; 0 where they are all the same."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros_like(values)
