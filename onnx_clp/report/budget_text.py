"""How far a budget allowed to go, as a person reads it in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from onnx_clp.report.words import count

if TYPE_CHECKING:
    from onnx_clp.correction.budget import Step, Walk
    from onnx_clp.evaluation.figures import Share

Style = Callable[[str, str], str]


def budget_lines(walk: Walk, style: Style) -> Iterator[str]:
    """What was asked for, what was taken, and a row for each step."""
    yield f"  budget    {_asked(walk)}, on {count(walk.held_out, 'image')} held out"
    yield f"  taken     {_taken(walk, style)}"
    yield ""
    wide = max(len(_u(step)) for step in walk.steps)
    labelled = walk.accuracy is not None
    yield style(f"  {'u':>{wide}}  silenced  {'agreement %':<25}  {'ACC %' if labelled else ''}".rstrip(), "dim")
    if walk.accuracy is not None:
        yield f"  {'':>{wide}}  {'':>8}  {'as it was':<25}  {_share(walk.accuracy)}"
    for step in walk.steps:
        accuracy = "" if step.accuracy is None else _share(step.accuracy)
        mark = "" if step.kept else style("  beyond the budget", "warn")
        yield f"  {_u(step):>{wide}}  {step.channels:>8,}  {_share(step.agreement):<25}  {accuracy}".rstrip() + mark
    yield ""


def _asked(walk: Walk) -> str:
    budget, parts = walk.budget, []
    if budget.min_agreement is not None:
        parts.append(f"{budget.min_agreement:g} % answered as before at least")
    if budget.max_accuracy_drop is not None:
        points = f"{budget.max_accuracy_drop:g} point{'s' * (budget.max_accuracy_drop != 1)}"
        parts.append(f"{points} of accuracy lost at most")
    return " and ".join(parts)


def _taken(walk: Walk, style: Style) -> str:
    """The step that was taken, and why it was not a later one."""
    taken, last = walk.taken, walk.steps[-1]
    if taken is None:
        return style("nothing: without any channel silenced it is beyond the budget, the copy is the input", "warn")
    end = (
        f"u = {last.u:g} is beyond the budget" if not last.kept else f"u = {walk.lowest:g} is the lowest that is tried"
    )
    if taken.u is None:
        return style(f"no channel: {end}", "warn")
    return style(f"u = {taken.u:g}, {count(taken.channels, 'channel')}: {end}", "good" if taken.channels else "warn")


def _u(step: Step) -> str:
    return "none" if step.u is None else f"{step.u:g}"


def _share(share: Share) -> str:
    low, high = share.interval
    return f"{100 * share.value:6.2f} ({100 * low:.2f} to {100 * high:.2f})"
