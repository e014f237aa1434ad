"""Load and run models in onnxruntime: the script that `runtime` starts in a process of its own.

It imports nothing of the package, so that it is started by its path, with no folder of the user's among those that
Python imports from. A job comes in on stdin, as JSON; an answer to each step goes out on stdout, a line of JSON, as
soon as it is known: where the process ends early, the answer that is missing tells at which step.

========  ======================================  ==================================================================
step      what is tried                           kinds of answer
========  ======================================  ==================================================================
load      load the written model                  fine, refused, memory, failed (onnxruntime itself cannot be had)
original  where that was refused: load the input  fine, refused, memory
run       run the written model, more outputs     fine, loud (a channel is not silent), not-run, usage, memory
classify  alone: run a model on given inputs      fine, with the classes as JSON; refused, not-run, memory
========  ======================================  ==================================================================
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

DEFAULT_BATCH: Final = 1
"""Stands in for a first axis without a fixed extent, which by convention is the batch."""

THREADS: Final = 4
"""Threads that run one operator at most: each maps a stack and a heap, and one image needs no more."""

OUTPUT: Final = 1 << 20
"""Bytes that the process may write to a file: its answers, and what onnxruntime says of itself."""

GRACE: Final = 5
"""Seconds after which the process ends itself, where nobody is left to end it in time."""

NO_TELEMETRY: Final = "ORT_DISABLE_TELEMETRY"
"""The environment variable that onnxruntime looks for, https://github.com/microsoft/onnxruntime/blob/main/docs/Privacy.md."""

ROUNDINGS: Final = 4
"""By so many a channel may differ from a rest that is not 0."""

_DTYPES: Final = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}

_MEMORY: Final = ("bad_alloc", "bad allocation", "Failed to allocate memory", "Unable to allocate", "MemoryError")
"""What onnxruntime and NumPy say where there is not enough memory."""


class Stop(Exception):  # noqa: N818  # not an error: the answer to a step
    """Why a step did not go well: a kind of answer, a message, and what to do next."""

    def __init__(self, kind: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.answer = {"kind": kind, "message": message, "hint": hint}


def main() -> None:
    """Do the job on stdin."""
    job = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever anyone prints is no answer
    confine(job["address_space"], job["seconds"])
    sys.path[:] = job["path"]

    def answer(step: str, kind: str, message: str = "", hint: str = "") -> None:
        print(json.dumps({"step": step, "kind": kind, "message": message, "hint": hint}), file=answers, flush=True)

    work(job, answer)


def work(job: Mapping[str, Any], answer: Callable[..., None]) -> None:
    """Do ``job`` in this process; ``answer`` is told the step, the kind, and where it is not fine message and hint."""

    def go(step: str, attempt: Callable[..., Any], *arguments: Any, **named: Any) -> str:  # noqa: ANN401  # whatever the step takes
        try:
            found = attempt(*arguments, **named)
        except Stop as stop:
            answer(step, **stop.answer)
            return stop.answer["kind"]
        answer(step, "fine", found if isinstance(found, str) else "")
        return "fine"

    try:
        onnxruntime = import_onnxruntime()
    except Exception as error:  # noqa: BLE001  # whatever a broken installation raises
        answer("load", "failed", f"onnxruntime cannot be imported: {first_line(error)}")
        return
    if "classify" in job:
        go("classify", classify, onnxruntime, **job["classify"])
        return
    kind = go("load", load, onnxruntime, job["load"])
    if kind == "refused" and job["original"]:
        go("original", load, onnxruntime, job["original"])
    if kind == "fine" and job["run"]:
        go("run", run, onnxruntime, job["run"], job["observed"], job["shapes"])


def import_onnxruntime() -> Any:  # noqa: ANN401  # optional, and without types
    """The module, which shall send nothing to anyone. Raises what importing it raises.

    Its official builds make a lasting identifier of the machine and report to Microsoft, unless they are told not to
    before they are imported.
    """
    os.environ[NO_TELEMETRY] = "1"
    import onnxruntime  # slow to import

    if hasattr(onnxruntime, "disable_telemetry_events"):  # on Windows older ones have this alone
        onnxruntime.disable_telemetry_events()
    return onnxruntime


def confine(address_space: int, seconds: int) -> None:
    """Give this process so many bytes of address space and so much time, and no more."""
    if hasattr(signal, "alarm"):
        signal.alarm(min(seconds + GRACE, (1 << 31) - 1))
    try:
        import resource
    except ImportError:  # not on Windows
        return
    for limit, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, OUTPUT),
        (resource.RLIMIT_AS, address_space),
    ):
        _, hard = resource.getrlimit(limit)
        allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(limit, (allowed, allowed))
        except (OSError, ValueError, OverflowError):  # a system that has no such limit
            continue


