"""Edits → files: the patched copy, written beside its destination, ready to be verified and moved into place.

The copy and its data files are made in a new folder next to the destination, the data under its final names, so that
what is verified is what will be used.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from tempfile import TemporaryDirectory

from onnx import StringStringEntryProto

from onnx_clp.errors import UsageError, VerificationError
from onnx_clp.model.edits import Edit, length_delimited, pieces, with_lengths
from onnx_clp.model.file import ModelFile, normalised
from onnx_clp.model.source import ByteSource
from onnx_clp.model.wire import EXTERNAL_DATA, MODEL_METADATA

METADATA_PREFIX = "onnx_clp."


@dataclass(frozen=True, slots=True)
class Copy:
    """A file that was written.

    Attributes:
        source: What it was copied from.
        edits: In which bytes it differs from that.
        path: Where it lies.
        target: Where it is to lie; None where the source stays in use and the copy serves the verification only.
    """

    source: ByteSource
    edits: tuple[Edit, ...]
    path: Path
    target: Path | None


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A patched copy that is not in place yet.

    Attributes:
        folder: The temporary folder that holds it.
        files: Every file in it, the model last.
    """

    folder: Path
    files: tuple[Copy, ...]

    @property
    def model(self) -> Path:
        """The copy of the model."""
        return self.files[-1].path


def is_in_place(file: ModelFile, destination: Path) -> bool:
    """Whether ``destination`` is the very name of the model."""
    return os.path.realpath(destination) == os.path.realpath(file.path)


def data_names(file: ModelFile, destination: Path, edited: Collection[str]) -> dict[str, str]:
    """A name for each external data file the model refers to, by the name it has: nothing that exists has the new one.

    A name that begins like the model's own goes on as the new model's; any other is put behind it. In place, a file
    keeps its name where it is not ``edited``; where it is, a number is put behind it.
    """
    names: dict[str, str] = {}

    def taken(name: str) -> bool:
        return name == destination.name or name in names.values() or os.path.lexists(destination.parent / name)

    for location in file.locations():
        base = location.replace("\\", "/").rsplit("/", 1)[-1]
        if not is_in_place(file, destination):
            names[location] = _first_free(_fitted(base, file.path, destination), taken)
        elif not _is_below(destination.parent, location):
            names[location] = _first_free(base, taken)
        elif location in edited or file.source.is_at(destination.parent / location):
            names[location] = _first_free(location, taken)
        else:
            names[location] = location
    return names


def _first_free(name: str, taken: Callable[[str], bool]) -> str:
    """``name``, or the first of ``name.2``, ``name.3``, … that is not taken."""
    free, number = name, 2
    while taken(free):
        free, number = f"{name}.{number}", number + 1
    return free


def _is_below(folder: Path, location: str) -> bool:
    """Whether the file ``location`` lies in ``folder``, or below it and on no way through a link."""
    inner = Path(os.path.realpath(folder), location).parent
    return not Path(location).is_absolute() and os.path.realpath(inner) == os.fspath(inner)


def bears_name(name: str, model: Path) -> bool:
    """Whether the data file ``name`` is called after ``model``."""
    rests = [name.removeprefix(own) for own in (model.name, model.stem)]
    return any(rest != name and not rest[:1].isalnum() for rest in rests)


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
        UsageError: The folder of ``destination`` cannot be written to, or the disk is full; also while the copies are
            verified.
    """
    # The name is chosen here and not by tempfile, so that there is no moment at which the folder exists and an
    # interrupt would leave it; nobody can guess it.
    folder = destination.parent / f".onnx-clp-{secrets.token_hex(8)}.tmp"
    try:
        # Twice: the first may be interrupted.
        try:
            folder.mkdir(0o700)
            yield _copies(file, edits, names, folder, destination)
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(f"cannot write {destination}: {reason}", "nothing was left behind") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def temporary_copy(file: ModelFile, edits: Mapping[str, Sequence[Edit]]) -> Iterator[Rewrite]:
    """The patched copies in a temporary folder, which is gone at the end. Raises as `rewritten`."""
    with TemporaryDirectory(prefix="onnx-clp-", ignore_cleanup_errors=True) as folder:
        destination = Path(folder) / "model.onnx"
        wanted = {location: [*group] for location, group in edits.items() if group}
        names = data_names(file, destination, wanted)
        wanted.setdefault("", []).extend(location_edits(file, names))
        with rewritten(file, wanted, names, destination) as written:
            yield written


def _copies(
    file: ModelFile, edits: Mapping[str, Sequence[Edit]], names: Mapping[str, str], folder: Path, destination: Path
) -> Rewrite:
    in_place = is_in_place(file, destination)
    # Not called *.onnx, so that a scan of the folder does not meet what a killed run left.
    part = _first_free("model.part", {name.split("/", 1)[0] for name in names.values()}.__contains__)
    files = []
    for location, name in names.items():
        target = None if in_place and name == location else destination.parent / name
        files.append(_copy(file.data_file(location), edits.get(location, ()), folder / name, target))
    files.append(_copy(file.source, edits.get("", ()), folder / part, destination))
    return Rewrite(folder, tuple(files))


def _copy(source: ByteSource, edits: Sequence[Edit], path: Path, target: Path | None) -> Copy:
    copy = Copy(source, with_lengths(edits), path, target)
    path.parent.mkdir(parents=True, exist_ok=True)
    # As cp does: who may not read the source may not read the copy, and the umask holds.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, source.mode & 0o666 | 0o600)
    _keep_group(descriptor, source)
    # Not flushed to the disk, as cp does not: a killed process loses nothing, and a power cut is not in scope.
    with FileIO(descriptor, "wb") as out:
        for piece in pieces(source, copy.edits):
            _write_all(out, piece)
    return copy


def _keep_group(descriptor: int, source: ByteSource) -> None:
    """Give the new file the group of ``source``, as far as that may be done."""
    status = os.fstat(descriptor)
    if status.st_gid != source.group:
        with suppress(OSError):
            os.fchown(descriptor, -1, source.group)
        os.fchmod(descriptor, rights(status.st_mode, os.fstat(descriptor).st_gid, source))


def rights(mode: int, group: int, source: ByteSource) -> int:
    """What of ``mode`` a copy of ``source`` may have that belongs to ``group``.

    Where that is another group than the source's, the members of both are others there, and nobody has more than each
    of them had.
    """
    same = group == source.group
    return mode & 0o777 if same else mode & 0o700 | mode & source.mode & source.mode >> 3 & 0o7


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
    for copy in rewrite.files:
        check_unchanged(copy.source)
        with copy.path.open("rb", buffering=0) as written:
            for expected in pieces(copy.source, copy.edits):
                if written.read(len(expected)) != expected:
                    raise VerificationError(f"the copy differs from {copy.source.path} where nothing was to change")
            if written.read(1):
                raise VerificationError(f"the copy of {copy.source.path} has more bytes than planned")
        changed += sum(len(edit.span) for edit in copy.edits)
    return changed


def check_unchanged(source: ByteSource) -> None:
    """Raise VerificationError where ``source`` is not what it was when it was opened."""
    if not source.unchanged():
        raise VerificationError(f"{source.path} was changed or replaced while it was copied", "run again")


def add_at_end(rewrite: Rewrite, content: bytes) -> None:
    """Add ``content`` behind the model, and read it back."""
    with rewrite.model.open("r+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        _write_all(file, content)
        file.seek(end)
        if file.read(len(content) + 1) != content:
            raise VerificationError("what was added to the copy is not what was to be added")
