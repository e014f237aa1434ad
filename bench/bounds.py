"""Time ``spectral_norms`` against one SVD per channel, on the convolutions of three torchvision networks.

``python bench/bounds.py`` prints medians over interleaved repeats in one process on one thread, weights drawn by
``randn``. Three loops over the channels stand on the other side:

* *published*: the method's own, ``torch.svd`` with both sets of singular vectors, after the scaling by the BatchNorm;
* *numpy*: ``numpy.linalg.svd(compute_uv=False)``;
* *torch*: ``torch.linalg.svdvals``.

*ratio* is the faster of the last two over ours, *published ratio* the first over ours. *difference* is the largest
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


def published_loop(kernel: NDArray[np.float32]) -> list[float]:
    """Return the bounds as the published code computes them."""
    weight, gamma, std = torch.from_numpy(kernel), torch.ones(len(kernel)), torch.ones(len(kernel))
    return [
        torch.svd(weight[k].reshape(weight.shape[1], -1) * (gamma[k] / std[k]).abs())[1].max().item()
        for k in range(len(weight))
    ]


def numpy_loop(kernel: NDArray[Any]) -> list[float]:
    """Return the bounds from NumPy's singular values."""
    return [np.linalg.svd(matrix, compute_uv=False)[0] for matrix in kernel]


def torch_loop(kernel: NDArray[np.float32]) -> list[float]:
    """Return the bounds from torch's singular values."""
    return [torch.linalg.svdvals(matrix)[0].item() for matrix in torch.from_numpy(kernel)]


def milliseconds(function: Callable[[NDArray[np.float32]], object], kernels: list[NDArray[np.float32]]) -> float:
    """Return the time that the function takes for all kernels."""
    start = time.perf_counter()
    for kernel in kernels:
        function(kernel)
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Print one line for each network."""
    torch.set_num_threads(1)
    functions = (published_loop, numpy_loop, torch_loop, spectral_norms)
    print("ms         published   numpy   torch    ours   ratio  published ratio  difference")
    for network in NETWORKS:
        kernels = kernels_of(network)
        rounds = [[milliseconds(function, kernels) for function in functions] for _ in range(REPEATS)]
        published, numpy_svd, torch_svd, ours = (statistics.median(column) for column in zip(*rounds, strict=True))
        difference = max(
            np.abs(spectral_norms(kernel) / numpy_loop(kernel.astype(np.float64)) - 1).max() for kernel in kernels
        )
        print(
            f"{network:10}{published:10.0f}{numpy_svd:8.0f}{torch_svd:8.0f}{ours:8.1f}"
            f"{min(numpy_svd, torch_svd) / ours:8.1f}{published / ours:17.1f}{difference:12.1e}",
        )


if __name__ == "__main__":
    with torch.no_grad():
        main()
