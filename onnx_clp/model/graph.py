"""The flat graph: every node that can run, of the main graph, its subgraphs and its functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import onnx

from onnx_clp.model.ambiguity import Ambiguity
from onnx_clp.model.wire import NodeLayout

MISSING: Final = -1
"""Stands in for an optional input or output that is left out."""

Shape = tuple[int | None, ...]
Attributes = Mapping[str, onnx.AttributeProto]


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One node of the flat graph.

    Attributes:
        index: Position in ``Graph.nodes``.
        op_type: The operator, e.g. ``Conv``.
        domain: Its domain; the default domain is the empty string.
        opset: Version of the domain's operator set in which it runs: the one that the model imports, in functions too.
        name: The node's name (its first output's where it has none), after the names of the calls and graphs around it.
        inputs: Values, MISSING where left out.
        outputs: Values, MISSING where left out.
        attributes: By name, references to attributes of a function resolved.
        layout: Where the node lies in the file; None for a link.
        carried: Values that a link reads from the iteration before.
        deciding: Values whose channels it does not pass on and on which its outputs depend all the same.
    """

    index: int
    op_type: str
    domain: str
    opset: int
    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    attributes: Attributes
    layout: NodeLayout | None
    carried: tuple[int, ...] = ()
    deciding: tuple[int, ...] = ()

    @property
    def standard(self) -> bool:
        """Whether the operator is one of ONNX's default domain."""
        return not self.domain

    @property
    def full_op_type(self) -> str:
        """The operator with its domain, where that is not the default one."""
        return f"{self.domain}.{self.op_type}" if self.domain else self.op_type

    def integer(self, name: str, default: int) -> int:
        """The INT attribute ``name``."""
        attribute = self.attributes.get(name)
        return int(attribute.i) if attribute is not None else default

    def number(self, name: str, default: float) -> float:
        """The FLOAT attribute ``name``."""
        attribute = self.attributes.get(name)
        return float(attribute.f) if attribute is not None else default

    def integers(self, name: str) -> tuple[int, ...] | None:
        """The INTS attribute ``name``; None where it is left out."""
        attribute = self.attributes.get(name)
        return tuple(attribute.ints) if attribute is not None else None

    def text(self, name: str, default: str) -> str:
        """The STRING attribute ``name``."""
        attribute = self.attributes.get(name)
        return attribute.s.decode("utf-8", "replace") if attribute is not None else default

    def input(self, position: int) -> int:
        """The value at input ``position``, MISSING where it is left out."""
        return self.inputs[position] if position < len(self.inputs) else MISSING


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A model's graph with everything inlined.

    Attributes:
        nodes: In topological order.
        names: Name of each value.
        formals: Names that functions have for what they are called with, which are no values of their own.
        producers: The node that makes a value.
        consumers: The nodes that read a value, each once per input that does.
        initializers: Tensors by value, sparse ones too.
        overridable: Values with an initializer that is a graph input too: a caller can override it.
        inputs: The main graph's inputs that have no initializer.
        outputs: The main graph's outputs.
        shapes: Declared shapes of inputs.
        live: Indexes of the nodes that some graph output depends on.
        cyclic: Names of nodes that depend on their own output; they are not in ``nodes``.
        ambiguous: What two runtimes may read differently; some of it where it is much.
        ambiguities: How much there is of it.
        doubtful: Values of which two runtimes may take different numbers.
    """

    nodes: tuple[Node, ...]
    names: tuple[str, ...]
    formals: frozenset[str]
    producers: Mapping[int, Node]
    consumers: Mapping[int, tuple[Node, ...]]
    initializers: Mapping[int, onnx.TensorProto | onnx.SparseTensorProto]
    overridable: frozenset[int]
    inputs: frozenset[int]
    outputs: frozenset[int]
    shapes: Mapping[int, Shape]
    live: frozenset[int]
    cyclic: tuple[str, ...]
    ambiguous: tuple[Ambiguity, ...]
    ambiguities: int
    doubtful: frozenset[int]

    def name_of(self, value: int) -> str:
        """The name of ``value`` in its own scope; empty where it is MISSING."""
        return self.names[value] if value != MISSING else ""
