"""Graph → Trace: for every value, which linear operators its channels come from, and by which factors.

The bound of a channel is that of the operators it is made of. A trace writes this down as a small expression, one
*source* per step, each built of earlier ones, so that all are evaluated in one sweep:

* ``Produced``: the channels of a linear operator, σ_max(A_k) each;
* ``Scaled``: a source times |γ|/√(var + ε) of a BatchNormalization, or times a constant;
* ``Summed``: √(a² + b²) of the channels of two sources (Add);
* ``Joined``: the channels of sources one after the other (Concat);
* ``Picked``: some channels of a source, in another order (Split, Slice, Gather, channel shuffle).

Activations of Lipschitz constant 1 at most and pooling leave the bound as it is. Whatever else a value comes from
makes it *lost*, with the operator that lost it named. The walk is one pass in topological order: linear in the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

from onnx_clp.model.constants import Constants, slices
from onnx_clp.model.graph import MISSING, Graph, Node
from onnx_clp.model.tensors import PayloadError
from onnx_clp.operators import channel_count, linear

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Produced:
    """The channels of a linear operator."""

    node: Node


@dataclass(frozen=True, slots=True, eq=False)
class Scaled:
    """A source times per-channel factors: of the BatchNormalization ``node``, or the value ``constant``.

    ``axis`` is that of the channels in the constant, counted from its end; 0 where it is one number for all.
    """

    source: int
    node: Node
    constant: int = MISSING
    axis: int = 0
    divides: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Summed:
    """The sum of sources with the same channels."""

    sources: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """Sources whose channels follow each other."""

    sources: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Picked:
    """The channels ``indices`` of a source."""

    source: int
    indices: Indices


Source = Produced | Scaled | Summed | Joined | Picked


@dataclass(frozen=True, slots=True)
class Flow:
    """How a value carries channels.

    Attributes:
        source: Index of the source in the trace.
        sizes: Extents of the axes that the channels lie on; one, but for a channel shuffle half done.
        axes: Those axes. A single -1 is the last axis of a value whose rank is not known.
    """

    source: int
    sizes: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def channels(self) -> int:
        """Number of channels."""
        return math.prod(self.sizes)

    @property
    def axis(self) -> int | None:
        """The one axis of the channels; None in the middle of a channel shuffle."""
        return self.axes[0] if len(self.axes) == 1 else None


@dataclass(frozen=True, slots=True)
class Lost:
    """A value whose channels cannot be traced.

    Attributes:
        operator: The operator (or input) that lost them.
        refusal: What is wrong with its weight, where it is a linear operator.
    """

    operator: str
    refusal: PayloadError | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """What one pass over the graph found.

    Attributes:
        sources: In an order in which each is built of earlier ones.
        flows: By value; constants and values never made are absent.
        pooled: Values that are globally pooled and nothing but channels since.
        ranks: Number of dimensions, where known.
        refused: Linear operators whose weight is not known, by node index, with the reason.
    """

    sources: tuple[Source, ...]
    flows: Mapping[int, Flow | Lost]
    pooled: frozenset[int]
    ranks: Mapping[int, int]
    refused: Mapping[int, PayloadError]


_ONE_LIPSCHITZ: Final = frozenset(
    """Identity Cast Dropout Relu Clip Sigmoid Tanh Softplus Softsign Abs Neg MaxPool AveragePool GlobalAveragePool
    GlobalMaxPool Resize Upsample QuantizeLinear DequantizeLinear""".split()
)
"""Operators that keep the channels where they are and make no difference larger (rounding aside)."""

_SLOPES: Final = MappingProxyType({"LeakyRelu": 0.01, "Elu": 1.0, "Celu": 1.0, "HardSigmoid": 0.2})
"""Activations whose Lipschitz constant is max(1, alpha) (HardSigmoid: alpha), with ONNX's default alpha."""

_ELEMENTWISE: Final = frozenset("Add Sub Mul Div Sum Pow Min Max Mean PRelu Where".split())
_RANK_KEEPING: Final = _ONE_LIPSCHITZ | frozenset(
    """LeakyRelu Elu Celu HardSigmoid Selu HardSwish Gelu Mish Swish ThresholdedRelu Exp Log Sqrt Softmax LogSoftmax
    BatchNormalization InstanceNormalization LayerNormalization GroupNormalization LpNormalization LRN Pad Conv
    ConvTranspose ConvInteger QLinearConv DeformConv FusedConv Split Slice Concat Erf""".split()
)


