"""Graph → Shapes: how many dimensions each value has, and which values are globally pooled.

No full shape inference: what a trace of channels needs and no more. Declared shapes are believed, the rest follows from
the operators, in one pass in topological order.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from onnx_clp.model.constants import Constants
from onnx_clp.model.graph import MISSING, Graph, Node
from onnx_clp.model.tensors import AXES_LIMIT
from onnx_clp.operators import linear

_RANK_KEEPING: Final = frozenset(
    """Identity Cast Dropout Relu Clip Sigmoid Tanh Softplus Softsign Abs Neg Exp Log Sqrt Erf Softmax LogSoftmax
    LeakyRelu Elu Celu HardSigmoid Selu HardSwish Gelu Mish Swish ThresholdedRelu
    QuantizeLinear DequantizeLinear DynamicQuantizeLinear
    MaxPool AveragePool GlobalAveragePool GlobalMaxPool Resize Upsample Pad Split Slice Concat
    BatchNormalization InstanceNormalization LayerNormalization GroupNormalization LpNormalization LRN
    Conv ConvTranspose ConvInteger QLinearConv DeformConv FusedConv""".split()  # noqa: SIM905  # read as a list
)
_ELEMENTWISE: Final = frozenset({"Add", "Sub", "Mul", "Div", "Sum", "Pow", "Min", "Max", "Mean", "PRelu", "Where"})
_FIXED_RANKS: Final = MappingProxyType({"Gemm": 2, "Flatten": 2, "Shape": 1, "Range": 1, "Size": 0})
_GLOBAL_POOLS: Final = frozenset({"GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"})
_REDUCTIONS: Final = frozenset({"ReduceMean", "ReduceMax", "ReduceSum"})
_SPREADING: Final = frozenset({"Resize", "Upsample", "Expand", "Tile", "Pad", "ConvTranspose", "Shape"})
"""Operators that can make many positions of one, or of which no channel comes out."""

LEAST_SPATIAL_RANK: Final = 3
"""Batch, channels and one axis of positions."""


@dataclass(frozen=True, slots=True, eq=False)
class Shapes:
    """What is known of shapes.

    Attributes:
        ranks: Number of dimensions by value, where known.
        pooled: Values that are globally pooled and nothing but channels since.
    """

    graph: Graph
    constants: Constants
    ranks: dict[int, int]
    pooled: set[int]

    def rank(self, value: int) -> int | None:
        """The number of dimensions of ``value``; None where it is not known."""
        shape = self.constants.shape(value)
        return len(shape) if shape is not None else self.ranks.get(value)

    def axis(self, node: Node, default: int) -> int:
        """The attribute ``axis`` of ``node``, counted from the front where the rank of its first input is known."""
        axis, rank = node.integer("axis", default), self.rank(node.inputs[0])
        return axis + rank if axis < 0 and rank is not None else axis

    def axes(self, node: Node) -> tuple[int, ...] | None:
        """The axes of Squeeze, Unsqueeze and the reductions: an attribute in early versions, an input in later ones."""
        axes = node.integers("axes")
        return axes if axes is not None else self.numbers(node.input(1))

    def numbers(self, value: int) -> tuple[int, ...] | None:
        """The elements of a small constant of integers; None where ``value`` is none."""
        array = self.constants.small(value) if value != MISSING else None
        if array is None or array.dtype.kind not in "iu":
            return None
        return tuple(int(number) for number in array.ravel())

    def reshape_target(self, node: Node) -> tuple[int | None, ...] | None:
        """The target of a Reshape, None for an extent that is known only at run time."""
        given = node.integers("shape") or self.numbers(node.input(1))
        maker = self.graph.producers.get(node.input(1))
        if given is not None or maker is None or maker.op_type != "Concat":
            return given
        entries: list[int | None] = []
        for piece in maker.inputs:
            part = self.numbers(piece)
            entries += [None] if part is None else part
        return tuple(entries)


def shapes(graph: Graph, constants: Constants) -> Shapes:
    """Ranks and global pooling of the values of ``graph``."""
    declared = {value: len(shape) for value, shape in graph.shapes.items() if len(shape) <= AXES_LIMIT}
    result = Shapes(graph, constants, declared, set())
    for node in graph.nodes:
        outputs = [value for value in node.outputs if value != MISSING]
        if not outputs or not node.inputs:
            continue
        rank = _rank(result, node)
        for value in outputs:
            if rank is not None and 0 <= rank <= AXES_LIMIT:  # a few bytes can ask for millions of axes
                result.ranks.setdefault(value, rank)
        if node.op_type == "DynamicQuantizeLinear":
            result.ranks.update(dict.fromkeys(outputs[1:], 0))  # its scale and zero point are scalars
        if _is_pooled(result, node):
            result.pooled.update(outputs)
    return result


def _rank(known: Shapes, node: Node) -> int | None:
    """The rank of the outputs of ``node``."""
    ranks = [known.rank(value) for value in node.inputs if value != MISSING]
    first = ranks[0] if ranks else None
    if node.op_type in _RANK_KEEPING:
        description = linear(node)
        weight = None if description is None else known.constants.shape(node.input(description.weight))
        return first if first is not None or weight is None else len(weight)
    if node.op_type in _ELEMENTWISE or node.op_type == "MatMul":
        numbers = [rank for rank in ranks if rank is not None]
        return max(numbers) if numbers and len(numbers) == len(ranks) else None
    if node.op_type in _FIXED_RANKS:
        return _FIXED_RANKS[node.op_type]
    if node.op_type == "Transpose":
        permutation = node.integers("perm")
        return first if permutation is None else len(permutation)
    if node.op_type == "Reshape":
        target = known.reshape_target(node)
        return None if target is None else len(target)
    if node.op_type in {"Squeeze", "Unsqueeze"} or (node.op_type in _REDUCTIONS and not node.integer("keepdims", 1)):
        axes = known.axes(node)
        if axes is None or first is None or (node.op_type == "Squeeze" and not axes):
            return None
        return first + len(axes) if node.op_type == "Unsqueeze" else first - len(axes)
    return first if node.op_type in _REDUCTIONS else None


def _is_pooled(known: Shapes, node: Node) -> bool:
    """Whether ``node`` pools globally, or works on nothing but pooled values and spreads nothing."""
    if not node.standard:
        return False
    if node.op_type in _GLOBAL_POOLS:
        return True
    if node.op_type in _REDUCTIONS:
        axes, rank = known.axes(node), known.rank(node.inputs[0])
        if axes is None:
            return False
        if rank is None:
            return set(axes) in ({2, 3}, {-1, -2}, {2}, {2, 3, 4})
        # All positions, behind the channels or, as TensorFlow lays them out, before them.
        positions = (set(range(2, rank)), set(range(1, rank - 1)))
        return rank >= LEAST_SPATIAL_RANK and {axis % rank for axis in axes} in positions
    if node.op_type in {"AveragePool", "MaxPool"}:
        shape = known.graph.shapes.get(node.outputs[0], ())
        return len(shape) >= LEAST_SPATIAL_RANK and set(shape[2:]) == {1}
    if node.op_type in _SPREADING:
        return False
    given = [value for value in node.inputs if value != MISSING and known.constants.get(value) is None]
    return bool(given) and all(value in known.pooled for value in given)
