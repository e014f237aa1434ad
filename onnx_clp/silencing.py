"""Which channels are silenced at one u, which are left, and what that takes."""

from __future__ import annotations

from dataclasses import dataclass

from onnx_clp.analysis import Analysis
from onnx_clp.model.patch import Plan
from onnx_clp.preactivation.selection import Selection
from onnx_clp.sanitizer import Left
from onnx_clp.verify import Choice


@dataclass(frozen=True, slots=True, eq=False)
class Silencing:
    """Channels to silence.

    Attributes:
        analysis: The layers, judged at this u.
        plan: The edits.
        done: What is silenced, by site.
        left: What is flagged and is not, and why.
        read: What EP or BNP read and chose at this u; None where bounds say what stands out.
    """

    analysis: Analysis
    plan: Plan
    done: tuple[Choice, ...]
    left: tuple[Left, ...]
    read: Selection | None = None

    @property
    def key(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """The same for silencings of one analysis, judged at whatever u, of the same channels."""
        return tuple((id(choice.part), choice.channels) for choice in self.done)

    @property
    def channels(self) -> int:
        """How many channels are silenced."""
        return sum(len(choice.channels) for choice in self.done)
