"""Quantised models: QDQ, QLinearConv, ConvInteger, float8. Bounds are those of the dequantised weight."""

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from tests import naive
from tests.cases.net import Array, Attribute, Net, case


def quantised(W: Array, dtype: DTypeLike, *, axis: int | None = None) -> tuple[Array, Array, Array]:
    """W as integers, with scale and zero point: one of each, or one per index of an axis."""
    W = W.astype(np.float64)
    others = None if axis is None else tuple(a for a in range(W.ndim) if a != axis)
    low, high = np.minimum(W.min(others, keepdims=True), 0), np.maximum(W.max(others, keepdims=True), 0)
    if np.dtype(dtype).kind == "u":
        scale = ((high - low) / 255).astype(np.float32)
        zero = np.round(-low / scale)
        q = np.clip(np.round(W / scale) + zero, 0, 255)
    else:
        scale = (np.maximum(high, -low) / 127).astype(np.float32)
        zero = np.zeros_like(scale)
        q = np.clip(np.round(W / scale), -127, 127)
    shape = () if axis is None else (-1,)
    return q.astype(dtype), scale.reshape(shape), zero.reshape(shape).astype(dtype)


def dequantised(q: Array, scale: Array, zero: Array | int = 0, *, axis: int = 0) -> Array:
    """What the integers stand for: (q − zero) · scale, index by index of the axis."""
    scale, zero = np.broadcast_to(scale, q.shape[axis]), np.broadcast_to(zero, q.shape[axis])
    parts = [
        (part.astype(np.float64) - float(zero[i])) * float(scale[i]) for i, part in enumerate(np.moveaxis(q, axis, 0))
    ]
    return np.moveaxis(np.stack(parts), 0, axis)


def activation_qdq(net: Net, x: str, name: str) -> str:
    """QuantizeLinear and DequantizeLinear of an activation, as a quantised graph has them between its operators."""
    constants = [
        net.tensor(np.float32(0.02), f"{name}.scale"),
        net.tensor(np.uint8(128), f"{name}.zero"),
    ]
    x = net.op("QuantizeLinear", x, *constants, name=f"{name}_q")
    return net.op("DequantizeLinear", x, *constants, name=f"{name}_dq")


# ---- QDQ


@case(
    qdq_int8={"dtype": np.int8},
    qdq_uint8={"dtype": np.uint8},
    qdq_int8_per_axis={"dtype": np.int8, "axis": 0},
    qdq_uint8_per_axis={"dtype": np.uint8, "axis": 0},
    qdq_int8_per_axis_no_zero={"dtype": np.int8, "axis": 0, "zero": False},
    qdq_int8_no_zero={"dtype": np.int8, "zero": False},
    qdq_int8_bias={"dtype": np.int8, "axis": 0, "bias": True},
    qdq_int8_relu_before_q={"dtype": np.int8, "axis": 0, "relu": True},
    qdq_negative_axis={"dtype": np.int8, "axis": -4},
)
def qdq(dtype: DTypeLike, *, axis: int | None = None, zero: bool = True, bias: bool = False, relu: bool = False) -> Net:
    """A folded Conv with a quantised weight, between quantised activations."""
    net = Net()
    positive = None if axis is None else axis % 4
    W, s, z = quantised(net.kernel(16, 3, 3, 3), dtype, axis=positive)
    constants = [net.tensor(W, "weight"), net.tensor(s, "scale")] + ([net.tensor(z, "zero")] if zero else [])
    attributes: dict[str, Attribute] = {} if axis is None else {"axis": axis}
    weight = net.op("DequantizeLinear", *constants, name="weight_dq", **attributes)
    x = activation_qdq(net, net.feed(1, 3, 8, 8), "x")
    x = net.conv(x, weight, quantised_bias(net, s) if bias else None, pads=[1] * 4)
    if relu:
        x = net.op("Relu", x, name="relu")
    net.tail(activation_qdq(net, x, "y"), 16)
    net.expect("conv", naive.bounds(dequantised(W, s, z, axis=positive or 0)))
    return net


def quantised_bias(net: Net, weight_scale: Array) -> str:
    """A bias as int32 with the scale of input × weight."""
    constants = [
        net.tensor(net.rng.integers(-100, 100, 16).astype(np.int32), "bias"),
        net.tensor((weight_scale * np.float32(0.02)).astype(np.float32), "bias_scale"),
        net.tensor(np.zeros(16, np.int32), "bias_zero"),
    ]
    return net.op("DequantizeLinear", *constants, name="bias_dq", axis=0)


