"""Path → patched copy → SanitizeReport: silence the flagged channels, change nothing else, verify what was written.

open → analyse → choose → plan → write beside → verify (bytes, a new scan, onnx.checker, onnxruntime) → rename.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import onnx

from onnx_clp import runtime
from onnx_clp._version import __version__
from onnx_clp.errors import UsageError, VerificationError
from onnx_clp.judge import DEFAULT_U
from onnx_clp.kernels import Measured
from onnx_clp.model.file import ModelFile, open_model
from onnx_clp.model.graph import MISSING
from onnx_clp.model.patch import Plan, plan
from onnx_clp.model.save import (
    Rewrite,
    check_bytes,
    data_names,
    location_edits,
    metadata_edits,
    move_into_place,
    rewritten,
)
from onnx_clp.model.tensors import PayloadError, complete
from onnx_clp.model.wire import COPY_BLOCK, ByteSource
from onnx_clp.scan import Analysis, ScanReport, analyse, check_u

DEFAULT_MAX_SHARE: Final = 0.1
"""Share of a layer's channels that may be silenced: at u = 3 a layer of any shape flags fewer (Cantelli: 1 in 10)."""


@dataclass(frozen=True, slots=True)
class Silenced:
    """The channels of one layer that were silenced.

    Attributes:
        layer: The layer's name.
        channels: Ascending.
    """

    layer: str
    channels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Left:
    """Flagged channels that were not silenced.

    Attributes:
        layer: The layer's name.
        channels: Ascending.
        reason: Why.
    """

    layer: str
    channels: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Check:
    """One verification of the written file.

    Attributes:
        name: ``bytes``, ``scan``, ``checker``, ``onnxruntime-load`` or ``onnxruntime-run``.
        passed: True; None where it could not be made. A check that fails raises VerificationError instead.
        detail: What was seen, or why the check could not be made.
    """

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True, slots=True)
class SanitizeReport:
    """What a rewrite did.

    Attributes:
        source: The input, as it was given.
        destination: The output, as it was given.
        written: Whether it was written; False for a dry run.
        files: Names of the files written, the model last; empty for a dry run.
        input_sha256: Of the input model, in hexadecimal; empty for a dry run.
        output_sha256: Of the written model, in hexadecimal; empty for a dry run.
        max_share: The share of a layer's channels that could be silenced at most.
        silenced: Per layer.
        left: Flagged and not silenced, per layer.
        unshared: Tensors that fed something else too; the silenced nodes read copies of their own.
        before: The scan of the input.
        after: The scan of the output; None for a dry run.
        checks: The verifications.
    """

    source: str
    destination: str
    written: bool
    files: tuple[str, ...]
    input_sha256: str
    output_sha256: str
    max_share: float
    silenced: tuple[Silenced, ...]
    left: tuple[Left, ...]
    unshared: tuple[str, ...]
    before: ScanReport
    after: ScanReport | None
    checks: tuple[Check, ...]

    @property
    def silenced_channels(self) -> int:
        """How many channels were silenced."""
        return sum(len(part.channels) for part in self.silenced)


@dataclass(frozen=True, slots=True, eq=False)
class _Choice:
    """A measured site and the channels of it to silence."""

    part: Measured
    channels: tuple[int, ...]


