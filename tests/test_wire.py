"""The walk over the wire format against protobuf's own parser: built models, and messages as odd as they may be.

https://protobuf.dev/programming-guides/encoding: a repeated singular scalar counts by its last value, a repeated
singular message is merged, a field of an unknown number or of the wrong wire type is kept aside, groups are skipped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
import pytest
from google.protobuf.message import Message as Proto
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnx_clp import ModelFileError, scan
from onnx_clp.model.edits import Edit, Message, Span, encode_varint, length_delimited, pieces, with_lengths
from onnx_clp.model.source import ByteSource
from onnx_clp.model.wire import Layout, Payload, walk
from tests.built import NAMES, build
from tests.cases.net import Net

AnyProto = TypeVar("AnyProto", bound=Proto)

laws = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])

PAYLOAD_FIELDS = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data")
VARINT, FIXED64, LENGTH, START_GROUP, END_GROUP, FIXED32 = range(6)


def walked(content: bytes) -> tuple[onnx.ModelProto, Layout]:
    """The skeleton, parsed, and the layout of these bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(content)
        source = ByteSource(path)
        try:
            skeleton, layout = walk(source)
        finally:
            source.close()
    return onnx.ModelProto.FromString(skeleton), layout


def messages(message: Proto, kind: type[AnyProto]) -> Iterator[AnyProto]:
    """Every message of a kind within a message, in the order of the fields: found by protobuf's own description."""
    if isinstance(message, kind):
        yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if field.is_repeated else [value]:
                yield from messages(part, kind)


