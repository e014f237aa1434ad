"""Mutations of tensors: sizes, types, numbers, where the payload lies, and whose name it has."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.mutations.chance import EXTENTS, TEXTS, Chance, choice, copied, of_kind, place
from tests.mutations.nodes import Mutation

TYPES = (-1, 0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 14, 16, 17, 20, 22, 23, 99)
TYPED: dict[int, tuple[str, str]] = {
    TensorProto.FLOAT: ("float_data", "<f4"),
    TensorProto.DOUBLE: ("double_data", "<f8"),
    TensorProto.INT64: ("int64_data", "<i8"),
    TensorProto.UINT64: ("uint64_data", "<u8"),
    TensorProto.INT32: ("int32_data", "<i4"),
    TensorProto.INT8: ("int32_data", "i1"),
    TensorProto.UINT8: ("int32_data", "u1"),
    TensorProto.FLOAT16: ("int32_data", "<u2"),
    TensorProto.BFLOAT16: ("int32_data", "<u2"),
}
"""The typed field of a type, and how its raw bytes are read."""

SPECIAL: dict[int, list[bytes]] = {
    TensorProto.FLOAT: [np.array(v, "<f4").tobytes() for v in (np.nan, np.inf, -np.inf, 0, 3e38, 1e-45, -1)],
    TensorProto.FLOAT16: [np.array(v, "<f2").tobytes() for v in (np.nan, np.inf, -np.inf, 0, 65504, 6e-8, -1)],
    TensorProto.DOUBLE: [np.array(v, "<f8").tobytes() for v in (np.nan, np.inf, -np.inf, 0, 1e308, 5e-324, -1)],
}
"""Numbers that break arithmetic, as raw bytes."""

LOCATIONS = (
    "model.onnx",
    "external_one_file/model.onnx.data",
    "no such file",
    ".",
    "..",
    "../model.onnx",
    "",
    "out.onnx",
)

OnTensor = Callable[[Chance, TensorProto], None]


def on_tensor(change: OnTensor) -> Mutation:
    """The change of a tensor, made to an initializer, to one of an attribute or to a part of a sparse one."""

    def mutation(chance: Chance, model: onnx.ModelProto) -> None:
        tensors = of_kind(model, TensorProto)
        if tensors:
            change(chance, choice(chance, tensors))

    mutation.__name__ = change.__name__
    return mutation


@on_tensor
def change_extent(chance: Chance, tensor: TensorProto) -> None:
    """A size that is not the payload's."""
    if tensor.dims:
        tensor.dims[place(chance, tensor.dims)] = choice(chance, EXTENTS)


@on_tensor
def change_rank(chance: Chance, tensor: TensorProto) -> None:
    """A dimension more or fewer, or none; or all in one."""
    sizes = list(tensor.dims)
    whole = prod(sizes) if all(0 <= size < 1 << 20 for size in sizes[:4]) else 1
    dims = choice(chance, [[], [1, *sizes], [*sizes, 1], sizes[:-1], sizes[::-1], [min(whole, 1 << 60)]])
    del tensor.dims[:]
    tensor.dims.extend(dims)


@on_tensor
def shrink(chance: Chance, tensor: TensorProto) -> None:
    """Fewer channels, with a payload that fits."""
    if not tensor.dims or not tensor.raw_data or prod(tensor.dims) <= 0:
        return
    size = chance.integer(0, max(0, min(tensor.dims[0], 4)))
    row = len(tensor.raw_data) // tensor.dims[0]
    tensor.raw_data = tensor.raw_data[: size * row]
    tensor.dims[0] = size