def sanitize(  # noqa: PLR0913  # each option is one of the command's
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    u: float = DEFAULT_U,
    *,
    count_dead: bool = False,
    max_share: float = DEFAULT_MAX_SHARE,
    metadata: bool = True,
    force: bool = False,
    in_place: bool = False,
    dry_run: bool = False,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
) -> SanitizeReport:
    """Write a copy of an ONNX model in which the flagged channels are silent: their output is exactly 0.

    Only the numbers that silence a channel change (γ and β of its BN, or its row of a folded kernel and its bias), apart
    from tensors that must be un-shared, the names of external data files, and a note in ``metadata_props``. The written
    file is verified before it takes its place.

    Args:
        src: The ONNX file.
        dst: The file to write. External data is written beside it, under names made to fit.
        u: A channel is flagged where its bound exceeds mean + u·std of its layer; finite, ≥ 0.
        count_dead: Count channels of bound 0 in mean and std, as the published arithmetic does.
        max_share: The share of a layer's channels that may be silenced, 0 to 1; a layer beyond it is left.
        metadata: Write the note: version, u, SHA-256 of the input, what was silenced.
        force: Overwrite ``dst`` and its data files where they exist.
        in_place: Allow ``dst`` to be ``src``.
        dry_run: Write nothing, only say what would change.
        input_shapes: Shapes by input name for the run in onnxruntime, where the model leaves them open.

    Raises:
        ModelFileError: ``src`` cannot be read, or is no ONNX model.
        UsageError: An argument cannot be; ``dst`` exists, or cannot be written.
        VerificationError: The written file did not pass its verification; it was removed.
    """
    source, destination = Path(src), Path(dst)
    check_u(u)
    if not 0 <= max_share <= 1:
        raise UsageError(f"the largest share is {max_share}", "give a share between 0 and 1")
    with open_model(source) as file:
        names = data_names(file, destination)
        if not dry_run:
            _check_destination(source, destination, names, force=force, in_place=in_place)
        analysis = analyse(file, u, count_dead=count_dead, name=os.fspath(src))
        wanted, left = _choose(analysis, max_share)
        changes, done, refused = _plan(analysis, wanted)
        silenced = tuple(Silenced(choice.part.site.node.name, choice.channels) for choice in done)
        report = SanitizeReport(
            source=os.fspath(src),
            destination=os.fspath(dst),
            written=False,
            files=(),
            input_sha256="",
            output_sha256="",
            max_share=max_share,
            silenced=silenced,
            left=(*left, *refused),
            unshared=changes.unshared,
            before=analysis.report,
            after=None,
            checks=(),
        )
        if dry_run:
            return report
        digest = _sha256(file.source)
        edits = {location: [*group] for location, group in changes.edits.items()}
        edits.setdefault("", []).extend(location_edits(file, names))
        if metadata:
            edits[""] += metadata_edits(file, _note(u, digest, silenced))
        with rewritten(file, {key: tuple(group) for key, group in edits.items()}, names, destination) as rewrite:
            shapes = {name: tuple(shape) for name, shape in (input_shapes or {}).items()}
            checks, after, output_digest = _verify(analysis, done, rewrite, shapes, os.fspath(dst))
            move_into_place(rewrite, destination)
            files = tuple(path.name for _, _, path in rewrite.files)
    return _with(report, files=files, digests=(digest, output_digest), checks=checks, after=after)


def _with(
    report: SanitizeReport,
    *,
    files: tuple[str, ...],
    digests: tuple[str, str],
    checks: tuple[Check, ...],
    after: ScanReport,
) -> SanitizeReport:
    """``report`` after its files were written."""
    return replace(
        report, written=True, files=files, input_sha256=digests[0], output_sha256=digests[1], checks=checks, after=after
    )


def _check_destination(
    source: Path, destination: Path, names: Mapping[str, str], *, force: bool, in_place: bool
) -> None:
    """Raise UsageError where ``destination`` cannot be written, or would overwrite what nobody asked to."""
    if destination.is_dir():
        raise UsageError(f"{destination} is a folder", "name the file to write")
    if not destination.parent.is_dir():
        raise UsageError(f"the folder {destination.parent} does not exist", "make it first")
    same = destination.exists() and destination.samefile(source)
    if same and not in_place:
        raise UsageError(f"{destination} is the input itself", "name another file, or say --in-place")
    if same:
        return
    targets = [destination, *(destination.parent / name for name in names.values())]
    existing = [target for target in targets if target.exists() or target.is_symlink()]
    if existing and not force:
        raise UsageError(f"{existing[0]} exists", "name another file, or say --force")


