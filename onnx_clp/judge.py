"""Bounds → judgement: which channels of a layer stand out.

Channel k of a layer with bounds b_1 … b_n is *flagged* where b_k > mean + u·std, strictly, with the unbiased std (n−1):
Zheng, Tang, Li, Liu, "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022 (arXiv:2208.03111),
with u = 3 by default.

Dead channels (bound exactly 0) stay out of mean and std: otherwise a fifth of dead channels doubles the threshold and
hides what stands out. With ``count_dead`` they count, which is the published arithmetic to the letter. Channels whose
bound is NaN or infinite are findings of their own and never count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np
import numpy.typing as npt

from onnx_clp.defaults import DEFAULT_U

ROUNDING: Final = 1e-6
"""A spread below this share of the mean is the rounding of float32 (2⁻²⁴ = 6e-8 per element) and not a difference."""


class Status(Enum):
    """What could be said about a layer."""

    JUDGED = "judged"
    TOO_FEW_CHANNELS = "too-few-channels"
    ZERO_SPREAD = "zero-spread"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the bounds of one layer say.

    Attributes:
        status: JUDGED; TOO_FEW_CHANNELS where no bound could pass the threshold; ZERO_SPREAD where all are equal;
            DEAD where none is above 0.
        mean: Mean of the bounds that count; NaN where none does.
        std: Their standard deviation (n−1); NaN where fewer than two count.
        threshold: mean + u·std; NaN where the status is not JUDGED or ZERO_SPREAD.
        flagged: Channels above the threshold, ascending.
        scores: Of each flagged channel (bound − mean)/std.
        dead: Channels with a bound of exactly 0, ascending.
        non_finite: Channels whose bound is NaN or infinite, ascending.
    """

    status: Status
    mean: float
    std: float
    threshold: float
    flagged: tuple[int, ...]
    dead: tuple[int, ...]
    non_finite: tuple[int, ...]
    scores: tuple[float, ...] = ()


def largest_possible_z(channels: int) -> float:
    """The largest (bound − mean)/std that any of ``channels`` numbers can have: (n−1)/√n, reached by n−1 equal ones."""
    return (channels - 1) / math.sqrt(channels) if channels else 0.0


def judge(bounds: npt.NDArray[np.float64], u: float = DEFAULT_U, *, count_dead: bool = False) -> Judgement:
    """Judge one layer.

    Args:
        bounds: float64, shape (channels,), each ≥ 0 or not finite.
        u: How many standard deviations above the mean are too many; ≥ 0.
        count_dead: Whether channels with bound 0 count in mean and std.
    """
    finite = np.isfinite(bounds)
    alive = finite & (bounds > 0)
    counted = bounds[finite if count_dead else alive]
    dead = _indices(finite & (bounds == 0))
    non_finite = _indices(~finite)
    # Judged as shares of the largest: squares of bounds near the ends of float64 neither overflow nor vanish, and mean
    # and std are not rounded to the few numbers that float64 has near 0.
    largest, exponent = math.frexp(float(counted.max())) if counted.size and counted.max() > 0 else (1.0, 0)
    relative = _scaled(bounds, -exponent) / largest
    shares = relative[finite if count_dead else alive]
    mean = float(np.mean(shares)) if shares.size else math.nan
    std = float(np.std(shares, ddof=1)) if shares.size > 1 else math.nan

    def result(status: Status, threshold: float = math.nan, flagged: tuple[int, ...] = ()) -> Judgement:
        told = [float(_scaled(np.float64(share) * largest, exponent)) for share in (mean, std, threshold)]
        scores = tuple((float(relative[k]) - mean) / std for k in flagged)
        return Judgement(status, told[0], told[1], told[2], flagged, dead, non_finite, scores)

    if not alive.any():
        return result(Status.DEAD)
    if largest_possible_z(shares.size) <= u:
        return result(Status.TOO_FEW_CHANNELS)
    if std <= ROUNDING * mean:
        return result(Status.ZERO_SPREAD, mean)
    threshold = mean + u * std
    return result(Status.JUDGED, threshold, _indices(finite & (relative > threshold)))


def _scaled(numbers: npt.NDArray[np.float64] | np.float64, exponent: int) -> npt.NDArray[np.float64]:
    """``numbers`` times 2^exponent."""
    with np.errstate(all="ignore"):  # an infinite threshold is above every bound; some releases warn of denormals
        return np.asarray(np.ldexp(numbers, exponent))


def _indices(mask: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(int(index) for index in np.flatnonzero(mask))