@on_tensor
def change_integers(chance: Chance, tensor: TensorProto) -> None:
    """The elements of a small constant of integers: axes, steps, splits, targets."""
    if tensor.data_type == TensorProto.INT64 and 8 <= len(tensor.raw_data) <= 64:
        numbers = [choice(chance, EXTENTS) for _ in range(len(tensor.raw_data) // 8)]
        tensor.raw_data = b"".join(number.to_bytes(8, "little", signed=True) for number in numbers)


@on_tensor
def change_floats(chance: Chance, tensor: TensorProto) -> None:
    """One element, some or all become a number that breaks arithmetic."""
    if tensor.data_type not in SPECIAL or not tensor.raw_data:
        return
    number = choice(chance, SPECIAL[tensor.data_type])
    count = len(tensor.raw_data) // len(number)
    first = chance.integer(0, count)
    last = min(count, first + choice(chance, (1, 8, count)))
    raw = tensor.raw_data
    tensor.raw_data = raw[: first * len(number)] + number * (last - first) + raw[last * len(number) :]


@on_tensor
def change_type(chance: Chance, tensor: TensorProto) -> None:
    """Another type of elements."""
    tensor.data_type = choice(chance, TYPES)


@on_tensor
def drop_payload(chance: Chance, tensor: TensorProto) -> None:
    """Only the first bytes of the payload, or none."""
    tensor.raw_data = tensor.raw_data[: chance.integer(0, 9)]


@on_tensor
def move_payload(chance: Chance, tensor: TensorProto) -> None:
    """The payload moves from `raw_data` to the typed field or back, or lies in both, with equal numbers or others."""
    if tensor.data_type not in TYPED:
        return
    name, dtype = TYPED[tensor.data_type]
    values = getattr(tensor, name)
    keep, other = chance.integer(0, 1), chance.integer(0, 2) == 0
    with np.errstate(all="ignore"):
        if tensor.raw_data:
            width = np.dtype(dtype).itemsize
            numbers = np.frombuffer(tensor.raw_data[: len(tensor.raw_data) // width * width], dtype)
            values.extend((numbers * 0 if other else numbers).tolist())
            if not keep:
                tensor.ClearField("raw_data")
        elif values:
            tensor.raw_data = np.array(list(values)).astype(dtype).tobytes()
            if not keep:
                tensor.ClearField(name)


@on_tensor
def put_outside(chance: Chance, tensor: TensorProto) -> None:
    """The payload is said to lie in a file, at a place that may not be there; or back in the model."""
    if tensor.data_location == TensorProto.EXTERNAL and chance.integer(0, 1):
        tensor.data_location = TensorProto.DEFAULT
        return
    if not tensor.external_data:
        tensor.external_data.add(key="location", value=choice(chance, LOCATIONS))
    tensor.data_location = TensorProto.EXTERNAL
    key = choice(chance, ["location", "offset", "length", "length", "checksum", "basepath"])
    texts = (
        LOCATIONS if key == "location" else ["", "-1", "0", "1", "4096", "1e3", "٣", str(1 << 63), "9" * 5000, *TEXTS]
    )
    tensor.external_data.add(key=key, value=choice(chance, texts))


def name_alike(chance: Chance, model: onnx.ModelProto) -> None:
    """Two initializers of one name."""
    tensors = model.graph.initializer
    if tensors:
        choice(chance, tensors).name = choice(chance, tensors).name


def drop_initializer(chance: Chance, model: onnx.ModelProto) -> None:
    """An initializer is gone."""
    if model.graph.initializer:
        del model.graph.initializer[place(chance, model.graph.initializer)]


def make_node(chance: Chance, model: onnx.ModelProto) -> None:
    """An initializer becomes a node that makes it: a Constant, or a ConstantOfShape of its sizes."""
    if not model.graph.initializer:
        return
    position = place(chance, model.graph.initializer)
    tensor = copied(model.graph.initializer[position])
    if chance.integer(0, 1):
        node = helper.make_node("Constant", [], [tensor.name], value=tensor)
    else:
        value = helper.make_tensor("value", TensorProto.FLOAT, [1], [choice(chance, (0.0, 1.0, float("nan")))])
        node = helper.make_node("ConstantOfShape", [f"{tensor.name}.sizes"], [tensor.name], value=value)
        sizes = list(tensor.dims)
        if sizes and chance.integer(0, 1):
            sizes[place(chance, sizes)] = choice(chance, EXTENTS)
        model.graph.initializer.append(
            helper.make_tensor(f"{tensor.name}.sizes", TensorProto.INT64, [len(sizes)], sizes)
        )
    del model.graph.initializer[position]
    model.graph.node.insert(0, node)


def make_sparse(chance: Chance, model: onnx.ModelProto) -> None:
    """An initializer becomes the values of a sparse one, with indices that may not fit."""
    if not model.graph.initializer:
        return
    position = place(chance, model.graph.initializer)
    tensor = copied(model.graph.initializer[position])
    sparse = model.graph.sparse_initializer.add(dims=tensor.dims)
    sparse.values.CopyFrom(tensor)
    count = chance.integer(0, 8)
    del sparse.values.dims[:]
    sparse.values.dims.append(count)
    sparse.values.raw_data = tensor.raw_data[: 4 * count]
    sparse.indices.data_type = TensorProto.INT64
    sparse.indices.dims.append(count)
    sparse.indices.int64_data.extend(choice(chance, [*range(8), *EXTENTS]) for _ in range(count))
    if chance.integer(0, 1):
        del model.graph.initializer[position]


TENSORS: tuple[Mutation, ...] = (
    *(change_extent, change_rank, shrink, change_integers, change_floats, change_type, drop_payload, move_payload),
    *(put_outside, name_alike, drop_initializer, make_node, make_sparse),
)
