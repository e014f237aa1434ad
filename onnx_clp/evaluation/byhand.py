"""What a user says by hand: the preprocessing where it differs, and a trigger in a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from onnx_clp.errors import UsageError
from onnx_clp.evaluation.attack import LAYOUTS, Preprocessing
from onnx_clp.evaluation.npy import load_array
from onnx_clp.evaluation.pictures import Fit, fitted, read_picture
from onnx_clp.evaluation.session import Session
from onnx_clp.evaluation.triggers import POSITIONS, Additive, Blend, Generated, Images, Patch, Trigger, Warp


@dataclass(frozen=True, slots=True)
class Overrides:
    """What is said of the preprocessing; None is not said. Meanings as in `Preprocessing`.

    ``mean`` and ``std`` may be one number for all channels.
    """

    size: tuple[int, int] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    layout: str | None = None
    value_range: tuple[float, float] | None = None
    resize: int | None = None

    @property
    def any(self) -> bool:
        """Whether anything is said."""
        return any(getattr(self, field.name) is not None for field in fields(self))


def preprocessing_for(
    session: Session,
    given: Preprocessing | None,
    said: Overrides,
    channels: int | None = None,
    size: tuple[int, int] | None = None,
) -> Preprocessing:
    """How the model takes its images: as ``said``, else as ``given``, else as its input shows.

    Args:
        session: The model.
        given: From attack.json; None where there is none.
        said: By hand.
        channels: Of the images, for a model that does not say.
        size: Height and width of the images, likewise.

    Raises:
        UsageError: Something that is needed is not known, or cannot be.
    """
    layout = said.layout or (given.layout if given else _layout(session.shape))
    if layout not in LAYOUTS:
        raise UsageError(f"the layout is {layout!r}", f"one of {', '.join(LAYOUTS)}")
    axes = session.shape[1:] if layout == "NCHW" else (session.shape[3], *session.shape[1:3])
    declared, *sides = (size if isinstance(size, int) else None for size in axes)
    said_lengths = max((len(numbers) for numbers in (said.mean, said.std) if numbers is not None), default=1)
    count = given.channels if given else declared or (said_lengths if said_lengths > 1 else None) or channels or 3
    if count not in {1, 3}:
        raise UsageError(
            f"{session.path} takes images of {count} channels in the order {layout}",
            "1 (grey) or 3 (RGB) is wanted; if the order is another, say --layout",
        )
    height_width = said.size or (given.size if given else _size(session, sides, size))
    unchanged = (0.0, 255.0) if session.dtype is np.uint8 else (0.0, 1.0)
    value_range = said.value_range or (given.value_range if given else unchanged)
    made = Preprocessing(
        size=height_width,
        channels=count,
        layout=layout,
        value_range=value_range,
        mean=_per_channel("mean", said.mean, given.mean if given else (0.0,) * count, count),
        std=_per_channel("std", said.std, given.std if given else (1.0,) * count, count),
        resize=said.resize or (given.resize if given else None),
    )
    if min(height_width) < 1 or (made.resize is not None and made.resize < 1) or 0.0 in made.std:
        raise UsageError("a size of less than 1, or a std of 0", "correct --size, --resize or --std")
    if not np.isfinite([*value_range, *made.mean, *made.std]).all():
        raise UsageError("the preprocessing has a number that is not finite", "correct --range, --mean or --std")
    return made


def read_trigger(path: Path, preprocessing: Preprocessing, position: str | None, alpha: float | None) -> Trigger:
    """The trigger in a picture or a .npy: a patch, or with ``alpha`` a picture that shines through.

    Args:
        path: A picture, or uint8 (h, w, C) or (h, w) as NumPy saves it.
        preprocessing: Size and channels of the images.
        position: Where it lies, one or more of `POSITIONS` with commas between them; None for the bottom right, and for
            a picture that shines through, stretched over the whole image.
        alpha: Its share, 0 to 1; None for a patch.

    Raises:
        UsageError: The file holds no such thing, or it does not fit.
    """
    fit = Fit(None, preprocessing.channels)
    pattern = _read_pattern(path, fit)
    positions = tuple(part.strip() for part in (position or "bottom-right").split(","))
    for part in positions:
        if part not in POSITIONS:
            raise UsageError(f"a trigger cannot lie at {part!r}", f"one of {', '.join(POSITIONS)}")
    if alpha is not None:
        if not 0 <= alpha <= 1:
            raise UsageError(f"the share of the trigger is {alpha}", "give a number from 0 to 1")
        if len(positions) > 1:
            raise UsageError("a trigger that shines through lies at one place", "give one --position, or none")
        if position is None:
            pattern = fitted(pattern, Fit(preprocessing.size, preprocessing.channels))
        return Blend(pattern[0], alpha, positions[0])
    if pattern.shape[1] > preprocessing.size[0] or pattern.shape[2] > preprocessing.size[1]:
        raise UsageError(
            f"the trigger {path} is {pattern.shape[1]} × {pattern.shape[2]}, the images "
            f"{preprocessing.size[0]} × {preprocessing.size[1]} (height × width)",
            "make it smaller, or let it shine through with --blend",
        )
    return Patch(pattern[0], positions)


def trigger_words(trigger: Trigger) -> str:
    """What a trigger does, in words."""
    match trigger:
        case Patch(pattern, positions):
            return f"patch of {pattern.shape[0]} × {pattern.shape[1]}, {', '.join(positions)}"
        case Blend(pattern, alpha, position):
            return f"blend of {pattern.shape[0]} × {pattern.shape[1]}, {position}, α = {alpha:g}"
        case Additive():
            return "signal added"
        case Warp():
            return "warp"
        case Generated():
            return "generated for each image"


def _read_pattern(path: Path, fit: Fit) -> Images:
    if path.suffix.lower() != ".npy":
        if not path.is_file():
            what = "is not a regular file" if path.exists() else "is not there"
            raise UsageError(f"the trigger {path} {what}", "give a picture or a .npy")
        return read_picture(path, fit)
    array = load_array(path)
    channels = {2: 1, 3: array.shape[-1] if array.ndim == 3 else 0}.get(array.ndim)
    if array.dtype != np.uint8 or channels not in {1, 3} or not array.size:
        raise UsageError(
            f"{path} holds {array.dtype} {array.shape}",
            "uint8 (height, width, 1 or 3) or (height, width) is wanted: "
            "of numbers from 0 to 1, save numpy.rint(255 * trigger).astype('uint8'); channels go last",
        )
    return fitted(np.array(array).reshape(1, *array.shape[:2], channels), fit)


def _layout(shape: Sequence[int | str | None]) -> str:
    """The order of the axes that an input shows: the axis of 1 or 3 is that of the channels."""
    first, last = (shape[axis] in {1, 3} for axis in (1, 3))
    if last and not first:
        return "NHWC"
    if first and last and shape[2] not in {1, 3}:
        raise UsageError("the input's shape does not show where its channels are", "say --layout NCHW or NHWC")
    return "NCHW"


def _size(session: Session, sides: Sequence[int | None], images: tuple[int, int] | None) -> tuple[int, int]:
    height, width = sides if images is None else (side or own for side, own in zip(sides, images, strict=True))
    if height is None or width is None:
        raise UsageError(f"{session.path} takes images of any size", "say which: --size HxW, or give its attack.json")
    return height, width


def _per_channel(name: str, said: Sequence[float] | None, given: Sequence[float], channels: int) -> tuple[float, ...]:
    numbers = tuple(given if said is None else said)
    if len(numbers) == 1:
        numbers *= channels
    if len(numbers) != channels:
        raise UsageError(f"{len(numbers)} numbers are given as {name}, the images have {channels} channels")
    return numbers
