"""What torch computes on: the device, sums that come out the same each time, and bfloat16 where that is fast."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from onnx_clp.errors import UsageError


def choose_device(name: str) -> torch.device:
    """The device that ``--device`` names; ``auto`` is the first GPU where there is one.

    Raises:
        UsageError: There is no such device, or torch cannot compute on it here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except Exception as error:
        # Each kind of device fails in its own way where its driver or its part of torch is missing.
        why = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UsageError(f"--device {name} cannot be used: {why}", "cpu, cuda, cuda:1 …, or auto") from error
    return device


def make_repeatable(seed: int) -> None:
    """Seed torch, and make it choose algorithms that give the same sums each time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False
    # Some CUDA kernels have no repeatable twin: they warn instead of stopping the run.
    torch.use_deterministic_algorithms(mode=True, warn_only=torch.cuda.is_available())


def autocast(device: torch.device, network: nn.Module) -> Any:
    """bfloat16 where it makes ``network`` faster: on GPUs, and on CPUs with AMX unless it has depthwise convolutions.

    AVX-512's dot products of bfloat16 are not enough: with them alone a step takes longer than in float32. GPUs before
    Ampere only emulate it. AMX multiplies matrices, and a depthwise convolution is none: on two cores a step of 128
    images of mobilenet_v2 of width 8 takes 280 ms in bfloat16, 177 ms in float32.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_amx_tile_supported() and not has_depthwise(network)
    return torch.autocast(device.type, torch.bfloat16) if fast else nullcontext()


def has_depthwise(network: nn.Module) -> bool:
    """Whether ``network`` has a convolution that sees each of several channels for itself."""
    return any(isinstance(part, nn.Conv2d) and part.groups == part.in_channels > 1 for part in network.modules())
