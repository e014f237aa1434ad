"""What a correction did, as a person reads it in a terminal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from onnx_clp.report.words import count, listed, printable

if TYPE_CHECKING:
    from onnx_clp.correction.request import Correction, Uncorrected
    from onnx_clp.evaluation.figures import ImagesUsed

NAMES_SHOWN: Final = 3


def correction_lines(
    correction: Correction, style: Callable[[str, str], str], *, held_out: bool = False
) -> Iterator[str]:
    """The lines of one correction; ``held_out`` says whether answers were compared on other images."""
    copies = f", and {correction.augment} shifted or mirrored copies of each" if correction.augment else ""
    yield f"  images    {images_words(correction.images)}{copies}"
    for warning in correction.warnings:
        yield f"  {style('note', 'warn')}      {printable(warning, 400)}"
    if correction.ridge is not None:
        yield f"  refitted  {_refitted(correction, style)}"
        yield from _left("not refitted", correction.kept, style)
    if correction.repair != "none":
        yield f"  corrected {_corrected(correction, style)}"
    if correction.biases:
        names = listed((printable(name, 40) for name in correction.biases), NAMES_SHOWN)
        yield f"  added     a bias to {count(len(correction.biases), 'convolution')} without one: {names}"
    yield from _left("not corrected", correction.left, style)
    if correction.agreement is not None:
        share = correction.agreement
        which = f"the {share.total:,} held out" if held_out else f"these {share.total:,} images"
        yield f"  answers   as before on {share.count:,} of {which} ({100 * share.value:.1f} %)"


def _left(what: str, parts: Sequence[Uncorrected], style: Callable[[str, str], str]) -> Iterator[str]:
    """A line for each reason for which layers are as they were."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for part in parts:
        reasons[part.reason].append(part.layer)
    for reason, layers in reasons.items():
        names = listed((printable(name, 40) for name in layers), NAMES_SHOWN)
        mark = style("as it is", "warn")
        yield f"  {mark}  {count(len(layers), 'layer')} {what} ({names}): {printable(reason, 300)}"


def _refitted(correction: Correction, style: Callable[[str, str], str]) -> str:
    """How many kernels are new, whatever was flagged, and how far they are from the old ones."""
    if not correction.refitted:
        return style("nothing: no kernel can be fitted", "warn")
    changes = [part.change for part in correction.refitted]
    kernels, share = count(len(changes), "kernel"), f"{min(changes):.0%} to {max(changes):.0%} of their norm"
    return style(
        f"{kernels}, flagged or not, by {share} (ridge {correction.ridge:g})",
        "good",
    )


def images_words(images: ImagesUsed) -> str:
    """Which images were used."""
    part = f"{images.count:,} of {images.available:,}" if images.seed is not None else f"{images.count:,}"
    drawn = f", drawn with seed {images.seed}" if images.seed is not None else ""
    return f"{part}{drawn} ({printable(images.kind)} {printable(images.used, 300)})"


def _corrected(correction: Correction, style: Callable[[str, str], str]) -> str:
    if not correction.corrected:
        return style("nothing: no later layer was shifted", "warn")
    smallest = min(part.smallest for part in correction.corrected)
    largest = max(part.largest for part in correction.corrected)
    channels, layers = count(correction.channels, "channel"), count(len(correction.corrected), "layer")
    clamped = f", {correction.clamped:,} of them clamped" if correction.clamped else ""
    return style(f"{channels} in {layers}, by factors of {smallest:.2f} to {largest:.2f}{clamped}", "good")
