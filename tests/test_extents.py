"""The extents that follow from a model's inputs are those that onnxruntime gives its values, or symbols.

The oracle is onnxruntime with every value of the main graph as an output.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_clp.errors import OnnxClpError
from onnx_clp.extents import Extent, Extents, Known, Symbol
from onnx_clp.model.constants import Constants
from onnx_clp.model.expand import build_graph
from onnx_clp.model.file import open_model
from onnx_clp.model.graph import MISSING
from tests.built import NAMES, build, random_inputs, save, session
from tests.test_onnx_backend import CHUNKS, as_array, cases, frozen


def found(path: Path) -> dict[str, tuple[Extents | None, Extents | None]]:
    """By name of a value that the main graph computes: its extents, and its elements where it is a small vector."""
    with open_model(path) as file:
        graph = build_graph(file)
        known = Known(graph, Constants(file, graph))
        made = [
            value
            for node in graph.nodes
            if node.layout is not None and node.layout.in_main_graph
            for value in node.outputs
            if value != MISSING
        ]
        return {graph.name_of(value): (known.extents(value), known.vector(value)) for value in made}


def computed(path: Path, model: onnx.ModelProto, given: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Every value of ``names`` that onnxruntime gives; none where it does not run the model."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    try:
        made = session(shown.SerializeToString(), folder=path.parent)
        return dict(zip(names, made.run(names, given), strict=True))
    except Exception:  # noqa: BLE001  # onnxruntime raises kinds of its own; how many models it runs is counted below
        return {}


def faults(known: dict[str, tuple[Extents | None, Extents | None]], values: dict[str, Any]) -> Iterator[str]:
    """Every value whose extents or elements are not what they were said to be."""
    sizes: dict[Symbol, int] = {}

    def differs(extents: Extents | None, actual: tuple[int, ...]) -> bool:
        return extents is not None and (len(extents) != len(actual) or not all(map(agrees, extents, actual)))

    def agrees(extent: Extent, actual: int) -> bool:
        return extent == actual if isinstance(extent, int) else sizes.setdefault(extent, actual) == actual

    for name, value in values.items():
        if isinstance(value, np.ndarray):
            extents, vector = known[name]
            if differs(extents, value.shape):
                yield f"{name}: {value.shape}, not {extents}"
            if vector is not None and differs(vector, tuple(int(number) for number in value.ravel())):
                yield f"{name}: holds {value}, not {vector}"


def test_extents_of_the_built_models_are_those_of_onnxruntime(tmp_path: Path) -> None:
    values_seen = ran = 0
    for name in NAMES:
        case = build(name)
        path = save(case, tmp_path)
        try:
            known = found(path)
        except OnnxClpError:
            continue
        names = [name for name in known if name]
        values = computed(path, case.model, random_inputs(case.model), names)
        assert list(faults(known, values)) == [], name
        ran += bool(values)
        values_seen += sum(known[name][0] is not None for name in values)
    assert ran > len(NAMES) / 2
    assert values_seen > 5 * ran


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_extents_of_single_operators_are_those_that_onnx_defines(chunk: int, tmp_path: Path) -> None:
    """With the inputs behind the first as constants, as shapes and axes mostly are."""
    path, seen = tmp_path / "model.onnx", 0
    for case in cases()[chunk::CHUNKS]:
        assert case.model is not None
        assert case.data_sets is not None
        expected = [as_array(value) for value in case.data_sets[0][1]]
        for model in (case.model, *frozen(case, first=1)):
            path.write_bytes(model.SerializeToString())
            try:
                known = found(path)
            except OnnxClpError:
                continue
            given = {value.name: made for value, made in zip(case.model.graph.output, expected, strict=True)}
            shown = {name: made for name, made in given.items() if name in known}
            assert list(faults(known, shown)) == [], case.name
            seen += sum(known[name][0] is not None for name in shown)
    assert seen > 20


def test_a_wrong_extent_is_a_fault() -> None:
    batch = Symbol()
    values = {"a": np.zeros((2, 3)), "b": np.zeros((2, 2)), "v": np.array([2, 3])}
    right: Extents = (batch, 3)
    assert list(faults({"a": (right, None), "b": ((batch, batch), None), "v": ((2,), (batch, 3))}, values)) == []
    assert len(list(faults({"a": ((batch, 4), None), "b": ((batch,), None), "v": (None, (batch, batch))}, values))) == 3
    assert len(list(faults({"a": ((batch, batch), None), "b": (None, None), "v": (None, (3, 3))}, values))) == 2


# ---- extents that are known at run time only

SIZES = {"N": 6, "C": 3, "H": 5, "W": 7, "K": 2, "ONE": 1}


def at_run_time(opset: int, nodes: list[onnx.NodeProto], **inputs: list[str]) -> onnx.ModelProto:
    """A model of ``nodes`` with inputs of these sizes, and a few vectors of integers."""
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    numbers = {"minus": [-1], "first": [0], "second": [1], "third": [2], "kept": [0, 0, -1]}
    constants = [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in numbers.items()]
    graph = helper.make_graph(nodes, "graph", given, [], constants)
    graph.output.extend(onnx.ValueInfoProto(name=name) for node in nodes for name in node.output)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def seen(model: onnx.ModelProto, folder: Path) -> dict[str, tuple[Extents | None, Extents | None]]:
    """What is known of its values, after it was compared with what onnxruntime computes."""
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    known = found(path)
    given = {
        value.name: np.ones([SIZES[dim.dim_param] for dim in value.type.tensor_type.shape.dim], np.float32)
        for value in model.graph.input
    }
    values = computed(path, model, given, list(known))
    assert values.keys() == known.keys()
    assert list(faults(known, values)) == []
    return known


def test_what_is_known_at_run_time_only_is_equal_to_nothing_else(tmp_path: Path) -> None:
    node = helper.make_node
    nodes = [
        *(node("Relu", [name], [f"{name}_itself"]) for name in ("x", "n", "one", "k")),
        node("Shape", ["x"], ["shape"]),
        node("Slice", ["shape", "first", "second"], ["batch"]),
        node("Gather", ["shape", "third"], ["height"]),
        node("Concat", ["batch", "minus", "height"], ["target"], axis=0),
        node("Reshape", ["x", "target"], ["kept_by_name"]),
        node("Reshape", ["x", "kept"], ["kept_by_place"]),
        *(node("Flatten", ["x"], [f"flat{axis}"], axis=axis) for axis in range(4)),
        node("Shape", ["k"], ["others"]),
        node("Concat", ["others", "minus"], ["halves"], axis=0),
        node("Reshape", ["n", "halves"], ["cut"]),
        node("Add", ["n", "one"], ["left"]),
        node("Add", ["one", "n"], ["right"]),
    ]
    inputs = {"x": ["N", "C", "H", "W"], "n": ["N"], "k": ["K"], "one": ["ONE"]}
    known = seen(at_run_time(13, nodes, **inputs), tmp_path)
    shape, kept = known["shape"][1], known["kept_by_name"][0]
    assert shape is not None
    assert kept is not None
    assert (kept[0], kept[2]) == (shape[0], shape[2])
    assert known["kept_by_place"][0] is not None
    assert known["kept_by_place"][0][:2] == shape[:2]


def test_early_arithmetic_has_the_shape_of_its_first_operand(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Add", ["x", "n"], ["y"], axis=0, broadcast=1),
    ]
    model = at_run_time(6, nodes, x=["N", "C", "H"], n=["N"])
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    known = found(path)  # onnxruntime runs no opset below 7
    assert known["y"][0] == known["r"][0] is not None
