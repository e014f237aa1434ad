"""Networks with a correction to write, one for each place where it is written, and ways to store each otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tests.channel_nets import NETS, SIZE, Net

Array = NDArray[Any]


def plain() -> onnx.ModelProto:
    """Convolutions without a bias, their BN folded in."""
    net = Net()
    x = net.op("Relu", net.conv("x", 3, 16, bias=False))
    for _ in range(2):
        x = net.op("Relu", net.conv(x, 16, 16, bias=False))
    return net.head(x, 16)


def transposed() -> onnx.ModelProto:
    """A ConvTranspose in groups, without a bias and with one."""
    net = Net()
    x = net.op("Relu", net.conv("x", 3, 16))
    for biased in (False, True):
        W = net.random.normal(0, 0.2, (16, 8, 2, 2))
        W[:8, 3] *= 6
        inputs = [x, net.constant(W)] + ([net.constant(net.random.normal(0, 0.2, 16))] if biased else [])
        x = net.op("Relu", net.op("ConvTranspose", *inputs, strides=[2, 2], group=2, kernel_shape=[2, 2]))
    return net.head(x, 16)


def preact() -> onnx.ModelProto:
    """BatchNormalizations behind sums, as in a pre-activation residual network."""
    net, n = Net(), 16
    x = net.conv("x", 3, n, bias=False)
    for _ in range(3):
        y = net.op("Relu", net.bn(x, n))
        y = net.op("Relu", net.bn(net.conv(y, n, n, bias=False), n))
        x = net.op("Add", net.conv(y, n, n, bias=False), x)
    return net.head(net.op("Relu", net.bn(x, n)), n)


def shared() -> onnx.ModelProto:
    """Convolutions that share one bias, and BNs that share γ."""
    net, n = Net(), 16
    bias, gamma = net.constant(net.random.normal(0, 0.2, n)), net.random.uniform(0.5, 1.5, n)
    gamma[1] = 8
    g = net.constant(gamma)
    x = "x"
    for channels in (3, n, n):
        W = net.random.normal(0, 0.2, (n, channels, 3, 3))
        W[n // 2] *= 6
        x = net.op("Relu", net.op("Conv", x, net.constant(W), bias, pads=[1] * 4))
    for _ in range(2):
        W = net.random.normal(0, 0.1, (n, n, 1, 1))
        statistics = [net.constant(v) for v in (np.zeros(n), net.random.normal(0, 0.2, n), np.ones(n))]
        x = net.op("Relu", net.op("BatchNormalization", net.op("Conv", x, net.constant(W)), g, *statistics))
    return net.head(x, n)


def summands() -> onnx.ModelProto:
    """Constants added to and subtracted from convolutions, with factors between."""
    net, n = Net(), 16
    x = net.op("Relu", net.conv("x", 3, n))
    x = net.op(
        "Mul", net.op("Add", net.conv(x, n, n), net.constant(net.random.normal(0, 1, (n, 1, 1)))), net.constant(2.0)
    )
    x = net.op("Relu", net.op("Sub", x, net.constant(net.random.normal(0, 1, (1, n, 1, 1)))))
    x = net.op("Relu", net.op("Mul", net.conv(x, n, n), net.constant(np.float32(0.5))))
    x = net.op("Relu", net.op("Div", net.conv(x, n, n, bias=False), net.constant(net.random.uniform(1, 2, (n, 1, 1)))))
    return net.head(x, n)


def derived() -> onnx.ModelProto:
    """Kernels that operators make: transposed, and a direction times a length (weight normalisation)."""
    net, n = Net(), 16
    x = net.op("Relu", net.conv("x", 3, n))
    W = net.random.normal(0, 0.1, (3, 3, n, n))
    W[..., 3] *= 6
    x = net.op("Relu", net.op("Conv", x, net.op("Transpose", net.constant(W), perm=[3, 2, 0, 1]), pads=[1] * 4))
    V, g = net.random.normal(0, 0.1, (n, n, 3, 3)), net.random.uniform(0.5, 1.5, (n, 1, 1, 1))
    g[5] *= 6
    kernel = net.op("Mul", net.constant(V), net.constant(g))
    bias = net.constant(net.random.normal(0, 0.1, n))
    x = net.op("Relu", net.op("Conv", x, kernel, bias, pads=[1] * 4))
    return net.head(x, n)


def branching() -> onnx.ModelProto:
    """A convolution in each branch of an If that asks how many images there are, and one behind it."""
    net, n = Net(), 16
    x = net.op("Relu", net.conv("x", 3, n))
    first = net.op("Gather", net.op("Shape", x), net.constant(np.array(0)))
    branches = {}
    for name in ("then", "else"):
        inner = Net(seed=len(name))
        inner.nodes, inner.tensors = [], []
        W = inner.random.normal(0, 0.2, (n, n, 3, 3))
        W[7] *= 6
        kernel = numpy_helper.from_array(W.astype(np.float32), f"{name}.W")
        conv = helper.make_node("Conv", [x, f"{name}.W"], [f"{name}.y"], f"{name}.conv", pads=[1] * 4)
        relu = helper.make_node("Relu", [f"{name}.y"], [f"{name}.z"], f"{name}.relu")
        out = helper.make_tensor_value_info(f"{name}.z", TensorProto.FLOAT, None)
        branches[f"{name}_branch"] = helper.make_graph([conv, relu], name, [], [out], [kernel])
    many = net.op("Greater", first, net.constant(np.array(1)))
    x = net.op("If", many, then_branch=branches["then_branch"], else_branch=branches["else_branch"])
    return net.head(net.op("Relu", net.conv(x, n, n)), n)


def called() -> onnx.ModelProto:
    """A function with a convolution, called twice, and a convolution behind it."""
    net, n = Net(), 16
    x = net.op("Relu", net.conv("x", 3, n))
    W = net.random.normal(0, 0.2, (n, n, 3, 3))
    W[7] *= 2
    kernel = net.constant(W)
    for i in range(2):
        net.nodes.append(helper.make_node("Block", [x, kernel], [f"b{i}"], f"block{i}", domain="own"))
        x = f"b{i}"
    model = net.head(net.op("Relu", net.conv(x, n, n)), n, check=False)
    body = [
        helper.make_node("Conv", ["a", "W"], ["y"], "conv", pads=[1] * 4),
        helper.make_node("Relu", ["y"], ["z"], "relu"),
    ]
    model.functions.append(helper.make_function("own", "Block", ["a", "W"], ["z"], body, [helper.make_opsetid("", 17)]))
    model.opset_import.append(helper.make_opsetid("own", 1))
    onnx.checker.check_model(model)
    return model


CORRECTED: dict[str, Callable[[], onnx.ModelProto]] = {
    **NETS,
    **{each.__name__: each for each in (plain, transposed, preact, shared, summands, derived)},
}
"""Networks of which every site can be corrected."""


# ---- the same, stored otherwise


def as_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every initializer as a Constant node in front of the first node that reads it."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    nodes: list[onnx.NodeProto] = []
    left = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        nodes += [helper.make_node("Constant", [], [name], value=left.pop(name)) for name in node.input if name in left]
        nodes.append(node)
    del made.graph.node[:], made.graph.initializer[:]
    made.graph.node.extend(nodes)
    return made


def of_batch(model: onnx.ModelProto, size: int) -> onnx.ModelProto:
    """The input takes exactly ``size`` images."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for info in (made.graph.input[0], made.graph.output[0]):
        info.type.tensor_type.shape.dim[0].dim_value = size
    return made