def without_payloads(model: onnx.ModelProto) -> onnx.ModelProto:
    """What the skeleton should hold, but for its tickets."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    bare.DiscardUnknownFields()
    bare.ClearField("training_info")
    for tensor in messages(bare, TensorProto):
        for name in PAYLOAD_FIELDS:
            tensor.ClearField(name)
    for node in messages(bare, onnx.NodeProto):
        node.ClearField("doc_string")
    return bare


def elements(content: bytes, payload: Payload) -> TensorProto:
    """The payload of one tensor as the layout finds it in the file."""
    found = TensorProto.FromString(b"".join(content[span.start : span.end] for _, span in payload.typed))
    if payload.raw is not None:
        found.raw_data = content[payload.raw.start : payload.raw.end]
    return found


def check(content: bytes) -> None:
    """The skeleton is the message without its payloads, and each ticket leads to the payload of its tensor."""
    whole = onnx.ModelProto.FromString(content)
    skeleton, layout = walked(content)
    assert without_payloads(skeleton) == without_payloads(whole)
    whole.ClearField("training_info")
    tickets = list(messages(skeleton, TensorProto))
    tensors = list(messages(whole, TensorProto))
    for ticket, tensor in zip(tickets, tensors, strict=True):
        wanted = TensorProto()
        for name in PAYLOAD_FIELDS:
            if name == "raw_data" and tensor.HasField(name):
                wanted.raw_data = tensor.raw_data
            elif name != "raw_data":
                getattr(wanted, name).extend(getattr(tensor, name))
        assert ticket.HasField("raw_data") or not wanted.ListFields()
        if ticket.HasField("raw_data"):
            payload = layout.payloads[int.from_bytes(ticket.raw_data, "little")]
            # Compared as bytes: a NaN is not equal to itself.
            assert elements(content, payload).SerializeToString() == wanted.SerializeToString()
            _check_packed(content, payload, tensor)
    for node in messages(skeleton, onnx.NodeProto):
        place = layout.nodes[int(node.doc_string)]
        alone = onnx.NodeProto.FromString(content[place.message.body.start : place.message.body.end])
        assert (alone.op_type, list(alone.output)) == (node.op_type, list(node.output))
        names = [content[span.start : span.end] for span in place.inputs]
        assert names == [length_delimited(1, name.encode()) for name in node.input]
        for outer, inner in zip(place.enclosing, (*place.enclosing[1:], place.message), strict=True):
            assert outer.body.start <= inner.length.start < inner.body.end <= outer.body.end


def _check_packed(content: bytes, payload: Payload, tensor: TensorProto) -> None:
    """Where the elements lie packed, one after the other, they can be read in place."""
    if [number for number, _ in payload.typed] == [4] and len(payload.packed[0]) == 4 * len(tensor.float_data):
        span = payload.packed[0]
        assert content[span.start : span.end] == np.array(tensor.float_data, "<f4").tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_built_model_is_walked_as_protobuf_reads_it(name: str) -> None:
    check(build(name).model.SerializeToString())


def test_metadata_is_found_in_the_file() -> None:
    content = build("doubled_metadata").model.SerializeToString()
    _, layout = walked(content)
    found = [onnx.ModelProto.FromString(content[span.start : span.end]).metadata_props[0] for span in layout.metadata]
    assert [(entry.key, entry.value) for entry in found] == [
        ("author", "a"),
        ("author", "b"),
        ("onnx_clp.version", "99"),
    ]


# ---- messages as protobuf allows them


def varint(number: int, value: int) -> bytes:
    return encode_varint(number << 3 | VARINT) + encode_varint(value)


def fixed(number: int, content: bytes) -> bytes:
    return encode_varint(number << 3 | (FIXED32 if len(content) == 4 else FIXED64)) + content


def group(number: int, content: bytes) -> bytes:
    return encode_varint(number << 3 | START_GROUP) + content + encode_varint(number << 3 | END_GROUP)


words = st.text("abcxyz/.:_", max_size=6).map(str.encode)
blobs = st.binary(max_size=24)
small = st.integers(0, 300)
bits32 = st.binary(min_size=4, max_size=4)
bits64 = st.binary(min_size=8, max_size=8)

unknown = st.one_of(
    st.builds(varint, st.sampled_from([60, 1000]), small),
    st.builds(length_delimited, st.sampled_from([60, 1000]), blobs),
    st.builds(fixed, st.sampled_from([60, 1000]), bits32 | bits64),
    st.builds(
        group, st.sampled_from([60, 1000]), st.builds(varint, st.just(3), small) | st.builds(fixed, st.just(9), bits32)
    ),
    st.builds(group, st.just(61), st.builds(group, st.just(62), st.builds(length_delimited, st.just(9), blobs))),
)


def fields(*kinds: st.SearchStrategy[bytes], most: int = 6) -> st.SearchStrategy[bytes]:
    """A message of these fields, in any order and any number, with unknown ones among them."""
    return st.lists(st.one_of(*kinds, unknown), max_size=most).map(b"".join)


def nested(number: int, body: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.builds(length_delimited, st.just(number), body)


def text(number: int) -> st.SearchStrategy[bytes]:
    return nested(number, words)


def wrong(*numbers: int) -> st.SearchStrategy[bytes]:
    """A field that should be length-delimited and is a varint."""
    return st.builds(varint, st.sampled_from(numbers), small)


entry = fields(text(1), text(2), most=3)
tensor = fields(
    st.builds(varint, st.just(1), small),  # dims
    st.builds(varint, st.just(2), st.integers(0, 20)),  # data_type
    nested(4, st.lists(bits32, max_size=4).map(b"".join)),  # float_data, packed
    st.builds(fixed, st.just(4), bits32),  # float_data, one by one
    nested(5, st.lists(small.map(encode_varint), max_size=4).map(b"".join)),  # int32_data
    st.builds(varint, st.just(5), small),
    st.builds(varint, st.just(7), small),  # int64_data
    text(8),  # name
    nested(9, blobs),  # raw_data
    nested(10, st.lists(bits64, max_size=3).map(b"".join)),  # double_data
    st.builds(varint, st.just(11), small),  # uint64_data
    text(12),  # doc_string
    nested(13, entry),  # external_data
    st.builds(varint, st.just(14), st.integers(0, 1)),  # data_location
    wrong(8, 9, 13),
)
sparse = fields(nested(1, tensor), nested(2, tensor), st.builds(varint, st.just(3), small), wrong(1, 2), most=4)


def graphs(depth: int) -> st.SearchStrategy[bytes]:
    """A GraphProto with subgraphs down to this depth."""
    return fields(nested(1, nodes(depth)), text(2), nested(5, tensor), nested(15, sparse), text(10), wrong(1, 5, 15))


def nodes(depth: int) -> st.SearchStrategy[bytes]:
    inner = [nested(6, graphs(depth - 1)), nested(11, graphs(depth - 1))] if depth else []
    attribute = fields(
        *inner,
        text(1),
        nested(5, tensor),
        nested(10, tensor),
        nested(23, sparse),
        st.builds(fixed, st.just(2), bits32),
        wrong(5, 6, 10, 11, 22, 23),
    )
    return fields(text(1), text(2), text(3), text(4), text(6), nested(5, attribute), text(7), wrong(5, 6))


functions = fields(
    text(1), text(4), nested(7, nodes(0)), nested(11, fields(text(1), nested(5, tensor))), wrong(7), most=4
)
models = fields(
    nested(7, graphs(1)),
    nested(25, functions),
    nested(14, entry),
    nested(20, fields(nested(1, graphs(0)), most=2)),
    st.builds(varint, st.just(1), small),
    text(2),
    wrong(7, 14, 25),
)


@laws
@given(models)
@example(length_delimited(7, length_delimited(2, b"a")) + length_delimited(7, length_delimited(2, b"b")))
def test_any_message_is_walked_as_protobuf_reads_it(content: bytes) -> None:
    check(content)


def in_attribute(content: bytes) -> bytes:
    """A model of one node, whose only attribute has these fields."""
    return length_delimited(7, length_delimited(1, length_delimited(4, b"Constant") + length_delimited(5, content)))


RAW, OTHER = length_delimited(9, b"0123"), length_delimited(9, b"4567")
FLOATS, SINGLE = length_delimited(4, b"abcdefgh"), fixed(4, b"ijkl")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(length_delimited(7, length_delimited(5, RAW)) * 2, id="two graphs"),
        pytest.param(in_attribute(length_delimited(5, RAW) + length_delimited(5, OTHER)), id="a tensor twice"),
        pytest.param(in_attribute(length_delimited(5, RAW) + length_delimited(5, FLOATS)), id="merged, raw and typed"),
        pytest.param(in_attribute(length_delimited(5, FLOATS) + length_delimited(5, FLOATS)), id="merged, typed twice"),
        pytest.param(
            in_attribute(length_delimited(5, RAW) + length_delimited(5, b"\x08\x02")), id="merged, no payload"
        ),
        pytest.param(in_attribute(length_delimited(5, RAW + OTHER)), id="raw data twice in one tensor"),
        pytest.param(in_attribute(length_delimited(5, FLOATS + SINGLE + FLOATS)), id="packed and unpacked"),
        pytest.param(in_attribute(length_delimited(5, group(60, RAW) + RAW)), id="payload in a group"),
        pytest.param(in_attribute(length_delimited(5, varint(9, 7) + RAW)), id="raw data of the wrong wire type"),
        pytest.param(in_attribute(length_delimited(6, length_delimited(5, RAW)) * 2), id="a subgraph twice"),
        pytest.param(in_attribute(length_delimited(23, length_delimited(1, RAW) * 2)), id="sparse values twice"),
        pytest.param(length_delimited(20, length_delimited(1, length_delimited(5, RAW))), id="training information"),
    ],
)
def test_what_is_repeated_merged_or_unknown_is_read_as_protobuf_reads_it(content: bytes) -> None:
    check(content)


@pytest.mark.parametrize(
    ("first", "second"),
    [(RAW, OTHER), (RAW, b""), (FLOATS, FLOATS), (RAW, FLOATS)],
    ids=["both raw", "one raw", "both typed", "raw and typed"],
)
def test_a_sparse_tensor_twice_in_one_attribute_is_merged(first: bytes, second: bytes) -> None:
    check(
        in_attribute(
            length_delimited(22, length_delimited(1, first)) + length_delimited(22, length_delimited(1, second))
        )
    )


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\xff" * 11, id="a varint without an end"),
        pytest.param(b"\x80" * 10 + b"\x01", id="a varint of eleven bytes"),
        pytest.param(b"\x00\x00", id="field number 0"),
        pytest.param(b"\x3e\x00", id="wire type 6"),
        pytest.param(b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", id="a length of 2^64 - 1"),
        pytest.param(b"\x3a\x05abc", id="a length past the end"),
        pytest.param(b"\x0d\x00", id="four bytes that are not there"),
        pytest.param(b"\x0b\x08\x01", id="a group without an end"),
        pytest.param(b"\x0b\x14", id="a group that ends as another"),
        pytest.param(b"\x0c", id="an end without a group"),
        pytest.param(encode_varint(60 << 3 | START_GROUP) * 5000, id="groups without a bottom"),
    ],
)
def test_what_is_no_message_is_refused_with_the_byte(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"at byte \d+"):
        walked(content)
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelFileError):
        scan(path)


@pytest.mark.parametrize("depth", [20, 200, 5000])
def test_deep_nesting_is_read_or_refused(depth: int, tmp_path: Path) -> None:
    content = b""
    for _ in range(depth):  # an attribute with a graph with a node with an attribute …
        content = length_delimited(1, length_delimited(5, length_delimited(6, content)))
    path = tmp_path / "deep.onnx"
    path.write_bytes(length_delimited(7, content))
    if depth == 20:
        assert scan(path).layers == ()
    else:
        with pytest.raises(ModelFileError):
            scan(path)


# ---- files cut short, and files with a wrong byte


def little_model() -> bytes:
    """Conv → BN → Relu, of few bytes."""
    net = Net()
    W, norm = net.kernel(2, 1, 1, outlier=None), net.norm(2)
    net.give(net.op("Relu", net.bn(net.conv(net.feed(1, 1, 2), W, name="c"), norm, name="b"), name="r"), rank=3)
    content: bytes = net.case("little").model.SerializeToString()
    return content


def read_or_refused(path: Path, content: bytes) -> bool:
    """Whether the file is read; anything else but a ModelFileError is raised further."""
    path.write_bytes(content)
    try:
        scan(path)
    except ModelFileError as error:
        message = error.message
    else:
        return True
    assert str(path) in message
    assert "\n" not in message
    return False


def test_a_file_cut_anywhere_is_refused_or_read(tmp_path: Path) -> None:
    content, path = little_model(), tmp_path / "cut.onnx"
    assert read_or_refused(path, content)
    read = [read_or_refused(path, content[:length]) for length in range(len(content))]
    # Only at the end of a whole field of the outermost message is what came before a message.
    assert not any(read[: len(content) // 2])
    assert sum(read) < 20


@pytest.mark.fuzz
@pytest.mark.parametrize("change", [lambda byte: byte ^ 0xFF, lambda byte: byte ^ 0x01, lambda byte: (byte + 8) % 256])
def test_a_file_with_a_wrong_byte_is_refused_or_read(change: Callable[[int], int], tmp_path: Path) -> None:
    content, path = little_model(), tmp_path / "wrong.onnx"
    read = []
    for position, byte in enumerate(content):
        read.append(read_or_refused(path, content[:position] + bytes([change(byte)]) + content[position + 1 :]))
    assert any(read)
    assert not all(read)


# ---- edits


@dataclass(frozen=True)
class Tree:
    """A message: its fields, each of them bytes or a message of its own."""

    parts: tuple[bytes | Tree, ...]

    def render(self) -> bytes:
        """The message's body."""
        return b"".join(length_delimited(2, part.render() if isinstance(part, Tree) else part) for part in self.parts)


