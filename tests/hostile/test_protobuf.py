"""Bytes that are almost protobuf: each file gives a report or an error of ours, without much memory.

tests/test_wire.py compares the walk with protobuf's own parser on any message; here the files are scanned and
rewritten, and each case that somebody may have thought of has its name.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import onnx
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import SparseTensorProto, StringStringEntryProto, TensorProto, numpy_helper

from onnx_clp import Limits, ModelFileError, OnnxClpError, ScanReport, sanitize, scan
from onnx_clp.cli import run
from onnx_clp.model import wire
from onnx_clp.model.edits import encode_varint, length_delimited
from tests.built import NAMES, build
from tests.cases.net import Net
from tests.test_wire import check as walked_as_protobuf_reads_it

VARINT, FIXED64, LENGTH, START_GROUP, END_GROUP, FIXED32 = range(6)

MODEL_GRAPH, GRAPH_NODE, GRAPH_TENSOR, NODE_ATTRIBUTE, ATTRIBUTE_TENSOR, ATTRIBUTE_GRAPH = 7, 1, 5, 5, 5, 6
DIMS, DATA_TYPE, FLOAT_DATA, NAME, RAW_DATA, GRAPH_NAME, DOC = 1, 2, 4, 8, 9, 2, 10

laws = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))


def tag(number: int, kind: int) -> bytes:
    return encode_varint(number << 3 | kind)


def little(outlier: int | None = 5) -> onnx.ModelProto:
    """A Conv with an outlier, in a few kilobytes."""
    net = Net()
    net.tail(net.conv(net.feed(1, 1, 4, 4), net.kernel(16, 1, 3, 3, outlier=outlier), net.vector(16)), 16)
    return net.case("little").model


def put(content: bytes, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(content)
    return path


def outcome(content: bytes, folder: Path) -> ScanReport | OnnxClpError:
    """What a scan gives; a planned rewrite must give an error of ours or a plan. Anything else is raised further."""
    path = put(content, folder)
    try:
        planned: object = sanitize(path, folder / "out.onnx", dry_run=True, max_share=1)
    except OnnxClpError as error:
        planned = error
    try:
        report = scan(path)
    except OnnxClpError as error:
        refusal = error
    else:
        assert not isinstance(planned, ModelFileError)
        return report
    assert "\n" not in str(refusal)
    assert isinstance(planned, OnnxClpError)
    return refusal


def refused_by_the_walk(found: ScanReport | OnnxClpError) -> None:
    """Before protobuf sees it, which says nothing of where."""
    assert isinstance(found, ModelFileError)
    assert "at byte" in found.message


def findings(report: ScanReport | OnnxClpError) -> list[tuple[str, str, tuple[float, ...]]]:
    """What a scan says of a model, to compare with what it says of another spelling of it."""
    assert isinstance(report, ScanReport), report
    return [(layer.name, layer.status, layer.bounds) for layer in report.layers]


# ---- truncated


def test_every_prefix_of_a_model_is_read_or_refused(tmp_path: Path) -> None:
    content = little().SerializeToString()
    read = [length for length in range(len(content)) if isinstance(outcome(content[:length], tmp_path), ScanReport)]
    # Only between the fields of the outermost message, and before its end there are few.
    assert len(read) < 5
    assert isinstance(outcome(content, tmp_path), ScanReport)


@pytest.mark.parametrize(
    "case", ["function_nested", "if_own_initializers", "sparse_constant_node", "qdq_int8_per_axis"]
)
def test_prefixes_of_larger_models_are_read_or_refused(case: str, tmp_path: Path) -> None:
    content = build(case).model.SerializeToString()
    for length in range(0, len(content), max(1, len(content) // 250)):
        outcome(content[:length], tmp_path)


@laws
@given(st.sampled_from(NAMES), st.floats(0, 1))
def test_a_prefix_of_any_model_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, name: str, at: float
) -> None:
    content = build(name).model.SerializeToString()
    folder = tmp_path_factory.getbasetemp() / "prefix"
    folder.mkdir(exist_ok=True)
    outcome(content[: int(at * len(content))], folder)


# ---- varints


def around(inner: bytes) -> dict[str, bytes]:
    """A field at each depth of a model: of the model, its graph, a node, an attribute, a tensor."""
    tensor = length_delimited(GRAPH_TENSOR, length_delimited(NAME, b"t") + inner)
    attribute = length_delimited(NODE_ATTRIBUTE, length_delimited(1, b"a") + inner)
    return {
        "the model": length_delimited(MODEL_GRAPH, b"") + inner,
        "the graph": length_delimited(MODEL_GRAPH, inner),
        "a node": length_delimited(MODEL_GRAPH, length_delimited(GRAPH_NODE, inner)),
        "an attribute": length_delimited(MODEL_GRAPH, length_delimited(GRAPH_NODE, attribute)),
        "a tensor": length_delimited(MODEL_GRAPH, tensor),
    }


DEPTHS = tuple(around(b""))
depths = pytest.mark.parametrize("where", DEPTHS)


@depths
@pytest.mark.parametrize("length", [11, 12, 20, 1000])
def test_a_varint_of_more_than_ten_bytes_is_refused(where: str, length: int, tmp_path: Path) -> None:
    endless = b"\x80" * (length - 1) + b"\x01"
    for field in (endless, tag(1000, VARINT) + endless, tag(1000, LENGTH) + endless, tag(DOC, LENGTH) + endless):
        assert isinstance(outcome(around(field)[where], tmp_path), ModelFileError)


def padded(value: int, length: int) -> bytes:
    """A varint of more bytes than it needs."""
    return bytes([value >> 7 * i & 0x7F | 0x80 for i in range(length - 1)] + [value >> 7 * (length - 1) & 0x7F])


@pytest.mark.parametrize("length", [2, 3, 5, 6, 9, 10])
def test_a_varint_of_more_bytes_than_it_needs_is_read_or_refused_as_a_whole(length: int, tmp_path: Path) -> None:
    """Tags, lengths and values: where protobuf reads them the report is that of the plain spelling."""
    model = little()
    graph = model.graph.SerializeToString()
    plain = findings(outcome(model.SerializeToString(), tmp_path))
    model.ClearField("graph")
    rest = model.SerializeToString()
    for head in (
        padded(MODEL_GRAPH << 3 | LENGTH, length) + encode_varint(len(graph)),
        tag(MODEL_GRAPH, LENGTH) + padded(len(graph), max(length, 2)),
    ):
        content = rest + head + graph
        found = outcome(content, tmp_path)
        try:
            onnx.ModelProto.FromString(content)
        except DecodeError:
            assert isinstance(found, ModelFileError) or findings(found) == plain
        else:
            assert findings(found) == plain


# ---- lengths

LENGTHS = {
    "2^64 - 1": (1 << 64) - 1,
    "2^63": 1 << 63,
    "2^63 - 1": (1 << 63) - 1,
    "2^32 - 1": (1 << 32) - 1,
    "2^31": 1 << 31,
    "a byte too many": None,
}


@depths
@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("number", [MODEL_GRAPH, GRAPH_NODE, GRAPH_TENSOR, FLOAT_DATA, RAW_DATA, NAME, 13, 1000])
def test_a_length_below_nothing_or_past_the_end_is_refused(
    where: str, length: int | None, number: int, tmp_path: Path
) -> None:
    body = b"abc"
    field = tag(number, LENGTH) + encode_varint(len(body) + 1 if length is None else length) + body
    refused_by_the_walk(outcome(around(field)[where], tmp_path))


@depths
@pytest.mark.parametrize(("kind", "size"), [(FIXED32, 3), (FIXED64, 7)])
def test_a_number_that_is_cut_short_is_refused(where: str, kind: int, size: int, tmp_path: Path) -> None:
    assert isinstance(outcome(around(tag(1000, kind) + bytes(size))[where], tmp_path), ModelFileError)


# ---- field numbers, wire types, groups


@depths
@pytest.mark.parametrize("number", [0, 1 << 29, (1 << 32) + MODEL_GRAPH, (1 << 60) + MODEL_GRAPH])
def test_a_field_number_that_cannot_be_is_refused(where: str, number: int, tmp_path: Path) -> None:
    """Some readers keep 32 bits of a tag, and would find the graph in it."""
    for field in (tag(number, VARINT) + b"\x01", tag(number, LENGTH) + b"\x00"):
        refused_by_the_walk(outcome(around(field)[where], tmp_path))


@depths
def test_the_largest_field_number_is_one(where: str, tmp_path: Path) -> None:
    assert isinstance(outcome(around(length_delimited((1 << 29) - 1, b"x"))[where], tmp_path), ScanReport)


def paths() -> dict[str, tuple[Descriptor, tuple[int, ...]]]:
    """Each message type that a model may hold, and the fields that lead to it the shortest way."""
    found: dict[str, tuple[Descriptor, tuple[int, ...]]] = {}
    pending: list[tuple[Descriptor, tuple[int, ...]]] = [(cast("Descriptor", onnx.ModelProto.DESCRIPTOR), ())]
    while pending:
        kind, path = pending.pop(0)
        if kind.name not in found:
            found[kind.name] = (kind, path)
            pending += [(field.message_type, (*path, field.number)) for field in kind.fields if field.message_type]
    return found


KINDS = paths()


def wrapped(path: tuple[int, ...], content: bytes) -> bytes:
    """``content`` within the fields of ``path``, the outermost first."""
    for number in reversed(path):
        content = length_delimited(number, content)
    return content


VALUES = {
    VARINT: encode_varint(300),
    FIXED64: bytes(range(8)),
    LENGTH: b"\x05abcde",
    START_GROUP: tag(3, VARINT) + b"\x01",
    FIXED32: bytes(range(4)),
}


def fields_of(kind: Descriptor) -> Iterator[tuple[FieldDescriptor, int, bytes]]:
    """Every field of a message as every wire type, also those that are none."""
    for field in kind.fields:
        for wire_type in range(8):
            end = tag(field.number, END_GROUP) if wire_type == START_GROUP else b""
            yield field, wire_type, tag(field.number, wire_type) + VALUES.get(wire_type, b"") + end


@pytest.mark.parametrize("name", KINDS)
def test_every_field_of_every_message_as_every_wire_type(name: str, tmp_path: Path) -> None:
    """Alone, and behind a right one: protobuf keeps a field of the wrong type as unknown, and what it reads we read."""
    kind, path = KINDS[name]
    graph = length_delimited(MODEL_GRAPH, length_delimited(GRAPH_NAME, b"g"))
    refused = 0
    for field, wire_type, content in fields_of(kind):
        whole = graph + wrapped(path, content)
        found = outcome(whole, tmp_path)
        try:
            onnx.ModelProto.FromString(whole)
        except DecodeError:
            refused += 1
            # Training information is dropped and payloads are cut out, unread; of all else protobuf has the last word.
            unread = (path and path[0] == 20) or name == "TrainingInfoProto" or field.name == "training_info"
            assert isinstance(found, OnnxClpError) or unread or field.number in wire.PAYLOAD_FIELDS
        else:
            assert isinstance(found, ScanReport), (field.name, wire_type)
            walked_as_protobuf_reads_it(whole)
    # An end without a group, and the types 6 and 7.
    assert refused >= 3 * len(kind.fields)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(tag(60, START_GROUP), id="without an end"),
        pytest.param(tag(60, START_GROUP) + tag(61, END_GROUP), id="that ends as another"),
        pytest.param(tag(60, START_GROUP) + tag(61, START_GROUP) + tag(60, END_GROUP), id="crossed"),
        pytest.param(tag(60, START_GROUP) + tag(3, LENGTH) + b"\x7f", id="with a length past the end"),
        pytest.param(tag(60, START_GROUP) + b"\x80" * 11, id="with a varint of eleven bytes"),
        pytest.param(tag(60, END_GROUP), id="that only ends"),
        pytest.param(tag(60, START_GROUP) * 10_000 + tag(60, END_GROUP) * 10_000, id="10,000 deep"),
        pytest.param(tag(60, START_GROUP) * 10_000, id="10,000 begun"),
    ],
)
@depths
def test_a_group_that_is_none_is_refused(content: bytes, where: str, tmp_path: Path) -> None:
    refused_by_the_walk(outcome(around(content)[where], tmp_path))


def test_a_group_around_the_graph_hides_nothing_that_protobuf_reads(tmp_path: Path) -> None:
    """Groups are unknown fields whole, whatever they hold: the graph within one is none."""
    content = little().SerializeToString()
    found = outcome(content + tag(60, START_GROUP) + little(None).SerializeToString() + tag(60, END_GROUP), tmp_path)
    assert findings(found) == findings(outcome(content, tmp_path))
    assert isinstance(outcome(tag(60, START_GROUP) + content + tag(60, END_GROUP), tmp_path), ModelFileError)


# ---- nesting


def nest(depth: int, numbers: tuple[int, ...]) -> bytes:
    """``depth`` messages within each other, the outermost in field ``numbers[0]``; made without copying each."""
    heads, size = [], 0
    for level in reversed(range(depth)):
        head = tag(numbers[level % len(numbers)], LENGTH) + encode_varint(size)
        heads.append(head)
        size += len(head)
    return b"".join(reversed(heads))


GRAPHS = (GRAPH_NODE, NODE_ATTRIBUTE, ATTRIBUTE_GRAPH)
TYPES = (4, 1)
"""``TypeProto.sequence_type``, and its ``elem_type``."""

NESTED: dict[str, Callable[[int], bytes]] = {
    "graphs of attributes": lambda depth: length_delimited(MODEL_GRAPH, nest(depth, GRAPHS)),
    "lists of graphs": lambda depth: length_delimited(MODEL_GRAPH, nest(depth, (GRAPH_NODE, NODE_ATTRIBUTE, 11))),
    "types of a value": lambda depth: wrapped((MODEL_GRAPH, 13, 2), nest(depth, TYPES)),
    "types of an input": lambda depth: wrapped((MODEL_GRAPH, 11, 2), nest(depth, TYPES)),
    "types of an attribute": lambda depth: wrapped((MODEL_GRAPH, GRAPH_NODE, NODE_ATTRIBUTE, 14), nest(depth, TYPES)),
    "types of a map": lambda depth: wrapped((MODEL_GRAPH, 12, 2), nest(depth, (5, 2))),
    "nodes of a function": lambda depth: (
        length_delimited(MODEL_GRAPH, b"")
        + wrapped((25, 7), nest(depth, (NODE_ATTRIBUTE, ATTRIBUTE_GRAPH, GRAPH_NODE)))
    ),
}


@pytest.mark.parametrize("build_nested", NESTED.values(), ids=NESTED)
def test_messages_nested_ten_thousand_deep_are_refused(build_nested: Callable[[int], bytes], tmp_path: Path) -> None:
    assert isinstance(outcome(build_nested(10_000), tmp_path), ModelFileError)
    assert isinstance(outcome(build_nested(30), tmp_path), ScanReport)
    # At the edge protobuf has the last word.
    for depth in range(92, 106):
        content = build_nested(depth)
        found = outcome(content, tmp_path)
        try:
            onnx.ModelProto.FromString(content)
        except DecodeError:
            assert isinstance(found, ModelFileError)
        else:
            assert isinstance(found, ScanReport)


@pytest.mark.parametrize("numbers", [(1000,), (60, 61)])
def test_an_unknown_field_is_not_looked_into(numbers: tuple[int, ...], tmp_path: Path) -> None:
    assert isinstance(outcome(length_delimited(MODEL_GRAPH, nest(10_000, numbers)), tmp_path), ScanReport)


# ---- tensors that are not what they declare


def with_weight(tensor: TensorProto | SparseTensorProto) -> bytes:
    """A Conv with this weight, and another whose outlier must be seen whatever the first is."""
    net = Net()
    if isinstance(tensor, SparseTensorProto):
        tensor.values.name = "odd"
        net.sparse.append(tensor)
    else:
        net.tensor(tensor, "odd")
    x = net.conv(net.feed(1, 3, 8, 8), "odd", net.vector(16), name="first")
    x = net.conv(net.op("Relu", x, name="relu"), net.kernel(16, 16, 3, 3), net.vector(16), name="second")
    net.tail(x, 16)
    content: bytes = net.case("odd").model.SerializeToString()
    return content


WRAPPING = (
    pytest.param([1 << 60], id="2^60 elements"),
    pytest.param([1 << 60, 1, 1, 1], id="2^60 channels"),
    pytest.param([1 << 31, 1 << 31, 2, 1], id="2^63 elements"),
    pytest.param([1 << 32, 1 << 32, 1, 1], id="2^64 elements, 0 where it wraps"),
    pytest.param([1 << 32, 1 << 30, 4, 1], id="2^64 elements of three sizes"),
    pytest.param([3, 0x5555555555555555, 1, 1], id="2^64 - 1 elements, -1 where it wraps"),
    pytest.param([5, 3689348814741910323, 1, 1], id="2^64 - 1 elements otherwise"),
    pytest.param([1 << 33, (1 << 31) + 1, 1, 1], id="2^33 elements where it wraps"),
    pytest.param([(1 << 62) + 1, 4, 1, 1], id="4 elements where it wraps"),
    pytest.param([-1, -1, 1, 1], id="negative ones whose product is 1"),
    pytest.param([-16, -3, 3, 3], id="negative ones whose product is right"),
    pytest.param([-(1 << 63), 1, 1, 1], id="-2^63"),
    pytest.param([16, 3, 3, -1], id="-1, as in a Reshape"),
    pytest.param([1] * 33, id="33 axes"),
    pytest.param([16, 3] + [1] * 98, id="100 axes"),
    pytest.param([1] * 10_000, id="10,000 axes"),
)


DENSE = ("raw", "float", "external", "nothing", "int4")


@pytest.mark.parametrize("dims", WRAPPING)
@pytest.mark.parametrize("spelling", [*DENSE, "sparse"])
def test_a_shape_that_the_bytes_are_not_of_is_no_shape(dims: list[int], spelling: str, tmp_path: Path) -> None:
    not_analysed(dims, spelling, tmp_path)


@pytest.mark.parametrize("spelling", DENSE)
def test_no_room_is_made_for_elements_that_are_not_there(spelling: str, tmp_path: Path) -> None:
    """2^24 of them would fit into memory."""
    not_analysed([1 << 22, 1, 2, 2], spelling, tmp_path)


def not_analysed(dims: list[int], spelling: str, tmp_path: Path) -> None:
    """Sixteen bytes, for any number of elements: not read, not made room for, not taken for clean."""
    odd = TensorProto(dims=dims, data_type=TensorProto.INT4 if spelling == "int4" else TensorProto.FLOAT)
    if spelling in {"raw", "int4"}:
        odd.raw_data = bytes(16)
    elif spelling == "float":
        odd.float_data.extend([1.0] * 4)
    elif spelling == "external":
        (tmp_path / "data").write_bytes(bytes(16))
        odd.data_location = TensorProto.EXTERNAL
        odd.external_data.append(StringStringEntryProto(key="location", value="data"))
    content = with_weight(odd)
    if spelling == "sparse":
        sparse = SparseTensorProto(dims=dims)
        sparse.values.CopyFrom(TensorProto(dims=[4], data_type=TensorProto.FLOAT, raw_data=bytes(16)))
        sparse.indices.CopyFrom(TensorProto(dims=[4], data_type=TensorProto.INT64, raw_data=bytes(32)))
        content = with_weight(sparse)
    tracemalloc.start()
    try:
        found = outcome(content, tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20
    assert isinstance(found, ScanReport)
    assert [layer.name for layer in found.layers] == ["second"]
    assert [part.name for part in found.skipped] == ["first"]
    assert not found.complete
    assert found.flagged_channels == 1


EMPTY = ([0], [0, 3, 3, 3], [16, 0, 3, 3], [16, 3, 0, 3], [1 << 40, 0, 1, 1], [1 << 62, 0, 1, 1], [0, 1 << 62, 1 << 62])


@pytest.mark.parametrize("dims", EMPTY, ids=str)
@pytest.mark.parametrize("payload", [None, b"", bytes(4)], ids=["nothing", "no bytes", "four bytes"])
def test_a_weight_without_elements_has_no_channels(dims: list[int], payload: bytes | None, tmp_path: Path) -> None:
    """A trillion channels of no element each take no byte in the file, and must take none in memory."""
    odd = TensorProto(dims=dims, data_type=TensorProto.FLOAT)
    if payload is not None:
        odd.raw_data = payload
    found = outcome(with_weight(odd), tmp_path)
    assert isinstance(found, ScanReport)
    assert [layer.name for layer in found.layers] == ["second"]
    assert [(part.name, part.reason in {"shape", "unreadable"}) for part in found.skipped] == [("first", True)]


@pytest.mark.parametrize("dims", [[0, 1 << 62, 1 << 62], [1 << 62, 0], [0], [0, 16]], ids=str)
@pytest.mark.parametrize("place", ["gamma", "bias", "factor", "shape"])
def test_a_constant_without_elements_is_no_fault(dims: list[int], place: str, tmp_path: Path) -> None:
    """NumPy makes no array of such sizes, though it would hold nothing."""
    net = Net()
    empty = net.tensor(TensorProto(dims=dims, data_type=7 if place == "shape" else 1, raw_data=b""), "empty")
    x, weight = net.feed(1, 3, 8, 8), net.tensor(net.kernel(16, 3, 3, 3), "weight")
    if place == "shape":
        weight = net.op("Reshape", weight, empty, name="reshape")
    x = net.conv(x, weight, empty if place == "bias" else None, name="first")
    x = net.bn(x, net.norm(16), name="bn", gamma=empty) if place == "gamma" else x
    x = net.op("Mul", x, empty, name="mul") if place == "factor" else x
    x = net.conv(net.op("Relu", x, name="relu"), net.kernel(16, 16, 3, 3), net.vector(16), name="second")
    net.tail(x, 16)
    found = outcome(net.case("empty").model.SerializeToString(), tmp_path)
    assert isinstance(found, ScanReport)
    assert "second" in [layer.name for layer in found.layers]
    assert place in {"bias", "factor"} or not found.complete


@pytest.mark.parametrize("number", [FLOAT_DATA, 5, 7, 10, 11])
@pytest.mark.parametrize("kind", ["dense", "values", "indices"])
def test_elements_that_protobuf_does_not_read_stop_nothing_else(number: int, kind: str, tmp_path: Path) -> None:
    """They are cut out of what protobuf sees, so that it cannot refuse the file: the rewrite is made and verified."""
    broken = TensorProto.FromString(b"")
    broken.dims.append(5 if kind != "dense" else 16)
    broken.data_type = TensorProto.INT64 if kind == "indices" else TensorProto.FLOAT
    broken.doc_string = "?" * 5
    whole = TensorProto(dims=[5], data_type=TensorProto.INT64 if kind == "values" else TensorProto.FLOAT)
    whole.raw_data = bytes(40 if kind == "values" else 20)
    if kind == "dense":
        content = with_weight(broken)
    else:
        sparse = SparseTensorProto(dims=[16, 3, 3, 3])
        sparse.values.CopyFrom(broken if kind == "values" else whole)
        sparse.indices.CopyFrom(broken if kind == "indices" else whole)
        content = with_weight(sparse)
    spoilt = content.replace(length_delimited(12, b"?????"), length_delimited(number, b"\xff" * 5))
    assert spoilt != content
    path, out = put(spoilt, tmp_path), tmp_path / "out.onnx"
    report = sanitize(path, out)
    assert [part.layer for part in report.silenced] == ["second"]
    assert [part.name for part in report.before.skipped] == ["first"]
    assert scan(out).flagged_channels == 0


def test_packed_dims_are_those_of_the_other_spelling(tmp_path: Path) -> None:
    """A list of numbers as one field or as many: protobuf reads both."""
    model = little()
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "conv.weight")
    plain = findings(outcome(model.SerializeToString(), tmp_path))
    dims = b"".join(map(encode_varint, weight.dims))
    weight.ClearField("dims")
    weight.doc_string = "?" * len(dims)
    content = model.SerializeToString()
    packed = content.replace(length_delimited(12, b"?" * len(dims)), length_delimited(DIMS, dims))
    assert findings(outcome(packed, tmp_path)) == plain


# ---- repeated, merged, unknown


def test_two_graphs_are_one_as_in_protobuf(tmp_path: Path) -> None:
    """Nodes in one and weights in another; a name twice counts by its last."""
    model = little()
    plain = findings(outcome(model.SerializeToString(), tmp_path))
    first, second = onnx.GraphProto(), onnx.GraphProto()
    first.CopyFrom(model.graph)
    first.ClearField("initializer")
    second.initializer.extend(model.graph.initializer)
    first.name, second.name = "a", "b"
    model.ClearField("graph")
    content = b"".join(
        length_delimited(MODEL_GRAPH, part.SerializeToString()) for part in (first, second)
    )  # fmt: skip
    assert findings(outcome(model.SerializeToString() + content, tmp_path)) == plain
    assert findings(outcome(content + model.SerializeToString(), tmp_path)) == plain
    report = sanitize(put(model.SerializeToString() + content, tmp_path), tmp_path / "out.onnx")
    assert report.silenced_channels == 1
    assert {check.name: check.passed for check in report.checks}["onnxruntime-run"]


LAST = {
    "an operator": (length_delimited(4, b"Relu"), length_delimited(4, b"Conv")),
    "a node's name": (length_delimited(3, b"other"), length_delimited(3, b"conv")),
    "a domain": (length_delimited(7, b"elsewhere"), length_delimited(7, b"")),
}


@pytest.mark.parametrize(("other", "right"), LAST.values(), ids=LAST)
def test_a_repeated_field_of_a_node_counts_by_its_last(other: bytes, right: bytes, tmp_path: Path) -> None:
    model = little()
    plain = findings(outcome(model.SerializeToString(), tmp_path))
    node = model.graph.node[0].SerializeToString()
    del model.graph.node[0]
    rest = model.SerializeToString()
    first = length_delimited(MODEL_GRAPH, length_delimited(GRAPH_NODE, other + node + right))
    assert findings(outcome(first + rest, tmp_path)) == plain
    turned = outcome(length_delimited(MODEL_GRAPH, length_delimited(GRAPH_NODE, node + right + other)) + rest, tmp_path)
    assert findings(turned) != plain


def test_a_repeated_field_of_a_tensor_counts_by_its_last_and_dims_add_up(tmp_path: Path) -> None:
    model = little()
    plain = findings(outcome(model.SerializeToString(), tmp_path))
    index = next(i for i, tensor in enumerate(model.graph.initializer) if tensor.name == "conv.weight")
    weight = model.graph.initializer[index].SerializeToString()
    del model.graph.initializer[index]
    rest = model.SerializeToString()

    def spelled(tensor: bytes) -> bytes:
        return length_delimited(MODEL_GRAPH, length_delimited(GRAPH_TENSOR, tensor)) + rest

    before = length_delimited(RAW_DATA, bytes(7)) + length_delimited(NAME, b"x") + tag(DATA_TYPE, VARINT) + b"\x07"
    assert findings(outcome(spelled(before + weight), tmp_path)) == plain
    found = outcome(spelled(weight + tag(DIMS, VARINT) + b"\x02"), tmp_path)
    assert isinstance(found, ScanReport)
    assert [part.reason for part in found.skipped] == ["unreadable"]
    found = outcome(spelled(weight + length_delimited(RAW_DATA, bytes(16 * 9 * 4))), tmp_path)
    assert [status for _, status, _ in findings(found)] == ["dead"]


def test_a_tensor_twice_in_one_attribute_is_one(tmp_path: Path) -> None:
    """A message that is given twice is merged: half of the numbers in each makes all of them."""
    model = little()
    plain = findings(outcome(model.SerializeToString(), tmp_path))
    index = next(i for i, tensor in enumerate(model.graph.initializer) if tensor.name == "conv.weight")
    numbers = numpy_helper.to_array(model.graph.initializer[index])
    del model.graph.initializer[index]
    first = TensorProto(dims=numbers.shape, data_type=TensorProto.FLOAT, float_data=numbers.ravel()[:50])
    second = TensorProto(float_data=numbers.ravel()[50:])
    twice = b"".join(length_delimited(ATTRIBUTE_TENSOR, part.SerializeToString()) for part in (first, second))
    attribute = length_delimited(1, b"value") + tag(20, VARINT) + b"\x04" + twice
    node = length_delimited(4, b"Constant") + length_delimited(2, b"conv.weight")
    node += length_delimited(NODE_ATTRIBUTE, attribute)
    content = length_delimited(MODEL_GRAPH, length_delimited(GRAPH_NODE, node)) + model.SerializeToString()
    assert findings(outcome(content, tmp_path)) == plain


@depths
def test_unknown_fields_change_nothing_and_survive_a_rewrite(where: str, tmp_path: Path) -> None:
    secret = b"kept as it is"
    unknown = (
        length_delimited(1000, secret)
        + tag(1001, VARINT)
        + b"\x07"
        + tag(1002, FIXED32)
        + bytes(4)
        + tag(1003, FIXED64)
        + bytes(8)
        + tag(1004, START_GROUP)
        + length_delimited(1, secret)
        + tag(1004, END_GROUP)
    )
    model = little()
    content = model.SerializeToString()
    plain = findings(outcome(content, tmp_path))
    path = put(content + around(unknown)[where], tmp_path)
    assert findings(scan(path)) == plain
    sanitize(path, tmp_path / "out.onnx")
    assert unknown in (tmp_path / "out.onnx").read_bytes()


# ---- graphs that are none


def looped(*edges: tuple[str, str, str]) -> bytes:
    """A Conv with an outlier, and beside it operators whose inputs depend on themselves."""
    net = Net()
    x = net.conv(net.feed(1, 3, 8, 8), net.kernel(16, 3, 3, 3), net.vector(16), name="good")
    net.tail(x, 16)
    weight = net.tensor(net.kernel(16, 16, 1, 1), "weight")
    for op, given_value, made in edges:
        inputs = [given_value, weight] if op == "Conv" else [given_value]
        net.nodes.append(onnx.helper.make_node(op, inputs, [made], name=f"{op}_{made}"))
    content: bytes = net.case("looped").model.SerializeToString()
    return content


CYCLES = {
    "a self-loop": [("Conv", "a", "a")],
    "a cycle of two": [("Conv", "b", "a"), ("Relu", "a", "b")],
    "a cycle of three": [("Relu", "c", "a"), ("Conv", "a", "b"), ("Conv", "b", "c")],
    "a cycle of Identities": [("Identity", "b", "a"), ("Identity", "a", "b"), ("Conv", "a", "c")],
    "behind a cycle": [("Relu", "a", "a"), ("Conv", "a", "b"), ("Relu", "b", "c")],
    "a cycle of a thousand": [("Relu", f"v{(i + 1) % 1000}", f"v{i}") for i in range(1000)],
}


@pytest.mark.parametrize("edges", CYCLES.values(), ids=CYCLES)
def test_a_cycle_is_named_and_hides_nothing(edges: list[tuple[str, str, str]], tmp_path: Path) -> None:
    found = outcome(looped(*edges), tmp_path)
    assert isinstance(found, ScanReport)
    assert [layer.name for layer in found.layers] == ["good"]
    assert found.flagged_channels == 1
    assert not found.complete
    cyclic = {part.name for part in found.skipped if "its own output" in part.detail}
    assert cyclic >= {f"{op}_{made}" for op, _, made in edges[:1]}


def test_a_cycle_is_no_clean_model(tmp_path: Path) -> None:
    assert run(["scan", "-q", str(put(looped(("Conv", "a", "a")), tmp_path)), "--strict"]) == 3


# ---- large files

SCAN = """
import resource, sys
from onnx_clp import OnnxClpError, scan
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
try:
    print([(layer.name, len(layer.flagged)) for layer in scan(sys.argv[1]).layers])
