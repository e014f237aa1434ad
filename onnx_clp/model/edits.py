"""Edits → bytes: a protobuf message copied with some of its bytes replaced.

The lengths of the messages around an edit that changes its size are edited too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from onnx_clp.model.source import COPY_BLOCK, ByteSource

LENGTH: Final = 2
"""The wire type of strings, bytes and messages."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes ``start`` (included) to ``end`` (excluded) of a file."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Message:
    """A nested message in the file: where its length stands and where its body lies."""

    length: Span
    body: Span


def encode_varint(value: int) -> bytes:
    """``value`` (not negative) as a protobuf varint."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def length_delimited(number: int, content: bytes) -> bytes:
    """A whole length-delimited field: tag, length, content."""
    return encode_varint(number << 3 | LENGTH) + encode_varint(len(content)) + content


@dataclass(frozen=True, slots=True)
class Edit:
    """Replace the bytes of ``span`` with ``content``; ``enclosing`` are the messages around it, outermost first."""

    span: Span
    content: bytes
    enclosing: tuple[Message, ...] = ()


def with_lengths(edits: Iterable[Edit]) -> tuple[Edit, ...]:
    """``edits`` in file order, with an edit added for every length they change. Spans must not overlap."""
    result = sorted(edits, key=lambda edit: (edit.span.start, edit.span.end))
    growth: dict[Message, int] = {}
    for edit in result:
        for message in edit.enclosing:
            growth[message] = growth.get(message, 0) + len(edit.content) - len(edit.span)
    parents: dict[Message, tuple[Message, ...]] = {}
    for edit in result:
        for depth, message in enumerate(edit.enclosing):
            parents[message] = edit.enclosing[:depth]
    # Innermost first: a length that takes another byte makes the messages around it grow too.
    for message in sorted(growth, key=lambda inner: len(parents[inner]), reverse=True):
        if growth[message] == 0:
            continue
        content = encode_varint(len(message.body) + growth[message])
        for parent in parents[message]:
            growth[parent] += len(content) - len(message.length)
        result.append(Edit(message.length, content))
    result.sort(key=lambda edit: (edit.span.start, edit.span.end))
    return tuple(result)


def pieces(source: ByteSource, edits: tuple[Edit, ...]) -> Iterator[bytes]:
    """``source`` with ``edits`` (in file order, complete with lengths) applied, piece by piece."""
    position = 0
    for edit in (*edits, Edit(Span(source.size, source.size), b"")):
        while position < edit.span.start:
            piece = source.read(position, min(COPY_BLOCK, edit.span.start - position))
            yield piece
            position += len(piece)
        yield edit.content
        position = max(position, edit.span.end)
