"""What a sanitized model must still do, and the steps on which that was tried: light, for the command and for reports.

A share of the images is *held out*: nothing is corrected by it. On these n images

    agreement = a/n, a those that the sanitized model gives the class that the original gives
    drop      = 100·(r − r′)/n points, r and r′ those that the original and the sanitized model classify rightly

and a step *keeps* the budget where the agreement is at least what was asked for and the drop at most that; both, where
both were asked for. Compared are the counts themselves, exactly; their intervals are only told.

The steps begin with no channel silenced; then u goes from `HIGHEST_U` down by `STEP` to the lowest. What several u in a
row silence alike is one step. The first that breaks the budget is the last: what the one before it silences is what is
written.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Final

from onnx_clp.errors import UsageError

if TYPE_CHECKING:
    from onnx_clp.evaluation.figures import Share

HIGHEST_U: Final = 6.0
"""Where the walk begins: of 118 published models that nobody thinks backdoored, u = 5 still flags channels of 106."""

STEP: Final = 0.25
"""Of u: the window in which a backdoor goes and the accuracy stays can be narrower than 1."""

DEFAULT_HOLD_OUT: Final = 0.5


@dataclass(frozen=True, slots=True)
class Budget:
    """What was asked for.

    Attributes:
        min_agreement: Per cent of the held-out images that must be answered as before, 0 to 100; None for any.
        max_accuracy_drop: Points of accuracy that may be lost on them, 0 to 100; None for any.
        hold_out: The share of the images that is held out, between 0 and 1; None for `DEFAULT_HOLD_OUT`.
    """

    min_agreement: float | None = None
    max_accuracy_drop: float | None = None
    hold_out: float | None = None

    @property
    def given(self) -> bool:
        """Whether anything must be kept."""
        return self.min_agreement is not None or self.max_accuracy_drop is not None

    @property
    def share(self) -> float:
        """The share of the images that is held out; 0 without a budget."""
        if not self.given:
            return 0.0
        return DEFAULT_HOLD_OUT if self.hold_out is None else self.hold_out

    def check(self, *, images: bool) -> None:
        """Raise UsageError where a number is beyond its range, or there are no ``images`` to judge by."""
        for name, value in (("min-agreement", self.min_agreement), ("max-accuracy-drop", self.max_accuracy_drop)):
            if value is not None and not images:
                raise UsageError(f"--{name} goes with --images", f"give --images PATH, or leave --{name} out")
            if value is not None and not 0 <= value <= 100:
                unit = "per cent" if name == "min-agreement" else "points"
                raise UsageError(f"--{name} is {value}", f"give a number of {unit} from 0 to 100")
        if self.hold_out is not None and not self.given:
            raise UsageError("--hold-out goes with a budget", "give --min-agreement or --max-accuracy-drop, too")
        if self.hold_out is not None and not 0 < self.hold_out < 1:
            raise UsageError(f"the share that is held out is {self.hold_out}", "give one between 0 and 1, such as 0.5")

    def keeps(self, agreement: Share, before: Share | None, after: Share | None) -> bool:
        """Whether it is kept, with these accuracies where they are known."""
        if self.min_agreement is not None and 100 * agreement.count < _exact(self.min_agreement) * agreement.total:
            return False
        if self.max_accuracy_drop is None:
            return True
        assert before is not None
        assert after is not None
        return 100 * (before.count - after.count) <= _exact(self.max_accuracy_drop) * before.total


NO_BUDGET: Final = Budget()


def _exact(value: float) -> Fraction:
    """The decimal number that was written: 99.9 is 999/10."""
    return Fraction(repr(float(value)))


def grid(lowest: float) -> tuple[float, ...]:
    """The values of u that are tried, descending; the last is ``lowest``, which may be the only one."""
    count = int(max(0.0, (HIGHEST_U - lowest) / STEP)) + 1
    values = [HIGHEST_U - STEP * number for number in range(count)]
    return (*(u for u in values if u > lowest), lowest)


@dataclass(frozen=True, slots=True)
class Step:
    """Channels that were tried, and what the model answers without them.

    Attributes:
        u: The lowest value that was tried at which just these are silenced, the highest where they break the budget;
            None where no channel is silenced, and every value that was tried silences some.
        channels: How many they are.
        agreement: Of the held-out images, those that are answered as before.
        accuracy: Of these, those that are classified rightly; None where there are no labels.
        kept: Whether the budget is kept.
    """

    u: float | None
    channels: int
    agreement: Share
    accuracy: Share | None
    kept: bool


@dataclass(frozen=True, slots=True)
class Walk:
    """How far the budget allowed to go.

    Attributes:
        budget: What was asked for.
        lowest: The lowest u that would have been tried.
        accuracy: Of the held-out images, those that the original classifies rightly; None where there are no labels.
        steps: In the order in which they were tried; only the last may break the budget.
    """

    budget: Budget
    lowest: float
    accuracy: Share | None
    steps: tuple[Step, ...]

    @property
    def taken(self) -> Step | None:
        """The last that keeps the budget; None where none does, so that the copy is the input."""
        return next((step for step in reversed(self.steps) if step.kept), None)

    @property
    def held_out(self) -> int:
        """How many images were held out."""
        return self.steps[0].agreement.total
