"""The attributes of a node as onnxruntime takes them, and what is ambiguous about them."""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType
from typing import Final

import onnx
from onnx import AttributeProto

from onnx_clp.model.graph import Attributes

_FIELDS: Final = MappingProxyType(
    {
        AttributeProto.FLOAT: "f",
        AttributeProto.INT: "i",
        AttributeProto.STRING: "s",
        AttributeProto.TENSOR: "t",
        AttributeProto.GRAPH: "g",
        AttributeProto.SPARSE_TENSOR: "sparse_tensor",
        AttributeProto.TYPE_PROTO: "tp",
        AttributeProto.FLOATS: "floats",
        AttributeProto.INTS: "ints",
        AttributeProto.STRINGS: "strings",
        AttributeProto.TENSORS: "tensors",
        AttributeProto.GRAPHS: "graphs",
        AttributeProto.SPARSE_TENSORS: "sparse_tensors",
        AttributeProto.TYPE_PROTOS: "type_protos",
    }
)
"""Which field holds the value of an attribute of which type."""

_BESIDE_THE_VALUE: Final = frozenset({"name", "doc_string", "type", "ref_attr_name"})

_OF_CONSTANT: Final = MappingProxyType(
    {
        AttributeProto.TENSOR: "value",
        AttributeProto.SPARSE_TENSOR: "sparse_value",
        AttributeProto.FLOAT: "value_float",
        AttributeProto.FLOATS: "value_floats",
        AttributeProto.INT: "value_int",
        AttributeProto.INTS: "value_ints",
        AttributeProto.STRING: "value_string",
        AttributeProto.STRINGS: "value_strings",
    }
)
"""The attribute of a Constant by its type."""


def resolved(proto: onnx.NodeProto, call: Attributes | None) -> list[tuple[str, AttributeProto]]:
    """The attributes of ``proto`` with their names, in the order of the file.

    Within a function (``call`` is not None) one that refers to an attribute of the function is the call's, or left out
    where the call has none. Elsewhere onnxruntime ignores the reference.
    """
    found: list[tuple[str, AttributeProto]] = []
    for attribute in proto.attribute:
        if not attribute.ref_attr_name or call is None:
            found.append((attribute.name, attribute))
        elif attribute.ref_attr_name in call:
            found.append((attribute.name, call[attribute.ref_attr_name]))
    return found


def of_constant(found: list[tuple[str, AttributeProto]]) -> dict[str, AttributeProto]:
    """The attribute that gives a Constant its value: the first, under the name that belongs to its type.

    onnxruntime makes initializers of Constant nodes before it checks them, and asks for nothing else.
    """
    if not found:
        return {}
    name, attribute = found[0]
    return {_OF_CONSTANT.get(attribute.type, name): attribute}


def doubt(proto: onnx.NodeProto, found: list[tuple[str, AttributeProto]], call: Attributes | None) -> str:
    """What is ambiguous about the attributes of ``proto``, and what was judged; empty where nothing is."""
    if proto.op_type == "Constant":
        if proto.domain not in {"", "ai.onnx"}:
            return "it is a Constant of another domain; its value was judged, as onnxruntime takes it"
        if len(found) > 1:
            return "it is a Constant with several values; the first was judged, as onnxruntime takes it"
        if any(_OF_CONSTANT.get(attribute.type, name) != name for name, attribute in found):
            return "the name of its value says another type than the value has; the value was judged"
    if len({attribute.name for attribute in proto.attribute}) < len(proto.attribute):
        return "it has an attribute twice; the last was judged"
    if call is None and any(attribute.ref_attr_name for attribute in proto.attribute):
        return "it refers to an attribute of a function and is in none; its own value was judged, as onnxruntime does"
    if _mistyped(attribute for _, attribute in found):
        return "an attribute holds a value of another type than it says; what its operator expects was judged"
    return ""


def _mistyped(attributes: Iterable[AttributeProto]) -> bool:
    """Whether one holds a value, or several, in fields that its type does not name; early files name no type."""
    for attribute in attributes:
        fields = [field.name for field, _ in attribute.ListFields()]
        expected = _FIELDS.get(attribute.type)
        if fields == ["name", expected, "type"]:
            continue  # nearly all of them
        held = {*fields} - _BESIDE_THE_VALUE
        if len(held) > 1 or (expected is not None and held - {expected}):
            return True
    return False
