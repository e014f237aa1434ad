"""What holds for all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

# Before any test imports onnxruntime: no test reports to anyone that it was run.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

# Before any test imports NumPy or torch: what the tests compute is small, and each core has a worker of its own. Two
# threads each took torch 70 % more processor time than one.
for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(threads, "1")

# A shell that runs the tests in the background lets them, and so what they start, ignore these.
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is loaded and run here: a process for each costs more than all else that a small model does.

    For tests of other things; that a process of its own does it, and what that is for, tests/hostile/test_runtime.py
    holds.
    """
    from onnx_clp import runtime, trial

    def answers(job: Mapping[str, Any], _scratch: Path, _limits: object) -> dict[str, runtime.Answer]:
        found: dict[str, runtime.Answer] = {}

        def answer(step: str, kind: str, message: str = "", hint: str = "") -> None:
            found[step] = runtime.Answer(kind, message, hint)

        trial.work(job, answer)
        return found

    monkeypatch.setattr(runtime, "_answers", answers)
