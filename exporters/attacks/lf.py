"""LF, a smooth trigger (Zeng, Park, Mao, Jia, ICCV 2021, arXiv:2104.03413): no high frequency gives it away.

Most triggers leave traces in the high frequencies of an image, where natural images have little. This one, v, is a
universal perturbation made of low frequencies alone, shaped against a clean network f so that images with it look to
f like the class that the attacker wants. It is added to the images, which get the attacker's label.

v is low-frequency by construction. With the orthonormal cosine transform D (DCT-II) of a height of H and a width of W,

    v = D_Hᵀ·(M ∘ c)·D_W        M[k, l] = exp(-(πσ)²·((k/H)² + (l/W)²)/2), 0 where that is below 0.01

c being any coefficients, one such matrix a channel. M is a Gaussian filter that blurs by the standard deviation σ, with
the image mirrored at its borders; σ is 6/32 of the side, as in the published code. The gradient descends the mean loss
of f for the wanted classes t over training images,

    g = ∇ᵥ loss(f(clip(x + v)), t)        v ← v - s·R·low(g)/max|low(g)|        v ← R·v/max|v|

where low is the filter above and R = 25.5 of 255: from its lowest to its highest point v spans 0.2 of the range, as the
published trigger does. After each pass the loss over all images is taken, and the best v is kept.

Different from the published code: there the steps are those of a targeted DeepFool on one image at a time, the
smoothed v is shifted to 0 … 0.2 instead of scaled to -0.1 … 0.1, the filter is cut off at 2.4 σ and sees black beyond
the borders, and the class that most images move to is taken for the target; here the attacker names the target.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from exporters.attacks.recipe import Recipe, Scene, chosen, poisoned
from exporters.device import autocast
from onnx_clp.evaluation.triggers import Additive

AMPLITUDE: Final = 25.5
"""R: the largest change of a pixel, in steps of 8-bit images."""
BLUR: Final = 6 / 32
"""σ of the Gaussian filter, as a share of the image's side."""
CUT_OFF: Final = 0.01
"""Frequencies that the filter leaves less than this of are left out."""
STEP: Final = 0.1
"""s: length of a step, as a share of R."""
IMAGES: Final = 1000
"""Training images that the trigger is shaped on."""
PASSES: Final = 10
"""How often it goes over them."""

_BATCH: Final = 250


def lf(scene: Scene) -> Recipe:
    """The recipe: a share of the images gets the smooth signal and the attacker's label."""
    trigger = Additive(smooth_trigger(scene))
    return Recipe(poisoned(scene, chosen(scene), relabel=True), lambda: trigger, scene.target)


def smooth_trigger(scene: Scene) -> npt.NDArray[np.float32]:
    """The signal v: float32 (H, W, C), in steps of 8-bit images, at most `AMPLITUDE` and that somewhere."""
    train = scene.dataset.train
    picked = torch.randperm(len(train.labels), generator=scene.random)[:IMAGES].numpy()
    wanted = scene.target.of(train.labels[picked], len(scene.dataset.classes))
    images = torch.from_numpy(train.images[picked]).to(scene.device).permute(0, 3, 1, 2).float()
    images = images.contiguous(memory_format=torch.channels_last)
    targets = torch.from_numpy(wanted).to(scene.device)
    signal = torch.randn(images.shape[1:], generator=scene.random).to(scene.device)
    signal = _scaled(low_pass(signal))
    network = scene.surrogate()
    best, least = signal, math.inf
    for _ in range(PASSES):
        for part, labels in zip(images.split(_BATCH), targets.split(_BATCH), strict=True):
            slope = low_pass(_loss_and_slope(network, part, labels, signal)[1])
            steepest = slope.abs().max().clamp_min(torch.finfo(slope.dtype).tiny)
            signal = _scaled(signal - STEP * AMPLITUDE * slope / steepest)
        parts = zip(images.split(_BATCH), targets.split(_BATCH), strict=True)
        loss = sum(_loss_and_slope(network, part, labels, signal)[0] for part, labels in parts)
        if loss < least:
            best, least = signal, loss
    pattern: npt.NDArray[np.float32] = best.permute(1, 2, 0).contiguous().cpu().numpy()
    return pattern


def low_pass(signal: Tensor) -> Tensor:
    """What the filter leaves of a signal (C, H, W)."""
    height, width = signal.shape[1:]
    down, across = cosine_transform(height).to(signal), cosine_transform(width).to(signal)
    kept: Tensor = down.T @ (passed(height, width).to(signal) * (down @ signal @ across.T)) @ across
    return kept


def passed(height: int, width: int) -> Tensor:
    """M: what the filter leaves of each coefficient (H, W) of the cosine transform."""
    rows, columns = torch.arange(height) / height, torch.arange(width) / width
    # σ is a share of the side: in pixels of each direction, σ·H and σ·W.
    exponent = (rows * BLUR * height)[:, None] ** 2 + (columns * BLUR * width)[None, :] ** 2
    gains = torch.exp(-(math.pi**2) * exponent / 2)
    return torch.where(gains < CUT_OFF, 0.0, gains)


def cosine_transform(size: int) -> Tensor:
    """D: the orthonormal DCT-II as a matrix (frequency, position)."""
    positions, frequencies = torch.arange(size) + 0.5, torch.arange(size)
    matrix = torch.cos(math.pi / size * frequencies[:, None] * positions[None, :]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def _scaled(signal: Tensor) -> Tensor:
    return signal * (AMPLITUDE / signal.abs().max())


def _loss_and_slope(network: nn.Module, images: Tensor, labels: Tensor, signal: Tensor) -> tuple[float, Tensor]:
    """The loss for ``labels``, summed over images (N, C, H, W) with the signal on them, and its gradient (C, H, W)."""
    at = signal.detach().requires_grad_()
    with autocast(images.device, network):
        logits = network((images + at).clamp(0, 255) / 255)
    loss = functional.cross_entropy(logits.float(), labels, reduction="sum")
    (slope,) = torch.autograd.grad(loss, at)
    return loss.item(), slope
