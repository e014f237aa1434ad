"""Open an ONNX file: path → ModelFile. The graph is read whole, the weights stay on disk until they are asked for."""

from __future__ import annotations

import math
import os
import posixpath
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final, Self

import onnx
from google.protobuf.message import DecodeError

from onnx_clp.errors import ModelFileError, kept
from onnx_clp.limits import DEFAULT_LIMITS, Limits, Meter
from onnx_clp.model.containment import (
    Names,
    Refused,
    Root,
    check_spelling,
    find_names,
    open_regular,
    quoted,
    resolve,
    roots,
)
from onnx_clp.model.edits import Message, Span
from onnx_clp.model.source import ByteSource
from onnx_clp.model.wire import Layout, Payload, walk

_DIGITS: Final = 20
"""Digits of the largest number that a place in a file has, and one more."""

LOOK_WORK: Final = 1 << 16
"""What a look into a folder costs, in multiply-adds: some microseconds."""

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
    ``allow_roots``, see ``containment``; ``meter`` counts what the analysis of this file costs.
    """

    path: Path
    source: ByteSource
    proto: onnx.ModelProto
    layout: Layout
    meter: Meter
    allow_roots: tuple[Path, ...] = ()
    _paths: dict[str, str | ModelFileError] = field(default_factory=dict, repr=False)
    _data: dict[str, ByteSource | ModelFileError] = field(default_factory=dict, repr=False)
    _open: dict[tuple[int, int], ByteSource] = field(default_factory=dict, repr=False)

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

    def external_ranges(self) -> Iterator[tuple[str, int, float]]:
        """For every tensor with external data, of whatever type and wherever in the file: location, start and end.

        Where start or end is not said, or is no number, it is the furthest that it could be.
        """
        for payload in self.layout.payloads:
            if not payload.external:
                continue
            fields = b"".join(self.source.read(span.start, len(span)) for span, _ in payload.external)
            external = onnx.TensorProto.FromString(fields).external_data
            entries = {str(entry.key): entry.value for entry in external}
            start, length = (_decimal(str(entries.get(key, "0"))) for key in ("offset", "length"))
            # A runtime may take " 64" for 64, and of two offsets the first: where the bytes begin is then not known.
            for location in {normalised(entry.value) for entry in external if entry.key == "location"}:
                if start is None or len(entries) < len(external):
                    yield location, 0, math.inf
                else:
                    yield location, start, start + length if length else math.inf

    def locations(self) -> tuple[str, ...]:
        """The names of all external data files, in one spelling each, sorted."""
        return tuple(sorted(self._spellings))

    @cached_property
    def _spellings(self) -> dict[str, tuple[str, ...]]:
        """By each location in one spelling, how the file spells it."""
        found: dict[str, set[str]] = defaultdict(set)
        for _, _, entry in self.location_entries():
            found[normalised(entry.value)].add(os.fsdecode(entry.value))
        return {location: tuple(sorted(spellings)) for location, spellings in found.items()}

    @cached_property
    def _roots(self) -> tuple[Root, ...]:
        return roots(self.path.parent, self.allow_roots)

    @cached_property
    def _names(self) -> Names:
        return find_names(self._roots, self.meter.limits.entries)

    def data_path(self, location: str) -> str:
        """The real path of the data file that the model calls ``location``; raises ModelFileError where it has none.

        Of two spellings that look alike each is followed: ``w.bin`` and ``sub/../w.bin`` may be two files.
        """
        if location not in self._paths:
            self._paths[location] = self._resolved(location)
        known = self._paths[location]
        if isinstance(known, ModelFileError):
            raise known
        return known

    def _resolved(self, location: str) -> str | ModelFileError:
        paths = set()
        for spelling in self._spellings.get(location, (location,)):
            try:
                check_spelling(spelling)
                paths.add(resolve(spelling, self._roots, lambda: self.meter.work(LOOK_WORK)))
            except Refused as refusal:
                return self._refusal(spelling, refusal)
        if len(paths) > 1:
            return self._refusal(location, Refused("is spelled in two ways, which lead to two files"))
        return paths.pop()

    def data_file(self, location: str) -> ByteSource:
        """The external data file that the model calls ``location``; raises ModelFileError where it is refused."""
        if location not in self._data:
            try:
                self._data[location] = self._opened(self.data_path(location))
            except Refused as refusal:
                self._data[location] = self._refusal(location, refusal)
            except ModelFileError as error:
                self._data[location] = kept(error)
        known = self._data[location]
        if isinstance(known, ModelFileError):
            raise known
        return known

    def _opened(self, path: str) -> ByteSource:
        """The data file at the real ``path``, the same for all names of a file. Raises Refused."""
        descriptor, status = open_regular(path, self._roots)
        source = ByteSource(Path(path), descriptor)
        try:
            self._check(source, status)
        except BaseException:
            source.close()
            raise
        known = self._open.setdefault(source.identity, source)
        if known is source:
            self.meter.grant(source.size)
        else:
            source.close()
        return known

    def _check(self, source: ByteSource, status: os.stat_result) -> None:
        if source.identity == self.source.identity:
            raise Refused("is the model file itself", "put the data into a file of its own")
        if status.st_nlink > 1:
            self._names.check(status)

    def _refusal(self, location: str, refusal: Refused) -> ModelFileError:
        return ModelFileError(f"{self.path}: external data file {quoted(location)} {refusal.why}", refusal.hint)

    def sources(self) -> Iterator[ByteSource]:
        """The model and every data file that was opened."""
        yield self.source
        yield from self._open.values()

    def close(self) -> None:
        """Close the file and its data files."""
        for source in self.sources():
            source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _decimal(text: str) -> int | None:
    """The number that ``text`` is in plain decimal digits; None where it is none that a place in a file can have."""
    digits = text.lstrip("0") or "0"
    return int(digits) if text.isascii() and text.isdecimal() and len(digits) < _DIGITS else None


def normalised(location: str | bytes) -> str:
    """One spelling of a data file's name: ``w.bin`` and ``./w.bin`` are the same file."""
    return posixpath.normpath(os.fsdecode(location)) if location else ""


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
    skeleton, layout = walk(source, limits)
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
