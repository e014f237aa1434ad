"""Silenced channels and images → what changes in which constants.

The sanitized model is simulated, what it takes to repair it is planned, and where a site or a kernel cannot be written,
all is done anew without it: what comes after it is measured behind what will be there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from onnx_clp.analysis import Analysis
from onnx_clp.correction.activity import judged_by_activity
from onnx_clp.correction.answers import Judged, Verdict
from onnx_clp.correction.convolutions import Convolution, convolutions
from onnx_clp.correction.cuts import Variant
from onnx_clp.correction.moments import Affine, Array, Floats
from onnx_clp.correction.recipe import Recipe, recipe, with_refit, written_kernel
from onnx_clp.correction.refit import Refit
from onnx_clp.correction.repair import Repair
from onnx_clp.correction.request import Corrected, Correction, ImageRequest, Refitted, Uncorrected
from onnx_clp.correction.simulator import Simulation, Simulator
from onnx_clp.correction.source import ImageSource, open_variant, read_source
from onnx_clp.correction.stream import Outputs
from onnx_clp.errors import UsageError
from onnx_clp.evaluation.classifier import class_output
from onnx_clp.evaluation.providers import version
from onnx_clp.model.knob import Wanted
from onnx_clp.model.patch import Plan, plan
from onnx_clp.model.save import temporary_copy
from onnx_clp.rests import AT_ZERO, Rest, wanted_of

Channels = Mapping[int, tuple[int, ...]]
"""Channels by the position of their site in ``Analysis.measured``."""

At = Mapping[int, Rest]
"""Where they rest, likewise; at 0 where it is not said."""


@dataclass(frozen=True, slots=True, eq=False)
class Planned:
    """What silences and corrects.

    Attributes:
        plan: The edits.
        affines: Of the sites that are corrected, by position in ``Analysis.measured``.
        kernels: Those that are refitted as they shall be in the file, by the index of their node.
        outputs: What the written model shall make of the images; None where nothing was simulated.
        correction: What is told of it.
        verdict: How its answers compare with those of the original; None where they cannot be, or nothing was
            simulated.
    """

    plan: Plan
    affines: Mapping[int, Affine]
    kernels: Mapping[int, Array]
    outputs: Outputs | None
    correction: Correction
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Item:
    """What is wanted of one site, of one convolution, or of both where the site's own convolution is refitted.

    Attributes:
        wanted: The changes.
        position: Of the site, in ``Analysis.measured``; None where it is of no site.
        index: Of the convolution's node; None where none is refitted.
    """

    wanted: Wanted
    position: int | None = None
    index: int | None = None


class Corrector:
    """A model and images, for any number of choices of channels.

    Attributes:
        source: The images.
    """

    def __init__(
        self, analysis: Analysis, request: ImageRequest, barred: Mapping[int, str], doubtful: Collection[int] = ()
    ) -> None:
        """Load the model and read the images.

        ``barred`` are sites that must not be changed, and why; ``doubtful`` values that another runtime may read
        otherwise. Raises as `read_source` does.
        """
        self.source: ImageSource = read_source(analysis.file.path, request)
        self._analysis = analysis
        self._request = request
        self._barred = barred
        self._doubtful = doubtful
        self._convolutions: Mapping[int, Convolution] = {}
        self._unfit: Mapping[int, str] = {}
        self._site_of = {
            part.site.node.index: position
            for position, part in enumerate(analysis.measured)
            if part.site.node.op_type == "Conv"
        }
        self._judged = _judged(self.source, request)
        self._made: Simulator | None = None

    @property
    def simulator(self) -> Simulator:
        """The model in stages, loaded when it is first asked for. Raises as `Simulator` does."""
        if self._made is None:
            own = open_variant(self._analysis.file.path, self._request.providers)
            if self._request.refits:
                self._convolutions, self._unfit = convolutions(self._analysis, own.pieces, self._doubtful)
            fitted = tuple(self._convolutions.values())
            self._made = Simulator(self._analysis, own, self.source.batches, fitted)
        return self._made

    def judged_by_activity(self) -> Analysis:
        """The analysis, its channels judged by what they do on the images. Raises as `Simulator` does."""
        return judged_by_activity(self._analysis, self.simulator.moments(), self.simulator.left)

    def unchanged(self) -> Verdict | None:
        """How the original compares with itself; None where its outputs tell no classes. Raises as `Simulator` does."""
        outputs = self.simulator.outputs()
        return None if self._judged is None else self._judged.verdict(outputs, outputs)

    def nothing(self, plain: Plan) -> Planned:
        """Change nothing; ``plain`` is the plan that silences no channel."""
        return Planned(plain, {}, {}, None, self._told({}, (), None, None))

    def plan(self, silenced: Channels, plain: Plan, at: At | None = None) -> Planned:
        """Repair what silencing ``silenced``, which then rest ``at``, shifts, of which ``plain`` is the plan.

        Raises:
            ModelFileError: onnxruntime does not run the model in stages.
            UsageError: There is not enough memory for so many images.
        """
        request, at = self._request, at or {}
        rests = {position: rest.values for position, rest in at.items() if rest.values is not None}
        if not silenced and not request.refits:
            return self.nothing(plain)
        with self._variant(silenced, plain) as variant:
            recipes, left = self._recipes()
            kept = dict(self._unfit)
            while True:
                repair = Repair(request.repair != "none", request.penalty, left, kept)
                simulation = self.simulator.run(silenced, repair, variant, rests)
                affines = {position: each for position, each in simulation.affines.items() if each.changed}
                items = self._items(silenced, at, affines, recipes, simulation.refits)
                self._analysis.constants.meter.begin()
                changes = plan(self._analysis.constants, self._analysis.graph, [item.wanted for item in items])
                if not changes.refused:
                    verdict = self._verdict(simulation)
                    told = self._told(affines, changes.added, simulation, verdict)
                    kernels = self._kernels(silenced, affines, simulation.refits)
                    return Planned(changes, affines, kernels, simulation.sanitized, told, verdict)
                for number, reason in changes.refused.items():
                    _leave(items[number], reason, affines, left, kept)

    def _recipes(self) -> tuple[dict[int, Recipe], dict[int, str]]:
        """How each site is corrected, by position; and why the others cannot be."""
        left = {**self._barred, **self.simulator.left}
        recipes: dict[int, Recipe] = {}
        for position, part in enumerate(self._analysis.measured):
            if position in left:
                continue
            found = recipe(part.site, self._analysis.graph, self._analysis.constants)
            if isinstance(found, str):
                left[position] = found
            else:
                recipes[position] = found
        return recipes, left

    def _items(
        self,
        silenced: Channels,
        at: At,
        affines: Mapping[int, Affine],
        recipes: Mapping[int, Recipe],
        refits: Mapping[int, Refit],
    ) -> list[_Item]:
        """What is wanted of each site and of each convolution that is refitted."""
        items: dict[int, _Item] = {}
        for position in sorted({*silenced, *affines}):
            channels, rest = silenced.get(position, ()), at.get(position, AT_ZERO)
            if position in affines:
                wanted = recipes[position].wanted(affines[position], channels, rest.values)
            else:
                wanted = wanted_of(self._analysis, position, channels, rest)
            items[position] = _Item(wanted, position)
        alone: list[_Item] = []
        for index, refit in refits.items():
            own = self._site_of.get(index)
            item = items.get(own, _Item(Wanted(()))) if own is not None else _Item(Wanted(()))
            part, (factors, channels) = self._convolutions[index], self._of_site(index, silenced, affines)
            wanted = with_refit(item.wanted.changes, part, refit, factors, channels)
            if own is not None and own in items:
                items[own] = _Item(wanted, own, index)
            else:
                alone.append(_Item(wanted, None, index))
        return [*items.values(), *alone]

    def _of_site(
        self, index: int, silenced: Channels, affines: Mapping[int, Affine]
    ) -> tuple[Floats | None, tuple[int, ...]]:
        """The factors, if there are any, and the silenced channels of the site whose own node ``index`` is."""
        position = self._site_of.get(index)
        if position is None:
            return None, ()
        factors = affines[position].factors if position in affines else None
        return factors, silenced.get(position, ())

    def _kernels(
        self, silenced: Channels, affines: Mapping[int, Affine], refits: Mapping[int, Refit]
    ) -> dict[int, Array]:
        """The refitted kernels as they shall be written."""
        return {
            index: written_kernel(self._convolutions[index], found, *self._of_site(index, silenced, affines))
            for index, found in refits.items()
        }

    @contextmanager
    def _variant(self, silenced: Channels, plain: Plan) -> Iterator[Variant | None]:
        """The silenced model, where the values of some silenced channels cannot be observed."""
        if not self.simulator.hidden(silenced):
            yield None
            return
        with temporary_copy(self._analysis.file, plain.edits) as written:
            yield open_variant(written.model, self._request.providers)

    def _verdict(self, simulation: Simulation) -> Verdict | None:
        return None if self._judged is None else self._judged.verdict(simulation.original, simulation.sanitized)

    def _told(
        self,
        affines: Mapping[int, Affine],
        biases: tuple[str, ...],
        simulation: Simulation | None,
        verdict: Verdict | None,
    ) -> Correction:
        names = [part.site.node.name for part in self._analysis.measured]
        nodes = self._analysis.graph.nodes
        left, kept, refits = (
            ({}, {}, {}) if simulation is None else (simulation.left, simulation.kept, simulation.refits)
        )
        return Correction(
            repair=self._request.repair,
            ridge=self._request.penalty,
            augment=self._request.copies,
            images=self.source.used,
            preprocessing=self.source.preprocessing,
            corrected=tuple(_corrected(names[position], affines[position]) for position in sorted(affines)),
            left=tuple(Uncorrected(names[position], left[position]) for position in sorted(left)),
            refitted=tuple(Refitted(nodes[index].name, refits[index].change) for index in sorted(refits)),
            kept=tuple(Uncorrected(nodes[index].name, kept[index]) for index in sorted(kept)),
            biases=biases,
            agreement=None if verdict is None else verdict.agreement,
            warnings=self.source.warnings,
            providers=self.source.session.providers,
            onnxruntime=version(),
        )


def _leave(item: _Item, reason: str, affines: Mapping[int, Affine], left: dict[int, str], kept: dict[int, str]) -> None:
    """Do without what could not be planned. Raises UsageError where it is the silencing itself."""
    repaired = item.position is not None and item.position in affines
    if not repaired and item.index is None:
        raise UsageError(f"the copy cannot be corrected: {reason}", "leave out --images")
    if repaired and item.position is not None:
        left[item.position] = reason
    if item.index is not None:
        kept[item.index] = reason


def _corrected(name: str, found: Affine) -> Corrected:
    factors = found.factors[list(found.changed)]
    return Corrected(name, len(found.changed), float(factors.min()), float(factors.max()), found.clamped)


def _judged(source: ImageSource, request: ImageRequest) -> Judged | None:
    """What answers are compared on; None where no output has a number for each class.

    Raises UsageError for a name that is none, and where a budget needs such an output.
    """
    try:
        output = class_output(source.session, request.output_name).name
    except UsageError:
        if request.output_name is not None or request.budget.given:
            raise
        return None
    return Judged(output, source.count, source.judged, source.labels, source.classes)
