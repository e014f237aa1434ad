"""The reports for programs: versioned JSON, described by the JSON Schemas beside this file.

A number that JSON cannot hold is the string ``"NaN"``, ``"Infinity"`` or ``"-Infinity"``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from onnx_clp._version import __version__
from onnx_clp.report.selection_json import selection_object
from onnx_clp.report.values import images_used_object, number_value, preprocessing_object

if TYPE_CHECKING:
    from onnx_clp.analysis import Channel, Layer, ScanReport
    from onnx_clp.correction.budget import Walk
    from onnx_clp.correction.request import Correction
    from onnx_clp.evaluation.figures import AttackUsed, EvaluationReport, ImageSet, ModelFigures, Share
    from onnx_clp.report.outcome import Outcome
    from onnx_clp.sanitizer import SanitizeReport, Silenced

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
    return document({"kind": "scan", "files": files})


def render_sanitize(report: SanitizeReport) -> str:
    """The report of a rewrite as one JSON document (``sanitize-1.schema.json``)."""
    return document(
        {
            "kind": "sanitize",
            "source": report.source,
            "destination": report.destination,
            "written": report.written,
            "files": list(report.files),
            "replaced_data": list(report.replaced_data),
            "input_sha256": report.input_sha256,
            "max_share": report.max_share,
            "method": report.method,
            "auto": report.auto or None,
            "keep_bias": report.keep_bias,
            "silenced": [_silenced(part) for part in report.silenced],
            "left": [
                {"layer": part.layer, "channels": list(part.channels), "reason": part.reason} for part in report.left
            ],
            "unshared": list(report.unshared),
            "checks": [{"name": check.name, "passed": check.passed, "detail": check.detail} for check in report.checks],
            "before": scan_object(report.before),
            "after": None if report.after is None else scan_object(report.after),
            "correction": None if report.correction is None else correction_object(report.correction),
            "selection": None if report.selection is None else selection_object(report.selection),
            "budget": None if report.budget is None else budget_object(report.budget),
            "warnings": list(report.warnings),
        }
    )


def _silenced(part: Silenced) -> dict[str, Any]:
    return {
        "layer": part.layer,
        "channels": list(part.channels),
        "rest": part.rest,
        "rests": [number_value(rest) for rest in part.rests] or None,
        "why": part.why or None,
    }


def budget_object(walk: Walk) -> dict[str, Any]:
    """How far a budget allowed to go as a JSON object."""
    return {
        "min_agreement": walk.budget.min_agreement,
        "max_accuracy_drop": walk.budget.max_accuracy_drop,
        "hold_out": walk.budget.share,
        "lowest": walk.lowest,
        "taken": None if walk.taken is None else walk.steps.index(walk.taken),
        "accuracy": share_object(walk.accuracy),
        "steps": [
            {
                "u": step.u,
                "channels": step.channels,
                "agreement": share_object(step.agreement),
                "accuracy": share_object(step.accuracy),
                "kept": step.kept,
            }
            for step in walk.steps
        ],
    }


def correction_object(correction: Correction) -> dict[str, Any]:
    """What a correction did as a JSON object."""
    return {
        "repair": correction.repair,
        "ridge": correction.ridge,
        "augment": correction.augment,
        "images": images_used_object(correction.images),
        "preprocessing": preprocessing_object(correction.preprocessing),
        "corrected": [
            {
                "layer": part.layer,
                "channels": part.channels,
                "smallest": part.smallest,
                "largest": part.largest,
                "clamped": list(part.clamped),
            }
            for part in correction.corrected
        ],
        "left": [{"layer": part.layer, "reason": part.reason} for part in correction.left],
        "refitted": [{"layer": part.layer, "change": part.change} for part in correction.refitted],
        "kept": [{"layer": part.layer, "reason": part.reason} for part in correction.kept],
        "biases": list(correction.biases),
        "agreement": share_object(correction.agreement),
        "warnings": list(correction.warnings),
        "providers": list(correction.providers),
        "onnxruntime": correction.onnxruntime,
    }


def render_evaluation(report: EvaluationReport) -> str:
    """The report of an evaluation as one JSON document (``evaluate-1.schema.json``)."""
    difference = report.difference
    return document(
        {
            "kind": "evaluate",
            **evaluation_fields(report),
            "against": None if report.against is None else model_object(report.against),
            "difference": None
            if difference is None
            else {"acc": difference.acc, "asr": difference.asr, "ra": difference.ra},
        }
    )


def evaluation_fields(report: EvaluationReport) -> dict[str, Any]:
    """What an evaluation says of one model, and of what it was measured with, as fields of a JSON object."""
    return {
        "images": images_object(report.images),
        "attack": None if report.attack is None else attack_object(report.attack),
        "preprocessing": preprocessing_object(report.preprocessing),
        "onnxruntime": report.onnxruntime,
        "model": model_object(report.model),
        "notes": list(report.notes),
    }


def images_object(images: ImageSet) -> dict[str, Any]:
    """A set of images as a JSON object."""
    return {
        "path": images.path,
        "kind": images.kind,
        "used": images.used,
        "count": images.count,
        "available": images.available,
        "classes": list(images.classes),
        "order": images.order,
        "seed": images.seed,
    }


def attack_object(attack: AttackUsed) -> dict[str, Any]:
    """An attack as a JSON object."""
    return {"name": attack.name, "trigger": attack.trigger, "target": attack.target}


def model_object(model: ModelFigures) -> dict[str, Any]:
    """The figures of one model as a JSON object."""
    figures = model.figures
    return {
        "path": model.path,
        "sha256": model.sha256,
        "acc": share_object(figures.acc),
        "asr": share_object(figures.asr),
        "ra": share_object(figures.ra),
        "not_a_number": figures.not_a_number,
        "images_per_second": figures.images_per_second,
        "providers": list(model.providers),
        "nodes": [{"provider": name, "count": count} for name, count in model.nodes],
        "batch_size": model.batch_size,
    }


def share_object(share: Share | None) -> dict[str, Any] | None:
    """A share of images as a JSON object."""
    if share is None:
        return None
    low, high = share.interval
    return {"count": share.count, "total": share.total, "value": share.value, "low": low, "high": high}


def scan_object(report: ScanReport) -> dict[str, Any]:
    """One scan as a JSON object."""
    return {
        "u": report.u,
        "score": report.score,
        "threshold": report.threshold,
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
        "ambiguities": report.ambiguities,
        "ambiguous": [{"kind": part.kind, "name": part.name, "detail": part.detail} for part in report.ambiguous],
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
        "mean": number_value(layer.mean),
        "std": number_value(layer.std),
        "threshold": number_value(layer.threshold),
        "flagged": [_channel(layer, channel) for channel in layer.flagged],
        "dead": list(layer.dead),
        "non_finite": list(layer.non_finite),
        "overridable": list(layer.overridable),
        "bounds": [number_value(bound) for bound in layer.bounds],
        "scores": [number_value(score) for score in layer.scores] if layer.scores else None,
        "fallback": layer.fallback or None,
    }


def _channel(layer: Layer, channel: Channel) -> dict[str, Any]:
    return {
        "index": channel.index,
        "bound": number_value(channel.bound),
        "score": number_value(layer.scores[channel.index]) if layer.scores else None,
        "z": number_value(channel.z),
    }


def document(content: dict[str, Any]) -> str:
    """A report as a JSON document: what it holds, after what wrote it."""
    head = {"format": "onnx-clp", "format_version": FORMAT_VERSION, "tool_version": __version__}
    # ASCII only: names from the scanned file may hold lone surrogates and terminal escapes.
    return json.dumps({**head, **content}, indent=2, allow_nan=False, ensure_ascii=True) + "\n"
