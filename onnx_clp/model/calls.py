"""What a node means: which operator in which version, or which function of the file, as onnxruntime takes it.

A function is found by the letters of its domain, name and overload together. It is not called where the runtime has an
operator of that name, and what it is made of runs in the operator sets that the model imports, whatever its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Final

import onnx

from onnx_clp.model.ambiguity import Ambiguities

_RUNTIME_DOMAINS: Final = frozenset(
    """ai.onnx.ml ai.onnx.training ai.onnx.preview.training com.microsoft com.microsoft.nchwc com.microsoft.experimental
    com.microsoft.dml com.ms.internal.nhwc org.pytorch.aten""".split()  # noqa: SIM905  # read as a list
) | {""}
"""Domains of which runtimes have operators of their own."""

_NORMALISATION_VERSIONS: Final = (7, 14)
"""Versions of BatchNormalization from which on training is asked for in another way."""


class Calls:
    """The operator sets that a model imports and the functions that it defines; the default domain is empty."""

    def __init__(self, ambiguities: Ambiguities) -> None:
        self.ambiguities = ambiguities
        self.opsets: dict[str, int] = {}
        self.functions: dict[str, tuple[str, str, onnx.FunctionProto]] = {}

    def add_import(self, domain: str, version: int) -> None:
        """The model imports ``domain`` in ``version``."""
        if self.opsets.get(domain, version) != version:
            detail = "it is imported in two versions; the last was judged, as onnxruntime runs it"
            self.ambiguities.add("opset", "", domain or "ai.onnx", detail)
        self.opsets[domain] = version

    def add_function(self, domain: str, name: str, overload: str, function: onnx.FunctionProto) -> None:
        """The model defines ``function``."""
        key = _identifier(domain, name, overload)
        if key in self.functions:
            self.ambiguities.add("duplicate-function", "", _shown(key), "it is defined twice; the last was judged")
        self.functions[key] = (domain, name, function)

    def opset(self, domain: str) -> int:
        """The version in which operators of ``domain`` run: the latest where the default domain is not imported."""
        return self.opsets.get(domain, 0 if domain else onnx.defs.onnx_opset_version())

    def note_version(self, op_type: str, domain: str, own: Mapping[str, int], path: str, name: str) -> None:
        """Note the node ``name`` in ``path`` where its graph's or function's ``own`` imports mean another than is run.

        Only BatchNormalization is read so differently by version that other numbers are judged.
        """
        if op_type != "BatchNormalization" or domain:
            return
        meant, run = own.get(domain, 0), self.opset(domain)
        if any(min(meant, run) < since <= max(meant, run) for since in _NORMALISATION_VERSIONS):
            version = f"version {meant}" if meant else "no version"
            detail = f"its graph imports {version} of its operators; {run} was judged, as onnxruntime runs it"
            self.ambiguities.add("opset", path, name, detail)

    def called(
        self, domain: str, op_type: str, overload: str, own: Mapping[str, int]
    ) -> tuple[str, onnx.FunctionProto | None]:
        """The identifier of what a node calls, and the function; None where it is an operator."""
        key = _identifier(domain, op_type, overload)
        if key not in self.functions:
            return key, None
        named, name, function = self.functions[key]
        if (named, name) != (domain, op_type):
            detail = "a node calls it by the same letters, parted otherwise in domain, name and overload; it was judged"
            self.ambiguities.add("duplicate-function", "", _shown(key), detail)
        if domain not in _RUNTIME_DOMAINS:
            return key, function
        version = max(self.opset(domain), own.get(domain, 0))
        # Of domains that the onnx package does not know, the operators that hold weights tell by their name.
        is_operator = _is_operator(op_type, domain, version) or "Conv" in op_type
        judged = "the operator was judged, as onnxruntime runs it" if is_operator else "the function was judged"
        detail = f"it is a function of the file, and a runtime may have an operator of that name; {judged}"
        self.ambiguities.add("overridden-operator", "", _shown(key), detail)
        return key, None if is_operator else function


def _identifier(domain: str, name: str, overload: str) -> str:
    return f"{domain}:{name}:{overload}" if overload else f"{domain}:{name}"


def _shown(key: str) -> str:
    return f"ai.onnx{key}" if key.startswith(":") else key


@cache
def _is_operator(op_type: str, domain: str, version: int) -> bool:
    """Whether ONNX defines the operator in this version of its domain."""
    try:
        onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return False
    return True
