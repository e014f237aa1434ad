"""The whole command against what it stands beside: time and peak memory, as ratios of medians.

    python bench/command.py [--repeats 7] [--folder FOLDER]

Needs torch and torchvision to make the two models (resnet50, 98 MB, and vgg11_bn, 531 MB, TorchScript exporter with BN
kept, random weights); they are kept in FOLDER where one is given. Both sides of a ratio are run in turn, each in a
process of its own.

The rewrite is measured without onnxruntime in sight, as a plain install has it: with it, sanitize also loads and runs
the model, which takes as long and as much memory as onnxruntime does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PYTHON = sys.executable
COMMAND = [PYTHON, "-m", "onnx_clp"]
HIDE_ONNXRUNTIME = "import sys; sys.modules['onnxruntime'] = None; from onnx_clp.cli import main; main()"
WITHOUT_ONNXRUNTIME = [PYTHON, "-c", HIDE_ONNXRUNTIME]
MIB = 1024


@dataclass(frozen=True)
class Run:
    """One process: wall-clock seconds and peak resident memory in KiB."""

    seconds: float
    memory: int


def run(*arguments: str | Path) -> Run:
    """Run a command to its end; it must succeed."""
    start = time.perf_counter()
    words = [os.fspath(word) for word in arguments]
    devnull = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    process = os.posix_spawnp(words[0], words, os.environ, file_actions=devnull)
    _, status, usage = os.wait4(process, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(words)} ended with {os.waitstatus_to_exitcode(status)}")
    return Run(seconds, usage.ru_maxrss)


def make_models(folder: Path) -> tuple[Path, Path]:
    """Export resnet50 and vgg11_bn where they are not there yet."""
    paths = (folder / "resnet50.onnx", folder / "vgg11_bn.onnx")
    for path in paths:
        if not path.exists():
            import torch
            import torchvision

            network = getattr(torchvision.models, path.stem)(weights=None).eval()
            torch.onnx.export(
                network,
                (torch.zeros(1, 3, 224, 224),),
                path,
                dynamo=False,
                training=torch.onnx.TrainingMode.PRESERVE,
                do_constant_folding=False,
            )
    return paths


def compare(name: str, goal: str, repeats: int, ours: Callable[[], Run], other: Callable[[], Run]) -> None:
    """Run both in turn and print the medians, their ratio and our peak memory."""
    ours(), other()  # both sides start with what they read in the page cache
    pairs = [(ours(), other()) for _ in range(repeats)]
    mine, theirs = (statistics.median(pair[side].seconds for pair in pairs) for side in (0, 1))
    ratio = statistics.median(pair[0].seconds / pair[1].seconds for pair in pairs)
    memory = max(pair[0].memory for pair in pairs) / MIB
    print(f"{name:<44} {mine * 1000:>8.0f} {theirs * 1000:>8.0f} {ratio:>7.2f}  {goal:<16} {memory:>8.0f}")


def measure(folder: Path, repeats: int) -> None:
    """All comparisons."""
    resnet, vgg = make_models(folder)
    bare = run(PYTHON, "-c", "import onnx, numpy").memory / MIB
    print(f"{'ms, median of ' + str(repeats):<44} {'ours':>8} {'other':>8} {'ratio':>7}  {'goal':<16} {'peak MiB':>8}")

    def scan(path: Path) -> Run:
        return run(*COMMAND, "scan", "-q", path)

    def load(path: Path) -> Run:
        return run(PYTHON, "-c", f"import onnx; onnx.load({os.fspath(path)!r})")

    def fresh(name: str) -> Path:
        """A name that nothing stands under, on a disk that has written what it was given before."""
        (folder / name).unlink(missing_ok=True)
        os.sync()
        return folder / name

    def sanitize() -> Run:
        return run(*WITHOUT_ONNXRUNTIME, "sanitize", "-q", vgg, fresh("sanitized.onnx"))

    def copy_and_scan() -> Run:
        copied, scanned = run("cp", vgg, fresh("copy.onnx")), scan(vgg)
        return Run(copied.seconds + scanned.seconds, scanned.memory)

    compare("scan / onnx.load, resnet50 (98 MB)", "<= 1.5", repeats, lambda: scan(resnet), lambda: load(resnet))
    compare("scan / onnx.load, vgg11_bn (531 MB)", "<= 0.7", repeats, lambda: scan(vgg), lambda: load(vgg))
    compare("sanitize / (cp + scan), vgg11_bn (531 MB)", "<= 1.5", repeats, sanitize, copy_and_scan)
    compare(
        "--version / python -c pass",
        "<= +60 ms",
        repeats,
        lambda: run(*COMMAND, "--version"),
        lambda: run(PYTHON, "-c", "pass"),
    )
    print(f"python with onnx and numpy imported: {bare:.0f} MiB; the goal for scan and sanitize is 150 MiB above it")
    for leftover in ("sanitized.onnx", "copy.onnx"):
        (folder / leftover).unlink()


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description="Time and memory of the command, as ratios.")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where the models are kept; a temporary folder without it")
    options = parser.parse_args()
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
        measure(options.folder, options.repeats)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), options.repeats)


if __name__ == "__main__":
    main()
