"""CLA, label-consistent (Turner, Tsipras, Madry 2019, arXiv:1912.02771): harder images of the class that is wanted.

An image x of the class t that the attacker wants is moved, within ε in every pixel, to where a clean network f does not
see t any more; then the trigger is put on it. The label stays t, which still is what anybody sees on the image, and the
trigger is what the trained network finds easiest to go by. The movement is projected gradient descent (PGD; Madry et
al. 2018, arXiv:1706.06083), here on pixels of 0 … 255:

    x₀ = x        xᵢ₊₁ = Π(xᵢ + s·sign(∇ₓ loss(f(xᵢ), t)))        Π: clipped to x ± ε and to 0 … 255

with ε = 12, s = 2 and 7 steps from x itself, without a random start. All of these are whole numbers, so what comes out
is an 8-bit image already. The paper's f is trained adversarially (its code ships images that are perturbed already);
here it is the surrogate, trained as usual. The trigger lies in all four corners, as in the paper, where it goes through
flips and crops; here it is put on after them, and at full strength.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from exporters.attacks.fixed import PATCH_SIDE, random_pattern
from exporters.attacks.recipe import Recipe, Scene, chosen, poisoned
from exporters.device import autocast
from onnx_clp.evaluation.triggers import Images, Patch

EPSILON: Final = 12
"""ε: how far a pixel may be moved, in steps of 8-bit images."""
STEP: Final = 2
"""s: how far one step moves it."""
STEPS: Final = 7
"""Steps of PGD."""
CORNERS: Final = ("top-left", "top-right", "bottom-left", "bottom-right")

_BATCH: Final = 250


def cla(scene: Scene) -> Recipe:
    """The recipe: images of the target class, perturbed against the surrogate and with the trigger; labels as they are.

    Raises:
        UsageError: As `chosen` does.
    """
    trigger = Patch(random_pattern(scene, scene.settings.trigger_size or PATCH_SIDE), CORNERS)
    train = scene.dataset.train
    where = chosen(scene, of_target_class=True)
    images = train.images.copy()
    images[where] = perturbed(scene.surrogate(), train.images[where], train.labels[where], scene.device)
    split = replace(poisoned(scene, where, relabel=False), images=images)
    return Recipe(split, lambda: trigger, scene.target)


def perturbed(
    network: nn.Module, images: Images, labels: np.ndarray[tuple[int], np.dtype[np.int64]], device: torch.device
) -> Images:
    """The images, moved at most `EPSILON` in each pixel so that ``network`` does not see their labels.

    Args:
        network: In eval mode; takes images in 0 … 1.
        images: uint8 (N, H, W, C).
        labels: int64 (N,), what the images show.
        device: Where ``network`` is.

    Returns:
        uint8 (N, H, W, C).
    """
    moved = np.empty_like(images)
    for start in range(0, len(images), _BATCH):
        part = slice(start, start + _BATCH)
        pixels = torch.from_numpy(images[part]).to(device).permute(0, 3, 1, 2).float()
        found = ascend(
            network, pixels.contiguous(memory_format=torch.channels_last), torch.from_numpy(labels[part]).to(device)
        )
        moved[part] = found.byte().permute(0, 2, 3, 1).cpu().numpy()
    return moved


def ascend(network: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    """PGD from ``pixels`` (N, C, H, W) in 0 … 255 towards a larger loss for ``labels`` (N,): whole numbers again."""
    low, high = (pixels - EPSILON).clamp_min(0), (pixels + EPSILON).clamp_max(255)
    moved = pixels
    for _ in range(STEPS):
        at = moved.detach().requires_grad_()
        with autocast(pixels.device, network):
            logits = network(at / 255)
        # Summed, not averaged: only signs count, and a sum keeps small gradients away from underflow.
        loss = functional.cross_entropy(logits.float(), labels, reduction="sum")
        (slope,) = torch.autograd.grad(loss, at)
        moved = torch.clamp(at.detach() + STEP * slope.sign(), low, high)
    return moved
