"""ModelFile → Graph: subgraphs and functions expanded, names resolved, nodes put in topological order.

Names are resolved to numbered values by the scoping rules of the ONNX IR specification
(https://onnx.ai/onnx/repo-docs/IR.html): a subgraph sees the names of the graphs around it, a function body sees only
its own. A model-local function is expanded at every call, so each call has nodes of its own. What enters and leaves a
subgraph becomes a *link*, a node without a prototype whose ``op_type`` is that of the control-flow operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from types import MappingProxyType
from typing import Final

import onnx

from onnx_clp.errors import ModelFileError
from onnx_clp.model.file import ModelFile
from onnx_clp.model.graph import MISSING, Attributes, Graph, Node, Shape

NODE_LIMIT: Final = 1_000_000
"""Nodes after expansion of the functions; functions calling functions twice each would grow without end."""

CALL_DEPTH_LIMIT: Final = 64
"""Functions calling functions; deeper chains are not found in exported models."""


@dataclass(slots=True)
class _Scope:
    """Names visible at one place: those of a graph or function body, then those around it."""

    path: str
    opsets: Mapping[str, int]
    parent: _Scope | None = None
    values: dict[str, int] = field(default_factory=dict)
    call: Attributes | None = None
    chain: tuple[tuple[str, str, str], ...] = ()

    def find(self, name: str) -> int | None:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.values:
                return scope.values[name]
            scope = scope.parent
        return None


class _Builder:
    """Collects drafts of nodes over all scopes."""

    def __init__(self, file: ModelFile) -> None:
        self.file = file
        self.names: list[str] = []
        self.drafts: list[Node] = []
        """Nodes whose place in the order is not known yet: their index is MISSING."""
        self.initializers: dict[int, onnx.TensorProto | onnx.SparseTensorProto] = {}
        self.shapes: dict[int, Shape] = {}
        self.functions = {
            (_domain(function.domain), _text(function.name), function.overload): function
            for function in file.proto.functions
        }

    def value(self, name: str) -> int:
        self.names.append(name)
        return len(self.names) - 1

    def graph(self, proto: onnx.GraphProto, scope: _Scope) -> None:
        """Add the nodes and initializers of ``proto``, whose inputs ``scope`` may already know."""
        for tensor in proto.initializer:
            self.initializers[self.declare(tensor.name, scope)] = tensor
        for sparse in proto.sparse_initializer:
            self.initializers[self.declare(sparse.values.name, scope)] = sparse
        for info in proto.input:
            self.declare(info.name, scope)
        self.body(proto.node, scope)
        for info in (*proto.value_info, *proto.input, *proto.output):
            shape = _shape(info)
            if shape is not None and info.name in scope.values:
                self.shapes[scope.values[info.name]] = shape

    def declare(self, name: str, scope: _Scope) -> int:
        """The value ``name`` of this very scope, made where it is new."""
        if name not in scope.values:
            scope.values[name] = self.value(_text(name))
        return scope.values[name]

    def body(self, nodes: Iterable[onnx.NodeProto], scope: _Scope) -> None:
        """Add ``nodes``. Outputs are declared first, since the order of the nodes is not trusted."""
        nodes = tuple(nodes)
        for node in nodes:
            for name in node.output:
                if name:
                    self.declare(name, scope)
        for node in nodes:
            self.node(node, scope)

    def resolve(self, name: str, scope: _Scope) -> int:
        if not name:
            return MISSING
        found = scope.find(name)
        # A name that nothing defines: a value of its own, so that what reads it is seen to lack its data.
        return found if found is not None else self.declare(name, scope)

    def node(self, proto: onnx.NodeProto, scope: _Scope) -> None:
        """Add one node; a call of a model-local function adds the nodes of its body."""
        if len(self.drafts) >= NODE_LIMIT:
            raise ModelFileError(
                f"{self.file.path} expands to more than {NODE_LIMIT:,} nodes; its functions call too often"
            )
        name = scope.path + (_text(proto.name) or next(iter(proto.output), "") or _text(proto.op_type))
        op_type, domain = _text(proto.op_type), _domain(proto.domain)
        inputs = tuple(self.resolve(given, scope) for given in proto.input)
        outputs = tuple(scope.values[made] if made else MISSING for made in proto.output)
        attributes = _attributes(proto, scope.call)
        key = (domain, op_type, proto.overload)
        function = self.functions.get(key)
        if function is not None:
            if key in scope.chain or len(scope.chain) >= CALL_DEPTH_LIMIT:
                raise ModelFileError(
                    f"{self.file.path} has functions that call each other without end ({proto.op_type})"
                )
            self.function(function, name, inputs, outputs, attributes, (*scope.chain, key))
            return
        subgraphs = [
            (attribute.name, graph)
            for attribute in attributes.values()
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs)
        ]
        if subgraphs:
            self.control_flow(proto.op_type, name, scope, inputs, outputs, attributes, subgraphs)
            return
        self.drafts.append(
            Node(
                MISSING,
                proto.op_type,
                domain,
                scope.opsets.get(domain, 0),
                name,
                inputs,
                outputs,
                attributes,
                self.file.layout.nodes[int(proto.doc_string)],
            )
        )

    def link(self, op_type: str, name: str, source: Iterable[int], target: int, carried: tuple[int, ...] = ()) -> None:
        inputs, nothing = tuple(source), MappingProxyType[str, onnx.AttributeProto]({})
        self.drafts.append(Node(MISSING, op_type, "", 0, name, inputs, (target,), nothing, None, carried))

    def function(
        self,
        function: onnx.FunctionProto,
        name: str,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        attributes: Attributes,
        chain: tuple[tuple[str, str, str], ...],
    ) -> None:
        """Add the body of ``function`` for one call."""
        defaults = {attribute.name: attribute for attribute in function.attribute_proto}
        opsets = {_domain(entry.domain): entry.version for entry in function.opset_import}
        scope = _Scope(f"{name}/", opsets, call={**defaults, **attributes}, chain=chain)
        for position, formal in enumerate(function.input):
            given = inputs[position] if position < len(inputs) else MISSING
            scope.values[formal] = given if given != MISSING else self.value(_text(formal))
        self.body(function.node, scope)
        for formal, target in zip(function.output, outputs, strict=False):
            if target != MISSING:
                self.link("Identity", name, (self.resolve(formal, scope),), target)

    def control_flow(
        self,
        op_type: str,
        name: str,
        scope: _Scope,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        attributes: Attributes,
        subgraphs: list[tuple[str, onnx.GraphProto]],
    ) -> None:
        """Add the subgraphs of If, Loop, Scan or another operator with graphs, and the links into and out of them."""
        entered: list[tuple[int, ...]] = []
        made: list[tuple[int, ...]] = []
        for attribute, graph in subgraphs:
            inner = _Scope(f"{name}/{attribute}/", scope.opsets, parent=scope, call=scope.call, chain=scope.chain)
            entered.append(tuple(self.declare(info.name, inner) for info in graph.input))
            self.graph(graph, inner)
            made.append(tuple(self.resolve(info.name, inner) for info in graph.output))
        for formals, results in zip(entered, made, strict=True):
            for formal, source, carried in _entries(op_type, attributes, inputs, formals, results):
                self.link(op_type, name, (source,) if source != MISSING else (), formal, carried)
        condition_first = 1 if op_type == "Loop" else 0  # a Loop body gives its condition before its results
        for position, target in enumerate(outputs, condition_first):
            sources = tuple(results[position] for results in made if position < len(results))
            if target != MISSING:
                self.link(op_type, name, sources if op_type in _CONTROL_FLOW else (*inputs, *sources), target)


_CONTROL_FLOW: Final = frozenset({"If", "Loop", "Scan"})


def _entries(
    op_type: str, attributes: Attributes, inputs: tuple[int, ...], formals: tuple[int, ...], results: tuple[int, ...]
) -> Iterable[tuple[int, int, tuple[int, ...]]]:
    """For each input of a body: the value, the one it starts from (or MISSING), and those of the iteration before.

    Loop (opset 1): (trip count, condition, carried …) enters as (iteration, condition, carried …), and the body gives
    (condition, carried …, scanned …). Scan (opset 9): (states …, scanned …) enters so, the body gives (states …,
    scanned …); Scan-8 had the sequence lengths before them.
    """
    first = len(inputs) - len(formals) if op_type == "Scan" else 0
    scanned = attributes["num_scan_inputs"].i if op_type == "Scan" and "num_scan_inputs" in attributes else 0
    for position, formal in enumerate(formals):
        outer = position + first
        source = inputs[outer] if op_type in _CONTROL_FLOW and 0 <= outer < len(inputs) else MISSING
        if op_type == "Loop":
            carried = results[position - 1 : position] if position else ()
            source = source if position else MISSING
        else:
            carried = results[position : position + 1] if position < len(formals) - scanned else ()
        yield formal, source, carried


def _text(name: str | bytes) -> str:
    """``name`` as protobuf gives it: as bytes where it is not UTF-8, which is refused here."""
    if isinstance(name, bytes):
        raise _NotTextError(name[:100])
    return name


class _NotTextError(Exception):
    """A name that is not UTF-8."""


def _domain(domain: str) -> str:
    """The default domain has two spellings."""
    return "" if _text(domain) == "ai.onnx" else domain


def _shape(info: onnx.ValueInfoProto) -> Shape | None:
    """The declared shape of a value, None where none is declared."""
    if not info.type.HasField("tensor_type") or not info.type.tensor_type.HasField("shape"):
        return None
    return tuple(
        dimension.dim_value if dimension.HasField("dim_value") else None
        for dimension in info.type.tensor_type.shape.dim
    )


def _attributes(proto: onnx.NodeProto, call: Attributes | None) -> Attributes:
    """The attributes of ``proto`` by name; one that refers to an attribute of the function is the call's."""
    attributes = {}
    for attribute in proto.attribute:
        _text(attribute.name)
        if not attribute.ref_attr_name:
            attributes[attribute.name] = attribute
        elif call is not None and attribute.ref_attr_name in call:
            attributes[attribute.name] = call[attribute.ref_attr_name]
    return attributes


