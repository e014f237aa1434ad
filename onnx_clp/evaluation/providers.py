"""onnxruntime and its execution providers: a session on exactly those that were asked for.

onnxruntime falls back to the CPU without an error where a provider cannot be loaded. Here that is an error with its
reason.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy.typing as npt

from onnx_clp.errors import ModelFileError, UsageError
from onnx_clp.runtime import first_line
from onnx_clp.trial import import_onnxruntime

INSTALL: Final = "install onnx-clp[cpu], or onnx-clp[gpu] for an NVIDIA GPU, not both"

NEEDS_CUDA: Final = "install CUDA and cuDNN (pip install 'onnxruntime-gpu[cuda,cudnn]')"

CPU: Final = "CPUExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"

DEVICE: Final = "cuda"
"""Where inputs are copied to before an NVIDIA GPU runs a model."""

PROVIDERS: Final = {
    "cpu": CPU,
    "cuda": CUDA,
    "tensorrt": "TensorrtExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "directml": "DmlExecutionProvider",
    "dml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
}
"""Short names of onnxruntime's execution providers."""


def version() -> str:
    """The version of onnxruntime. Raises UsageError where it is not installed."""
    return str(onnxruntime().__version__)


def on_device(batch: npt.NDArray[Any]) -> Any:  # noqa: ANN401  # of onnxruntime, which has no types
    """A copy of ``batch`` on the first NVIDIA GPU, as onnxruntime holds it."""
    return onnxruntime().OrtValue.ortvalue_from_numpy(batch, DEVICE, 0)


def onnxruntime() -> Any:  # noqa: ANN401  # optional, and without types
    """The module. Raises UsageError where it is not installed."""
    try:
        module = import_onnxruntime()
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime"
        reason = "is not installed" if missing else f"cannot be imported: {first_line(error)}"
        raise UsageError(f"onnxruntime {reason}", INSTALL) from error
    if not hasattr(module, "InferenceSession"):
        raise UsageError("onnxruntime is installed in part only", f"uninstall it, then {INSTALL}")
    return module


def full_names(providers: Sequence[str]) -> tuple[str, ...]:
    """The full names of ``providers``, each once. Raises UsageError for one that is none."""
    known = {**PROVIDERS, **{name.lower(): name for name in PROVIDERS.values()}}
    names = []
    for provider in providers:
        name = known.get(provider.strip().lower())
        if name is None:
            raise UsageError(f"there is no execution provider {provider!r}", f"one of {', '.join(PROVIDERS)}")
        names.append(name)
    if not names:
        raise UsageError("no execution provider is named", f"one of {', '.join(PROVIDERS)}")
    return tuple(dict.fromkeys(names))


def load(
    ort: Any,  # noqa: ANN401  # the module onnxruntime, without types
    path: Path,
    source: str | bytes,
    options: Any,  # noqa: ANN401  # of onnxruntime
    wanted: tuple[str, ...] | None,
) -> tuple[Any, str]:
    """The session on the providers ``wanted``, and why a GPU that nobody asked for by name is not used.

    Raises:
        ModelFileError: onnxruntime does not load the model.
        UsageError: A provider is not there, or cannot be loaded.
    """
    if wanted is None:
        if CUDA not in ort.get_available_providers():
            return _create(ort, path, source, options, (CPU,)), ""
        try:
            return _create(ort, path, source, options, (CUDA, CPU)), ""
        except UsageError as error:
            return _create(ort, path, source, options, (CPU,)), f"no GPU was used: {error.message}"
    for name in wanted:
        if name not in ort.get_available_providers():
            have = ", ".join(ort.get_available_providers())
            package = "onnxruntime-gpu is not installed: " if name in {CUDA, PROVIDERS["tensorrt"]} else ""
            hint = INSTALL if package else "install the onnxruntime that has it, or name another provider"
            raise UsageError(f"{package}this onnxruntime {ort.__version__} has no {name}, it has {have}", hint)
    return _create(ort, path, source, options, wanted), ""


def _create(
    ort: Any,  # noqa: ANN401  # the module onnxruntime, without types
    path: Path,
    source: str | bytes,
    options: Any,  # noqa: ANN401  # of onnxruntime
    wanted: tuple[str, ...],
) -> Any:  # noqa: ANN401  # onnxruntime's session, without types
    """The session on exactly the providers ``wanted``; raises UsageError where one of them is not in it."""
    said: list[str] = []
    accelerated = wanted != (CPU,)
    try:
        with _captured(said) if accelerated else contextlib.nullcontext():
            if CUDA in wanted and hasattr(ort, "preload_dlls"):
                # CUDA's libraries may lie in packages of Python, where the dynamic linker does not look.
                ort.preload_dlls()
            runner = ort.InferenceSession(source, options, providers=list(wanted), enable_fallback=0)
    except Exception as error:
        if accelerated and _loads_on_cpu(ort, source, options):
            raise UsageError(
                f"{wanted[0]} does not run {path}: {_without_source(first_line(error))}",
                "name another provider, such as cpu",
            ) from error
        raise ModelFileError(f"onnxruntime does not load {path}: {first_line(error)}") from error
    missing = [name for name in wanted if name not in runner.get_providers()]
    if missing:
        raise UsageError(
            f"{missing[0]} cannot be loaded: {_reason(said)}",
            (NEEDS_CUDA if missing[0] == CUDA else "mend that") + ", or name another provider, such as cpu",
        )
    return runner


def _without_source(text: str) -> str:
    """``text`` without the line of onnxruntime's source that it begins with."""
    return re.sub(r"^/onnxruntime_src/\S+:\d+ .*?\)\s+", "", text)


def _loads_on_cpu(ort: Any, source: str | bytes, options: Any) -> bool:  # noqa: ANN401  # both without types
    """Whether the model itself is sound."""
    try:
        ort.InferenceSession(source, options, providers=[CPU])
    except Exception:  # noqa: BLE001  # onnxruntime raises a dozen kinds, all of them its answer
        return False
    return True


@contextlib.contextmanager
def _captured(said: list[str]) -> Iterator[None]:
    """Put into ``said`` what Python prints and what anyone writes to stderr: onnxruntime gives its reasons there."""
    printed = io.StringIO()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as log, contextlib.redirect_stdout(printed):
        kept = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            log.seek(0)
            text = printed.getvalue() + log.read(1 << 20).decode("utf-8", "replace")
            said += [line for line in text.splitlines() if line.strip()]


def _reason(said: Sequence[str]) -> str:
    """Of what onnxruntime has said, why a library was not loaded."""
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in said]
    for mark in ("with error: ", "rror: ", "Failed to "):
        for line in plain:
            _, found, after = line.partition(mark)
            if found:
                return (after if mark.endswith(": ") else found + after)[:300]
    return plain[0][:300] if plain else "onnxruntime does not say why"
