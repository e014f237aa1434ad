"""Which channels are silenced at one u, which are left, and what that takes."""

from __future__ import annotations

from dataclasses import dataclass

from onnx_clp.analysis import Analysis
from onnx_clp.model.patch import Plan
from onnx_clp.sanitizer import Left
from onnx_clp.verify import Choice


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """Channels to silence.

    Attributes:
        analysis: The layers, judged at this u.
        plan: The edits.
        done: What is silenced, by site.
        left: What is flagged and is not, and why.
    """

    analysis: Analysis
    plan: Plan
    done: tuple[Choice, ...]
    left: tuple[Left, ...]

    @property
    def key(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """The same for selections of one analysis, judged at whatever u, that silence the same channels."""
        return tuple((id(choice.part), choice.channels) for choice in self.done)

    @property
    def channels(self) -> int:
        """How many channels are silenced."""
        return sum(len(choice.channels) for choice in self.done)
