"""Outliers behind operators that seem to keep the channels where they are, and do not.

In every model the kernel of ``conv`` has one channel that is 50 times the others, and a factor of 1/50 stands where a
reader who is led astray believes it to be. onnxruntime computes one channel that is far louder than all others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from onnx_clp import scan
from tests.built import random_inputs, session
from tests.cases.net import PLANTED, Net, Norm

C: Final = 16
SIDE: Final = 16
QUIET: Final = 1 / 50

Build = Callable[[], tuple[Net, str, int]]
"""A net, the value in which the channels can be seen, and their axis in it."""

CASES: dict[str, Build] = {}


def hidden(build: Build) -> Build:
    CASES[build.__name__] = build
    return build


def begun(opset: int = 18, *, channels: int = C, inputs: int = 3) -> tuple[Net, str]:
    """A net and the output of its convolution, (1, channels, 16, 16)."""
    net = Net(opset=opset)
    x = net.feed(1, inputs, SIDE, SIDE)
    return net, net.conv(x, net.kernel(channels, inputs, 3, 3, factor=50), name="conv")


def quiet(channels: int = C, at: int = PLANTED) -> NDArray[np.float32]:
    """Factors of 1, and one of 1/50."""
    factors = np.ones(channels, np.float32)
    factors[at] = QUIET
    return factors


def normalised(net: Net, x: str, gamma: NDArray[np.float32]) -> str:
    zeros, ones = np.zeros(len(gamma), np.float32), np.ones(len(gamma), np.float32)
    return net.bn(x, Norm(gamma, zeros, zeros, ones))


def declared(net: Net, value: str, *shape: int) -> None:
    """Say that ``value`` is of this shape, which it is not."""
    net.declared.append(helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, shape))


def back(net: Net, x: str) -> str:
    """``x`` in the form that the convolution gave it."""
    return net.op("Reshape", x, net.integers(1, C, SIDE, SIDE, name="back"), name="reshape_back")


@hidden
def a_rank_that_is_declared_and_is_not_so() -> tuple[Net, str, int]:
    """The factors lie along the last axis, which is the channels' only where there are two."""
    net, x = begun()
    declared(net, x, 1, C)
    x = net.op("Mul", x, net.tensor(quiet(), "factors"), name="mul")
    x = net.op("Add", x, net.tensor(np.zeros(C, np.float32), "zeros"), name="add")
    return net, x, 1


@hidden
def channels_gathered_where_none_are() -> tuple[Net, str, int]:
    net, x = begun()
    declared(net, x, 1, C)
    order = np.roll(np.arange(C), 1)
    x = net.op("Gather", x, net.tensor(order, "order"), name="gather", axis=-1)
    return net, normalised(net, x, quiet(at=int(np.flatnonzero(order == PLANTED)[0]))), 1


@hidden
def positions_declared_to_be_pooled() -> tuple[Net, str, int]:
    net, x = begun()
    x = net.op("MaxPool", x, name="pool", kernel_shape=[1, 1])
    declared(net, x, 1, C, 1, 1)
    x = net.op("Reshape", x, net.integers(SIDE * SIDE, C, 1, 1, name="size"), name="reshape")
    return net, back(net, normalised(net, x, quiet())), 1


@hidden
def channels_reshaped_into_the_batch() -> tuple[Net, str, int]:
    net, x = begun()
    x = net.op("Reshape", x, net.integers(C, SIDE, SIDE, name="size"), name="reshape")
    return net, back(net, normalised(net, x, quiet())), 1


@hidden
def channels_reshaped_into_whatever_the_batch_is() -> tuple[Net, str, int]:
    net, x = begun()
    x = net.op("Reshape", x, net.integers(-1, SIDE, SIDE, name="size"), name="reshape")
    return net, back(net, normalised(net, x, quiet())), 1


@hidden
def a_size_of_two_extents_taken_for_one() -> tuple[Net, str, int]:
    net, x = begun(inputs=C)
    two = net.op("Shape", "x", name="shape", start=2, end=4)
    size = net.op("Concat", two, net.integers(C, 1, name="rest"), name="size", axis=0)
    return net, back(net, normalised(net, net.op("Reshape", x, size, name="reshape"), quiet())), 1


@hidden
def channels_resized() -> tuple[Net, str, int]:
    net, x = begun()
    scales = net.tensor(np.array([1, 2, 1, 1], np.float32), "scales")
    x = net.op("Resize", x, "", scales, name="resize", mode="nearest")
    bounds = [net.integers(number, name=f"n{number}") for number in (0, C, 1)]
    return net, normalised(net, net.op("Slice", x, *bounds, name="slice"), quiet()), 1