def build_graph(file: ModelFile) -> Graph:
    """The flat graph of ``file``.

    Raises ModelFileError where functions call each other without end or the graph has more than NODE_LIMIT nodes.
    """
    try:
        return _build(file)
    except _NotTextError as error:
        raise ModelFileError(
            f"{file.path} has a name that is not UTF-8: {error.args[0]!r}", "export it again"
        ) from error


def _build(file: ModelFile) -> Graph:
    builder = _Builder(file)
    proto = file.proto.graph
    scope = _Scope("", {_domain(entry.domain): entry.version for entry in file.proto.opset_import})
    builder.graph(proto, scope)
    given = {scope.values[info.name] for info in proto.input}
    nodes, cyclic = _ordered(builder.drafts)
    producers = {value: node for node in nodes for value in node.outputs if value != MISSING}
    consumers: dict[int, list[Node]] = {}
    for node in nodes:
        for value in (*node.inputs, *node.carried):
            consumers.setdefault(value, []).append(node)
    outputs = frozenset(builder.resolve(info.name, scope) for info in proto.output)
    return Graph(
        nodes=nodes,
        names=tuple(builder.names),
        producers=producers,
        consumers={value: tuple(readers) for value, readers in consumers.items()},
        initializers=builder.initializers,
        overridable=frozenset(given & builder.initializers.keys()),
        inputs=frozenset(given - builder.initializers.keys()),
        outputs=outputs,
        shapes=builder.shapes,
        live=_live(outputs, producers),
        cyclic=cyclic,
    )


