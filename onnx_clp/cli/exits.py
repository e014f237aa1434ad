"""Exit codes, the same for every command and every format."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """What the exit code says."""

    FINE = 0
    FLAGGED = 1
    ERROR = 2
    NOT_ANALYSED = 3
    VERIFICATION = 4
    INTERRUPTED = 130
