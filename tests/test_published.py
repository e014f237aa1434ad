"""The published formula, applied naively to networks of torchvision, flags what `scan` flags in their exports.

Zheng et al., ECCV 2022, as `tests/naive.py` has it: one SVD per channel of each Conv2d, times |γ|/√(var + ε) of the
BatchNorm2d that the network calls right on it. The networks are exported with their BNs kept, so that a BN of the file
carries its module's name in the names of its parameters.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_clp
from tests import naive

pytest.importorskip("torch")
pytest.importorskip("torchvision")

import torch

from tests.exported import convolution_behind, export, network

pytestmark = pytest.mark.exporters

RTOL = 1e-5
"""The accuracy of a bound: kernels in float32 are multiplied in float32, see onnx_clp/bounds.py. Beside it, ONNX stores
ε in float32, which moves it by 2⁻²⁴ of itself and the bound by half of that, 3e-8; all other numbers are the same."""


@dataclass(frozen=True)
class Network:
    """A network and what is known about it.

    Attributes:
        name: In torchvision.models.
        pairs: How many BNs it calls right on a Conv2d, counted by hand from its definition.
        other: How many BNs it calls on something else.
        gates: How many convolutions it has in squeeze-and-excitation blocks.
        size: Of the image it is traced with.
    """

    name: str
    pairs: int
    other: int = 0
    gates: int = 0
    size: int = 64


NETWORKS = (
    Network("resnet18", 1 + 16 + 3),  # stem, 8 blocks of 2, 3 downsamplings
    Network("vgg11_bn", 8),
    Network("mobilenet_v2", 1 + 2 + 16 * 3 + 1),  # stem, a block without expansion, 16 blocks of 3, the last
    Network("densenet121", 1 + 58, other=58 + 3 + 1),  # stem, norm2 of each layer; norm1, transitions, norm5
    Network("googlenet", 3 + 9 * 6),  # stem, 9 inception blocks of 6
    Network("shufflenet_v2_x1_0", 1 + 3 * 5 + 13 * 3 + 1),  # stem, 3 blocks of 5 that stride, 13 of 3, the last
    Network("regnet_y_400mf", 1 + 16 * 3 + 4, gates=32),  # stem, 16 blocks of 3, 4 projections
    Network("efficientnet_b0", 1 + 2 + 15 * 3 + 1, gates=32),
    Network("mnasnet1_0", 1 + 2 + 16 * 3 + 1),
    Network("inception_v3", 94, size=96),
)


@dataclass(frozen=True)
class Published:
    """What the published formula says of one BN: the Conv2d before it, and the bound of each channel."""

    convolution: str
    bounds: naive.Bounds


def published(net: torch.nn.Module) -> dict[str, Published]:
    """The formula on every pair of Conv2d and BatchNorm2d of ``net``, by the name of the BN."""
    modules = dict(net.named_modules())
    found = {}
    for bn, conv in convolution_behind(net).items():
        norm, kernel = modules[bn], modules[conv].weight.detach().numpy()
        gamma, variance = norm.weight.detach().numpy(), norm.running_var.numpy()
        found[bn] = Published(conv, naive.bounds(kernel, gamma, variance, norm.eps))
    return found


def by_module(path: Path, report: onnx_clp.ScanReport) -> dict[str, tuple[str, onnx_clp.Layer]]:
    """The layers of kind Conv→BatchNormalization: by the BN's module name, with that of the one Conv it names."""
    nodes = {node.name: node for node in onnx.load(path).graph.node}
    found = {}
    for layer in report.layers:
        if layer.kind == "Conv→BatchNormalization":
            (operator,) = layer.operators
            bn, conv = (nodes[name].input[1].removesuffix(".weight") for name in (layer.name, operator))
            assert bn not in found
            found[bn] = (conv, layer)
    return found


def indices(layer: onnx_clp.Layer) -> list[int]:
    return sorted(channel.index for channel in layer.flagged)


@pytest.mark.parametrize("model", NETWORKS, ids=lambda model: model.name)
def test_flags_what_the_published_formula_flags(model: Network, tmp_path: Path) -> None:
    net = network(model.name)
    path = export(net, tmp_path / "model.onnx", model.size, fold=False)
    wanted = published(net)
    report = onnx_clp.scan(path)
    found = by_module(path, report)

    assert len(wanted) == model.pairs
    assert {bn: conv for bn, (conv, _) in found.items()} == {bn: part.convolution for bn, part in wanted.items()}
    for bn, (_, layer) in found.items():
        np.testing.assert_allclose(layer.bounds, wanted[bn].bounds, rtol=RTOL, err_msg=bn)
    flags = {bn: naive.flagged(part.bounds) for bn, part in wanted.items()}
    assert {bn: indices(layer) for bn, (_, layer) in found.items()} == flags
    assert sum(map(len, flags.values())) > model.pairs // 2  # the planted ones at least: it is not nothing that agrees
    # Whatever is left is accounted for: the gates, and the BNs that normalise something else.
    assert [part.reason for part in report.skipped] == ["gate"] * model.gates
    assert len(report.layers) == model.pairs + model.other

    # The published arithmetic to the letter: dead channels count.
    found = by_module(path, onnx_clp.scan(path, count_dead=True))
    to_the_letter = {bn: naive.flagged(part.bounds, count_dead=True) for bn, part in wanted.items()}
    assert {bn: indices(layer) for bn, (_, layer) in found.items()} == to_the_letter


def test_the_comparison_sees_one_changed_channel(tmp_path: Path) -> None:
    """A proof that the test above can fail: one kernel scaled after the export, and the two disagree in its layer."""
    net = network("vgg11_bn")
    path = export(net, tmp_path / "model.onnx", 64, fold=False)
    with torch.no_grad():
        net.features[4].weight[17] *= 20
    wanted = published(net)
    found = by_module(path, onnx_clp.scan(path))
    different = [bn for bn, (_, layer) in found.items() if indices(layer) != naive.flagged(wanted[bn].bounds)]
    assert different == ["features.5"]