@case(
    qdq_float_weight={"axis": None},
    qdq_float_weight_per_axis={"axis": 0},
)
def qdq_float_weight(axis: int | None) -> Net:
    """The weight is stored as float32 and quantised in the graph: QuantizeLinear → DequantizeLinear."""
    net = Net()
    W = net.kernel(16, 3, 3, 3)
    q, s, z = quantised(W, np.int8, axis=axis)
    weight, scale, zero = net.tensor(W, "weight"), net.tensor(s, "scale"), net.tensor(z, "zero")
    attributes: dict[str, Attribute] = {} if axis is None else {"axis": axis}
    weight = net.op("QuantizeLinear", weight, scale, zero, name="weight_q", **attributes)
    weight = net.op("DequantizeLinear", weight, scale, zero, name="weight_dq", **attributes)
    x = net.conv(activation_qdq(net, net.feed(1, 3, 8, 8), "x"), weight, net.vector(16), pads=[1] * 4)
    net.tail(activation_qdq(net, x, "y"), 16)
    net.expect("conv", naive.bounds(dequantised(q, s, z)))
    return net


@case(qdq_bn={"axis": 0}, qdq_bn_per_input={"axis": 1})
def qdq_bn(axis: int) -> Net:
    """Weights alone are quantised, per output or per input channel, the BN is kept."""
    net = Net()
    W, s, z = quantised(net.kernel(16, 3, 3, 3), np.int8, axis=axis)
    norm = net.norm(16)
    weight = net.op(
        "DequantizeLinear",
        *(net.tensor(W, "weight"), net.tensor(s, "scale"), net.tensor(z, "zero")),
        name="weight_dq",
        axis=axis,
    )
    net.tail(net.bn(net.conv(net.feed(1, 3, 8, 8), weight, pads=[1] * 4), norm), 16)
    net.expect("bn", norm.of(dequantised(W, s, z, axis=axis)))
    return net


@case()
def qdq_conv_transpose() -> Net:
    """ConvTranspose, quantised per tensor."""
    net = Net()
    kernel = net.kernel(16, 4, 3, 3)
    W, s, z = quantised(np.moveaxis(kernel, 0, 1), np.uint8)
    weight = net.op(
        "DequantizeLinear",
        *(net.tensor(W, "weight"), net.tensor(s, "scale"), net.tensor(z, "zero")),
        name="weight_dq",
    )
    net.tail(net.conv(net.feed(1, 4, 8, 8), weight, net.vector(16), name="up", op="ConvTranspose"), 16)
    net.expect("up", naive.bounds(naive.conv_transpose_kernel(dequantised(W, s, z))))
    return net


@case(
    float8_e4m3fn={"dtype": ml_dtypes.float8_e4m3fn},
    float8_e5m2={"dtype": ml_dtypes.float8_e5m2},
    float8_e4m3fn_per_axis={"dtype": ml_dtypes.float8_e4m3fn, "axis": 0},
)
def float8(dtype: DTypeLike, *, axis: int | None = None) -> Net:
    """A float8 weight and its DequantizeLinear."""
    net = Net(opset=19, ir=9)
    W = net.kernel(16, 3, 3, 3).astype(dtype)
    s = np.float32(0.5) if axis is None else net.rng.uniform(0.5, 0.6, 16).astype(np.float32)
    attributes: dict[str, Attribute] = {} if axis is None else {"axis": axis}
    weight = net.op("DequantizeLinear", net.tensor(W, "weight"), net.tensor(s, "scale"), name="weight_dq", **attributes)
    net.tail(net.conv(net.feed(1, 3, 8, 8), weight, net.vector(16), pads=[1] * 4), 16)
    net.expect("conv", naive.bounds(dequantised(W, np.asarray(s))))
    return net


# ---- QLinearConv