def _choose(analysis: Analysis, max_share: float) -> tuple[list[_Choice], list[Left]]:
    """Which flagged channels to silence, and which layers flag more than ``max_share`` allows."""
    chosen: list[_Choice] = []
    left: list[Left] = []
    for part, layer in zip(analysis.measured, analysis.report.layers, strict=True):
        channels = tuple(sorted(channel.index for channel in layer.flagged))
        if not channels:
            continue
        share = len(channels) / layer.channels
        if share > max_share:
            reason = f"{share:.1%} of its channels are flagged, more than the {max_share:.1%} that may be silenced"
            left.append(Left(layer.name, channels, reason))
        else:
            chosen.append(_Choice(part, channels))
    return chosen, left


def _plan(analysis: Analysis, wanted: list[_Choice]) -> tuple[Plan, tuple[_Choice, ...], tuple[Left, ...]]:
    """Plan the edits; a site whose channels cannot be silenced is left, and the others planned anew without it."""
    refused: list[Left] = []
    while True:
        try:
            changes = plan(
                analysis.constants, analysis.graph, [(choice.part.site.knobs, choice.channels) for choice in wanted]
            )
        except PayloadError as error:
            raise UsageError(f"a constant cannot be rewritten: {error.message}") from error
        if not changes.refused:
            return changes, tuple(wanted), tuple(refused)
        for position, reason in changes.refused.items():
            choice = wanted[position]
            refused.append(Left(choice.part.site.node.name, choice.channels, reason))
        wanted = [choice for position, choice in enumerate(wanted) if position not in changes.refused]


def _note(u: float, digest: str, silenced: tuple[Silenced, ...]) -> dict[str, str]:
    """What the metadata of the written model says of it; nothing here is ever read back as a fact."""
    return {
        "version": __version__,
        "u": repr(u),
        "input_sha256": digest,
        "silenced": json.dumps({part.layer: part.channels for part in silenced}, separators=(",", ":")),
    }


def _sha256(source: ByteSource) -> str:
    digest = hashlib.sha256()
    for start in range(0, source.size, COPY_BLOCK):
        digest.update(source.read(start, min(COPY_BLOCK, source.size - start)))
    return digest.hexdigest()


# -- verification ------------------------------------------------------------------------------------------------------


def _verify(
    analysis: Analysis,
    done: Sequence[_Choice],
    rewrite: Rewrite,
    input_shapes: Mapping[str, tuple[int, ...]],
    name: str,
) -> tuple[tuple[Check, ...], ScanReport, str]:
    """Verify the written files. Raises VerificationError where one is not what was planned."""
    changed = check_bytes(rewrite)
    checks = [Check("bytes", True, f"{changed} bytes replaced, every other byte is the input's")]  # noqa: FBT003
    with open_model(rewrite.model) as written:
        report = analysis.report
        again = analyse(written, report.u, count_dead=report.count_dead, name=name)
        checks.append(_check_scan(analysis, again, done))
        checks.append(_check_format(analysis.file, written))
        digest = _sha256(written.source)
        checks += _check_runtime(analysis, done, rewrite, input_shapes)
        return tuple(checks), again.report, digest


def _check_scan(before: Analysis, after: Analysis, done: Sequence[_Choice]) -> Check:
    """The same layers; silenced channels have bound 0; no bound grew."""
    names = [part.site.node.name for part in before.measured]
    if names != [part.site.node.name for part in after.measured] or before.report.skipped != after.report.skipped:
        raise VerificationError("a new scan of the written file finds other layers than the input has")
    silent = {id(choice.part): choice.channels for choice in done}
    for old, new in zip(before.measured, after.measured, strict=True):
        channels = list(silent.get(id(old), ()))
        if np.any(new.bounds[channels] != 0):
            raise VerificationError(f"a channel of {old.site.node.name!r} is not silent in the written file")
        # A channel silenced upstream takes its share out of the sums behind it; the last bits may differ with the order.
        grown = new.bounds > old.bounds * (1 + 1e-12)
        if np.any(grown):
            raise VerificationError(f"a bound of {old.site.node.name!r} grew in the written file")
    count = sum(len(choice.channels) for choice in done)
    return Check("scan", True, f"a new scan finds the {count} silenced channels dead and no bound grown")  # noqa: FBT003