def is_inference_batch_normalization(node: Node) -> bool:
    """Whether ``node`` is a BatchNormalization of the default domain that normalises by its stored statistics."""
    return node.standard and node.op_type == "BatchNormalization" and training_reason(node) is None


def training_reason(node: Node) -> str | None:
    """Why the BatchNormalization ``node`` does not run by its stored statistics; None where it does.

    ``training_mode`` from version 14 on; more than one output in versions 7 and 9; no ``is_test`` in versions 1 and 6.
    """
    if node.opset >= 14:
        return "training_mode is 1" if node.integer("training_mode", 0) else None
    if node.opset >= 7:
        extra = any(value != MISSING for value in node.outputs[1:])
        return "its statistics are outputs, as in training" if extra else None
    return None if node.integer("is_test", 0) else "is_test is 0"


def channel_axis(node: Node, flow: Flow, rank: int | None, shape: tuple[int, ...]) -> int | None:
    """The axis, counted from the end, along which a constant of ``shape`` has a slice for each channel of ``flow``.

    ``node`` is the binary operator that reads both. 0 where the constant is one number for all channels; None where it
    broadcasts in another way.
    """
    if math.prod(shape) == 1:
        return 0
    if flow.axis is None or (rank is None and flow.axis != -1):
        return None
    if "axis" in node.attributes and flow.axis >= 0:  # up to opset 6 a constant says where it is laid against the data
        axis = flow.axis - node.integer("axis", 0) - len(shape)
        return axis if -len(shape) <= axis < 0 and shape[axis] == flow.channels else None
    axis = flow.axis if rank is None or flow.axis < 0 else flow.axis - rank
    if len(shape) < -axis or (rank is not None and len(shape) > rank):
        return None
    return axis if shape[axis] == flow.channels else None


