"""What two models answer on the same images → agreement, and accuracy where there are labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from onnx_clp.correction.moments import Array
from onnx_clp.correction.stream import Outputs
from onnx_clp.evaluation.figures import Share

Classes = npt.NDArray[np.int64]
"""The class of each image, int64 (N,)."""

NOT_A_NUMBER: Final = -1
"""Stands for the class of an image of which an output is NaN: of no image the right one."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How the sanitized model answers.

    Attributes:
        agreement: Images that it answers as the original does.
        before: Images that the original classifies rightly; None without labels.
        after: Those that it does.
    """

    agreement: Share
    before: Share | None = None
    after: Share | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """Which images answers are compared on.

    Attributes:
        output: Name of the output with a number for each class.
        total: How many images the batches hold.
        places: Those that are compared.
        labels: Of these, int64 (n,); None where they are not known.
        classes: How many classes the labels are of; None without labels.
    """

    output: str
    total: int
    places: slice
    labels: Classes | None = None
    classes: int | None = None

    def verdict(self, original: Outputs, sanitized: Outputs) -> Verdict | None:
        """How the outputs of one model compare with those of the other; None where they do not tell a class of each.

        An image that the original answers with NaN has none; the sanitized model may, and that is another answer.
        """
        before, after = (self._answers(outputs) for outputs in (original, sanitized))
        if before is None or after is None or NOT_A_NUMBER in before:
            return None
        agreement = _share(before == after)
        if self.labels is None:
            return Verdict(agreement)
        return Verdict(agreement, _share(before == self.labels), _share(after == self.labels))

    def _answers(self, outputs: Outputs) -> Classes | None:
        rows = [batch.reshape(len(batch), -1) for batch in outputs.get(self.output, ()) if batch.ndim]
        if sum(map(len, rows)) != self.total or not all(map(self._tells, rows)):
            return None
        return np.concatenate([answers(each) for each in rows])[self.places]

    def _tells(self, rows: Array) -> bool:
        """Whether there is a number for each of two classes or more."""
        wanted = rows.shape[1] if self.classes is None else self.classes
        return rows.dtype.kind in "fiu" and rows.shape[1] == wanted > 1


def answers(rows: Array) -> Classes:
    """The class of each row of numbers (N, classes); `NOT_A_NUMBER` where one of them is NaN."""
    found = np.asarray(rows.argmax(1), np.int64)
    return np.where(np.isnan(rows).any(1), NOT_A_NUMBER, found) if rows.dtype.kind == "f" else found


def _share(found: npt.NDArray[np.bool_]) -> Share:
    return Share(int(np.count_nonzero(found)), len(found))
