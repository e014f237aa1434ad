"""The reports for programs: versioned JSON, described by the JSON Schemas beside this file.

A number that JSON cannot hold is the string ``"NaN"``, ``"Infinity"`` or ``"-Infinity"``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from onnx_clp._version import __version__

if TYPE_CHECKING:
    from onnx_clp.analysis import Layer, ScanReport
    from onnx_clp.report.outcome import Outcome
    from onnx_clp.sanitizer import SanitizeReport

FORMAT_VERSION: Final = 1
"""Goes up when a field changes its meaning or goes away; a new field does not count."""


def render(outcomes: Iterable[Outcome]) -> str:
    """The reports of a scan as one JSON document (``scan-1.schema.json``)."""
    files = []
    for outcome in outcomes:
        if outcome.report is not None:
            files.append({"path": outcome.path, "report": scan_object(outcome.report)})
        elif outcome.error is not None:
            error = {"kind": type(outcome.error).__name__, "message": outcome.error.message, "hint": outcome.error.hint}
            files.append({"path": outcome.path, "error": error})
    return _document({"kind": "scan", "files": files})


def render_sanitize(report: SanitizeReport) -> str:
    """The report of a rewrite as one JSON document (``sanitize-1.schema.json``)."""
    return _document(
        {
            "kind": "sanitize",
            "source": report.source,
            "destination": report.destination,
            "written": report.written,
            "files": list(report.files),
            "input_sha256": report.input_sha256,
            "max_share": report.max_share,
            "silenced": [{"layer": part.layer, "channels": list(part.channels)} for part in report.silenced],
            "left": [
                {"layer": part.layer, "channels": list(part.channels), "reason": part.reason} for part in report.left
            ],
            "unshared": list(report.unshared),
            "checks": [{"name": check.name, "passed": check.passed, "detail": check.detail} for check in report.checks],
            "before": scan_object(report.before),
            "after": None if report.after is None else scan_object(report.after),
        }
    )


def scan_object(report: ScanReport) -> dict[str, Any]:
    """One scan as a JSON object."""
    return {
        "u": report.u,
        "count_dead": report.count_dead,
        "coverage": {
            "layers": len(report.layers),
            "judged_layers": sum(layer.judged for layer in report.layers),
            "skipped": len(report.skipped),
            "channels": report.channels,
            "judged_channels": report.judged_channels,
            "analysed": report.analysed,
            "complete": report.complete,
        },
        "flagged_channels": report.flagged_channels,
        "non_finite_channels": report.non_finite_channels,
        "dead_channels": report.dead_channels,
        "layers": [_layer(layer) for layer in report.layers],
        "skipped": [
            {"name": part.name, "operator": part.operator, "reason": part.reason, "detail": part.detail}
            for part in report.skipped
        ],
    }


def _layer(layer: Layer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "kind": layer.kind,
        "operators": list(layer.operators),
        "status": layer.status,
        "channels": layer.channels,
        "mean": _number(layer.mean),
        "std": _number(layer.std),
        "threshold": _number(layer.threshold),
        "flagged": [
            {"index": channel.index, "bound": _number(channel.bound), "z": _number(channel.z)}
            for channel in layer.flagged
        ],
        "dead": list(layer.dead),
        "non_finite": list(layer.non_finite),
        "overridable": list(layer.overridable),
        "bounds": [_number(bound) for bound in layer.bounds],
    }


def _number(value: float) -> float | str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def _document(content: dict[str, Any]) -> str:
    head = {"format": "onnx-clp", "format_version": FORMAT_VERSION, "tool_version": __version__}
    # ASCII only: names from the scanned file may hold lone surrogates and terminal escapes.
    return json.dumps({**head, **content}, indent=2, allow_nan=False, ensure_ascii=True) + "\n"
