"""What ONNX Runtime computes: the outputs of a model, or every value of its graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnx_clp.errors import ModelFileError, UsageError
from onnx_clp.trial import import_onnxruntime

Array = npt.NDArray[Any]
Feed = Mapping[str, Array]

MAX_SAMPLES = 256
"""Images are read up to here: a difference of float rounding shows in the first few."""


def load(path: Path) -> onnx.ModelProto:
    """The model at ``path`` with its external data.

    Raises:
        ModelFileError: It is missing, no ONNX model, or its data cannot be read.
    """
    try:
        return onnx.load(path)
    except Exception as error:
        raise ModelFileError(f"{path} cannot be read as an ONNX model: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of what ``error`` says, cut to what a person reads."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs that a caller has to give."""
    given = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in given]


def random_feed(model: onnx.ModelProto, count: int, seed: int = 0) -> dict[str, Array]:
    """Standard normal numbers (0 and 1 for integers) for every input, ``count`` samples or the batch that is fixed.

    Raises:
        UsageError: An input's shape is open beyond its batch.
    """
    random = np.random.default_rng(seed)
    feed = {}
    for value in inputs(model):
        kind = value.type.tensor_type
        sizes = [dim.dim_value if dim.dim_value > 0 else None for dim in kind.shape.dim]
        if sizes and sizes[0] is None:
            sizes[0] = count
        elif len(sizes) > 1 and sizes[0]:
            sizes[0] *= -(-count // sizes[0])
        if None in sizes or not kind.HasField("shape"):
            text = ",".join("?" if size is None else str(size) for size in sizes)
            raise UsageError(f"input {value.name!r} has an open shape ({text})", "give images of the right size")
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        numbers = random.standard_normal([size for size in sizes if size is not None])
        feed[value.name] = np.asarray(numbers if dtype.kind == "f" else numbers > 0).astype(dtype)
    return feed


def image_feed(model: onnx.ModelProto, path: Path) -> dict[str, Array]:
    """The array ``images`` (or the only one) of an .npz, shape (N, …) as the model takes it, as its only input.

    At most MAX_SAMPLES of them are taken, and a multiple of a batch that is fixed.

    Raises:
        UsageError: There is no such array, or it does not fit.
    """
    needed = inputs(model)
    if len(needed) != 1:
        raise UsageError(f"the model has {len(needed)} inputs", "leave the images out: random numbers are fed then")
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = list(archive.files)
            name = "images" if "images" in names else names[0] if len(names) == 1 else None
            images = None if name is None else np.asarray(archive[name])
    except Exception as error:
        raise UsageError(f"{path} cannot be read as an .npz: {first_line(error)}") from error
    if images is None:
        raise UsageError(f"{path} has no array named 'images'", f"it holds: {', '.join(names) or 'nothing'}")
    kind = needed[0].type.tensor_type
    declared = [dim.dim_value for dim in kind.shape.dim]
    batch = max(declared[0], 1) if declared else 1
    fits = images.ndim == len(declared) and all(
        not size or size == found for size, found in zip(declared[1:], images.shape[1:], strict=True)
    )
    count = min(len(images), max(MAX_SAMPLES, batch)) // batch * batch if images.ndim else 0
    if not fits or not count or images.dtype.kind not in "fiu":
        shape = ",".join(str(size or "?") for size in declared)
        raise UsageError(f"the images are {images.dtype} {images.shape}, the model takes ({shape})")
    return {needed[0].name: images[:count].astype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))}


def infer(model: onnx.ModelProto | Path, feed: Feed) -> list[Array]:
    """The outputs for ``feed``, in batches of the size that the model fixes.

    Raises:
        ModelFileError: ONNX Runtime does not load or run the model.
    """
    try:
        session = _session(model)
        fixed = [given.shape[0] for given in session.get_inputs() if given.shape and isinstance(given.shape[0], int)]
        count = min((len(array) for array in feed.values()), default=0)
        step = fixed[0] if fixed and fixed[0] else max(count, 1)
        parts = [
            session.run(None, {name: array[start : start + step] for name, array in feed.items()})
            for start in range(0, max(count, 1), step)
        ]
        return [np.concatenate(each) if each[0].ndim else each[0] for each in zip(*parts, strict=True)]
    except Exception as error:
        raise ModelFileError(f"onnxruntime does not run the model: {first_line(error)}") from error


def observe(model: onnx.ModelProto, feed: Feed) -> dict[str, Array]:
    """Every tensor of the main graph for ``feed``, which must be one batch, by name.

    Raises:
        ModelFileError: ONNX Runtime does not load or run the model.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    known = {value.name for value in probe.graph.output}
    names = [name for node in probe.graph.node for name in node.output if name and name not in known]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    try:
        session = _session(probe)
        outputs = session.run(None, dict(feed))
        found = dict(zip([each.name for each in session.get_outputs()], outputs, strict=True))
    except Exception as error:
        raise ModelFileError(f"onnxruntime does not run the model: {first_line(error)}") from error
    return {**{name: value for name, value in found.items() if isinstance(value, np.ndarray)}, **feed}


def _session(model: onnx.ModelProto | Path) -> Any:  # onnxruntime has no types
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
