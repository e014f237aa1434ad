"""What plain CLP costs and what it leaves, and the same repaired on clean images: ACC and ASR, before and after.

    python bench/correction.py --images DIR [--zoo DIR] [--runs DIR] [--u 3,2] [--scores bound,activity]
                               [--ridges 0.05,0.1] [--count 50] [--seeds 0,1,2] [--only NAME]

``--images`` holds ``train_x.npy``, of which the images of the repair are drawn, and ``test_x.npy`` and ``test_y.npy``,
on which is measured: uint8 (N, height, width, 3). ``--zoo`` holds models with a ``zoo.json`` that names them,
``--runs`` a folder for each model with its ``attack.json``, as the exporters leave them. Every model is sanitized at
each u by each score without a limit on the share: with no repair, with its statistics corrected, and refitted with each
ridge; of several seeds the mean, the smallest and the largest are printed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import onnx_clp
from onnx_clp.evaluation.attack import Attack
from onnx_clp.evaluation.images import LabelledImages, labelled
from onnx_clp.evaluation.prepared import open_attack
from onnx_clp.evaluation.triggers import Blend, Patch, Trigger

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Way:
    """How a model is sanitized; ``ridge`` is None but for a refit."""

    score: str
    repair: str
    ridge: float | None = None

    def __str__(self) -> str:
        """As it is printed."""
        return f"{self.score}, {self.repair}" + ("" if self.ridge is None else f" {self.ridge:g}")


AUTO = Way("auto", "auto")
"""What ``--method auto`` takes; u says nothing then."""


@dataclass(frozen=True)
class Model:
    """A model, and what an attacker does to its images; ``trigger`` is None where it is clean."""

    name: str
    path: Path
    trigger: Trigger | None
    target: int | str | None
    attack: Attack | None = None


def zoo(folder: Path) -> Iterator[Model]:
    """The models that zoo.json names."""
    for entry in json.loads((folder / "zoo.json").read_text()):
        path = folder / entry["file"]
        trigger: Trigger | None = None
        if "trigger" in entry:
            pattern = np.load(folder / entry["trigger"])
            pixels = np.rint(255 * pattern).astype(np.uint8).transpose(1, 2, 0)
            trigger = Patch(pixels) if pixels.shape[0] < 32 else Blend(pixels, 0.2)
        yield Model(path.stem, path, trigger, entry["target"] if trigger else None)


def runs(folder: Path) -> Iterator[Model]:
    """The folders with an attack.json and a model."""
    for document in sorted(folder.glob("*/attack.json")):
        models = sorted(document.parent.glob("*.onnx"), key=lambda path: (path.name != "model.folded.onnx", path.name))
        if models:
            attack = open_attack(document)
            yield Model(document.parent.name, models[0], None, None, attack)


def measured(model: Model, path: Path, images: LabelledImages) -> tuple[float, float]:
    """ACC and ASR in %; NaN where there is no attack."""
    options: dict[str, Any] = {"trigger": model.trigger, "target": model.target} if model.trigger else {}
    figures = onnx_clp.evaluate(path, images, model.attack, **options).model.figures
    return 100 * figures.acc.value, float("nan") if figures.asr is None else 100 * figures.asr.value


def sanitized(model: Model, way: Way, u: float, images: LabelledImages, clean: Images) -> tuple[float, float, float]:
    """ACC, ASR and the seconds that sanitizing took."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.onnx"
        start = time.perf_counter()
        given: dict[str, Any] = {"images": clean, "attack": model.attack}
        if way is AUTO:
            given["method"] = "auto"
        elif way.repair == "none" and way.score != "activity":
            given = {"u": u, "score": way.score, "max_share": 1, "guard": False}
        else:
            given |= {"u": u, "score": way.score, "repair": way.repair, "ridge": way.ridge, "max_share": 1}
        onnx_clp.sanitize(model.path, copy, **given)
        seconds = time.perf_counter() - start
        return (*measured(model, copy, images), seconds)


def row(model: Model, ways: list[Way], us: list[float], images: LabelledImages, draws: list[Images]) -> None:
    """Print what becomes of one model."""
    acc, asr = measured(model, model.path, images)
    print(f"{model.name}: base {acc:.1f}/{asr:.1f}", flush=True)
    for u in us:
        for way in ways:
            found = np.array([sanitized(model, way, u, images, clean) for clean in draws])
            mean, low, high = found.mean(0), found.min(0), found.max(0)
            spread = (
                f" (ACC {low[0]:.1f} to {high[0]:.1f}, ASR {low[1]:.1f} to {high[1]:.1f})" if len(found) > 1 else ""
            )
            print(f"  u = {u:g}, {way}: {mean[0]:.1f}/{mean[1]:.1f}{spread}, {mean[2]:.1f} s", flush=True)


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description="Plain CLP and repaired, side by side: ACC/ASR in %.")
    parser.add_argument("--images", type=Path, required=True, help="folder with train_x.npy, test_x.npy, test_y.npy")
    parser.add_argument("--zoo", type=Path, help="folder with zoo.json")
    parser.add_argument("--runs", type=Path, help="folder of folders with attack.json")
    parser.add_argument("--u", default="3,2")
    parser.add_argument("--scores", default="bound,activity")
    parser.add_argument("--ridges", default="0.05,0.1", help="λ of the refit")
    parser.add_argument("--only", default="", help="models with this in their name")
    parser.add_argument("--count", type=int, default=50, help="images of the repair")
    parser.add_argument("--seeds", default="0", help="of their choice")
    parser.add_argument("--limit", type=int, default=3000, help="test images")
    options = parser.parse_args()
    train, test_x, test_y = (
        np.load(options.images / f"{name}.npy", mmap_mode="r") for name in ("train_x", "test_x", "test_y")
    )
    images = labelled(np.array(test_x[: options.limit]), np.array(test_y[: options.limit]).astype(np.int64))
    draws = [
        np.array(train[np.sort(np.random.default_rng(int(seed)).permutation(len(train))[: options.count])])
        for seed in options.seeds.split(",")
    ]
    ridges = [float(ridge) for ridge in options.ridges.split(",")]
    ways = [
        way
        for score in options.scores.split(",")
        for way in (Way(score, "none"), Way(score, "statistics"), *(Way(score, "refit", ridge) for ridge in ridges))
    ]
    models = [*(zoo(options.zoo) if options.zoo else ()), *(runs(options.runs) if options.runs else ())]
    print(f"{options.count} images for the repair, {len(images.labels):,} to measure; ACC/ASR in %")
    for model in models:
        if options.only in model.name:
            row(model, ways, [float(u) for u in options.u.split(",")], images, draws)


if __name__ == "__main__":
    main()
