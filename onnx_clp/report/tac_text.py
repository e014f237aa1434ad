"""The report of trigger-activated changes that a person reads in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from onnx_clp.report.evaluate_text import attack_words, image_words
from onnx_clp.report.text import NAME_WIDTH, NAMES_SHOWN, Style, plain
from onnx_clp.report.words import cell, columns, count, listed, number, padded, printable, shortened

if TYPE_CHECKING:
    from onnx_clp.evaluation.correlation import Correlation
    from onnx_clp.evaluation.tac import TacLayer, TacReport


def render_tac(report: TacReport, style: Style = plain, *, verbose: bool = False) -> str:
    """The report of trigger-activated changes."""
    return "\n".join(_lines(report, style, verbose=verbose)) + "\n"


def _lines(report: TacReport, style: Style, *, verbose: bool) -> Iterator[str]:
    yield style(printable(report.path, 1000), "head")
    yield f"  images    {image_words(report.images)}"
    yield f"  attack    {attack_words(report.attack, report.images.classes)}"
    providers = ", ".join(map(printable, report.providers))
    yield f"  provider  {providers}; onnxruntime {report.onnxruntime}"
    channels = sum(layer.channels for layer in report.layers)
    where = f"{count(channels, 'channel')} in {count(len(report.layers), 'layer')}"
    yield f"  changes   {count(report.pairs, 'image')} compared with themselves triggered, {where}"
    if not report.layers:
        yield f"            {style('nothing could be measured', 'bad')}"
    yield from _not_measured(report, style, verbose=verbose)
    yield f"  overall   {_words(report.raw)}, bounds and changes as they are ({count(report.raw.pairs, 'channel')})"
    pairs = count(report.standardised.pairs, "channel")
    yield f"            {_words(report.standardised)}, as z-scores of their layers ({pairs})"
    yield f"  flagged   {_flagged(report)}"
    if report.layers:
        yield ""
        yield from _table(report, style, verbose=verbose)


def _not_measured(report: TacReport, style: Style, *, verbose: bool) -> Iterator[str]:
    parts = report.not_measured
    if parts and verbose:
        for part in parts:
            yield f"            {style('not measured', 'warn')} {printable(part.name)}: {printable(part.reason, 300)}"
    elif parts:
        names = listed((printable(part.name, 40) for part in parts), NAMES_SHOWN)
        yield f"            {style(f'not measured {len(parts):,}', 'warn')}: {names} (-v says why)"


def _flagged(report: TacReport) -> str:
    if not report.flagged_channels:
        return f"no channel above mean + {report.u:g}·std of its layer"
    flagged = f"{count(report.flagged_channels, 'channel')} above mean + {report.u:g}·std"
    return f"{flagged}; {report.flagged_at_top:,} of them among as many of the largest change in their layer"


def _table(report: TacReport, style: Style, *, verbose: bool) -> Iterator[str]:
    names = [cell(printable(layer.name)) if verbose else shortened(layer.name, NAME_WIDTH) for layer in report.layers]
    wide = max(map(columns, [*names, "layer"]))
    titles = f"{'channels':>8}  {'Pearson':>7}  {'Spearman':>8}  {'largest change':<22}  flagged, of these at the top"
    yield style(f"  {'layer':<{wide}}  {titles}", "dim")
    for layer, name in zip(report.layers, names, strict=True):
        found = layer.correlation
        numbers = f"{layer.channels:>8,}  {_coefficient(found.pearson):>7}  {_coefficient(found.spearman):>8}"
        top = f"{_largest(layer):<22}"
        flagged = f"{len(layer.flagged):,}, {layer.flagged_at_top:,}" if layer.flagged else "none"
        yield f"  {padded(name, wide)}  {numbers}  {top}  {flagged}"


def _largest(layer: TacLayer) -> str:
    if not layer.ranking:
        return "not finite"
    first = layer.ranking[0]
    return f"{number(layer.changes[first])} in channel {first}"


def _words(found: Correlation) -> str:
    return f"Pearson {_coefficient(found.pearson)}, Spearman {_coefficient(found.spearman)}"


def _coefficient(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
