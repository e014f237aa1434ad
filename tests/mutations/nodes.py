"""Mutations of graphs: nodes, edges, attributes, declared shapes, versions, functions, bodies within bodies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
from onnx import helper

from tests.mutations.chance import EXTENTS, Chance, choice, copied, of_kind, place

OPERATORS = (
    *("Conv", "ConvTranspose", "FusedConv", "QLinearConv", "ConvInteger", "Gemm", "MatMul", "BatchNormalization"),
    *("Add", "Sum", "Mul", "Div", "Concat", "Split", "Slice", "Gather", "Pad", "Transpose", "Squeeze", "Unsqueeze"),
    *("Reshape", "Flatten", "Clip", "PRelu", "Dropout", "LeakyRelu", "ReduceMean", "Resize", "RoiAlign", "Cast"),
    *("DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear", "Constant", "ConstantOfShape", "Shape"),
    *("If", "Loop", "Scan", "Expand", "Tile", "Where", "Identity"),
)
VERSIONS = (-1, 0, 1, 6, 7, 8, 9, 11, 13, 18, 1 << 60)
ATTRIBUTES = ("axis", "axes", "group", "perm", "split", "shape", "epsilon", "alpha", "transB", "pads", "value", "to")
TYPES: tuple[Any, ...] = tuple(onnx.AttributeProto.AttributeType.values())
DEPTHS = (1, 1, 2, 5, 31)
"""Bodies around a node, of three messages each; with 31 it lies just within the hundred that protobuf reads."""

OnNode = Callable[[Chance, onnx.NodeProto], None]
Mutation = Callable[[Chance, onnx.ModelProto], None]


def on_node(change: OnNode) -> Mutation:
    """The change of a node, made to one of the main graph, of a subgraph or of a function."""

    def mutation(chance: Chance, model: onnx.ModelProto) -> None:
        nodes = of_kind(model, onnx.NodeProto)
        if nodes:
            change(chance, choice(chance, nodes))

    mutation.__name__ = change.__name__
    return mutation


def _values(model: onnx.ModelProto) -> list[str]:
    """The names of the values of the main graph; one that is none where there are none."""
    made = [output for node in model.graph.node for output in node.output]
    given = [tensor.name for tensor in model.graph.initializer] + [value.name for value in model.graph.input]
    return made + given or ["none"]


@on_node
def drop_input(chance: Chance, node: onnx.NodeProto) -> None:
    """An input is gone, and those after it move up."""
    if node.input:
        del node.input[place(chance, node.input)]


@on_node
def clear_input(chance: Chance, node: onnx.NodeProto) -> None:
    """An input is left out."""
    if node.input:
        node.input[place(chance, node.input)] = ""


@on_node
def clear_inputs(_: Chance, node: onnx.NodeProto) -> None:
    """No input is left."""
    del node.input[:]


@on_node
def double_input(chance: Chance, node: onnx.NodeProto) -> None:
    """An input is there again behind the others."""
    if node.input:
        node.input.append(choice(chance, node.input))


@on_node
def swap_inputs(chance: Chance, node: onnx.NodeProto) -> None:
    """Two inputs change places."""
    if node.input:
        first, second = place(chance, node.input), place(chance, node.input)
        node.input[first], node.input[second] = node.input[second], node.input[first]


@on_node
def drop_output(chance: Chance, node: onnx.NodeProto) -> None:
    """An output is gone, and those after it move up."""
    if node.output:
        del node.output[place(chance, node.output)]


@on_node
def double_output(chance: Chance, node: onnx.NodeProto) -> None:
    """One output more: without a name, with a new one, or with that of another."""
    node.output.append(choice(chance, ["", "more", *node.output]))


@on_node
def take_own_output(chance: Chance, node: onnx.NodeProto) -> None:
    """The node reads what it makes."""
    if node.input and node.output:
        node.input[place(chance, node.input)] = choice(chance, node.output)


@on_node
def drop_attribute(chance: Chance, node: onnx.NodeProto) -> None:
    """An attribute is gone."""
    if node.attribute:
        del node.attribute[place(chance, node.attribute)]


@on_node
def change_attribute(chance: Chance, node: onnx.NodeProto) -> None:
    """A number of an attribute: an axis out of range, a step of 0, a group that divides nothing."""
    if not node.attribute:
        return
    attribute = choice(chance, node.attribute)
    if attribute.ints:
        attribute.ints[place(chance, attribute.ints)] = choice(chance, EXTENTS)
    elif attribute.type == onnx.AttributeProto.INT:
        attribute.i = choice(chance, EXTENTS)
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = choice(chance, [0.0, -1.0, float("nan"), float("inf"), 1e38])
    else:
        attribute.type = choice(chance, TYPES)


@on_node
def add_attribute(chance: Chance, node: onnx.NodeProto) -> None:
    """An attribute more, perhaps of a type that the operator does not take."""
    name = choice(chance, ATTRIBUTES)
    value = choice(chance, [0, -1, 7, 1 << 60, [], [0], [0, 0], [-9, 9], [1 << 60], 0.5, "text"])
    if value == []:
        node.attribute.add(name=name, type=onnx.AttributeProto.INTS)
    else:
        node.attribute.append(helper.make_attribute(name, value))


@on_node
def change_operator(chance: Chance, node: onnx.NodeProto) -> None:
    """The node is of another operator."""
    node.op_type = choice(chance, OPERATORS)


def rewire(chance: Chance, model: onnx.ModelProto) -> None:
    """An input takes another value, perhaps one that is made of it."""
    nodes = [node for node in of_kind(model, onnx.NodeProto) if node.input]
    if nodes:
        node = choice(chance, nodes)
        node.input[place(chance, node.input)] = choice(chance, _values(model))


def shadow(chance: Chance, model: onnx.ModelProto) -> None:
    """A node makes a value whose name another one has: of another node, an initializer or an input."""
    nodes = [node for node in of_kind(model, onnx.NodeProto) if node.output]
    if nodes:
        node = choice(chance, nodes)
        node.output[place(chance, node.output)] = choice(chance, _values(model))


def drop_node(chance: Chance, model: onnx.ModelProto) -> None:
    """A node of the main graph is gone."""
    if model.graph.node:
        del model.graph.node[place(chance, model.graph.node)]


def double_node(chance: Chance, model: onnx.ModelProto) -> None:
    """A node of the main graph is there twice."""
    if model.graph.node:
        model.graph.node.append(choice(chance, model.graph.node))


def insert(chance: Chance, model: onnx.ModelProto) -> None:
    """An operator more on an edge, also on one from a constant: it takes the value, and perhaps others."""
    nodes = [node for node in model.graph.node if node.input]
    if not nodes:
        return
    node = choice(chance, nodes)
    position, name = place(chance, node.input), f"inserted_{len(model.graph.node)}"
    others = [choice(chance, _values(model)) for _ in range(chance.integer(0, 3))]
    added = helper.make_node(choice(chance, OPERATORS), [node.input[position], *others], [name], name)
    if chance.integer(0, 1):
        added.attribute.append(
            helper.make_attribute(choice(chance, ATTRIBUTES), choice(chance, [0, 1, -1, [0], [1, 0]]))
        )
    node.input[position] = name
    model.graph.node.insert(0, added)


def chain(chance: Chance, model: onnx.ModelProto) -> None:
    """Operators on an edge, each of which takes what the one before it gives twice: it may double with each."""
    nodes = [node for node in model.graph.node if node.input]
    if not nodes:
        return
    node = choice(chance, nodes)
    position = place(chance, node.input)
    value, operator = node.input[position], choice(chance, ["Concat", "Add", "Mul", "Sum", "Where", "Max", "MatMul"])
    axis = choice(chance, [0, 1, -1])
    added = []
    for number in range(choice(chance, (2, 20, 40))):
        made = f"chained_{len(model.graph.node)}_{number}"
        given = [value] * (3 if operator == "Where" else 2)
        added.append(helper.make_node(operator, given, [made], made))
        if operator == "Concat":
            added[-1].attribute.append(helper.make_attribute("axis", axis))
        value = made
    node.input[position] = value
    before = [*added, *map(copied, model.graph.node)]
    del model.graph.node[:]
    model.graph.node.extend(before)


def declare(chance: Chance, model: onnx.ModelProto) -> None:
    """A declared shape that is not the value's: of another rank or with sizes that cannot be."""
    shape = [choice(chance, [None, "N", *EXTENTS]) for _ in range(chance.integer(0, 6))]
    model.graph.value_info.append(helper.make_tensor_value_info(choice(chance, _values(model)), 1, shape))


