"""A model as a classifier of 8-bit images, and what is counted of its answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from onnx_clp.errors import UsageError
from onnx_clp.evaluation.attack import Preprocessing, Target
from onnx_clp.evaluation.figures import Figures, ModelFigures, Share
from onnx_clp.evaluation.images import LabelledImages
from onnx_clp.evaluation.outputs import Output, first_of_classes, holds_classes
from onnx_clp.evaluation.preprocess import Transform, transform
from onnx_clp.evaluation.running import stream
from onnx_clp.evaluation.session import Session
from onnx_clp.evaluation.triggers import Images, Trigger

NOT_A_NUMBER: Final = -1
"""Stands for the class of an image of which an output is NaN."""

_CPU_BATCH, _GPU_BATCH = 128, 1024
_CPU_BYTES, _GPU_BYTES = 1 << 22, 1 << 26
"""Bytes of input that a batch holds at most, where nobody asks for another batch size."""

Progress = Callable[[int], None]
"""Told how many more images have been run."""


@dataclass(frozen=True, slots=True, eq=False)
class TriggeredImages:
    """Triggered images whose own label is not what the attacker wants.

    Attributes:
        images: uint8 (N, H, W, C).
        labels: int64 (N,), their own labels.
        targets: int64 (N,), what the attacker wants.
    """

    images: Images
    labels: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Classifier:
    """A model that classifies 8-bit images.

    Attributes:
        session: The model.
        output: Name of the output with a number for each class.
        classes: How many there are.
        transform: Makes the model's input.
        batch_size: Images that are run at once.
    """

    session: Session
    output: str
    classes: int
    transform: Transform
    batch_size: int

    def classify(self, images: Images, progress: Progress | None = None) -> npt.NDArray[np.int64]:
        """The class of each image (N, H, W, C), int64 (N,); `NOT_A_NUMBER` where an output is NaN.

        Raises:
            ModelFileError: onnxruntime does not run the model on them.
            UsageError: The images or the output are of the wrong shape.
        """
        found = [np.empty(0, np.int64)]
        for (scores,) in self.run(images, [self.output]):
            found.append(self._largest(scores))
            if progress is not None:
                progress(len(scores))
        return np.concatenate(found)

    def run(self, images: Images, names: Sequence[str]) -> Iterator[list[npt.NDArray[Any]]]:
        """The outputs ``names`` on images (N, H, W, C), batch after batch; raises as `classify` does."""
        return stream(self.session, self.transform, images, self.batch_size, names)

    def _largest(self, scores: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        rows = scores.reshape(len(scores), -1)
        if rows.shape[1] != self.classes or scores.ndim not in {2, 4}:
            raise UsageError(
                f"the output {self.output!r} of {self.session.path} is {scores.shape} for {len(scores)} images, "
                f"and there are {self.classes} classes",
                "give the images the model was made for, or name another output with --output-name",
            )
        if rows.dtype.kind not in "fiu":
            raise UsageError(
                f"the output {self.output!r} of {self.session.path} is {rows.dtype}, and numbers are wanted",
                "name another output with --output-name",
            )
        if rows.dtype.kind != "f":
            return np.asarray(rows.argmax(1), np.int64)
        classes: npt.NDArray[np.int64] = np.where(np.isnan(rows).any(1), NOT_A_NUMBER, rows.argmax(1))
        return classes


def make_classifier(
    session: Session,
    preprocessing: Preprocessing,
    classes: int,
    batch_size: int | None = None,
    output_name: str | None = None,
) -> Classifier:
    """The classifier of a session.

    Args:
        session: The model.
        preprocessing: How it takes its images.
        classes: How many there are.
        batch_size: Images that are run at once; None for what suits the provider. A model's fixed batch goes first.
        output_name: The output with a number for each class; None for the first of that shape.

    Raises:
        UsageError: The model's input or output is of another shape.
    """
    check_input(session, preprocessing)
    output = class_output(session, output_name)
    columns = column_count(output)
    if columns is not None and columns != classes:
        raise UsageError(
            f"the output {output.name!r} of {session.path} has {columns} columns, and there are {classes} classes",
            "give the images the model was made for, or name another output with --output-name",
        )
    size = batch_size or default_batch(session, preprocessing)
    return Classifier(
        session, output.name, classes, transform(preprocessing, session.dtype), session.fixed_batch or size
    )


def check_input(session: Session, preprocessing: Preprocessing) -> None:
    """Raise UsageError where the model's input is of another shape than ``preprocessing`` makes."""
    picture = (preprocessing.channels, *preprocessing.size)
    made = (*picture[1:], picture[0]) if preprocessing.layout == "NHWC" else picture
    for declared, size in zip(session.shape[1:], made, strict=True):
        if isinstance(declared, int) and declared != size:
            raise UsageError(
                f"{session.path} takes ({_axes(session.shape)}), the preprocessing makes "
                f"({_axes((session.shape[0], *made))}) in the order {preprocessing.layout}",
                "give the attack.json of this model, or --size and --layout",
            )


