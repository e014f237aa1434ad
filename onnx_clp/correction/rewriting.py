"""The correction of one rewrite: what is chosen, what is written, and whether the written file computes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from onnx import TensorProto

from onnx_clp.analysis import Analysis
from onnx_clp.correction.compare import compare
from onnx_clp.correction.corrector import Corrector, Planned
from onnx_clp.correction.request import ImageRequest
from onnx_clp.correction.source import ImageSource
from onnx_clp.model.patch import Plan
from onnx_clp.rests import AT_ZERO
from onnx_clp.sanitizer import Check
from onnx_clp.verify import Choice

_ROUNDING: Final = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "ConvInteger"}
)
_NARROW: Final = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})


def corrector_of(analysis: Analysis, request: ImageRequest, doubtful: Mapping[int, int]) -> Corrector:
    """The model of ``analysis`` with its images.

    ``doubtful`` are values that another runtime may read otherwise, and the one that makes them so. Raises as
    `Corrector` does.
    """
    return Corrector(analysis, request, _barred(analysis, doubtful), doubtful)


def planned(
    analysis: Analysis, corrector: Corrector, done: Sequence[Choice], plain: Plan
) -> tuple[Planned, tuple[Choice, ...]]:
    """Plan to silence ``done``, of which ``plain`` is the plan, and to correct what that shifts.

    Args:
        analysis: Of the model.
        corrector: Its images.
        done: What is silenced.
        plain: What that takes.

    Returns the plan, and all that is done to each site. Raises as ``Corrector.plan`` does.
    """
    positions = {id(part): position for position, part in enumerate(analysis.measured)}
    silenced = {positions[id(choice.part)]: choice.channels for choice in done}
    at = {positions[id(choice.part)]: choice.rest for choice in done}
    found = corrector.plan(silenced, plain, at)
    choices = tuple(
        Choice(
            analysis.measured[position],
            silenced.get(position, ()),
            found.affines[position].factors if position in found.affines else None,
            at.get(position, AT_ZERO),
        )
        for position in sorted({*silenced, *found.affines})
    )
    return found, choices


def checked(analysis: Analysis, model: Path, found: Planned, source: ImageSource) -> Check:
    """Run the written ``model`` on the images. Raises VerificationError where it computes something else."""
    if found.outputs is None:
        return Check("images", passed=None, detail="nothing was silenced, and nothing corrected")
    detail = compare(model, source, found.outputs, rough=_is_rough(analysis))
    if not detail:
        return Check("images", passed=None, detail="the model has no output of floating-point numbers")
    return Check("images", passed=True, detail=detail)


def _barred(analysis: Analysis, doubtful: Mapping[int, int]) -> dict[int, str]:
    """The sites that are not corrected since a constant of theirs may be read otherwise, and why."""
    barred = {}
    for position, part in enumerate(analysis.measured):
        values = [doubtful[knob.value] for knob in part.site.knobs if knob.value in doubtful]
        if values:
            barred[position] = f"its constant {analysis.graph.name_of(values[0])!r} is ambiguous"
    return barred


def _is_rough(analysis: Analysis) -> bool:
    """Whether the model rounds to 16 bits or to levels on the way."""
    if any(node.op_type in _ROUNDING for node in analysis.graph.nodes):
        return True
    tensors = [tensor for tensor in analysis.graph.initializers.values() if isinstance(tensor, TensorProto)]
    constants = [node.attributes["value"].t for node in analysis.graph.nodes if "value" in node.attributes]
    return any(tensor.data_type in _NARROW for tensor in (*tensors, *constants))