def change_version(chance: Chance, model: onnx.ModelProto) -> None:
    """Another version of the operators, or of others too."""
    if model.opset_import and chance.integer(0, 3):
        choice(chance, model.opset_import).version = choice(chance, VERSIONS)
    else:
        domain = choice(chance, ["", "ai.onnx", "ai.onnx.ml", "com.microsoft", "calls"])
        model.opset_import.add(domain=domain, version=choice(chance, VERSIONS))


def drop_edge(chance: Chance, model: onnx.ModelProto) -> None:
    """An input or an output of the model, or all of them."""
    field = model.graph.input if chance.integer(0, 1) else model.graph.output
    del field[chance.integer(0, 1) :]


def nest(chance: Chance, model: onnx.ModelProto) -> None:
    """A node of the main graph moves into the body of an If or a Loop, perhaps of one within another."""
    if not model.graph.node:
        return
    position = place(chance, model.graph.node)
    inner = copied(model.graph.node[position])
    operator = choice(chance, ["If", "Loop", "Scan"])
    for depth in range(choice(chance, DEPTHS)):
        inner = _around(inner, operator, f"nested_{depth}")
    if chance.integer(0, 1):
        model.graph.initializer.append(helper.make_tensor("nested", onnx.TensorProto.BOOL, [], [1]))
    model.graph.node[position].CopyFrom(inner)