@dataclass(frozen=True)
class Field:
    """Where one field of a rendered tree lies, which one it is, and what is around it."""

    span: Span
    path: tuple[int, ...]
    enclosing: tuple[Message, ...]


def locate(tree: Tree, start: int = 0, path: tuple[int, ...] = (), around: tuple[Message, ...] = ()) -> Iterator[Field]:
    """Every field of a tree, outer ones first."""
    for index, part in enumerate(tree.parts):
        body = part.render() if isinstance(part, Tree) else part
        length = encode_varint(len(body))
        message = Message(
            Span(start + 1, start + 1 + len(length)), Span(start + 1 + len(length), start + 1 + len(length) + len(body))
        )
        yield Field(Span(start, message.body.end), (*path, index), around)
        if isinstance(part, Tree):
            yield from locate(part, message.body.start, (*path, index), (*around, message))
        start = message.body.end


def changed(tree: Tree, path: tuple[int, ...], action: str, content: bytes) -> Tree:
    """The tree with one field replaced or deleted, or another one inserted before it."""
    index, *rest = path
    parts = list(tree.parts)
    part = parts[index]
    if rest:
        assert isinstance(part, Tree)
        parts[index] = changed(part, tuple(rest), action, content)
    else:
        parts[index : index + (action != "insert")] = [] if action == "delete" else [content]
    return Tree(tuple(parts))


