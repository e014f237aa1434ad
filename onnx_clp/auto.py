"""What the user has → by which method channels are chosen, and how: the rule of ``--method auto``.

=====================  ======  ==============  ====================================
the user has           method  settings        what is measured on them
=====================  ======  ==============  ====================================
nothing                clp     published       nothing
images                 clp     `WITH_IMAGES`   what channels do, and what is shifted
200 labelled ones      clp     `WITH_IMAGES`   the same, and the accuracy
suspected images       ep      published       which channels stand out
the last, and images   ep      published       the same, and what is shifted
=====================  ======  ==============  ====================================

Suspected images are asked first: with the trigger among them EP sees the backdoor at work, which nothing else shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from onnx_clp.defaults import ACTIVITY, DEFAULT_SCORE, DEFAULT_U


@dataclass(frozen=True, slots=True)
class Has:
    """What the user has.

    Attributes:
        images: Clean images.
        labels: Of `LEAST_LABELLED` of them or more their classes too.
        suspected: Images of the training set, triggered ones perhaps among them.
    """

    images: bool = False
    labels: bool = False
    suspected: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """How channels are chosen, and what is done with clean images.

    Attributes:
        score: What CLP judges channels by.
        u: Standard deviations from the mean of the layer.
        repair: What clean images are used for; None where it is what it is without auto.
        ridge: λ of a refit; None for its default.
    """

    score: str = DEFAULT_SCORE
    u: float = DEFAULT_U
    repair: str | None = None
    ridge: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What auto chose.

    Attributes:
        method: ``clp`` or ``ep``.
        settings: How.
        why: In one sentence.
        max_accuracy_drop: Points of accuracy that silencing may cost, on labelled images; None where none are there.
    """

    method: str
    settings: Settings
    why: str
    max_accuracy_drop: float | None = None


PUBLISHED: Final = Settings()
"""Of CLP without images, and of EP."""

WITH_IMAGES: Final = Settings(ACTIVITY, 3.0, "refit", 0.12)
"""Of CLP with clean images: what served most of the networks that it was chosen on, see docs/benchmarks.md."""

ACCURACY_DROP: Final = 2.0
"""Points of accuracy that silencing may cost where labels tell it."""

LEAST_LABELLED: Final = 200
"""Labelled images below which accuracy is not judged: of 100 that are held out, 2 points are two images."""


def chosen(has: Has) -> Plan:
    """The method and the settings for what the user ``has``."""
    if has.suspected:
        corrected = "; the clean images give back what silencing shifts" if has.images else ""
        why = f"triggered images among the suspected ones show what a backdoor does to pre-activations{corrected}"
        return Plan("ep", PUBLISHED, why)
    if has.images:
        why = "clean images show what channels do, and give back what silencing shifts"
        if has.labels:
            return Plan("clp", WITH_IMAGES, f"{why}; their labels tell what it costs", ACCURACY_DROP)
        return Plan("clp", WITH_IMAGES, why)
    return Plan("clp", PUBLISHED, "without images the weights are all there is to judge by")
