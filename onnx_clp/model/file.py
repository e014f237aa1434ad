"""Open an ONNX file: path → ModelFile. The graph is read whole, the weights stay on disk until they are asked for."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

import onnx
from google.protobuf.message import DecodeError

from onnx_clp.errors import ModelFileError
from onnx_clp.limits import DEFAULT_LIMITS, Limits, Meter
from onnx_clp.model.edits import Message, Span
from onnx_clp.model.source import ByteSource
from onnx_clp.model.wire import Layout, Payload, walk

_FOREIGN: Final = (
    (b"version https://git-lfs", "a Git LFS pointer", "fetch the model itself with `git lfs pull`"),
    (
        b"\x00\x05\x16\x07",
        "an AppleDouble file, which macOS puts beside the real one",
        "scan the file without the `._`",
    ),
    (b"PK\x03\x04", "a zip archive (a PyTorch checkpoint or a TorchScript file is one)", "export the model to ONNX"),
    (b"\x80\x02", "a Python pickle", "export the model to ONNX; do not load pickles from strangers"),
    (b"\x89HDF", "an HDF5 file (Keras)", "convert the model to ONNX"),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"<", "a text or HTML file", "download the model itself"),
    (b"{", "a JSON file", "convert it to the binary ONNX format"),
)


@dataclass(frozen=True)
class ModelFile:
    """An open ONNX file.

    ``proto`` is the model without its payloads: a tensor's ``raw_data`` holds the ticket of its payload in ``layout``
    and a node's ``doc_string`` that of its place. Data files may lie below the folder of ``path`` or
    ``allow_roots``; ``meter`` counts what the analysis of this file costs.
    """

    path: Path
    source: ByteSource
    proto: onnx.ModelProto
    layout: Layout
    meter: Meter
    allow_roots: tuple[Path, ...] = ()
    _data: dict[str, ByteSource | ModelFileError] = field(default_factory=dict, repr=False)

    def payload(self, tensor: onnx.TensorProto) -> Payload | None:
        """Where the elements of ``tensor`` lie in the model file; None where the file holds none."""
        return self.layout.payloads[int.from_bytes(tensor.raw_data, "little")] if tensor.raw_data else None

    def location_entries(self) -> Iterator[tuple[Span, tuple[Message, ...], onnx.StringStringEntryProto]]:
        """Every ``external_data`` entry with the key ``location``: its field, the messages around it, and itself."""
        for payload in self.layout.payloads:
            for span, enclosing in payload.external:
                # Read as the only field of a TensorProto, which is what it is part of.
                field_bytes = self.source.read(span.start, len(span))
                entry: onnx.StringStringEntryProto = onnx.TensorProto.FromString(field_bytes).external_data[0]
                if entry.key == "location":
                    yield span, enclosing, entry

    def locations(self) -> tuple[str, ...]:
        """The names of all external data files, in one spelling each, sorted."""
        return tuple(sorted({normalised(entry.value) for _, _, entry in self.location_entries()}))

    def data_file(self, location: str) -> ByteSource:
        """The external data file that the model calls ``location``; raises ModelFileError where it is refused."""
        if location not in self._data:
            try:
                self._data[location] = source = ByteSource(self._contained(location))
                self.meter.grant(source.size)
            except ModelFileError as error:
                self._data[location] = error
        known = self._data[location]
        if isinstance(known, ModelFileError):
            raise known
        return known

    def _contained(self, location: str) -> Path:
        """The real path of ``location``, which must lie under the folder of the model."""
        if not location or "\0" in location:
            raise ModelFileError(f"{self.path} has external data without a usable file name")
        folder = self.path.parent
        try:
            target = (folder / location).resolve()
        except (OSError, RuntimeError) as error:
            raise ModelFileError(f"{self.path}: external data file {location!r} cannot be resolved") from error
        if not any(target.is_relative_to(root) for root in _roots(folder)):
            advice = "put the data beside the model if you trust it"
            raise ModelFileError(f"{self.path}: external data file {location!r} lies outside its folder", advice)
        if not os.path.lexists(target):
            raise ModelFileError(f"{self.path}: external data file {location!r} is missing", "copy it beside the model")
        return target

    def close(self) -> None:
        """Close the file and its data files."""
        self.source.close()
        for data in self._data.values():
            if isinstance(data, ByteSource):
                data.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def normalised(location: str | bytes) -> str:
    """One spelling of a data file's name: ``w.bin`` and ``./w.bin`` are the same file."""
    return posixpath.normpath(str(location)) if location else ""


def _roots(folder: Path) -> Iterator[Path]:
    """Where external data of a model in ``folder`` may lie."""
    yield folder.resolve()
    # A Hugging Face cache holds models--name/snapshots/revision/… as links into models--name/blobs.
    for ancestor in folder.absolute().parents:
        if ancestor.name == "snapshots" and ancestor.parent.name.startswith("models--"):
            yield (ancestor.parent / "blobs").resolve()
            return


def open_model(path: Path, allow_roots: Sequence[Path] = (), limits: Limits = DEFAULT_LIMITS) -> ModelFile:
    """Open the ONNX file at ``path``.

    Args:
        path: The file.
        allow_roots: Folders beside its own in which its external data may lie.
        limits: What its analysis may cost.

    Raises ModelFileError where it is missing, unreadable, empty, truncated, corrupt, or no ONNX model.
    """
    source = ByteSource(path)
    try:
        return open_source(source, allow_roots, limits)
    except BaseException:
        source.close()
        raise


def open_source(source: ByteSource, allow_roots: Sequence[Path] = (), limits: Limits = DEFAULT_LIMITS) -> ModelFile:
    """The ONNX model in the open ``source``, which closing the model closes; otherwise as ``open_model``."""
    meter = Meter(limits)
    meter.grant(source.size)
    _refuse_foreign(source.path, source.read(0, min(64, source.size)))
    skeleton, layout = walk(source)
    return ModelFile(source.path, source, _parse(source.path, skeleton), layout, meter, tuple(allow_roots))


def _parse(path: Path, skeleton: bytes) -> onnx.ModelProto:
    try:
        proto = onnx.ModelProto.FromString(skeleton)
    except DecodeError as error:
        advice = "the file is truncated, corrupt, or of another format"
        raise ModelFileError(f"{path} is not a readable ONNX model: protobuf refuses it", advice) from error
    if not proto.HasField("graph"):
        advice = "the file is truncated or of another format"
        raise ModelFileError(f"{path} is not an ONNX model: it holds no graph", advice)
    return proto


def _refuse_foreign(path: Path, head: bytes) -> None:
    """Raise ModelFileError where the first bytes are those of another well-known format."""
    if not head:
        raise ModelFileError(f"{path} is empty", "fetch the file again")
    if head[4:8] == b"ORTM":
        raise ModelFileError(f"{path} is an ORT format model", "scan the .onnx file that it was made from")
    if head[4:8] == b"TFL3":
        raise ModelFileError(f"{path} is a TensorFlow Lite model", "convert the model to ONNX")
    for magic, what, advice in _FOREIGN:
        if head.startswith(magic):
            raise ModelFileError(f"{path} is not an ONNX model but {what}", advice)
