"""Images through the original model and through a sanitized one that is repaired as it goes → its repairs.

The model is cut behind the pre-activation of every site that can be observed, and, where kernels are refitted, behind
every convolution, see `stages`. A *stream* of values runs through the stages, each once for each batch of images; what
later stages read is held for all images, and freed when its last reader has run. Two streams are run:

1. the original: at each site the mean m and the variance q of every channel are measured;
2. the sanitized one: at each site, in topological order, m′ and q′ are measured, with all earlier repairs in place, and
   the values are changed as the written model will compute them, see `repair` and `moments`. Where nothing has reached
   a value that was changed, nothing is measured.

For statistics alone the first runs before the second, once for all choices that are tried. A refit needs what each
convolution gave in the original, for every image: then both run in step, stage by stage, and only what two stages hold
at once is in memory. Batches beyond those that count flow along and are never measured: what is to be judged by is not
what was corrected by. A session is made once for each stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from onnx_clp.analysis import Analysis
from onnx_clp.correction.convolutions import Convolution
from onnx_clp.correction.cuts import Prepared, Variant, cut
from onnx_clp.correction.moments import Affine, Array, Moments
from onnx_clp.correction.refit import Refit
from onnx_clp.correction.repair import Channels, Repair, Repairs, Rests
from onnx_clp.correction.stream import Batches, Outputs, Stream, Values
from onnx_clp.errors import UsageError

_TOO_MANY: Final = ("there is not enough memory for the values of so many images", "take fewer: --num-images N")


@dataclass(frozen=True, slots=True, eq=False)
class Simulation:
    """What came of one choice.

    Attributes:
        affines: What was done to each site that was reached, by its position in ``Analysis.measured``.
        left: Why a site that was reached, or of which that is not known, is not corrected, likewise.
        refits: The kernels that were refitted, by the index of their node.
        kept: Why others were not, likewise.
        original: Outputs of the original model.
        sanitized: Outputs of the sanitized and corrected one.
    """

    affines: Mapping[int, Affine]
    left: Mapping[int, str]
    refits: Mapping[int, Refit]
    kept: Mapping[int, str]
    original: Outputs
    sanitized: Outputs


class Simulator:
    """One model and one set of images, for any number of choices.

    Attributes:
        left: Sites that cannot be observed, and why, by their position in ``Analysis.measured``.
        kept: Convolutions that cannot be refitted, and why, by the index of their node.
    """

    def __init__(
        self, analysis: Analysis, model: Variant, batches: Batches, convolutions: Sequence[Convolution] = ()
    ) -> None:
        """Cut the model, at ``convolutions`` too, and load its stages.

        Raises:
            ModelFileError: onnxruntime does not run it.
            UsageError: It has not one input.
        """
        inputs = model.pieces.inputs
        if len(inputs) != 1:
            raise UsageError(f"the model has {len(inputs)} inputs", "a model with one, for images, is wanted")
        (self._given,) = inputs
        self._batches = batches
        self._cuts = cut(analysis, model, self._given, batches.probe, convolutions)
        self.left, self.kept = self._cuts.left, self._cuts.kept
        self._last_read = {name: i for i, part in enumerate(self._cuts.stages) for name in part.stage.reads}
        self._before: _Original | None = None

    def hidden(self, choices: Channels) -> list[int]:
        """The positions among ``choices`` whose value cannot be observed: a variant is needed for them."""
        seen = {part.observed.position for part in self._cuts.stages if part.observed is not None}
        return [position for position, channels in choices.items() if channels and position not in seen]

    def moments(self) -> Mapping[int, Moments]:
        """Of each site that can be observed, in the original. Raises as ``run`` does."""
        try:
            return self._original(in_step=False).moments
        except MemoryError as error:
            raise UsageError(*_TOO_MANY) from error

    def outputs(self) -> Outputs:
        """The outputs of the original model. Raises as ``run`` does."""
        try:
            return self._original(in_step=False).outputs()
        except MemoryError as error:
            raise UsageError(*_TOO_MANY) from error

    def run(
        self,
        choices: Channels,
        repair: Repair | None = None,
        variant: Variant | None = None,
        rests: Rests | None = None,
    ) -> Simulation:
        """Silence channels and repair what comes after.

        Args:
            choices: Channels by the position of their site in ``Analysis.measured``.
            repair: What is done; None for the statistics alone, of all sites.
            variant: The model with these channels silenced in it; needed where some of them are `hidden`.
            rests: Where they rest; None for 0, or the zero point, everywhere.

        Raises:
            ModelFileError: onnxruntime does not run a stage.
            UsageError: There is not enough memory for so many images.
        """
        assert variant is not None or not self.hidden(choices)
        wanted = repair or Repair()
        whole = Repair(wanted.statistics, wanted.ridge, {**wanted.left, **self.left}, {**wanted.kept, **self.kept})
        try:
            original = self._original(in_step=wanted.ridge is not None)
            stages = self._cuts.stages if variant is None else self._cuts.of(variant)
            return self._repaired(stages, Repairs(whole, choices, self._batches.counted, rests or {}), original)
        except MemoryError as error:
            raise UsageError(*_TOO_MANY) from error

    def _stream(self) -> Stream:
        return Stream(self._batches, self._given, self._last_read, self._cuts.pieces.outputs)

    def _original(self, *, in_step: bool) -> _Original:
        """The original stream: at its start, to be run in step with another, or at its end."""
        if in_step:
            return _Original(self._cuts.stages, self._stream(), Repairs(Repair(), {}, self._batches.counted))
        if self._before is None:
            found = _Original(self._cuts.stages, self._stream(), Repairs(Repair(), {}, self._batches.counted))
            for number in range(len(self._cuts.stages)):
                found.advance(number)
            self._before = found
        return self._before

    def _repaired(self, stages: Sequence[Prepared], repairs: Repairs, original: _Original) -> Simulation:
        """The sanitized stream through ``stages``."""
        refits = repairs.wanted.ridge is not None
        stream = self._stream()
        for number, part in enumerate(stages):
            made = stream.made(part)
            reached = part is not self._cuts.stages[number] or stream.reaches(part)
            if reached:
                stream.touched.update(made)
            changed = False
            end = part.stage.cut
            before = original.advance(number) if refits else None
            if before is not None and part.convolution is not None:
                given = stream.value(part.convolution.given, made)
                changed = repairs.refit(part.convolution, given, made[end], (before, original.cut))
            if part.observed is not None:
                moments = original.moments.get(part.observed.position)
                changed |= repairs.correct(part.observed, made[end], moments, reached=reached or changed)
            if changed:
                stream.touched.add(end)
            stream.settle(number, made)
        left = {**self.left, **repairs.left} if repairs.wanted.statistics else {}
        kept = {**repairs.wanted.kept, **repairs.kept}
        return Simulation(
            repairs.affines, left, repairs.refits, kept if refits else {}, original.outputs(), stream.outputs()
        )


class _Original:
    """The original stream, as far as it has run.

    Attributes:
        moments: Of each site that was passed, by position in ``Analysis.measured``.
        cut: What the last stage that was run made at its cut.
    """

    def __init__(self, stages: Sequence[Prepared], stream: Stream, repairs: Repairs) -> None:
        self.moments: dict[int, Moments] = {}
        self.cut: Values = []
        self._stages = stages
        self._stream = stream
        self._repairs = repairs

    def advance(self, number: int) -> Sequence[Array] | None:
        """Run stage ``number``, the one after the last; the input of the convolution at its end, if there is one."""
        part = self._stages[number]
        made = self._stream.made(part)
        self.cut = made.get(part.stage.cut, [])
        if part.observed is not None and self.cut[0].dtype.kind == "f":
            self.moments[part.observed.position] = self._repairs.measured(part.observed, self.cut)
        given = None if part.convolution is None else self._stream.value(part.convolution.given, made)
        self._stream.settle(number, made)
        return given

    def outputs(self) -> Outputs:
        """The outputs of the model, once all stages have run."""
        return self._stream.outputs()
