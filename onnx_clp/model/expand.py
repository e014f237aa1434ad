"""ModelFile → Graph: subgraphs and functions expanded, names resolved, nodes put in topological order.

Names are resolved to numbered values by the scoping rules of the ONNX IR specification
(https://onnx.ai/onnx/repo-docs/IR.html): a subgraph sees the names of the graphs around it, a function body sees only
its own. A model-local function is expanded at every call, so each call has nodes of its own. What enters and leaves a
subgraph of If, Loop or Scan becomes a *link*, a node without a prototype whose ``op_type`` is that of the operator.
Any other operator with graphs stays a node: what it does with them is not known.

Where a file breaks those rules, names are resolved as onnxruntime does, and the ambiguity is noted: of several
definitions of one name in one graph the last counts, where dense initializers come first, then Constant nodes, then
sparse initializers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from types import MappingProxyType
from typing import Final

import onnx

from onnx_clp.errors import ModelFileError
from onnx_clp.model.ambiguity import Ambiguities, doubled_payload
from onnx_clp.model.attributes import doubt, of_constant, resolved
from onnx_clp.model.calls import Calls
from onnx_clp.model.file import ModelFile
from onnx_clp.model.graph import MISSING, Attributes, Graph, Node, Shape

NAME_LIMIT: Final = 1000
"""Characters of a name with those of the calls and graphs around it, of which each node has its own copy."""

BYTES_PER_NODE: Final = 256
"""Bytes of a called function that count as one node more: every call reads its names and attributes again."""

NODES_PER_CALL: Final = 3
"""What a call costs beside the nodes of its body: names of its own, and defaults."""

PARTS_PER_NODE: Final = 8
"""Inputs, outputs and attributes, of nodes, graphs and functions, that count as one node more."""

CALL_DEPTH_LIMIT: Final = 64
"""Functions calling functions; deeper chains are not found in exported models."""

DEPTH_LIMIT: Final = 100
"""Calls and graphs within each other; each takes a few of the 1000 steps that Python goes into itself."""


@dataclass(slots=True)
class _Scope:
    """Names visible at one place: those of a graph or function body, then those around it.

    ``opsets`` are the imports of the model or function; ``values`` those of ``formals`` belong to the caller.
    """

    path: str
    opsets: Mapping[str, int]
    parent: _Scope | None = None
    values: dict[str, int] = field(default_factory=dict)
    call: Attributes | None = None
    chain: tuple[str, ...] = ()
    formals: frozenset[str] = frozenset()
    depth: int = 0

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
        self.formals: set[str] = set()
        self.count = 0
        """What the expansion costs so far, in nodes."""
        self.drafts: list[Node] = []
        """Nodes whose place in the order is not known yet: their index is MISSING."""
        self.initializers: dict[int, onnx.TensorProto | onnx.SparseTensorProto] = {}
        self.shapes: dict[int, Shape] = {}
        self.sizes: dict[str, int] = {}
        """Bytes of the functions that are called."""
        self.ambiguities = Ambiguities()
        self.doubtful: set[int] = set()
        """Values with more than one definition or payload."""
        self.defined: set[int] = set()
        self.calls = Calls(self.ambiguities)
        for entry in file.proto.opset_import:
            self.calls.add_import(_domain(entry.domain), entry.version)
        for function in file.proto.functions:
            self.calls.add_function(_domain(function.domain), _text(function.name), _text(function.overload), function)

    def value(self, name: str) -> int:
        self.names.append(name)
        return len(self.names) - 1

    def graph(self, proto: onnx.GraphProto, scope: _Scope) -> None:
        """Add the nodes and initializers of ``proto``, whose inputs ``scope`` may already know."""
        self.spend(1 + len(proto.initializer) + len(proto.sparse_initializer))
        self.spend_parts(proto.input, proto.output, proto.value_info)
        for tensor in proto.initializer:
            self.initializer(tensor, (tensor,), scope)
        for sparse in proto.sparse_initializer:
            self.initializer(sparse, (sparse.values, sparse.indices), scope)
        given: set[int] = set()
        for info in proto.input:  # an initializer of the same name is its default
            value = self.declare(info.name, scope)
            if value in given:
                self.note_twice(info.name, scope)
            given.add(value)
        self.defined |= given
        self.body(proto.node, scope)
        # onnxruntime enforces the shapes of inputs, and computes all others.
        for info in reversed(proto.input):
            shape = _shape(info)
            if shape is not None and info.name in scope.values:
                self.shapes[scope.values[info.name]] = shape

    def declare(self, name: str, scope: _Scope) -> int:
        """The value ``name`` of this very scope, made where it is new."""
        if name not in scope.values:
            scope.values[name] = self.value(_text(name))
        return scope.values[name]

    def define(self, name: str, scope: _Scope) -> int:
        """The value ``name`` of this very scope where something gives it a value; a second definition is noted."""
        again = name in scope.formals or scope.values.get(name) in self.defined
        if name in scope.formals:
            scope.values[name] = self.value(_text(name))  # the caller's value stays as it is
        value = self.declare(name, scope)
        if again:
            self.note_twice(name, scope)
        elif scope.parent is not None and scope.parent.find(name) is not None:
            detail = "it hides a value of the same name in a graph around it; the inner one was judged"
            self.ambiguities.add("shadowed", scope.path, name, detail)
        self.defined.add(value)
        return value

    def note_twice(self, name: str, scope: _Scope) -> None:
        """Note a second definition of ``name``."""
        self.doubtful.add(scope.values[name])
        detail = "it is defined more than once; the last was judged, as onnxruntime takes constants"
        self.ambiguities.add("duplicate-name", scope.path, name, detail)

    def initializer(
        self,
        proto: onnx.TensorProto | onnx.SparseTensorProto,
        tensors: tuple[onnx.TensorProto, ...],
        scope: _Scope,
    ) -> None:
        """Add an initializer, which is stored in ``tensors`` and has the name of the first."""
        value = self.define(tensors[0].name, scope)
        self.initializers[value] = proto
        self.payloads(tensors, scope.path, tensors[0].name, (value,))

    def payloads(self, tensors: Iterable[onnx.TensorProto], path: str, name: str, values: Iterable[int]) -> None:
        """Note ``tensors`` that hold their numbers twice; ``values`` are made of them."""
        detail = doubled_payload(self.file, tensors)
        if detail:
            self.ambiguities.add("payload", path, name, detail)
            self.doubtful.update(values)

    def body(self, nodes: Iterable[onnx.NodeProto], scope: _Scope) -> None:
        """Add ``nodes``. Outputs are declared first, since the order of the nodes is not trusted."""
        nodes = tuple(nodes)
        for node in nodes:
            self.spend_parts(node.input, node.output, node.attribute)
            for name in node.output:
                if name:
                    self.define(name, scope)
        for node in nodes:
            self.node(node, scope)

    def resolve(self, name: str, scope: _Scope) -> int:
        if not name:
            return MISSING
        found = scope.find(name)
        # A name that nothing defines: a value of its own, so that what reads it is seen to lack its data.
        return found if found is not None else self.declare(name, scope)

    def spend(self, nodes: int) -> None:
        """Count ``nodes``. Raises ModelFileError where they are too many."""
        self.count += nodes
        limit = self.file.meter.limits.nodes
        if self.count > limit:
            raise ModelFileError(
                f"{self.file.path} has more than {limit:,} nodes and tensors, with every call of a function counted",
                f"if that is what it should have, raise the limit: --limit nodes={10 * limit}",
            )

    def spend_parts(self, *parts: Sized) -> None:
        """Count what is read, and kept, again at every call."""
        self.spend(sum(map(len, parts)) // PARTS_PER_NODE)

    def node(self, proto: onnx.NodeProto, scope: _Scope) -> None:
        """Add one node; a call of a model-local function adds the nodes of its body."""
        self.spend(1)
        if scope.depth > DEPTH_LIMIT:
            raise ModelFileError(f"{self.file.path} has calls and graphs within each other {DEPTH_LIMIT} deep")
        own_name = _text(proto.name) or next(iter(proto.output), "") or _text(proto.op_type)
        name = (scope.path + own_name)[:NAME_LIMIT] if scope.path else own_name
        op_type, domain = _text(proto.op_type), _domain(proto.domain)
        inputs = tuple(self.resolve(given, scope) for given in proto.input)
        outputs = tuple(scope.values[made] if made else MISSING for made in proto.output)
        attributes = self.attributes(proto, scope, outputs)
        if op_type == "Constant":
            domain, outputs = "", tuple(map(self.behind_sparse, outputs))
        self.calls.note_version(op_type, domain, scope.opsets, scope.path, own_name)
        key, function = self.calls.called(domain, op_type, _text(proto.overload), scope.opsets)
        if function is not None:
            if key in scope.chain:
                raise ModelFileError(f"{self.file.path} has a function that calls itself ({op_type[:80]!r})")
            if len(scope.chain) >= CALL_DEPTH_LIMIT:
                raise ModelFileError(f"{self.file.path} has functions that call each other {CALL_DEPTH_LIMIT} deep")
            if key not in self.sizes:
                self.sizes[key] = function.ByteSize()
            self.spend(NODES_PER_CALL + self.sizes[key] // BYTES_PER_NODE)
            self.function(function, name, inputs, outputs, attributes, (*scope.chain, key), scope.depth + 1)
            return
        subgraphs = [
            (attribute.name, graph)
            for attribute in attributes.values()
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs)
        ]
        if subgraphs and not domain and op_type in _DECIDING:
            self.control_flow(op_type, name, scope, inputs, outputs, attributes, subgraphs)
            return
        deciding = tuple(self.unknown_use(attribute, graph, name, scope) for attribute, graph in subgraphs)
        self.drafts.append(
            Node(
                MISSING,
                proto.op_type,
                domain,
                self.calls.opset(domain),
                name,
                inputs,
                outputs,
                attributes,
                self.file.layout.nodes[int(proto.doc_string)],
                deciding=deciding,
            )
        )

    def attributes(self, proto: onnx.NodeProto, scope: _Scope, outputs: tuple[int, ...]) -> Attributes:
        """The attributes of ``proto`` by name; what is ambiguous about them is noted."""
        if not proto.attribute:
            return {}
        found = resolved(proto, scope.call)
        for name, attribute in found:
            _text(name)
            name = next(iter(proto.output), "")  # noqa: PLW2901  # tensors of attributes have no names of their own
            if attribute.HasField("t"):
                self.payloads((attribute.t,), scope.path, name, outputs)
            if attribute.HasField("sparse_tensor"):
                stored = attribute.sparse_tensor
                self.payloads((stored.values, stored.indices), scope.path, name, outputs)
        detail = doubt(proto, found, scope.call)
        if detail:
            self.ambiguities.add("attribute", scope.path, proto.name or next(iter(proto.output), ""), detail)
            self.doubtful.update(outputs)
        return of_constant(found) if proto.op_type == "Constant" else dict(found)

    def behind_sparse(self, output: int) -> int:
        """An output of a Constant: a value that nothing reads where a sparse initializer has its name."""
        hidden = isinstance(self.initializers.get(output), onnx.SparseTensorProto)
        return self.value(self.names[output]) if hidden else output

    def link(
        self,
        op_type: str,
        name: str,
        source: Iterable[int],
        target: int,
        carried: tuple[int, ...] = (),
        deciding: tuple[int, ...] = (),
    ) -> None:
        self.spend(1)
        inputs, nothing = tuple(source), MappingProxyType[str, onnx.AttributeProto]({})
        self.drafts.append(Node(MISSING, op_type, "", 0, name, inputs, (target,), nothing, None, carried, deciding))

    def function(
        self,
        function: onnx.FunctionProto,
        name: str,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        attributes: Attributes,
        chain: tuple[str, ...],
        depth: int,
    ) -> None:
        """Add the body of ``function`` for one call."""
        self.spend_parts(function.input, function.output, function.attribute_proto, function.opset_import)
        defaults: dict[str, onnx.AttributeProto] = {}
        for attribute in function.attribute_proto:
            if attribute.name in defaults:
                detail = "it has two defaults for an attribute; the first was judged, as onnxruntime takes it"
                self.ambiguities.add("attribute", "", chain[-1], detail)
            defaults.setdefault(attribute.name, attribute)
        opsets = {_domain(entry.domain): entry.version for entry in function.opset_import}
        formals = frozenset(function.input)
        self.formals |= formals
        path = f"{name}/"[:NAME_LIMIT]
        scope = _Scope(path, opsets, call={**defaults, **attributes}, chain=chain, formals=formals, depth=depth)
        for position, formal in enumerate(function.input):
            given = inputs[position] if position < len(inputs) else MISSING
            twice = formal in scope.values
            scope.values[formal] = given if given != MISSING else self.value(_text(formal))
            if twice:
                self.note_twice(formal, scope)
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
        """Add the subgraphs of an If, Loop or Scan, and the links into and out of them."""
        self.spend(len(outputs) * len(subgraphs) // PARTS_PER_NODE)  # each output may have a source in each
        ends = [self.subgraph(attribute, graph, name, scope) for attribute, graph in subgraphs]
        for formals, results in ends:
            for formal, source, carried in _entries(op_type, attributes, inputs, formals, results):
                self.link(op_type, name, (source,) if source != MISSING else (), formal, carried)
        # Which branch runs, and how often a body does, is not in the channels that come out.
        deciding = inputs[: _DECIDING[op_type]]
        if op_type == "Loop":
            deciding += tuple(results[0] for _, results in ends if results)
        condition_first = 1 if op_type == "Loop" else 0  # a Loop body gives its condition before its results
        for position, target in enumerate(outputs, condition_first):
            sources = tuple(results[position] for _, results in ends if position < len(results))
            if target != MISSING:
                self.link(op_type, name, sources, target, deciding=deciding)

    def unknown_use(self, attribute: str, graph: onnx.GraphProto, name: str, scope: _Scope) -> int:
        """Add a graph of an operator that may do anything with it: its inputs come from nowhere, its results may count.

        They enter a link, since a reader that has them among no inputs is not looked for; the value that it makes.
        """
        _, results = self.subgraph(attribute, graph, name, scope)
        used = self.value(attribute)
        self.link("Graph", name, results, used)
        return used

    def subgraph(
        self, attribute: str, graph: onnx.GraphProto, name: str, scope: _Scope
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Add a graph of the node ``name``; its inputs, which nothing makes yet, and its results."""
        path, depth = f"{name}/{attribute}/"[:NAME_LIMIT], scope.depth + 1
        inner = _Scope(path, scope.opsets, parent=scope, call=scope.call, chain=scope.chain, depth=depth)
        formals = tuple(self.declare(info.name, inner) for info in graph.input)
        self.graph(graph, inner)
        return formals, tuple(self.resolve(info.name, inner) for info in graph.output)


