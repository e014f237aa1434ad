"""What a sanitized file may differ in from its original, found by comparing the two: nothing here asks the package."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnx_clp import SanitizeReport

NOTE = "onnx_clp."
"""Prefix of the metadata that a sanitized file may have more."""

Array = NDArray[Any]
Body = onnx.GraphProto | onnx.FunctionProto


def bodies(model: onnx.ModelProto) -> Iterator[tuple[Body, dict[str, Array]]]:
    """The main graph, every function and every subgraph, each with the constants that can be seen from it."""
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    pending: list[tuple[Body, dict[str, Array]]] = [(model.graph, {})]
    pending += [(function, {}) for function in model.functions]
    for body, outer in pending:
        values = dict(outer)
        if isinstance(body, onnx.GraphProto):
            values |= {tensor.name: numpy_helper.to_array(tensor) for tensor in body.initializer}
        compute(body, values, opsets)
        yield body, values
        for node in body.node:
            for attribute in node.attribute:
                inner = [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
                pending += [(subgraph, values) for subgraph in inner]


def compute(body: Body, values: dict[str, Array], opsets: dict[str, int]) -> None:
    """Add to ``values`` what nodes of the default domain compute from them, whatever order the nodes stand in."""
    waiting = [node for node in body.node if not node.domain and not any(a.HasField("g") for a in node.attribute)]
    before = -1
    while before != len(waiting):
        before, left = len(waiting), []
        for node in waiting:
            if not all(name in values or not name for name in node.input) or node.op_type.startswith("Random"):
                left.append(node)
                continue
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                results = [numpy_helper.to_array(node.attribute[0].t)]  # the evaluator would give a bfloat16 as float
            else:
                feed = {name: values[name] for name in node.input if name}
                results = [*ReferenceEvaluator(alone(node, feed, opsets)).run(None, feed)]
            values |= dict(zip(node.output, results, strict=False))
        waiting = left


def alone(node: onnx.NodeProto, feed: dict[str, Array], opsets: dict[str, int]) -> onnx.ModelProto:
    """A model of that node only."""
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feed.items()
    ]
    graph = helper.make_graph([node], "alone", inputs, [onnx.ValueInfoProto(name=name) for name in node.output])
    # The reference has DequantizeLinear from version 19 on, which computes what version 10 does.
    version = max(opsets[""], 19) if node.op_type in {"QuantizeLinear", "DequantizeLinear"} else opsets[""]
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)])


def differing_constants(source: Path, destination: Path) -> Iterator[tuple[str, Array, Array]]:
    """(reader, before, after) of every constant input of a node that differs. Raises where anything else differs."""
    before, after = onnx.load(source), onnx.load(destination)
    kept = [entry for entry in after.metadata_props if not entry.key.startswith(NOTE)]
    assert [(e.key, e.value) for e in kept] == [(e.key, e.value) for e in before.metadata_props]
    for (old, held), (new, holds) in zip(bodies(before), bodies(after), strict=True):
        made = {output for node in old.node for output in node.output}
        # An un-shared tensor becomes a Constant of its own; nothing else may be new.
        nodes = [node for node in new.node if node.op_type != "Constant" or made & set(node.output)]
        for was, now in zip(old.node, nodes, strict=True):
            assert (was.op_type, was.domain, was.name, was.output) == (now.op_type, now.domain, now.name, now.output)
            assert len(was.input) == len(now.input)
            if was.op_type != "Constant":  # those are compared at the nodes that read them
                assert list(map(without_graphs, was.attribute)) == list(map(without_graphs, now.attribute)), was.name
            for first, second in zip(was.input, now.input, strict=True):
                if first in held and second in holds:
                    if not same(held[first], holds[second]):
                        yield was.name, held[first], holds[second]
                else:
                    assert first == second
                    assert (first in held) == (second in holds)


def without_graphs(attribute: onnx.AttributeProto) -> onnx.AttributeProto:
    """The attribute without its subgraphs, which are compared on their own."""
    copy = onnx.AttributeProto()
    copy.CopyFrom(attribute)
    copy.ClearField("g")
    copy.ClearField("graphs")
    return copy


def same(before: Array, after: Array) -> bool:
    return (before.shape, before.dtype) == (after.shape, after.dtype) and before.tobytes() == after.tobytes()


def assert_differs_as_planned(source: Path, destination: Path, report: SanitizeReport) -> None:
    """Only channels that were to be silenced differ, and their slices hold one number each now: that of silence."""
    planned = {part.layer: set(part.channels) for part in report.silenced}
    everything = list(planned.values())
    found = 0
    for reader, before, after in differing_constants(source, destination):
        assert before.shape == after.shape
        assert before.dtype == after.dtype
        off = np.argwhere(~equal(before, after))
        # A bias may be added behind the layer, and what is patched may be read by a node in front of it.
        wanted = [planned[reader]] if reader in planned else everything
        along = [axis for axis in range(before.ndim) if any(set(off[:, axis].tolist()) <= each for each in wanted)]
        assert along, (reader, "a channel that was not silenced differs")
        assert any(is_silent(after, axis, set(off[:, axis].tolist())) for axis in along), (reader, "is not silent")
        found += 1
    assert bool(found) == bool(report.silenced)


def equal(before: Array, after: Array) -> NDArray[np.bool_]:
    """Where two arrays hold the same bits."""
    shape = (*before.shape, before.dtype.itemsize)
    bits = [np.ascontiguousarray(array).view(np.uint8).reshape(shape) for array in (before, after)]
    return np.asarray((bits[0] == bits[1]).all(axis=-1))


def is_silent(array: Array, axis: int, channels: set[int]) -> bool:
    """Whether each of the channels holds one number only, and that is 0 unless it is an integer's zero point."""
    slices = [np.take(array, channel, axis).astype(np.float64) for channel in channels]
    if array.dtype.kind in "iu":
        return all(np.unique(part).size == 1 for part in slices)
    return not any(part.any() for part in slices)
