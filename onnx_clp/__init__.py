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
    from onnx_clp.correction.request import Corrected, Correction, Uncorrected
    from onnx_clp.evaluation.correlation import Correlation
    from onnx_clp.evaluation.evaluator import evaluate
    from onnx_clp.evaluation.figures import EvaluationReport, Figures, ImagesUsed, ModelFigures, Share
    from onnx_clp.evaluation.sweep import SweepReport, SweepRow, sweep
    from onnx_clp.evaluation.tac import NotMeasured, TacLayer, TacReport, tac
    from onnx_clp.limits import Limits
    from onnx_clp.model.ambiguity import Ambiguity
    from onnx_clp.preactivation.scores import Choice, Scores, SiteChoice, SiteScores, Unread
    from onnx_clp.preactivation.selection import Selection
    from onnx_clp.sanitizer import Check, Left, SanitizeReport, Silenced, sanitize

__all__ = [
    "Ambiguity",
    "Channel",
    "Check",
    "Choice",
    "Corrected",
    "Correction",
    "Correlation",
    "EvaluationReport",
    "Figures",
    "ImagesUsed",
    "Layer",
    "Left",
    "Limits",
    "ModelFigures",
    "ModelFileError",
    "NotMeasured",
    "OnnxClpError",
    "SanitizeReport",
    "ScanReport",
    "Scores",
    "Selection",
    "Share",
    "Silenced",
    "SiteChoice",
    "SiteScores",
    "SkippedPart",
    "SweepReport",
    "SweepRow",
    "TacLayer",
    "TacReport",
    "Uncorrected",
    "Unread",
    "UsageError",
    "VerificationError",
    "__version__",
    "evaluate",
    "sanitize",
    "scan",
    "sweep",
    "tac",
]

_MODULES = {
    **dict.fromkeys(("Check", "Left", "SanitizeReport", "Silenced", "sanitize"), "onnx_clp.sanitizer"),
    **dict.fromkeys(("Corrected", "Correction", "Uncorrected"), "onnx_clp.correction.request"),
    **dict.fromkeys(
        ("EvaluationReport", "Figures", "ImagesUsed", "ModelFigures", "Share"), "onnx_clp.evaluation.figures"
    ),
    **dict.fromkeys(("SweepReport", "SweepRow", "sweep"), "onnx_clp.evaluation.sweep"),
    **dict.fromkeys(("NotMeasured", "TacLayer", "TacReport", "tac"), "onnx_clp.evaluation.tac"),
    **dict.fromkeys(("Choice", "Scores", "SiteChoice", "SiteScores", "Unread"), "onnx_clp.preactivation.scores"),
    "Ambiguity": "onnx_clp.model.ambiguity",
    "Limits": "onnx_clp.limits",
    "Correlation": "onnx_clp.evaluation.correlation",
    "Selection": "onnx_clp.preactivation.selection",
    "evaluate": "onnx_clp.evaluation.evaluator",
}


def __getattr__(name: str) -> object:
    """Import onnx and NumPy only when something that needs them is asked for: ``--version`` must not wait for them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # as late as everything else here

    value: object = getattr(import_module(_MODULES.get(name, "onnx_clp.analysis")), name)
    return value
