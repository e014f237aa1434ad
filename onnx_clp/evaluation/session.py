"""A model in onnxruntime: what it takes, what it gives, and which provider runs it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx

from onnx_clp.errors import ModelFileError, UsageError
from onnx_clp.evaluation.outputs import Output
from onnx_clp.evaluation.providers import CUDA, PROVIDERS, full_names, load, onnxruntime
from onnx_clp.model.edits import length_delimited
from onnx_clp.model.expand import build_graph
from onnx_clp.model.file import ModelFile, open_model
from onnx_clp.model.source import sha256_meanwhile
from onnx_clp.model.wire import MODEL_GRAPH

DTYPES: Final = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
}
"""What an input may take."""

_WATCHED_LIMIT: Final = 1 << 31
"""Protobuf reads no message of 2 GiB or more."""


@dataclass(frozen=True, slots=True, eq=False)
class Session:
    """A model that onnxruntime has loaded.

    Attributes:
        path: The model.
        sha256: Of the model file, in hexadecimal.
        runner: onnxruntime's session.
        input_name: The input for the images.
        shape: Of the input, as the model declares it.
        dtype: Of the input.
        outputs: The outputs, those that were added last.
        providers: The execution providers that were loaded, in onnxruntime's order.
        nodes: How many nodes of the optimised graph each provider runs; empty where onnxruntime does not tell.
        note: Why a GPU that nobody asked for by name is not used; empty where there is nothing to say.
    """

    path: Path
    sha256: str
    runner: Any
    input_name: str
    shape: tuple[int | str | None, ...]
    dtype: npt.DTypeLike
    outputs: tuple[Output, ...]
    providers: tuple[str, ...]
    nodes: tuple[tuple[str, int], ...]
    note: str = ""

    @property
    def fixed_batch(self) -> int | None:
        """The number of images that the model takes at once; None where it takes any."""
        first = self.shape[0]
        return first if isinstance(first, int) else None

    @property
    def on_gpu(self) -> bool:
        """Whether inputs are copied to an NVIDIA GPU."""
        return self.providers[0] in {CUDA, PROVIDERS["tensorrt"]}


def open_session(
    path: Path, providers: Sequence[str] | None = None, watched: Sequence[str] = (), threads: int = 0
) -> Session:
    """Load a model.

    Args:
        path: The model.
        providers: Execution providers, short names (`PROVIDERS`) or onnxruntime's, the preferred first; each must load.
            None takes CUDA where the installed onnxruntime has it and it loads, else the CPU.
        watched: Values of the main graph to have as outputs too.
        threads: Threads that run one operator; 0 leaves it to onnxruntime.

    Raises:
        ModelFileError: The file is no ONNX model, its data lie elsewhere, or onnxruntime does not load it.
        UsageError: onnxruntime is not installed; a provider is not in it or cannot be loaded; the input is none for
            images.
    """
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if watched:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    wanted = None if providers is None else full_names(providers)
    with _checked(path) as file:
        source = _with_outputs(file, watched) if watched else os.fspath(path)
        with sha256_meanwhile(file.source) as digest:
            runner, note = load(ort, path, source, options, wanted)
            sha256 = digest()
        if not file.source.unchanged():
            raise ModelFileError(f"{path} was changed by somebody else while it was loaded", "run again")
    name, shape, dtype = _image_input(path, runner)
    outputs = tuple(Output(given.name, tuple(given.shape) if given.shape else None) for given in runner.get_outputs())
    return Session(
        path, sha256, runner, name, shape, dtype, outputs, tuple(runner.get_providers()), _assigned(runner), note
    )


def _checked(path: Path) -> ModelFile:
    """The model at ``path``, open, with its data files; onnxruntime is not to meet what a scan refuses as a whole."""
    try:
        file = open_model(path)
        try:
            for location in file.locations():
                file.data_file(location)
            build_graph(file)  # functions that call each other without end keep onnxruntime busy for ever
        except BaseException:
            file.close()
            raise
    except ModelFileError as error:
        # An option that scan and sanitize have is no advice here: onnxruntime takes data beside the model alone.
        advice = (part for part in error.hint.split(", or ") if "--" not in part)
        raise ModelFileError(error.message, ", or ".join(advice)) from error
    return file


def _with_outputs(file: ModelFile, watched: Sequence[str]) -> bytes:
    """The model with the values ``watched`` as outputs too."""
    if file.source.size >= _WATCHED_LIMIT:
        raise ModelFileError(f"{file.path} is of 2 GiB or more: no output can be added to it in memory")
    graph = onnx.GraphProto(output=[onnx.ValueInfoProto(name=name) for name in watched])
    # A second graph field is merged into the first: the same model with more outputs.
    return file.source.read(0, file.source.size) + length_delimited(MODEL_GRAPH, graph.SerializeToString())


def _assigned(runner: Any) -> tuple[tuple[str, int], ...]:  # noqa: ANN401  # onnxruntime's session, without types
    """How many nodes each provider runs."""
    try:
        parts = runner.get_provider_graph_assignment_info()
    except Exception:  # noqa: BLE001  # an onnxruntime of before 1.24.1 has no such method, one without the record refuses
        return ()
    nodes: Counter[str] = Counter()
    for part in parts:
        nodes[part.ep_name] += len(part.get_nodes())
    return tuple(nodes.most_common())


def _image_input(path: Path, runner: Any) -> tuple[str, tuple[int | str | None, ...], npt.DTypeLike]:  # noqa: ANN401
    """The name, the shape and the dtype of the one input, which must take images."""
    inputs = runner.get_inputs()
    if len(inputs) != 1:
        names = ", ".join(repr(given.name) for given in inputs[:5])
        raise UsageError(f"{path} has {len(inputs)} inputs ({names})", "a model with one input, for images, is wanted")
    (given,) = inputs
    dtype, shape = DTYPES.get(given.type), tuple(given.shape)
    if dtype is None or len(shape) != 4:
        text = ",".join("?" if size is None else str(size) for size in shape)
        raise UsageError(
            f"the input {given.name!r} of {path} is {given.type} ({text})",
            "images are float32, float64, float16 or uint8 of four axes",
        )
    return given.name, shape, dtype
