"""Files that two readers can read differently: small models whose output says which of two constants was used.

Every model is Conv → Relu → GlobalAveragePool → Flatten → Gemm with the identity, of an input of ones with one channel
and a kernel of 1×1, positive numbers throughout. So what the model gives for channel k *is* the weight that ran, and
that is the bound of channel k, too: the oracle needs no arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import (
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    SparseTensorProto,
    TensorProto,
    helper,
)
from onnx.numpy_helper import from_array

from onnx_clp.model.edits import encode_varint, length_delimited

Array = NDArray[Any]
Attribute = Any
"""Whatever onnx.helper takes as the value of an attribute or a field."""

CHANNELS = 16
LOCAL = "com.acme"
VARINT, START_GROUP, END_GROUP, FIXED32 = 0, 3, 4, 5


def marked(base: float, outlier: int) -> Array:
    """Weights (16,) that nothing else has, with one channel that stands out."""
    numbers = base * np.linspace(1, 1.2, CHANNELS, dtype=np.float32)
    numbers[outlier] = base * 30
    return numbers.astype(np.float32)


A, B, C = marked(1, 5), marked(2, 9), marked(3, 12)


def kernel(numbers: Array) -> Array:
    """As the kernel of a Conv, (16, 1, 1, 1)."""
    return numbers.reshape(-1, 1, 1, 1)


def tensor(numbers: Array, name: str = "W", **changed: object) -> TensorProto:
    """A tensor in raw_data."""
    made = from_array(np.asarray(numbers), name)
    for key, value in changed.items():
        setattr(made, key, value)
    return made


def weight(numbers: Array, name: str = "W") -> TensorProto:
    return tensor(kernel(numbers), name)


def typed(numbers: Array, name: str = "W") -> TensorProto:
    """A kernel in its typed field."""
    code = helper.np_dtype_to_tensor_dtype(numbers.dtype)
    return helper.make_tensor(name, code, [CHANNELS, 1, 1, 1], numbers.tolist())


def sparse(numbers: Array, name: str = "W", order: Sequence[int] | None = None) -> SparseTensorProto:
    """A kernel as a sparse tensor."""
    indices = list(range(CHANNELS) if order is None else order)
    values = tensor(numbers[indices], name)
    return helper.make_sparse_tensor(values, tensor(np.array(indices, np.int64), ""), [CHANNELS, 1, 1, 1])


def node(op: str, inputs: Iterable[str], outputs: Iterable[str] | str, name: str = "", **rest: Attribute) -> NodeProto:
    outputs = [outputs] if isinstance(outputs, str) else list(outputs)
    return helper.make_node(op, list(inputs), outputs, name=name or f"{op.lower()}_{outputs[0]}", **rest)


def conv(w: str = "W", x: str = "x", y: str = "y", **rest: Attribute) -> NodeProto:
    return node("Conv", [x, w], y, "conv" if y == "y" else f"conv_{y}", **rest)


def condition(*, holds: bool = True) -> TensorProto:
    """The initializer ``cond``."""
    return tensor(np.array(holds), "cond")


def constant(numbers: Array, name: str = "W") -> NodeProto:
    return node("Constant", [], name, value=weight(numbers, ""))


def value(name: str, shape: Sequence[int | str | None] | None, code: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, code, shape)


X_SHAPE = (1, 1, 2, 2)


def graph(
    nodes: Sequence[NodeProto],
    tensors: Sequence[TensorProto] = (),
    *,
    sparse_tensors: Sequence[SparseTensorProto] = (),
    inputs: Sequence[onnx.ValueInfoProto] = (),
    outputs: Sequence[onnx.ValueInfoProto] = (),
    y: str = "y",
) -> GraphProto:
    """``nodes`` that make the value ``y`` of 16 channels, and what shows its channels."""
    shown = [
        node("Relu", [y], "t.relu"),
        node("GlobalAveragePool", ["t.relu"], "t.pool"),
        node("Flatten", ["t.pool"], "t.flat"),
        node("Gemm", ["t.flat", "t.eye", "t.zero"], "z", "fc", transB=1),
    ]
    return helper.make_graph(
        [*nodes, *shown],
        "g",
        [value("x", X_SHAPE), *inputs],
        [value("z", [1, CHANNELS]), *outputs],
        [
            *tensors,
            tensor(np.eye(CHANNELS, dtype=np.float32), "t.eye"),
            tensor(np.zeros(CHANNELS, np.float32), "t.zero"),
        ],
        sparse_initializer=list(sparse_tensors),
    )


def subgraph(
    nodes: Sequence[NodeProto],
    result: str,
    tensors: Sequence[TensorProto] = (),
    *,
    inputs: Sequence[onnx.ValueInfoProto] = (),
    outputs: Sequence[onnx.ValueInfoProto] = (),
    name: str = "sub",
    **rest: Attribute,
) -> GraphProto:
    made = [*outputs, value(result, [1, CHANNELS, 2, 2])]
    return helper.make_graph(list(nodes), name, list(inputs), made, list(tensors), **rest)


def model(
    made: GraphProto, functions: Sequence[FunctionProto] = (), *, domain: str = "", opset: int = 17, ir: int = 8
) -> ModelProto:
    """A model that imports ``opset``, and ``domain`` beside it."""
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(made, functions=list(functions), opset_imports=opsets, ir_version=ir)


def simple(*tensors: TensorProto, **rest: Attribute) -> ModelProto:
    """One Conv and these initializers."""
    return model(graph([conv()], tensors, **rest))


def function(
    name: str, nodes: Sequence[NodeProto], inputs: Sequence[str], outputs: Sequence[str], **rest: Attribute
) -> FunctionProto:
    """A model-local function."""
    domain = rest.pop("domain", LOCAL)
    opsets = rest.pop("opsets", [("", 17), (LOCAL, 1)])
    return helper.make_function(
        domain, name, list(inputs), list(outputs), list(nodes), [helper.make_opsetid(d, v) for d, v in opsets], **rest
    )


# ---- bytes that no serialiser writes


def varint(number: int, content: int) -> bytes:
    return encode_varint(number << 3 | VARINT) + encode_varint(content)


def fixed32(number: int, content: bytes) -> bytes:
    return encode_varint(number << 3 | FIXED32) + content


def padded(number: int, wire: int, content: int, length: int = 4) -> bytes:
    """A field whose value is a varint with needless bytes."""
    pieces = [content >> 7 * i & 0x7F for i in range(length)]
    return encode_varint(number << 3 | wire) + bytes([*(piece | 0x80 for piece in pieces[:-1]), pieces[-1]])


def with_tensor(fields: bytes) -> bytes:
    """The model of one Conv, whose kernel is an initializer of these fields."""
    return model(graph([conv()])).SerializeToString() + length_delimited(7, length_delimited(5, fields))


def with_node(fields: bytes, *tensors: TensorProto, **rest: Attribute) -> bytes:
    """A model whose Conv is a node of these fields."""
    return model(graph([], tensors, **rest)).SerializeToString() + length_delimited(7, length_delimited(1, fields))