@hidden
def channels_upsampled() -> tuple[Net, str, int]:
    net, x = begun(9)
    scales = net.tensor(np.array([1, 2, 1, 1], np.float32), "scales")
    x = net.op("Upsample", x, scales, name="upsample", mode="nearest")
    return net, normalised(net, net.op("Slice", x, name="slice", starts=[0], ends=[C], axes=[1]), quiet()), 1


@hidden
def channels_pooled_with_their_neighbours() -> tuple[Net, str, int]:
    net, x = begun()
    x = net.op("Transpose", x, name="there", perm=[0, 2, 1, 3])
    x = net.op("AveragePool", x, name="pool", kernel_shape=[2, 1], pads=[1, 0, 0, 0])
    x = net.op("Transpose", x, name="back", perm=[0, 2, 1, 3])
    return net, normalised(net, x, quiet()), 1


@hidden
def channels_cut_along_an_axis_made_at_run_time() -> tuple[Net, str, int]:
    net, x = begun(channels=C + 1)
    axis = net.op("Shape", "x", name="batch", start=0, end=1)  # 1, the axis of the channels
    first = [net.integers(number, name=f"first{number}") for number in (1, 1000)]
    x = net.op("Slice", x, *first, axis, name="cut_one")
    rest = [net.integers(number, name=f"rest{number}") for number in (0, C, 1)]
    return net, normalised(net, net.op("Slice", x, *rest, name="cut_none"), quiet()), 1


@hidden
def a_channel_gathered_several_times() -> tuple[Net, str, int]:
    """Five equal ones among twenty are no outliers."""
    net, x = begun()
    indices = net.tensor(np.array([*range(C), *[PLANTED] * 4]), "indices")
    return net, normalised(net, net.op("Gather", x, indices, name="gather", axis=1), np.ones(20, np.float32)), 1


@hidden
def a_channel_concatenated_several_times() -> tuple[Net, str, int]:
    net, x = begun()
    one = net.op("Gather", x, net.integers(PLANTED, name="one"), name="gather", axis=1)
    x = net.op("Concat", x, *[net.op("Relu", one, name=f"again{i}") for i in range(4)], name="concat", axis=1)
    return net, normalised(net, x, np.ones(20, np.float32)), 1


@hidden
def all_others_loud_in_a_corner_that_is_cut_off() -> tuple[Net, str, int]:
    net, x = begun()
    factors = np.ones((1, C, SIDE, SIDE), np.float32)
    factors[0, :, 0, 0] = 50
    factors[0, PLANTED, 0, 0] = 1
    x = net.op("Mul", x, net.tensor(factors, "factors"), name="mul")
    bounds = [net.integers(number, name=f"n{number}") for number in (1, SIDE, 2)]
    return net, normalised(net, net.op("Slice", x, *bounds, name="slice"), np.ones(C, np.float32)), 1


@hidden
def positions_normalised_instead_of_channels() -> tuple[Net, str, int]:
    """A MatMul of three axes has its channels on the last; BatchNormalization takes the second for them."""
    net = Net(opset=18)
    size = net.op("Shape", net.feed(1, C, 8, name="like"), name="shape")
    size = net.op("Compress", size, net.tensor(np.ones(3, np.bool_), "all"), name="size")
    x = net.op("Reshape", net.feed(1, C, 8), size, name="unknown")
    x = net.op("MatMul", x, net.tensor(net.kernel(C, 8, factor=50).T, "weight"), name="conv")
    x = normalised(net, x, quiet())
    net.give(net.op("Transpose", x, name="transpose", perm=[0, 2, 1]), rank=3)
    return net, x, 2


@hidden
def a_number_of_more_axes_than_the_data() -> tuple[Net, str, int]:
    """It makes an axis in front, so that the second is the batch."""
    net = Net(opset=18)
    x = net.conv(net.feed(C, 3, SIDE, SIDE), net.kernel(C, 3, 3, 3, factor=50), name="conv")
    x = net.op("Mul", x, net.tensor(np.ones((1,) * 5, np.float32), "one"), name="mul")
    x = normalised(net, x, quiet())
    net.give(net.op("Relu", x, name="relu"), rank=5)
    return net, x, 2


@hidden
def an_activation_that_grows_without_end() -> tuple[Net, str, int]:
    net = Net(opset=18)
    bias = np.zeros(C, np.float32)
    bias[PLANTED] = -8
    x = net.conv(net.feed(1, 3, SIDE, SIDE), net.kernel(C, 3, 3, 3, outlier=None), bias, name="conv")
    x = net.op("Celu", x, name="celu", alpha=-1.0)
    return net, normalised(net, x, np.ones(C, np.float32)), 1