def in_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Everything in float16."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for tensor in made.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float16), tensor.name))
    for info in (made.graph.input[0], made.graph.output[0]):
        info.type.tensor_type.elem_type = TensorProto.FLOAT16
    return made


def quantised(model: onnx.ModelProto, *, per_channel: bool = True) -> onnx.ModelProto:
    """The kernels of convolutions in int8 behind DequantizeLinear, and what Relu makes in levels of 1/32."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    tensors = {tensor.name: tensor for tensor in made.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in made.graph.node:
        if node.op_type == "Conv":
            W = numpy_helper.to_array(tensors[node.input[1]])
            axes = (1, 2, 3) if per_channel else None
            scale = (np.abs(W).max(axes) / 127).astype(np.float32)
            levels = np.rint(W / scale.reshape([-1, 1, 1, 1] if per_channel else ())).astype(np.int8)
            name = node.input[1]
            tensors[name].CopyFrom(numpy_helper.from_array(levels, name))
            zero = np.zeros(scale.shape, np.int8)
            made.graph.initializer.extend(
                [numpy_helper.from_array(scale, f"{name}.s"), numpy_helper.from_array(zero, f"{name}.z")]
            )
            nodes.append(
                helper.make_node(
                    "DequantizeLinear", [name, f"{name}.s", f"{name}.z"], [f"{name}.dq"], f"{name}.DQ", axis=0
                )
            )
            node.input[1] = f"{name}.dq"
        nodes.append(node)
        if node.op_type == "Relu":
            (out,) = node.output
            node.output[0] = f"{out}.raw"
            constants = [np.float32(1 / 32), np.uint8(0)]
            names = [f"{out}.s", f"{out}.z"]
            made.graph.initializer.extend(map(numpy_helper.from_array, map(np.array, constants), names))
            nodes.append(helper.make_node("QuantizeLinear", [f"{out}.raw", *names], [f"{out}.q"], f"{out}.Q"))
            nodes.append(helper.make_node("DequantizeLinear", [f"{out}.q", *names], [out], f"{out}.DQ"))
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    onnx.checker.check_model(made)
    return made


IMAGES = 24
"""With 64 positions each, enough for the statistics of a channel and the 144 inputs of a kernel."""


def images(count: int = IMAGES, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth random images: not every position of a channel sees the same distribution."""
    random = np.random.default_rng(seed)
    coarse = random.uniform(0, 255, (count, SIZE // 2, SIZE // 2, 3))
    fine = coarse.repeat(2, 1).repeat(2, 2) + random.normal(0, 20, (count, SIZE, SIZE, 3))
    return np.clip(np.rint(fine), 0, 255).astype(np.uint8)


def feeds(pixels: NDArray[np.uint8], dtype: np.dtype[Any] | type = np.float32, size: int | None = None) -> list[Array]:
    """The model's input of images, from 0 to 1, in batches of ``size``."""
    x = (pixels.transpose(0, 3, 1, 2) / 255).astype(dtype)
    step = size or len(x)
    return [x[start : start + step] for start in range(0, len(x), step)]


def saved(model: onnx.ModelProto, folder: Path, *, external: bool = False) -> Path:
    """Write the model, its weights beside it with ``external``."""
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=external, location="model.onnx.data", size_threshold=0)
    return path
