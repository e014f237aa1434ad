"""The report of trigger-activated changes for programs: JSON, described by ``tac-1.schema.json``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnx_clp.report.json import attack_object, document, images_object
from onnx_clp.report.values import number_value, preprocessing_object

if TYPE_CHECKING:
    from onnx_clp.evaluation.correlation import Correlation
    from onnx_clp.evaluation.tac import TacLayer, TacReport


def render_tac(report: TacReport) -> str:
    """The report of trigger-activated changes as one JSON document."""
    return document(
        {
            "kind": "tac",
            "path": report.path,
            "sha256": report.sha256,
            "images": images_object(report.images),
            "pairs": report.pairs,
            "attack": attack_object(report.attack),
            "preprocessing": preprocessing_object(report.preprocessing),
            "onnxruntime": report.onnxruntime,
            "providers": list(report.providers),
            "u": report.u,
            "count_dead": report.count_dead,
            "raw": _correlation(report.raw),
            "standardised": _correlation(report.standardised),
            "flagged_channels": report.flagged_channels,
            "flagged_at_top": report.flagged_at_top,
            "layers": [_layer(layer) for layer in report.layers],
            "not_measured": [{"name": part.name, "reason": part.reason} for part in report.not_measured],
        }
    )


def _layer(layer: TacLayer) -> dict[str, Any]:
    scores = {channel: (bound, change) for channel, bound, change in layer.scores}
    counted, flagged = set(layer.counted), set(layer.flagged)
    return {
        "name": layer.name,
        "kind": layer.kind,
        "value": layer.value,
        "threshold": number_value(layer.threshold),
        "correlation": _correlation(layer.correlation),
        "flagged_at_top": layer.flagged_at_top,
        "channels": [
            {
                "index": k,
                "bound": number_value(bound),
                "bound_z": scores[k][0] if k in scores else None,
                "tac": number_value(change),
                "tac_z": scores[k][1] if k in scores else None,
                "counted": k in counted,
                "flagged": k in flagged,
            }
            for k, (bound, change) in enumerate(zip(layer.bounds, layer.changes, strict=True))
        ],
    }


def _correlation(found: Correlation) -> dict[str, Any]:
    return {"pairs": found.pairs, "pearson": found.pearson, "spearman": found.spearman}
