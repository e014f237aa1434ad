"""Model, images and attack → SweepReport: what silencing channels costs and gains over a range of u.

The model is scanned once. Which channels a value of u flags follows from the bounds; a copy is sanitized and run only
for those values of u that flag a set of channels no earlier one has flagged.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import Final, Unpack

import numpy as np

from onnx_clp.analysis import ScanReport, scan
from onnx_clp.defaults import DEFAULT_SCORE, DEFAULT_THRESHOLD, check_score, check_threshold, check_u
from onnx_clp.errors import UsageError
from onnx_clp.evaluation.attack import Attack
from onnx_clp.evaluation.classifier import model_figures
from onnx_clp.evaluation.figures import EvaluationReport, Figures
from onnx_clp.evaluation.images import LabelledImages
from onnx_clp.evaluation.prepared import EvaluationOptions, prepare
from onnx_clp.evaluation.providers import version
from onnx_clp.evaluation.setting import Setting
from onnx_clp.judge import judge
from onnx_clp.sanitizer import Left, SanitizeReport, Silenced, sanitize

DEFAULT_SWEEP: Final = "2:6:0.25"
MOST_ROWS: Final = 200
_LONGEST_NUMBER: Final = 32
_SCALE: Final = 9
"""Powers of ten that a number of the grid may be away from 1."""

Flagged = tuple[tuple[int, ...], ...]
"""The flagged channels of each layer."""


@dataclass(frozen=True, slots=True)
class SweepRow:
    """What one value of u does.

    Attributes:
        u: Standard deviations above the mean.
        silenced: The channels that were silenced, per layer.
        left: The channels that were flagged, or are not finite, and were not silenced, per layer, with the reason.
        largest_share: The largest share of a layer's channels that was silenced, 0 to 1.
        figures: How the sanitized model classifies.
        measured: Whether it was run for this row. Where not, the figures are those of the earlier row with the same
            channels, or of the unsanitized model where no channel is silenced.
    """

    u: float
    silenced: tuple[Silenced, ...]
    left: tuple[Left, ...]
    largest_share: float
    figures: Figures
    measured: bool

    @property
    def silenced_channels(self) -> int:
        """How many channels were silenced."""
        return sum(len(part.channels) for part in self.silenced)

    @property
    def left_channels(self) -> int:
        """How many channels were left."""
        return sum(len(part.channels) for part in self.left)


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What a sweep found.

    Attributes:
        evaluation: Of the unsanitized model, with the images, the attack and the preprocessing.
        max_share: The share of a layer's channels that could be silenced at most, 0 to 1.
        count_dead: Whether channels of bound 0 counted in mean and std.
        layers: How many layers the model has that channels can be silenced in.
        channels: How many channels these have.
        rows: By ascending u.
        score: What channels were judged by, see `onnx_clp.scan`.
        threshold: The rule for what stands out, see `onnx_clp.scan`.
        fallbacks: How many layers were judged by their bounds though ``score`` is ``path``.
    """

    evaluation: EvaluationReport
    max_share: float
    count_dead: bool
    layers: int
    channels: int
    rows: tuple[SweepRow, ...]
    score: str = DEFAULT_SCORE
    threshold: str = DEFAULT_THRESHOLD
    fallbacks: int = 0


def grid(text: str) -> tuple[float, ...]:
    """``START:STOP:STEP`` as numbers: START, START + STEP … up to STOP, which is one of them where the steps meet it.

    Each is the float nearest to the decimal number, so that 0:1:0.1 holds 0.3.

    Raises:
        UsageError: It is something else, runs backwards, or has more than `MOST_ROWS` numbers.
    """
    parts = text.split(":")
    if len(parts) != 3:
        raise UsageError(f"the sweep is {text[:100]!r}", f"give START:STOP:STEP such as {DEFAULT_SWEEP}")
    start, stop, step = (_exact(part, text) for part in parts)
    if step <= 0:
        raise UsageError(f"the step of the sweep {text!r} is not above 0", f"give START:STOP:STEP, {DEFAULT_SWEEP}")
    if stop < start:
        raise UsageError(f"the sweep {text!r} stops below its start", f"give START:STOP:STEP, {DEFAULT_SWEEP}")
    rows = (stop - start) // step + 1
    if rows > MOST_ROWS:
        raise UsageError(f"the sweep {text!r} has {rows:,} rows", f"at most {MOST_ROWS}: give a larger step")
    return check_grid(float(start + row * step) for row in range(rows))


def check_grid(values: Iterator[float] | Sequence[float]) -> tuple[float, ...]:
    """The values of u, ascending, each once. Raises UsageError where one cannot be, or there are none or too many."""
    found = tuple(sorted(set(values)))
    for u in found:
        check_u(u)
    if not 0 < len(found) <= MOST_ROWS:
        raise UsageError(f"the sweep has {len(found):,} values of u", f"give 1 to {MOST_ROWS}")
    return found


def _exact(part: str, text: str) -> Fraction:
    hint = f"give START:STOP:STEP such as {DEFAULT_SWEEP}"
    try:
        number = Decimal(part.strip()) if len(part) <= _LONGEST_NUMBER else Decimal("NaN")
    except InvalidOperation as error:
        raise UsageError(f"{part!r} in the sweep {text[:100]!r} is not a number", hint) from error
    if not number.is_finite() or (number and abs(number.adjusted()) > _SCALE):
        raise UsageError(f"{part[:40]!r} in the sweep {text[:100]!r} is no number for u", hint)
    return Fraction(number)


