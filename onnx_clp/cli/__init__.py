"""The command ``onnx-clp``."""

from __future__ import annotations

import os
import sys


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit with its code."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run the command and return its exit code."""
    if arguments == ["--version"]:
        from onnx_clp._version import __version__

        # What pipelines ask first and often: answered before anything else is imported.
        try:
            print(f"onnx-clp {__version__}", flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 2
        return 0
    from onnx_clp.cli.command import invoke

    return invoke(arguments)
