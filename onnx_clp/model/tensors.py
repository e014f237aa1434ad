"""Stored tensors: TensorProto → array, and where each element lies in which file.

A tensor is stored as ``raw_data`` (little-endian), in a typed field, in external data, or as a sparse tensor
(onnx.proto, messages TensorProto and SparseTensorProto). Where both a typed field and ``raw_data`` are present,
``raw_data`` counts, since that is what onnxruntime reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

from onnx_clp.errors import ModelFileError, OnnxClpError, PayloadError
from onnx_clp.model.file import ModelFile, normalised
from onnx_clp.model.source import ByteSource
from onnx_clp.model.wire import DOUBLE_DATA, FLOAT_DATA

Array = npt.NDArray[Any]

ELEMENT_LIMIT: Final = 1 << 40
"""Elements that a tensor may declare; more cannot be addressed by what follows, and no file holds so many."""


AXES_LIMIT: Final = 32
"""Dimensions that a tensor may have: as many as an array of NumPy 1.26, and more than any operator gives a meaning."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the elements of a tensor lie, one after the other: ``location`` is empty for the model file itself."""

    location: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A tensor of the file.

    Attributes:
        name: Its name.
        shape: Its declared dimensions.
        data_type: A TensorProto.DataType.
        proto: The TensorProto or SparseTensorProto of the skeleton.
    """

    name: str
    shape: tuple[int, ...]
    data_type: int
    proto: onnx.TensorProto | onnx.SparseTensorProto

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy's (or ml_dtypes') name for the element type."""
        return helper.tensor_dtype_to_np_dtype(self.data_type)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def stored(proto: onnx.TensorProto | onnx.SparseTensorProto) -> Stored:
    """Describe ``proto`` without reading its elements. Raises PayloadError where the shape or type makes no sense."""
    values = proto.values if isinstance(proto, onnx.SparseTensorProto) else proto
    shape = tuple(proto.dims)
    if any(dimension < 0 for dimension in shape):
        raise PayloadError(f"tensor {values.name!r} has a negative dimension")
    if len(shape) > AXES_LIMIT:
        raise PayloadError(f"tensor {values.name!r} has {len(shape):,} dimensions, more than {AXES_LIMIT}")
    # NumPy can say no shape with such sizes, whether or not one of them is 0.
    if math.prod(filter(None, shape)) > ELEMENT_LIMIT:
        raise PayloadError(f"tensor {values.name!r} declares a shape of {math.prod(filter(None, shape)):,} elements")
    if values.data_type in {TensorProto.UNDEFINED, TensorProto.STRING} or values.data_type not in _KNOWN_TYPES:
        raise PayloadError(
            f"tensor {values.name!r} has element type {values.data_type}, which holds no real numbers known here"
        )
    return Stored(values.name, shape, values.data_type, proto)


_KNOWN_TYPES: Final = frozenset(TensorProto.DataType.values()) - {TensorProto.COMPLEX64, TensorProto.COMPLEX128}
_PACKED: Final = frozenset(
    code for name, code in TensorProto.DataType.items() if name in {"INT4", "UINT4", "INT2", "UINT2", "FLOAT4E2M1"}
)
"""Types that hold several elements in a byte."""


def place(file: ModelFile, tensor: Stored) -> Place | None:
    """Where the elements of ``tensor`` lie in order, one itemsize each; None for varints, sparse and 4-bit ones."""
    proto = tensor.proto
    if isinstance(proto, onnx.SparseTensorProto) or tensor.data_type in _PACKED:
        return None
    length = tensor.size * tensor.dtype.itemsize
    if proto.data_location == TensorProto.EXTERNAL:
        location, offset, _ = _external(proto, length)
        return Place(location, offset, length)
    payload = file.payload(proto)
    if payload is None:
        return None
    if payload.raw is not None:
        return Place("", payload.raw.start, length)
    fields: dict[int, int] = {TensorProto.FLOAT: FLOAT_DATA, TensorProto.DOUBLE: DOUBLE_DATA}
    field = fields.get(tensor.data_type)
    if len(payload.typed) == 1 and payload.typed[0][0] == field and len(payload.packed[0]) == length:
        return Place("", payload.packed[0].start, length)
    return None


