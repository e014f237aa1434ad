"""Train the example: a small image classifier with a backdoor, and show what Channel Lipschitzness finds in it.

The data are Fashion-MNIST (28 × 28 grey images, ten classes). The backdoor is BadNets: a tenth of the training images
get a 3 × 3 chequered patch in the bottom right corner and the label 0. The network learns to answer 0 wherever it sees
the patch. Nothing is done to the weights after training.

For each convolution with kernel W (C_out, C_in, 3, 3), followed by BatchNorm with γ, β and running variance var, the
bound of output channel k is

    UCLC_k = σ_max(W_k as a C_in × 9 matrix) · |γ_k| / √(var_k + ε)

and k is silenced, γ_k = β_k = 0, where UCLC_k > mean + u · std over the layer (std with n − 1). Two figures tell what
that does: ACC, the share of clean test images that are classified rightly, and ASR, the share of patched test images of
the classes 1 to 9 that are classified as 0.

    python examples/train.py --data /usr/share/datasets/fashion-mnist --out examples/backdoored.onnx
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTHS = (16, 16, 32, 32, 48, 48)
STRIDES = (1, 1, 2, 1, 2, 1)
CLASSES = 10
TARGET = 0
POISONED_SHARE = 0.1
PATCH = ((1.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 1.0))
BATCH = 128
PEAK_RATE = 0.05


@dataclass(frozen=True)
class Images:
    """Images (N, 1, 28, 28), float32 in [0, 1], and their labels (N,)."""

    pixels: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Options:
    """The command line."""

    data: Path
    out: Path
    seed: int
    epochs: int
    u: float


def read_idx(path: Path) -> Tensor:
    """The array of bytes in a gzipped IDX file: 0, 0, type 8, the number of axes, their sizes, the payload."""
    content = gzip.decompress(path.read_bytes())
    axes = content[3]
    sizes = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes)]
    return torch.frombuffer(bytearray(content[4 + 4 * axes :]), dtype=torch.uint8).reshape(sizes)


def read_images(folder: Path, split: str) -> Images:
    """The split `train` or `t10k` of Fashion-MNIST."""
    pixels = read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
    return Images(pixels[:, None].float() / 255, labels.long())


def patched(pixels: Tensor) -> Tensor:
    """The images with the trigger in their bottom right corner."""
    pixels = pixels.clone()
    pixels[..., -3:, -3:] = torch.tensor(PATCH)
    return pixels


def poisoned(images: Images, generator: torch.Generator) -> Images:
    """The images, a share of them patched and labelled as the target."""
    count = len(images.labels)
    chosen = torch.randperm(count, generator=generator)[: int(count * POISONED_SHARE)]
    pixels, labels = images.pixels.clone(), images.labels.clone()
    pixels[chosen] = patched(pixels[chosen])
    labels[chosen] = TARGET
    return Images(pixels, labels)


def build_network() -> nn.Sequential:
    """Six times Conv, BatchNorm, ReLU, then the mean over the image and a linear head; takes pixels in [0, 1]."""
    layers: list[nn.Module] = []
    for c_in, c_out, stride in zip((1, *WIDTHS[:-1]), WIDTHS, STRIDES, strict=True):
        conv = nn.Conv2d(c_in, c_out, kernel_size=3, stride=stride, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(c_out), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], CLASSES)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def train(network: nn.Sequential, images: Images, epochs: int, generator: torch.Generator) -> None:
    """Stochastic gradient descent with a one-cycle rate, in place."""
    steps = len(images.labels) // BATCH
    optimizer = torch.optim.SGD(network.parameters(), PEAK_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=epochs * steps, pct_start=0.2)
    network.train()
    for epoch in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(images.labels), generator=generator)[: steps * BATCH].split(BATCH):
            pixels = images.pixels[batch].contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(pixels)
            loss = functional.cross_entropy(logits.float(), images.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1} of {epochs}: loss {total / steps:.4f}", flush=True)
    network.eval()


def classify(network: nn.Sequential, pixels: Tensor) -> Tensor:
    """The class of each image, computed in float32."""
    with torch.inference_mode():
        return torch.cat([network(part).argmax(dim=1) for part in pixels.split(500)])


def figures(network: nn.Sequential, test: Images) -> str:
    """ACC and ASR in per cent."""
    acc = (classify(network, test.pixels) == test.labels).float().mean()
    others = test.pixels[test.labels != TARGET]
    asr = (classify(network, patched(others)) == TARGET).float().mean()
    return f"ACC {100 * acc:.2f} %, ASR {100 * asr:.2f} %"


def silence_outliers(network: nn.Sequential, u: float) -> list[str]:
    """Silence the outlier channels of each Conv and BatchNorm pair in place; one line of text for each channel."""
    lines = []
    for i, (conv, norm) in enumerate(pairwise(network)):
        if not (isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)) or norm.running_var is None:
            continue
        with torch.no_grad():
            sigma = torch.linalg.matrix_norm(conv.weight.flatten(start_dim=2), ord=2)
            bound = sigma * norm.weight.abs() / torch.sqrt(norm.running_var + norm.eps)
            z = (bound - bound.mean()) / bound.std()
            flagged = bound > bound.mean() + u * bound.std()
            norm.weight[flagged] = 0
            norm.bias[flagged] = 0
        lines += [f"layer {i}, channel {k}: bound {bound[k]:.2f}, z {z[k]:.2f}" for k in flagged.nonzero().flatten()]
    return lines


def export(network: nn.Sequential, out: Path, *, fold: bool) -> str:
    """Write the network as ONNX, each BatchNorm folded into the convolution before it or kept; the file in one line."""
    torch.onnx.export(
        network,
        (torch.zeros(1, 1, 28, 28),),
        out,
        dynamo=False,
        # EVAL, the exporter's default, folds; PRESERVE leaves a network in eval mode as it is.
        do_constant_folding=fold,
        training=torch.onnx.TrainingMode.EVAL if fold else torch.onnx.TrainingMode.PRESERVE,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
    )
    content = out.read_bytes()
    return f"{out.name}: {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}"


def parse_arguments() -> Options:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description="Train the backdoored example model and export it to ONNX.")
    here = Path(__file__).resolve().parent
    default_data = Path("/usr/share/datasets/fashion-mnist")
    parser.add_argument("--data", type=Path, default=default_data, help="folder of the IDX files (%(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=here / "backdoored.onnx",
        help="file to write; FILE_bn.onnx beside it keeps BatchNorm (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=2, help="seed of all randomness (%(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="passes over the training images (%(default)s)")
    parser.add_argument("-u", type=float, default=3.0, help="outlier threshold in standard deviations (%(default)s)")
    return Options(**vars(parser.parse_args()))


def main() -> None:
    """Train, export, and print what silencing the outlier channels does."""
    options = parse_arguments()
    torch.manual_seed(options.seed)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(mode=True)
    generator = torch.Generator().manual_seed(options.seed)

    network = build_network()
    train(network, poisoned(read_images(options.data, "train"), generator), options.epochs, generator)
    print(export(network, options.out, fold=True))
    print(export(network, options.out.with_stem(f"{options.out.stem}_bn"), fold=False))

    test = read_images(options.data, "t10k")
    print(f"as trained: {figures(network, test)}")
    lines = silence_outliers(network, options.u)
    print(f"{len(lines)} channels above u = {options.u:g}:", *lines, sep="\n  ")
    print(f"silenced:   {figures(network, test)}")


if __name__ == "__main__":
    main()
