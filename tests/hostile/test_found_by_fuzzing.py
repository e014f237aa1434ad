"""What fuzzing found, each with the smallest model that shows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_clp import runtime, sanitize, scan
from tests.cases.net import PLANTED, Array, Net


def saved(net: Net, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(net.case("model").model.SerializeToString())
    return path


def own_constant(path: Path) -> Array:
    """The constant that a rewrite put in front of a node."""
    (node,) = (node for node in onnx.load(path).graph.node if node.name.endswith("__silenced"))
    return numpy_helper.to_array(node.attribute[0].t)


@pytest.fixture
def without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is not installed: what is written is verified by a new scan alone."""
    monkeypatch.setattr(runtime, "available", lambda: False)


def reshaped_kernel(*, quantised: bool) -> tuple[Net, Array]:
    """A convolution whose small kernel goes through a Reshape, and which a graph output reads too; and the kernel."""
    net = Net()
    x = net.feed("N", 1, 8, 8)
    kernel = net.kernel(8, 9)
    if quantised:
        stored = np.clip(np.round(kernel * 16), -128, 127).astype(np.int8)
        kernel = stored.astype(np.float32) / 16
        zero, scale = net.tensor(np.zeros(8, np.int8), "zero"), net.tensor(np.full(8, 1 / 16, np.float32), "scale")
        flat = net.op("DequantizeLinear", net.tensor(stored, "weight"), scale, zero, name="dequantize", axis=0)
    else:
        flat = net.tensor(kernel, "weight")
    shaped = net.op("Reshape", flat, net.integers(8, 1, 3, 3, name="sizes"), name="reshape")
    net.tail(net.conv(x, shaped, name="conv", kernel_shape=[3, 3]), 8)
    net.give(shaped)
    return net, kernel.reshape(8, 1, 3, 3)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.usefixtures("without_onnxruntime")
def test_a_small_kernel_behind_a_reshape_keeps_its_numbers_in_a_copy(tmp_path: Path, *, quantised: bool) -> None:
    """Following the elements through the Reshape must not change what the Reshape is taken to give."""
    net, kernel = reshaped_kernel(quantised=quantised)
    kernel[PLANTED] = 0
    report = sanitize(saved(net, tmp_path), tmp_path / "out.onnx", u=1.5, max_share=1)
    assert [part.channels for part in report.silenced] == [(PLANTED,)]
    assert np.array_equal(own_constant(tmp_path / "out.onnx"), kernel)


def powers_of_two() -> Net:
    """A kernel of FLOAT8E8M0, of which every number is a power of two, and none is zero."""
    net = Net(opset=24, ir=11)
    x = net.feed("N", 1, 4, 4)
    exponents = bytes([127, 127, 127, 127, 127, 137, 127, 127])
    kernel = TensorProto(name="kernel", dims=[8, 1, 1, 1], data_type=TensorProto.FLOAT8E8M0, raw_data=exponents)
    cast = net.op("Cast", net.tensor(kernel, "kernel"), name="cast", to=TensorProto.FLOAT)
    net.tail(net.conv(x, cast, name="conv", kernel_shape=[1, 1]), 8)
    return net


@pytest.mark.usefixtures("without_onnxruntime")
def test_a_channel_of_numbers_that_cannot_be_zero_is_left(tmp_path: Path) -> None:
    report = sanitize(saved(powers_of_two(), tmp_path), tmp_path / "out.onnx", u=1.5, max_share=1)
    assert not report.silenced
    assert [part.channels for part in report.left] == [(PLANTED,)]


def quantised_and_cast() -> Net:
    """A kernel that is quantised and cast: what was 0 is the zero point then, so that no 0 in the file silences."""
    net = Net()
    x = net.feed("N", 1, 4, 4)
    levels = net.tensor(np.array([2, 2, 2, 2, 2, 200, 2, 2], np.float32), "levels")
    scale, zero = net.tensor(np.float32(2), "scale"), net.tensor(np.uint8(5), "zero")
    cast = net.op("Cast", net.op("QuantizeLinear", levels, scale, zero, name="quantise"), name="cast", to=1)
    shaped = net.op("Reshape", cast, net.integers(8, 1, 1, 1, name="sizes"), name="reshape")
    net.tail(net.conv(x, shaped, name="conv", kernel_shape=[1, 1]), 8)
    return net


