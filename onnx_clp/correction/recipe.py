"""Site → which of its constants make a·y + c of its value y, or why none do; and a new kernel among them.

A site's value is y = s·(W∗x) + b, where s is γ of a BatchNormalization, the factor of one that is spelled out, or 1,
and b is all that is added to it. One factor, s or W, and every summand are multiplied by a, and c goes into the last
summand, divided by what that is multiplied by on its way to y. A convolution to which nothing is added gets a bias.

Where the kernel of a site's own convolution was refitted, W and the bias of the convolution are replaced by W′ and b′
before that: a·W′ and a·b′ + c are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from onnx_clp.correction.convolutions import Convolution
from onnx_clp.correction.moments import Affine, Array, Floats
from onnx_clp.correction.refit import Refit
from onnx_clp.model.constants import Constants
from onnx_clp.model.graph import MISSING, Graph, Node
from onnx_clp.model.knob import Change, Knob, Wanted
from onnx_clp.model.tensors import Stored
from onnx_clp.operators import linear
from onnx_clp.sites import Site

_INTEGERS: Final = frozenset({"QLinearConv", "ConvInteger"})
_LEVELS: Final = frozenset({"QuantizeLinear", "DequantizeLinear"})


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """How a site is corrected.

    Attributes:
        knobs: All constants that are multiplied by a.
        summand: The one of them that takes c.
        gain: What the summand is multiplied by on its way to the value, one number or one a channel.
        absent: Zeros that stand in for the summand where there is none yet.
    """

    knobs: tuple[Knob, ...]
    summand: Knob
    gain: Floats
    absent: Array | None = None

    def wanted(self, found: Affine | None, silenced: Sequence[int], rests: Floats | None = None) -> Wanted:
        """The changes that write ``found``; channels that are ``silenced`` rest at 0, or at ``rests`` (channels,)."""
        factors = found.factors if found is not None and (found.factors != 1).any() else None
        shifts = found.shifts / self.gain if found is not None and found.shifts.any() else None
        resting = None if rests is None else rests / self.gain
        channels = tuple(silenced)
        changes = [
            Change(knob, channels, factors, shifts, rests=resting)
            if knob is self.summand
            else Change(knob, channels, factors)
            for knob in self.knobs
            if knob is not self.summand or self.absent is None
        ]
        if self.absent is not None and (shifts is not None or resting is not None):
            changes.append(Change(self.summand, channels, None, shifts, self.absent, rests=resting))
        return Wanted(tuple(changes))


def recipe(site: Site, graph: Graph, constants: Constants) -> Recipe | str:
    """How ``site``, whose value can be observed, is corrected; or why it cannot be."""
    path = _path(site, graph)
    refusal = _refusal(site.node, path)
    if refusal:
        return refusal
    if site.node.op_type == "BatchNormalization":
        return Recipe(site.knobs, site.knobs[1], np.ones(()))
    gain: Floats = np.ones(())
    for step in reversed(path or ()):
        for knob in site.knobs[1:]:
            if knob.node is step:
                return _checked(site, knob, -gain if step.op_type == "Sub" else gain)
        factor = _factor(step, graph, constants)
        if factor is None:
            return f"it is multiplied by what is not known, in {step.name!r}"
        gain = gain * factor
    return _bias(site, gain, constants)


def with_refit(
    changes: Sequence[Change], part: Convolution, found: Refit, factors: Floats | None, silenced: Sequence[int]
) -> Wanted:
    """The new kernel and bias of ``part`` among the ``changes`` of the site whose own convolution it is.

    Args:
        changes: What else is wanted of the site's constants; empty where the convolution is no site of its own.
        part: The convolution.
        found: W′ and b′.
        factors: a, (C_out,); None where the site is not corrected.
        silenced: Channels of the site to silence.
    """
    given = {change.knob.edge: change for change in changes}
    missing = None if part.bias_knob.value != MISSING else part.bias
    for knob, array, absent in ((part.kernel_knob, found.kernel, None), (part.bias_knob, found.bias, missing)):
        known = given.get(knob.edge, Change(knob, tuple(silenced), absent=absent))
        given[knob.edge] = replace(known, factors=factors, replacement=array)
    return Wanted(tuple(given.values()))


def written_kernel(part: Convolution, found: Refit, factors: Floats | None, silenced: Sequence[int]) -> Array:
    """The kernel that a refit, the factors of a correction and silencing make: as it shall be in the file."""
    kernel: Floats = found.kernel if factors is None else found.kernel * factors.reshape(-1, *[1] * part.where.rank, 1)
    kernel = kernel.copy()
    kernel[list(silenced)] = 0
    with np.errstate(all="ignore"):  # what does not fit is refused where it is planned
        return kernel.astype(part.kernel.dtype)


def _refusal(node: Node, path: Sequence[Node] | None) -> str:
    """Why a site at ``node``, whose value is behind ``path``, cannot be corrected; empty where it may be."""
    if node.op_type in _INTEGERS:
        return f"the constants of a {node.op_type} are integers"
    if node.op_type == "FusedConv" and node.text("activation", ""):
        return "its activation is part of it"
    if path is None:
        return "what is between its constants is not followed"
    if any(step.op_type in _LEVELS for step in path):
        return "it is rounded to levels before a constant is added"
    return ""


def _bias(site: Site, gain: Floats, constants: Constants) -> Recipe | str:
    """The recipe of a convolution whose summand is its bias, which it may not have yet."""
    node, description = site.node, linear(site.node)
    if description is None or description.bias == MISSING:
        return "nothing is added to it: there is no constant that its mean can be written in"
    for knob in site.knobs[1:]:
        if knob.node is node:
            return _checked(site, knob, gain)
    kernel = constants.get(node.input(description.weight))
    dtype = kernel.dtype if isinstance(kernel, Stored) else constants.kernel(node.input(description.weight)).dtype
    return _checked(site, Knob(node, description.bias, -1), gain, np.zeros(site.channels, dtype))


def _checked(site: Site, summand: Knob, gain: Floats, absent: Array | None = None) -> Recipe | str:
    """The recipe, where c can be divided by ``gain``."""
    if gain.size not in {1, site.channels} or not np.all(np.isfinite(gain) & (gain != 0)):
        return "what is added to it is multiplied by 0, or by what is not finite"
    return Recipe(site.knobs, summand, gain.reshape(-1) if gain.size > 1 else gain.reshape(()), absent)


def _path(site: Site, graph: Graph) -> list[Node] | None:
    """The nodes between that of ``site`` and its value; None where they are more than one way."""
    steps: list[Node] = []
    value = site.node.outputs[0]
    while value != site.output:
        readers = [reader for reader in graph.consumers.get(value, ()) if reader.index in graph.live]
        if len(readers) != 1:
            return None
        steps += readers
        value = readers[0].outputs[0]
    return steps


def _factor(step: Node, graph: Graph, constants: Constants) -> Floats | None:
    """What ``step`` multiplies by, one number or one a channel; None where that is not known."""
    if step.op_type not in {"Mul", "Div"}:
        return np.ones(())
    values = [value for value in step.inputs if constants.get(value) is not None and value not in graph.overridable]
    number = constants.small(values[0]) if len(values) == 1 else None
    if number is None or (step.op_type == "Div" and values[0] == step.inputs[0]):
        return None
    wide: Floats = number.astype(np.float64)
    with np.errstate(all="ignore"):  # what is not finite is refused
        return wide.reshape(-1) if step.op_type == "Mul" else 1 / wide.reshape(-1)
