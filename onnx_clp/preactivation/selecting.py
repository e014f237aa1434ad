"""Model, method and images → the channels that EP or BNP chooses, each with where it rests when its bias is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from onnx_clp.analysis import Analysis
from onnx_clp.correction.budget import NO_BUDGET
from onnx_clp.correction.request import ImageRequest
from onnx_clp.correction.source import ImageSource, read_source
from onnx_clp.preactivation.choice import choose
from onnx_clp.preactivation.reading import Running, bnp_scores, ep_scores
from onnx_clp.preactivation.scores import Method, Reads
from onnx_clp.preactivation.selection import ADVISED_CLEAN, ADVISED_SUSPECTED, MOST_SUSPECTED, Selection
from onnx_clp.rests import Floats


def selected(
    analysis: Analysis, method: Method, u: float, request: ImageRequest, clean: ImageSource | None
) -> Selection:
    """The channels that stand out by more than ``u`` standard deviations.

    Args:
        analysis: Of the model, its file open.
        method: EP reads the suspected images of ``request``, BNP the clean ones.
        u: As for `choose`.
        request: What the user says of the images.
        clean: The clean images, which were read already; BNP needs them.

    Raises:
        ModelFileError: onnxruntime does not load or run the model.
        UsageError: The images, or what is said of them, cannot be.
    """
    source = _suspected(analysis, request) if method is Method.EP else clean
    assert source is not None
    running = Running(source.preprocessing, request.providers, request.batch_size)
    scores = (ep_scores if method is Method.EP else bnp_scores)(analysis, source.images, running)
    note = [source.session.note] if source.session.note and clean is None else []  # else it is told with those
    warnings = (*note, *_warnings(method, source.used.count))
    return Selection(source.used, source.preprocessing, scores, choose(scores, u), warnings)


def at(selection: Selection, u: float) -> Selection:
    """``selection`` as it is at another ``u``; nothing is read again."""
    return selection if u == selection.choice.u else replace(selection, choice=choose(selection.scores, u))


def means(selection: Selection) -> Mapping[int, Floats]:
    """The mean of each channel's output on the images, float64 (channels,), where that was read; by position."""
    return {site.position: np.array(site.rests) for site in selection.scores.sites if site.reads is Reads.OUTPUT}


def _suspected(analysis: Analysis, request: ImageRequest) -> ImageSource:
    wanted = replace(
        request,
        images=request.suspected,
        num_images=request.num_suspected or MOST_SUSPECTED,
        repair="none",
        ridge=None,
        augment=None,
        budget=NO_BUDGET,
    )
    return read_source(analysis.file.path, wanted)


def _warnings(method: Method, count: int) -> list[str]:
    if method is Method.EP and count < ADVISED_SUSPECTED:
        return [f"only {count} suspected images: {ADVISED_SUSPECTED} or more are wanted, some of them triggered"]
    if method is Method.BNP and count < ADVISED_CLEAN:
        return [f"only {count} clean images: BNP is published with {ADVISED_CLEAN}"]
    return []
