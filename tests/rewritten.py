"""What a sanitized file may differ in from its original, found by comparing the two: nothing here asks the package."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from onnx_clp.sanitize import SanitizeReport

NOTE = "onnx_clp."
"""Prefix of the metadata that a sanitized file may have more."""

Tensors = dict[str, onnx.TensorProto]


def graphs(model: onnx.ModelProto) -> Iterator[tuple[onnx.GraphProto | onnx.FunctionProto, Tensors]]:
    """The main graph, every subgraph and every function, each with the tensors that can be seen from it."""
    pending: list[tuple[onnx.GraphProto | onnx.FunctionProto, Tensors]] = [(model.graph, {})]
    pending += [(function, {}) for function in model.functions]
    for graph, outer in pending:
        tensors = dict(outer)
        if isinstance(graph, onnx.GraphProto):
            tensors |= {tensor.name: tensor for tensor in graph.initializer}
        yield graph, tensors
        for node in graph.node:
            for attribute in node.attribute:
                inner = [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
                pending += [(subgraph, tensors) for subgraph in inner]


def value(graph: onnx.GraphProto | onnx.FunctionProto, tensors: Tensors, name: str) -> NDArray[Any] | None:
    """The constant of that name: an initializer, a Constant, a ConstantOfShape of one, or an Identity of one."""
    if name in tensors:
        return numpy_helper.to_array(tensors[name])
    for node in graph.node:
        if name in node.output:
            attributes = {attribute.name: attribute for attribute in node.attribute}
            if node.op_type == "Constant" and "value" in attributes:
                return numpy_helper.to_array(attributes["value"].t)
            if node.op_type == "Identity":
                return value(graph, tensors, node.input[0])
            if node.op_type == "ConstantOfShape":
                shape = value(graph, tensors, node.input[0])
                fill = numpy_helper.to_array(attributes["value"].t) if "value" in attributes else np.zeros(1, np.float32)
                return None if shape is None else np.full([int(size) for size in shape], fill[0])
    return None


def differing_constants(source: Path, destination: Path) -> Iterator[tuple[str, NDArray[Any], NDArray[Any]]]:
    """(reader, before, after) of every constant input of a node that differs. Raises where anything else differs."""
    before, after = onnx.load(source), onnx.load(destination)
    kept = [entry for entry in after.metadata_props if not entry.key.startswith(NOTE)]
    assert [(e.key, e.value) for e in kept] == [(e.key, e.value) for e in before.metadata_props]
    for old, new in zip(graphs(before), graphs(after), strict=True):
        assert len(old[0].node) == len(new[0].node)
        for was, now in zip(old[0].node, new[0].node, strict=True):
            assert (was.op_type, was.domain, was.name, was.output) == (now.op_type, now.domain, now.name, now.output)
            if was.op_type != "Constant":  # compared at the nodes that read it
                assert [a.name for a in was.attribute] == [a.name for a in now.attribute]
                assert all(
                    a == b for a, b in zip(was.attribute, now.attribute, strict=True) if not a.HasField("g")
                ), was.name
            assert len(was.input) == len(now.input)
            for first, second in zip(was.input, now.input, strict=True):
                held, holds = value(*old, first), value(*new, second)
                if held is None or holds is None:
                    assert first == second
                    assert held is holds
                elif held.tobytes() != holds.tobytes() or held.shape != holds.shape:
                    yield was.name, held, holds


def assert_differs_as_planned(source: Path, destination: Path, report: SanitizeReport) -> None:
    """Only whole slices of as many channels as were silenced differ, and each of them is one number now: its silence."""
    planned = {part.layer: set(part.channels) for part in report.silenced}
    everything = [set(part.channels) for part in report.silenced]
    found = 0
    for reader, before, after in differing_constants(source, destination):
        assert before.shape == after.shape
        assert before.dtype == after.dtype
        off = np.argwhere(before.view(np.uint8).reshape(*before.shape, -1) != after.view(np.uint8).reshape(*before.shape, -1))
        wanted = [planned[reader]] if reader in planned else everything  # a bias may be read by an Add behind the layer
        along = [axis for axis in range(before.ndim) if any(set(off[:, axis].tolist()) <= each for each in wanted)]
        assert along, (reader, "a channel that was not silenced differs")
        found += 1
        assert any(is_silent(after, axis, set(off[:, axis].tolist())) for axis in along), (reader, "is not silent")
    assert bool(found) or not report.silenced


def is_silent(array: NDArray[Any], axis: int, channels: set[int]) -> bool:
    """Whether each of the channels holds one number only, and that is 0 where the array holds floating-point numbers."""
    slices = [np.take(array, channel, axis).astype(np.float64) for channel in channels]
    if all(not part.any() for part in slices):
        return True
    return not np.issubdtype(array.dtype, np.inexact) and all(np.unique(part).size == 1 for part in slices)
