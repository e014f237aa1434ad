"""Path → patched copy → SanitizeReport: silence the flagged channels, change nothing else, verify what was written.

open → analyse → choose → plan → write beside → verify (bytes, a new scan, onnx.checker, onnxruntime) → rename.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from onnx_clp._version import __version__
from onnx_clp.errors import UsageError
from onnx_clp.judge import DEFAULT_U
from onnx_clp.model.file import open_model
from onnx_clp.model.patch import Plan, plan
from onnx_clp.model.save import data_names, location_edits, metadata_edits, move_into_place, rewritten
from onnx_clp.model.tensors import PayloadError
from onnx_clp.scan import Analysis, ScanReport, analyse, check_u
from onnx_clp.verify import Check, Choice, sha256, verify

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


def sanitize(  # each option is one of the command's
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

    Only the numbers that silence a channel change (γ and β of its BN, or its row of a folded kernel and its bias),
    apart from tensors that must be un-shared, the names of external data files, and a note in ``metadata_props``.
    The written file is verified before it takes its place.

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
        digest = sha256(file.source)
        edits = {location: [*group] for location, group in changes.edits.items()}
        edits.setdefault("", []).extend(location_edits(file, names))
        if metadata:
            edits[""] += metadata_edits(file, _note(u, digest, silenced))
        with rewritten(file, {key: tuple(group) for key, group in edits.items()}, names, destination) as rewrite:
            shapes = {name: tuple(shape) for name, shape in (input_shapes or {}).items()}
            checks, after, output_digest = verify(analysis, done, rewrite, shapes, os.fspath(dst))
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


def _choose(analysis: Analysis, max_share: float) -> tuple[list[Choice], list[Left]]:
    """Which flagged channels to silence, and which layers flag more than ``max_share`` allows."""
    chosen: list[Choice] = []
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
            chosen.append(Choice(part, channels))
    return chosen, left


def _plan(analysis: Analysis, wanted: list[Choice]) -> tuple[Plan, tuple[Choice, ...], tuple[Left, ...]]:
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
