"""Networks from torchvision with random weights, and the route by which they keep their BatchNormalizations.

Needs torch and torchvision: a test imports it behind `pytest.importorskip`.
"""

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.fx
import torchvision

OPSET = 17
"""The newest that the TorchScript exporter writes without complaint."""


PLANTED = 8.0
"""The smallest γ of a planted outlier; all others are far below it."""


def randomise(net: torch.nn.Module, seed: int = 0, *, tiny_variances: bool = True) -> torch.nn.Module:
    """``net`` in eval(), its kernels and BN statistics made random in place, with outliers and dead channels.

    Channels of a kernel differ by a factor of about e^0.2, γ and var lie in [0.2, 1.7]. Every third BN of more than 16
    channels has an outlier by a γ of 8 to 12, and with ``tiny_variances`` one by a var of 1e-4 to 1e-3, where ε counts;
    every fifth has two dead channels.
    """
    random = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *size: int) -> torch.Tensor:
        return torch.rand(*size, generator=random) * (high - low) + low

    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0, 1 / math.sqrt(fan_in), generator=random)
                module.weight *= torch.exp(0.2 * torch.randn(len(module.weight), 1, 1, 1, generator=random))
        norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        for i, norm in enumerate(norms):
            n = norm.num_features
            norm.weight.copy_(uniform(0.2, 1.7, n))
            norm.bias.normal_(0, 0.2, generator=random)
            norm.running_mean.normal_(0, 0.2, generator=random)
            norm.running_var.copy_(uniform(0.2, 1.7, n))
            chosen = torch.randperm(n, generator=random)
            if i % 3 == 0 and n > 16:
                norm.weight[chosen[0]], norm.running_var[chosen[0]] = uniform(PLANTED, 12, 1)[0], 1
                if tiny_variances:
                    norm.running_var[chosen[1]] = uniform(1e-4, 1e-3, 1)[0]
            if i % 5 == 0 and n > 16:
                norm.weight[chosen[2:4]] = 0
    return net.eval()


def network(name: str, seed: int = 0) -> torch.nn.Module:
    """The torchvision network ``name`` with ten classes and random weights, see `randomise`."""
    options = {"init_weights": False} if name in {"googlenet", "inception_v3"} else {}
    net = getattr(torchvision.models, name)(weights=None, num_classes=10, **options)
    if name == "vgg11_bn":  # its classifier is 500 MB, and is not judged
        net.avgpool, net.classifier = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Linear(512, 10)
    return randomise(net, seed)


def short_resnet() -> torch.nn.Module:
    """A ResNet of four blocks: 12 convolutions, each with its BN right behind it."""
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)


def short_densenet() -> torch.nn.Module:
    """A DenseNet of two blocks of three layers: 7 BNs right behind a convolution, 8 behind a concatenation."""
    return torchvision.models.DenseNet(growth_rate=16, block_config=(3, 3), num_init_features=32, num_classes=10)


def short_mobilenet() -> torch.nn.Module:
    """A MobileNetV2 of four blocks, a quarter as wide: 13 convolutions, four of them depthwise."""
    settings = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 320, 2, 1]]
    return torchvision.models.MobileNetV2(10, width_mult=0.25, inverted_residual_setting=settings)


def convolution_behind(net: torch.nn.Module) -> dict[str, str]:
    """BN → Conv2d, by module name, for every BN that ``net`` calls right on the output of a Conv2d.

    By the graph of calls, not by the order of definition.
    """
    modules = dict(net.named_modules())
    found = {}
    for call in torch.fx.symbolic_trace(net).graph.nodes:
        if call.op == "call_module" and isinstance(modules[call.target], torch.nn.BatchNorm2d):
            before = call.args[0]
            if before.op == "call_module" and isinstance(modules[before.target], torch.nn.Conv2d):
                found[str(call.target)] = str(before.target)
    return found


def export(net: torch.nn.Module, path: Path, size: int, *, fold: bool, dynamo: bool = False) -> Path:
    """Write ``net`` to ``path`` for images of ``size``; the weights do not depend on it.

    ``fold`` is what the exporters do in eval mode; without it (TorchScript only) the BNs stay as they are.
    """
    options: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "dynamo": dynamo}
    if dynamo:
        options |= {"external_data": True, "verbose": False}
    else:
        options |= {"opset_version": OPSET}
        if not fold:
            options |= {"do_constant_folding": False, "training": torch.onnx.TrainingMode.PRESERVE}
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the exporters' advice to use another one, another opset, another torchvision
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(net, (torch.zeros(1, 3, size, size),), str(path), **options)
    finally:
        logging.disable(level)
    return path
