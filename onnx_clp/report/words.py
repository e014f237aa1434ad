"""Names, numbers and counts as a report may show them, whatever the scanned file says."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

NAME_LIMIT: Final = 120
"""Characters of a name that a person reads; the rest is counted."""


def printable(name: str, limit: int = NAME_LIMIT) -> str:
    """``name``, cut to ``limit``, with what is not printable escaped, so that no terminal obeys it."""
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in name[:limit])
    return shown if len(name) <= limit else f"{shown}… ({len(name)} characters)"


def shortened(name: str, width: int) -> str:
    """``name``, printable, with its middle left out where it is wider than ``width``: names differ at their ends."""
    shown = printable(name)
    tail = (width - 1) * 2 // 3
    return shown if len(shown) <= width else f"{shown[: width - 1 - tail]}…{shown[-tail:]}"


def number(value: float) -> str:
    """Four significant digits."""
    return "–" if math.isnan(value) else f"{value:.4g}"


def count(amount: int, noun: str) -> str:
    """``1 layer``, ``2 layers``, ``1,234 layers``."""
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}s"


def listed(items: Iterable[str], limit: int) -> str:
    """The first ``limit`` items, and how many more there are."""
    items = list(items)
    rest = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + rest
