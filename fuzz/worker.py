"""The process that libFuzzer drives: it tries inputs, mutates them, and keeps what broke a law.

Not started by hand: `python -m fuzz` does.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import atheris
import onnx
from google.protobuf.message import DecodeError, EncodeError

from tests.mutations import Dice, mutate

with atheris.instrument_imports(include=["onnx_clp"]):
    import onnx_clp.rewrite  # noqa: F401  # what a trial would import too late to be instrumented
    from fuzz.trial import Outcome, Trial

from fuzz.keep import keep
from fuzz.seeds import data_files

HANG = 60
"""Seconds of the clock after which an input is taken to hang; one that only computes is stopped long before."""

MOST_BYTES = 1 << 17
MOST_MUTATIONS = 4
SAVED_EVERY = 0.25
"""Seconds between two notes of the figures: what is lost of them when an input kills the process."""


@dataclass
class Tally:
    """What was seen so far."""

    path: Path
    inputs: int = 0
    slowest: float = 0.0
    highest: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    _saved: float = 0.0

    def note(self, outcome: Outcome) -> None:
        """Count one input in."""
        self.inputs += 1
        self.slowest = max(self.slowest, outcome.seconds)
        self.highest = max(self.highest, outcome.memory)
        self.ended.update(outcome.ended)
        self.found.update(finding.name for finding in outcome.findings)
        if outcome.findings or time.monotonic() > self._saved + SAVED_EVERY:
            self.save()

    def save(self) -> None:
        """Write the figures where the parent reads them."""
        self._saved = time.monotonic()
        figures: dict[str, Any] = {
            "inputs": self.inputs,
            "slowest": self.slowest,
            "highest": self.highest,
            "ended": self.ended,
            "found": self.found,
        }
        new = self.path.with_suffix(".new")  # the process may be killed at any time
        new.write_text(json.dumps(figures), encoding="utf-8")
        new.replace(self.path)


def mutated(content: bytes, most: int, seed: int) -> bytes:
    """An input made of another: half of the time by mutations of its bytes, else by those of the model it is."""
    dice = Dice(seed)
    if dice.integer(0, 1):
        model = onnx.ModelProto()
        try:
            model.ParseFromString(content)
            mutate(dice, model, MOST_MUTATIONS)
            changed = model.SerializeToString()
        except (DecodeError, EncodeError, ValueError):  # bytes that are no model, or none that protobuf would write
            changed = b""
        if 0 < len(changed) <= most:
            return changed
    return bytes(atheris.Mutate(content, most))


def main() -> None:
    """Fuzz: `python -m fuzz.worker SCRATCH CORPUS SEEDS FIGURES FINDINGS SECONDS SEED`."""
    scratch, corpus, seeds, figures, findings = map(Path, sys.argv[1:6])
    seconds, seed = sys.argv[6:]
    trial, tally = Trial(scratch, data_files()), Tally(figures)

    def one(content: bytes) -> None:
        outcome = trial.run(content)
        for finding in outcome.findings:
            keep(findings, finding, content)
        tally.note(outcome)

    arguments = [
        "fuzz",
        f"-seed={seed}",
        f"-max_total_time={seconds}",
        f"-max_len={MOST_BYTES}",
        "-len_control=0",  # the seeds are as long as they are
        f"-timeout={HANG}",
        "-rss_limit_mb=0",  # the trial has a limit of its own, which an input survives
        f"-artifact_prefix={scratch.parent}/",
        "-handle_segv=0",  # Python's own handler says where it was
        "-handle_abrt=0",
        "-handle_bus=0",
        "-handle_fpe=0",
        "-handle_ill=0",
        str(corpus),
        str(seeds),
    ]
    atheris.Setup(arguments, one, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
