"""What is done to the values at each cut of the sanitized stream: refitted, corrected, silenced, in this order.

The values are changed as the written model will compute them: W′∗x′ + b′ in place of what a convolution makes, then
a·y + c, then silenced channels at rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from onnx_clp.correction.convolutions import Convolution
from onnx_clp.correction.cuts import Observed
from onnx_clp.correction.moments import Affine, Array, Floats, Moments, affine, applied, merged, moments
from onnx_clp.correction.patches import convolved
from onnx_clp.correction.refit import LEAST_POSITIONS, Refit, refitted
from onnx_clp.correction.stream import Values

Channels = Mapping[int, Sequence[int]]
"""Channels by the position of their site in ``Analysis.measured``."""

Rests = Mapping[int, Floats]
"""Where channels of a site rest when they are silenced, float64 (channels,), likewise; at 0, or at the zero point,
where it is not said."""

SAME_PRODUCT: Final = 1e-2
"""By which share of its own root mean square a convolution of patches may differ from what onnxruntime computes: sums
of thousands of products in float16 differ by less, another padding or order of axes by more."""


@dataclass(frozen=True, slots=True)
class Repair:
    """What is done after channels were silenced.

    Attributes:
        statistics: Whether mean and variance are given back.
        ridge: λ of the refit; None where kernels are left.
        left: Sites that shall not be corrected, with the reason, by position in ``Analysis.measured``.
        kept: Convolutions that shall not be refitted, with the reason, by the index of their node.
    """

    statistics: bool = True
    ridge: float | None = None
    left: Mapping[int, str] = field(default_factory=dict)
    kept: Mapping[int, str] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Repairs:
    """The repairs of one run of the sanitized stream.

    Attributes:
        wanted: What is to be done.
        choices: What is silenced.
        counted: How many of the batches are measured.
        rests: Where silenced channels rest.
        affines: What was done to each site that was reached, by position in ``Analysis.measured``.
        left: Why a site that was reached is not corrected, likewise.
        refits: The new kernels, by the index of the node.
        kept: Why a kernel is not refitted, likewise.
    """

    wanted: Repair
    choices: Channels
    counted: int
    rests: Rests = field(default_factory=dict)
    affines: dict[int, Affine] = field(default_factory=dict)
    left: dict[int, str] = field(default_factory=dict)
    refits: dict[int, Refit] = field(default_factory=dict)
    kept: dict[int, str] = field(default_factory=dict)

    def refit(
        self, part: Convolution, inputs: Sequence[Array], values: Values, before: tuple[Sequence[Array], Values]
    ) -> bool:
        """Refit a convolution that made ``values`` of ``inputs``, and change these; whether they were.

        ``before`` are its input and output in the original.
        """
        index = part.node.index
        if self.wanted.ridge is None:
            return False
        reason = self.wanted.kept.get(index, "") or _unlike(part, before[0][0], before[1][0])
        if reason:
            self.kept[index] = reason
            return False
        counted = [[*values_of][: self.counted] for values_of in (inputs, before[1])]
        positions, unknowns = sum(t.size // t.shape[1] for t in counted[1]), part.kernel[0].size
        if positions < LEAST_POSITIONS * unknowns:
            self.kept[index] = f"{unknowns:,} numbers a channel, too many for {positions:,} positions in the images"
            return False
        found = refitted(counted[0], counted[1], part.where, part.kernel, self.wanted.ridge)
        if found is None:
            self.kept[index] = "what it is given on the images does not say a kernel"
            return False
        self.refits[index] = found
        with np.errstate(all="ignore"):  # where it does not fit a float16, that is refused when it is planned
            kernel, bias = (array.astype(part.kernel.dtype) for array in (found.kernel, found.bias))
        for i, x in enumerate(inputs):
            values[i] = convolved(x, part.where, kernel, bias)
        return True

    def correct(self, part: Observed, values: Values, before: Moments | None, *, reached: bool) -> bool:
        """Correct and silence a site, of which ``before`` are the moments in the original; whether it was changed."""
        silenced = self.choices.get(part.position, ())
        rests = self.rests.get(part.position, np.full(part.site.channels, part.rest))
        found = None
        if reached and self.wanted.statistics:
            found = self._affine(part, values, before, silenced)
        for i, array in enumerate(values):
            axis = part.site.axis % array.ndim
            made = applied(array, axis, found) if found is not None and found.changed else array
            values[i] = _silent(made, axis, silenced, rests) if silenced else made
        return bool(silenced) or (found is not None and bool(found.changed))

    def _affine(self, part: Observed, values: Values, before: Moments | None, silenced: Sequence[int]) -> Affine | None:
        if part.position in self.wanted.left:
            self.left[part.position] = self.wanted.left[part.position]
            return None
        if before is None:
            self.left[part.position] = "its values are no floating-point numbers"
            return None
        rounding = float(np.finfo(values[0].dtype).eps)
        found = affine(before, self.measured(part, values), silenced, rounding)
        self.affines[part.position] = found
        return found

    def measured(self, part: Observed, values: Values) -> Moments:
        """The moments of a site on the batches that count."""
        axis = part.site.axis
        return merged([moments(array, axis % array.ndim) for array in values[: self.counted]])


def _unlike(part: Convolution, x: Array, made: Array) -> str:
    """Why what a convolution ``made`` of ``x`` is not what its kernel says; empty where it is."""
    if x.ndim != part.kernel.ndim or x.shape[1] != part.kernel.shape[1] or x.dtype != part.kernel.dtype:
        return "its input does not fit its kernel"
    own = convolved(x[:1], part.where, part.kernel, part.bias).astype(np.float64)
    wanted = made[:1].astype(np.float64)
    with np.errstate(all="ignore"):  # what is not finite is said
        if own.shape != wanted.shape or not np.isfinite(own - wanted).all():
            return "what it computes cannot be followed"
        off, size = (float(np.sqrt(np.square(each).mean())) for each in (own - wanted, wanted))
    return "what it computes cannot be followed" if off > SAME_PRODUCT * size else ""


def _silent(array: Array, axis: int, channels: Sequence[int], rests: Floats) -> Array:
    """``array`` with ``channels`` at rest."""
    made = array.copy()
    for channel in channels:
        made[(slice(None),) * axis + (channel,)] = rests[channel]
    return made
