"""The report that a person reads in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Final

from onnx_clp.defaults import ACTIVITY, DEFAULT_SCORE
from onnx_clp.report.budget_text import budget_lines
from onnx_clp.report.correction_text import correction_lines
from onnx_clp.report.selection_text import rest_lines, selection_lines
from onnx_clp.report.words import RULES, cell, columns, count, listed, number, padded, printable, shortened

if TYPE_CHECKING:
    from onnx_clp.analysis import Channel, Layer, ScanReport
    from onnx_clp.report.outcome import Outcome
    from onnx_clp.sanitizer import SanitizeReport

Style = Callable[[str, str], str]
"""Text and one of the styles ``head``, ``bad``, ``warn``, ``good``, ``dim`` → text, coloured where the terminal is."""

NAMES_SHOWN: Final = 3
CHANNELS_SHOWN: Final = 5
NAME_WIDTH: Final = 48
_EXPLAINED: Final = frozenset({"unreadable", "no-data", "limit"})
"""Reasons of which the first sentence helps most."""

_STATUS_WORDS: Final = {
    "too-few-channels": "too few channels to judge",
    "zero-spread": "all bounds equal",
    "dead": "no bound above 0",
}


def plain(text: str, _: str) -> str:
    """The style of a file or a pipe: none."""
    return text


def render(outcomes: Iterable[Outcome], style: Style = plain, *, verbose: bool = False) -> str:
    """The reports of a scan, one after the other. Files without a report are the command's to name, on stderr."""
    return "\n".join(
        "\n".join([style(printable(report.path, 1000), "head"), *scan_lines(report, style, verbose=verbose)]) + "\n"
        for report in (outcome.report for outcome in outcomes)
        if report is not None
    )


def scan_lines(report: ScanReport, style: Style, *, verbose: bool) -> Iterator[str]:
    """The lines of one scan, without the path."""
    yield f"  coverage  {_coverage(report, style)}"
    yield from _skipped(report, style, verbose=verbose)
    for status, words in _STATUS_WORDS.items():
        layers = [layer for layer in report.layers if layer.status == status]
        if layers:
            names = listed((printable(layer.name, 40) for layer in layers), len(layers) if verbose else NAMES_SHOWN)
            mark = "good" if layers[0].judged else "warn"
            yield f"            {style(f'{words}:', mark)} {count(len(layers), 'layer')} ({names})"
    yield from _score(report, style, verbose=verbose)
    yield f"  outliers  {_outliers(report, style)}"
    if report.non_finite_channels:
        hit = [layer for layer in report.layers if layer.non_finite]
        text = f"{count(report.non_finite_channels, 'channel')} in {count(len(hit), 'layer')}"
        names = listed((printable(layer.name, 40) for layer in hit), NAMES_SHOWN)
        yield f"  {style('NaN, Inf', 'bad')}  {text}: {names}"
    yield from _ambiguous(report, style, verbose=verbose)
    if report.dead_channels:
        where = count(sum(bool(layer.dead) for layer in report.layers), "layer")
        kept = "counted in" if report.count_dead else "left out of"
        rule, measure = RULES[report.threshold], "score" if report.score != DEFAULT_SCORE else "bound"
        text = f"{count(report.dead_channels, 'channel')} in {where} with {measure} 0"
        yield f"  dead      {text}, {kept} {rule.centre} and {rule.unit.removeprefix('1.4826·')}"
    overridable = sorted({name for layer in report.layers for name in layer.overridable})
    if overridable:
        shown = listed((printable(name, 40) for name in overridable), NAMES_SHOWN)
        weights = count(len(overridable), "weight")
        yield f"  inputs    {weights} can be overridden by a caller, judged by default: {shown}"
    shown_layers = [layer for layer in report.layers if verbose or layer.flagged or layer.non_finite]
    if shown_layers:
        yield ""
        yield from _table(shown_layers, style, RULES[report.threshold].titles, verbose=verbose)


