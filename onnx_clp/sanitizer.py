"""Path → patched copy → SanitizeReport: silence the flagged channels, change nothing else, verify what was written.

This module is light: the input is being hashed while the heavy ones are imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from onnx_clp.auto import LEAST_LABELLED, Has
from onnx_clp.correction.budget import Budget, Walk
from onnx_clp.correction.request import MOST_IMAGES, NO_IMAGES, Correction, Given, ImageRequest
from onnx_clp.defaults import (
    ACTIVITY,
    DEFAULT_MAX_SHARE,
    DEFAULT_SCORE,
    DEFAULT_THRESHOLD,
    SCORES,
    check_score,
    check_threshold,
    check_u,
)
from onnx_clp.errors import UsageError
from onnx_clp.limits import DEFAULT_LIMITS, Limits
from onnx_clp.methods import AUTO, CLP, DEFAULT_METHOD, Said, settled
from onnx_clp.model.source import ByteSource, sha256_meanwhile

if TYPE_CHECKING:
    from onnx_clp.analysis import ScanReport
    from onnx_clp.evaluation.attack import Attack
    from onnx_clp.preactivation.selection import Selection


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a rewrite; see ``sanitize``."""

    u: float
    count_dead: bool
    max_share: float
    metadata: bool
    force: bool
    in_place: bool
    dry_run: bool
    input_shapes: Mapping[str, tuple[int, ...]]
    allow_roots: tuple[Path, ...]
    limits: Limits
    request: ImageRequest = NO_IMAGES
    score: str = DEFAULT_SCORE
    threshold: str = DEFAULT_THRESHOLD
    method: str = CLP
    keep_bias: bool = False
    auto: str = ""
    guard: bool = True


UNMEASURED: Final = (
    "what this costs in accuracy was not measured (at u = 3 small clean networks lost 0.8 to 4.7 points, attacked ones "
    "up to 61: docs/benchmarks.md); give clean images, --images PATH"
)
"""The warning of a copy that was made without images."""


