"""onnx-clp: find and silence outlier channels of ONNX models by Channel Lipschitzness (CLP).

>>> import onnx_clp
>>> report = onnx_clp.scan("model.onnx")
>>> report.flagged_channels
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx_clp._version import __version__
from onnx_clp.errors import ModelFileError, OnnxClpError, UsageError, VerificationError

if TYPE_CHECKING:
    from onnx_clp.analysis import Channel, Layer, ScanReport, SkippedPart, scan
    from onnx_clp.sanitizer import Check, Left, SanitizeReport, Silenced, sanitize

__all__ = [
    "Channel",
    "Check",
    "Layer",
    "Left",
    "ModelFileError",
    "OnnxClpError",
    "SanitizeReport",
    "ScanReport",
    "Silenced",
    "SkippedPart",
    "UsageError",
    "VerificationError",
    "__version__",
    "sanitize",
    "scan",
]

_SANITIZE = frozenset({"Check", "Left", "SanitizeReport", "Silenced", "sanitize"})


def __getattr__(name: str) -> object:
    """Import onnx and NumPy only when something that needs them is asked for: ``--version`` must not wait for them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # as late as everything else here

    module = import_module("onnx_clp.sanitizer" if name in _SANITIZE else "onnx_clp.analysis")
    value: object = getattr(module, name)
    return value
