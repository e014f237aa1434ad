"""Time ``spectral_norms`` against one SVD per channel, on the convolutions of three torchvision networks.

``python bench/bounds.py`` prints medians over interleaved repeats in one process on one thread, weights drawn by
``randn``. Loops over the channels stand on the other side, in milliseconds:

* *published*: the method's own, which scales the channel's matrix by the BatchNorm and takes its reduced SVD with both
  sets of singular vectors, by ``torch.linalg.svd`` or by ``numpy.linalg.svd``;
* *svd alone*: the same SVD of ``torch``, of the matrix as it is;
* *values*: the singular values alone of the matrix as it is, ``torch.linalg.svdvals`` or ``compute_uv=False``.

The *ratios* are of the faster loop of each kind over ours. The goal is for the first. *difference* is the largest
relative one to ``numpy.linalg.svd`` in float64.
"""

from __future__ import annotations

import os

# The libraries read these when they are imported.
for _variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"

import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# ruff: noqa: E402

import numpy as np
import torch
import torchvision

from onnx_clp.bounds import spectral_norms

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

NETWORKS = ("resnet18", "resnet50", "vgg16_bn")
REPEATS = 7


def kernels_of(network: str) -> list[NDArray[np.float32]]:
    """Return the kernel of each convolution, as (channels, rows, columns), drawn by randn."""
    generator = torch.Generator().manual_seed(0)
    model = torchvision.models.get_model(network, weights=None)
    return [
        torch.randn(module.weight.flatten(2).shape, generator=generator).numpy()
        for module in model.modules()
        if isinstance(module, torch.nn.Conv2d)
    ]


def published_torch(kernel: NDArray[np.float32]) -> list[float]:
    """Return the bounds as the published code computes them."""
    weight, gamma, std = torch.from_numpy(kernel), torch.ones(len(kernel)), torch.ones(len(kernel))
    return [
        torch.linalg.svd(weight[k].reshape(weight.shape[1], -1) * (gamma[k] / std[k]).abs(), full_matrices=False)[1]
        .max()
        .item()
        for k in range(len(weight))
    ]


def published_numpy(kernel: NDArray[np.float32]) -> list[float]:
    """Return the bounds as the published code computes them, in NumPy's words."""
    gamma, std = np.ones(len(kernel), np.float32), np.ones(len(kernel), np.float32)
    return [
        np.linalg.svd(kernel[k].reshape(kernel.shape[1], -1) * abs(gamma[k] / std[k]), full_matrices=False)[1].max()
        for k in range(len(kernel))
    ]


def svd_alone(kernel: NDArray[np.float32]) -> list[float]:
    """Return the bounds from torch's reduced SVD."""
    return [torch.linalg.svd(matrix, full_matrices=False)[1][0].item() for matrix in torch.from_numpy(kernel)]


def values_torch(kernel: NDArray[np.float32]) -> list[float]:
    """Return the bounds from torch's singular values."""
    return [torch.linalg.svdvals(matrix)[0].item() for matrix in torch.from_numpy(kernel)]


def values_numpy(kernel: NDArray[Any]) -> list[float]:
    """Return the bounds from NumPy's singular values."""
    return [np.linalg.svd(matrix, compute_uv=False)[0] for matrix in kernel]


def milliseconds(function: Callable[[NDArray[np.float32]], object], kernels: list[NDArray[np.float32]]) -> float:
    """Return the time that the function takes for all kernels."""
    start = time.perf_counter()
    for kernel in kernels:
        function(kernel)
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Print one line for each network."""
    torch.set_num_threads(1)
    functions = (published_torch, published_numpy, svd_alone, values_torch, values_numpy, spectral_norms)
    print("               published    svd       values        |       ratio to                   largest")
    print("network      torch numpy  alone  torch numpy   ours | published  svd alone  values  difference")
    for network in NETWORKS:
        kernels = kernels_of(network)
        rounds = [[milliseconds(function, kernels) for function in functions] for _ in range(REPEATS)]
        times = [statistics.median(column) for column in zip(*rounds, strict=True)]
        ours = times[-1]
        difference = max(
            np.abs(spectral_norms(kernel) / values_numpy(kernel.astype(np.float64)) - 1).max() for kernel in kernels
        )
        print(
            f"{network:12}{times[0]:7.0f}{times[1]:6.0f}{times[2]:7.0f}{times[3]:7.0f}{times[4]:6.0f}{ours:7.1f} |"
            f"{min(times[:2]) / ours:10.1f}{times[2] / ours:11.1f}{min(times[3:5]) / ours:8.1f}{difference:12.1e}",
        )


if __name__ == "__main__":
    with torch.no_grad():
        main()