@case(
    qlinear_conv={"dtype": np.int8},
    qlinear_conv_uint8={"dtype": np.uint8},
    qlinear_conv_per_axis={"dtype": np.int8, "axis": 0},
    qlinear_conv_no_bias={"dtype": np.uint8, "bias": False},
    qlinear_conv_grouped={"dtype": np.int8, "axis": 0, "groups": 2},
)
def qlinear_conv(dtype: DTypeLike, *, axis: int | None = None, bias: bool = True, groups: int = 1) -> Net:
    """QuantizeLinear → QLinearConv → QLinearConv → DequantizeLinear, as onnxruntime's QOperator format has it."""
    net = Net()
    scale, zero = net.tensor(np.float32(0.02), "scale"), net.tensor(np.uint8(128), "zero")
    x, inputs = net.op("QuantizeLinear", net.feed(1, 4, 8, 8), scale, zero, name="quantize"), 4
    for name, outlier in (("conv_0", 5), ("conv_1", 9)):
        W, s, z = quantised(net.kernel(16, inputs // groups, 3, 3, outlier=outlier), dtype, axis=axis)
        constants = [net.tensor(W, f"{name}.weight"), net.tensor(s, f"{name}.scale"), net.tensor(z, f"{name}.zero")]
        b = [net.tensor(net.rng.integers(-100, 100, 16).astype(np.int32), f"{name}.bias")] if bias else []
        x = net.op("QLinearConv", x, scale, zero, *constants, scale, zero, *b, name=name, pads=[1] * 4, group=groups)
        net.expect(name, naive.bounds(dequantised(W, s, z)), [outlier])
        inputs = 16
    net.tail(net.op("DequantizeLinear", x, scale, zero, name="dequantize"), 16)
    return net


@case()
def qlinear_conv_head() -> Net:
    """The quantised head: QLinearConv → DequantizeLinear → Sigmoid → output."""
    net = Net()
    scale, zero = net.tensor(np.float32(0.02), "scale"), net.tensor(np.uint8(0), "zero")
    x = net.op("QuantizeLinear", net.feed(1, 4, 8, 8), scale, zero, name="quantize")
    W, s, z = quantised(net.kernel(16, 4, 3, 3), np.int8)
    W_1, s_1, z_1 = quantised(net.kernel(16, 16, 3, 3), np.int8)
    constants = [net.tensor(W, "trunk.weight"), net.tensor(s, "trunk.scale"), net.tensor(z, "trunk.zero")]
    x = net.op("QLinearConv", x, scale, zero, *constants, scale, zero, name="trunk")
    constants = [net.tensor(W_1, "head.weight"), net.tensor(s_1, "head.scale"), net.tensor(z_1, "head.zero")]
    x = net.op("QLinearConv", x, scale, zero, *constants, scale, zero, name="head")
    net.give(net.op("Sigmoid", net.op("DequantizeLinear", x, scale, zero, name="dequantize"), name="sigmoid"))
    net.expect("trunk", naive.bounds(dequantised(W, s, z)))
    net.expect_skipped("head", "head")
    return net


# ---- ConvInteger


@case(
    conv_integer={},
    conv_integer_int8={"dtype": np.int8},
    conv_integer_no_bias={"bias": False},
    conv_integer_no_zero={"dtype": np.int8, "zero": False},
    conv_integer_per_axis={"dtype": np.int8, "axis": 0, "zero": False},
)
def conv_integer(*, dtype: DTypeLike = np.uint8, bias: bool = True, zero: bool = True, axis: int | None = None) -> Net:
    """As onnxruntime's quantize_dynamic writes a Conv: the scales are multiplied in behind a Cast, the bias added."""
    net = Net()
    W, s, z = quantised(net.kernel(16, 3, 3, 3), dtype, axis=axis)
    weight = net.tensor(W, "weight_quantized")
    scale = net.tensor(s if axis is None else s.reshape(1, -1, 1, 1), "weight_scale")
    x, x_scale, x_zero = net.ops("DynamicQuantizeLinear", net.feed(1, 3, 8, 8), name="x_quantize", outputs=3)
    scales = net.op("Mul", x_scale, scale, name="conv_scales_mul")
    points = [x_zero, net.tensor(z, "weight_zero_point")] if zero else [x_zero]
    x = net.op("ConvInteger", x, weight, *points, name="conv_quant", pads=[1] * 4)
    x = net.op("Cast", x, name="cast", to=1)
    x = net.op("Mul", x, scales, name="output_scale_mul")
    if bias:
        shape = net.integers(1, -1, 1, 1, name="bias_shape")
        b = net.op("Reshape", net.tensor(net.vector(16), "bias"), shape, name="bias_reshape")
        x = net.op("Add", x, b, name="bias_add")
    net.tail(x, 16)
    net.expect("conv_quant", naive.bounds(dequantised(W, s, z)))
    return net


@case()
def conv_integer_bn() -> Net:
    """ConvInteger whose BN was kept."""
    net = Net()
    W, s, z = quantised(net.kernel(16, 3, 3, 3), np.uint8)
    norm = net.norm(16)
    x, x_scale, x_zero = net.ops("DynamicQuantizeLinear", net.feed(1, 3, 8, 8), name="x_quantize", outputs=3)
    scales = net.op("Mul", x_scale, net.tensor(s, "weight_scale"), name="conv_scales_mul")
    x = net.op(
        "ConvInteger",
        *(x, net.tensor(W, "weight_quantized"), x_zero, net.tensor(z, "weight_zero_point")),
        name="conv_quant",
    )
    x = net.op("Mul", net.op("Cast", x, name="cast", to=1), scales, name="output_scale_mul")
    net.tail(net.bn(x, norm), 16)
    net.expect("bn", norm.of(dequantised(W, s, z)))
    return net