_DECIDING: Final = MappingProxyType({"If": 1, "Loop": 2, "Scan": 0})
"""Operators of control flow, and how many of their first inputs say what runs: condition, trip count."""


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
        source = inputs[outer] if 0 <= outer < len(inputs) else MISSING
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


def build_graph(file: ModelFile) -> Graph:
    """The flat graph of ``file``.

    Raises ModelFileError where functions call each other without end, or the nodes are more than ``Limits.nodes``.
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
    scope = _Scope("", builder.calls.opsets)
    builder.graph(proto, scope)
    given = {scope.values[info.name] for info in proto.input}
    constants = {value for draft in builder.drafts if draft.op_type == "Constant" for value in draft.outputs}
    defaults = builder.initializers.keys() | constants
    nodes, cyclic = _ordered(builder.drafts)
    producers = {value: node for node in nodes for value in node.outputs if value != MISSING}
    consumers: dict[int, list[Node]] = {}
    for node in nodes:
        for value in (*node.inputs, *node.carried, *node.deciding):
            consumers.setdefault(value, []).append(node)
    outputs = frozenset(builder.resolve(info.name, scope) for info in proto.output)
    return Graph(
        nodes=nodes,
        names=tuple(builder.names),
        formals=frozenset(builder.formals),
        producers=producers,
        consumers={value: tuple(readers) for value, readers in consumers.items()},
        initializers=builder.initializers,
        overridable=frozenset(given & defaults),
        inputs=frozenset(given - defaults),
        outputs=outputs,
        shapes=builder.shapes,
        live=_live(outputs, producers),
        cyclic=cyclic,
        ambiguous=builder.ambiguities.named,
        ambiguities=builder.ambiguities.count,
        doubtful=frozenset(builder.doubtful),
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
            pending += (*node.inputs, *node.carried, *node.deciding)
    return frozenset(live)
