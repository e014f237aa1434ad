"""What a user says of the images → the model's session, how it takes images, and these images in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, overload

import numpy as np
import numpy.typing as npt
import onnx

from onnx_clp.correction.cuts import Runner, Variant
from onnx_clp.correction.drawn import Drawn, draw, parted
from onnx_clp.correction.moments import Array
from onnx_clp.correction.request import ADVISED_IMAGES, ImageRequest
from onnx_clp.correction.stages import Pieces
from onnx_clp.correction.stream import Batches
from onnx_clp.errors import ModelFileError, UsageError
from onnx_clp.evaluation.attack import Preprocessing
from onnx_clp.evaluation.classifier import default_batch
from onnx_clp.evaluation.figures import ImagesUsed
from onnx_clp.evaluation.preprocess import Transform, transform
from onnx_clp.evaluation.providers import full_names, load, onnxruntime
from onnx_clp.evaluation.session import Session, open_session
from onnx_clp.evaluation.triggers import Images

_LARGEST: Final = 1 << 31
"""Protobuf reads no message of 2 GiB or more."""


@dataclass(frozen=True, slots=True, eq=False)
class ImageSource:
    """Images for one model.

    Attributes:
        session: The model.
        preprocessing: How it takes the images.
        images: Those that are measured, uint8 (N, H, W, C), without copies.
        used: Where those come from that are measured.
        batches: The model's input: these, their copies, and behind them those that are held out.
        count: How many images the batches hold.
        judged: Where those are that answers are compared on: those held out, else those measured, without copies.
        labels: Of these, int64 (n,); None where nobody needs them.
        classes: How many classes the labels are of; None likewise.
        warnings: What the user should know of them.
    """

    session: Session
    preprocessing: Preprocessing
    images: Images
    used: ImagesUsed
    batches: Batches
    count: int
    judged: slice
    labels: npt.NDArray[np.int64] | None
    classes: int | None
    warnings: tuple[str, ...]


class InputBatches(Sequence[Array]):
    """Images as batches of a model's input, each made when it is asked for; no batch holds images of two ``parts``."""

    def __init__(self, parts: Sequence[Images], to_input: Transform, size: int) -> None:
        self._pieces = [part[start : start + size] for part in parts for start in range(0, len(part), size)]
        self._transform = to_input

    def __len__(self) -> int:
        return len(self._pieces)

    @overload
    def __getitem__(self, number: int) -> Array: ...
    @overload
    def __getitem__(self, number: slice) -> list[Array]: ...
    def __getitem__(self, number: int | slice) -> Array | list[Array]:
        """Batch ``number``; the last of a part may be smaller."""
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        part = self._pieces[number]
        batch = self._transform.empty(len(part))
        self._transform.fill(part, batch)
        return batch


def read_source(model: Path, request: ImageRequest) -> ImageSource:
    """Load the model and read the images.

    Raises:
        ModelFileError: onnxruntime does not load the model.
        UsageError: The images, or what is said of them, cannot be.
    """
    session = open_session(model, request.providers)
    drawn = draw(session, request)
    size = _size(session, drawn, request)
    parts = parted(drawn, request.budget.share, request.seed, session.fixed_batch or 1)
    count, held_out = len(parts.correcting), drawn.images[parts.held_out]
    measured = with_copies(drawn.images[parts.correcting], request.copies, request.seed)
    to_input = transform(drawn.preprocessing, session.dtype)
    arrays = InputBatches((measured, held_out), to_input, size)
    counted = -(-len(measured) // size)
    probe = arrays[0] if session.fixed_batch else InputBatches([measured[:1]], to_input, 1)[0]
    return ImageSource(
        session=session,
        preprocessing=drawn.preprocessing,
        images=drawn.images[parts.correcting],
        used=replace(drawn.used, count=count),
        batches=Batches(arrays, counted, probe),
        count=len(measured) + len(held_out),
        judged=slice(len(measured), None) if len(held_out) else slice(count),
        labels=None if drawn.labels is None else drawn.labels[parts.held_out],
        classes=drawn.classes,
        warnings=tuple(_warnings(session, count, len(held_out))),
    )


def with_copies(images: Images, copies: int, seed: int) -> Images:
    """``images`` and behind them so many copies of all of them, each shifted and every other one mirrored, at random.

    A copy is shifted by up to `SHIFT` of its height and width, and what comes in at an edge repeats that edge.
    """
    if not copies:
        return images
    random = np.random.default_rng(seed)
    _, height, width, _ = images.shape
    most = (round(SHIFT * height), round(SHIFT * width))
    padded = np.pad(images, ((0, 0), (most[0],) * 2, (most[1],) * 2, (0, 0)), "edge")
    found = [images]
    for _ in range(copies):
        copy = np.empty_like(images)
        for number, image in enumerate(padded):
            top, left = (int(random.integers(0, 2 * each + 1)) for each in most)
            part = image[top : top + height, left : left + width]
            copy[number] = part[:, ::-1] if random.random() < 0.5 else part  # of two, one
        found.append(copy)
    return np.concatenate(found)


SHIFT: Final = 0.1
"""The share of its height and width by which a copy of an image is shifted at most: 3 pixels of 32."""


def open_variant(path: Path, providers: Sequence[str] | None) -> Variant:
    """The model at ``path`` as one that can be cut, and what loads its stages.

    Raises:
        ModelFileError: It is too large, or cannot be read.
        UsageError: onnxruntime is not installed; a provider is not in it.
    """
    ort = onnxruntime()
    wanted = None if providers is None else full_names(providers)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False  # one for each stage, none of which would give back what it took
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    if path.stat().st_size >= _LARGEST:
        raise ModelFileError(f"{path} is of 2 GiB or more: it cannot be cut into stages in memory")

    def open_stage(content: bytes) -> Runner:
        return load(ort, path, content, options, wanted)[0]

    return Variant(Pieces(onnx.ModelProto.FromString(path.read_bytes())), open_stage)


def _size(session: Session, drawn: Drawn, request: ImageRequest) -> int:
    """How many images a batch has. Raises UsageError where there are fewer than the model takes at once."""
    fixed = session.fixed_batch
    if fixed is None:
        return request.batch_size or default_batch(session, drawn.preprocessing)
    count = len(drawn.images)
    if fixed < 1 or count < fixed:
        raise UsageError(f"{session.path} takes {fixed} images at once, and there are {count}", "give more images")
    return fixed


def _warnings(session: Session, count: int, held_out: int) -> list[str]:
    found = [session.note] if session.note else []
    if count < ADVISED_IMAGES:
        found.append(f"only {count} images: what is measured on fewer than {ADVISED_IMAGES} is not to be relied on")
    if 0 < held_out < ADVISED_IMAGES:
        found.append(f"only {held_out} images are held out: a budget that is kept on so few says little")
    return found