def _check_format(source: ModelFile, written: ModelFile) -> Check:
    """onnx.checker on both models without their weights: the result must pass where the input does."""
    refusal = _format_error(source)
    if refusal:
        return Check("checker", None, f"onnx.checker refuses the input already: {refusal}")
    refusal = _format_error(written)
    if refusal:
        raise VerificationError(f"onnx.checker refuses the written file: {refusal}")
    return Check("checker", True, "onnx.checker accepts it")  # noqa: FBT003


def _format_error(file: ModelFile) -> str:
    """What onnx.checker says against the model; empty where it accepts it."""
    model = onnx.ModelProto()
    model.CopyFrom(file.proto)
    for tensor in _tensors(model):
        # The weights stay on disk: an element of eight bytes, the size of the ticket, stands in for each tensor.
        if tensor.raw_data or tensor.data_location == onnx.TensorProto.EXTERNAL:
            name = tensor.name
            tensor.Clear()
            tensor.MergeFrom(onnx.TensorProto(name=name, data_type=onnx.TensorProto.INT64, raw_data=bytes(8)))
    for sparse in model.graph.sparse_initializer:
        for part in (sparse.values, sparse.indices):
            part.CopyFrom(complete(file, part))
    try:
        onnx.checker.check_model(model.SerializeToString())
    except Exception as error:  # noqa: BLE001  # ValidationError, or what the C++ side throws: all are its answer
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return ""


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every dense tensor of ``model``, its subgraphs and functions."""
    graphs = [model.graph]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            nodes += graph.node
            continue
        for attribute in nodes.pop().attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            graphs += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _check_runtime(
    analysis: Analysis, done: Sequence[_Choice], rewrite: Rewrite, input_shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Check]:
    """Load and run the written model, where onnxruntime is installed and loads the input."""
    if not runtime.available():
        yield Check("onnxruntime-load", None, "onnxruntime is not installed")
        return
    refusal = runtime.load_error(rewrite.model)
    if refusal:
        original = runtime.load_error(analysis.file.path)
        if not original:
            raise VerificationError(f"onnxruntime does not load the written file: {refusal}")
        yield Check("onnxruntime-load", None, f"onnxruntime does not load the input either: {original}")
        return
    yield Check("onnxruntime-load", True, "onnxruntime loads it")  # noqa: FBT003
    observed = list(_observed(analysis, done))
    try:
        count = runtime.check_silence(rewrite.model, observed, input_shapes, rewrite.folder)
    except runtime.NotRun as reason:
        yield Check("onnxruntime-run", None, str(reason))
        return
    rest = sum(len(choice.channels) for choice in done) - count
    detail = f"{count} silenced channels are silent on random input"
    yield Check("onnxruntime-run", True, detail + (f"; {rest} cannot be observed there" if rest else ""))  # noqa: FBT003


def _observed(analysis: Analysis, done: Sequence[_Choice]) -> Iterator[runtime.Observed]:
    """The outputs of the silenced channels that can be made outputs of the model: those of the main graph."""
    for choice in done:
        site = choice.part.site
        maker = analysis.graph.producers.get(site.output)
        if site.output == MISSING or maker is None or maker.layout is None or not maker.layout.in_main_graph:
            continue
        rest = 0.0
        if site.rest != MISSING:
            rest = float(analysis.constants.array(site.rest).ravel()[0])
        yield runtime.Observed(analysis.graph.name_of(site.output), site.axis, choice.channels, rest)
