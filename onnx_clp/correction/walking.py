"""A selection of channels, or a walk over many of them under a budget → what is silenced, and how it is repaired."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from onnx_clp.correction.answers import Verdict
from onnx_clp.correction.budget import Step, Walk, grid
from onnx_clp.correction.corrector import Corrector, Planned
from onnx_clp.correction.request import ImageRequest
from onnx_clp.correction.rewriting import planned
from onnx_clp.errors import UsageError
from onnx_clp.evaluation.figures import Share
from onnx_clp.silencing import Silencing
from onnx_clp.verify import Choice

Select = Callable[[float | None], Silencing]
"""What is silenced at a value of u; nothing for None."""


@dataclass(frozen=True, slots=True, eq=False)
class Repaired:
    """What is silenced and how it is repaired.

    Attributes:
        selection: The channels.
        found: The plan of both.
        done: All that is done to each site.
        walk: How these channels were come by; None without a budget.
    """

    selection: Silencing
    found: Planned
    done: tuple[Choice, ...]
    walk: Walk | None = None


def repaired(corrector: Corrector, request: ImageRequest, u: float, select: Select) -> Repaired:
    """Repair what silencing shifts: at ``u``, or as far down to it as the budget of ``request`` allows.

    Raises:
        ModelFileError: onnxruntime does not run the model in stages.
        UsageError: There is not enough memory for so many images, or the model's answers cannot be told.
    """
    if not request.budget.given:
        return _at(corrector, select(u))
    steps: list[Step] = []
    last: Repaired | None = None
    accuracy: Share | None = None
    for each in (None, *grid(u)):
        selection = select(each)
        if last is not None and selection.key == last.selection.key:
            last = replace(last, selection=selection)
            steps[-1] = replace(steps[-1], u=each)
            continue
        tried = _at(corrector, selection)
        verdict = _verdict(corrector, tried)
        accuracy = verdict.before
        keeps = request.budget.keeps(verdict.agreement, verdict.before, verdict.after)
        steps.append(Step(each, selection.channels, verdict.agreement, verdict.after, keeps))
        if not keeps:
            break
        last = tried
    if last is None:
        selection = select(None)
        last = Repaired(selection, corrector.nothing(selection.plan), ())
    return replace(last, walk=Walk(request.budget, u, accuracy, tuple(steps)))


def _at(corrector: Corrector, selection: Silencing) -> Repaired:
    found, done = planned(selection.analysis, corrector, selection.done, selection.plan)
    return Repaired(selection, found, done)


def _verdict(corrector: Corrector, tried: Repaired) -> Verdict:
    """How the model answers; where nothing was simulated, it is the original."""
    verdict = corrector.unchanged() if tried.found.outputs is None else tried.found.verdict
    if verdict is None:
        raise UsageError(
            "the model's answers cannot be told on these images, and a budget is of them",
            "name the output with a number for each class: --output-name NAME",
        )
    return verdict
