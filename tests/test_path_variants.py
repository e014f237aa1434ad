"""The flagged set under ``path`` is that of every rewrite of a network of torchvision's kind, at two thresholds.

Scores agree to 1e-7 (measured: 6e-8, the rounding of float32 weights). No score of these networks lies as near to its
threshold; ReLU6 is not positively homogeneous, so in the MobileNet the rewrites that scale leave its channels alone.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

import torch

import onnx_clp
from exporters.models import build
from exporters.variants.making import Variant, variants
from onnx_clp.analysis import Layer
from tests.exported import export, randomise, short_densenet, short_mobilenet

pytestmark = pytest.mark.exporters

small = partial(build, classes=10, channels=3, size=32, width=16)

NETS: dict[str, Callable[[], torch.nn.Module]] = {
    **{name: partial(small, name) for name in ("resnet18", "vgg16_bn", "preact_resnet18")},
    "mobilenet": short_mobilenet,
    "densenet": short_densenet,
}

CLOSE = 1e-6

Key = tuple[str, ...]


def by_operators(path: Path, threshold: str = "mean-std", u: float = 3.0) -> dict[Key, Layer]:
    """The layers by the convolutions their channels come from: a rewrite may reorder and rename the others.

    Where a convolution is judged at two BNs, as the first of a DenseNet, the second counts: folding takes the other.
    """
    report = onnx_clp.scan(path, u, score="path", threshold=threshold)
    assert not any(layer.fallback for layer in report.layers)
    return {tuple(sorted(layer.operators)): layer for layer in report.layers}


def flagged(layer: Layer) -> set[int]:
    return {channel.index for channel in layer.flagged}


@pytest.mark.parametrize("name", NETS)
def test_the_flagged_set_is_that_of_every_rewrite(name: str, tmp_path: Path) -> None:
    net = randomise(NETS[name]())
    source = export(net, tmp_path / "model.onnx", 32, fold=False)
    wanted = ["bn_split", "folded", "permuted", "rescaled"]
    made = [each for each in variants(source, tmp_path / "out", only=wanted) if isinstance(each, Variant)]
    assert [each.name for each in made] == wanted
    assert made[-1].flagged[1] < made[-1].flagged[0]  # the bounds are what the rescaling hides from
    for threshold in ("mean-std", "log-mad"):
        for u in (2.0, 3.0):
            before = by_operators(source, threshold, u)
            assert any(layer.flagged for layer in before.values())
            for variant in made:
                compare(before, by_operators(variant.path, threshold, u), variant.name)


def compare(before: dict[Key, Layer], after: dict[Key, Layer], name: str) -> None:
    """The same scores and flags; a permutation takes both along."""
    assert before.keys() == after.keys()
    for key, was in before.items():
        now = after[key]
        if name == "permuted":
            np.testing.assert_allclose(sorted(now.scores), sorted(was.scores), rtol=CLOSE, atol=CLOSE**2)
            first, second = (sorted(layer.scores[k] for k in flagged(layer)) for layer in (was, now))
            np.testing.assert_allclose(second, first, rtol=CLOSE)
        else:
            np.testing.assert_allclose(now.scores, was.scores, rtol=CLOSE, atol=CLOSE**2)
            assert flagged(now) == flagged(was), (name, key)


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18"])
def test_the_exporters_agree(name: str, tmp_path: Path) -> None:
    """Dynamo writes the pooling as a mean over axes, and Reshape where TorchScript has Flatten."""
    net = randomise(NETS[name]())
    paths = [
        export(net, tmp_path / f"{fold}{dynamo}.onnx", 32, fold=fold, dynamo=dynamo)
        for fold, dynamo in ((False, False), (True, False), (True, True))
    ]
    reports = [onnx_clp.scan(path, score="path") for path in paths]
    for report in reports[1:]:
        for was, now in zip(reports[0].layers, report.layers, strict=True):
            np.testing.assert_allclose(now.scores, was.scores, rtol=CLOSE, atol=CLOSE**2)
            assert flagged(now) == flagged(was)