def test_a_kernel_that_no_zero_in_the_file_silences_gets_one_of_its_own(tmp_path: Path) -> None:
    report = sanitize(saved(quantised_and_cast(), tmp_path), tmp_path / "out.onnx", u=1.5, max_share=1)
    assert [part.channels for part in report.silenced] == [(PLANTED,)]
    assert report.unshared
    assert own_constant(tmp_path / "out.onnx").ravel().tolist() == [6, 6, 6, 6, 6, 0, 6, 6]


@pytest.mark.parametrize("operator", ["ConstantOfShape", "Expand", "Reshape", "Slice", "Unsqueeze"])
def test_sizes_of_very_many_axes_are_no_sizes(operator: str, tmp_path: Path) -> None:
    """A shape that is itself 2^39 numbers, all of them the same one."""
    net = Net()
    x = net.feed("N", 4, 4, 4)
    data = [] if operator == "ConstantOfShape" else [net.tensor(np.ones((4, 4, 1, 1), np.float32), "data")]
    sizes = net.op("Expand", net.integers(1, name="one"), net.integers(1 << 39, name="many"), name="sizes")
    given = [*data, sizes, sizes] if operator == "Slice" else [*data, sizes]
    net.tail(net.conv(x, net.op(operator, *given, name="kernel"), name="conv"), 4)
    report = scan(saved(net, tmp_path))
    assert [(part.name, part.reason) for part in report.skipped if part.name == "conv"] == [("conv", "unreadable")]


def test_a_kernel_of_four_bits_is_packed_in_its_copy(tmp_path: Path) -> None:
    """No operator takes such a kernel as it is; what is written says all the same what was meant."""
    net = Net(opset=21, ir=10)
    kernel = np.random.default_rng(0).integers(-2, 3, (16, 3, 3, 3))
    kernel[PLANTED] = 7
    weight = helper.make_tensor("weight", TensorProto.INT4, kernel.shape, kernel.ravel())
    net.tail(net.conv(net.feed(1, 3, 8, 8), net.tensor(weight, "weight"), name="conv", kernel_shape=[3, 3]), 16)
    report = sanitize(saved(net, tmp_path), tmp_path / "out.onnx", u=2)
    assert [part.channels for part in report.silenced] == [(PLANTED,)]
    kernel[PLANTED] = 0
    assert np.array_equal(own_constant(tmp_path / "out.onnx").astype(np.int64), kernel)


@pytest.mark.parametrize("op", ["Mul", "Div", "Add", "Sub"])
def test_a_constant_without_elements_is_no_factor(op: str, tmp_path: Path) -> None:
    net = Net()
    x = net.conv(net.feed(1, 3, 8, 8), net.kernel(16, 3, 3, 3), name="conv")
    net.tail(net.op(op, x, net.tensor(np.zeros((0, 16, 1, 1), np.float32), "none"), name="odd"), 16)
    assert [layer.name for layer in scan(saved(net, tmp_path)).layers] == ["conv"]


@pytest.mark.parametrize(
    "op", ["Split", "Concat", "Gather", "Squeeze", "Slice", "Transpose", "Reshape", "Flatten", "Resize"]
)
def test_operators_on_a_scalar_have_no_axes(op: str, tmp_path: Path) -> None:
    """Such a node runs nowhere; what becomes of its shape is not known."""
    net = Net(opset=18)
    x = net.conv(net.feed(1, 3, 8, 8), net.kernel(16, 3, 3, 3), name="conv")
    axes = net.integers(0, name="axes")
    total = net.op("ReduceSum", x, name="total", keepdims=0)
    for made in net.ops(op, total, axes, axes, axes, name="odd", outputs=2):
        net.give(net.op("Add", x, made, name=f"add_{made}"))
    net.tail(x, 16)
    assert [layer.name for layer in scan(saved(net, tmp_path)).layers] == ["conv"]