@hidden
def a_bias_that_is_made_of_the_input() -> tuple[Net, str, int]:
    net = Net(opset=18)
    pooled = net.op("Flatten", net.op("GlobalMaxPool", net.feed(C, 3, SIDE, SIDE), name="pool"), name="flat")
    loud = net.op("MatMul", pooled, net.tensor(net.kernel(C, 3, factor=500).T, "loud"), name="matmul")
    x = net.op("Gemm", pooled, net.tensor(net.kernel(3, C, outlier=None), "weight"), loud, name="conv")
    x = normalised(net, x, np.ones(C, np.float32))
    net.give(net.op("Relu", x, name="relu"), rank=2)
    return net, x, 1


@hidden
def an_input_whose_shape_is_told_elsewhere() -> tuple[Net, str, int]:
    """The input itself has none, and that of a value_info of its name binds nobody."""
    net, x = begun()
    net.inputs[0].type.tensor_type.ClearField("shape")
    declared(net, "x", C, 3, SIDE, SIDE)
    x = net.op("Reshape", x, net.integers(C, SIDE, SIDE, 1, name="size"), name="reshape")
    return net, back(net, normalised(net, x, quiet())), 1


def levels(model: onnx.ModelProto, value: str, axis: int) -> NDArray[np.float64]:
    """How loud each channel of ``value`` is in onnxruntime, as its standard deviation."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    shown.graph.output.append(onnx.ValueInfoProto(name=value))
    fed = random_inputs(model)
    if not fed["x"].shape:  # an input without a shape
        fed["x"] = np.random.default_rng(0).standard_normal((1, 3, SIDE, SIDE)).astype(np.float32)
    found = np.asarray(session(shown.SerializeToString()).run([value], fed)[0], np.float64)
    return np.asarray(np.moveaxis(found, axis, 0).reshape(found.shape[axis], -1).std(axis=1))


@pytest.mark.parametrize("name", CASES)
def test_an_outlier_behind_operators_that_move_channels_is_not_hidden(name: str, tmp_path: Path) -> None:
    net, value, axis = CASES[name]()
    if not net.outputs:
        net.tail(value, C if "several" not in name else 20)
    model = net.case("model").model
    loud = levels(model, value, axis)
    assert loud.max() > 5 * np.median(loud)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    report = scan(path)
    assert report.flagged_channels or not report.complete
    # What is flagged is the channel itself, where it can be told.
    assert all(layer.name != "conv" or {part.index for part in layer.flagged} <= {PLANTED} for layer in report.layers)


def test_the_control_is_flagged_where_it_is_normalised(tmp_path: Path) -> None:
    net, x = begun()
    net.tail(normalised(net, x, np.ones(C, np.float32)), C)
    path = tmp_path / "model.onnx"
    path.write_bytes(net.case("model").model.SerializeToString())
    (layer,) = scan(path).layers
    assert (layer.name, [part.index for part in layer.flagged]) == ("bn", [PLANTED])


@pytest.mark.parametrize("op", ["Mul", "Div"])
def test_a_factor_that_constants_make_in_a_way_that_is_not_followed_is_said_to_be(op: str, tmp_path: Path) -> None:
    net = Net(opset=18)
    x = net.conv(net.feed(1, 3, SIDE, SIDE), net.kernel(C, 3, 3, 3, outlier=None), name="conv")
    powers = np.zeros((C, 1, 1), np.float32)
    powers[PLANTED] = 4 if op == "Mul" else -4
    x = net.op(op, x, net.op("Exp", net.tensor(powers, "powers"), name="exp"), name="gain")
    net.tail(x, C)
    model = net.case("model").model
    loud = levels(model, x, 1)
    assert loud.max() > 5 * np.median(loud)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    report = scan(path)
    assert [(part.name, part.reason) for part in report.skipped] == [("gain", "untraced")]
    assert not report.complete


@pytest.mark.parametrize("shape", [(1, C, 1, 1, 1), (1, 1, 1, 1, 1)])
def test_slopes_of_more_axes_than_the_data_are_not_followed(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Onnxruntime broadcasts them both ways where it does not know the shapes before it runs."""
    net = Net(opset=18)
    x = net.conv(net.feed("N", 3, SIDE, SIDE), net.kernel(C, 3, 3, 3, factor=50), name="conv")
    x = net.op("PRelu", x, net.tensor(np.ones(shape, np.float32), "slopes"), name="prelu")
    net.give(net.op("Relu", normalised(net, x, quiet()), name="relu"), rank=5)
    path = tmp_path / "model.onnx"
    path.write_bytes(net.case("model").model.SerializeToString())
    assert ("bn", "untraced") in {(part.name, part.reason) for part in scan(path).skipped}