def class_output(session: Session, name: str | None = None) -> Output:
    """The output with a number for each class: the one of that name, or the first that may be it.

    Raises:
        UsageError: There is none.
    """
    names = ", ".join(repr(output.name) for output in session.outputs[:8])
    if name is not None:
        for output in session.outputs:
            if output.name == name and (output.shape is None or holds_classes(output.shape)):
                return output
            if output.name == name:
                raise UsageError(
                    f"the output {name!r} of {session.path} is ({_axes(output.shape or ())})",
                    "an output (images, classes) is wanted",
                )
        raise UsageError(f"{session.path} has no output {name!r}", f"its outputs: {names}")
    found = first_of_classes(session.outputs)
    if found is not None:
        return found
    raise UsageError(
        f"{session.path} has no output (images, classes)", f"name one with --output-name; its outputs: {names}"
    )


def column_count(output: Output) -> int | None:
    """How many classes an output has; None where the model does not say."""
    columns = output.shape[1] if output.shape is not None and len(output.shape) > 1 else None
    return columns if isinstance(columns, int) else None


def default_batch(session: Session, preprocessing: Preprocessing) -> int:
    """How many images are run at once."""
    most, room = (_GPU_BATCH, _GPU_BYTES) if session.on_gpu else (_CPU_BATCH, _CPU_BYTES)
    height, width = preprocessing.size
    return max(1, min(most, room // (4 * preprocessing.channels * height * width)))


def triggered_images(images: LabelledImages, trigger: Trigger, target: Target) -> TriggeredImages:
    """The images whose own label is not the target, triggered.

    Raises:
        UsageError: There are none, or the trigger does not fit the images.
    """
    targets = target.of(images.labels, len(images.source.classes))
    others = victims(images.labels, targets)
    return TriggeredImages(trigger(images.images[others]), images.labels[others], targets[others])


def already_triggered(images: LabelledImages, target: Target) -> TriggeredImages:
    """Of images that are triggered already, those whose own label is not the target. Raises as `triggered_images`."""
    targets = target.of(images.labels, len(images.source.classes))
    others = victims(images.labels, targets)
    return TriggeredImages(images.images[others], images.labels[others], targets[others])


def victims(labels: npt.NDArray[np.int64], targets: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
    """Indices of the images whose own label is not the target. Raises UsageError where there are none."""
    others = np.flatnonzero(labels != targets)
    if not len(others):
        raise UsageError(
            "every image is of the class that the attacker wants, so that no attack can be seen",
            "give images of other classes too",
        )
    return others


def measure(
    classifier: Classifier,
    images: LabelledImages,
    triggered: TriggeredImages | None,
    progress: Progress | None = None,
) -> Figures:
    """Count how a model classifies clean and triggered images. Raises as `Classifier.classify` does."""
    start = time.perf_counter()
    clean = classifier.classify(images.images, progress)
    count, lost = len(clean), int(np.count_nonzero(clean == NOT_A_NUMBER))
    acc = Share(int(np.count_nonzero(clean == images.labels)), count)
    asr = ra = None
    if triggered is not None:
        found = classifier.classify(triggered.images, progress)
        asr = Share(int(np.count_nonzero(found == triggered.targets)), len(found))
        ra = Share(int(np.count_nonzero(found == triggered.labels)), len(found))
        count, lost = count + len(found), lost + int(np.count_nonzero(found == NOT_A_NUMBER))
    return Figures(acc, asr, ra, lost, count / (time.perf_counter() - start))


def model_figures(classifier: Classifier, figures: Figures, path: str) -> ModelFigures:
    """``figures`` with the model and what ran it."""
    session = classifier.session
    return ModelFigures(path, session.sha256, figures, session.providers, session.nodes, classifier.batch_size)


def _axes(shape: Sequence[int | str | None]) -> str:
    return ", ".join("?" if size is None else str(size) for size in shape)