def _around(node: onnx.NodeProto, operator: str, name: str) -> onnx.NodeProto:
    """A control-flow operator with the node as its body; it gives what the node gives."""
    values = [helper.make_tensor_value_info(output, 1, None) for output in node.output]
    given = [] if operator == "If" else [helper.make_tensor_value_info(each, 1, None) for each in node.input]
    body = helper.make_graph([node], name, given, values)
    if operator == "If":
        empty = helper.make_graph([], name, [], values)  # the same body in both would double at each depth
        return helper.make_node("If", ["nested"], node.output, name, then_branch=body, else_branch=empty)
    if operator == "Loop":
        return helper.make_node("Loop", ["", "nested", *node.input], node.output, name, body=body)
    return helper.make_node("Scan", node.input, node.output, name, body=body, num_scan_inputs=len(node.input))


def call(chance: Chance, model: onnx.ModelProto) -> None:
    """A node becomes the body of a function, and calls it; functions call the next one, perhaps the first again."""
    if not model.graph.node:
        return
    node = choice(chance, model.graph.node)
    count, times = choice(chance, (1, 2, 8, 24)), choice(chance, (1, 2))
    opsets = list(model.opset_import)
    inputs = list(dict.fromkeys(name for name in node.input if name))
    last = copied(node)
    if chance.integer(0, 1):
        last = helper.make_node("function_0", inputs, node.output, domain="calls")
    for number in range(count):
        outputs = list(node.output)
        ahead = helper.make_node(f"function_{number + 1}", inputs, outputs, domain="calls")
        body = [ahead] * times if number + 1 < count else [last]
        model.functions.append(
            helper.make_function("calls", f"function_{number}", inputs, outputs, body, opsets, overload="")
        )
    model.opset_import.add(domain="calls", version=1)
    called = choice(chance, ["function_0", "function_0", "function_1", node.op_type])
    del node.attribute[:]
    del node.input[:]
    node.input.extend(inputs)
    node.op_type, node.domain = called, "calls"


def train(chance: Chance, model: onnx.ModelProto) -> None:
    """Training information with a copy of the graph, which must not be taken for what is run."""
    info = model.training_info.add()
    info.algorithm.CopyFrom(model.graph)
    info.update_binding.add(key=choice(chance, _values(model)), value=choice(chance, _values(model)))


def annotate(chance: Chance, model: onnx.ModelProto) -> None:
    """A quantization annotation of a value, and metadata like that which a rewrite leaves."""
    annotation = model.graph.quantization_annotation.add(tensor_name=choice(chance, _values(model)))
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value=choice(chance, _values(model)))
    model.metadata_props.add(key=choice(chance, ["onnx_clp.u", "onnx_clp.", "", "u"]), value="3")


NODES: tuple[Mutation, ...] = (
    *(drop_input, clear_input, clear_inputs, double_input, rewire, swap_inputs, drop_output, double_output),
    *(take_own_output, shadow, drop_attribute, change_attribute, add_attribute, change_operator, drop_node),
    *(double_node, insert, chain, declare, change_version, drop_edge, nest, call, train, annotate),
)
