"""Which files a model's external data may be: a location, which a stranger wrote, → a real path → an open file.

A location is followed part by part as the operating system would follow it, links included, but from below an allowed
folder, a *root*, no name outside is ever looked up. So what a refusal says cannot depend on what lies outside, and
neither can whether there is one. The roots are

* the folder of the model;
* in a Hugging Face cache, ``models--name/blobs`` for a model below ``models--name/snapshots/revision``;
* the folders that the user allows.

A hard link has no real path that tells where it leads: a file of several names is read where all of them lie below
roots, or in the cache of DVC, which links what it keeps.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

LOCATION_LIMIT: Final = 4095
"""Characters of a location: Linux takes no path of 4,096 bytes."""

MEMORY_ADDRESS: Final = "*/_ORT_"
"""How onnxruntime names data that lies in its memory, at the offset; 1.32 believes it of a file too."""

LINK_LIMIT: Final = 40
"""Links on the way to one file, as many as Linux follows."""

NAME_LIMIT: Final = 120
"""Characters of a location that a message shows."""

# A folder of which only the names below may be looked up cannot be opened but by O_PATH, which Linux alone has.
_FOLDER: Final = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PASS: Final = _FOLDER | getattr(os, "O_PATH", os.O_RDONLY)
_FILE: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC


class Refused(Exception):  # noqa: N818  # an answer; whoever asked makes an error of it, or none
    """A location that is not followed: why, as the end of a sentence about it, and what to do."""

    def __init__(self, why: str, hint: str = "") -> None:
        super().__init__(why)
        self.why = why
        self.hint = hint


class Outside(Refused):
    """It leads out of all roots."""

    def __init__(self) -> None:
        super().__init__("lies outside its folder", "copy it beside the model, or allow its folder with --allow-root")


@dataclass(frozen=True, slots=True)
class Root:
    """A folder in which data may lie: its absolute path as it was given, and its real one."""

    given: str
    real: str

    def holds(self, path: str) -> bool:
        """Whether the real ``path`` is the folder or lies below it."""
        return _below(path, self.real)


def roots(folder: Path, allow: Sequence[Path] = ()) -> tuple[Root, ...]:
    """The roots of a model in ``folder``, that folder first; ``allow`` are those that the user adds."""
    own = _root(folder)
    return (own, *_blobs(own.real), *map(_root, allow))


def _root(folder: Path) -> Root:
    return Root(os.fspath(folder.absolute()), os.path.realpath(folder))


def _blobs(folder: str) -> Iterator[Root]:
    """The ``blobs`` of the repository in a Hugging Face cache in which the real ``folder`` is, or is in, a revision."""
    for revision in (Path(folder), *Path(folder).parents):
        repository = revision.parent.parent
        if revision.parent.name == "snapshots" and repository.name.startswith("models--"):
            blobs = os.fspath(repository / "blobs")
            if _is_folder(blobs):
                yield Root(blobs, blobs)
            return


def _is_folder(path: str) -> bool:
    """Whether ``path`` is a folder and no link to one."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def check_spelling(location: str) -> None:
    """Raise Refused where no file is read by the name ``location``, wherever it may lie."""
    if not location:
        raise Refused("has no name")
    if "\0" in location:
        raise Refused("has a name with a NUL character, at which some runtimes cut it")
    if any("\ud800" <= character <= "\udfff" for character in location):
        raise Refused("has a name that is not UTF-8")
    if len(location) > LOCATION_LIMIT:
        raise Refused(f"has a name of more than {LOCATION_LIMIT:,} characters")
    if location.startswith(MEMORY_ADDRESS):
        raise Refused("has a name that makes onnxruntime read its own memory")
    if location.startswith("/"):
        raise Refused("has an absolute path, which onnxruntime does not read", "make it relative to the model's folder")


def resolve(location: str, allowed: Sequence[Root], look: Callable[[], None] = lambda: None) -> str:
    """The real path of ``location``, taken from the first of ``allowed``; something exists there.

    An absolute link is followed where it spells a root by its real path or as it was given.

    Args:
        location: A path.
        allowed: The roots.
        look: Called before each look into a folder; may raise what it likes.

    Raises Refused: Outside where it leads out of ``allowed``, on whatever way; otherwise with the reason.
    """
    current, links = allowed[0].real, 0
    rest = location.split("/")[::-1]
    while rest:
        path = _joined(current, rest.pop())
        if path == current or not _to_look_at(path, allowed):
            current = path
            continue
        look()
        mode, target = _look(path)
        if target is not None:
            links += 1
            if links > LINK_LIMIT:
                raise Refused(f"leads through more than {LINK_LIMIT} links")
            if target.startswith("/"):
                current, target = _from_root(target, allowed)
            rest += target.split("/")[::-1]
        elif rest and not stat.S_ISDIR(mode):
            raise Refused("is missing: a part of its path is no folder", "copy it beside the model")
        else:
            current = path
    if not any(root.holds(current) for root in allowed):
        raise Outside
    return current


def _joined(folder: str, name: str) -> str:
    """The path of ``name`` in the real ``folder``, whose parent is known without a look."""
    if name in {"", "."}:
        return folder
    if name == "..":
        return os.path.dirname(folder)  # noqa: PTH120  # text; Path is ten times slower
    return folder.rstrip("/") + "/" + name


