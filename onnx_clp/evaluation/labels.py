"""Whether images have labels that nobody has to be asked about."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from onnx_clp.errors import UsageError
from onnx_clp.evaluation.images import IMAGE_FOLDER, LabelledImages, find_collection


def label_count(images: str | os.PathLike[str] | npt.NDArray[np.uint8] | LabelledImages) -> int:
    """How many labels lie with ``images``; 0 where there are none.

    Those of arrays and of known data sets count. A folder of pictures has none here: that its subfolders are the
    classes of the model is for the user to say.
    """
    if isinstance(images, LabelledImages):
        return len(images.labels)
    if isinstance(images, np.ndarray):
        return 0
    try:
        collection = find_collection(Path(images))
    except UsageError:
        return 0
    return 0 if collection.kind == IMAGE_FOLDER else len(collection.labels)
