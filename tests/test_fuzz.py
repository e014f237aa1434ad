"""Graphs broken on purpose: a scan and a planned rewrite give a report or an OnnxClpError, and nothing else."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper

from onnx_clp import OnnxClpError, sanitize, scan
from tests.built import NAMES, build, save

pytestmark = pytest.mark.fuzz

SMALL = tuple(name for name in NAMES if build(name).model.ByteSize() < 200_000)
"""Cases that are quick to write and to scan."""

EXTENTS = (0, -1, 1, 2, 3, 5, 16, 17, 1 << 60, -(1 << 63))
"""What takes the place of a size, an axis, a step or an index."""

OPERATORS = (
    *("Conv", "ConvTranspose", "FusedConv", "QLinearConv", "ConvInteger", "Gemm", "MatMul", "BatchNormalization"),
    *("Add", "Sum", "Mul", "Div", "Concat", "Split", "Slice", "Gather", "Pad", "Transpose", "Squeeze", "Unsqueeze"),
    *("Reshape", "Flatten", "Clip", "PRelu", "Dropout", "LeakyRelu", "ReduceMean", "Resize", "RoiAlign", "Cast"),
    *("DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear", "Constant", "ConstantOfShape", "Shape"),
    *("If", "Loop", "Scan", "Expand", "Tile", "Where", "Identity"),
)
VERSIONS = (-1, 0, 1, 6, 7, 8, 9, 11, 13, 18, 1 << 60)
TYPES = (-1, 0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 14, 16, 17, 20, 22, 23, 99)

Draw = st.DataObject


def one_of(data: Draw, items: Any) -> Any:  # noqa: ANN401  # of whatever the items are
    """One of some items; None where there are none."""
    given_items = list(items)
    return data.draw(st.sampled_from(given_items)) if given_items else None


def node_of(data: Draw, model: onnx.ModelProto) -> onnx.NodeProto:
    """A node of the main graph, of a subgraph or of a function."""
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    for node in nodes:  # grows while it is walked
        nodes += [inner for attribute in node.attribute for inner in attribute.g.node]
    found: onnx.NodeProto = one_of(data, nodes)
    return found


def drop_input(data: Draw, model: onnx.ModelProto) -> None:
    node = node_of(data, model)
    if node.input:
        del node.input[data.draw(st.integers(0, len(node.input) - 1))]


def clear_input(data: Draw, model: onnx.ModelProto) -> None:
    node = node_of(data, model)
    if node.input:
        node.input[data.draw(st.integers(0, len(node.input) - 1))] = ""


def clear_inputs(data: Draw, model: onnx.ModelProto) -> None:
    del node_of(data, model).input[:]


def double_input(data: Draw, model: onnx.ModelProto) -> None:
    node = node_of(data, model)
    if node.input:
        node.input.append(one_of(data, node.input))


def rewire(data: Draw, model: onnx.ModelProto) -> None:
    """An input takes another value, perhaps one that is made of it."""
    node, values = node_of(data, model), [output for node in model.graph.node for output in node.output]
    values += [tensor.name for tensor in model.graph.initializer]
    if node.input:
        node.input[data.draw(st.integers(0, len(node.input) - 1))] = one_of(data, values)


def swap_inputs(data: Draw, model: onnx.ModelProto) -> None:
    node = node_of(data, model)
    order = data.draw(st.permutations(list(node.input)))
    del node.input[:]
    node.input.extend(order)


def drop_output(data: Draw, model: onnx.ModelProto) -> None:
    node = node_of(data, model)
    if node.output:
        del node.output[data.draw(st.integers(0, len(node.output) - 1))]


def double_output(data: Draw, model: onnx.ModelProto) -> None:
    node = node_of(data, model)
    node.output.append(one_of(data, ["", "more", *node.output]))


def drop_attribute(data: Draw, model: onnx.ModelProto) -> None:
    node = node_of(data, model)
    if node.attribute:
        del node.attribute[data.draw(st.integers(0, len(node.attribute) - 1))]


def change_attribute(data: Draw, model: onnx.ModelProto) -> None:
    """A number of an attribute: an axis out of range, a step of 0, a group that divides nothing."""
    attribute = one_of(data, node_of(data, model).attribute)
    if attribute is None:
        return
    if attribute.ints:
        attribute.ints[data.draw(st.integers(0, len(attribute.ints) - 1))] = one_of(data, EXTENTS)
    elif attribute.type == onnx.AttributeProto.INT:
        attribute.i = one_of(data, EXTENTS)
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = one_of(data, [0.0, -1.0, float("nan"), float("inf"), 1e38])
    else:
        attribute.type = one_of(data, range(15))


def add_attribute(data: Draw, model: onnx.ModelProto) -> None:
    name = one_of(data, ["axis", "axes", "group", "perm", "split", "shape", "epsilon", "alpha", "transB", "pads"])
    value = one_of(data, [0, -1, 7, 1 << 60, [], [0], [0, 0], [-9, 9], [1 << 60], 0.5, "text"])
    if value == []:
        node_of(data, model).attribute.add(name=name, type=onnx.AttributeProto.INTS)
    else:
        node_of(data, model).attribute.append(helper.make_attribute(name, value))


def change_operator(data: Draw, model: onnx.ModelProto) -> None:
    node_of(data, model).op_type = one_of(data, OPERATORS)


def drop_node(data: Draw, model: onnx.ModelProto) -> None:
    del model.graph.node[data.draw(st.integers(0, len(model.graph.node) - 1))]


def double_node(data: Draw, model: onnx.ModelProto) -> None:
    model.graph.node.append(one_of(data, model.graph.node))


def change_extent(data: Draw, model: onnx.ModelProto) -> None:
    tensor = one_of(data, model.graph.initializer)
    if tensor is not None and tensor.dims:
        tensor.dims[data.draw(st.integers(0, len(tensor.dims) - 1))] = one_of(data, EXTENTS)


def change_rank(data: Draw, model: onnx.ModelProto) -> None:
    tensor = one_of(data, model.graph.initializer)
    if tensor is not None:
        dims = data.draw(st.sampled_from([[], [1, *tensor.dims], [*tensor.dims, 1], list(tensor.dims)[:-1]]))
        del tensor.dims[:]
        tensor.dims.extend(dims)


def change_numbers(data: Draw, model: onnx.ModelProto) -> None:
    """The elements of a small constant of integers: axes, steps, splits, targets."""
    tensors = [
        t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT64 and 8 <= len(t.raw_data) <= 64
    ]
    tensor = one_of(data, tensors)
    if tensor is not None:
        size = len(tensor.raw_data) // 8
        numbers = data.draw(st.lists(st.sampled_from(EXTENTS), min_size=size, max_size=size))
        tensor.raw_data = b"".join(number.to_bytes(8, "little", signed=True) for number in numbers)


def change_type(data: Draw, model: onnx.ModelProto) -> None:
    tensor = one_of(data, model.graph.initializer)
    if tensor is not None:
        tensor.data_type = one_of(data, TYPES)


def drop_payload(data: Draw, model: onnx.ModelProto) -> None:
    tensor = one_of(data, model.graph.initializer)
    if tensor is not None:
        tensor.raw_data = tensor.raw_data[: data.draw(st.integers(0, 9))]


def drop_initializer(data: Draw, model: onnx.ModelProto) -> None:
    if model.graph.initializer:
        del model.graph.initializer[data.draw(st.integers(0, len(model.graph.initializer) - 1))]


def declare(data: Draw, model: onnx.ModelProto) -> None:
    """A declared shape that is not the value's: of another rank or with sizes that cannot be."""
    node = node_of(data, model)
    shape = data.draw(st.lists(st.sampled_from([None, "N", *EXTENTS]), max_size=6))
    values = [name for name in (*node.output, *node.input) if name]
    if values:
        model.graph.value_info.append(helper.make_tensor_value_info(one_of(data, values), 1, shape))