def applied(content: bytes, edits: list[Edit]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(content)
        source = ByteSource(path)
        try:
            return b"".join(pieces(source, with_lengths(edits)))
        finally:
            source.close()


sized = st.sampled_from([0, 1, 5, 60, 119, 120, 122, 124, 125, 126, 127, 128, 130, 16370, 16378, 16380, 16383, 16384])
contents = st.builds(lambda size, byte: bytes([byte]) * size, sized, st.integers(0, 255))
trees = st.recursive(
    st.lists(contents, min_size=1, max_size=3).map(lambda parts: Tree(tuple(parts))),
    lambda inner: st.lists(contents | inner, min_size=1, max_size=3).map(lambda parts: Tree(tuple(parts))),
    max_leaves=8,
)


@laws
@given(trees, st.data())
def test_edits_make_what_the_same_change_of_the_message_makes(tree: Tree, data: st.DataObject) -> None:
    fields_of = list(locate(tree))
    chosen = data.draw(st.lists(st.sampled_from(fields_of), max_size=4, unique_by=lambda field: field.path))
    # Edits do not overlap: none lies within another.
    chosen = [
        field for field in chosen if not any(field.path[: len(o.path)] == o.path for o in chosen if o is not field)
    ]
    edits, expected = [], tree
    for field in sorted(chosen, key=lambda field: field.path, reverse=True):  # from the end: paths before it hold
        action = data.draw(st.sampled_from(["replace", "delete", "insert"]))
        content = data.draw(contents)
        span = Span(field.span.start, field.span.start) if action == "insert" else field.span
        edits.append(Edit(span, b"" if action == "delete" else length_delimited(2, content), field.enclosing))
        expected = changed(expected, field.path, action, content)
    assert applied(tree.render(), edits) == expected.render()


@pytest.mark.parametrize("limit", [1 << 7, 1 << 14, 1 << 21])
@pytest.mark.parametrize("step", [-3, -2, -1, 0, 1])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_length_that_takes_another_byte_makes_those_around_it_grow(limit: int, step: int, depth: int) -> None:
    tree = Tree((bytes(limit + step - 10), b"end"))
    for _ in range(depth):
        tree = Tree((tree, b"x"))
    inner = next(field for field in locate(tree) if len(field.path) == depth + 1)
    for size in range(limit + step - 16, limit + step + 4):
        edit = Edit(inner.span, length_delimited(2, bytes(size)), inner.enclosing)
        assert applied(tree.render(), [edit]) == changed(tree, inner.path, "replace", bytes(size)).render()


def test_without_edits_the_copy_is_the_file() -> None:
    content = little_model()
    assert applied(content, []) == content


@given(st.integers(0, (1 << 63) - 1))
@example(127)
@example(128)
@example(16383)
@example(16384)
def test_a_varint_is_protobufs(value: int) -> None:
    assert varint(1, value) == TensorProto(dims=[value]).SerializeToString()


def test_an_edit_of_a_tensor_is_read_back_by_protobuf() -> None:
    model = helper.make_model(helper.make_graph([], "g", [], [], [helper.make_tensor("t", 1, [2], [1.0, 2.0])]))
    content = model.SerializeToString()
    start = content.index(np.array([1, 2], "<f4").tobytes())
    edit = Edit(Span(start, start + 4), np.array([7], "<f4").tobytes())
    assert list(onnx.ModelProto.FromString(applied(content, [edit])).graph.initializer[0].float_data) == [7, 2]
