"""What a user says of the images for a correction, and what came of it: light, for the command and for reports."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from onnx_clp.correction.budget import NO_BUDGET, Budget
from onnx_clp.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from onnx_clp.evaluation.attack import Attack, Preprocessing
    from onnx_clp.evaluation.figures import ImagesUsed, Share
    from onnx_clp.evaluation.images import LabelledImages

Given: TypeAlias = "str | os.PathLike[str] | npt.NDArray[np.uint8] | LabelledImages | None"
"""Where images lie, or themselves: uint8 (N, H, W, C) or (N, H, W), or with labels."""

MOST_IMAGES: Final = 500
"""Images that are taken where nobody says how many: more moved no figure."""

ADVISED_IMAGES: Final = 50
"""Images below which the correction is warned of."""

LEAST_IMAGES: Final = 2
"""One image of one position has no variance."""

REPAIRS: Final = ("statistics", "refit", "none")
"""What images are used for: to give later layers their statistics back; to refit their kernels, and the statistics on
top; to change nothing but to compare."""

DEFAULT_RIDGE: Final = 0.1
"""λ of a refit: half of it left more of a backdoor and kept up to 0.8 points more, on two nets (docs/sanitize.md)."""

DEFAULT_COPIES: Final = 3
"""Shifted and mirrored copies of each image that a refit is given."""

MOST_COPIES: Final = 100


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """The options of `onnx_clp.sanitize` that are about images; see there."""

    images: Given = None
    attack: str | os.PathLike[str] | Attack | None = None
    size: tuple[int, int] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    layout: str | None = None
    value_range: tuple[float, float] | None = None
    resize: int | None = None
    num_images: int | None = None
    seed: int = 0
    providers: Sequence[str] | None = None
    batch_size: int | None = None
    output_name: str | None = None
    repair: str = "statistics"
    ridge: float | None = None
    augment: int | None = None
    suspected: Given = None
    num_suspected: int | None = None
    budget: Budget = NO_BUDGET

    @property
    def refits(self) -> bool:
        """Whether kernels are refitted."""
        return self.repair == "refit"

    @property
    def penalty(self) -> float | None:
        """λ of the refit; None where there is none."""
        return (DEFAULT_RIDGE if self.ridge is None else self.ridge) if self.refits else None

    @property
    def copies(self) -> int:
        """Shifted and mirrored copies of each image."""
        if self.augment is None:
            return DEFAULT_COPIES if self.refits else 0
        return self.augment

    def _missing(self, name: str) -> str:
        """The option without which option ``name`` means nothing; empty where there is none, or it is given."""
        if name in _OF_SUSPECTED:
            return "--suspected-images" if self.suspected is None else ""
        of_both = name in _OF_BOTH and self.suspected is not None
        return "--images" if self.images is None and not of_both and name != "suspected" else ""

    def check(self) -> None:
        """Raise UsageError where an option is beyond its range, or is given without images."""
        self.budget.check(images=self.images is not None)
        for field in fields(self):
            missing = self._missing(field.name)
            if missing and getattr(self, field.name) != field.default:
                name = _OPTIONS.get(field.name, field.name.replace("_", "-"))
                raise UsageError(f"--{name} goes with {missing}", f"give {missing} PATH, or leave --{name} out")
        for number in (self.num_images, self.num_suspected):
            if number is not None and number < LEAST_IMAGES:
                raise UsageError(f"the number of images is {number}", f"take {LEAST_IMAGES} at least")
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"the batch size is {self.batch_size}", "run one image at once at least")
        if self.repair not in REPAIRS:
            raise UsageError(f"there is no repair {self.repair!r}", f"take one of {', '.join(REPAIRS)}")
        if self.ridge is not None and not self.refits:
            raise UsageError("--ridge goes with --repair refit", "say --repair refit, or leave --ridge out")
        if self.ridge is not None and not 0 < self.ridge < math.inf:
            raise UsageError(f"the ridge is {self.ridge}", "give a number above 0, such as 0.1")
        if self.augment is not None and not 0 <= self.augment <= MOST_COPIES:
            raise UsageError(f"{self.augment} copies of each image", f"take 0 to {MOST_COPIES}")


NO_IMAGES: Final = ImageRequest()
"""Nothing is corrected."""

_OPTIONS: Final[dict[str, Any]] = {"value_range": "range"}

_OF_SUSPECTED: Final = frozenset({"num_suspected"})
_OF_BOTH: Final = frozenset({"attack", "providers", "batch_size", "seed"}) | frozenset(
    {"size", "mean", "std", "layout", "value_range", "resize"}
)
"""Options that say how a model takes any images, and how it is run."""


@dataclass(frozen=True, slots=True)
class Corrected:
    """A layer whose statistics were given back.

    Attributes:
        layer: Its name.
        channels: How many of its channels were changed.
        smallest: The smallest factor among them.
        largest: The largest.
        clamped: Channels that would have got a factor outside of [0.3, 3], ascending.
    """

    layer: str
    channels: int
    smallest: float
    largest: float
    clamped: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Uncorrected:
    """A layer whose statistics are shifted, or may be, and were not given back.

    Attributes:
        layer: Its name.
        reason: Why.
    """

    layer: str
    reason: str


@dataclass(frozen=True, slots=True)
class Refitted:
    """A convolution whose kernel was fitted anew.

    Attributes:
        layer: Its name.
        change: ‖W′ − W‖ / ‖W‖ of its kernel.
    """

    layer: str
    change: float


@dataclass(frozen=True, slots=True)
class Correction:
    """What a correction did.

    Attributes:
        repair: What the images were used for, one of `REPAIRS`.
        ridge: λ of the refit; None where there was none.
        augment: Shifted and mirrored copies of each image that were measured too.
        images: Which images were measured; what a budget held out is not among them.
        preprocessing: How the model took them.
        corrected: Layers that were changed, in topological order.
        left: Layers that were not, and why.
        refitted: Convolutions with a new kernel, in topological order.
        kept: Convolutions that a refit left with their kernel, and why.
        biases: Convolutions that had no bias and got one.
        agreement: Of the images, or with a budget of those that were held out, those that the sanitized model
            classifies as the original does; None where no output of the model has a number for each class, or nothing
            was silenced or refitted.
        warnings: What the user should know.
        providers: The execution providers that onnxruntime gave the model.
        onnxruntime: Version of onnxruntime.
    """

    repair: str
    ridge: float | None
    augment: int
    images: ImagesUsed
    preprocessing: Preprocessing
    corrected: tuple[Corrected, ...]
    left: tuple[Uncorrected, ...]
    refitted: tuple[Refitted, ...]
    kept: tuple[Uncorrected, ...]
    biases: tuple[str, ...]
    agreement: Share | None
    warnings: tuple[str, ...]
    providers: tuple[str, ...]
    onnxruntime: str

    @property
    def channels(self) -> int:
        """How many channels were changed."""
        return sum(part.channels for part in self.corrected)

    @property
    def clamped(self) -> int:
        """How many of them would have got a factor outside of [0.3, 3]."""
        return sum(len(part.clamped) for part in self.corrected)