def _ordered(drafts: list[Node]) -> tuple[tuple[Node, ...], tuple[str, ...]]:
    """Nodes in topological order (as in the file where that is one), and the names of those on or after a cycle."""
    maker = {value: position for position, draft in enumerate(drafts) for value in draft.outputs if value != MISSING}
    waiting: list[int] = []
    readers: dict[int, list[int]] = {}
    for position, draft in enumerate(drafts):
        needs = {maker[value] for value in draft.inputs if value in maker}
        waiting.append(len(needs))
        for need in needs:
            readers.setdefault(need, []).append(position)
    ready = [position for position, count in enumerate(waiting) if count == 0]
    heapify(ready)
    nodes: list[Node] = []
    while ready:
        position = heappop(ready)
        nodes.append(replace(drafts[position], index=len(nodes)))
        for reader in readers.get(position, ()):
            waiting[reader] -= 1
            if waiting[reader] == 0:
                heappush(ready, reader)
    return tuple(nodes), tuple(draft.name for draft, count in zip(drafts, waiting, strict=True) if count)


def _live(outputs: frozenset[int], producers: Mapping[int, Node]) -> frozenset[int]:
    """Indexes of the nodes that ``outputs`` depend on."""
    live: set[int] = set()
    pending = list(outputs)
    while pending:
        node = producers.get(pending.pop())
        if node is not None and node.index not in live:
            live.add(node.index)
            pending += (*node.inputs, *node.carried)
    return frozenset(live)
