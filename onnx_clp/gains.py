"""Trace → gains: factors per channel that no judged layer counts, and that something trained reads.

A layer is judged by what is multiplied up to its normalisation. A constant that multiplies its channels later, each by
a number of its own, is a gain of the same kind: γ_k in another place. Where no bound holds it, that is said.

Looked at is what acts on the channels of a convolution or BatchNormalization, traced or not, up to the next operator
that mixes them or normalises them by what they are at run time: behind a Gemm or a LayerNormalization, gains for each
channel are what any network has. One number for all channels is no gain, nor are factors that differ by position
alone; neither is what nothing trained reads, such as the decoding of boxes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final

import numpy as np

from onnx_clp.errors import PayloadError
from onnx_clp.flow import Flow, Lost, Scaled, Trace
from onnx_clp.heads import Heads
from onnx_clp.model.constants import Constants
from onnx_clp.model.graph import MISSING, Graph, Node
from onnx_clp.model.tensors import Array
from onnx_clp.operators import linear
from onnx_clp.shapes import Shapes

_MIXING: Final = frozenset(
    """LSTM GRU RNN Einsum Softmax LogSoftmax Shape Size ArgMax ArgMin TopK NonZero NonMaxSuppression
    InstanceNormalization LayerNormalization GroupNormalization LpNormalization MeanVarianceNormalization
    RMSNormalization SimplifiedLayerNormalization SkipLayerNormalization""".split()  # noqa: SIM905  # read as a list
)
"""Operators behind which channels are others, or normalised by what they are at run time."""

_REDUCING: Final = frozenset("GlobalAveragePool GlobalMaxPool ReduceMean ReduceMax ReduceMin ReduceSum".split())  # noqa: SIM905
_MEASURING: Final = frozenset("GlobalLpPool ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSumExp".split())  # noqa: SIM905
_ROOTS: Final = frozenset({"Sqrt", "Reciprocal"})
"""What makes a deviation of a mean, as a Pow by ±½ does, and a Div by the mean."""

_LEVELS: Final = frozenset({"QuantizeLinear", "DequantizeLinear"})
"""Operators that say by themselves on which axis their scales lie."""

_BROADCASTING: Final = frozenset("Add Sub Mul Div Pow Min Max Sum Mean Where".split())  # noqa: SIM905  # as above
"""Operators that give their result as many axes as the longest of what they read has."""

_IN_PLACE: Final = frozenset(
    """Identity Cast Dropout Relu Clip Sigmoid Tanh Softplus Softsign Abs Neg Exp Log Sqrt Reciprocal Erf Floor Ceil
    LeakyRelu Elu Celu HardSigmoid Selu HardSwish Gelu Mish Swish ThresholdedRelu PRelu QuantizeLinear DequantizeLinear
    Add Sub Mul Div Sum Pow Min Max Mean Where MaxPool AveragePool GlobalAveragePool GlobalMaxPool GlobalLpPool Resize
    Upsample Pad Slice Split Concat""".split()  # noqa: SIM905  # likewise
)
"""Operators that leave the channels on their axis."""

ROUNDING: Final = 2.0**-7
"""The relative difference of two factors that are one, rounded to 16 bits."""

STANDING_OUT: Final = 3.0
"""Standard deviations above the mean from which on a slope stands out, as a bound does by default."""

_PASSES: Final = 8
"""What converting, comparing and reducing an array costs, in numbers touched once."""


class Kind(IntEnum):
    """What a value that is made of channels has become: of several the first."""

    CHANNELS = 0
    MEAN = 1
    DEVIATION = 2


@dataclass(frozen=True, slots=True)
class Way:
    """How a value comes from channels.

    Attributes:
        kind: Channels, a mean of them, or a deviation, by which they are normalised.
        axis: Their axis, from the front; None where it is not known.
    """

    kind: Kind = Kind.CHANNELS
    axis: int | None = None


class Gains:
    """The answers for one graph."""

    def __init__(self, graph: Graph, constants: Constants, shapes: Shapes, trace: Trace, heads: Heads) -> None:
        self._graph = graph
        self._constants = constants
        self._shapes = shapes
        self._trace = trace
        self._heads = heads
        self._ways = _ways(graph, constants, shapes)
        self._fixed = _fixed(graph, constants)

    def unjudged(self, node: Node, judged: Collection[int]) -> str | None:
        """Which gain ``node`` brings that no bound holds, in a sentence; None where it brings none.

        ``judged`` are the sources that the bounds are made of.
        """
        if not node.standard or node.index not in self._graph.live:
            return None
        if self._loses_factor(node):
            return "its channels are multiplied by what constants make in a way that is not followed"
        if self._loses_scale(node):
            return "it has not one known scale for all channels: what gain it brings is not judged"
        made = next(iter(node.outputs), MISSING)
        flow = self._trace.flows.get(made)
        counted = (
            isinstance(flow, Flow) and flow.source in judged and isinstance(self._trace.sources[flow.source], Scaled)
        )
        if counted or made not in self._heads.trained_after:
            return None
        if node.op_type == "PRelu":
            return self._slopes(node)
        if self._is_factor(node):
            return "it gives channels a gain of their own, which is no part of a layer that is judged"
        return None

    def _is_factor(self, node: Node) -> bool:
        """Whether constants that differ from channel to channel decide what ``node`` multiplies channels by."""
        first, second = node.input(0), node.input(1)
        if node.op_type in {"Mul", "Div", "Pow"}:
            pairs = [(first, second), (second, first)]
        elif node.op_type in _LEVELS:
            pairs = [(first, second)]
        elif node.op_type == "Where":
            pairs = [(value, constant) for constant in node.inputs for value in self._chosen(node, constant)]
        else:
            return False
        return any(self._acts(node, value, constant) for value, constant in pairs)

    def _chosen(self, node: Node, constant: int) -> tuple[int, ...]:
        """What a Where gives channels of, if ``constant`` decides which: a mask that hides some is no gain."""
        condition, *branches = (node.input(position) for position in range(3))  # a broken one may have fewer
        if constant != condition:
            return (condition,)
        return (branches[0],) if all(value in self._ways for value in branches) else ()

    def _acts(self, node: Node, value: int, constant: int) -> bool:
        way = self._ways.get(value)
        if way is None or way.kind is Kind.DEVIATION or self._constants.get(value) is not None:
            return False
        shape = self._constants.shape(constant)
        if shape is None or max(shape, default=1) == 1:
            return False
        own_axis = node.op_type in _LEVELS or "axis" in node.attributes
        return self._differs(constant, None if own_axis else self._axis_of(value, way))

    def _axis_of(self, value: int, way: Way) -> int | None:
        """The axis on which the channels of ``value`` lie, from its end; None where it is not known."""
        flow, rank = self._trace.flows.get(value), self._shapes.rank(value)
        axis = flow.axis if isinstance(flow, Flow) else way.axis
        if axis is None or (rank is None and axis >= 0):
            return None
        return axis if rank is None or axis < 0 else axis - rank

    def _differs(self, constant: int, axis: int | None) -> bool:
        """Whether the magnitudes of ``constant`` differ along ``axis``, counted from its end, beyond a rounding."""
        try:
            numbers = self._magnitudes(constant)
        except PayloadError:
            return True  # what is not known may differ
        if axis is None:
            numbers = numbers.reshape(1, -1)
            axis = -1
        if -axis > numbers.ndim:
            return False
        high, low = numbers.max(axis, initial=0), numbers.min(axis, initial=np.inf)
        return not bool(np.all(high - low <= ROUNDING * high))  # NaN is within nothing

    def _magnitudes(self, constant: int) -> Array:
        size = int(np.prod(self._constants.shape(constant) or (1,), dtype=object))
        self._constants.meter.fits(2 * np.dtype(np.float64).itemsize * size)
        self._constants.meter.touch(_PASSES * size)
        with np.errstate(all="ignore"):
            return np.abs(self._constants.array(constant).astype(np.float64))

    def _slopes(self, node: Node) -> str | None:
        """A PRelu makes no difference larger where |slope| ≤ 1; some nets have learnt larger ones for all channels."""
        slope = node.input(1)
        if node.input(0) not in self._ways or self._constants.get(slope) is None:
            return None
        try:
            slopes = self._magnitudes(slope).ravel()
        except PayloadError:
            return "its slopes cannot be read: what gain they bring is not judged"
        if slopes.size < 2:
            return None
        with np.errstate(all="ignore"):
            limit = max(1.0, float(slopes.mean() + STANDING_OUT * slopes.std(ddof=1)))
        if bool(np.all(slopes <= limit)):
            return None
        return "a slope above 1 stands out among its channels: the gain it brings is not judged"

    def _loses_factor(self, node: Node) -> bool:
        """Whether ``node`` multiplies channels by what is fixed and not known: no site is left to show that gain."""
        if node.op_type not in {"Mul", "Div", "Pow", "PRelu"}:
            return False
        unknown = [value for value in node.inputs if value in self._fixed]
        if all(set(self._shapes.extents(value) or (0,)) <= {1} for value in unknown):
            return False
        return any(isinstance(self._trace.flows.get(value), Flow) or value in self._ways for value in node.inputs)

    def _loses_scale(self, node: Node) -> bool:
        """Whether ``node`` quantises channels that reach it and are lost in it: no site is left to show its gain."""
        return (
            node.op_type in {"QuantizeLinear", "DequantizeLinear"}
            and isinstance(self._trace.flows.get(node.input(0)), Flow)
            and isinstance(self._trace.flows.get(next(iter(node.outputs), MISSING)), Lost)
        )


def _ways(graph: Graph, constants: Constants, shapes: Shapes) -> Mapping[int, Way]:
    """The values that are made of the channels of a convolution or BatchNormalization and not mixed since."""
    found: dict[int, Way] = {}
    for node in graph.nodes:
        dynamic = "BatchNorm" in node.op_type and any(constants.get(value) is None for value in node.inputs[1:])
        # A BatchNormalization whose parameters are made at run time normalises by what the channels are there.
        way = None if dynamic else _way(node, found, constants)
        if way is not None and node.op_type in _BROADCASTING:
            way = replace(way, axis=_moved(node, way.axis, found, shapes))
        if way is not None:
            # A scale that is found at run time belongs to the input, and is no channel of it.
            for value in node.outputs[: 1 if node.op_type == "DynamicQuantizeLinear" else None]:
                if value != MISSING:
                    found[value] = way
    return found


def _way(node: Node, found: Mapping[int, Way], constants: Constants) -> Way | None:
    """How what ``node`` makes comes from channels, where values come as ``found``; None where it does not."""
    given = [found[value] for value in node.inputs if value in found]
    description = linear(node)
    if description is not None or "BatchNorm" in node.op_type or "Conv" in node.op_type:
        return Way(axis=1) if description is None or description.convolves else None
    if node.carried:
        return Way()  # whatever a round of a loop makes comes back
    if node.op_type in _MIXING or not given:
        return None
    kinds = {way.kind for way in given}
    if node.op_type in {"Mul", "Div"} and Kind.DEVIATION in kinds and len(kinds) > 1:
        return None  # normalised by what the channels are at run time
    kind = min(kinds)
    if node.op_type in _MEASURING or (kind is Kind.MEAN and _is_root(node, found, constants)):
        kind = Kind.DEVIATION
    elif node.op_type in _REDUCING:
        kind = max(kind, Kind.MEAN)
    return Way(kind, _axis(node, given))


def _is_root(node: Node, found: Mapping[int, Way], constants: Constants) -> bool:
    """Whether ``node`` makes a deviation of the mean that it reads: a mean divided by a number is a mean."""
    if node.op_type == "Div":
        return node.input(0) not in found and node.input(1) in found
    if node.op_type == "Pow":
        exponent = constants.small(node.input(1)) if node.input(1) != MISSING else None
        return exponent is not None and bool(np.all(np.abs(exponent) == 0.5))
    return node.op_type in _ROOTS


def _moved(node: Node, axis: int | None, found: Mapping[int, Way], shapes: Shapes) -> int | None:
    """``axis`` of the channels that ``node`` reads, in what it makes: other operands may bring axes in front."""
    ranks = {shapes.rank(value) for value in node.inputs if value in found}
    made = shapes.rank(next(iter(node.outputs), MISSING))
    (rank,) = ranks if len(ranks) == 1 else (None,)
    if axis is None or rank is None or made is None:
        return axis
    return axis + made - rank


def _axis(node: Node, given: Sequence[Way]) -> int | None:
    """The axis of the channels in what ``node`` makes; None where it is not known."""
    axes = {way.axis for way in given}
    axis = axes.pop() if len(axes) == 1 else None
    if node.op_type == "Transpose" and axis is not None:
        permutation = node.integers("perm") or ()
        return permutation.index(axis) if axis in permutation else None
    kept = node.op_type in _IN_PLACE or (node.op_type.startswith("Reduce") and node.integer("keepdims", 1))
    return axis if kept else None


def _fixed(graph: Graph, constants: Constants) -> frozenset[int]:
    """The values that are made of constants alone and are none here, since what makes them is not followed."""
    found: set[int] = set()
    for node in graph.nodes:
        given = [value for value in node.inputs if value != MISSING]
        if given and not node.carried and all(constants.get(value) is not None or value in found for value in given):
            found.update(value for value in node.outputs if value != MISSING and constants.get(value) is None)
    return frozenset(found)
