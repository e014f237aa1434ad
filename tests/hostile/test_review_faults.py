"""What reviewers made of nodes whose outputs are no values, and of rewrites whose names or zero points are odd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_clp import sanitize, scan
from onnx_clp.report.text import render_sanitize
from tests.cases.net import PLANTED, Net


def saved(net: Net, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(net.case("model").model.SerializeToString())
    return path


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("outputs", [["", "y"], ["y"]])
def test_a_constant_whose_sum_or_product_is_no_value_of_its_own(op: str, outputs: list[str], tmp_path: Path) -> None:
    """The first output is left out, or has the name of an initializer."""
    net = Net()
    x = net.conv(net.feed(1, 3, 8, 8), net.kernel(16, 3, 3, 3))
    if "" not in outputs:
        net.tensor(np.ones(3, np.float32), "y")
    factors = net.tensor(np.ones((16, 1, 1), np.float32), "factors")
    net.nodes.append(helper.make_node(op, [x, factors], outputs, name="odd"))
    net.tail("y", 16)
    path = saved(net, tmp_path)
    report = scan(path)
    assert [channel.index for layer in report.layers for channel in layer.flagged] in ([], [PLANTED])
    assert sanitize(path, dry_run=True, dst=tmp_path / "out.onnx").before == report


def quantised(zero_point: TensorProto | None, folder: Path) -> Path:
    """A QLinearConv with an outlier, whose output has ``zero_point``, or that of an input of the model."""
    net = Net()
    x = net.op("QuantizeLinear", net.feed(1, 3, 8, 8), *scale(net, "x", np.uint8(128)), name="quantise")
    kernel = np.random.default_rng(0).integers(-4, 5, (16, 3, 3, 3)).astype(np.int8)
    kernel[PLANTED] = 100
    given = [x, *scale(net, "in", np.uint8(128)), net.tensor(kernel, "kernel"), *scale(net, "w", np.int8(0))]
    step = net.tensor(np.float32(0.1), "step")
    zero = net.feed(name="zero", dtype=np.uint8) if zero_point is None else net.tensor(zero_point, "zero")
    y = net.op("QLinearConv", *given, step, zero, name="conv")
    net.tail(net.op("DequantizeLinear", y, step, net.tensor(np.uint8(128), "middle"), name="dequantise"), 16)
    return saved(net, folder)


def scale(net: Net, name: str, zero_point: np.generic) -> tuple[str, str]:
    return net.tensor(np.float32(0.1), f"{name}.scale"), net.tensor(zero_point, f"{name}.zero")


def text() -> TensorProto:
    return TensorProto(data_type=TensorProto.STRING, dims=[], string_data=[b"128"])


ZERO_POINTS = {
    "known": numpy_helper.from_array(np.asarray(128, np.uint8)),
    "of_no_elements": numpy_helper.from_array(np.zeros(0, np.uint8)),
    "of_several": numpy_helper.from_array(np.full(16, 128, np.uint8)),
    "an_input_of_the_model": None,
    "text": text(),
}


@pytest.mark.parametrize("name", ZERO_POINTS)
def test_a_zero_point_that_is_not_known_is_not_looked_for(name: str, tmp_path: Path) -> None:
    """Where a channel comes to rest cannot be told; that its kernel and its bias are 0 can."""
    path = quantised(ZERO_POINTS[name], tmp_path)
    report = sanitize(path, tmp_path / "out.onnx")
    assert [part.channels for part in report.silenced] == [(PLANTED,)]
    checks = {check.name: check for check in report.checks}
    assert checks["scan"].passed
    if "onnxruntime-run" in checks:
        assert checks["onnxruntime-run"].passed is (True if name == "known" else None)


@pytest.mark.parametrize("beside", [False, True])
def test_channels_that_cannot_be_observed_are_said_to_be_found_silent_by_the_scan_alone(
    tmp_path: Path, *, beside: bool
) -> None:
    """Within a subgraph onnxruntime shows nothing: one more channel that is silent there does not tell of these."""
    net = Net()
    x, condition = net.feed(1, 3, 8, 8), net.feed(name="condition", dtype=np.bool_)
    if beside:
        x = net.op("Relu", net.conv(x, net.kernel(16, 3, 3, 3), name="beside"), name="beside_relu")
    weight = net.tensor(net.kernel(16, 16 if beside else 3, 3, 3), "weight")
    branches: dict[str, Any] = {}
    for side in ("then", "else"):
        inner = net.inner(f"{side}_")
        inner.give(inner.op("Relu", inner.conv(x, weight, name="conv"), name="relu"))
        branches[f"{side}_branch"] = inner.graph()
    net.tail(net.op("If", condition, name="if", **branches), 16)
    report = sanitize(saved(net, tmp_path), tmp_path / "out.onnx")
    assert report.silenced_channels == 2 + beside
    checks = {check.name: check for check in report.checks}
    if "onnxruntime-run" in checks:
        assert checks["onnxruntime-run"].passed is (True if beside else None)
        assert "found by the scan alone" in checks["onnxruntime-run"].detail
        assert "found by the scan alone" in render_sanitize(report)


def test_where_nothing_was_silenced_there_is_nothing_to_observe(tmp_path: Path) -> None:
    net = Net()
    net.tail(net.conv(net.feed(1, 3, 8, 8), net.kernel(16, 3, 3, 3, outlier=None), name="conv"), 16)
    report = sanitize(saved(net, tmp_path), tmp_path / "out.onnx")
    details = {check.name: check.detail for check in report.checks}
    assert details.get("onnxruntime-run", "nothing was silenced") == "nothing was silenced"


def test_a_constant_of_its_own_takes_no_name_that_a_function_has_for_its_inputs(tmp_path: Path) -> None:
    """Both convolutions read one kernel, so that one of them gets a copy, within the function."""
    net = Net()
    kernel = net.tensor(net.kernel(16, 3, 3, 3), "W")
    inner = net.inner("")
    y = inner.op("Conv", "x", "W", name="conv", pads=[1] * 4)
    inner.give(inner.op("Add", y, "W__silenced", name="add"))
    inner.nodes[-1].output[0] = inner.outputs[0].name
    net.functions.append(inner.function("local", "Convolve", ["x", "W", "W__silenced"]))
    x = net.feed(1, 3, 8, 8)
    nothing = net.tensor(np.float32(0), "nothing")
    y = net.op("Convolve", x, kernel, nothing, name="call", domain="local")
    net.give(net.op("MaxPool", kernel, name="other", kernel_shape=[1, 1]))
    net.tail(y, 16)
    path = saved(net, tmp_path)
    report = sanitize(path, tmp_path / "out.onnx")
    assert report.unshared == ("W",)
    assert {check.name: check.passed for check in report.checks}["onnxruntime-load"]
    onnx.checker.check_model(onnx.load(tmp_path / "out.onnx"))
    (function,) = onnx.load(tmp_path / "out.onnx").functions
    assert [node.output[0] for node in function.node if node.op_type == "Constant"] == ["W__silenced_2"]
