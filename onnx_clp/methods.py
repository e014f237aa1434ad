"""What the user says of the method → what is done: by name, or as `onnx_clp.auto` chooses.

What is said explicitly wins over what auto picks, and what does not go with the method is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from onnx_clp.auto import Has, Settings, chosen
from onnx_clp.defaults import DEFAULT_THRESHOLD, LOWEST_U
from onnx_clp.errors import UsageError

CLP: Final = "clp"
EP: Final = "ep"
BNP: Final = "bnp"
AUTO: Final = "auto"

METHODS: Final = (CLP, EP, BNP, AUTO)
"""By what channels are chosen: their bounds, the entropy or the divergence of their pre-activations; or as fits."""

DEFAULT_METHOD: Final = CLP

DEFAULT_REPAIR: Final = "statistics"


@dataclass(frozen=True, slots=True)
class Said:
    """What the user says, as in `onnx_clp.sanitize`; None or False where nothing is. ``budget``: one is given."""

    method: str = DEFAULT_METHOD
    u: float | None = None
    score: str | None = None
    threshold: str | None = None
    count_dead: bool = False
    repair: str | None = None
    ridge: float | None = None
    keep_bias: bool | None = None
    budget: bool = False


@dataclass(frozen=True, slots=True)
class Settled:
    """What is done.

    Attributes:
        method: ``clp``, ``ep`` or ``bnp``.
        u: Standard deviations from the mean of the layer.
        score: What CLP judges channels by.
        threshold: Its rule for what stands out.
        repair: What clean images are used for.
        ridge: λ of a refit; None for its default, or where there is none.
        keep_bias: Whether silenced channels keep their bias.
        auto: What auto chose and why, in one sentence; empty where the method was said.
        max_accuracy_drop: As of `onnx_clp.auto.Plan`.
    """

    method: str
    u: float
    score: str
    threshold: str
    repair: str
    ridge: float | None
    keep_bias: bool
    auto: str = ""
    max_accuracy_drop: float | None = None


def settled(said: Said, has: Has) -> Settled:
    """What is done where this is ``said``, by one who ``has`` these images.

    Raises:
        UsageError: There is no such method; it needs images that are not there, or does not go with what is said.
    """
    if said.method not in METHODS:
        raise UsageError(f"there is no method {said.method!r}", f"choose from {', '.join(METHODS)}")
    plan = chosen(has) if said.method == AUTO else None
    method = said.method if plan is None else plan.method
    _check_images(said.method, has)
    if method != CLP:
        for name in _of_clp(said):
            taken = "which auto takes with --suspected-images" if plan is not None else "which was said"
            raise UsageError(f"--{name} does not go with the method {method}, {taken}", f"leave --{name} out")
    settings = Settings() if plan is None else plan.settings
    repair = said.repair or settings.repair or DEFAULT_REPAIR
    # A penalty that auto picks is one of the repair that it picks.
    ridge = settings.ridge if said.ridge is None and repair == settings.repair else said.ridge
    u = LOWEST_U if said.budget else settings.u
    u = u if said.u is None else said.u
    score = said.score or settings.score
    words = [f"score {score}"] if method == CLP else []
    words += [f"u = {u:g}", *([f"repair {repair}"] if has.images else [])]
    words += [f"ridge {ridge:g}"] if ridge is not None else []
    drop = None if plan is None else plan.max_accuracy_drop
    words += [f"{drop:g} points of accuracy at most"] if drop is not None else []
    return Settled(
        method=method,
        u=u,
        score=score,
        threshold=said.threshold or DEFAULT_THRESHOLD,
        repair=repair,
        ridge=ridge,
        keep_bias=method != CLP if said.keep_bias is None else said.keep_bias,
        auto="" if plan is None else f"{method}, {', '.join(words)}: {plan.why}",
        max_accuracy_drop=drop,
    )


def _check_images(method: str, has: Has) -> None:
    """Raise UsageError where ``method`` needs images that are not there, or takes none that are."""
    if method == EP and not has.suspected:
        raise UsageError(
            "--method ep takes the suspected training images, triggered ones among them",
            "give --suspected-images PATH; on clean images alone it chooses channels too, and the wrong ones",
        )
    if method == BNP and not has.images:
        raise UsageError("--method bnp takes clean images", "give --images PATH, 500 of them where you can")
    if has.suspected and method in {CLP, BNP}:
        advice = "say --method ep or auto, or leave --suspected-images out"
        raise UsageError(f"--suspected-images does not go with --method {method}", advice)


def _of_clp(said: Said) -> Iterator[str]:
    """The options of CLP alone that are said."""
    if said.score is not None:
        yield "score"
    if said.threshold is not None:
        yield "threshold"
    if said.count_dead:
        yield "count-dead"
