"""Edits → files: the patched copy, written beside its destination, ready to be verified and moved into place.

The copy and its data files are made in a new folder next to the destination, under their final names, so that what is
verified is what will be used; moving them is a rename on one filesystem each, the model last.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from onnx import StringStringEntryProto

from onnx_clp.errors import UsageError, VerificationError
from onnx_clp.model.edits import Edit, length_delimited, pieces, with_lengths
from onnx_clp.model.file import ModelFile, normalised
from onnx_clp.model.source import ByteSource
from onnx_clp.model.wire import EXTERNAL_DATA, MODEL_METADATA

METADATA_PREFIX = "onnx_clp."


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A patched copy that is not in place yet.

    Attributes:
        folder: The temporary folder that holds it.
        model: The copy of the model in it.
        files: Every file in it, as (source it was copied from, edits, path); the model last.
    """

    folder: Path
    model: Path
    files: tuple[tuple[ByteSource, tuple[Edit, ...], Path], ...]


def is_in_place(file: ModelFile, destination: Path) -> bool:
    """Whether ``destination`` is the very name of the model, whose data files then keep theirs."""
    return destination.resolve() == file.path.resolve()


def data_names(file: ModelFile, destination: Path) -> dict[str, str]:
    """A new name for each external data file the model refers to, made to fit ``destination``.

    A name that begins like the model's own goes on as the new model's; any other is put behind it. In place, names
    stay.
    """
    locations = file.locations()
    if is_in_place(file, destination):
        return {location: location for location in locations}
    names: dict[str, str] = {}
    for location in locations:
        fitted = _fitted(location.replace("\\", "/").rsplit("/", 1)[-1], file.path, destination)
        unique, number = fitted, 2
        while unique in names.values() or unique == destination.name:
            unique, number = f"{fitted}.{number}", number + 1
        names[location] = unique
    return names


def _fitted(name: str, source: Path, destination: Path) -> str:
    """``name``, which belongs to ``source``, for ``destination``."""
    for old, new in ((source.name, destination.name), (source.stem, destination.stem)):
        rest = name.removeprefix(old)
        if rest != name and not rest[:1].isalnum():
            return new + rest
    return f"{destination.stem}.{name}"


def location_edits(file: ModelFile, names: Mapping[str, str]) -> Iterator[Edit]:
    """Edits that make the model refer to the new names of its data files."""
    for span, enclosing, entry in file.location_entries():
        name = names[normalised(entry.value)]
        if name != entry.value:
            entry.value = name
            yield Edit(span, length_delimited(EXTERNAL_DATA, entry.SerializeToString()), enclosing)


def forget_metadata(file: ModelFile) -> Iterator[Edit]:
    """Edits that remove the model's ``onnx_clp.*`` metadata, which an earlier rewrite left."""
    for span, known in zip(file.layout.metadata, file.proto.metadata_props, strict=True):
        if str(known.key).startswith(METADATA_PREFIX):
            yield Edit(span, b"")


def metadata_entries(entries: Mapping[str, str]) -> bytes:
    """``entries`` as whole fields of a ModelProto, their keys with the prefix ``onnx_clp.``."""
    return b"".join(
        length_delimited(
            MODEL_METADATA, StringStringEntryProto(key=METADATA_PREFIX + key, value=value).SerializeToString()
        )
        for key, value in entries.items()
    )


@contextmanager
def rewritten(
    file: ModelFile,
    edits: Mapping[str, Sequence[Edit]],
    names: Mapping[str, str],
    destination: Path,
) -> Iterator[Rewrite]:
    """Write the patched copies into a new folder beside ``destination``; the folder is gone at the end, come what may.

    Args:
        file: The model to copy.
        edits: By file: the empty string for the model, else the location of a data file.
        names: The new name of each data file, by location.
        destination: Where the model will be moved.

    Raises:
        UsageError: The folder of ``destination`` does not exist or cannot be written to, or the disk is full.
    """
    parent = destination.parent
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{destination.name[:64]}.", suffix=".tmp", dir=parent))
    except OSError as error:
        raise UsageError(f"cannot write to {parent}: {error.strerror}") from error
    try:
        yield _copies(file, edits, names, folder, destination)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _copies(
    file: ModelFile, edits: Mapping[str, Sequence[Edit]], names: Mapping[str, str], folder: Path, destination: Path
) -> Rewrite:
    files = [
        (file.data_file(location), with_lengths(edits.get(location, ())), folder / name)
        for location, name in names.items()
    ]
    files.append((file.source, with_lengths(edits.get("", ())), folder / destination.name))
    try:
        for source, changes, path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, pieces(source, changes))
    except OSError as error:
        raise UsageError(f"cannot write {destination}: {error.strerror or error}", "nothing was left behind") from error
    return Rewrite(folder, folder / destination.name, tuple(files))


def _write(path: Path, content: Iterable[bytes]) -> None:
    # Not flushed to the disk, as cp does not: a killed process loses nothing, and a power cut is not in scope.
    with path.open("xb", buffering=0) as out:
        for piece in content:
            _write_all(out, piece)


def _write_all(out: FileIO, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[out.write(rest) :]


def check_bytes(rewrite: Rewrite) -> int:
    """Compare every written file with its source: equal but for the edits.

    Returns the number of bytes that the edits replaced. Raises VerificationError where anything else differs, also
    where a source was changed while it was copied.
    """
    changed = 0
    for source, edits, path in rewrite.files:
        if not source.unchanged():
            raise VerificationError(f"{source.path} was changed by somebody else while it was copied", "run again")
        with path.open("rb", buffering=0) as written:
            for expected in pieces(source, edits):
                if written.read(len(expected)) != expected:
                    raise VerificationError(f"the copy differs from {source.path} where nothing was to change")
            if written.read(1):
                raise VerificationError(f"the copy of {source.path} has more bytes than planned")
        changed += sum(len(edit.span) for edit in edits)
    return changed


def add_at_end(rewrite: Rewrite, content: bytes) -> None:
    """Add ``content`` behind the model, and read it back."""
    with rewrite.model.open("r+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        _write_all(file, content)
        file.seek(end)
        if file.read(len(content) + 1) != content:
            raise VerificationError("what was added to the copy is not what was to be added")


def move_into_place(rewrite: Rewrite, destination: Path) -> None:
    """Rename the files to their places, data files first. Raises UsageError where that fails."""
    try:
        for _, _, path in rewrite.files:
            target = destination.parent / path.relative_to(rewrite.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    except OSError as error:
        raise UsageError(f"cannot move the result to {destination}: {error.strerror}") from error
