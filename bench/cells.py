"""Every cell as trained, after plain CLP, and after ``--method auto`` with clean images: ACC and ASR, side by side.

    python -m bench.cells --runs runs --images DIR [--zoo DIR] [--curves FOLDER]

``--runs`` holds a folder for each network, as bench/attacks.py leaves them, ``--images`` what bench/correction.py
takes. Plain CLP is u = 3 without a limit on the share; what is repaired gets ``--count`` images, without labels, and
the one setting that ``--method auto`` has for these. Networks that ``--exports`` names are repaired in each of their
exports: BatchNormalization folded, kept, and dynamo's. What is measured is kept in cells.json beside each
network, and measured again with ``--again``.

``--curves`` draws ACC against ASR for each family of networks: a curve over u for plain CLP, for statistics given back
and for a refit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from bench.correction import AUTO, Images, Model, Way, measured, runs, sanitized, zoo
from onnx_clp.evaluation.images import LabelledImages, labelled

PLAIN = Way("bound", "none")
CURVES = (("plain", PLAIN), ("statistics", Way("activity", "statistics")), ("refit", Way("activity", "refit")))
BACKDOORED = 90.0
"""ASR in % from which on a network counts as attacked."""
MOST_ASR, MOST_LOSS, MOST_CLEAN_LOSS, MOST_DIFFERENCE = 5.0, 2.0, 1.0, 0.3
"""What a repaired cell is held to, in % and points."""


@dataclass(frozen=True)
class Figures:
    """ACC and ASR in %; an ASR of NaN where there is no attack."""

    acc: float
    asr: float

    def __str__(self) -> str:
        """As the table shows them."""
        return f"{self.acc:.1f}" if np.isnan(self.asr) else f"{self.acc:.1f} / {self.asr:.1f}"

    def meets(self, trained: Figures) -> bool:
        """Whether this is fine after ``trained``."""
        if np.isnan(trained.asr):
            return trained.acc - self.acc <= MOST_CLEAN_LOSS
        return self.asr <= MOST_ASR and trained.acc - self.acc <= MOST_LOSS


@dataclass(frozen=True)
class Row:
    """One network.

    Attributes:
        trained: As it is.
        plain: After CLP at u = 3.
        repaired: After ``--method auto`` with images, for each export.
    """

    name: str
    trained: Figures
    plain: Figures
    repaired: tuple[Figures, ...]

    @property
    def difference(self) -> float:
        """By how much ACC or ASR differ between the repaired exports at most, in points; NaN where one was repaired."""
        pairs = np.array([(each.acc, each.asr) for each in self.repaired])
        return float(np.ptp(np.nan_to_num(pairs), axis=0).max()) if len(pairs) > 1 else float("nan")


def exports(model: Model) -> list[Model]:
    """The forms in which a network lies there, the folded one first."""
    if model.attack is None:
        return [model]
    paths = sorted(model.path.parent.glob("*.onnx"), key=lambda path: (path.name != "model.folded.onnx", path.name))
    return [Model(model.name, path, None, None, model.attack) for path in paths]


def row(model: Model, images: LabelledImages, clean: Images, known: Path | None, *, every: bool) -> Row:
    """Measure a network, of ``every`` export or of the folded one, or read what was measured."""
    if known is not None and known.is_file():
        found: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))
        repaired = tuple(Figures(**each) for each in found["repaired"])
        return Row(found["name"], Figures(**found["trained"]), Figures(**found["plain"]), repaired)
    trained = Figures(*measured(model, model.path, images))
    plain = Figures(*sanitized(model, PLAIN, 3, images, clean)[:2])
    repaired = tuple(
        Figures(*sanitized(each, AUTO, 0, images, clean)[:2]) for each in exports(model)[: None if every else 1]
    )
    made = Row(model.name, trained, plain, repaired)
    if known is not None:
        known.write_text(json.dumps(asdict(made)), encoding="utf-8")
    return made


def table(rows: Sequence[Row]) -> Iterator[str]:
    """The rows in Markdown, and what they come to."""
    yield "| network | as trained | plain CLP, u = 3 | repaired | difference of the exports |"
    yield "|---|---|---|---|---|"
    for each in rows:
        fine = "" if each.repaired[0].meets(each.trained) else " (missed)"
        difference = "" if np.isnan(each.difference) else f"{each.difference:.2f}"
        yield f"| {each.name} | {each.trained} | {each.plain} | {each.repaired[0]}{fine} | {difference} |"
    yield ""
    attacked = [each for each in rows if each.trained.asr >= BACKDOORED]
    clean = [each for each in rows if np.isnan(each.trained.asr)]
    for words, group in (
        (f"attacked networks end with ASR ≤ {MOST_ASR:g} % and lose ≤ {MOST_LOSS:g} points", attacked),
        (f"clean networks lose ≤ {MOST_CLEAN_LOSS:g} point", clean),
    ):
        plain = sum(each.plain.meets(each.trained) for each in group)
        repaired = sum(each.repaired[0].meets(each.trained) for each in group)
        yield f"{words}: plain {plain}, repaired {repaired} of {len(group)}"
    several = [each.difference for each in rows if not np.isnan(each.difference)]
    alike = sum(difference <= MOST_DIFFERENCE for difference in several)
    yield f"exports alike within {MOST_DIFFERENCE:g} points: {alike} of {len(several)}"


def draw(models: Sequence[Model], images: LabelledImages, clean: Images, folder: Path, us: Sequence[float]) -> None:
    """One picture a family, of each attacked network a panel: ACC against ASR over u."""
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    attacked = [model for model in models if model.attack is not None and model.attack.trigger is not None]
    for family, group in groupby(sorted(attacked, key=_family), _family):
        panels = list(group)
        figure, axes = plt.subplots(
            1, len(panels), figsize=(3.2 * len(panels), 3.4), sharey=True, squeeze=False, layout="constrained"
        )
        for axis, model in zip(axes[0], panels, strict=True):
            curves(axis, model, images, clean, us)
        axes[0][0].set_ylabel("ACC, %")
        axes[0][-1].legend(fontsize=8)
        figure.suptitle(f"{family}: ACC against ASR over u = {us[0]:g} to {us[-1]:g}")
        figure.savefig(folder / f"{family}.svg")
        plt.close(figure)
        print(f"drawn: {folder / f'{family}.svg'}", flush=True)


def curves(
    axis: Any,  # noqa: ANN401  # matplotlib's
    model: Model,
    images: LabelledImages,
    clean: Images,
    us: Sequence[float],
) -> None:
    """The curves of one network."""
    trained = Figures(*measured(model, model.path, images))
    axis.axvspan(0, MOST_ASR, color="#e8f4ec")
    axis.axhline(trained.acc - MOST_LOSS, color="#8c8c8c", linewidth=0.8, linestyle=":")
    axis.plot([trained.asr], [trained.acc], "k*", label="as trained")
    for (label, way), mark in zip(CURVES, "osv", strict=True):
        found = [sanitized(model, way, u, images, clean)[:2] for u in us]
        axis.plot([asr for _, asr in found], [acc for acc, _ in found], f"{mark}-", markersize=4, label=label)
        print(f"{model.name}, {label}: {' '.join(f'{acc:.1f}/{asr:.1f}' for acc, asr in found)}", flush=True)
    axis.set(title=model.name.split("-")[0], xlabel="ASR, %", xlim=(-2, 102), ylim=(50, 95))


def _place(row: Row) -> tuple[str, str]:
    attack, _, family = row.name.partition("-")
    return family, attack


def _family(model: Model) -> str:
    _attack, family, *_ = model.name.split("-")
    return family


def main() -> None:
    """Read the options, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder with train_x.npy, test_x.npy, test_y.npy")
    parser.add_argument("--runs", type=Path, help="folder of folders with attack.json")
    parser.add_argument("--zoo", type=Path, help="folder with zoo.json")
    parser.add_argument("--only", default="", help="networks with this in their name")
    parser.add_argument("--exports", default="badnets", help="repair every export of networks with this in their name")
    parser.add_argument("--count", type=int, default=50, help="images of the repair (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of their choice (%(default)s)")
    parser.add_argument("--limit", type=int, default=3000, help="test images (%(default)s)")
    parser.add_argument("--again", action="store_true", help="measure what was measured before")
    parser.add_argument("--curves", type=Path, help="draw a picture a family into this folder, in place of the table")
    parser.add_argument("--us", default="2,2.5,3,3.5,4,5", help="values of u of the curves (%(default)s)")
    options = parser.parse_args()
    train, test_x, test_y = (
        np.load(options.images / f"{name}.npy", mmap_mode="r") for name in ("train_x", "test_x", "test_y")
    )
    images = labelled(np.array(test_x[: options.limit]), np.array(test_y[: options.limit]).astype(np.int64))
    chosen = np.sort(np.random.default_rng(options.seed).permutation(len(train))[: options.count])
    clean = np.array(train[chosen])
    models = [*(zoo(options.zoo) if options.zoo else ()), *(runs(options.runs) if options.runs else ())]
    models = [model for model in models if options.only in model.name]
    if options.curves is not None:
        draw(models, images, clean, options.curves, [float(u) for u in options.us.split(",")])
        return
    print(f"{options.count} images for the repair, {len(images.labels):,} to measure; ACC / ASR in %", flush=True)
    rows = []
    for model in models:
        known = None if model.attack is None else model.path.parent / "cells.json"
        if options.again and known is not None:
            known.unlink(missing_ok=True)
        rows.append(row(model, images, clean, known, every=options.exports in model.name))
        print(f"{rows[-1].name}: {rows[-1].trained}, {rows[-1].plain}, {rows[-1].repaired[0]}", flush=True)
    print("", *table(sorted(rows, key=_place)), sep="\n")


if __name__ == "__main__":
    main()