def _skipped(report: ScanReport, style: Style, *, verbose: bool) -> Iterator[str]:
    for reason, parts in groupby(sorted(report.skipped, key=lambda part: part.reason), key=lambda part: part.reason):
        skipped = list(parts)
        if verbose:
            for part in skipped:
                head = f"skipped {printable(part.name)} ({printable(part.operator)}, {reason})"
                yield f"            {head}: {printable(part.detail, 300)}"
        else:
            names = listed((printable(part.name, 40) for part in skipped), NAMES_SHOWN)
            yield f"            {style(f'skipped {len(skipped)}', 'warn')} as {reason}: {names}"
            if reason in _EXPLAINED:
                yield f"              {printable(skipped[0].detail, 300)}"


def _ambiguous(report: ScanReport, style: Style, *, verbose: bool) -> Iterator[str]:
    """What two runtimes may read differently: the names of each kind, and of the first what was judged."""
    if report.ambiguities:
        text = f"{count(report.ambiguities, 'constant or name')} that another runtime may read differently"
        yield f"  {style('ambiguous', 'bad')} {text}"
    for kind, parts in groupby(sorted(report.ambiguous, key=lambda part: part.kind), key=lambda part: part.kind):
        found = list(parts)
        if verbose:
            for part in found:
                yield f"            {kind} {printable(part.name)}: {printable(part.detail, 300)}"
        else:
            names = listed((printable(part.name, 40) for part in found), NAMES_SHOWN)
            yield f"            {kind}: {names}: {printable(found[0].detail, 300)}"


def _coverage(report: ScanReport, style: Style) -> str:
    judged = [layer for layer in report.layers if layer.judged]
    parts = len(report.layers) + len(report.skipped)
    if not parts:
        return style("nothing to analyse: no convolution and no BatchNormalization", "bad")
    text = f"{len(judged)} of {count(parts, 'layer')} judged, {count(report.judged_channels, 'channel')}"
    return style(text, "good" if report.complete else "warn" if judged else "bad")


def _score(report: ScanReport, style: Style, *, verbose: bool) -> Iterator[str]:
    """What was judged instead of bounds, and where it could not be."""
    if report.score == DEFAULT_SCORE:
        return
    fallen = [layer for layer in report.layers if layer.fallback]
    activity = report.score == ACTIVITY
    words = "bound / std on clean images" if activity else "bound × outgoing norm"
    yield f"  score     {report.score}: {words}, of {count(len(report.layers) - len(fallen), 'layer')}"
    if fallen:
        preposition = "" if activity else "to "
        names = (f"{printable(layer.name, 40)} ({preposition}{printable(layer.fallback, 100)})" for layer in fallen)
        shown = listed(names, len(fallen) if verbose else NAMES_SHOWN)
        text = style(f"{count(len(fallen), 'layer')} judged by the bound:", "warn")
        reason = "they cannot be observed" if activity else "their channels go where no trace follows"
        yield f"            {text} {reason}: {shown}"


def _outliers(report: ScanReport, style: Style) -> str:
    rule = f"above {RULES[report.threshold].threshold(report.u)}"
    if not report.analysed:
        return style("nothing could be judged, which is not the same as clean", "bad")
    layers = sum(bool(layer.flagged) for layer in report.layers)
    if not layers:
        return style(f"no channel {rule}", "good")
    return style(f"{count(report.flagged_channels, 'channel')} in {count(layers, 'layer')} {rule}", "bad")


def _table(layers: list[Layer], style: Style, heads: tuple[str, str], *, verbose: bool) -> Iterator[str]:
    """One row a layer, its flagged channels one below the other in the last column."""
    names = [cell(printable(layer.name)) if verbose else shortened(layer.name, NAME_WIDTH) for layer in layers]
    kinds = [layer.kind.replace("BatchNormalization", "BN") for layer in layers]
    wide, kind_wide = max(map(columns, [*names, "layer"])), max(map(len, [*kinds, "kind"]))
    titles = f"{'channels':>8}  {heads[0]:>9}  {heads[1]:>9}  {'threshold':>9}  flagged"
    yield style(f"  {'layer':<{wide}}  {'kind':<{kind_wide}}  {titles}", "dim")
    for layer, name, kind in zip(layers, names, kinds, strict=True):
        numbers = f"{number(layer.mean):>9}  {number(layer.std):>9}  {number(layer.threshold):>9}"
        row = f"  {padded(name, wide)}  {kind:<{kind_wide}}  {layer.channels:>8,}  {numbers}  "
        indent = " " * columns(row)
        for line in _flagged(layer, style, verbose=verbose) or [style(_unflagged(layer), "dim")]:
            yield row + line
            row = indent


