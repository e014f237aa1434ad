"""Source → patched copy: open → analyse → choose → plan → write beside → verify → rename."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from onnx_clp._version import __version__
from onnx_clp.analysis import Analysis, analyse, judged
from onnx_clp.correction.budget import HIGHEST_U
from onnx_clp.defaults import ACTIVITY, DEFAULT_SCORE, DEFAULT_THRESHOLD
from onnx_clp.errors import PayloadError, UsageError
from onnx_clp.guard import guarded
from onnx_clp.methods import CLP
from onnx_clp.model.file import ModelFile, open_source
from onnx_clp.model.graph import MISSING, Graph
from onnx_clp.model.patch import Plan, plan
from onnx_clp.model.place import move_into_place
from onnx_clp.model.save import (
    add_at_end,
    check_bytes,
    data_names,
    forget_metadata,
    is_in_place,
    location_edits,
    metadata_entries,
    rewritten,
)
from onnx_clp.model.source import ByteSource
from onnx_clp.rests import Rest, kept_bias, wanted_of
from onnx_clp.sanitizer import UNMEASURED, Check, Left, Options, SanitizeReport, Silenced
from onnx_clp.silencing import Silencing
from onnx_clp.verify import Choice, Kernels, verify

if TYPE_CHECKING:
    from onnx_clp.correction.corrector import Corrector
    from onnx_clp.preactivation.selection import Selection
    from onnx_clp.rests import Floats


def rewrite(source: ByteSource, digest: Callable[[], str], src: str, dst: str, options: Options) -> SanitizeReport:
    """What ``sanitize`` does with the open ``source``, whose SHA-256 ``digest`` waits for."""
    destination = Path(dst)
    with open_source(source, options.allow_roots, options.limits) as file:
        try:
            in_place = is_in_place(file, destination)
            if in_place:
                destination = destination.resolve()  # the file itself, where the name is a link to it
            if not options.dry_run:
                _check_destination(file, destination, force=options.force, in_place=options.in_place)
        except OSError as error:
            raise UsageError(f"cannot write {dst}: {error.strerror}") from error
        analysis, corrector = _analysis(file, src, options)
        read = _selection(analysis, corrector, options)
        select = partial(_select, analysis, options, read, corrector)
        correction, check_images, walk = None, None, None
        kernels: Kernels = {}
        guard: list[Check] = []
        if corrector is None:
            selection = select(options.u)
            if options.guard:
                selection, *guard = guarded(file, selection, partial(_only, selection), options.input_shapes)
            changes, done = selection.plan, selection.done
        else:
            from onnx_clp.correction.rewriting import checked  # as in _analysis
            from onnx_clp.correction.walking import repaired

            made = repaired(corrector, options.request, options.u, select)
            selection, found, done, walk = made.selection, made.found, made.done, made.walk
            changes, correction, kernels = found.plan, found.correction, found.kernels
            check_images = partial(checked, analysis, found=found, source=corrector.source)
        analysis = selection.analysis
        silenced = tuple(_silenced(choice) for choice in done if choice.channels)
        report = SanitizeReport(
            source=src,
            destination=dst,
            written=False,
            files=(),
            replaced_data=(),
            input_sha256="",
            max_share=options.max_share,
            silenced=silenced,
            left=selection.left,
            unshared=changes.unshared,
            before=analysis.report,
            after=None,
            checks=(),
            correction=correction,
            method=options.method,
            keep_bias=options.keep_bias,
            auto=options.auto,
            selection=selection.read,
            budget=walk,
            warnings=(UNMEASURED,) if corrector is None and done else (),
        )
        if options.dry_run:
            return report
        edits = {location: [*group] for location, group in changes.edits.items() if group}
        names = data_names(file, destination, edits)
        edits.setdefault("", []).extend(location_edits(file, names))
        if options.metadata:
            edits[""] += forget_metadata(file)

        with rewritten(file, edits, names, destination) as written:
            changed = check_bytes(written)
            if options.metadata:
                add_at_end(written, metadata_entries(_note(options, digest(), report)))
            checks, after = verify(analysis, done, written, options.input_shapes, dst, kernels)
            if check_images is not None:
                checks = (*checks, check_images(written.model))
            bytes_checked = Check(
                "bytes",
                passed=True,
                detail=f"{changed:,} bytes replaced; but for the note at the end, every other byte is the input's",
            )
            move_into_place(written, destination, force=options.force, in_place=in_place)
        return replace(
            report,
            written=True,
            files=(*(new for old, new in names.items() if not (in_place and new == old)), destination.name),
            replaced_data=tuple(old for old, new in names.items() if in_place and new != old),
            input_sha256=digest(),
            checks=(*guard, bytes_checked, *checks),
            after=after,
        )


def _analysis(file: ModelFile, name: str, options: Options) -> tuple[Analysis, Corrector | None]:
    """The scan, and the images, if there are any: a score may be of them."""
    by_activity = options.score == ACTIVITY
    score = DEFAULT_SCORE if by_activity else options.score
    given = {"name": name, "score": score, "threshold": options.threshold}
    analysis = analyse(file, options.u, count_dead=options.count_dead, **given)
    if options.request.images is None:
        return analysis, None
    from onnx_clp.correction.rewriting import corrector_of  # onnxruntime and Pillow, where they are needed

    corrector = corrector_of(analysis, options.request, _doubtful(analysis.graph))
    return corrector.judged_by_activity() if by_activity else analysis, corrector


def _select(
    analysis: Analysis, options: Options, read: Selection | None, corrector: Corrector | None, u: float | None
) -> Silencing:
    """What is silenced at ``u``; nothing for None, where the budget does not allow what the highest u flags.

    ``read`` is what EP or BNP read; None where bounds say what stands out.
    """
    value = max(HIGHEST_U, analysis.report.u) if u is None else u
    if read is not None:
        from onnx_clp.preactivation.selecting import at  # as in _analysis

        read = at(read, value)
    if value != analysis.report.u:
        analysis = replace(analysis, report=replace(analysis.report, u=value, layers=judged(analysis, value)))
    wanted, left = _choose(analysis, options.max_share, read)
    if u is None:
        left = [*left, *(Left(each.part.site.node.name, each.channels, _BEYOND) for each in wanted)]
        wanted = []
    changes, done, refused = _plan(analysis, _resting(analysis, wanted, options, read, corrector))
    return Silencing(analysis, changes, done, (*left, *refused), read)


def _only(whole: Silencing, flags: Collection[tuple[int, int]]) -> Silencing:
    """Of ``whole`` only ``flags``: positions in ``Analysis.measured``, and channels; what is left is not told."""
    rests = {id(choice.part): choice.rest for choice in whole.done}
    wanted = []
    for position, part in enumerate(whole.analysis.measured):
        channels = tuple(sorted(channel for other, channel in flags if other == position))
        if channels:
            wanted.append(Choice(part, channels, rest=rests[id(part)]))
    changes, done, refused = _plan(whole.analysis, wanted)
    return Silencing(whole.analysis, changes, done, refused, whole.read)


_BEYOND: Final = "silencing what is flagged does not keep the budget"


def _check_destination(file: ModelFile, destination: Path, *, force: bool, in_place: bool) -> None:
    """Raise UsageError where ``destination`` cannot be written, or would overwrite what nobody asked to."""
    if destination.is_dir():
        raise UsageError(f"{destination} is a folder", "name the file to write")
    if not destination.parent.is_dir():
        raise UsageError(f"the folder {destination.parent} does not exist", "make it first")
    same = destination.exists() and destination.samefile(file.path)
    if same and not in_place:
        raise UsageError(f"{destination} is the input itself", "name another file, or say --in-place")
    sources = (file.source, *map(file.data_file, file.locations()))
    if is_in_place(file, destination):
        if file.locations() and file.path.parent.resolve() != destination.parent:
            advice = "name another file, or the model itself and not the link"
            raise UsageError(f"{file.path} is a link into another folder, but has its data beside the link", advice)
        return
    if any(source.is_at(destination) for source in sources):
        raise UsageError(f"{destination} belongs to the input", "write to another folder or under another name")
    if os.path.lexists(destination) and not force:
        raise UsageError(f"{destination} exists", "name another file, or say --force")
    if destination.exists() and not destination.is_file():
        raise UsageError(f"{destination} is no regular file", "name another file")


def _selection(analysis: Analysis, corrector: Corrector | None, options: Options) -> Selection | None:
    """What EP or BNP chooses; None where bounds say it."""
    if options.method == CLP:
        return None
    from onnx_clp.preactivation.scores import Method
    from onnx_clp.preactivation.selecting import selected  # as in _analysis

    clean = None if corrector is None else corrector.source
    return selected(analysis, Method(options.method), options.u, options.request, clean)


def _resting(
    analysis: Analysis,
    wanted: list[Choice],
    options: Options,
    selection: Selection | None,
    corrector: Corrector | None,
) -> list[Choice]:
    """``wanted``, and where their channels rest."""
    if not options.keep_bias:
        return wanted
    positions = {id(part): position for position, part in enumerate(analysis.measured)}
    means: Mapping[int, Floats] = {}
    if selection is not None:
        from onnx_clp.preactivation.selecting import means as means_of

        means = means_of(selection)
    elif corrector is not None:
        means = {position: each.mean for position, each in corrector.simulator.moments().items()}
    return [replace(choice, rest=kept_bias(analysis, positions[id(choice.part)], means)) for choice in wanted]


def _silenced(choice: Choice) -> Silenced:
    """What a report says of ``choice``."""
    values, channels = choice.rest.values, choice.channels
    rests = () if values is None else tuple(float(values[k]) for k in channels)
    return Silenced(choice.part.site.node.name, channels, choice.rest.kind, rests, choice.rest.why)


def _choose(
    analysis: Analysis, max_share: float, selection: Selection | None = None
) -> tuple[list[Choice], list[Left]]:
    """Which flagged, or selected, channels to silence, and of which layers these are more than ``max_share`` allows."""
    selected = None if selection is None else {site.position: site.channels for site in selection.choice.sites}
    chosen: list[Choice] = []
    left: list[Left] = []
    doubtful = _doubtful(analysis.graph)
    for position, (part, layer) in enumerate(zip(analysis.measured, analysis.report.layers, strict=True)):
        if layer.non_finite:
            left.append(Left(layer.name, layer.non_finite, "their numbers are NaN or Inf, which no zero silences"))
        flagged = (channel.index for channel in layer.flagged) if selected is None else selected.get(position, ())
        channels = tuple(sorted(set(flagged) - set(layer.non_finite)))
        if not channels:
            continue
        values = [doubtful[knob.value] for knob in part.site.knobs if knob.value in doubtful]
        if values:
            name = analysis.graph.name_of(values[0])
            reason = f"its constant {name!r} is ambiguous: a runtime that reads it otherwise would keep the channels"
            left.append(Left(layer.name, channels, reason))
            continue
        share = len(channels) / layer.channels
        if share > max_share:
            found = "flagged" if selected is None else "chosen"
            reason = f"{share:.1%} of its channels are {found}, more than the {max_share:.1%} that may be silenced"
            left.append(Left(layer.name, channels, reason))
        else:
            chosen.append(Choice(part, channels))
    return chosen, left


def _doubtful(graph: Graph) -> dict[int, int]:
    """For each value that is made of one that two runtimes may read differently, that one."""
    found = {value: value for value in graph.doubtful}
    for node in graph.nodes if found else ():
        origin = next((found[value] for value in node.inputs if value in found), None)
        if origin is not None:
            for value in node.outputs:
                if value != MISSING:  # an input that is left out is made of nothing
                    found.setdefault(value, origin)
    return found


def _plan(analysis: Analysis, wanted: list[Choice]) -> tuple[Plan, tuple[Choice, ...], tuple[Left, ...]]:
    """Plan the edits; a site whose channels cannot be silenced is left, and the others planned anew without it.

    Where they cannot rest at their bias, they rest at 0.
    """
    positions = {id(part): position for position, part in enumerate(analysis.measured)}
    refused: list[Left] = []
    analysis.constants.meter.begin()
    while True:
        try:
            changes = plan(
                analysis.constants,
                analysis.graph,
                [wanted_of(analysis, positions[id(each.part)], each.channels, each.rest) for each in wanted],
            )
        except PayloadError as error:
            raise UsageError(f"a constant cannot be rewritten: {error.message}") from error
        if not changes.refused:
            return changes, tuple(wanted), tuple(refused)
        again = []
        for number, choice in enumerate(wanted):
            if number not in changes.refused:
                again.append(choice)
            elif choice.rest.values is not None:
                again.append(replace(choice, rest=Rest(why=changes.refused[number])))
            else:
                refused.append(Left(choice.part.site.node.name, choice.channels, changes.refused[number]))
        wanted = again


def _note(options: Options, digest: str, report: SanitizeReport) -> dict[str, str]:
    """What the metadata of the written model says of it; nothing here is ever read back as a fact."""
    corrected = {}
    if report.correction is not None:
        names = [part.layer for part in report.correction.corrected]
        if report.correction.ridge is not None:
            corrected["ridge"] = repr(report.correction.ridge)
            layers = [part.layer for part in report.correction.refitted]
            corrected["refitted"] = json.dumps(layers, separators=(",", ":"))
        corrected["images"] = repr(report.correction.images.count)
        corrected["corrected"] = json.dumps(names, separators=(",", ":"))
    return {
        "version": __version__,
        **_silencing_note(options, report),
        **_method_note(options, report),
        **({} if options.score == DEFAULT_SCORE else {"score": options.score}),
        **({} if options.threshold == DEFAULT_THRESHOLD else {"threshold": options.threshold}),
        "input_sha256": digest,
        "silenced": json.dumps({part.layer: part.channels for part in report.silenced}, separators=(",", ":")),
        **corrected,
    }


def _method_note(options: Options, report: SanitizeReport) -> dict[str, str]:
    """What the note says of a method that is not CLP, and of channels that do not rest at 0."""
    found = {} if options.method == CLP else {"method": options.method}
    if report.selection is not None:
        found[f"{options.method}_images"] = repr(report.selection.images.count)
    rests = {part.layer: part.rests for part in report.silenced if part.rests}
    return found | ({"rests": json.dumps(rests, separators=(",", ":"))} if rests else {})


def _silencing_note(options: Options, report: SanitizeReport) -> dict[str, str]:
    """The u, and the budget that it was found by."""
    if report.budget is None:
        return {"u": repr(options.u)}
    taken, budget = report.budget.taken, report.budget.budget
    said = {"min_agreement": budget.min_agreement, "max_accuracy_drop": budget.max_accuracy_drop}
    return {
        "u": "none" if taken is None or taken.u is None else repr(taken.u),
        **{name: repr(float(value)) for name, value in said.items() if value is not None},
    }
