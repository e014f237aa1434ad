"""Which output of a model has a number for each class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Output:
    """An output of a model: its name and, where it is declared, its shape."""

    name: str
    shape: tuple[int | str | None, ...] | None


def holds_classes(shape: Sequence[int | str | None]) -> bool:
    """Whether it is (N, classes) or (N, classes, 1, 1)."""
    return len(shape) == 2 or (len(shape) == 4 and tuple(shape[2:]) == (1, 1))


def first_of_classes(outputs: Sequence[Output]) -> Output | None:
    """The first that may hold them, or the only one where it does not say its shape; None where there is none."""
    for output in outputs:
        if output.shape is not None and holds_classes(output.shape):
            return output
    return outputs[0] if len(outputs) == 1 and outputs[0].shape is None else None
