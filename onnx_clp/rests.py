"""Where a silenced channel rests: at 0, at the bias of its normalisation, or at the mean of its output.

A BatchNormalization gives γ_k·(φ_k − μ_k)/σ_k + β_k. With γ_k = β_k = 0, as CLP is published, the channel rests at 0;
with γ_k = 0 alone, as EP and BNP are, at β_k. Where the normalisation is folded into a convolution, what is left of β_k
is one bias, β_k + (b_k − μ_k)·γ_k/σ_k, where setting the kernel alone to zero would leave the channel. The mean of its
output is γ_k·(mean of φ_k − μ_k)/σ_k + β_k: it is β_k on images with the mean of the training set, and is taken in its
place where images tell it.

Whatever makes a channel silent is zero as for CLP; the last constant that is added takes the rest, divided by what that
is multiplied by on its way to the site's value (see `recipe`). Where no constant can take it, the channel rests at 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from onnx_clp.analysis import Analysis
from onnx_clp.correction.recipe import recipe
from onnx_clp.errors import PayloadError
from onnx_clp.model.knob import Wanted, silencing

Floats = npt.NDArray[np.float64]

_BATCH_NORMALIZATION: Final = "BatchNormalization"


@dataclass(frozen=True, slots=True, eq=False)
class Rest:
    """What the silenced channels of a site become.

    Attributes:
        kind: ``zero``, ``bias`` (β) or ``mean`` (of the output on images).
        values: float64 (channels,), for every channel of the site; None where they become 0, or the zero point.
        why: Why they become 0 though their bias was to be kept; empty where it was not, or is.
    """

    kind: str = "zero"
    values: Floats | None = None
    why: str = ""


AT_ZERO: Final = Rest()


def kept_bias(analysis: Analysis, position: int, means: Mapping[int, Floats]) -> Rest:
    """Where silenced channels of a site rest if their bias is kept.

    Args:
        analysis: Of the model, its file open.
        position: Of the site in ``Analysis.measured``.
        means: Of outputs on images, float64 (channels,), for sites without a BatchNormalization of their own, likewise.
    """
    site = analysis.measured[position].site
    found = recipe(site, analysis.graph, analysis.constants)
    if isinstance(found, str):
        return Rest(why=found)
    if site.node.op_type == _BATCH_NORMALIZATION:
        try:
            return Rest("bias", np.asarray(analysis.constants.array(site.node.inputs[2]), np.float64))
        except PayloadError as error:
            return Rest(why=error.message)
    if position in means:
        return Rest("mean", means[position])
    return Rest(why="its normalisation is folded in: what of its bias is β is known on images alone")


def wanted_of(analysis: Analysis, position: int, channels: Sequence[int], rest: Rest) -> Wanted:
    """What silences ``channels`` of a site; ``rest`` is as `kept_bias` found it, or `AT_ZERO`."""
    site = analysis.measured[position].site
    if rest.values is not None:
        found = recipe(site, analysis.graph, analysis.constants)
        if not isinstance(found, str):
            return found.wanted(None, channels, rest.values)
    return silencing(site.knobs, channels)
