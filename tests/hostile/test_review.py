"""What reviewers made of files: weights that lie in others, and outliers behind operators that look harmless."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from onnx_clp import sanitize, scan
from tests.cases.net import PLANTED, Net


def saved(net: Net, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(net.case("model").model.SerializeToString())
    return path


def external(name: str, data_type: int, shape: list[int], offset: int, length: int) -> TensorProto:
    """A tensor in w.bin."""
    made = TensorProto(name=name, data_type=data_type, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "w.bin"), ("offset", str(offset)), ("length", str(length))):
        made.external_data.add(key=key, value=value)
    return made


def test_bytes_that_a_tensor_of_four_bits_has_too_are_left(tmp_path: Path) -> None:
    """γ and β lie in a weight of INT4, of which no element has a place of its own: they are copied, not patched."""
    net = Net(opset=21, ir=10)
    kernel = net.kernel(16, 3, 1, 1)
    x = net.conv(net.feed("N", 3, 4, 4), net.tensor(kernel, "kernel"), name="conv")
    net.initializers += [
        external("gamma", TensorProto.FLOAT, [16], 0, 64),
        external("beta", TensorProto.FLOAT, [16], 64, 64),
        external("four", TensorProto.INT4, [16, 16], 0, 128),
    ]
    zero, one = net.tensor(np.zeros(16, np.float32), "zero"), net.tensor(np.ones(16, np.float32), "one")
    y = net.op("BatchNormalization", x, "gamma", "beta", zero, one, name="bn")
    net.give(net.op("Relu", y, name="relu"))
    net.give(net.op("DequantizeLinear", "four", net.tensor(np.float32(1), "scale"), name="dequantise"))
    path = saved(net, tmp_path)
    data = np.concatenate([np.full(16, 1.5, np.float32), np.full(16, 0.5, np.float32)]).tobytes()
    (tmp_path / "w.bin").write_bytes(data)
    report = sanitize(path, tmp_path / "out.onnx")
    assert [part.channels for part in report.silenced] == [(PLANTED,)]
    assert set(report.unshared) == {"gamma", "beta"}
    assert (tmp_path / "out.w.bin").read_bytes() == data


def test_a_power_of_whole_numbers_is_not_computed_as_numpy_would(tmp_path: Path) -> None:
    """ONNX keeps the type of the base: 2 to the power of just less than 0 is 0 there, and almost 1 for NumPy."""
    net = Net(opset=17)
    x = net.feed("N", 1, 4, 4)
    exponents = np.full((16, 1, 1, 1), -0.001, np.float32)
    exponents[PLANTED] = 0
    base = net.tensor(np.full((16, 1, 1, 1), 2, np.int64), "base")
    power = net.op("Pow", base, net.tensor(exponents, "exponents"), name="power")
    kernel = net.op("Cast", power, name="cast", to=TensorProto.FLOAT)
    net.tail(net.conv(x, kernel, name="conv", kernel_shape=[1, 1]), 16)
    report = scan(saved(net, tmp_path))
    assert {part.name: part.reason for part in report.skipped if part.name == "conv"} == {"conv": "unreadable"}
    assert not report.complete


def behind(net: Net, x: str, name: str) -> None:
    """A convolution more, so that what comes before it is no answer."""
    net.tail(net.op("Relu", x, name=f"relu_{name}"), 16)


def test_a_gain_that_a_dequantisation_brings_is_not_passed_over(tmp_path: Path) -> None:
    """Quantised by one scale, and dequantised by another for each channel: the BN behind is not judged without it."""
    net = Net(opset=17)
    x = net.conv(net.feed("N", 3, 4, 4), net.tensor(net.kernel(16, 3, 1, 1, outlier=None), "kernel"), name="conv")
    scales = np.full(16, 0.1, np.float32)
    scales[PLANTED] = 5
    zero = net.tensor(np.int8(0), "zero")
    quantised = net.op("QuantizeLinear", x, net.tensor(np.float32(0.1), "scale"), zero, name="q")
    zeros = net.tensor(np.zeros(16, np.int8), "zeros")
    gained = net.op("DequantizeLinear", quantised, net.tensor(scales, "scales"), zeros, name="dq", axis=1)
    constants = [net.tensor(np.full(16, value, np.float32), f"bn{i}") for i, value in enumerate((1, 0, 0, 1))]
    behind(net, net.op("BatchNormalization", gained, *constants, name="bn"), "bn")
    report = scan(saved(net, tmp_path))
    assert ("bn", "untraced") in {(part.name, part.reason) for part in report.skipped}
    assert not report.complete


def test_a_constant_that_is_added_does_not_hide_a_convolution_behind_a_decoy(tmp_path: Path) -> None:
    """A BN on a side way makes all bounds equal; the main way has a bias and no BN, and is judged by itself."""
    net = Net(opset=17)
    kernel = net.kernel(16, 3, 1, 1)
    x = net.conv(net.feed("N", 3, 4, 4), net.tensor(kernel, "kernel"), name="conv")
    gamma = (1 / np.linalg.norm(kernel.reshape(16, -1), axis=1)).astype(np.float32)
    constants = [net.tensor(np.full(16, value, np.float32), f"bn{i}") for i, value in enumerate((0, 0, 1))]
    side = net.op("BatchNormalization", x, net.tensor(gamma, "gamma"), *constants, name="decoy")
    main = net.op("Add", x, net.tensor(np.ones((16, 1, 1), np.float32), "bias"), name="add")
    behind(net, main, "main")
    net.give(side)
    report = scan(saved(net, tmp_path))
    assert {layer.name: [channel.index for channel in layer.flagged] for layer in report.layers}["conv"] == [PLANTED]


@pytest.mark.parametrize("operator", ["Squeeze", "Slice"])
def test_what_numpy_and_onnx_take_differently_is_not_computed(operator: str, tmp_path: Path) -> None:
    """A Squeeze of no axis squeezes all in onnxruntime; a Slice from before the first one back gives the first one."""
    net = Net(opset=17)
    x = net.feed("N", 3, 4, 4)
    kernel = net.tensor(net.kernel(16, 3, 1, 1), "kernel")
    if operator == "Squeeze":
        more = net.op("Unsqueeze", kernel, net.integers(0, name="first"), name="more")
        made = net.op("Squeeze", more, net.tensor(np.zeros(0, np.int64), "none"), name="made")
    else:
        starts = [
            net.integers(number, name=name) for name, number in (("start", -20), ("end", -(1 << 33)), ("axis", 0))
        ]
        made = net.op("Slice", kernel, *starts, net.integers(-1, name="step"), name="made")
    net.tail(net.conv(x, made, name="conv", kernel_shape=[1, 1]), 16)
    report = scan(saved(net, tmp_path))
    assert {part.name: part.reason for part in report.skipped if part.name == "conv"} == {"conv": "unreadable"}
