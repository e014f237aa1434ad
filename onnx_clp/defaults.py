"""What the options are where nobody says otherwise."""

from __future__ import annotations

import math
from typing import Final

from onnx_clp.errors import UsageError

DEFAULT_U: Final = 3.0
"""Standard deviations above the mean, as published."""

LOWEST_U: Final = 1.5
"""Where a budget's walk ends unless said otherwise: below, every fifteenth channel of a normal layer is flagged."""

SCORES: Final = ("bound", "path")
"""What a channel is judged by: its bound, as published, or bound × outgoing norm in a form that no scaling moves."""

ACTIVITY: Final = "activity"
"""The score of a rewrite with images: bound over standard deviation on them. A scan alone has none."""

DEFAULT_SCORE: Final = "bound"

THRESHOLDS: Final = ("mean-std", "median-mad", "log-std", "log-mad")
"""Rules for what stands out of a layer, see onnx_clp.judge; the first is the published one."""

DEFAULT_THRESHOLD: Final = "mean-std"

ROBUST: Final = frozenset({"median-mad", "log-mad"})
"""Those that just under half of the channels cannot move far."""

LOGARITHMIC: Final = frozenset({"log-std", "log-mad"})
"""Those that compare logarithms."""

DEFAULT_MAX_SHARE: Final = 0.1
"""Share of a layer's channels that may be silenced; at u = 3 no layer flags more than 1/(1 + u²) = 10 % (Cantelli)."""


def check_u(u: float) -> None:
    """Raise UsageError where ``u`` cannot be a number of standard deviations."""
    if not (math.isfinite(u) and u >= 0):
        raise UsageError(f"u is {u}", "give a finite number of standard deviations, 0 or more")


def check_score(score: str, scores: tuple[str, ...] = SCORES) -> None:
    """Raise UsageError where ``score`` is none of ``scores``."""
    if score not in scores:
        raise UsageError(f"there is no score {score!r}", f"choose from {', '.join(scores)}")


def check_threshold(threshold: str, *, count_dead: bool) -> None:
    """Raise UsageError where there is no such threshold, or dead channels cannot count in it."""
    if threshold not in THRESHOLDS:
        raise UsageError(f"there is no threshold {threshold!r}", f"choose from {', '.join(THRESHOLDS)}")
    if count_dead and threshold != DEFAULT_THRESHOLD:
        raise UsageError(
            f"dead channels do not count under the threshold {threshold}",
            f"leave out counting them, which is the arithmetic of {DEFAULT_THRESHOLD}",
        )
