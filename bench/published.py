"""The published PyTorch procedure against ``onnx-clp sanitize`` on trained networks: channels, ACC and ASR.

Of every run whose network has each BatchNorm right behind its convolution, the checkpoint is silenced as published (one
SVD per channel, mean + 3·std, γ = β = 0) and measured by torch, and each of its ONNX files is sanitized and measured by
onnxruntime.

    python bench/published.py runs/* --images data
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for tests.naive, which no installation has

import onnx_clp
from exporters.data import Dataset, Split
from exporters.measure import Figures, measure
from exporters.models import build
from onnx_clp.evaluation.attack import Attack
from onnx_clp.evaluation.prepared import open_attack
from tests import naive
from tests.exported import convolution_behind

FORMS = ("model.onnx", "model.folded.onnx", "model.dynamo.onnx")
PAIRED = frozenset({"resnet18", "vgg16_bn", "mobilenet_v2"})


def published(network: nn.Module) -> list[list[int]]:
    """Silence the outliers of ``network`` in place as published; the channels of each layer that has any."""
    modules = dict(network.named_modules())
    silenced = []
    for norm_name, conv_name in convolution_behind(network).items():
        norm, kernel = modules[norm_name], modules[conv_name].weight.detach().numpy()
        bounds = naive.bounds(kernel, norm.weight.detach().numpy(), norm.running_var.numpy(), norm.eps)
        channels = naive.flagged(bounds)
        with torch.no_grad():
            norm.weight[channels] = 0
            norm.bias[channels] = 0
        silenced += [channels] if channels else []
    return silenced


def measured_by_torch(network: nn.Module, attack: Attack, test: Split) -> Figures:
    """ACC and ASR of ``network`` by torch."""
    made = attack.preprocessing
    dataset = Dataset("folder", test, test, attack.classes, made.mean, made.std)
    return measure(network, dataset, attack.trigger, attack.target)


def compare(run: Path, images: Path) -> str:
    """One row of the table."""
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    sizes = {name: saved[name] for name in ("classes", "channels", "size", "width")}
    network = build(saved["model"], **sizes).eval()
    network.load_state_dict(saved["state_dict"])
    silenced = sorted(map(tuple, published(network)))
    attack = open_attack(run / "attack.json", ("cpu",))
    test = Split(np.load(images / "test_x.npy"), np.load(images / "test_y.npy").astype(np.int64))
    by_torch = measured_by_torch(network, attack, test)
    same, differences = [], []
    for form in FORMS:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / form
            report = onnx_clp.sanitize(run / form, copy, max_share=1.0, guard=False)
            figures = onnx_clp.evaluate(copy, images, attack).model.figures
        same.append(sorted(part.channels for part in report.silenced) == silenced)
        for ours, theirs in ((figures.acc, by_torch.acc), (figures.asr, by_torch.asr)):
            if ours is not None and theirs is not None:
                differences.append(abs(100 * ours.value - theirs.percent))
    channels = sum(map(len, silenced))
    return f"| {run.name} | {channels} | {'yes' if all(same) else 'NO'} | {max(differences):.2f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs; others are passed over")
    parser.add_argument("--images", type=Path, required=True, help="folder with test_x.npy and test_y.npy")
    options = parser.parse_args()
    print("| run | silenced | the same in all three files | largest difference, points |\n|---|---|---|---|")
    for run in options.runs:
        if not (run / "attack.json").is_file():
            continue
        document = json.loads((run / "attack.json").read_text(encoding="utf-8"))
        if document["training"]["model"] in PAIRED:
            print(compare(run, options.images), flush=True)


if __name__ == "__main__":
    main()