except OnnxClpError as error:
    print(error)
"""

ADDRESS_SPACE = 1 << 30
"""Of a process that scans a file of 2.5 GB: libraries, and what it holds of the file."""

HOLE = 2_500 << 20


def behind(before: bytes, path: Path) -> Path:
    """A file that ends in HOLE bytes of nothing, which take no room on the disk."""
    path.write_bytes(before)
    os.truncate(path, len(before) + HOLE)
    return path


def opened(numbers: tuple[int, ...], inner: bytes = b"") -> bytes:
    """The tags and lengths of fields within each other, the innermost of which holds HOLE bytes after ``inner``."""
    content, size = inner, len(inner) + HOLE
    for number in reversed(numbers):
        head = tag(number, LENGTH) + encode_varint(size)
        content, size = head + content, size + len(head)
    return content


def scanned_with_little_memory(path: Path) -> str:
    found = subprocess.run(
        [sys.executable, "-c", SCAN, str(path), str(ADDRESS_SPACE)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert found.stderr == ""
    return found.stdout


def test_a_weight_of_two_and_a_half_gigabytes_is_jumped_over(tmp_path: Path) -> None:
    raw = tag(RAW_DATA, LENGTH) + encode_varint(HOLE)
    dims = b"".join(tag(DIMS, VARINT) + encode_varint(size) for size in (HOLE // 4,))
    head = length_delimited(NAME, b"big") + dims + tag(DATA_TYPE, VARINT) + b"\x01"
    path = behind(little().SerializeToString() + opened((MODEL_GRAPH, GRAPH_TENSOR), head + raw), tmp_path / "m.onnx")
    assert scanned_with_little_memory(path) == "[('conv', 1)]\n"


BESIDE_WEIGHTS = {
    "documentation": (6,),
    "metadata": (14,),
    "an unknown field": (1000,),
    "the graph's name": (MODEL_GRAPH, GRAPH_NAME),
    "a node's name": (MODEL_GRAPH, GRAPH_NODE, 3),
    "a string of an attribute": (MODEL_GRAPH, GRAPH_NODE, NODE_ATTRIBUTE, 4),
    "a tensor's name": (MODEL_GRAPH, GRAPH_TENSOR, NAME),
}


@pytest.mark.parametrize("numbers", BESIDE_WEIGHTS.values(), ids=BESIDE_WEIGHTS)
def test_two_gigabytes_beside_the_weights_are_refused_unread(numbers: tuple[int, ...], tmp_path: Path) -> None:
    """As protobuf refuses them, and so onnxruntime; a hole in a file is as quick to make as a name.

    Less is refused too, unless the user gives it more.
    """
    path = behind(little().SerializeToString() + opened(numbers), tmp_path / "m.onnx")
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError, match="holds 536,870,912 bytes or more besides its weights"):
            scan(path)
        with pytest.raises(ModelFileError, match="holds 2,147,483,648 bytes or more besides its weights"):
            scan(path, limits=Limits(skeleton=1 << 40))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20


def test_many_small_parts_beside_the_weights_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit made small: ten thousand names are as much as one of their length together."""
    monkeypatch.setattr(wire, "SKELETON_LIMIT", 50_000)
    assert isinstance(outcome(little().SerializeToString(), tmp_path), ScanReport)
    node = length_delimited(GRAPH_NODE, length_delimited(3, b"n" * 90))
    content = length_delimited(MODEL_GRAPH, node * 1000)
    found = outcome(content, tmp_path)
    assert isinstance(found, ModelFileError)
    assert "besides its weights" in found.message


def test_zeros_to_the_end_are_no_fields(tmp_path: Path) -> None:
    path = behind(little().SerializeToString(), tmp_path / "m.onnx")
    with pytest.raises(ModelFileError, match="field number of 0"):
        scan(path)
