"""Verified copies → their places: data files first, under names that nothing has; the model's rename is the commit.

Nothing that exists is overwritten but the model itself, and that by one rename. So at every moment, also after kill −9,
the model at the destination, the former or the new one, has whole data files of its own; a run that was killed leaves
files that no model refers to, and the next run takes other names.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from onnx_clp.errors import ModelFileError, UsageError, VerificationError
from onnx_clp.model.file import open_model
from onnx_clp.model.save import Rewrite, bears_name, check_unchanged, rights

LOCK_WAIT: Final = 10.0
"""Seconds to wait for another run that moves its files into the same folder, which takes some milliseconds."""


def move_into_place(rewrite: Rewrite, destination: Path, *, force: bool, in_place: bool) -> None:
    """Rename the files to their places; nothing is moved where the model is not.

    Args:
        rewrite: The verified copies.
        destination: The place of the model.
        force: Replace a model that is there, and remove the data files that bear its name and that it referred to.
        in_place: Replace the very file that was read.

    Raises:
        UsageError: Something else has one of the names, or the folder cannot be written to.
        VerificationError: A source was changed or replaced since it was opened.
    """
    with _alone(destination.parent):
        _check(rewrite, destination, force=force, in_place=in_place)
        former = _former_data(rewrite, destination) if force and not in_place else []
        try:
            _move(rewrite, keep_rights=in_place)
        except OSError as error:
            raise UsageError(f"cannot move the result to {destination}: {error.strerror}") from error
        finally:
            _take_back(rewrite)
        for path in former:
            with suppress(OSError):
                path.unlink()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other runs from moving files into ``folder`` meanwhile.

    The lock is on the open folder itself: no file is left, and the system releases it whatever ends the process. A file
    system without such locks, or a folder that may be written and not listed, is written to without one.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            _lock(descriptor, folder)
        yield


def _lock(descriptor: int, folder: Path) -> None:
    end = time.monotonic() + LOCK_WAIT
    while True:
        try:
            # Not waiting in the kernel: anybody who may read the folder can hold such a lock for good.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise UsageError(f"another program keeps {folder} locked", "run again when it is done") from None
            time.sleep(0.01)
        else:
            return


def _check(rewrite: Rewrite, destination: Path, *, force: bool, in_place: bool) -> None:
    """Raise where the sources or the places are not what they were when the copies were made."""
    *data, model = rewrite.files
    for copy in (model, *data):
        path = destination if copy is model else copy.source.path
        if in_place and not copy.source.is_at(path):
            raise VerificationError(f"{path} was replaced while it was copied", "run again")
        check_unchanged(copy.source)
    if os.path.lexists(destination) and not (force or in_place):
        raise UsageError(f"{destination} exists", "name another file, or say --force")
    for copy in data:
        if copy.target is not None and os.path.lexists(copy.target):
            raise UsageError(f"{copy.target} was made by another program meanwhile", "run again")


def _former_data(rewrite: Rewrite, destination: Path) -> list[Path]:
    """The data files that the model to be replaced refers to, where they lie beside it and bear its name.

    None where it is a link or has another name too, by which it goes on being used.
    """
    try:
        status = destination.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            return []
        with open_model(destination) as former:
            names = [name for name in former.locations() if bears_name(name, destination) and not {*name} & {"/", "\0"}]
    except (OSError, ModelFileError):
        return []
    return [path for path in map(destination.with_name, names) if _may_go(path, status, rewrite)]


def _may_go(path: Path, former: os.stat_result, rewrite: Rewrite) -> bool:
    """Whether ``path`` is a file, no link, none of the input, and not the ``former`` model itself."""
    try:
        status = path.lstat()
    except OSError:
        return False
    if not stat.S_ISREG(status.st_mode) or os.path.samestat(status, former):
        return False
    return not any(copy.source.is_at(path) for copy in rewrite.files)


def _move(rewrite: Rewrite, *, keep_rights: bool) -> None:
    for copy in rewrite.files:
        if copy.target is not None:
            if keep_rights:
                copy.path.chmod(rights(copy.source.mode, copy.path.stat().st_gid, copy.source))
            copy.path.replace(copy.target)


def _take_back(rewrite: Rewrite) -> None:
    """Remove the data files that were moved where the model was not."""
    # Asked of the disk, not remembered: an interrupt may come between a rename and a note of it.
    if not os.path.lexists(rewrite.model):
        return
    for copy in rewrite.files:
        if copy.target is not None and not os.path.lexists(copy.path):
            with suppress(OSError):
                copy.target.unlink()
