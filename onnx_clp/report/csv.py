"""Tables for spreadsheets and data frames: CSV with a head line, and an empty cell where there is no number.

A number that is not finite is ``nan``, ``inf`` or ``-inf``. It is RFC 4180's but for lines, which end in a line feed.
Names come from the scanned file: what is not printable is escaped, a name that a spreadsheet would take for a formula
gets an apostrophe before it, and one that it could take for two cells is quoted, whatever parts the cells there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from onnx_clp.report.words import printable

if TYPE_CHECKING:
    from onnx_clp.evaluation.figures import Figures
    from onnx_clp.evaluation.sweep import SweepReport
    from onnx_clp.evaluation.tac import TacReport

_FORMULA: Final = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What a formula begins with, also in the wide characters of East Asian keyboards."""

_PARTING: Final = frozenset(',;|"\n')
"""What parts cells here or where a comma is the decimal point, and the quote itself."""

_SHARE: Final = ("count", "total", "share", "low", "high")

_SWEEP: Final = (
    "u",
    "silenced_layers",
    "silenced_channels",
    "left_layers",
    "left_channels",
    "largest_share",
    *(f"{name}_{part}" for name in ("acc", "asr", "ra") for part in _SHARE),
    "not_a_number",
    "measured",
)

_TAC: Final = ("layer", "kind", "channel", "bound", "bound_z", "tac", "tac_z", "tac_rank", "counted", "flagged")

Cell = str | int | float | None


def render_sweep(report: SweepReport) -> str:
    """A sweep: a row for the unsanitized model, without u, and one for each value of u."""
    return _table(_SWEEP, _sweep(report))


def render_tac(report: TacReport) -> str:
    """Trigger-activated changes: a row for each channel of each layer that was measured."""
    return _table(_TAC, _tac(report))


def _sweep(report: SweepReport) -> Iterator[list[Cell]]:
    yield [None, 0, 0, 0, 0, 0.0, *_figures(report.evaluation.model.figures), "true"]
    for row in report.rows:
        silenced: list[Cell] = [len(row.silenced), row.silenced_channels, len(row.left), row.left_channels]
        measured = "true" if row.measured else "false"
        yield [row.u, *silenced, row.largest_share, *_figures(row.figures), measured]


def _figures(figures: Figures) -> Iterator[Cell]:
    for share in (figures.acc, figures.asr, figures.ra):
        yield from (None,) * 5 if share is None else (share.count, share.total, share.value, *share.interval)
    yield figures.not_a_number


def _tac(report: TacReport) -> Iterator[list[Cell]]:
    for layer in report.layers:
        scores = {channel: (bound, change) for channel, bound, change in layer.scores}
        rank = {channel: place for place, channel in enumerate(layer.ranking, start=1)}
        counted, flagged = set(layer.counted), set(layer.flagged)
        for k, (bound, change) in enumerate(zip(layer.bounds, layer.changes, strict=True)):
            bound_z, change_z = scores.get(k, (None, None))
            marks = ["true" if k in channels else "false" for channels in (counted, flagged)]
            yield [_name(layer.name), _name(layer.kind), k, bound, bound_z, change, change_z, rank.get(k), *marks]


def _name(name: str) -> str:
    shown = printable(name)
    return f"'{shown}" if shown.lstrip().startswith(_FORMULA) else shown


def _table(head: Iterable[str], rows: Iterable[list[Cell]]) -> str:
    return "".join(",".join(map(_cell, row)) + "\n" for row in (list[Cell](head), *rows))


def _cell(value: Cell) -> str:
    if value is None:
        return ""
    text = str(value)
    return '"' + text.replace('"', '""') + '"' if _PARTING & set(text) else text
