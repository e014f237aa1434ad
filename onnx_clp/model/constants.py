"""Graph → Constants: which values are known without running the model, their shapes at once, their elements on demand.

A constant is a stored tensor or what a few operators make of constants. One pass in topological order finds them all;
elements are read and computed when asked for and not kept, since weights are large and each is needed once or twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper

from onnx_clp.model.file import ModelFile
from onnx_clp.model.graph import MISSING, Graph, Node
from onnx_clp.model.tensors import SPARSE_LIMIT, Array, PayloadError, Place, Stored, place, read, stored

EAGER_LIMIT: Final = 4096
"""Elements up to which arithmetic on shapes, axes and scales is worth doing before anybody asks."""


@dataclass(frozen=True, slots=True, eq=False)
class Derived:
    """A constant that ``node`` makes of ``operands`` (None where an input is left out)."""

    node: Node
    operands: tuple[Stored | Derived | Array | None, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


Constant = Stored | Derived | Array


class Constants:
    """The constants of a graph, by value."""

    def __init__(self, file: ModelFile, graph: Graph) -> None:
        self._file = file
        self._graph = graph
        self._known: dict[int, Constant] = {}
        self._refused: dict[int, PayloadError] = {}
        for value, proto in graph.initializers.items():
            self._store(value, proto)
        for node in graph.nodes:
            if node.layout is not None or node.op_type == "Identity":
                self._visit(node)

    def get(self, value: int) -> Constant | None:
        """The constant that ``value`` is; None where it is computed at run time."""
        return self._known.get(value)

    def shape(self, value: int) -> tuple[int, ...] | None:
        """The shape of a constant; None where ``value`` is none."""
        constant = self._known.get(value)
        return None if constant is None else constant.shape

    def array(self, value: int) -> Array:
        """The elements of a constant. Raises PayloadError where they cannot be read or ``value`` is no constant."""
        constant = self._known.get(value)
        if constant is None:
            raise self.refusal(value)
        return self.evaluate(constant)

    def small(self, value: int) -> Array | None:
        """The elements of a constant of at most EAGER_LIMIT elements; None where it is larger, unreadable or no constant."""
        constant = self._known.get(value)
        if constant is None or constant.size > EAGER_LIMIT:
            return None
        try:
            return self.evaluate(constant)
        except PayloadError:
            return None

    def refusal(self, value: int) -> PayloadError:
        """Why ``value`` is no constant."""
        if value in self._refused:
            return self._refused[value]
        node = self._graph.producers.get(value)
        name = self._graph.name_of(value)
        if node is None:
            if value in self._graph.inputs:
                return PayloadError(f"weight {name!r} is an input of the model", "dynamic-weight")
            return PayloadError(f"weight {name!r} has no data in the file", "no-data")
        if not node.standard:
            detail = f"weight {name!r} is computed by the custom operator {node.domain}.{node.op_type}"
            return PayloadError(detail, "custom-operator")
        return PayloadError(f"weight {name!r} is computed at run time by {node.op_type}", "dynamic-weight")

    def place(self, tensor: Stored) -> Place | None:
        """Where the elements of ``tensor`` lie in a file; None where they lie in no order."""
        return place(self._file, tensor)

    def view(self, step: Derived, data: Array) -> Array:
        """What the shape-changing ``step`` makes of ``data`` in place of its first operand."""
        operands = [None if operand is None else self.evaluate(operand) for operand in step.operands[1:]]
        return _compute(step.node, [data, *operands])

    def evaluate(self, constant: Constant) -> Array:
        """The elements of ``constant``, computed without recursion and each shared operand once."""
        done: dict[int, Array] = {}
        pending: list[Constant] = [constant]
        while pending:
            top = pending[-1]
            if id(top) in done:
                pending.pop()
            elif isinstance(top, Stored):
                done[id(top)] = read(self._file, top)
            elif isinstance(top, np.ndarray):
                done[id(top)] = top
            else:
                missing = [operand for operand in top.operands if operand is not None and id(operand) not in done]
                if missing:
                    pending += missing
                else:
                    operands = [None if operand is None else done[id(operand)] for operand in top.operands]
                    done[id(top)] = _compute(top.node, operands)
        return done[id(constant)]

    def _store(self, value: int, proto: onnx.TensorProto | onnx.SparseTensorProto) -> None:
        try:
            self._known[value] = stored(proto)
        except PayloadError as error:
            self._refused[value] = error

    def _visit(self, node: Node) -> None:
        """Make a constant of the first output of ``node`` where it is one."""
        if not node.outputs or node.outputs[0] == MISSING or not node.standard:
            return
        if node.op_type == "Constant":
            self._constant(node)
            return
        if node.op_type not in _OPERATORS or not node.inputs:
            return
        operands = [None if value == MISSING else self._known.get(value) for value in node.inputs]
        if any(operand is None and value != MISSING for operand, value in zip(operands, node.inputs, strict=True)):
            if self._known.get(node.inputs[0]) is None and node.inputs[0] in self._refused:
                self._refused[node.outputs[0]] = self._refused[node.inputs[0]]
            return
        if node.op_type == "Identity":
            self._known[node.outputs[0]] = operands[0]  # type: ignore[assignment]  # not None, or we had returned
            return
        try:
            if node.op_type == "ConstantOfShape":
                fill = node.attributes.get("value")
                operands.append(None if fill is None else stored(fill.t))
            self._derive(node, operands)
        except (PayloadError, ValueError, IndexError, TypeError, KeyError, OverflowError) as error:
            name = self._graph.name_of(node.outputs[0])
            self._refused[node.outputs[0]] = PayloadError(f"weight {name!r}: {node.op_type}: {error}")

    def _derive(self, node: Node, operands: Sequence[Constant | None]) -> None:
        """Compute small constants at once; of others only the shape, by the same operator on arrays without memory."""
        inputs = [None if operand is None else operand.shape for operand in operands]
        if all(shape is None or math.prod(shape) <= EAGER_LIMIT for shape in inputs):
            shape = _compute(node, [None if operand is None else self.evaluate(operand) for operand in operands]).shape
        else:
            shape = _compute(
                node,
                [
                    None
                    if operand is None
                    else self.evaluate(operand)
                    if operand.size <= EAGER_LIMIT
                    else np.broadcast_to(np.zeros((), np.float32), operand.shape)
                    for operand in operands
                ],
                only_shape=True,
            ).shape
        self._known[node.outputs[0]] = Derived(node, tuple(operands), shape)

    def _constant(self, node: Node) -> None:
        """A Constant node: one of its attributes holds the value (ONNX operator Constant, versions 1 to 24)."""
        output = node.outputs[0]
        for name, attribute in node.attributes.items():
            if name == "value":
                self._store(output, attribute.t)
            elif name == "sparse_value":
                self._store(output, attribute.sparse_tensor)
            elif name in {"value_float", "value_floats"}:
                self._known[output] = np.array(attribute.f if name == "value_float" else attribute.floats, np.float32)
            elif name in {"value_int", "value_ints"}:
                self._known[output] = np.array(attribute.i if name == "value_int" else attribute.ints, np.int64)


def _compute(node: Node, operands: list[Array | None], *, only_shape: bool = False) -> Array:
    """What ``node`` makes of ``operands``; with ``only_shape`` the elements do not matter."""
    with np.errstate(all="ignore"):  # an Inf or NaN that comes out is a finding, not a warning
        return np.asarray(_OPERATORS[node.op_type](node, operands, only_shape))


def _axes(node: Node, operands: list[Array | None]) -> tuple[int, ...] | None:
    """Axes of Squeeze and Unsqueeze: an attribute up to opset 12, an input from 13 on."""
    axes = node.integers("axes")
    if axes is None and len(operands) > 1 and operands[1] is not None:
        axes = tuple(int(axis) for axis in operands[1].ravel())
    return axes


def _first(operands: list[Array | None]) -> Array:
    if operands[0] is None:
        raise ValueError("its first input is left out")
    return operands[0]


def _reshape(node: Node, operands: list[Array | None], _: bool) -> Array:
    data = _first(operands)
    given = node.integers("shape") if len(operands) < 2 or operands[1] is None else operands[1].ravel()
    if given is None:
        raise ValueError("Reshape without a shape")
    keep_zero = node.integer("allowzero", 0)
    shape = [
        data.shape[axis] if size == 0 and not keep_zero else int(size) for axis, size in enumerate(map(int, given))
    ]
    return data.reshape(shape)


def _unsqueeze(node: Node, operands: list[Array | None], _: bool) -> Array:
    return np.expand_dims(_first(operands), _axes(node, operands) or ())


def _flatten(node: Node, operands: list[Array | None], _: bool) -> Array:
    data = _first(operands)
    axis = node.integer("axis", 1)
    return data.reshape(math.prod(data.shape[: axis if axis >= 0 else axis + data.ndim]), -1)


def _cast(node: Node, operands: list[Array | None], only_shape: bool) -> Array:
    data = _first(operands)
    return data if only_shape else data.astype(helper.tensor_dtype_to_np_dtype(node.integer("to", 1)))


def per_axis(parameter: Array, data: Array, axis: int, block: int) -> Array:
    """A scale or zero point in a form that broadcasts against ``data`` (QuantizeLinear, versions 10, 13 and 21)."""
    if parameter.size == 1:
        return parameter.reshape(())
    axis = axis if axis >= 0 else axis + data.ndim
    if parameter.ndim == 1:
        return parameter.reshape([-1 if position == axis else 1 for position in range(data.ndim)])
    repeated = np.repeat(parameter, block, axis)
    return repeated[tuple(slice(0, size) for size in data.shape)]


def _dequantize(node: Node, operands: list[Array | None], only_shape: bool) -> Array:
    data, scale = _first(operands), operands[1]
    if only_shape or scale is None:
        return data
    axis, block = node.integer("axis", 1), node.integer("block_size", 0)
    result = data.astype(np.float32)
    if len(operands) > 2 and operands[2] is not None:
        result = result - per_axis(operands[2], data, axis, block).astype(np.float32)
    result *= per_axis(scale, data, axis, block).astype(np.float32)
    return result if scale.dtype == np.float32 else result.astype(scale.dtype)


def _quantize(node: Node, operands: list[Array | None], only_shape: bool) -> Array:
    data, scale = _first(operands), operands[1]
    if only_shape or scale is None:
        return data
    axis, block = node.integer("axis", 1), node.integer("block_size", 0)
    zero = operands[2] if len(operands) > 2 else None
    code = node.integer("output_dtype", 0) or onnx.TensorProto.UINT8
    dtype = zero.dtype if zero is not None else helper.tensor_dtype_to_np_dtype(code)
    if dtype.kind not in "iu":
        raise PayloadError(f"is quantised to {dtype}, which is not followed here")
    levels = np.rint(data.astype(np.float32) / per_axis(scale, data, axis, block).astype(np.float32))
    if zero is not None:
        levels += per_axis(zero, data, axis, block).astype(np.float32)
    limits = np.iinfo(dtype)
    return np.clip(np.nan_to_num(levels), limits.min, limits.max).astype(dtype)


def _elementwise(operator: Callable[..., Any]) -> Callable[[Node, list[Array | None], bool], Array]:
    def compute(_: Node, operands: list[Array | None], only_shape: bool) -> Array:
        arrays = [operand for operand in operands if operand is not None]
        shape = np.broadcast_shapes(*(array.shape for array in arrays))
        if math.prod(shape) > max(SPARSE_LIMIT, *(array.size for array in arrays)):
            raise ValueError("it broadcasts to more elements than are made here")
        if only_shape:
            return np.broadcast_to(np.zeros((), np.float32), shape)
        return np.asarray(operator(*arrays))

    return compute


def _divide(left: Array, right: Array) -> Array:
    return left // right if left.dtype.kind in "iu" else left / right


def _grow(shape: Sequence[int]) -> tuple[int, ...]:
    if math.prod(shape) > SPARSE_LIMIT:
        raise ValueError(f"it would have {math.prod(shape):,} elements")
    return tuple(shape)


def _constant_of_shape(_: Node, operands: list[Array | None], __: bool) -> Array:
    fill = operands[1] if operands[1] is not None else np.zeros(1, np.float32)
    return np.broadcast_to(fill.reshape(()), _grow([int(size) for size in _first(operands).ravel()]))


def _expand(_: Node, operands: list[Array | None], __: bool) -> Array:
    data, target = _first(operands), operands[1]
    if target is None:
        raise ValueError("Expand without a shape")
    return np.broadcast_to(data, _grow(np.broadcast_shapes(data.shape, tuple(int(size) for size in target.ravel()))))


def _concat(node: Node, operands: list[Array | None], _: bool) -> Array:
    arrays = [operand for operand in operands if operand is not None]
    _grow([sum(array.size for array in arrays)])
    return np.concatenate(arrays, node.integer("axis", 0))


def slices(node: Node, operands: Sequence[Array | None], rank: int) -> dict[int, slice]:
    """The slices that Slice takes, by axis (attributes in version 1, inputs from version 10 on)."""

    def numbers(position: int, name: str) -> list[int] | None:
        if len(operands) > position and operands[position] is not None:
            return [int(number) for number in np.ravel(operands[position])]  # type: ignore[arg-type]
        given = node.integers(name)
        return None if given is None else list(given)

    starts, ends = numbers(1, "starts"), numbers(2, "ends")
    if starts is None or ends is None:
        raise ValueError("Slice without constant starts and ends")
    axes = numbers(3, "axes") or list(range(len(starts)))
    steps = numbers(4, "steps") or [1] * len(starts)
    result = {}
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        # An end below the first element means "through the first" where the step is negative, as in ONNX, not NumPy.
        result[axis if axis >= 0 else axis + rank] = slice(start, None if step < 0 and end < -(1 << 31) else end, step)
    return result


def _slice(node: Node, operands: list[Array | None], _: bool) -> Array:
    data = _first(operands)
    taken = slices(node, operands, data.ndim)
    return data[tuple(taken.get(axis, slice(None)) for axis in range(data.ndim))]


def _gather(node: Node, operands: list[Array | None], _: bool) -> Array:
    indices = operands[1]
    if indices is None:
        raise ValueError("Gather without indices")
    data, axis = _first(operands), node.integer("axis", 0)
    _grow([max(1, data.size // max(1, data.shape[axis])) * max(1, indices.size)])
    return np.take(data, indices.astype(np.int64), axis=axis)


_OPERATORS: Final[Mapping[str, Callable[[Node, list[Array | None], bool], Array]]] = MappingProxyType(
    {
        "Abs": _elementwise(np.abs),
        "Add": _elementwise(np.add),
        "Cast": _cast,
        "Concat": _concat,
        "ConstantOfShape": _constant_of_shape,
        "DequantizeLinear": _dequantize,
        "Div": _elementwise(_divide),
        "Expand": _expand,
        "Flatten": _flatten,
        "Gather": _gather,
        "Identity": lambda _, operands, __: _first(operands),
        "Mul": _elementwise(np.multiply),
        "Neg": _elementwise(np.negative),
        "Pow": _elementwise(np.power),
        "QuantizeLinear": _quantize,
        "Reciprocal": _elementwise(np.reciprocal),
        "Reshape": _reshape,
        "Shape": lambda _, operands, __: np.array(_first(operands).shape, np.int64),
        "Slice": _slice,
        "Sqrt": _elementwise(np.sqrt),
        "Squeeze": lambda node, operands, _: np.squeeze(_first(operands), _axes(node, operands)),
        "Sub": _elementwise(np.subtract),
        "Transpose": lambda node, operands, _: np.transpose(_first(operands), node.integers("perm")),
        "Unsqueeze": _unsqueeze,
    }
)
"""What each operator makes of constants. ``Identity`` is not computed but passed on."""
