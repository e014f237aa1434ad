"""Model and images → scores: pre-activations through onnxruntime, batch after batch.

EP takes the suspected training images, triggered ones among them; BNP takes clean images, 500 as published. What is in
memory is the values of one batch and, for EP, one number a channel and image; two where both ends are read. A network
of 5,000 channels takes 20 MB for a thousand images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_clp.analysis import Analysis
from onnx_clp.errors import ModelFileError, UsageError
from onnx_clp.evaluation.attack import Preprocessing
from onnx_clp.evaluation.changes import Watched, fitting, probe
from onnx_clp.evaluation.classifier import check_input, default_batch
from onnx_clp.evaluation.preprocess import transform
from onnx_clp.evaluation.running import stream
from onnx_clp.evaluation.session import open_session
from onnx_clp.evaluation.triggers import Images
from onnx_clp.preactivation.divergence import Moments, divergences, merged, moments
from onnx_clp.preactivation.entropy import entropies
from onnx_clp.preactivation.places import Place, find_places
from onnx_clp.preactivation.scores import Method, Reads, Scores, SiteScores, Unread

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]
"""Told how many images have been run, and how many there are."""


@dataclass(frozen=True, slots=True)
class Running:
    """How a model is run.

    Attributes:
        preprocessing: How it takes its images.
        providers: As for `open_session`.
        batch_size: Images that are run at once; None for what suits the provider and fits into memory.
        progress: Told how far it is.
    """

    preprocessing: Preprocessing
    providers: Sequence[str] | None = None
    batch_size: int | None = None
    progress: Progress | None = None


def ep_scores(analysis: Analysis, images: Images, running: Running) -> Scores:
    """The entropy of every channel's pre-activations: EP.

    Args:
        analysis: Of the model, its file still open.
        images: The suspected training images, triggered ones among them, uint8 (N, H, W, C) of the size of the input;
            500 at least, since no entropy exceeds ln N. On clean ones EP chooses channels too, and others.
        running: How the model is run.

    Raises:
        ModelFileError: onnxruntime does not load or run the model, or it was changed since it was scanned.
        UsageError: There are no images, they do not fit, or the model takes none; a provider does not load.
    """
    places, unread = find_places(analysis, Method.EP)
    read, unfit = _opened(analysis, places, images, running)
    kept = [_Ends(place, len(images)) for place in read.places]
    for first, values in read.batches():
        for each, value in zip(kept, values, strict=True):
            each.take(first, value)
    return Scores(Method.EP, len(images), tuple(each.scores() for each in kept), (*unread, *unfit))


def bnp_scores(analysis: Analysis, images: Images, running: Running) -> Scores:
    """The divergence of every channel's pre-activations on clean images from the running statistics: BNP.

    Arguments and errors as of `ep_scores`, but that ``images`` are clean ones: 500 as published. A convolution into
    which its BatchNormalization is folded has no running statistics left and is not read.
    """
    places, unread = find_places(analysis, Method.BNP)
    read, unfit = _opened(analysis, places, images, running)
    kept: list[Moments | None] = [None] * len(read.places)
    for _, values in read.batches():
        for i, value in enumerate(values):
            before, found = kept[i], moments(value)
            kept[i] = found if before is None else merged(before, found)
    sites = tuple(_divergent(place, found) for place, found in zip(read.places, kept, strict=True) if found is not None)
    return Scores(Method.BNP, len(images), sites, (*unread, *unfit))


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """Places that fit, and the batches of their values."""

    places: tuple[Place, ...]
    batches: Callable[[], Iterator[tuple[int, list[Array]]]]


def _opened(
    analysis: Analysis, places: Sequence[Place], images: Images, running: Running
) -> tuple[_Read, tuple[Unread, ...]]:
    """Load the model with the values of ``places`` as outputs; those without a row an image are told apart.

    The batches are (number of the first image, values (images, channels, positions) of every place).
    """
    if not len(images):
        raise UsageError("there are no images to read pre-activations on", "give images")
    if not places:
        return _Read((), lambda: iter(())), ()
    path, source = analysis.file.path, analysis.file.source
    declared = {analysis.graph.name_of(value) for value in analysis.graph.outputs}
    names = list(dict.fromkeys(place.watched.value for place in places))
    session = open_session(path, running.providers, [name for name in names if name not in declared])
    if not source.unchanged() or not source.is_at(path):
        raise ModelFileError(f"{path} was changed or replaced since it was scanned", "run again")
    check_input(session, running.preprocessing)
    make = transform(running.preprocessing, session.dtype)
    seen = probe(session, make, [place.watched for place in places], images)
    size = running.batch_size or fitting(default_batch(session, running.preprocessing), seen)
    reasons = {id(watched): reason for watched, reason in seen.unfit}
    fit = tuple(place for place in places if id(place.watched) not in reasons)
    wanted = list(dict.fromkeys(place.watched.value for place in fit))

    def batches() -> Iterator[tuple[int, list[Array]]]:
        done = 0
        for outputs in stream(session, make, images, size, wanted) if wanted else ():
            found = dict(zip(wanted, outputs, strict=True))
            yield done, [_flat(found[place.watched.value], place.watched) for place in fit]
            done += len(outputs[0])
            if running.progress is not None:
                running.progress(done, len(images))

    return _Read(fit, batches), tuple(Unread(watched.layer.name, reason) for watched, reason in seen.unfit)


def _flat(value: Array, watched: Watched) -> Array:
    """A value as (images, channels, positions)."""
    return np.moveaxis(value, watched.axis, 1).reshape(len(value), watched.layer.channels, -1)


class _Ends:
    """The largest value of each channel on each image; where γ is not known the smallest too, and the mean."""

    def __init__(self, place: Place, images: int) -> None:
        self.place = place
        self.shape = (images, place.watched.layer.channels)
        self.largest: Array | None = None
        self.smallest: Array | None = None
        self.total = np.zeros(self.shape[1])
        self.count = 0

    def take(self, first: int, values: Array) -> None:
        """Take the values (images, channels, positions) of the images from number ``first`` on."""
        if self.largest is None:
            self.largest = np.empty(self.shape, np.result_type(values.dtype, np.float32))
        rows = slice(first, first + len(values))
        with np.errstate(all="ignore"):  # Inf and NaN are told by what comes out
            self.largest[rows] = values.max(axis=2)
            if self.place.reads is Reads.OUTPUT:
                if self.smallest is None:
                    self.smallest = np.empty_like(self.largest)
                self.smallest[rows] = values.min(axis=2)
                self.total += values.sum(axis=(0, 2), dtype=np.float64)
                self.count += len(values) * values.shape[2]

    def scores(self) -> SiteScores:
        """What came of all images."""
        assert self.largest is not None
        normalisation = self.place.normalisation
        rests = self.total / max(1, self.count) if normalisation is None else normalisation.beta
        mirrored = () if self.smallest is None else tuple(entropies(self.smallest).tolist())
        return _scored(self.place, entropies(self.largest), rests, mirrored)


def _divergent(place: Place, found: Moments) -> SiteScores:
    normalisation = place.normalisation
    assert normalisation is not None
    scores = divergences(found, normalisation.running_mean, normalisation.running_variance)
    return _scored(place, scores, normalisation.beta)


def _scored(
    place: Place,
    scores: npt.NDArray[np.float64],
    rests: npt.NDArray[np.float64],
    mirrored: tuple[float, ...] = (),
) -> SiteScores:
    layer = place.watched.layer
    return SiteScores(
        name=layer.name,
        kind=layer.kind,
        value=place.watched.value,
        reads=place.reads,
        scores=tuple(scores.tolist()),
        rests=tuple(rests.tolist()),
        mirrored=mirrored,
        position=place.position,
    )