def load(ort: Any, path: str) -> Any:  # noqa: ANN401  # onnxruntime is optional and has no types
    """A session of the model at ``path``."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = min(THREADS, os.cpu_count() or 1)
    options.enable_cpu_mem_arena = False  # it takes up to twice what is needed
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:
        # onnxruntime raises a dozen kinds, all of them its answer.
        raise Stop(_kind(error, "refused"), first_line(error)) from error


def run(ort: Any, path: str, observed: Sequence[Mapping[str, Any]], shapes: Mapping[str, Sequence[int]]) -> None:  # noqa: ANN401
    """Run the model at ``path`` on random input: each observed channel must equal its rest, 0 exactly."""
    import numpy as np

    try:
        session = load(ort, path)
        feed = random_inputs(session, shapes)
        outputs = session.run([part["value"] for part in observed], feed)
    except Stop as stop:
        if stop.answer["kind"] != "refused":
            raise
        raise Stop("not-run", f"onnxruntime does not run it on random input: {stop}") from stop
    except Exception as error:
        text = f"onnxruntime does not run it on random input: {first_line(error)}"
        raise Stop(_kind(error, "not-run"), text) from error
    for part, output in zip(observed, outputs, strict=True):
        value, axis, channels = part["value"], part["axis"], part["channels"]
        if not _has_channels(output, axis, max(channels, default=0)):
            raise Stop("not-run", f"on random input {value!r} has not the channels that were silenced")
        silent = np.take(output, channels, axis=axis)
        if np.isnan(silent.astype(np.float64)).any():
            why = "a weight is not finite, or something overflows"
            raise Stop("not-run", f"on random input {value!r} is not a number: {why}")
        rests = np.asarray(part["rests"], np.float64)[:, np.newaxis]
        # What the constants of a channel give is rounded to their type, and again where one is multiplied by another.
        room = ROUNDINGS * np.finfo(silent.dtype).eps * np.abs(rests) if silent.dtype.kind == "f" else 0.0
        rows = np.moveaxis(silent, axis, 0).reshape(len(channels), -1).astype(np.float64)
        loud = np.flatnonzero(np.any(np.abs(rows - rests) > room, 1))
        if loud.size:
            raise Stop("loud", f"channel {channels[int(loud[0])]} of {value!r} is not silent in the rewritten model")


def classify(ort: Any, model: str, inputs: str, given: str, output: str) -> str:  # noqa: ANN401  # as above
    """The class of each of ``inputs``, an .npy (batches, N, …) for the input ``given``, as JSON; −1 for a NaN."""
    import numpy as np

    session = load(ort, model)
    found: list[int] = []
    try:
        for batch in np.load(inputs, mmap_mode="r", allow_pickle=False):
            scores = session.run([output], {given: np.array(batch)})[0]
            found += _classes(scores, len(batch), output)
    except Stop:
        raise
    except Exception as error:
        text = f"onnxruntime does not run it on made-up inputs: {first_line(error)}"
        raise Stop(_kind(error, "not-run"), text) from error
    return json.dumps(found)


def _classes(scores: Any, count: int, output: str) -> list[int]:  # noqa: ANN401  # as in _has_channels
    """The class of each of ``count`` inputs."""
    import numpy as np

    if getattr(scores, "ndim", 0) not in {2, 4} or len(scores) != count or scores.dtype.kind not in "fiu":
        raise Stop("not-run", f"{output!r} has not a number for each class of each made-up input")
    rows = scores.reshape(count, -1)
    return [int(each) for each in np.where(np.isnan(rows).any(1), -1, rows.argmax(1))]


def _has_channels(output: Any, axis: int, largest: int) -> bool:  # noqa: ANN401  # a sequence is a list, a map a dictionary
    """Whether ``output`` is an array of numbers with channel ``largest`` on ``axis``."""
    shape = getattr(output, "shape", ())
    return len(shape) > axis and shape[axis] > largest and output.dtype.kind in "fiub"


def random_inputs(session: Any, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:  # noqa: ANN401
    """Standard normal numbers for float inputs, small ones for integer inputs."""
    import numpy as np

    generator = np.random.default_rng(0)
    inputs = {given.name: given for given in session.get_inputs()}
    unknown = sorted(set(shapes) - set(inputs))
    if unknown:
        raise Stop("usage", f"the model has no input {unknown[0]!r}", f"its inputs: {', '.join(sorted(inputs))}")
    feed = {}
    for name, given in inputs.items():
        dtype = _DTYPES.get(given.type)
        if dtype is None:
            raise Stop("not-run", f"input {name!r} has type {given.type}")
        numbers = np.asarray(generator.standard_normal(_shape(name, given.shape, shapes.get(name))))
        feed[name] = np.asarray(numbers if np.dtype(dtype).kind == "f" else np.abs(numbers) > 1, dtype)
    return feed


def _shape(name: str, declared: Sequence[int | str | None], asked: Sequence[int] | None) -> tuple[int, ...]:
    """The shape to feed: the one asked for where it fits, else the declared one where it is fixed but for the batch."""
    text = ",".join("?" if size is None else str(size) for size in declared)
    if asked is not None:
        fits = len(asked) == len(declared) and all(
            not isinstance(size, int) or size == given for size, given in zip(declared, asked, strict=True)
        )
        if not fits:
            raise Stop("usage", f"input {name!r} has the shape ({text}), not {','.join(map(str, asked))}")
        return tuple(asked)
    shape = [DEFAULT_BATCH if axis == 0 and not isinstance(size, int) else size for axis, size in enumerate(declared)]
    if not all(isinstance(size, int) for size in shape):
        example = ",".join(str(size) if isinstance(size, int) else "224" for size in shape)
        advice = f"give --input-shape {name}={example} or what fits"
        raise Stop("not-run", f"input {name!r} has a dynamic shape ({text}): {advice}")
    return tuple(int(size) for size in shape if size is not None)


def _kind(error: Exception, otherwise: str) -> str:
    """``memory`` where ``error`` says that there was not enough, else ``otherwise``."""
    short = isinstance(error, MemoryError) or speaks_of_memory(str(error))
    return "memory" if short else otherwise


def speaks_of_memory(text: str) -> bool:
    """Whether onnxruntime or NumPy says in ``text`` that there is not enough memory."""
    return any(words in text for words in _MEMORY)


def first_line(error: Exception) -> str:
    """The first line of what ``error`` says, cut to what a person reads."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


if __name__ == "__main__":
    main()
