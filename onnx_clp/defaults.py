"""What the options are where nobody says otherwise."""

from __future__ import annotations

import math
from typing import Final

from onnx_clp.errors import UsageError

DEFAULT_U: Final = 3.0
"""Standard deviations above the mean, as published."""

DEFAULT_MAX_SHARE: Final = 0.1
"""Share of a layer's channels that may be silenced; at u = 3 no layer flags more than 1/(1 + u²) = 10 % (Cantelli)."""


def check_u(u: float) -> None:
    """Raise UsageError where ``u`` cannot be a number of standard deviations."""
    if not (math.isfinite(u) and u >= 0):
        raise UsageError(f"u is {u}", "give a finite number of standard deviations, 0 or more")