def sweep(
    model: str | os.PathLike[str],
    images: str | os.PathLike[str] | LabelledImages,
    attack: str | os.PathLike[str] | Attack | None = None,
    *,
    u: str | Sequence[float] = DEFAULT_SWEEP,
    max_share: float = 1.0,
    score: str = DEFAULT_SCORE,
    threshold: str = DEFAULT_THRESHOLD,
    count_dead: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **options: Unpack[EvaluationOptions],
) -> SweepReport:
    """Sanitize a model at each of several values of u, and measure each copy with onnxruntime.

    Copies are written to a temporary folder, one at a time, and verified as `onnx_clp.sanitize` verifies them. The
    images are read and triggered once.

    Args:
        model: The ONNX file.
        images: As for `onnx_clp.evaluate`.
        attack: As for `onnx_clp.evaluate`.
        u: ``"START:STOP:STEP"``, or the values.
        max_share: The share of a layer's channels that may be silenced, 0 to 1; a layer beyond it is left. Unlike in
            `onnx_clp.sanitize` there is no limit unless one is given, as published: the limit is there for when nobody
            measures what silencing costs, and with it a lower u could silence less.
        score: As for `onnx_clp.scan`.
        threshold: As for `onnx_clp.scan`.
        count_dead: Count channels of bound 0 in mean and std, as the published arithmetic does.
        progress: Called with how many images have been run, and how many there are.
        options: The other options of `onnx_clp.evaluate`.

    Raises:
        ModelFileError: The model cannot be read, or onnxruntime does not load or run it.
        UsageError: An argument cannot be; see `onnx_clp.evaluate`.
        VerificationError: A sanitized copy did not pass its verification.
    """
    values = grid(u) if isinstance(u, str) else check_grid(u)
    check_score(score)
    check_threshold(threshold, count_dead=count_dead)
    if not 0 <= max_share <= 1:
        raise UsageError(f"the largest share is {max_share}", "give a share between 0 and 1")
    path = Path(model)
    session, setting = prepare(path, images, attack, options)
    first = setting.classifier(session)
    found = scan(path, values[0], score=score, threshold=threshold, count_dead=count_dead)
    keys = [_flagged(found, value) for value in values]
    runs, done = 1 + len({key for key in keys if any(key)}), 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, setting.image_count * runs)

    evaluation = EvaluationReport(
        images=setting.images.source,
        attack=setting.attack,
        preprocessing=setting.preprocessing,
        model=model_figures(first, setting.measure(first, tell), os.fspath(model)),
        against=None,
        onnxruntime=version(),
        notes=(session.note,) if session.note else (),
    )
    sweeper = _Sweeper(path, setting, evaluation.model.figures, max_share, found, tell)
    rows = tuple(sweeper.rows(values, keys))
    return SweepReport(
        evaluation,
        max_share,
        count_dead,
        len(found.layers),
        found.channels,
        rows,
        score,
        threshold,
        sum(bool(layer.fallback) for layer in found.layers),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Sweeper:
    """What the rows of one sweep have in common."""

    path: Path
    setting: Setting
    unsanitized: Figures
    max_share: float
    found: ScanReport
    tell: Callable[[int], None]

    def row(self, u: float, *, flags: bool) -> SweepRow:
        """The row of ``u``; ``flags`` says whether any channel is flagged there."""
        with tempfile.TemporaryDirectory(prefix="onnx-clp-", ignore_cleanup_errors=True) as folder:
            copy = Path(folder) / "sanitized.onnx"
            report = sanitize(
                self.path,
                copy,
                u,
                score=self.found.score,
                threshold=self.found.threshold,
                count_dead=self.found.count_dead,
                max_share=self.max_share,
                dry_run=not flags,
                guard=False,
            )
            measured = bool(report.silenced)
            figures = self.run(copy) if measured else self.unsanitized
        if flags and not measured:
            self.tell(self.setting.image_count)
        return SweepRow(u, report.silenced, report.left, _largest_share(report), figures, measured)

    def run(self, copy: Path) -> Figures:
        """How the sanitized ``copy`` classifies."""
        return self.setting.measure(self.setting.open(copy), self.tell)

    def rows(self, values: Sequence[float], keys: Sequence[Flagged]) -> Iterator[SweepRow]:
        """The rows of ``values``, which flag ``keys``."""
        seen: dict[Flagged, SweepRow] = {}
        for u, key in zip(values, keys, strict=True):
            if key in seen:
                yield replace(seen[key], u=u, measured=False)
            else:
                seen[key] = self.row(u, flags=any(key))
                yield seen[key]


def _flagged(found: ScanReport, u: float) -> Flagged:
    """What ``u`` flags in each layer, by the rule of the scan."""
    return tuple(
        judge(np.array(layer.scores or layer.bounds), u, count_dead=found.count_dead, threshold=found.threshold).flagged
        for layer in found.layers
    )


def _largest_share(report: SanitizeReport) -> float:
    """The largest share of a layer's channels that was silenced."""
    # Two layers of a file may have one name: the channels tell them apart.
    sizes = {
        (layer.name, tuple(sorted(channel.index for channel in layer.flagged))): layer.channels
        for layer in report.before.layers
    }
    return max((len(part.channels) / sizes[part.layer, part.channels] for part in report.silenced), default=0.0)