def _to_look_at(path: str, allowed: Sequence[Root]) -> bool:
    """Whether ``path`` lies in a root; one above a root is a real folder, as is known without a look."""
    if any(root.holds(path) for root in allowed):
        return True
    if any(_below(root.real, path) for root in allowed):
        return False
    raise Outside


def _look(path: str) -> tuple[int, str | None]:
    """The mode of ``path``, and where it leads if it is a link."""
    try:
        mode = os.lstat(path).st_mode
        return mode, os.readlink(path) if stat.S_ISLNK(mode) else None  # noqa: PTH115  # likewise
    except FileNotFoundError as error:
        raise Refused("is missing", "copy it beside the model") from error
    except (OSError, ValueError) as error:
        raise Refused(f"cannot be found: {_reason(error)}") from error


def _from_root(target: str, allowed: Sequence[Root]) -> tuple[str, str]:
    """A real folder and the path from there that the absolute ``target`` of a link spells."""
    for root in allowed:
        if _below(target, root.given):
            return root.real, target[len(root.given.rstrip("/")) :]
    return "/", target


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


def open_regular(path: str, allowed: Sequence[Root]) -> tuple[int, os.stat_result]:
    """Open what ``resolve`` found, and say what it is.

    It is opened by no path but part by part from its root, following no link, so that nobody can put another in its
    place; and what opening might do something to, a device or a FIFO, is not opened.

    Raises Refused where it is no regular file, cannot be opened, or is no longer what it was.
    """
    root = next(root for root in allowed if root.holds(path))
    *parents, name = path[len(root.real) :].strip("/").split("/")
    if not name:
        raise Refused("is not a regular file")
    try:
        with _folder(root.real, parents, _PASS) as folder:
            before = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if not stat.S_ISREG(before.st_mode):
                raise Refused("is not a regular file")
            descriptor = os.open(name, _FILE, dir_fd=folder)
    except OSError as error:
        raise Refused(f"cannot be opened: {_reason(error)}") from error
    after = os.fstat(descriptor)
    if not os.path.samestat(before, after):
        os.close(descriptor)
        raise Refused("was replaced by somebody else while it was opened", "run again")
    return descriptor, after


@contextmanager
def _folder(root: str, parts: Sequence[str], flags: int) -> Iterator[int]:
    """A descriptor of the folder that ``parts`` lead to from ``root``; of the parts none may be a link."""
    descriptor = os.open(root, flags if not parts else _PASS)
    try:
        for number, part in enumerate(parts, 1):
            inner = os.open(part, flags if number == len(parts) else _PASS, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Names:
    """How many names each file of several names has in some folders.

    Attributes:
        found: By device and inode.
        limit: The number of entries after which the search was given up; 0 where it came to its end.
    """

    found: Counter[tuple[int, int]]
    limit: int

    def check(self, status: os.stat_result) -> None:
        """Raise Refused where the file of this ``status`` has names elsewhere."""
        if self.found[status.st_dev, status.st_ino] >= status.st_nlink:
            return
        if self.limit:
            why = f"has other names (hard links), and they were not found among {self.limit:,} entries of its folder"
            raise Refused(why, f"copy it, or have more looked at with --limit entries={10 * self.limit}")
        why = "has other names (hard links), and not all of them lie in its folder"
        raise Refused(why, "copy it, or allow the folder of the others with --allow-root")


def find_names(allowed: Sequence[Root], limit: int) -> Names:
    """Look for the names of files of several names below ``allowed`` and in the DVC cache: at ``limit`` entries.

    Links are not followed, and what is in a folder that cannot be read is not counted.
    """
    found: Counter[tuple[int, int]] = Counter()
    wanted = dict.fromkeys([*(root.real for root in allowed), *_dvc_cache(allowed[0].real)])
    looked = 0
    for top in wanted:
        if any(top != other and _below(top, other) for other in wanted):
            continue
        pending: list[tuple[str, ...]] = [()]
        while pending:
            parts = pending.pop()
            looked += len(parts)
            for entry in _entries(top, parts):
                looked += 1
                if looked > limit:
                    return Names(found, limit)
                if isinstance(entry, str):
                    pending.append((*parts, entry))
                elif entry is not None:
                    found[entry] += 1
    return Names(found, 0)


def _entries(top: str, parts: Sequence[str]) -> Iterator[str | tuple[int, int] | None]:
    """What is in a folder: the name of a folder, device and inode of a file of several names, None for all else."""
    with suppress(OSError), _folder(top, parts, _FOLDER | os.O_RDONLY) as folder, os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield entry.name
                continue
            status = entry.stat(follow_symlinks=False)
            several = stat.S_ISREG(status.st_mode) and status.st_nlink > 1
            yield (status.st_dev, status.st_ino) if several else None


def _dvc_cache(folder: str) -> Iterator[str]:
    """The cache of the DVC repository that the real ``folder`` lies in, where it is a folder of that repository."""
    for ancestor in (Path(folder), *Path(folder).parents):
        kept = os.fspath(ancestor / ".dvc")
        cache = os.path.join(kept, "cache")  # noqa: PTH118  # text, as everywhere here
        if _is_folder(kept) and _is_folder(cache):
            yield cache
            return


def quoted(location: str) -> str:
    """``location`` as a message shows it: what is not printable escaped, cut where it is long."""
    shown = repr(location[:NAME_LIMIT])
    return shown if len(location) <= NAME_LIMIT else f"{shown}… ({len(location):,} characters)"
