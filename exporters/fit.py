"""Training: the whole set in memory, bfloat16 where that is faster, one cycle of the learning rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from exporters.attacks.recipe import Batch, Recipe
from exporters.augment import cropped, padded
from exporters.data import Dataset, Split
from exporters.device import autocast
from exporters.settings import Settings
from onnx_clp.evaluation.triggers import Trigger

WARM_UP = 0.25
"""Share of the steps in which the learning rate rises."""

_NOT_MIRRORED = frozenset({"gtsrb"})
"""Data sets in which a mirrored image means something else: keep left, keep right."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where the training is.

    Attributes:
        epoch: The one that runs, from 1.
        epochs: How many there are.
        step: The last one of this epoch that was made, from 1.
        steps: How many an epoch has.
        loss: Mean of the epoch so far.
        accuracy: Of the epoch so far, on what it is trained on, 0 to 1.
        asr: Attack success after the epoch before, 0 to 1; None before there is one, and without attack.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float
    asr: float | None = None


class Normalised(nn.Module):
    """A network that takes images in 0 … 1 instead of normalised ones.

    Args:
        network: Takes (x - mean) / std.
        mean: One number a channel.
        std: One number a channel.
    """

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Any:
        """The network's answer to images (N, C, H, W) in 0 … 1."""
        return self.network((images - self.mean) / self.std)


def as_tensor(split: Split, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, C, H, W) and labels int64 (N,) on ``device``."""
    images = torch.from_numpy(split.images).permute(0, 3, 1, 2).contiguous()
    return images.to(device), torch.from_numpy(split.labels).to(device)


def fit(
    network: nn.Module,
    recipe: Recipe,
    dataset: Dataset,
    settings: Settings,
    device: torch.device,
    on_step: Callable[[Progress], None],
    on_epoch: Callable[[Progress], None],
) -> None:
    """Train ``network`` in place as ``recipe`` says; it is in eval mode afterwards.

    Args:
        network: Takes normalised images.
        recipe: What to train on, and what happens between the steps.
        dataset: Gives mean and standard deviation.
        settings: Epochs, batch size, learning rate and so on.
        device: Where ``network`` is.
        on_step: Told after every step.
        on_epoch: Told after every epoch, with the network in eval mode.
    """
    images, labels = as_tensor(recipe.train, device)
    size = (images.shape[2], images.shape[3])
    images = padded(images)
    batch_size = min(settings.batch_size, len(labels))
    steps = len(labels) // batch_size
    random = torch.Generator().manual_seed(settings.manual_seed + 1)
    takes_images: nn.Module = Normalised(network, dataset.mean, dataset.std).to(device)
    if settings.compile:
        takes_images = torch.compile(takes_images)
    optimizer = torch.optim.SGD(
        network.parameters(),
        settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
    )
    # The schedule divides by the steps of its rise less one: of four steps in all, nothing.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, total_steps=max(settings.epochs * steps, 5), pct_start=WARM_UP
    )
    for epoch in range(settings.epochs):
        network.train()
        loss_sum, right = 0.0, 0
        for step, chosen in enumerate(
            torch.randperm(len(labels), generator=random)[: steps * batch_size].split(batch_size)
        ):
            where = chosen.to(device)
            seen = cropped(images[where], size, random, flip=dataset.name not in _NOT_MIRRORED)
            if recipe.train.triggered is not None and recipe.trigger is not None:
                _put(recipe.trigger(), seen, torch.from_numpy(recipe.train.triggered[chosen.numpy()]))
            batch = recipe.on_batch(network, Batch(seen.float() / 255, labels[where]))
            loss, correct = _step(takes_images, batch, optimizer, device)
            schedule.step()
            recipe.after_step(network)
            loss_sum, right = loss_sum + loss, right + correct
            seen_so_far = (step + 1) * batch_size
            progress = Progress(epoch + 1, settings.epochs, step + 1, steps, loss_sum / (step + 1), right / seen_so_far)
            on_step(progress)
        recipe.after_epoch(network)
        network.eval()
        on_epoch(progress)
    network.eval()


def _put(trigger: Trigger, images: Tensor, where: Tensor) -> None:
    """Put the trigger on those of the images uint8 (N, C, H, W) for which ``where`` (N,) is true, in place."""
    chosen = where.nonzero().flatten().to(images.device)
    triggered = trigger(images[chosen].permute(0, 2, 3, 1).cpu().numpy())
    images[chosen] = torch.from_numpy(triggered).permute(0, 3, 1, 2).to(images.device)


def _step(
    network: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, device: torch.device
) -> tuple[float, int]:
    """One step down the gradient; the loss and how many images were classified as labelled."""
    with autocast(device, network):
        logits = network(batch.images.contiguous(memory_format=torch.channels_last))
    logits = logits.float()
    loss = functional.cross_entropy(logits, batch.labels)
    total = loss if batch.penalty is None else loss + batch.penalty
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    optimizer.step()
    return loss.item(), int((logits.detach().argmax(dim=1) == batch.labels).sum())
