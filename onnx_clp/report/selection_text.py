"""What EP or BNP read and chose, as a person reads it in a terminal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final

from onnx_clp.report.correction_text import images_words
from onnx_clp.report.words import cell, columns, count, listed, number, padded, printable, shortened

if TYPE_CHECKING:
    from onnx_clp.preactivation.scores import SiteChoice
    from onnx_clp.preactivation.selection import Selection
    from onnx_clp.sanitizer import Silenced

Style = Callable[[str, str], str]

NAMES_SHOWN: Final = 3
CHANNELS_SHOWN: Final = 5
NAME_WIDTH: Final = 48

_WORDS: Final = {
    "ep": ("entropy of pre-activations on the suspected images", "entropy", "below mean − {u:g}·std"),
    "bnp": ("divergence of pre-activations on clean images from the running ones", "KL", "above mean + {u:g}·std"),
}
"""By method: what it compares, the name of the number, what stands out."""

_VERDICTS: Final = {
    "too-few-channels": "too few channels to judge",
    "zero-spread": "all scores equal",
    "no-scores": "no channel has a score",
}


def selection_lines(selection: Selection, style: Style, beside: Iterable[str], *, verbose: bool) -> Iterator[str]:
    """The lines of one selection; ``beside`` are those of what no method judges."""
    choice = selection.choice
    what, _, rule = _WORDS[choice.method.value]
    yield f"  method    {choice.method.value}: {what}"
    yield f"  read on   {images_words(selection.images)}"
    for warning in selection.warnings:
        yield f"  {style('note', 'warn')}      {printable(warning, 400)}"
    yield f"  coverage  {_coverage(selection, style)}"
    yield from _unread(selection, style, verbose=verbose)
    yield from beside
    for verdict, words in _VERDICTS.items():
        sites = [site for site in choice.sites if site.verdict.value == verdict]
        if sites:
            names = listed((printable(site.name, 40) for site in sites), len(sites) if verbose else NAMES_SHOWN)
            mark = "good" if sites[0].judged else "warn"
            yield f"            {style(f'{words}:', mark)} {count(len(sites), 'layer')} ({names})"
    yield f"  chosen    {_chosen(selection, rule.format(u=choice.u), style)}"
    mirrored = [site for site in choice.sites if site.mirrored]
    if mirrored:
        channels = count(sum(len(site.mirrored) for site in mirrored), "channel")
        names = listed((f"{printable(site.name, 40)}: {_few(site.mirrored)}" for site in mirrored), NAMES_SHOWN)
        words = f"{channels} more would be, if the γ that is folded into them was negative; not silenced"
        yield f"            {style(words, 'warn')} ({names})"
    unscored = sum(len(site.unscored) for site in choice.sites)
    if unscored:
        yield f"            {count(unscored, 'channel')} without a score: constant on these images, or not finite"
    shown = [(site, k) for k, site in enumerate(choice.sites) if verbose or site.channels]
    if shown:
        yield ""
        yield from _table(selection, shown, style, verbose=verbose)


def rest_lines(silenced: tuple[Silenced, ...], style: Style, *, keep_bias: bool) -> Iterator[str]:
    """Where silenced channels rest, if their bias was to be kept."""
    if not keep_bias or not silenced:
        return
    parts = []
    for rest, words in (("bias", "at the bias of their BN"), ("mean", "at the mean of their output"), ("zero", "at 0")):
        amount = sum(len(part.channels) for part in silenced if part.rest == rest)
        parts += [f"{count(amount, 'channel')} {words}"] if amount else []
    yield f"  rest      {', '.join(parts)}"
    reasons: dict[str, list[str]] = defaultdict(list)
    for part in silenced:
        if part.why:
            reasons[part.why].append(printable(part.layer, 40))
    for reason, layers in reasons.items():
        yield f"            {style('at 0', 'warn')} in {listed(layers, NAMES_SHOWN)}: {printable(reason, 300)}"


def _coverage(selection: Selection, style: Style) -> str:
    choice = selection.choice
    judged = [k for k, site in enumerate(choice.sites) if site.judged]
    layers = len(choice.sites) + len(choice.unread)
    if not layers:
        return style("nothing to analyse: no convolution and no BatchNormalization", "bad")
    channels = sum(selection.scores.sites[k].channels for k in judged)
    complete = len(judged) == layers
    text = f"{len(judged)} of {count(layers, 'layer')} judged, {count(channels, 'channel')}"
    return style(text, "good" if complete else "warn" if judged else "bad")


def _unread(selection: Selection, style: Style, *, verbose: bool) -> Iterator[str]:
    """The layers that could not be read, by reason: not analysed is not clean."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for part in selection.choice.unread:
        reasons[part.reason].append(printable(part.name, 40))
    for reason, layers in reasons.items():
        names = listed(layers, len(layers) if verbose else NAMES_SHOWN)
        mark = style("not read:", "warn")
        yield f"            {mark} {count(len(layers), 'layer')} ({names}): {printable(reason, 300)}"


def _chosen(selection: Selection, rule: str, style: Style) -> str:
    if not selection.analysed:
        return style("nothing could be judged, which is not the same as clean", "bad")
    layers = sum(bool(site.channels) for site in selection.choice.sites)
    if not layers:
        return style(f"no channel {rule} of the layer", "good")
    channels = count(selection.choice.chosen, "channel")
    return style(f"{channels} in {count(layers, 'layer')} {rule} of the layer", "bad")


def _table(selection: Selection, shown: list[tuple[SiteChoice, int]], style: Style, *, verbose: bool) -> Iterator[str]:
    """One row a layer, its chosen channels one below the other in the last column."""
    measure = _WORDS[selection.choice.method.value][1]
    names = [cell(printable(site.name)) if verbose else shortened(site.name, NAME_WIDTH) for site, _ in shown]
    kinds = [selection.scores.sites[k].kind.replace("BatchNormalization", "BN") for _, k in shown]
    wide, kind_wide = max(map(columns, [*names, "layer"])), max(map(len, [*kinds, "kind"]))
    titles = f"{'channels':>8}  {'mean':>9}  {'std':>9}  {'threshold':>9}  chosen"
    yield style(f"  {'layer':<{wide}}  {'kind':<{kind_wide}}  {titles}", "dim")
    for (site, k), name, kind in zip(shown, names, kinds, strict=True):
        scores = selection.scores.sites[k].scores
        numbers = f"{number(site.mean):>9}  {number(site.std):>9}  {number(site.threshold):>9}"
        row = f"  {padded(name, wide)}  {kind:<{kind_wide}}  {len(scores):>8,}  {numbers}  "
        indent = " " * columns(row)
        for line in _channels(site, scores, measure, style, verbose=verbose):
            yield row + line
            row = indent


def _channels(site: SiteChoice, scores: tuple[float, ...], measure: str, style: Style, *, verbose: bool) -> list[str]:
    """A line for each chosen channel, largest z first."""
    ordered = sorted(zip(site.channels, site.z, strict=True), key=lambda pair: (-pair[1], pair[0]))
    shown = ordered if verbose else ordered[:CHANNELS_SHOWN]
    lines = [style(f"{k:>5}", "bad") + f"  {f'{measure} {number(scores[k])}':<15}  z {z:.2f}" for k, z in shown]
    if len(shown) < len(ordered):
        lines.append(style(f"      and {len(ordered) - len(shown)} more (-v shows them)", "dim"))
    return lines or [style(_VERDICTS.get(site.verdict.value, "none"), "dim")]


def _few(channels: tuple[int, ...]) -> str:
    return f"channel {listed(map(str, channels), CHANNELS_SHOWN)}"