def read(file: ModelFile, tensor: Stored) -> Array:
    """The elements of ``tensor`` in its own dtype and shape. Raises PayloadError where the file does not hold them."""
    proto = tensor.proto
    if isinstance(proto, onnx.SparseTensorProto):
        return _read_sparse(file, tensor, proto)
    where = place(file, tensor)
    if where is not None and where.location:
        try:
            source = file.data_file(where.location)
        except ModelFileError as error:
            raise PayloadError(str(error)) from error
        _, _, declared = _external(proto, where.length)
        if declared != where.length:
            raise PayloadError(
                f"tensor {tensor.name!r} needs {where.length} bytes and its external data has {declared}"
            )
        return _read_place(source, where, tensor)
    payload = file.payload(proto)
    if payload is None:
        if tensor.size:
            raise PayloadError(f"tensor {tensor.name!r} has no data in the file", "no-data")
        return np.zeros(tensor.shape, tensor.dtype)
    if where is not None:
        if payload.raw is not None and len(payload.raw) != where.length:
            raise PayloadError(f"tensor {tensor.name!r} needs {where.length} bytes and holds {len(payload.raw)}")
        return _read_place(file.source, where, tensor)
    return _read_typed(file, tensor, proto)


def _external(proto: onnx.TensorProto, length: int) -> tuple[str, int, int]:
    """``(location, offset, length)`` of external data; the last entry of a key counts."""
    entries = {str(entry.key): str(entry.value) for entry in proto.external_data}
    try:
        offset, declared = int(entries.get("offset", 0)), int(entries.get("length", length))
    except ValueError as error:
        raise PayloadError(f"tensor {proto.name!r} has an offset or length that is no number") from error
    if offset < 0 or declared < 0:
        raise PayloadError(f"tensor {proto.name!r} has a negative offset or length")
    if not entries.get("location"):
        raise PayloadError(f"tensor {proto.name!r} has external data without a location")
    return normalised(entries["location"]), offset, declared


def _read_place(source: ByteSource, where: Place, tensor: Stored) -> Array:
    if where.offset + where.length > source.size:
        raise PayloadError(f"tensor {tensor.name!r} needs bytes past the end of its file")
    array = np.empty(tensor.size, tensor.dtype.newbyteorder("<") if tensor.dtype.itemsize > 1 else tensor.dtype)
    if array.size:
        source.read_into(where.offset, array.view(np.uint8).data)
    return array.reshape(tensor.shape)


def complete(file: ModelFile, proto: onnx.TensorProto) -> onnx.TensorProto:
    """``proto`` of the skeleton with its elements as the file spells them; of both spellings only ``raw_data``.

    Raises PayloadError where protobuf does not read them.
    """
    whole = onnx.TensorProto(dims=proto.dims, data_type=proto.data_type, name=_text(proto.name))
    payload = file.payload(proto)
    if payload is not None and payload.raw is not None:
        whole.raw_data = file.source.read(payload.raw.start, len(payload.raw))
    elif payload is not None:
        try:
            whole.MergeFromString(b"".join(file.source.read(span.start, len(span)) for _, span in payload.typed))
        except DecodeError as error:
            raise PayloadError(f"tensor {proto.name!r} cannot be read: its elements are no numbers") from error
    return whole


def _text(name: str | bytes) -> str:
    """A name that protobuf takes: one that is not UTF-8 it gives as bytes, and refuses."""
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else name


def _read_typed(file: ModelFile, tensor: Stored, proto: onnx.TensorProto) -> Array:
    """Through onnx, which knows how each type is spelled in which field."""
    try:
        return numpy_helper.to_array(complete(file, proto))
    except OnnxClpError:
        raise
    except Exception as error:
        raise PayloadError(f"tensor {tensor.name!r} cannot be read: {type(error).__name__}") from error


def _read_sparse(file: ModelFile, tensor: Stored, proto: onnx.SparseTensorProto) -> Array:
    values = read(file, stored(proto.values))
    indices = read(file, stored(proto.indices)).astype(np.int64)
    if tensor.size > SPARSE_LIMIT:
        raise PayloadError(f"sparse tensor {tensor.name!r} has {tensor.size:,} elements, more than are made dense here")
    dense = np.zeros(tensor.size, values.dtype)
    try:
        flat = indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), tensor.shape)
        dense[flat] = values
    except (ValueError, IndexError) as error:
        raise PayloadError(f"sparse tensor {tensor.name!r} has indices that do not fit its shape") from error
    return dense.reshape(tensor.shape)


SPARSE_LIMIT: Final = 1 << 26
"""Elements of a tensor that takes no room in the file but would in memory: 256 MiB of float32."""
