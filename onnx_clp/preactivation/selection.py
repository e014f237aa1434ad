"""What a method made of images: which were read, the scores of all channels, and which channels were chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from onnx_clp.evaluation.attack import Preprocessing
    from onnx_clp.evaluation.figures import ImagesUsed
    from onnx_clp.preactivation.scores import Choice, Scores

ADVISED_CLEAN: Final = 500
"""Clean images below which BNP is warned of: the published number."""

ADVISED_SUSPECTED: Final = 500
"""Suspected images below which EP is warned of: of N images no entropy exceeds ln N, and few of them are triggered."""

MOST_SUSPECTED: Final = 5000
"""Suspected images that are taken where nobody says how many."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What EP or BNP chose, and of what.

    Attributes:
        images: The images that were read: suspected ones for EP, clean ones for BNP.
        preprocessing: How the model took them.
        scores: Of every channel of every site that could be read.
        choice: Which channels stand out, and which sites could not be read.
        warnings: What the user should know of the images.
    """

    images: ImagesUsed
    preprocessing: Preprocessing
    scores: Scores
    choice: Choice
    warnings: tuple[str, ...]

    @property
    def analysed(self) -> bool:
        """Whether anything could be judged at all."""
        return any(site.judged for site in self.choice.sites)
