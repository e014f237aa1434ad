"""Mutations of any message of a model, by protobuf's own description: fields dropped, doubled, swapped and resized.

They know nothing of ONNX, and so reach what nobody thought of: `value_info`, `opset_import`, attributes of functions,
the parts of sparse tensors, annotations, training information, external data entries.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from tests.mutations.chance import EXTENTS, FLOATS, TEXTS, Chance, choice, copied, parts, place

Field: TypeAlias = Any
"""A FieldDescriptor, of the Python or of the C implementation of protobuf, whose types differ."""

_BITS = {
    FieldDescriptor.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, (1 << 64) - 1),
    FieldDescriptor.CPPTYPE_BOOL: (0, 1),
}

MORE = 64
"""Elements by which a field grows at most."""


def _message(chance: Chance, model: onnx.ModelProto) -> Message:
    """A message: first a kind, so that the few are as likely as the many, then one of that."""
    kinds: dict[str, list[Message]] = {}
    for part in parts(model):
        kinds.setdefault(part.DESCRIPTOR.full_name, []).append(part)
    return choice(chance, kinds[choice(chance, sorted(kinds))])


def _set_field(chance: Chance, message: Message, *, repeated: bool = False) -> Field | None:
    """A field that the message holds; None where it holds none."""
    fields = [field for field, _ in message.ListFields() if field.is_repeated or not repeated]
    return choice(chance, fields) if fields else None


def _scalar(chance: Chance, field: Field, message: Message) -> Any:  # noqa: ANN401  # of the field's type
    """A value for a field, or for an element of it, that holds no message."""
    if field.cpp_type in _BITS:
        low, high = _BITS[field.cpp_type]
        return min(max(choice(chance, EXTENTS), low), high)
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        assert field.enum_type is not None
        return choice(chance, sorted(field.enum_type.values_by_number))
    if field.cpp_type in {FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE}:
        return choice(chance, FLOATS)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return bytes(chance.integer(0, MORE))
    # A name that is there already is as interesting as an odd one.
    known = [value for other, value in message.ListFields() if other.type == FieldDescriptor.TYPE_STRING]
    flat = [name for value in known for name in ([value] if isinstance(value, str) else value)]
    return choice(chance, [*TEXTS, *flat])


def _take(target: Message, field: Field, source: Message) -> None:
    """Make a field of ``target`` what it is in ``source``, a message of the same kind."""
    target.ClearField(field.name)
    value = getattr(source, field.name)
    if field.is_repeated:
        getattr(target, field.name).MergeFrom(value)
    elif source.HasField(field.name):
        if field.message_type is not None:
            getattr(target, field.name).CopyFrom(value)
        else:
            setattr(target, field.name, value)


def drop_field(chance: Chance, model: onnx.ModelProto) -> None:
    """A field is gone, with all its elements."""
    message = _message(chance, model)
    field = _set_field(chance, message)
    if field is not None:
        message.ClearField(field.name)


def drop_element(chance: Chance, model: onnx.ModelProto) -> None:
    """One element of a repeated field is gone."""
    message = _message(chance, model)
    field = _set_field(chance, message, repeated=True)
    if field is not None:
        values = getattr(message, field.name)
        del values[place(chance, values)]


def double_element(chance: Chance, model: onnx.ModelProto) -> None:
    """One element of a repeated field is there twice, or many times."""
    message = _message(chance, model)
    field = _set_field(chance, message, repeated=True)
    if field is not None:
        values = getattr(message, field.name)
        value = choice(chance, values)
        values.extend([value] * choice(chance, (1, 1, 1, 2, MORE)))


def swap_elements(chance: Chance, model: onnx.ModelProto) -> None:
    """Two elements of a repeated field change places."""
    message = _message(chance, model)
    field = _set_field(chance, message, repeated=True)
    if field is not None:
        values = getattr(message, field.name)
        kept = [copied(value) if isinstance(value, Message) else value for value in values]
        first, second = place(chance, kept), place(chance, kept)
        kept[first], kept[second] = kept[second], kept[first]
        del values[:]
        values.extend(kept)


def swap_fields(chance: Chance, model: onnx.ModelProto) -> None:
    """Two messages of a kind exchange what they hold in one field: two tensors their sizes, two nodes their inputs."""
    first = _message(chance, model)
    second = choice(chance, [part for part in parts(model) if part.DESCRIPTOR is first.DESCRIPTOR])
    field = _set_field(chance, first)
    if field is not None:
        before, after = copied(first), copied(second)
        _take(first, field, after)
        _take(second, field, before)


def change_field(chance: Chance, model: onnx.ModelProto) -> None:
    """A number, name or text becomes another; one that is not there comes into being."""
    message = _message(chance, model)
    fields = [field for field in message.DESCRIPTOR.fields if field.message_type is None]
    if not fields:
        return
    field = choice(chance, fields)
    value = _scalar(chance, field, message)
    if not field.is_repeated:
        setattr(message, field.name, value)
        return
    values = getattr(message, field.name)
    if values:
        values[place(chance, values)] = value
    else:
        values.append(value)


def resize_field(chance: Chance, model: onnx.ModelProto) -> None:
    """A list, a text or bytes become shorter, or longer."""
    message = _message(chance, model)
    field = _set_field(chance, message)
    if field is None or (field.message_type is not None and not field.is_repeated):
        return
    value = getattr(message, field.name)
    if field.is_repeated:
        keep = chance.integer(0, len(value))
        if chance.integer(0, 1):
            del value[keep:]
        else:
            value.extend([copied(part) if isinstance(part, Message) else part for part in value[keep : keep + MORE]])
    elif field.type in {FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES}:
        keep = chance.integer(0, len(value))
        setattr(message, field.name, value[:keep] if chance.integer(0, 1) else value + value[keep : keep + MORE])


def graft(chance: Chance, model: onnx.ModelProto) -> None:
    """A message comes to hold a copy of one from elsewhere, or an empty one: a graph its own, a tensor another's."""
    message = _message(chance, model)
    fields = [field for field in message.DESCRIPTOR.fields if field.message_type is not None]
    if not fields:
        return
    field = choice(chance, fields)
    found = [copied(part) for part in parts(model) if part.DESCRIPTOR is field.message_type]
    value = getattr(message, field.name)
    if field.is_repeated:
        value = value.add()
    else:
        value.SetInParent()
    if found:
        value.CopyFrom(choice(chance, found))


FIELDS = (*(drop_field, drop_element, double_element, swap_elements, swap_fields, change_field, resize_field, graft),)
