"""Labelled images: what lies at a path → which classes, which images → 8-bit images of one size.

A path is an ``.npz``; a folder with ``test_x.npy`` and ``test_y.npy``; a data set as torchvision leaves it; or a folder
with a folder of pictures for each class, in ``test`` or ``val`` within it where there is one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from onnx_clp.errors import UsageError
from onnx_clp.evaluation.arrays import FILES, read_npy, read_npz
from onnx_clp.evaluation.collection import Collection, of_arrays
from onnx_clp.evaluation.datasets import read_torchvision
from onnx_clp.evaluation.figures import ImageSet
from onnx_clp.evaluation.pictures import SUFFIXES, Fit, read_pictures
from onnx_clp.evaluation.triggers import Images

SPLITS: Final = ("test", "val")
"""Folders within a folder that hold the images to evaluate on, the preferred first."""


IMAGE_FOLDER: Final = "image folder"
"""The kind of a folder of pictures for each class."""


@dataclass(frozen=True, slots=True, eq=False)
class LabelledImages:
    """Images in memory.

    Attributes:
        images: uint8 (N, H, W, C).
        labels: int64 (N,), positions in ``source.classes``.
        source: Where they come from.
    """

    images: Images
    labels: npt.NDArray[np.int64]
    source: ImageSet


def read_images(
    path: Path,
    fit: Fit,
    classes: Sequence[str] | int | None = None,
    limit: int | None = None,
    seed: int = 0,
    *,
    partial: bool = False,
    found: Collection | None = None,
) -> LabelledImages:
    """Read labelled images.

    Args:
        path: What is described above.
        fit: Size and channels to make of them.
        classes: The names of the classes in the order of the model's outputs, or how many there are; None takes what is
            found. Where the set has the same names, they say which label is which class; else its labels are numbers,
            or the sorted order of its folders.
        limit: Take so many of the images, drawn at random with each class's share kept; None takes all.
        seed: Of that choice.
        partial: Folders for some of the classes are enough, named as the classes are or numbered from 0.
        found: What lies at ``path``, where that is known already.

    Raises:
        UsageError: There are no images, one cannot be read, or the classes do not fit.
    """
    collection = found or find_collection(path)
    if not len(collection.labels):
        raise UsageError(f"{path}: no image", f"pictures are files such as {', '.join(sorted(SUFFIXES)[:5])}")
    labels, names, order = _classes(collection, classes, partial=partial)
    chosen = np.arange(len(labels))
    if limit is not None and limit < len(labels):
        chosen = stratified(labels, limit, seed)
    source = ImageSet(
        path=os.fspath(path),
        kind=collection.kind,
        used=os.fspath(collection.used),
        count=len(chosen),
        available=len(labels),
        classes=names,
        order=order,
        seed=seed if len(chosen) < len(labels) else None,
    )
    return LabelledImages(collection.load(chosen, fit), labels[chosen], source)


def labelled(
    images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], classes: Sequence[str] | None = None
) -> LabelledImages:
    """Images in memory, uint8 (N, H, W, C) or (N, H, W), with labels (N,) and the names of the classes.

    Raises:
        UsageError: They are of another kind or shape, there are none, or a label is beyond the classes.
    """
    collection = of_arrays("arrays", Path("memory"), images, labels)
    if not len(collection.labels):
        raise UsageError("there are no images in memory")
    numbers, names, order = _classes(collection, classes, partial=False)
    pixels = collection.load(np.arange(len(numbers)), Fit(None, images.shape[3] if images.ndim == 4 else 1))
    source = ImageSet("", collection.kind, "in memory", len(numbers), len(numbers), names, order, None)
    return LabelledImages(pixels, numbers, source)


def some_of(images: LabelledImages, limit: int | None, seed: int) -> LabelledImages:
    """``limit`` of the images as `read_images` draws them; all for None."""
    if limit is None or limit >= len(images.labels):
        return images
    chosen = stratified(images.labels, limit, seed)
    source = replace(images.source, count=len(chosen), seed=seed)
    return LabelledImages(images.images[chosen], images.labels[chosen], source)


def find_collection(path: Path) -> Collection:
    """What lies at ``path``; no picture is read yet. Raises UsageError where it is nothing known."""
    if path.is_file():
        if path.suffix.lower() == ".npz":
            return read_npz(path)
        raise UsageError(f"{path} is no folder and no .npz", "give a folder of images, an .npz or a data set's folder")
    if not path.is_dir():
        what = "is neither a file nor a folder" if path.exists() else "is not there"
        raise UsageError(f"{path} {what}", "give a folder of images, an .npz or a data set's folder")
    if all((path / name).is_file() for name in FILES):
        return read_npy(path)
    return read_torchvision(path) or _read_folder(path)


def stratified(labels: npt.NDArray[np.int64], limit: int, seed: int) -> npt.NDArray[np.intp]:
    """``limit`` indices, drawn at random, ascending; each class keeps its share as nearly as whole images allow."""
    if limit < 1:
        raise UsageError(f"the limit is {limit}", "take one image at least")
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(labels))
    # Image r of the n of its class stands at (r + ½)/n of the way: the first of all that are spread evenly.
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        place[members] = (np.arange(len(members)) + generator.random()) / len(members)
    return np.sort(np.argsort(place, kind="stable")[:limit])


def _read_folder(path: Path) -> Collection:
    """A folder of pictures for each class."""
    root = next((path / split for split in SPLITS if _folders(path / split)), path)
    names = _folders(root)
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = sorted(pictures(root / name))
        files += found
        labels += [label] * len(found)
    if not files:
        raise UsageError(
            f"{path} holds no images of known classes",
            "it must hold a folder for each class with its pictures, in 'test' or 'val' within it where there is one",
        )
    return Collection(
        IMAGE_FOLDER,
        root,
        np.array(labels, np.int64),
        names,
        None,
        None,
        lambda chosen, fit: read_pictures([files[number] for number in chosen], fit),
    )


def pictures(folder: Path) -> Iterator[Path]:
    """The files below ``folder`` that are read as pictures; links to folders are not followed."""
    pending = [folder]
    try:
        while pending:  # no recursion: folders within folders may be deeper than it
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    path = Path(entry.path)
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(path)
                    elif path.suffix.lower() in SUFFIXES and entry.is_file():
                        yield path
    except OSError as error:
        raise UsageError(f"{error.filename or folder}: {error.strerror}", "take it out of the folder") from error


def _folders(path: Path) -> tuple[str, ...]:
    """The folders within ``path``: numbers in their order, else by name."""
    try:
        names = [entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith((".", "__"))]
    except OSError:
        return ()
    numbers = all(name.isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numbers else 0, name)))


def _classes(
    collection: Collection, classes: Sequence[str] | int | None, *, partial: bool
) -> tuple[npt.NDArray[np.int64], tuple[str, ...], str]:
    """The labels as positions among the classes, the classes' names, and by what they were matched."""
    labels, names = collection.labels, collection.names
    if partial and names is not None and classes is not None:
        some = _some(names, classes)
        if some is not None:
            return some[labels], tuple(classes) if not isinstance(classes, int) else names, "names"
    largest = int(labels.max())
    wanted = classes if isinstance(classes, int) else None if classes is None else len(classes)
    if names is not None and largest >= len(names):
        raise UsageError(f"{collection.used}: a label is {largest}, and there are {len(names)} names of classes")
    if wanted is not None and (len(names) != wanted if names is not None else largest >= wanted):
        have = f"has {len(names)} classes" if names is not None else f"has a label {largest}"
        raise UsageError(
            f"{collection.used} {have}, the model tells {wanted} apart",
            "give the images of the classes that the model was trained on",
        )
    if classes is None or isinstance(classes, int):
        count = wanted or largest + 1
        return labels, names or tuple(map(str, range(count))), "order" if names else "numbers"
    if names is None:
        return labels, tuple(classes), "numbers"
    if set(names) == set(classes) and len(set(names)) == len(classes):
        positions = {name: position for position, name in enumerate(classes)}
        return np.array([positions[name] for name in names], np.int64)[labels], tuple(classes), "names"
    return labels, tuple(classes), "order"


def _some(names: Sequence[str], classes: Sequence[str] | int) -> npt.NDArray[np.int64] | None:
    """The positions of ``names`` among the classes, by name or else by number; None where one is none of them."""
    if not isinstance(classes, int) and set(names) <= set(classes):
        return np.array([list(classes).index(name) for name in names], np.int64)
    count = classes if isinstance(classes, int) else len(classes)
    if all(name.isdecimal() and len(name) < 10 and int(name) < count for name in names):
        return np.array([int(name) for name in names], np.int64)
    return None