@dataclass(frozen=True, slots=True)
class Silenced:
    """The channels of one layer that were silenced.

    Attributes:
        layer: The layer's name.
        channels: Ascending.
        rest: What they are now: ``zero``, or, their bias kept, ``bias`` (that of their BatchNormalization) or ``mean``
            (of their output on the images, where that is folded in).
        rests: Of each of them that number; empty where it is 0.
        why: Why they are 0 though their bias was to be kept; empty where it was not, or is.
    """

    layer: str
    channels: tuple[int, ...]
    rest: str = "zero"
    rests: tuple[float, ...] = ()
    why: str = ""


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
        replaced_data: Names of data files that the model referred to before it was rewritten in place. They were left
            as they are, since another model may use them.
        input_sha256: Of the input model, in hexadecimal; empty for a dry run.
        max_share: The share of a layer's channels that could be silenced at most.
        silenced: Per layer.
        left: Flagged and not silenced, per layer.
        unshared: Tensors that fed something else too; the silenced nodes read copies of their own.
        before: The scan of the input.
        after: The scan of the output; None for a dry run.
        checks: The verifications.
        correction: What was measured on images and given back; None where no images were given.
        method: By what channels were chosen: ``clp``, ``ep`` or ``bnp``.
        keep_bias: Whether silenced channels keep their bias.
        auto: What ``auto`` chose and why; empty where the method was said.
        selection: What EP or BNP read and chose; None for CLP, of which ``before`` tells it.
        budget: How far a budget allowed to go; None where there was none.
        warnings: What the user should know of the copy.
    """

    source: str
    destination: str
    written: bool
    files: tuple[str, ...]
    replaced_data: tuple[str, ...]
    input_sha256: str
    max_share: float
    silenced: tuple[Silenced, ...]
    left: tuple[Left, ...]
    unshared: tuple[str, ...]
    before: ScanReport
    after: ScanReport | None
    checks: tuple[Check, ...]
    correction: Correction | None = None
    method: str = CLP
    keep_bias: bool = False
    auto: str = ""
    selection: Selection | None = None
    budget: Walk | None = None
    warnings: tuple[str, ...] = ()

    @property
    def analysed(self) -> bool:
        """Whether anything could be judged at all, by the method."""
        return self.before.analysed if self.selection is None else self.selection.analysed

    @property
    def silenced_channels(self) -> int:
        """How many channels were silenced."""
        return sum(len(part.channels) for part in self.silenced)


@dataclass(frozen=True, slots=True)
class Check:
    """One verification of the written file.

    Attributes:
        name: ``bytes``, ``scan``, ``checker``, ``onnxruntime-load``, ``onnxruntime-run``, ``images`` or ``probes``.
        passed: True; None where it could not be made. A check that fails raises VerificationError instead.
        detail: What was seen, or why the check could not be made.
    """

    name: str
    passed: bool | None
    detail: str


def sanitize(  # each option is one of the command's
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    u: float | None = None,
    *,
    score: str | None = None,
    threshold: str | None = None,
    count_dead: bool = False,
    max_share: float | None = None,
    metadata: bool = True,
    force: bool = False,
    in_place: bool = False,
    dry_run: bool = False,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    allow_roots: Sequence[str | os.PathLike[str]] = (),
    limits: Limits = DEFAULT_LIMITS,
    images: Given = None,
    attack: str | os.PathLike[str] | Attack | None = None,
    size: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    layout: str | None = None,
    value_range: tuple[float, float] | None = None,
    resize: int | None = None,
    num_images: int | None = None,
    seed: int = 0,
    providers: Sequence[str] | None = None,
    batch_size: int | None = None,
    output_name: str | None = None,
    repair: str | None = None,
    ridge: float | None = None,
    augment: int | None = None,
    method: str = DEFAULT_METHOD,
    suspected_images: Given = None,
    num_suspected: int | None = None,
    keep_bias: bool | None = None,
    min_agreement: float | None = None,
    max_accuracy_drop: float | None = None,
    hold_out: float | None = None,
    guard: bool = True,
) -> SanitizeReport:
    """Write a copy of an ONNX model in which the flagged channels are silent: their output is exactly 0, or their bias.

    Only the numbers that silence a channel change (γ and β of its BN, or its row of a folded kernel and its bias),
    apart from tensors that must be un-shared, the names of external data files, and a note in ``metadata_props``.
    The written file is verified before it takes its place.

    With ``images`` the mean and variance that every later layer has lost by it are given back, in the same numbers of
    these layers. The images need no labels, and should be clean and like those that the model is made for. With
    ``repair="refit"`` the kernels of the convolutions are fitted anew on them before that, also where nothing is
    flagged: what clean images do not use loses its weight.

    Args:
        src: The ONNX file.
        dst: The file to write. External data is written beside it, under names made to fit that are free.
        u: A channel is flagged where its bound exceeds mean + u·std of its layer; finite, ≥ 0. 3 where None, but for
            ``auto``, and so are the next two the defaults of `onnx_clp.scan`. With a budget it is the lowest that is
            tried, and 1.5 where None.
        score: As for `onnx_clp.scan`, or ``activity``: the bound over the standard deviation on ``images``.
        threshold: As for `onnx_clp.scan`.
        count_dead: Count channels of bound 0 in mean and std, as the published arithmetic does.
        max_share: The share of a layer's channels that may be silenced, 0 to 1; a layer beyond it is left. None
            for 0.1; with a budget, which says how much is too much, for any share.
        metadata: Write the note: version, u, SHA-256 of the input, what was silenced.
        force: Overwrite ``dst`` and its data files (those that bear its name) where they exist.
        in_place: Allow ``dst`` to be ``src``. Data files that change are written under new names.
        dry_run: Write nothing, only say what would change.
        input_shapes: Shapes by input name for the run in onnxruntime, where the model leaves them open.
        allow_roots: Folders beside the model's own in which its external data may lie.
        limits: What scanning, writing and verifying may cost; what is done with ``images`` is not bounded by it.
        images: A folder of pictures, an .npy or .npz, a data set's folder (see `onnx_clp.evaluation.unlabelled`), or
            uint8 (N, H, W, C) or `LabelledImages` in memory; 50 to 500 of them. The model, of less than 2 GiB, is run
            on them by onnxruntime in this process.
        attack: attack.json of the model, or its folder, of which the preprocessing is taken.
        size: As for `onnx_clp.evaluate`, and so are the next five.
        mean: Likewise.
        std: Likewise.
        layout: Likewise.
        value_range: Likewise.
        resize: Likewise.
        num_images: Take so many of the images, drawn at random; None for all, 500 at most.
        seed: Of that choice.
        providers: As for `onnx_clp.evaluate`.
        batch_size: Images that are run at once.
        output_name: The output with a number for each class, by which the answers before and after are compared.
        repair: What the images are used for: ``statistics``; ``refit``, which fits kernels and then does the same; or
            ``none``: nothing but to compare the answers. ``statistics`` where None, but for ``auto``.
        ridge: λ of a refit, above 0: the share at which a weight is drawn to 0; None for 0.1.
        augment: Shifted and mirrored copies of each image that are measured too, 0 to 100; None for 3 with a refit, and
            for none without.
        method: ``clp``; ``ep``, which chooses channels whose pre-activations on ``suspected_images`` have an entropy
            below mean − u·std of their layer; ``bnp``: whose pre-activations on ``images`` diverge from the running
            statistics by more than mean + u·std; or ``auto``: see `onnx_clp.auto`. See docs/sanitize.md.
        suspected_images: Images of the training set that may have been poisoned, triggered ones among them; given as
            ``images`` are, and taken by the model alike.
        num_suspected: Take so many of them, drawn at random; None for all, 5,000 at most.
        keep_bias: Whether silenced channels keep the bias of their normalisation, and rest there; None as the method is
            published: yes for EP and BNP, no for CLP.
        min_agreement: A budget: of the images that are held out, the per cent that the sanitized model must answer as
            the original does, 0 to 100. u is walked down as far as that allows, see `onnx_clp.correction.budget`.
        max_accuracy_drop: A budget: the points of accuracy that it may lose on them, 0 to 100. The images need labels:
            what `onnx_clp.evaluate` reads. Both budgets may be given; then both must hold.
        hold_out: The share of the images that the budget is judged on, and nothing is corrected by; between 0 and 1,
            None for a half.
        guard: Without images, leave channels that make the model answer made-up inputs with one class, see
            `onnx_clp.guard`.

    Raises:
        ModelFileError: ``src`` cannot be read, is no ONNX model, or was changed or replaced while it was scanned;
            onnxruntime does not run it on ``images``.
        UsageError: An argument cannot be; ``dst`` exists, or cannot be written; ``images`` are none that fit.
        VerificationError: The written file did not pass its verification, or ``src`` was changed or replaced after it
            was scanned; what was written was removed.
    """
    budget = Budget(min_agreement, max_accuracy_drop, hold_out)
    said = Said(method, u, score, threshold, count_dead, repair, ridge, keep_bias, budget.given)
    labels = method == AUTO and not budget.given and _labelled(images, num_images) >= LEAST_LABELLED
    made = settled(said, Has(images=images is not None, labels=labels, suspected=suspected_images is not None))
    if made.max_accuracy_drop is not None:
        budget = replace(budget, max_accuracy_drop=made.max_accuracy_drop)
    check_u(made.u)
    check_score(made.score, (*SCORES, ACTIVITY))
    if made.score == ACTIVITY and images is None:
        raise UsageError("--score activity goes with --images", "give --images PATH, or take another score")
    if not guard and images is not None:
        raise UsageError("with --images there is no guard to leave out", "leave out --no-guard")
    check_threshold(made.threshold, count_dead=count_dead)
    if max_share is None:
        max_share = 1.0 if budget.given else DEFAULT_MAX_SHARE
    if not 0 <= max_share <= 1:
        raise UsageError(f"the largest share is {max_share}", "give a share between 0 and 1")
    shapes = {name: tuple(shape) for name, shape in (input_shapes or {}).items()}
    roots = tuple(map(Path, allow_roots))
    shown = (images, attack, size, mean, std, layout, value_range, resize)
    run = (num_images, seed, providers, batch_size, output_name, made.repair, made.ridge, augment)
    request = ImageRequest(*shown, *run, suspected_images, num_suspected, budget)
    request.check()
    options = Options(
        made.u,
        count_dead,
        max_share,
        metadata,
        force,
        in_place,
        dry_run,
        shapes,
        roots,
        limits,
        request,
        made.score,
        made.threshold,
        made.method,
        made.keep_bias,
        made.auto,
        guard,
    )
    source = ByteSource(Path(src))
    try:
        with sha256_meanwhile(source) as digest:
            from onnx_clp.rewrite import rewrite

            return rewrite(source, digest, os.fspath(src), os.fspath(dst), options)
    finally:
        source.close()


def _labelled(images: Given, most: int | None) -> int:
    """How many images with labels there are, ``most`` at most; 0 for folders of pictures, whose names may say less."""
    if images is None:
        return 0
    from onnx_clp.evaluation.labels import label_count  # as late as onnx and NumPy

    return min(label_count(images), most or MOST_IMAGES)
