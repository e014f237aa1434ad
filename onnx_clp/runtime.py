"""Ask onnxruntime: does a rewritten model load, and are its silenced channels silent? Nothing else imports it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

from onnx_clp.errors import UsageError, VerificationError
from onnx_clp.model.edits import length_delimited
from onnx_clp.model.tensors import Array
from onnx_clp.model.wire import MODEL_GRAPH

DEFAULT_BATCH: Final = 1
"""Stands in for a first axis without a fixed extent, which by convention is the batch."""

_DTYPES: Final = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True, slots=True)
class Observed:
    """A value of the graph to look at: its channels at ``axis`` (of the whole value) should all equal ``rest``."""

    value: str
    axis: int
    channels: tuple[int, ...]
    rest: float


class NotRun(Exception):  # noqa: N818  # not an error: the reason why a check could not be made
    """The model could not be run here, for a reason that says nothing about the rewrite."""


def available() -> bool:
    """Whether onnxruntime (or onnxruntime-gpu) is installed."""
    return importlib.util.find_spec("onnxruntime") is not None


def load_error(path: Path) -> str:
    """Why onnxruntime does not load the model at ``path``; empty where it does."""
    try:
        _session(path)
    except Exception as error:  # noqa: BLE001  # onnxruntime raises a dozen kinds, all of them its answer
        return first_line(error)
    return ""


def check_silence(
    path: Path, observed: Sequence[Observed], input_shapes: Mapping[str, tuple[int, ...]], scratch: Path
) -> int:
    """Run the model at ``path`` on random input and look at the silenced channels.

    Args:
        path: The model.
        observed: What to look at.
        input_shapes: Shapes by input name, for inputs without a fixed one.
        scratch: Where a copy of the model with more outputs may be written; must be the folder of its data files.

    Returns:
        How many channels were seen to be silent.

    Raises:
        NotRun: An input's shape is not known, or onnxruntime does not run the model on random input.
        VerificationError: A channel is not silent.
        UsageError: ``input_shapes`` names no input of the model, or does not fit.
    """
    graph = onnx.GraphProto(output=[onnx.ValueInfoProto(name=part.value) for part in observed])
    probe = scratch / f"{path.name}.probe"
    with path.open("rb") as source, probe.open("xb") as target:
        while block := source.read(1 << 20):
            target.write(block)
        # A second graph field is merged into the first: the same model with more outputs.
        target.write(length_delimited(MODEL_GRAPH, graph.SerializeToString()))
    try:
        session = _session(probe)
        feed = _random_inputs(session, input_shapes)
        outputs = session.run([part.value for part in observed], feed)
    except (NotRun, UsageError):
        raise
    except Exception as error:
        raise NotRun(f"onnxruntime does not run it on random input: {first_line(error)}") from error
    finally:
        probe.unlink()
    for part, output in zip(observed, outputs, strict=True):
        silent = np.take(output, part.channels, axis=part.axis)
        if np.isnan(silent.astype(np.float64)).any():
            raise NotRun(
                f"on random input {part.value!r} is not a number: a weight is not finite, or something overflows"
            )
        loud = np.flatnonzero(np.any(np.moveaxis(silent, part.axis, 0).reshape(len(part.channels), -1) != part.rest, 1))
        if loud.size:
            channel = part.channels[int(loud[0])]
            raise VerificationError(f"channel {channel} of {part.value!r} is not silent in the rewritten model")
    return sum(len(part.channels) for part in observed)


def _session(path: Path) -> Any:  # noqa: ANN401  # onnxruntime is optional and has no types
    import onnxruntime  # optional, and slow to import

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # Without the fallback, which prints what the model says and tries the same provider again.
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0)


def _random_inputs(  # the session is onnxruntime's, which has no types
    session: Any,  # noqa: ANN401
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Array]:
    """Standard normal numbers for float inputs, small ones for integer inputs."""
    generator = np.random.default_rng(0)
    inputs = {given.name: given for given in session.get_inputs()}
    unknown = sorted(set(shapes) - set(inputs))
    if unknown:
        raise UsageError(f"the model has no input {unknown[0]!r}", f"its inputs: {', '.join(sorted(inputs))}")
    feed: dict[str, Array] = {}
    for name, given in inputs.items():
        dtype = _DTYPES.get(given.type)
        if dtype is None:
            raise NotRun(f"input {name!r} has type {given.type}")
        shape = _shape(name, given.shape, shapes.get(name))
        numbers = np.asarray(generator.standard_normal(shape))
        feed[name] = np.asarray(numbers if np.dtype(dtype).kind == "f" else np.abs(numbers) > 1, dtype)
    return feed


def _shape(name: str, declared: Sequence[int | str | None], asked: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape to feed: the one asked for where it fits, else the declared one where it is fixed but for the batch."""
    text = ",".join("?" if size is None else str(size) for size in declared)
    if asked is not None:
        fits = len(asked) == len(declared) and all(
            not isinstance(size, int) or size == given for size, given in zip(declared, asked, strict=True)
        )
        if not fits:
            raise UsageError(f"input {name!r} has the shape ({text}), not {','.join(map(str, asked))}")
        return asked
    shape = [DEFAULT_BATCH if axis == 0 and not isinstance(size, int) else size for axis, size in enumerate(declared)]
    if not all(isinstance(size, int) for size in shape):
        example = ",".join(str(size) if isinstance(size, int) else "224" for size in shape)
        raise NotRun(f"input {name!r} has a dynamic shape ({text}): give --input-shape {name}={example} or what fits")
    return tuple(int(size) for size in shape if size is not None)


def first_line(error: Exception) -> str:
    """The first line of what ``error`` says, cut to what a person reads."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
