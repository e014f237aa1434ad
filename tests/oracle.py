"""What a rewrite may change, by plain rules on whole models: the twin that written files are compared with.

A model is read with `onnx.load`, its subgraphs and functions are followed call by call, and every input of every node
that is known without running the model is computed with `onnx.reference`. Nothing here is shared with the package.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

Array = NDArray[Any]
Place = tuple[str, int]
"""A node's path, `outer/attribute/inner` or `call/inner`, and the position of one of its inputs."""


@dataclass(frozen=True, eq=False)
class Made:
    """An output of a node; its attributes are resolved, `inputs` is None where one is known at run time only."""

    node: NodeProto
    inputs: tuple[Value, ...]
    opset: int


Value = TensorProto | onnx.SparseTensorProto | Made | None


@dataclass(frozen=True, eq=False)
class Read:
    """An input of a node."""

    node: NodeProto
    value: Value
    outputs: tuple[Value, ...]
    """What the node makes."""


# ---- every node, call by call


class Model:
    """A model as its nodes read it."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.reads: dict[Place, Read] = {}
        self._functions = {(function.domain, function.name): function for function in proto.functions}
        self._known: dict[int, Array | None] = {}
        self._keep: list[object] = []
        self._graph(proto.graph, "", {}, _opset(proto.opset_import), {})

    def array(self, value: Value) -> Array | None:
        """The elements of a value; None where it is known at run time only."""
        if value is None:
            return None
        if id(value) not in self._known:
            self._keep.append(value)  # an id is worth nothing once its object is gone
            self._known[id(value)] = self._computed(value)
        return self._known[id(value)]

    def roots(self, value: Value) -> Iterator[TensorProto]:
        """The dense tensors that a constant is made of."""
        if isinstance(value, TensorProto):
            yield value
        elif isinstance(value, onnx.SparseTensorProto):
            yield value.values
        elif isinstance(value, Made):
            for attribute in value.node.attribute:
                yield from _tensors_of(attribute)
            for given in value.inputs:
                yield from self.roots(given)

    def _computed(self, value: TensorProto | onnx.SparseTensorProto | Made) -> Array | None:
        if isinstance(value, TensorProto):
            return numpy_helper.to_array(value) if _has_data(value) else None
        if isinstance(value, onnx.SparseTensorProto):
            return _dense(value)
        given = [self.array(part) for part in value.inputs]
        arrays = [array for array in given if array is not None]
        if len(arrays) < len(given) or value.node.domain:
            return None
        if value.node.op_type == "Constant" and value.node.attribute[0].name == "sparse_value":
            return _dense(value.node.attribute[0].sparse_tensor)
        if any(attribute.type == AttributeProto.GRAPH for attribute in value.node.attribute):
            return None
        return _evaluate(value, arrays)

    def _graph(
        self,
        graph: onnx.GraphProto,
        path: str,
        outer: Mapping[str, Value],
        opset: int,
        attributes: Mapping[str, AttributeProto],
    ) -> dict[str, Value]:
        scope = dict(outer)
        scope.update({value.name: None for value in graph.input})
        scope.update({tensor.name: tensor for tensor in graph.initializer})
        scope.update({sparse.values.name: sparse for sparse in graph.sparse_initializer})
        return self._nodes(graph.node, path, scope, opset, attributes)

    def _nodes(
        self,
        nodes: Sequence[NodeProto],
        path: str,
        scope: dict[str, Value],
        opset: int,
        attributes: Mapping[str, AttributeProto],
    ) -> dict[str, Value]:
        for node in _sorted(nodes, scope):
            name = path + (node.name or node.output[0])
            given = tuple(scope[part] if part else None for part in node.input)
            function = self._functions.get((node.domain, node.op_type))
            if function is not None:
                made = self._call(function, name, dict(zip(node.input, given, strict=True)), node)
            else:
                whole = _resolved(node, attributes)
                made = tuple(Made(whole, given, opset) if part else None for part in node.output)
                for position, value in enumerate(given):
                    assert (name, position) not in self.reads, f"two nodes are called {name}"
                    self.reads[name, position] = Read(whole, value, made)
                for attribute in whole.attribute:
                    for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                        self._graph(inner, f"{name}/{attribute.name}/", scope, opset, attributes)
            scope.update(dict(zip(node.output, made, strict=False)))
        return scope

    def _call(
        self, function: onnx.FunctionProto, name: str, actual: Mapping[str, Value], call: NodeProto
    ) -> tuple[Value, ...]:
        scope = {
            formal: actual[call.input[i]] if i < len(call.input) else None for i, formal in enumerate(function.input)
        }
        attributes = {attribute.name: attribute for attribute in (*function.attribute_proto, *call.attribute)}
        inside = self._nodes(function.node, f"{name}/", scope, _opset(function.opset_import), attributes)
        return tuple(inside[output] for output in function.output)


def _opset(imports: Iterable[onnx.OperatorSetIdProto]) -> int:
    return next((entry.version for entry in imports if not entry.domain), 1)


def _sorted(nodes: Sequence[NodeProto], scope: Mapping[str, Value]) -> Iterator[NodeProto]:
    """The nodes, each behind those that feed it."""
    waiting, known = list(nodes), {*scope, ""}
    while waiting:
        ready = [node for node in waiting if known.issuperset(_needed(node, waiting))]
        assert ready, "nodes that wait for each other"
        for node in ready:
            known.update(node.output)
            yield node
        waiting = [node for node in waiting if node not in ready]


def _needed(node: NodeProto, waiting: Sequence[NodeProto]) -> set[str]:
    """What a node reads, and what its subgraphs read of the values around them."""
    needed = set(node.input)
    made = {output for other in waiting for output in other.output}
    for attribute in node.attribute:
        for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            inner = {output for part in graph.node for output in part.output}
            for part in graph.node:
                needed |= (_needed(part, waiting) - inner) & made
    return needed


def _resolved(node: NodeProto, attributes: Mapping[str, AttributeProto]) -> NodeProto:
    if not any(attribute.ref_attr_name for attribute in node.attribute):
        return node
    whole = NodeProto()
    whole.CopyFrom(node)
    del whole.attribute[:]
    for attribute in node.attribute:
        given = attributes.get(attribute.ref_attr_name) if attribute.ref_attr_name else attribute
        if given is not None:
            whole.attribute.add().CopyFrom(given)
            whole.attribute[-1].name = attribute.name
    return whole


def _has_data(tensor: TensorProto) -> bool:
    return 0 in tensor.dims or len(tensor.ListFields()) > len(
        TensorProto(dims=tensor.dims, data_type=tensor.data_type, name=tensor.name).ListFields()
    )


def _dense(sparse: onnx.SparseTensorProto) -> Array:
    values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    for value, index in zip(values, indices, strict=True):
        dense[np.unravel_index(int(index), dense.shape) if indices.ndim == 1 else tuple(index)] = value
    return dense


def _evaluate(value: Made, arrays: Sequence[Array]) -> Array:
    names = [f"input_{i}" for i in range(len(arrays))]
    node = NodeProto()
    node.CopyFrom(value.node)
    del node.input[:]
    node.input.extend(names)
    given = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in zip(names, arrays, strict=True)
    ]
    graph = helper.make_graph([node], "constant", given, [onnx.ValueInfoProto(name=node.output[0])])
    # The reference has DequantizeLinear from version 19 on, which computes what version 10 does.
    opset = max(value.opset, 19) if node.op_type in _ROUNDING else value.opset
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    outputs: Any = ReferenceEvaluator(model).run([node.output[0]], dict(zip(names, arrays, strict=True)))
    return np.asarray(outputs[0])


# ---- what silences a channel


@dataclass(frozen=True)
class Knob:
    """An input whose slice of channel k is zero, or the zero point, where k is silent."""

    place: Place
    groups: int = 1
    rest: Place | None = None


def knobs(model: Model, site: str, channels: int) -> list[Knob]:
    """The knobs of a site, by its operator and what stands right behind it."""
    node = next(read.node for (path, _), read in model.reads.items() if path == site)
    groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    if node.op_type == "BatchNormalization":
        return [Knob((site, 1)), Knob((site, 2))]
    if node.op_type == "QLinearConv":
        return [Knob((site, 3), rest=(site, 5)), *([Knob((site, 8))] if len(node.input) > 8 else [])]
    if node.op_type == "ConvInteger":
        return [Knob((site, 1), rest=(site, 3) if len(node.input) > 3 else None), *_added(model, site, channels)]
    if node.op_type == "Mul":
        constant = next(i for i in (0, 1) if model.array(model.reads[site, i].value) is not None)
        return [Knob((site, constant)), *_added(model, site, channels)]
    weight = Knob((site, 1), groups if node.op_type == "ConvTranspose" else 1)
    bias = [Knob((site, 2))] if len(node.input) > 2 and node.input[2] else []
    return [weight, *bias, *_added(model, site, channels)]


def _added(model: Model, site: str, channels: int) -> Iterator[Knob]:
    """The constants that are added behind a site, one number a channel, while nothing else reads it."""
    value = model.reads[site, 0].outputs[0]
    while True:
        readers = [(place, read) for place, read in model.reads.items() if read.value is value]
        if len(readers) != 1:
            return
        (path, position), read = readers[0]
        other = model.reads.get((path, 1 - position))
        constant = None if other is None else model.array(other.value)
        if read.node.op_type == "Add" and constant is not None and channels in constant.shape:
            yield Knob((path, 1 - position))
        elif read.node.op_type not in {"Identity", "Cast", "Dropout", "Squeeze", "Unsqueeze", "Mul", *_ROUNDING}:
            return
        value = read.outputs[0]


_ROUNDING = ("QuantizeLinear", "DequantizeLinear")


def silent(model: Model, knob: Knob, channels: Iterable[int], total: int) -> Array:
    """What a knob reads once these channels of `total` are silent."""
    before = model.array(model.reads[knob.place].value)
    assert before is not None
    after = before.copy()
    rest = None if knob.rest is None else model.array(model.reads[knob.rest].value)
    for k in channels:
        value = 0 if rest is None else rest.ravel()[k if rest.size > 1 else 0]
        if knob.groups > 1:  # a ConvTranspose kernel (C_in, C_out/groups, *kernel)
            group, within = divmod(k, total // knob.groups)
            rows = before.shape[0] // knob.groups
            after[group * rows : (group + 1) * rows, within] = value
        else:
            axis = _channel_axis(model.reads[knob.place].node, before, total)
            np.moveaxis(after, axis, 0)[k] = value
    return after


def _channel_axis(node: NodeProto, constant: Array, channels: int) -> int:
    if constant.ndim == 1 or node.op_type in {"Conv", "FusedConv", "QLinearConv", "ConvInteger"}:
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    return constant.shape.index(channels)


# ---- two models


def load(path: Path) -> onnx.ModelProto:
    """The whole model, external data and all."""
    return onnx.load(path)


def differences(before: onnx.ModelProto, after: onnx.ModelProto, silenced: Mapping[str, Sequence[int]]) -> list[str]:
    """What differs between two models besides the silenced channels (node path → channels); empty where all is well.

    Left aside: Constant nodes that the first model does not have (what reads them is compared instead), and metadata
    whose key begins with `onnx_clp.`.
    """
    return [*_differing_reads(Model(before), Model(after), silenced), *_differing_structure(before, after, silenced)]


def channels_of(model: Model, site: str) -> int:
    """How many channels the node `site` makes."""
    node = next(read.node for (path, _), read in model.reads.items() if path == site)
    if node.op_type == "Mul":
        constant = next(a for i in (0, 1) if (a := model.array(model.reads[site, i].value)) is not None)
        return int(max(constant.shape))
    weight = model.array(model.reads[site, 3 if node.op_type == "QLinearConv" else 1].value)
    assert weight is not None
    if node.op_type == "ConvTranspose":
        groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
        return int(weight.shape[1]) * int(groups)
    return int(weight.shape[0])


def _wanted(model: Model, silenced: Mapping[str, Sequence[int]]) -> dict[Place, tuple[Array, list[TensorProto]]]:
    """What each knob should read, and the tensors of the file that this is made of."""
    wanted: dict[Place, tuple[Array, list[TensorProto]]] = {}
    for site, channels in silenced.items():
        total = channels_of(model, site)
        for knob in knobs(model, site, total):
            roots = list(model.roots(model.reads[knob.place].value))
            wanted[knob.place] = (silent(model, knob, channels, total), roots)
    return wanted


def _differing_reads(before: Model, after: Model, silenced: Mapping[str, Sequence[int]]) -> Iterator[str]:
    wanted = _wanted(before, silenced)
    if before.reads.keys() != after.reads.keys():
        yield f"nodes or inputs came or went: {sorted(before.reads.keys() ^ after.reads.keys())}"
        return
    for place, read in before.reads.items():
        old = wanted[place][0] if place in wanted else before.array(read.value)
        new = after.array(after.reads[place].value)
        if not _same(old, new) and not _on_the_way(read, before):
            yield f"{place} reads other numbers than planned"


def _on_the_way(read: Read, model: Model) -> bool:
    """Whether a node only makes a constant for others, which are compared themselves."""
    return all(model.array(output) is not None for output in read.outputs)


def _same(old: Array | None, new: Array | None) -> bool:
    if old is None or new is None:
        return old is new
    if old.dtype != new.dtype or old.shape != new.shape:
        return False
    return bool(np.all((old == new) | ((old != old) & (new != new))))  # noqa: PLR0124  NaN, also of bfloat16


def _differing_structure(
    before: onnx.ModelProto, after: onnx.ModelProto, silenced: Mapping[str, Sequence[int]]
) -> Iterator[str]:
    model = Model(before)
    # The tensors themselves, not only their ids: an id is worth nothing once its object is gone.
    edited = {id(tensor): tensor for _, roots in _wanted(model, silenced).values() for tensor in roots}
    restored = onnx.ModelProto()
    restored.CopyFrom(after)
    _restore(before, restored)
    old, new = list(tensors(before)), list(tensors(restored))
    if len(old) != len(new):
        yield "tensors came or went"
        return
    for left, right in zip(old, new, strict=True):
        if left != right:
            if id(left) not in edited:
                yield f"tensor {left.name!r} changed, and no silenced channel reads it"
            right.CopyFrom(left)  # its elements were compared where they are read
    expected = onnx.ModelProto()
    expected.CopyFrom(before)
    for proto in (expected, restored):
        kept = [entry for entry in proto.metadata_props if not entry.key.startswith("onnx_clp.")]
        del proto.metadata_props[:]
        proto.metadata_props.extend(kept)
    if expected != restored:
        yield "something besides tensors changed"


def _restore(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """Take the new Constant nodes out of `after`, and give what read them its old inputs."""
    names = {output for nodes in _node_lists(before) for node in nodes for output in node.output}
    for old, new in zip(_node_lists(before), _node_lists(after), strict=True):
        added = {node.output[0] for node in new if node.op_type == "Constant" and node.output[0] not in names}
        kept = [node for node in new if node.output[0] not in added]
        for left, right in zip(old, kept, strict=True):
            for i, name in enumerate(right.input):
                if name in added:
                    right.input[i] = left.input[i]
        for position in reversed([i for i, node in enumerate(new) if node.output[0] in added]):
            del new[position]


def _node_lists(model: onnx.ModelProto) -> list[Any]:
    """The repeated field of nodes of each graph and function, the outer before the inner."""
    lists: list[Any] = [model.graph.node, *(function.node for function in model.functions)]
    for nodes in lists:  # grows while it is walked
        for node in nodes:
            lists += [graph.node for attribute in node.attribute for graph in _graphs_of(attribute)]
    return lists


def _graphs_of(attribute: AttributeProto) -> list[onnx.GraphProto]:
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _tensors_of(attribute: AttributeProto) -> Iterator[TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    if attribute.HasField("sparse_tensor"):
        yield attribute.sparse_tensor.values
        yield attribute.sparse_tensor.indices


def tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every dense tensor of a model."""
    for graph in [
        model.graph,
        *(g for nodes in _node_lists(model) for n in nodes for a in n.attribute for g in _graphs_of(a)),
    ]:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for nodes in _node_lists(model):
        for node in nodes:
            for attribute in node.attribute:
                yield from _tensors_of(attribute)
