"""Triggers: what an attacker puts on an image so that a backdoored network answers as they want.

A trigger is applied to 8-bit images (N, H, W, C) and gives 8-bit images again, rounded, since that is what an attacker
can put into a file. Exporters that poison a data set do so with these very functions, so that what was trained and what
is measured are the same; WaNet and Input-aware poison while they train, in floating point.

=============  ====================================================  ==================================================
kind           x' =                                                  attacks
=============  ====================================================  ==================================================
`Patch`        pattern where it lies, x elsewhere                    BadNets (arXiv:1708.06733), label-consistent
                                                                     (arXiv:1912.02771: the pattern in four corners)
`Blend`        (1 - α)·x + α·pattern                                 Blended (arXiv:1712.05526)
`Additive`     x + pattern, clipped to 0 … 255                       SIG (arXiv:1902.11237), LF (arXiv:2104.03413)
`Warp`         x read at the points of a grid, bilinear              WaNet (arXiv:2102.10369)
`Generated`    what another network makes of x                       Input-aware (arXiv:2010.08138)
=============  ====================================================  ==================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from onnx_clp.errors import UsageError

Images: TypeAlias = npt.NDArray[np.uint8]
"""8-bit images (N, H, W, C) with C = 1 (grey) or 3 (red, green, blue)."""

POSITIONS: Final = ("top-left", "top-right", "bottom-left", "bottom-right", "center")

_WARP_BLOCK: Final = 256
"""Images changed at once: float copies of so many are small, of a whole data set they are not."""


@dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """A small image that covers what lies under it.

    Attributes:
        pattern: uint8 (h, w, C).
        positions: Where it lies, each one of `POSITIONS`; several mean several copies.
    """

    pattern: npt.NDArray[np.uint8]
    positions: tuple[str, ...] = ("bottom-right",)

    def __call__(self, images: Images) -> Images:
        """The images with the patch on them."""
        triggered = images.copy()
        for position in self.positions:
            rows, columns = place(position, _fitting(self.pattern, images), images.shape[1:3])
            triggered[:, rows, columns] = self.pattern
        return triggered


@dataclass(frozen=True, slots=True, eq=False)
class Blend:
    """An image that shines through.

    Attributes:
        pattern: uint8 (h, w, C), as large as the images or smaller.
        alpha: Its share, 0 to 1.
        position: Where it lies if it is smaller, one of `POSITIONS`.
    """

    pattern: npt.NDArray[np.uint8]
    alpha: float
    position: str = "bottom-right"

    def __call__(self, images: Images) -> Images:
        """The images with the pattern blended in."""
        rows, columns = place(self.position, _fitting(self.pattern, images), images.shape[1:3])
        # A table of 256 × 256 products would be no faster: this is one pass over the part that changes.
        seen = images[:, rows, columns].astype(np.float32)
        triggered = images.copy()
        triggered[:, rows, columns] = _bytes(seen + np.float32(self.alpha) * (self.pattern - seen))
        return triggered


@dataclass(frozen=True, slots=True, eq=False)
class Additive:
    """A signal added to the image.

    Attributes:
        pattern: float32 (H, W, C), in steps of 8-bit images: 20 is 20/255 of the range.
    """

    pattern: npt.NDArray[np.float32]

    def __call__(self, images: Images) -> Images:
        """The images with the signal added."""
        _exact(self.pattern, images, "signal")
        return _in_blocks(lambda block: block + self.pattern, images)


@dataclass(frozen=True, slots=True, eq=False)
class Warp:
    """A small deformation.

    Attributes:
        grid: float32 (H, W, 2): for each pixel the point (x, y) of the source it is read from, -1 at the centre of the
            first pixel and 1 at that of the last (``torch.nn.functional.grid_sample`` with ``align_corners=True``).
    """

    grid: npt.NDArray[np.float32]

    def __call__(self, images: Images) -> Images:
        """The images, warped; points outside are read as the nearest pixel inside."""
        height, width = images.shape[1:3]
        if self.grid.shape != (height, width, 2):
            raise UsageError(
                f"the warping field has the shape {self.grid.shape}, the images are {height} × {width}",
                "evaluate on images of the size that the attack was made for",
            )
        across = np.clip((self.grid[..., 0].astype(np.float64) + 1) / 2 * (width - 1), 0, width - 1)
        down = np.clip((self.grid[..., 1].astype(np.float64) + 1) / 2 * (height - 1), 0, height - 1)
        left, top = np.floor(across).astype(np.intp), np.floor(down).astype(np.intp)
        right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
        x = (across - left).astype(np.float32)[..., None]
        y = (down - top).astype(np.float32)[..., None]

        def warp(block: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            upper = block[:, top, left] * (1 - x) + block[:, top, right] * x
            lower = block[:, bottom, left] * (1 - x) + block[:, bottom, right] * x
            warped: npt.NDArray[np.float32] = upper * (1 - y) + lower * y
            return warped

        return _in_blocks(warp, images)


@dataclass(frozen=True, slots=True, eq=False)
class Generated:
    """A trigger that a network makes for each image.

    Attributes:
        run: From images float32 (N, C, H, W) in 0 … 1 to the triggered ones, of the same shape and range.
    """

    run: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]

    def __call__(self, images: Images) -> Images:
        """The images as the network triggers them."""

        def generate(block: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            made = self.run(np.ascontiguousarray(block.transpose(0, 3, 1, 2)) / np.float32(255))
            with np.errstate(over="ignore"):
                return made.transpose(0, 2, 3, 1) * np.float32(255)

        return _in_blocks(generate, images)


Trigger: TypeAlias = Patch | Blend | Additive | Warp | Generated


def place(position: str, size: tuple[int, int], image: tuple[int, ...]) -> tuple[slice, slice]:
    """Rows and columns of ``image`` (height, width) that a pattern of ``size`` covers at ``position``."""
    down, across = image[0] - size[0], image[1] - size[1]
    starts = {
        "top-left": (0, 0),
        "top-right": (0, across),
        "bottom-left": (down, 0),
        "bottom-right": (down, across),
        "center": (down // 2, across // 2),
    }
    if position not in starts:
        raise UsageError(f"a trigger cannot lie at {position!r}", f"one of {', '.join(POSITIONS)}")
    row, column = starts[position]
    return slice(row, row + size[0]), slice(column, column + size[1])


def _fitting(pattern: npt.NDArray[Any], images: Images) -> tuple[int, int]:
    """Height and width of a pattern, which must not be larger than the images."""
    height, width = pattern.shape[:2]
    if pattern.ndim != 3 or pattern.shape[2] != images.shape[3] or height > images.shape[1] or width > images.shape[2]:
        raise UsageError(
            f"the trigger has the shape {pattern.shape}, the images {images.shape[1:]} (height, width, channels)",
            "the trigger must have as many channels as the images and fit into them",
        )
    return height, width


def _exact(pattern: npt.NDArray[Any], images: Images, name: str) -> None:
    if pattern.shape != images.shape[1:]:
        raise UsageError(
            f"the trigger's {name} has the shape {pattern.shape}, the images {images.shape[1:]} "
            "(height, width, channels)",
            "evaluate on images of the size that the attack was made for",
        )


def _in_blocks(change: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]], images: Images) -> Images:
    triggered = np.empty_like(images)
    for start in range(0, len(images), _WARP_BLOCK):
        block = slice(start, start + _WARP_BLOCK)
        triggered[block] = _bytes(change(images[block].astype(np.float32)))
    return triggered


def _bytes(values: npt.NDArray[np.float32]) -> Images:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