def change_version(data: Draw, model: onnx.ModelProto) -> None:
    if model.opset_import:
        model.opset_import[0].version = one_of(data, VERSIONS)


def drop_edge(data: Draw, model: onnx.ModelProto) -> None:
    """An input or an output of the model, or all of them."""
    field = one_of(data, [model.graph.input, model.graph.output])
    del field[data.draw(st.integers(0, 1)) :]


Mutation = Callable[[Draw, onnx.ModelProto], None]

MUTATIONS: tuple[Mutation, ...] = (
    *(drop_input, clear_input, clear_inputs, double_input, rewire, swap_inputs, drop_output, double_output),
    *(drop_attribute, change_attribute, add_attribute, change_operator, drop_node, double_node),
    *(change_extent, change_rank, change_numbers, change_type, drop_payload, drop_initializer),
    *(declare, change_version, drop_edge),
)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data())
def test_a_broken_graph_gives_a_report_or_an_error_of_ours(data: Draw) -> None:
    case = build(data.draw(st.sampled_from(SMALL), label="case"))
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    for mutation in data.draw(st.lists(st.sampled_from(MUTATIONS), min_size=1, max_size=3), label="mutations"):
        if model.graph.node:
            mutation(data, model)
    with tempfile.TemporaryDirectory() as folder:
        path = save(case, Path(folder))
        path.write_bytes(model.SerializeToString())
        with contextlib.suppress(OnnxClpError):
            assert scan(path).path
        with contextlib.suppress(OnnxClpError):
            assert not sanitize(path, Path(folder) / "out.onnx", max_share=1, dry_run=True).written


def _of_rank_two(model: onnx.ModelProto) -> None:
    _tensor(model, "conv.bias").dims.append(1)


def _of_rank_nought(model: onnx.ModelProto) -> None:
    bias = _tensor(model, "conv.bias")
    del bias.dims[:]
    bias.raw_data = bias.raw_data[:4]


def _too_short(model: onnx.ModelProto) -> None:
    bias = _tensor(model, "conv.bias")
    bias.dims[0], bias.raw_data = 4, bias.raw_data[:16]


def _the_kernel_itself(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[2] = model.graph.node[0].input[1]


def _with_a_zero_point_of_rank_two(model: onnx.ModelProto) -> None:
    _tensor(model, "conv_0.zero").dims.append(1)


def _tensor(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("folded_bias", _of_rank_two),
        ("folded_bias", _of_rank_nought),
        ("folded_bias", _too_short),
        ("folded_bias", _the_kernel_itself),
        ("qlinear_conv_per_axis", _with_a_zero_point_of_rank_two),
    ],
)
def test_a_constant_that_does_not_fit_its_channels_is_no_crash(
    case: str, change: Callable[[onnx.ModelProto], None], tmp_path: Path
) -> None:
    """What the mutations above found: the flagged channel lies outside the bias, or the zero point does not spread."""
    model = onnx.ModelProto()
    model.CopyFrom(build(case).model)
    change(model)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    before = path.read_bytes()
    with contextlib.suppress(OnnxClpError):
        sanitize(path, tmp_path / "out.onnx", dry_run=True)
    with contextlib.suppress(OnnxClpError):
        sanitize(path, path, in_place=True)
    assert path.read_bytes() == before or scan(path).layers
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]
