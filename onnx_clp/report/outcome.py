"""What came of each file of one run: a report, or the error that stood in the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx_clp.analysis import ScanReport
    from onnx_clp.errors import OnnxClpError


@dataclass(frozen=True, slots=True)
class Outcome:
    """One file of a scan: exactly one of ``report`` and ``error`` is there."""

    path: str
    report: ScanReport | None = None
    error: OnnxClpError | None = None
