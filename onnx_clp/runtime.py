"""Ask onnxruntime, in a process of its own, whether a rewritten model loads and its silenced channels are silent.

onnxruntime is a large program in C++, and the model is a stranger's: it may crash onnxruntime, keep it busy for ever,
or make it take all memory. None of that may take down who asked. The process, whose script is `trial`, gets so much
time and memory and no more, leaves no core dump, and is ended with whoever started it; what goes in and out is JSON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final

import onnx

from onnx_clp import trial
from onnx_clp.limits import Limits
from onnx_clp.model.edits import length_delimited
from onnx_clp.model.wire import MODEL_GRAPH
from onnx_clp.trial import first_line

__all__ = ["Answer", "Observed", "Trial", "available", "classify", "examine", "first_line"]

PROCESS: Final = 1 << 30
"""Bytes of address space for Python, NumPy and onnxruntime themselves; they were seen to map 0.2 to 0.5 GiB."""

PER_BYTE: Final = 8
"""Bytes of address space that a byte on disk pays for: loading takes two, and weights of 8 bits become 32 when run."""

RUN_MEMORY: Final = 8
"""A run holds the outputs of all silenced layers at once: this many times what ``limits.memory`` gives a scan."""

_FROM_OUTSIDE: Final = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
"""Signals that no crash sends; the first is what a system without memory ends a process with."""


@dataclass(frozen=True, slots=True)
class Observed:
    """A value of the graph: its channels at ``axis`` (of the whole value) should equal ``rests``, one each."""

    value: str
    axis: int
    channels: tuple[int, ...]
    rests: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one step.

    Attributes:
        kind: One of those in `trial`, ``crashed`` or ``timeout``.
        message: What went wrong; empty where nothing did.
        hint: What to do next.
    """

    kind: str
    message: str = ""
    hint: str = ""

    @property
    def fine(self) -> bool:
        """Whether it went well."""
        return self.kind == "fine"

    @property
    def words(self) -> str:
        """Message and hint."""
        return f"{self.message}: {self.hint}" if self.hint else self.message


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of a model.

    Attributes:
        load: Of loading it.
        original: Of loading the model it was made from; None where that was not tried.
        run: Of running it; None where that was not tried.
    """

    load: Answer
    original: Answer | None = None
    run: Answer | None = None


def available() -> bool:
    """Whether onnxruntime (or onnxruntime-gpu) is installed."""
    return importlib.util.find_spec("onnxruntime") is not None


def examine(
    model: Path,
    original: Path,
    observed: Sequence[Observed],
    input_shapes: Mapping[str, tuple[int, ...]],
    size: int,
    limits: Limits,
) -> Trial:
    """Load a model and run it on random input.

    Args:
        model: The model; a copy with more outputs is written beside it for as long as it is run.
        original: What it was made from, which is loaded where ``model`` is not.
        observed: What to look at in the run; nothing is run where there is nothing.
        input_shapes: Shapes by input name, for inputs without a fixed one.
        size: Bytes of ``model`` and its data files.
        limits: Memory and seconds.

    ``run`` is ``fine`` where every observed channel was seen to be silent.
    """
    model, original = model.absolute(), original.absolute()
    folders, room = (model.parent, original.parent), PROCESS + PER_BYTE * size + RUN_MEMORY * limits.memory
    job = {"address_space": room, "seconds": limits.seconds, "path": _import_path(folders)}
    steps = {"load": str(model), "original": str(original), "observed": [asdict(part) for part in observed]}
    try:
        with tempfile.NamedTemporaryFile(dir=model.parent, prefix="probe-", suffix=".part", buffering=0) as probe:
            unwritten = _write_probe(model, observed, probe) if observed else ""
            run = probe.name if observed and not unwritten else ""
            answers = _answers({**job, **steps, "run": run, "shapes": dict(input_shapes)}, model.parent, limits)
        load = answers["load"]
        if load.kind == "crashed":
            again = _answers({**job, "load": str(original), "original": "", "run": ""}, model.parent, limits)
            return Trial(load, original=again["load"])
    except OSError as error:
        return Trial(Answer("failed", f"onnxruntime cannot be run: {error.strerror or error}"))
    if unwritten and load.fine:
        return Trial(load, run=Answer("not-run", unwritten))
    return Trial(load, answers.get("original"), answers.get("run"))


def classify(model: Path, inputs: Path, given: str, output: str, scratch: Path, size: int, limits: Limits) -> Answer:
    """Run a model on made-up inputs.

    Args:
        model: The model.
        inputs: An .npy (batches, N, …).
        given: Name of the input.
        output: Name of the output with a number for each class.
        scratch: A folder for temporary files.
        size: Bytes of ``model`` and its data files.
        limits: Memory and seconds.

    The message is ``fine``'s classes as a JSON array of integers, −1 for a NaN; else it says why there are none.
    """
    room = PROCESS + PER_BYTE * size + RUN_MEMORY * limits.memory
    job = {"address_space": room, "seconds": limits.seconds, "path": _import_path((model.absolute().parent,))}
    asked = {"model": str(model.absolute()), "inputs": str(inputs.absolute()), "given": given, "output": output}
    try:
        answers = _answers({**job, "classify": asked}, scratch, limits)
    except OSError as error:
        return Answer("failed", f"onnxruntime cannot be run: {error.strerror or error}")
    return answers["classify"] if "classify" in answers else answers["load"]


def _write_probe(model: Path, observed: Sequence[Observed], target: IO[bytes]) -> str:
    """Write a copy of ``model`` that gives what is to be observed too; why that cannot be, empty where it can."""
    graph = onnx.GraphProto(output=[onnx.ValueInfoProto(name=part.value) for part in observed])
    try:
        with model.open("rb") as source:
            while block := source.read(1 << 20):
                _write(target, block)
        # A second graph field is merged into the first: the same model with more outputs.
        _write(target, length_delimited(MODEL_GRAPH, graph.SerializeToString()))
    except OSError as error:
        return f"a copy with more outputs cannot be written: {error.strerror or error}"
    return ""


def _write(target: IO[bytes], content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[target.write(rest) :]


def _answers(job: Mapping[str, Any], scratch: Path, limits: Limits) -> dict[str, Answer]:
    """Do ``job`` in a process of its own: the answers by step, one for the step that it ended in among them."""
    if not sys.executable or getattr(sys, "frozen", False):
        return {"load": Answer("failed", "there is no Python to run onnxruntime with")}
    # Files and not pipes: who says more than is read fills nobody's memory and waits for nobody.
    with (
        tempfile.TemporaryFile(dir=scratch) as given,
        tempfile.TemporaryFile(dir=scratch) as answered,
        tempfile.TemporaryFile(dir=scratch) as said,
    ):
        given.write(json.dumps(job).encode())
        given.seek(0)
        code = _run_script(given, answered, said, limits.seconds)
        answers = _parsed(_content(answered))
        missing = _missing(answers, job)
        if missing:
            answers[missing] = _ended(code, _content(said).decode("utf-8", "replace"), limits)
    room = job["address_space"]
    return {step: _short(room, limits) if answer.kind == "memory" else answer for step, answer in answers.items()}


def _content(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read(trial.OUTPUT)


def _run_script(given: IO[bytes], answered: IO[bytes], said: IO[bytes], seconds: int) -> int | None:
    """Run `trial` to its end: its exit code; None where it had to be ended after ``seconds``."""
    process = subprocess.Popen(  # noqa: S603  # this interpreter, and a script of this package
        # -I: neither the current folder nor an environment variable says from where to import.
        [sys.executable, "-I", Path(trial.__file__).absolute()],
        stdin=given,
        stdout=answered,
        stderr=said,
        cwd=Path(sys.executable).anchor,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:  # also on Ctrl-C
        process.kill()
        process.wait()


def _import_path(folders: Sequence[Path]) -> list[str]:
    """From where this process imports, but for the folder it works in and ``folders``, which strangers fill."""
    refused = {os.path.realpath(folder) for folder in folders}
    with suppress(OSError):  # the current folder was removed
        refused.add(os.path.realpath(os.curdir))
    return [folder for folder in sys.path if Path(folder).is_absolute() and os.path.realpath(folder) not in refused]


def _parsed(lines: bytes) -> dict[str, Answer]:
    """The answers by step; a line that was cut short is none."""
    answers = {}
    for line in lines.splitlines():
        try:
            answer = json.loads(line)
            answers[str(answer["step"])] = Answer(*(str(answer[key]) for key in ("kind", "message", "hint")))
        except (ValueError, KeyError, TypeError, RecursionError):
            break
    return answers


def _missing(answers: Mapping[str, Answer], job: Mapping[str, Any]) -> str:
    """The step that should have been answered and was not; empty where there is none."""
    if "classify" in job:
        return "" if answers else "classify"
    if "load" not in answers:
        return "load"
    after = {"fine": "run", "refused": "original"}.get(answers["load"].kind, "")
    return after if after and job[after] and after not in answers else ""


def _ended(code: int | None, words: str, limits: Limits) -> Answer:
    """Why the process gave no answer, from its exit code and what it said on stderr."""
    if code is None or code == -signal.SIGALRM:  # by which it ends itself
        hint = f"more is given with --limit seconds={2 * limits.seconds}"
        return Answer("timeout", f"onnxruntime did not finish in {limits.seconds:,} s", hint)
    if trial.speaks_of_memory(words):
        return Answer("memory")
    if -code in _FROM_OUTSIDE:
        return Answer("failed", f"onnxruntime was ended from outside (signal {-code}), for want of memory perhaps")
    if code < 0:
        return Answer("crashed", f"onnxruntime crashed on it (signal {-code})")
    last = (words.strip().splitlines() or ["it does not say why"])[-1][:300]
    return Answer("failed", f"the process that runs onnxruntime ended with code {code}: {last}")


def _short(room: int, limits: Limits) -> Answer:
    """What to say where ``room`` bytes of memory were too few."""
    hint = f"more is given with --limit memory={2 * limits.memory}"
    return Answer("memory", f"onnxruntime needs more than the {room >> 20:,} MiB it is given", hint)