def four_bits(count: int, *, typed: bool) -> TensorProto:
    """A kernel of 16 × 3 elements of four bits, of which the file holds ``count`` bytes."""
    held = [0x21] * count
    made = TensorProto(name="weight", dims=[16, 3, 1, 1], data_type=TensorProto.INT4)
    if typed:
        made.int32_data.extend(held)
    else:
        made.raw_data = bytes(held)
    return made


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("count", [0, 23, 24, 25, 48])
def test_elements_of_four_bits_are_read_where_there_are_exactly_as_many(
    count: int, tmp_path: Path, *, typed: bool
) -> None:
    """The onnx package drops what is too much, and onnxruntime refuses it."""
    net = Net(opset=21, ir=10)
    weight = net.tensor(four_bits(count, typed=typed), "weight")
    cast = net.op("Cast", weight, name="cast", to=TensorProto.FLOAT)
    net.tail(net.conv(net.feed(1, 3, 8, 8), cast, name="conv", kernel_shape=[1, 1]), 16)
    report = scan(saved(net, tmp_path))
    read = [layer.name for layer in report.layers] == ["conv"]
    assert read == (count == 24)
    assert read or [(part.name, part.reason) for part in report.skipped if part.name == "conv"] in (
        [("conv", "unreadable")],
        [("conv", "no-data")],
    )


@pytest.mark.parametrize("axes", [(0, 0), (5, -1), (1, 1, 1)])
def test_an_axis_that_is_added_twice(axes: tuple[int, ...], tmp_path: Path) -> None:
    net = Net()
    x = net.conv(net.feed(1, 3, 8, 8), net.kernel(16, 3, 3, 3), name="conv")
    made = net.op("Unsqueeze", x, net.integers(*axes, name="axes"), name="odd")
    net.give(net.op("Relu", made, name="relu"), rank=5)
    net.tail(x, 16)
    assert [layer.name for layer in scan(saved(net, tmp_path)).layers] == ["conv"]


@pytest.mark.usefixtures("without_onnxruntime")
def test_what_makes_a_value_of_the_name_of_a_constant_reads_its_weight_all_the_same(tmp_path: Path) -> None:
    """Two convolutions read one kernel, and the output of the second has the name of an initializer."""
    net = Net()
    x = net.feed("N", 16, 8, 8)
    kernel = net.tensor(net.kernel(16, 16, 1, 1), "kernel")
    net.tensor(np.ones(3, np.float32), "twin.out")
    net.give(net.op("Relu", net.conv(x, kernel, name="conv", kernel_shape=[1, 1]), name="relu"))
    net.nodes.append(helper.make_node("ConvTranspose", [x, kernel], ["twin.out"], name="twin"))
    net.give(net.op("Relu", "twin.out", name="other"))
    path = saved(net, tmp_path)
    assert [[channel.index for channel in layer.flagged] for layer in scan(path).layers] == [[PLANTED], []]
    report = sanitize(path, tmp_path / "out.onnx")
    assert [part.layer for part in report.silenced] == ["conv"]
    assert report.unshared == ("kernel",)


@pytest.mark.parametrize("count", [1, 2])
def test_a_where_without_all_of_its_inputs_is_no_fault_of_ours(count: int, tmp_path: Path) -> None:
    net = Net()
    x = net.feed("N", 16, 8, 8)
    before = net.op("Relu", net.conv(x, net.kernel(16, 16, 1, 1), name="conv", kernel_shape=[1, 1]), name="relu")
    net.nodes.append(helper.make_node("Where", [before] * count, ["chosen"], name="where"))
    net.give(net.conv("chosen", net.kernel(16, 16, 1, 1), name="after", kernel_shape=[1, 1]))
    assert "conv" in [layer.name for layer in scan(saved(net, tmp_path)).layers]
