"""Scores → which channels of a site stand out.

Of the finite scores s_1 … s_n of a site, with std of n−1, and strictly,

    EP   chooses k where s_k < mean − u·std
    BNP  chooses k where s_k > mean + u·std

with u = 3: Zheng, Tang, Li, Liu, "Pre-activation Distributions Expose Backdoor Neurons", NeurIPS 2022, and their code.
Scores that are not finite stay out, where in theirs one makes mean and std NaN, or infinite, and hides all others.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from onnx_clp.defaults import DEFAULT_U, check_u
from onnx_clp.judge import ROUNDING, largest_possible_z
from onnx_clp.preactivation.scores import Choice, Method, Reads, Scores, SiteChoice, SiteScores, Verdict

Floats = npt.NDArray[np.float64]


def choose(scores: Scores, u: float = DEFAULT_U) -> Choice:
    """The channels that stand out of their site by more than ``u`` standard deviations.

    Raises UsageError where ``u`` is negative or not finite.
    """
    check_u(u)
    sites = tuple(_choose(site, u, scores.method) for site in scores.sites)
    return Choice(scores.method, u, sites, scores.unread)


def _choose(site: SiteScores, u: float, method: Method) -> SiteChoice:
    scores = np.array(site.scores, np.float64)
    counted = scores[np.isfinite(scores)]
    verdict, mean, std = _spread(counted, u)
    sign = -1 if method is Method.EP else 1
    judged = verdict is Verdict.JUDGED
    threshold = mean + sign * u * std if judged or verdict is Verdict.ZERO_SPREAD else math.nan
    channels = _beyond(scores, threshold, sign) if judged else ()
    mirrored = _beyond(np.array(site.mirrored, np.float64), threshold, sign) if judged else ()
    return SiteChoice(
        name=site.name,
        verdict=verdict,
        mean=mean,
        std=std,
        threshold=threshold,
        channels=channels,
        z=tuple(sign * (float(scores[k]) - mean) / std for k in channels),
        rests=tuple(site.rests[k] for k in channels),
        rests_known=site.reads is Reads.INPUT,
        mirrored=tuple(k for k in mirrored if k not in channels),
        unscored=tuple(np.flatnonzero(~np.isfinite(scores)).tolist()),
        position=site.position,
    )


def _spread(counted: Floats, u: float) -> tuple[Verdict, float, float]:
    """What can be said by finite scores, their mean and their std."""
    if not counted.size:
        return Verdict.NO_SCORES, math.nan, math.nan
    # Divided by a power of two: squares of divergences near the end of float64 do not overflow.
    _, exponent = np.frexp(np.abs(counted).max())
    with np.errstate(all="ignore"):  # a threshold beyond float64 is beyond every score; some releases warn of denormals
        parts = np.ldexp(counted, -exponent)
        mean = float(np.ldexp(parts.mean(), exponent))
        std = float(np.ldexp(parts.std(ddof=1), exponent)) if counted.size > 1 else math.nan
    if largest_possible_z(counted.size) <= u:
        return Verdict.TOO_FEW_CHANNELS, mean, std
    if std <= ROUNDING * abs(mean):
        return Verdict.ZERO_SPREAD, mean, 0.0
    return Verdict.JUDGED, mean, std


def _beyond(scores: Floats, threshold: float, sign: int) -> tuple[int, ...]:
    """The channels with a finite score beyond the threshold, ascending."""
    chosen = np.isfinite(scores) & (sign * scores > sign * threshold)
    return tuple(np.flatnonzero(chosen).tolist())
