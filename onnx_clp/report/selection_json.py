"""What EP or BNP read and chose, as a JSON object."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnx_clp.report.values import images_used_object, number_value, preprocessing_object

if TYPE_CHECKING:
    from onnx_clp.preactivation.scores import SiteChoice, SiteScores
    from onnx_clp.preactivation.selection import Selection


def selection_object(selection: Selection) -> dict[str, Any]:
    """The scores of every channel that was read, and which stand out."""
    pairs = zip(selection.scores.sites, selection.choice.sites, strict=True)
    return {
        "images": images_used_object(selection.images),
        "preprocessing": preprocessing_object(selection.preprocessing),
        "analysed": selection.analysed,
        "chosen_channels": selection.choice.chosen,
        "layers": [_layer(scores, choice) for scores, choice in pairs],
        "unread": [{"layer": part.name, "reason": part.reason} for part in selection.choice.unread],
        "warnings": list(selection.warnings),
    }


def _layer(scores: SiteScores, choice: SiteChoice) -> dict[str, Any]:
    return {
        "name": scores.name,
        "kind": scores.kind,
        "reads": scores.reads.value,
        "status": choice.verdict.value,
        "channels": scores.channels,
        "mean": number_value(choice.mean),
        "std": number_value(choice.std),
        "threshold": number_value(choice.threshold),
        "chosen": [
            {"index": k, "score": number_value(scores.scores[k]), "z": number_value(z)}
            for k, z in zip(choice.channels, choice.z, strict=True)
        ],
        "mirrored": list(choice.mirrored),
        "unscored": list(choice.unscored),
        "scores": [number_value(score) for score in scores.scores],
    }