def _flagged(layer: Layer, style: Style, *, verbose: bool) -> list[str]:
    """A line for each flagged channel, largest z first, and one for those that are not finite."""
    shown = layer.flagged if verbose else layer.flagged[:CHANNELS_SHOWN]
    lines = [
        style(f"{channel.index:>5}", "bad") + f"  {_measure(layer, channel):<15}  z {channel.z:.2f}"
        for channel in shown
    ]
    if len(shown) < len(layer.flagged):
        lines.append(style(f"      and {len(layer.flagged) - len(shown)} more (-v shows them)", "dim"))
    if layer.non_finite:
        lines.append(style(f"  NaN or Inf in channel {listed(map(str, layer.non_finite), CHANNELS_SHOWN)}", "bad"))
    return lines


def _measure(layer: Layer, channel: Channel) -> str:
    """What a flagged channel was judged by."""
    return f"score {number(layer.scores[channel.index])}" if layer.scores else f"bound {number(channel.bound)}"


def _unflagged(layer: Layer) -> str:
    return _STATUS_WORDS.get(layer.status, "none")


def render_sanitize(report: SanitizeReport, style: Style = plain, *, verbose: bool = False) -> str:
    """The report of a rewrite."""
    return "\n".join(_sanitize(report, style, verbose=verbose)) + "\n"


def _sanitize(report: SanitizeReport, style: Style, *, verbose: bool) -> Iterator[str]:
    title = printable(report.source, 1000)
    title += f" → {printable(report.destination, 1000)}" if report.written else ", nothing written"
    yield style(title, "head")
    if report.auto:
        yield f"  auto      {report.auto}"
    if report.selection is None:
        yield from scan_lines(report.before, style, verbose=verbose)
    else:
        beside = [*_skipped(report.before, style, verbose=verbose), *_ambiguous(report.before, style, verbose=verbose)]
        yield from selection_lines(report.selection, style, beside, verbose=verbose)
    yield ""
    yield from rewrite_lines(report, style)


def rewrite_lines(report: SanitizeReport, style: Style) -> Iterator[str]:
    """The lines of one rewrite, without the paths and without the scan before it."""
    yield f"  silenced  {_silenced(report, style)}"
    yield from rest_lines(report.silenced, style, keep_bias=report.keep_bias)
    for left in report.left:
        channels = listed(map(str, left.channels), CHANNELS_SHOWN)
        name, reason = shortened(left.layer, NAME_WIDTH), printable(left.reason, 300)
        yield f"  {style('left', 'warn')}      {name}: channel {channels}: {reason}"
    if report.unshared:
        names = listed((printable(name, 40) for name in report.unshared), NAMES_SHOWN)
        yield f"  unshared  {count(len(report.unshared), 'tensor')} that fed something else too: {names}"
    if report.correction is not None:
        yield from correction_lines(report.correction, style, held_out=report.budget is not None)
    if report.budget is not None:
        yield from budget_lines(report.budget, style)
    for warning in report.warnings:
        yield f"  {style('note', 'warn')}      {printable(warning, 400)}"
    for check in report.checks:
        mark = style("passed  ", "good") if check.passed else style("not made", "warn")
        yield f"  {mark}  {check.name}: {printable(check.detail, 300)}"
    if report.written:
        yield f"  written   {listed((printable(name) for name in report.files), NAMES_SHOWN)}"
    if report.replaced_data:
        names = listed((printable(name) for name in report.replaced_data), NAMES_SHOWN)
        yield f"  kept      {names}: the data before; remove it if no other model uses it"


def _silenced(report: SanitizeReport, style: Style) -> str:
    if not report.silenced:
        return style("nothing" + (", the copy computes what the input does" if report.written else ""), "warn")
    channels = count(report.silenced_channels, "channel")
    layers = count(len(report.silenced), "layer")
    text = f"{channels} in {layers}" if report.written else f"would be {channels} in {layers}"
    return style(text, "good")
