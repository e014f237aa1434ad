"""What several JSON reports hold: numbers, images, preprocessing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx_clp.evaluation.attack import Preprocessing
    from onnx_clp.evaluation.figures import ImagesUsed


def number_value(value: float) -> float | str:
    """A number as JSON can hold it."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def images_used_object(images: ImagesUsed) -> dict[str, Any]:
    """Images without labels as a JSON object."""
    return {
        "path": images.path,
        "kind": images.kind,
        "used": images.used,
        "count": images.count,
        "available": images.available,
        "seed": images.seed,
    }


def preprocessing_object(made: Preprocessing) -> dict[str, Any]:
    """How images become inputs as a JSON object."""
    return {
        "size": list(made.size),
        "channels": made.channels,
        "layout": made.layout,
        "range": list(made.value_range),
        "mean": list(made.mean),
        "std": list(made.std),
        "resize": made.resize,
    }
