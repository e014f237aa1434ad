"""What a user says of the images → those that are taken, 8-bit and of one size; with labels where a budget needs them.

They are parted into those that are corrected by and those that a budget is judged on.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from onnx_clp.correction.request import ADVISED_IMAGES, LEAST_IMAGES, MOST_IMAGES, ImageRequest
from onnx_clp.errors import UsageError
from onnx_clp.evaluation.attack import Attack, Preprocessing
from onnx_clp.evaluation.byhand import Overrides, preprocessing_for
from onnx_clp.evaluation.classifier import check_input, class_output, column_count
from onnx_clp.evaluation.figures import ImagesUsed
from onnx_clp.evaluation.images import LabelledImages, stratified
from onnx_clp.evaluation.pictures import Fit
from onnx_clp.evaluation.prepared import open_attack
from onnx_clp.evaluation.session import Session
from onnx_clp.evaluation.setting import clean_images
from onnx_clp.evaluation.triggers import Images
from onnx_clp.evaluation.unlabelled import find_unlabelled, in_memory, read_unlabelled


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """Images for one model.

    Attributes:
        images: uint8 (N, H, W, C).
        labels: int64 (N,); None where nobody needs them.
        classes: How many classes the labels are of; None likewise.
        used: Where they come from.
        preprocessing: How the model takes them.
    """

    images: Images
    labels: npt.NDArray[np.int64] | None
    classes: int | None
    used: ImagesUsed
    preprocessing: Preprocessing


def draw(session: Session, request: ImageRequest) -> Drawn:
    """Read the images. Raises UsageError where they, or what is said of them, cannot be."""
    said = Overrides(request.size, request.mean, request.std, request.layout, request.value_range, request.resize)
    attack = request.attack
    if attack is not None and not isinstance(attack, Attack):
        attack = open_attack(Path(attack), request.providers)
    if request.budget.max_accuracy_drop is not None:
        return _labelled(session, request, attack, said)
    given, images = None if attack is None else attack.preprocessing, request.images
    if isinstance(images, LabelledImages):
        images = images.images
    if isinstance(images, np.ndarray):
        name, collection = "", in_memory(images)
    else:
        assert images is not None
        name = os.fspath(images)
        collection = find_unlabelled(Path(name))
    preprocessing = preprocessing_for(session, given, said, collection.channels, collection.size)
    check_input(session, preprocessing)
    fit = Fit(preprocessing.size, preprocessing.channels, preprocessing.resize)
    pixels, used = read_unlabelled(name, collection, fit, request.num_images or MOST_IMAGES, request.seed)
    return Drawn(pixels, None, None, used, preprocessing)


def _labelled(session: Session, request: ImageRequest, attack: Attack | None, said: Overrides) -> Drawn:
    """The images with their labels, as `evaluate` reads them."""
    images = request.images
    if isinstance(images, np.ndarray):
        hint = "give those of onnx_clp.evaluation.images.labelled, or a path that evaluate reads"
        raise UsageError("an accuracy needs labels, and the images in memory have none", hint)
    assert images is not None
    columns = column_count(class_output(session, request.output_name))
    place = images if isinstance(images, LabelledImages) else Path(images)
    found, preprocessing = clean_images(
        session, place, attack, said, columns, request.num_images or MOST_IMAGES, request.seed
    )
    source = found.source
    used = ImagesUsed(source.path, source.kind, source.used, source.count, source.available, source.seed)
    return Drawn(found.images, found.labels, len(source.classes), used, preprocessing)


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """Which images are corrected by, and which are judged by.

    Attributes:
        correcting: Their positions, ascending.
        held_out: Likewise; none without a budget.
    """

    correcting: npt.NDArray[np.intp]
    held_out: npt.NDArray[np.intp]


def parted(drawn: Drawn, share: float, seed: int, batch: int = 1) -> Parts:
    """Hold ``share`` of the images out, drawn at random; each class keeps its share, where the labels are known.

    Both parts are multiples of ``batch``, which the model takes at once; images that are left over are not used.

    Raises:
        UsageError: There are too few for that.
    """
    count = len(drawn.images)
    groups = count // batch
    wanted = min(max(1, round(share * groups)), groups - 1) if share else 0
    if groups < 1 or (share and wanted < 1):
        parts = "to correct by, and others to judge by" if share else "to correct by"
        raise UsageError(f"{batch} images at once are needed {parts}, and there are {count}", "give more images")
    labels = np.zeros(count, np.int64) if drawn.labels is None else drawn.labels
    held_out = stratified(labels, wanted * batch, seed) if wanted else np.empty(0, np.intp)
    rest = np.setdiff1d(np.arange(count), held_out)
    correcting = rest[: len(rest) // batch * batch]
    if len(correcting) < LEAST_IMAGES:
        held = f", of which {len(held_out)} would be held out" if share else ""
        images = "image" if count == 1 else "images"
        raise UsageError(
            f"{drawn.used.path or 'memory'} holds {count} {images}{held}", f"give {ADVISED_IMAGES} or more"
        )
    return Parts(correcting, held_out)