class _Tracer:
    """The pass. Each method named after operators gives the flow of the node's outputs."""

    def __init__(self, graph: Graph, constants: Constants) -> None:
        self.graph = graph
        self.constants = constants
        self.sources: list[Source] = []
        self.flows: dict[int, Flow | Lost] = {}
        self.pooled: set[int] = set()
        self.refused: dict[int, PayloadError] = {}
        self.ranks: dict[int, int] = {value: len(shape) for value, shape in graph.shapes.items()}

    def run(self) -> Trace:
        for node in self.graph.nodes:
            self._rank(node)
            if self._is_pooled(node):
                self.pooled.update(value for value in node.outputs if value != MISSING)
            flows = self._flows(node)
            for value, flow in zip(node.outputs, flows, strict=False):
                if value != MISSING and self.constants.get(value) is None:
                    self.flows[value] = flow
        return Trace(tuple(self.sources), self.flows, frozenset(self.pooled), self.ranks, self.refused)

    def add(self, source: Source) -> int:
        self.sources.append(source)
        return len(self.sources) - 1

    def flow(self, value: int) -> Flow | Lost:
        if value in self.flows:
            return self.flows[value]
        if value == MISSING:
            return Lost("an input left out")
        if self.constants.get(value) is not None:
            return Lost("a constant")
        return Lost("a graph input" if value in self.graph.inputs else "a value without a known origin")

    def rank(self, value: int) -> int | None:
        shape = self.constants.shape(value)
        return len(shape) if shape is not None else self.ranks.get(value)

    # -- what a node does to channels ------------------------------------------------------------------------------

    def _flows(self, node: Node) -> Sequence[Flow | Lost]:
        lost = Lost(f"{node.domain}.{node.op_type}" if node.domain else node.op_type)
        if linear(node) is not None:
            return self._produced(node, lost)
        if not node.standard or not node.inputs:
            return [lost] * len(node.outputs)
        if node.op_type in {"Concat", "Add", "Sub", "Sum", "Mul", "Div"}:
            return [{"Concat": self._concat, "Mul": self._mul, "Div": self._mul}.get(node.op_type, self._sum)(node, lost)]
        flow = self.flow(node.inputs[0])
        if isinstance(flow, Lost):
            return [flow] * len(node.outputs)
        if node.op_type in _ONE_LIPSCHITZ:
            return [flow]
        if node.op_type in _SLOPES:
            return [flow if abs(node.number("alpha", _SLOPES[node.op_type])) <= 1 else lost]
        handler = _HANDLERS.get(node.op_type)
        return handler(self, node, flow, lost) if handler else [lost] * len(node.outputs)

    def _produced(self, node: Node, lost: Lost) -> Sequence[Flow | Lost]:
        description = linear(node)
        assert description is not None
        value = node.input(description.weight)
        shape = self.constants.shape(value)
        try:
            if shape is None:
                raise self.constants.refusal(value)
            channels = channel_count(node, shape)
        except PayloadError as error:
            self.refused[node.index] = error
            return [replace(lost, refusal=error)]
        axis = 1
        if not description.convolves:
            rank = self.rank(node.inputs[0])
            axis = -1 if rank is None else rank - 1
            if rank is None and node.op_type == "Gemm":
                axis = 1
        source = self.add(Produced(node))
        if node.op_type == "FusedConv" and node.input(3) != MISSING:
            other = self.flow(node.input(3))
            if isinstance(other, Lost) or other.sizes != (channels,):
                return [other if isinstance(other, Lost) else lost]
            source = self.add(Summed((source, other.source)))
        return [Flow(source, (channels,), (axis,))]

    def _sum(self, node: Node, lost: Lost) -> Flow | Lost:
        """Add, Sub and Sum: constants do not change a difference, sources add up."""
        flows = [(value, self.flow(value)) for value in node.inputs if self.constants.get(value) is None]
        first = flows[0][1] if flows else lost
        for _, flow in flows:
            if isinstance(flow, Lost):
                return flow
            if isinstance(first, Lost) or (flow.sizes, flow.axes) != (first.sizes, first.axes):
                return lost
        if isinstance(first, Lost):
            return first
        for value in node.inputs:
            shape = self.constants.shape(value)
            if shape is not None and channel_axis(node, first, self.rank(flows[0][0]), shape) is None:
                return lost
        if len(flows) == 1:
            return first
        return replace(first, source=self.add(Summed(tuple(flow.source for _, flow in flows if isinstance(flow, Flow)))))

    def _mul(self, node: Node, lost: Lost) -> Flow | Lost:
        """Mul and Div by a constant, or by the run-time scale of a dynamically quantised input."""
        if len(node.inputs) != 2:
            return lost
        for position in (0, 1):
            value, factor = node.inputs[position], node.inputs[1 - position]
            flow = self.flow(value)
            if isinstance(flow, Lost) or (node.op_type == "Div" and position == 1):
                continue
            shape = self.constants.shape(factor)
            if shape is None and node.op_type == "Mul":
                scale = self.dynamic_scale(factor)
                if scale == MISSING:
                    return flow
                if scale is not None:
                    factor, shape = scale, self.constants.shape(scale)
            if shape is not None:
                axis = channel_axis(node, flow, self.rank(value), shape)
                if axis is None:
                    return lost
                return replace(flow, source=self.add(Scaled(flow.source, node, factor, axis, node.op_type == "Div")))
        given = [flow for flow in map(self.flow, node.inputs) if isinstance(flow, Lost) and flow.operator != "a constant"]
        return given[0] if len(given) == 2 else lost

    def dynamic_scale(self, value: int) -> int | None:
        """The constant weight scale in ``value`` = (scale of DynamicQuantizeLinear) · constant.

        MISSING where there is none to multiply with; None where ``value`` is something else. The input's own scale
        belongs to the input: the integer input times it is the real one.
        """
        node = self.graph.producers.get(value)
        if node is None or not node.standard:
            return None
        if node.op_type == "DynamicQuantizeLinear":
            return MISSING if value == node.outputs[1] else None
        if node.op_type != "Mul" or len(node.inputs) != 2:
            return None
        for dynamic, constant in (node.inputs, node.inputs[::-1]):
            maker = self.graph.producers.get(dynamic)
            if maker is not None and maker.op_type == "DynamicQuantizeLinear" and self.constants.get(constant) is not None:
                return constant
        return None

    def _concat(self, node: Node, lost: Lost) -> Flow | Lost:
        flows: list[Flow] = []
        for value in node.inputs:
            flow = self.flow(value)
            if isinstance(flow, Lost):
                return flow
            flows.append(flow)
        rank = self.rank(node.inputs[0])
        axis = node.integer("axis", 1 if node.opset < 4 else 0)
        if axis < 0 and rank is not None:
            axis += rank
        if any(flow.axes != (axis,) for flow in flows):
            return lost
        source = self.add(Joined(tuple(flow.source for flow in flows)))
        return Flow(source, (sum(flow.channels for flow in flows),), (axis,))

    def _batch_normalization(self, node: Node, flow: Flow, lost: Lost) -> Sequence[Flow | Lost]:
        shape = self.constants.shape(node.input(1))
        if not is_inference_batch_normalization(node) or shape != (flow.channels,) or flow.axis not in {1, -1}:
            return [lost]
        return [Flow(self.add(Scaled(flow.source, node)), flow.sizes, (1,))]

    def _prelu(self, node: Node, flow: Flow, lost: Lost) -> Sequence[Flow | Lost]:
        slope = self.constants.small(node.input(1))
        return [flow if slope is not None and bool(np.all(np.abs(slope) <= 1)) else lost]

    def _squeeze(self, node: Node, flow: Flow, lost: Lost) -> Sequence[Flow | Lost]:
        axes, rank = self._given_axes(node), self.rank(node.inputs[0])
        if rank is None or flow.axis is None or flow.axis < 0 or axes is None:
            return [lost]
        removed = {axis % rank for axis in axes}
        if flow.axis in removed:
            return [lost]
        return [replace(flow, axes=(flow.axis - sum(axis < flow.axis for axis in removed),))]

    def _unsqueeze(self, node: Node, flow: Flow, lost: Lost) -> Sequence[Flow | Lost]:
        axes, rank = self._given_axes(node), self.rank(node.inputs[0])
        if rank is None or flow.axis is None or flow.axis < 0 or axes is None:
            return [lost]
        added = {axis % (rank + len(axes)) for axis in axes}
        kept = [axis for axis in range(rank + len(axes)) if axis not in added]
        return [replace(flow, axes=(kept[flow.axis],))]

    def _given_axes(self, node: Node) -> tuple[int, ...] | None:
        axes = node.integers("axes")
        if axes is None and node.input(1) != MISSING:
            array = self.constants.small(node.input(1))
            axes = None if array is None else tuple(int(axis) for axis in array.ravel())
        return axes

    def _split(self, node: Node, flow: Flow, lost: Lost) -> Sequence[Flow | Lost]:
        rank = self.rank(node.inputs[0])
        axis = node.integer("axis", 0)
        if axis < 0 and rank is not None:
            axis += rank
        if axis not in flow.axes:
            return [flow if axis >= 0 else lost] * len(node.outputs)
        if flow.axis is None:
            return [lost] * len(node.outputs)
        sizes = node.integers("split")
        if sizes is None and node.input(1) != MISSING:
            array = self.constants.small(node.input(1))
            if array is None:
                return [lost] * len(node.outputs)
            sizes = tuple(int(size) for size in array.ravel())
        if sizes is None:
            each = -(-flow.channels // len(node.outputs))
            sizes = tuple(min(each, flow.channels - each * position) for position in range(len(node.outputs)))
        if sum(sizes) != flow.channels or min(sizes) < 0 or len(sizes) != len(node.outputs):
            return [lost] * len(node.outputs)
        ends = np.cumsum(sizes)
        return [
            replace(flow, source=self.add(Picked(flow.source, np.arange(end - size, end))), sizes=(size,))
            for size, end in zip(sizes, ends, strict=True)
        ]

    def _slice(self, node: Node, flow: Flow, lost: Lost) -> Sequence[Flow | Lost]:
        rank = self.rank(node.inputs[0])
        operands = [None, *(self.constants.small(value) for value in node.inputs[1:])]
        try:
            taken = slices(node, operands, rank or 0)
        except ValueError:
            # Which axes it takes may be known though the bounds are not.
            axes = self.constants.small(node.input(3))
            elsewhere = axes is not None and not {int(axis) % (rank or 1 << 30) for axis in axes.ravel()} & set(flow.axes)
            return [flow if elsewhere and rank else lost]
        if not set(taken) & set(flow.axes):
            return [flow if rank is not None or min(taken) >= 0 else lost]
        if flow.axis is None or rank is None:
            return [lost]
        indices = np.arange(flow.channels)[taken[flow.axis]]
        return [replace(flow, source=self.add(Picked(flow.source, indices)), sizes=(len(indices),))]

    def _gather(self, node: Node, flow: Flow, lost: Lost) -> Sequence[Flow | Lost]:
        rank, indices = self.rank(node.inputs[0]), self.constants.small(node.input(1))
        axis = node.integer("axis", 0)
        axis += rank if axis < 0 and rank is not None else 0
        if indices is None or indices.ndim != 1 or flow.axis is None or axis < 0:
            return [lost]
        if axis != flow.axis:
            return [flow]
        picked = indices.astype(np.int64)
        if np.any(picked < -flow.channels) or np.any(picked >= flow.channels):
            return [lost]
        source = self.add(Picked(flow.source, picked % flow.channels))
        return [replace(flow, source=source, sizes=(len(picked),))]

    def _pad(self, node: Node, flow: Flow, lost: Lost) -> Sequence[Flow | Lost]:
        """Padding of other axes than the channels'."""
        rank = self.rank(node.inputs[0])
        pads = node.integers("pads") or node.integers("paddings")
        if pads is None:
            array = self.constants.small(node.input(1))
            pads = None if array is None else tuple(int(pad) for pad in array.ravel())
        if pads is None or rank is None or len(pads) != 2 * rank or node.input(3) != MISSING:
            return [lost]
        return [lost if any(pads[axis] or pads[axis + rank] for axis in flow.axes) else flow]

    def _transpose(self, node: Node, flow: Flow, lost: Lost) -> Sequence[Flow | Lost]:
        rank = self.rank(node.inputs[0])
        permutation = node.integers("perm") or (tuple(range(rank))[::-1] if rank is not None else None)
        if permutation is None or sorted(permutation) != list(range(len(permutation))):
            return [lost]
        axes = tuple(axis % len(permutation) for axis in flow.axes)
        order = sorted(range(len(axes)), key=lambda position: permutation.index(axes[position]))
        source = flow.source
        if order != sorted(order):
            indices = np.arange(flow.channels).reshape(flow.sizes).transpose(order).ravel()
            source = self.add(Picked(source, indices))
        return [
            Flow(
                source,
                tuple(flow.sizes[position] for position in order),
                tuple(permutation.index(axes[position]) for position in order),
            )
        ]

    def _reshape(self, node: Node, flow: Flow, lost: Lost) -> Sequence[Flow | Lost]:
        """A channel axis split in several, several joined again, or pooled channels in another form."""
        target = self.reshape_target(node)
        if target is None or flow.axes[0] == -1:
            return [lost]
        if node.inputs[0] in self.pooled:
            axes = [axis for axis, size in enumerate(target) if size == flow.channels]
            return [Flow(flow.source, (flow.channels,), (axes[0],)) if len(axes) == 1 else lost]
        first = flow.axes[0]
        if flow.axes != tuple(range(first, first + len(flow.axes))) or len(target) <= first or first != 1:
            return [lost]
        # Batch before, channels next, positions after: the leading extents that multiply to the channels are theirs.
        sizes: list[int] = []
        for size in target[1:]:
            resolved = flow.channels // max(1, math.prod(sizes)) if size in {-1, 0} and not sizes else size
            if resolved is None or resolved < 1 or (math.prod(sizes) * resolved > flow.channels):
                break
            sizes.append(resolved)
            if math.prod(sizes) == flow.channels:
                rest = target[1 + len(sizes) :]
                known_batch = target[0] in {0, None, -1} or self._batch(node.inputs[0]) in {None, target[0]}
                if known_batch and self._spatial_kept(node, rest, len(flow.axes)):
                    return [Flow(flow.source, tuple(sizes), tuple(range(1, 1 + len(sizes))))]
                break
        return [lost]

    def _batch(self, value: int) -> int | None:
        shape = self.graph.shapes.get(value)
        return shape[0] if shape else None

    def _spatial_kept(self, node: Node, rest: Sequence[int | None], channel_axes: int) -> bool:
        """Whether what follows the channels in the target can be the positions alone."""
        shape = self.graph.shapes.get(node.inputs[0])
        positions = None if shape is None else shape[1 + channel_axes :]
        if positions is None or None in positions or None in rest or -1 in rest or 0 in rest:
            return True
        return math.prod(size for size in positions if size) == math.prod(size for size in rest if size)

    def reshape_target(self, node: Node) -> tuple[int | None, ...] | None:
        """The target of a Reshape, None for an extent known only at run time."""
        given = node.integers("shape")
        if given is not None:
            return tuple(given)
        value = node.input(1)
        array = self.constants.small(value)
        if array is not None:
            return tuple(int(size) for size in array.ravel())
        maker = self.graph.producers.get(value)
        if maker is None or maker.op_type != "Concat":
            return None
        entries: list[int | None] = []
        for piece in maker.inputs:
            part = self.constants.small(piece)
            entries += [None] if part is None else [int(size) for size in part.ravel()]
        return tuple(entries)

    def _flatten(self, node: Node, flow: Flow, lost: Lost) -> Sequence[Flow | Lost]:
        pooled = node.inputs[0] in self.pooled and flow.axis == 1 and node.integer("axis", 1) == 1
        return [flow if pooled else lost]

    # -- what a node does to ranks, and whether its output is globally pooled -----------------------------------------

    def _rank(self, node: Node) -> None:
        if not node.outputs or node.outputs[0] in self.ranks or not node.inputs:
            return
        ranks = [self.rank(value) for value in node.inputs if value != MISSING]
        rank: int | None = None
        if node.op_type in _RANK_KEEPING:
            rank = ranks[0]
            description = linear(node)
            if rank is None and description is not None:
                shape = self.constants.shape(node.input(description.weight))
                rank = None if shape is None else len(shape)
        elif node.op_type in _ELEMENTWISE:
            rank = max((known for known in ranks if known is not None), default=None) if None not in ranks else None
        elif node.op_type == "MatMul":
            rank = max(ranks) if None not in ranks and min(ranks, default=0) >= 2 else None  # type: ignore[type-var]
        elif node.op_type in {"Gemm", "Flatten"}:
            rank = 2
        elif node.op_type == "Transpose":
            permutation = node.integers("perm")
            rank = len(permutation) if permutation is not None else ranks[0]
        elif node.op_type == "Reshape":
            target = self.reshape_target(node)
            rank = None if target is None else len(target)
        elif node.op_type in {"Squeeze", "Unsqueeze"}:
            axes = self._given_axes(node)
            if axes is not None and ranks[0] is not None:
                rank = ranks[0] + (len(axes) if node.op_type == "Unsqueeze" else -len(axes))
        elif node.op_type.startswith("Reduce"):
            axes = self._given_axes(node)
            if node.integer("keepdims", 1):
                rank = ranks[0]
            elif axes is not None and ranks[0] is not None:
                rank = ranks[0] - len(axes)
        if rank is not None:
            for value in node.outputs:
                if value != MISSING:
                    self.ranks.setdefault(value, rank)

    def _is_pooled(self, node: Node) -> bool:
        if not node.standard or not node.inputs or not node.outputs:
            return False
        if node.op_type in {"GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"}:
            return True
        if node.op_type in {"ReduceMean", "ReduceMax", "ReduceSum"}:
            axes, rank = self._given_axes(node), self.rank(node.inputs[0])
            if axes is None:
                return False
            if rank is None:
                return set(axes) in ({2, 3}, {-1, -2}, {2}, {2, 3, 4})
            return rank >= 3 and {axis % rank for axis in axes} == set(range(2, rank))
        if node.op_type in {"AveragePool", "MaxPool"}:
            shape = self.graph.shapes.get(node.outputs[0], ())
            return len(shape) >= 3 and set(shape[2:]) == {1}
        if node.op_type in {"Resize", "Upsample", "Expand", "Tile", "Pad", "ConvTranspose", "Shape"}:
            return False
        given = [value for value in node.inputs if value != MISSING and self.constants.get(value) is None]
        return bool(given) and all(value in self.pooled for value in given)


_HANDLERS: Final[Mapping[str, Callable[[_Tracer, Node, Flow, Lost], Sequence[Flow | Lost]]]] = MappingProxyType(
    {
        "BatchNormalization": _Tracer._batch_normalization,  # noqa: SLF001
        "Flatten": _Tracer._flatten,  # noqa: SLF001
        "Gather": _Tracer._gather,  # noqa: SLF001
        "PRelu": _Tracer._prelu,  # noqa: SLF001
        "Pad": _Tracer._pad,  # noqa: SLF001
        "Reshape": _Tracer._reshape,  # noqa: SLF001
        "Slice": _Tracer._slice,  # noqa: SLF001
        "Split": _Tracer._split,  # noqa: SLF001
        "Squeeze": _Tracer._squeeze,  # noqa: SLF001
        "Transpose": _Tracer._transpose,  # noqa: SLF001
        "Unsqueeze": _Tracer._unsqueeze,  # noqa: SLF001
    }
)


def trace(graph: Graph, constants: Constants) -> Trace:
    """Trace every value of ``graph``; never fails, what cannot be traced is Lost."""
    return _Tracer(graph, constants).run()
