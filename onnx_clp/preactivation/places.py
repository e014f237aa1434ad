"""Analysis → where the pre-activations of each site can be read, and which sites have none that can.

A BatchNormalization reads them: its input, a sum in a pre-activation network, is φ_k, and its constants are β, μ_run
and σ_run². Where it is folded into a convolution, or spelled out as a Mul and an Add, only what comes out of it is
known to be there, γ_k·(φ_k − μ_run)/σ_run + β_k:

* EP reads that. Scale and shift fall out when it is standardised. The sign of γ_k does not: where it was negative, the
  largest output is the smallest φ_k. Both ends are therefore read; see ``mirrored`` of `SiteScores`.
* BNP does not. The running statistics went into the weights: any mean and variance could have been theirs.

A convolution that never had a normalisation looks the same. Its output is its pre-activation, and EP reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_clp.analysis import Analysis
from onnx_clp.errors import PayloadError
from onnx_clp.evaluation.changes import Watched
from onnx_clp.model.constants import Constants
from onnx_clp.model.graph import MISSING, Graph
from onnx_clp.preactivation.scores import Method, Reads, Unread
from onnx_clp.sites import Site

Floats = npt.NDArray[np.float64]

_BATCH_NORMALIZATION = "BatchNormalization"


@dataclass(frozen=True, slots=True, eq=False)
class Normalisation:
    """The constants of a BatchNormalization that the methods use, float64 (channels,) each."""

    beta: Floats
    running_mean: Floats
    running_variance: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A site, the value to read, and the constants of its BatchNormalization; None where that is folded in.

    ``position`` is the site's, in ``Analysis.measured``.
    """

    position: int
    watched: Watched
    normalisation: Normalisation | None

    @property
    def reads(self) -> Reads:
        """What the value is."""
        return Reads.OUTPUT if self.normalisation is None else Reads.INPUT


def find_places(analysis: Analysis, method: Method) -> tuple[tuple[Place, ...], tuple[Unread, ...]]:
    """The sites whose pre-activations can be read for ``method``, and the others; the analysis's file is open."""
    places, unread = [], []
    for position, (part, layer) in enumerate(zip(analysis.measured, analysis.report.layers, strict=True)):
        site = part.site
        normalises = site.node.op_type == _BATCH_NORMALIZATION
        value, axis = (site.node.inputs[0], 1) if normalises else (site.output, site.axis)
        reason = _hidden(site, method) or _out_of_reach(value, analysis.graph)
        try:
            normalisation = _constants(site, analysis.constants) if normalises and not reason else None
        except PayloadError as error:
            reason = error.message
        if reason:
            unread.append(Unread(layer.name, reason))
        else:
            places.append(Place(position, Watched(layer, analysis.graph.name_of(value), axis), normalisation))
    return tuple(places), tuple(unread)


def _hidden(site: Site, method: Method) -> str:
    """Why no value of the graph is what ``method`` looks at; empty where one is."""
    node = site.node
    if node.op_type == _BATCH_NORMALIZATION:
        return ""
    if method is Method.BNP:
        return f"the running statistics, which BNP compares with, are in no constant of a {node.op_type}"
    if site.output == MISSING:
        return f"the output of its {node.op_type} is not that of the channels alone"
    if node.text("activation", ""):
        return f"its {node.op_type} has an activation in it: what comes before that is no value of the graph"
    if node.op_type == "QLinearConv":
        return "its output has 8 bits: 256 steps show no distribution in hundredths of a standard deviation"
    return ""


def _out_of_reach(value: int, graph: Graph) -> str:
    """Why onnxruntime cannot show a value; empty where it can."""
    maker = graph.producers.get(value)
    if maker is None or maker.layout is None or not maker.layout.in_main_graph:
        return "it is in a subgraph or a function, whose values are no outputs"
    return ""


def _constants(site: Site, constants: Constants) -> Normalisation:
    """Raises PayloadError where one cannot be read."""
    beta, mean, variance = (
        np.asarray(constants.array(site.node.inputs[position]), np.float64) for position in (2, 3, 4)
    )
    return Normalisation(beta, mean, variance)
