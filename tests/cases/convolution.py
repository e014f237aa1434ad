"""Convolutions: with a BatchNormalization behind them, with it folded in, transposed; heads and gates."""

import numpy as np

from tests import naive
from tests.cases.net import Attribute, Net, case

SPACE = {1: (32,), 2: (8, 8), 3: (6, 6, 6)}


# ---- Conv → BatchNormalization


@case(
    conv_bn_1d={"rank": 1},
    conv_bn_2d={"rank": 2},
    conv_bn_3d={"rank": 3},
    conv_bn_bias={"bias": True},
    conv_bn_grouped={"groups": 4},
    conv_bn_depthwise={"groups": 16, "inputs": 16},
    conv_bn_depthwise_multiplier={"groups": 8, "inputs": 8},
    conv_bn_dilated={"dilations": [2, 2], "pads": [2, 2, 2, 2]},
    conv_bn_strided={"strides": [2, 2]},
    conv_bn_epsilon={"epsilon": 1e-2},
)
def conv_bn(
    *,
    rank: int = 2,
    inputs: int = 4,
    groups: int = 1,
    bias: bool = False,
    epsilon: float = 1e-5,
    **attributes: Attribute,
) -> Net:
    net = Net()
    x = net.feed(1, inputs, *SPACE[rank])
    W = net.kernel(16, inputs // groups, *([3] * rank))
    norm = net.norm(16, epsilon)
    x = net.conv(x, W, net.vector(16) if bias else None, group=groups, **attributes)
    net.tail(net.bn(x, norm), 16)
    net.expect("bn", norm.of(W))
    return net


@case(
    conv_add_bn={"lead": 0},
    conv_add_bn_lead={"lead": 1},
    conv_add_bn_swapped={"lead": 0, "swapped": True},
)
def conv_add_bn(lead: int, *, swapped: bool = False) -> Net:
    """The bias of the Conv is an Add of a constant of shape (C, 1, 1) or (1, C, 1, 1), on either side."""
    net = Net()
    W, norm = net.kernel(16, 3, 3, 3), net.norm(16)
    x = net.conv(net.feed(1, 3, 8, 8), W)
    bias = net.tensor(net.vector(16).reshape((1,) * lead + (16, 1, 1)), "bias")
    x = net.op("Add", *((bias, x) if swapped else (x, bias)), name="bias_add")
    net.tail(net.bn(x, norm), 16)
    net.expect("bn", norm.of(W))
    return net


@case(
    conv_identity_bn={"op": "Identity"},
    conv_two_identities_bn={"op": "Identity", "times": 2},
    conv_dropout_bn={"op": "Dropout"},
    conv_dropout_bn_opset7={"op": "Dropout", "opset": 7, "ratio": 0.3},
    conv_cast_same_bn={"op": "Cast", "to": 1},
    conv_relu_bn={"op": "Relu"},
    conv_clip_bn={"op": "Clip"},
    conv_clip_bn_opset10={"op": "Clip", "opset": 10, "min": 0.0, "max": 6.0},
    conv_leaky_relu_bn={"op": "LeakyRelu", "alpha": 0.1},
    conv_max_pool_bn={"op": "MaxPool", "kernel_shape": [2, 2], "strides": [2, 2]},
    conv_average_pool_bn={"op": "AveragePool", "kernel_shape": [3, 3], "pads": [1, 1, 1, 1]},
)
def conv_between_bn(op: str, *, times: int = 1, opset: int = 17, **attributes: Attribute) -> Net:
    """Nothing between Conv and BN makes a channel louder: the bound holds."""
    net = Net(opset=opset)
    W, norm = net.kernel(16, 3, 3, 3), net.norm(16)
    x = net.conv(net.feed(1, 3, 8, 8), W)
    for i in range(times):
        x = net.op(op, x, name=f"between_{i}", **attributes)
    net.tail(net.bn(x, norm), 16)
    net.expect("bn", norm.of(W))
    return net


@case()
def conv_clip_inputs_bn() -> Net:
    """Relu6 as a Clip whose limits are inputs."""
    net = Net()
    W, norm = net.kernel(16, 3, 3, 3), net.norm(16)
    low, high = net.tensor(np.float32(0), "low"), net.tensor(np.float32(6), "high")
    x = net.op("Clip", net.conv(net.feed(1, 3, 8, 8), W), low, high, name="relu6")
    net.tail(net.bn(x, norm), 16)
    net.expect("bn", norm.of(W))
    return net


@case()
def conv_cast_to_float16_and_back_bn() -> Net:
    net = Net()
    W, norm = net.kernel(16, 3, 3, 3), net.norm(16)
    x = net.conv(net.feed(1, 3, 8, 8), W)
    x = net.op("Cast", x, name="down", to=10)
    x = net.op("Cast", x, name="up", to=1)
    net.tail(net.bn(x, norm), 16)
    net.expect("bn", norm.of(W))
    return net


@case()
def conv_float16_cast_bn_float32() -> Net:
    """The Conv computes in float16, its BN in float32."""
    net = Net()
    W, norm = net.kernel(16, 3, 3, 3).astype(np.float16), net.norm(16)
    x = net.op("Cast", net.feed(1, 3, 8, 8), name="down", to=10)
    x = net.op("Cast", net.conv(x, W), name="up", to=1)
    net.tail(net.bn(x, norm), 16)
    net.expect("bn", norm.of(W))
    return net


@case(conv_squeeze_bn={"opset": 17}, conv_squeeze_bn_opset11={"opset": 11})
def conv_squeeze_bn(opset: int) -> Net:
    """A 1-D convolution done in 2-D: Unsqueeze → Conv → Squeeze → BN."""
    net = Net(opset=opset)
    W, norm = net.kernel(16, 4, 1, 3), net.norm(16)
    x = net.with_axes("Unsqueeze", net.feed(1, 4, 32), 2, name="unsqueeze")
    x = net.with_axes("Squeeze", net.conv(x, W), 2, name="squeeze")
    net.tail(net.bn(x, norm), 16)
    net.expect("bn", norm.of(W))
    return net


@case()
def conv_unsqueeze_bn() -> Net:
    """A 1-D Conv whose BN works on (N, C, 1, L)."""
    net = Net()
    W, norm = net.kernel(16, 4, 3), net.norm(16)
    x = net.with_axes("Unsqueeze", net.conv(net.feed(1, 4, 32), W), 2, name="unsqueeze")
    net.tail(net.bn(x, norm), 16)
    net.expect("bn", norm.of(W))
    return net


@case()
def conv_bn_chain() -> Net:
    """Three layers, each with an outlier of its own: none hears of the others'."""
    net = Net()
    x, inputs = net.feed(1, 3, 8, 8), 3
    for i, (channels, outlier) in enumerate([(16, 3), (32, 30), (24, 0)]):
        W, norm = net.kernel(channels, inputs, 3, 3, outlier=outlier), net.norm(channels)
        x = net.op("Relu", net.bn(net.conv(x, W, name=f"conv_{i}"), norm, name=f"bn_{i}"), name=f"relu_{i}")
        net.expect(f"bn_{i}", norm.of(W), [outlier])
        inputs = channels
    net.tail(x, inputs)
    return net


# ---- the BN folded into the Conv


@case(
    folded={},
    folded_bias={"bias": True},
    folded_1d={"rank": 1},
    folded_3d={"rank": 3},
    folded_grouped={"groups": 4},
    folded_depthwise={"groups": 16, "inputs": 16},
)
def folded(*, rank: int = 2, inputs: int = 4, groups: int = 1, bias: bool = False) -> Net:
    net = Net()
    W = net.kernel(16, inputs // groups, *([3] * rank))
    x = net.conv(net.feed(1, inputs, *SPACE[rank]), W, net.vector(16) if bias else None, group=groups)
    net.tail(x, 16)
    net.expect("conv", naive.bounds(W))
    return net


@case(folded_add={"lead": 0}, folded_add_lead={"lead": 1})
def folded_add(lead: int) -> Net:
    """A folded Conv whose bias is an Add of a constant."""
    net = Net()
    W = net.kernel(16, 3, 3, 3)
    x = net.conv(net.feed(1, 3, 8, 8), W)
    net.tail(net.per_channel("Add", x, net.vector(16), name="bias_add", lead=lead), 16)
    net.expect("conv", naive.bounds(W))
    return net


@case()
def folded_residual() -> Net:
    """conv_1 and a skip are summed after folding: two Convs, two sites."""
    net = Net()
    W_0, W_1 = net.kernel(16, 3, 3, 3), net.kernel(16, 16, 3, 3, outlier=7)
    skip = net.op("Relu", net.conv(net.feed(1, 3, 8, 8), W_0, net.vector(16), name="conv_0"), name="relu")
    x = net.conv(skip, W_1, net.vector(16), name="conv_1")
    net.tail(net.op("Add", x, skip, name="sum"), 16)
    net.expect("conv_0", naive.bounds(W_0))
    net.expect("conv_1", naive.bounds(W_1), [7])
    return net


@case(
    fused_conv={"activation": "Relu"},
    fused_conv_leaky={"activation": "LeakyRelu", "activation_params": [0.1]},
)
def fused_conv(**attributes: Attribute) -> Net:
    """com.microsoft::FusedConv, as a graph saved by onnxruntime has it."""
    net = Net()
    W = net.kernel(16, 3, 3, 3)
    x = net.conv(
        net.feed(1, 3, 8, 8), W, net.vector(16), op="FusedConv", name="fused", domain="com.microsoft", **attributes
    )
    net.tail(x, 16)
    net.expect("fused", naive.bounds(W))
    return net


@case()
def fused_conv_sum() -> Net:
    """FusedConv with a fourth input, which is added before the activation."""
    net = Net()
    W_0, W_1 = net.kernel(16, 3, 3, 3), net.kernel(16, 16, 3, 3, outlier=7)
    x = net.conv(net.feed(1, 3, 8, 8), W_0, net.vector(16), name="conv")
    inputs = (x, net.tensor(W_1, "weight"), net.tensor(net.vector(16), "bias"), x)
    x = net.op(
        "FusedConv", *inputs, name="fused", domain="com.microsoft", activation="Relu", kernel_shape=[3, 3], pads=[1] * 4
    )
    net.tail(x, 16)
    net.expect("conv", naive.bounds(W_0))
    net.expect("fused", naive.bounds(W_1), [7])
    return net


@case()
def fused_conv_bn() -> Net:
    """FusedConv with a Relu, and a BN behind that."""
    net = Net()
    W, norm = net.kernel(16, 3, 3, 3), net.norm(16)
    x = net.conv(net.feed(1, 3, 8, 8), W, op="FusedConv", name="fused", domain="com.microsoft", activation="Relu")
    net.tail(net.bn(x, norm), 16)
    net.expect("bn", norm.of(W))
    return net


# ---- ConvTranspose


@case(
    conv_transpose_bn={"groups": 1},
    conv_transpose_bn_grouped={"groups": 2},
    conv_transpose_add_bn={"groups": 1, "add": True},
    conv_transpose_add_bn_grouped={"groups": 2, "add": True},
    conv_transpose_folded={"groups": 1, "normalise": False},
    conv_transpose_folded_grouped={"groups": 2, "normalise": False},
    conv_transpose_folded_add={"groups": 1, "add": True, "normalise": False},
    conv_transpose_bn_depthwise={"groups": 16},
)
def conv_transpose(groups: int, *, add: bool = False, normalise: bool = True) -> Net:
    net = Net()
    inputs, outlier = 16, 13  # of group 1 where there are two
    W = net.kernel(inputs, 16 // groups, 4, 4, outlier=None)  # (C_in, C_out/groups, *kernel)
    group, within = divmod(outlier, 16 // groups)
    W[group * inputs // groups : (group + 1) * inputs // groups, within] *= 8
    x = net.conv(
        net.feed(1, inputs, 4, 4), W, op="ConvTranspose", name="up", group=groups, strides=[2, 2], pads=[1, 1, 1, 1]
    )
    if add:
        x = net.per_channel("Add", x, net.vector(16), name="bias_add")
    kernel = naive.conv_transpose_kernel(W, groups)
    if normalise:
        norm = net.norm(16)
        x = net.bn(x, norm)
        net.expect("bn", norm.of(kernel), [outlier])
    else:
        net.expect("up", naive.bounds(kernel), [outlier])
    net.tail(x, 16)
    return net


# ---- heads


def trunk(*, channels: int = 16, opset: int = 17) -> tuple[Net, str]:
    """A folded Conv and its Relu, before what the case is about."""
    net = Net(opset=opset)
    W = net.kernel(channels, 3, 3, 3)
    x = net.conv(net.feed(1, 3, 8, 8), W, net.vector(channels), name="trunk")
    net.expect("trunk", naive.bounds(W))
    return net, net.op("Relu", x, name="trunk_relu")


def head(net: Net, x: str, *, channels: int = 16) -> str:
    """A 1×1 Conv with an outlier that must not be silenced."""
    net.expect_skipped("head", "head")
    return net.conv(x, net.kernel(channels, 16, 1, 1), net.vector(channels), name="head")


@case()
def head_output() -> Net:
    net, x = trunk()
    net.give(head(net, x))
    return net


@case(
    head_sigmoid={"op": "Sigmoid"},
    head_tanh={"op": "Tanh"},
    head_identity={"op": "Identity"},
    head_softmax={"op": "Softmax", "axis": 1},
)
def head_activation(op: str, **attributes: Attribute) -> Net:
    net, x = trunk()
    net.give(net.op(op, head(net, x), name="activation", **attributes))
    return net


@case()
def head_reshape_softmax() -> Net:
    """Class scores of anchors: Conv → Reshape → Transpose → Softmax."""
    net, x = trunk()
    x = net.op("Reshape", head(net, x), net.integers(1, 16, -1, name="shape"), name="reshape")
    x = net.op("Transpose", x, name="transpose", perm=[0, 2, 1])
    net.give(net.op("Softmax", x, name="softmax", axis=-1), rank=3)
    return net


@case()
def head_scaled_resized() -> Net:
    """A map of depths: Conv → Mul → Add → Resize."""
    net, x = trunk()
    x = net.op("Mul", head(net, x), net.tensor(np.float32(0.5), "scale"), name="mul")
    x = net.op("Add", x, net.tensor(np.float32(1.0), "shift"), name="add")
    scales = net.tensor(np.array([1, 1, 2, 2], dtype=np.float32), "scales")
    net.give(net.op("Resize", x, "", scales, name="resize", mode="nearest"))
    return net


@case()
def head_bias_add() -> Net:
    """A head whose bias is an Add of a constant."""
    net, x = trunk()
    x = net.conv(x, net.kernel(16, 16, 1, 1), name="head")
    net.expect_skipped("head", "head")
    net.give(net.per_channel("Add", x, net.vector(16), name="bias_add"))
    return net


@case()
def head_boxes() -> Net:
    """As YOLO decodes boxes: Conv → Split, each part scaled by itself → Concat."""
    net, x = trunk(channels=16)
    x = head(net, x, channels=18)
    parts = net.ops("Split", x, net.integers(2, 2, 14, name="sizes"), name="split", outputs=3, axis=1)
    centre = net.op("Sigmoid", parts[0], name="centre_sigmoid")
    centre = net.op("Mul", centre, net.tensor(np.float32(8), "stride"), name="centre_scale")
    size = net.op("Mul", parts[1], net.tensor(np.float32(2), "anchor"), name="size_scale")
    classes = net.op("Sigmoid", parts[2], name="class_sigmoid")
    net.give(net.op("Concat", centre, size, classes, name="concat", axis=1))
    return net


@case()
def head_boxes_sliced() -> Net:
    """Two heads, flattened and concatenated, then sliced."""
    net, x = trunk()
    flat = []
    for name in ("boxes", "scores"):
        y = net.conv(x, net.kernel(16, 16, 1, 1), net.vector(16), name=name)
        flat.append(net.op("Reshape", y, net.integers(1, 16, -1, name=f"{name}.shape"), name=f"{name}_reshape"))
        net.expect_skipped("head", name)
    x = net.op("Concat", *flat, name="concat", axis=2)
    starts, ends, axes = (net.integers(i, name=n) for i, n in ((0, "starts"), (4, "ends"), (1, "axes")))
    net.give(net.op("Slice", x, starts, ends, axes, name="slice"), rank=3)
    return net


def clipped(net: Net, x: str, low: float, high: float) -> str:
    """A Clip: its limits are attributes up to opset 10, inputs from then on."""
    if net.opset < 11:
        return net.op("Clip", x, name="clip", min=low, max=high)
    limits = (net.tensor(np.float32(value), name) for value, name in ((low, "low"), (high, "high")))
    return net.op("Clip", x, *limits, name="clip")


@case(head_clip={}, head_clip_opset10={"opset": 10}, head_pixels={"limit": 255.0}, head_pixels_up={"up": True})
def head_image(*, limit: float = 1.0, opset: int = 17, up: bool = False) -> Net:
    """An image: Conv → DepthToSpace → Mul → Clip to 0 … 1 or 0 … 255."""
    net, x = trunk(opset=opset)
    x = head(net, x)
    if up:
        x, limit = net.op("DepthToSpace", x, name="up", blocksize=2), 255.0
    if limit > 1:
        x = net.op("Mul", x, net.tensor(np.float32(limit), "scale"), name="mul")
    net.give(clipped(net, x, 0.0, limit))
    return net


@case(relu6_output_is_no_head={"opset": 17}, relu6_output_is_no_head_opset10={"opset": 10})
def relu6_output(opset: int) -> Net:
    """A feature extractor that ends in a ReLU6."""
    net, x = trunk(opset=opset)
    W = net.kernel(16, 16, 3, 3, outlier=7)
    net.give(clipped(net, net.conv(x, W, net.vector(16)), 0.0, 6.0))
    net.expect("conv", naive.bounds(W), [7])
    return net


@case()
def head_regions() -> Net:
    """Boxes are an output, and say where RoiAlign looks at features that a Gemm then classifies."""
    net, x = trunk()
    boxes = net.op("Transpose", head(net, x), name="channels_last", perm=[0, 2, 3, 1])
    boxes = net.op("Reshape", boxes, net.integers(-1, 4, name="shape"), name="boxes")
    boxes = net.op("Mul", net.op("Sigmoid", boxes, name="sigmoid"), net.tensor(np.float32(8), "size"), name="scaled")
    net.give(boxes, rank=2)
    batch = net.tensor(np.zeros(256, np.int64), "batch")  # 8 · 8 positions of 16 / 4 boxes
    form: dict[str, Attribute] = {
        "output_height": 2,
        "output_width": 2,
        "coordinate_transformation_mode": "output_half_pixel",
    }
    regions = net.op("RoiAlign", x, boxes, batch, name="regions", **form)
    net.tail(regions, 16)
    return net


@case(gate_of_six_steps_is_no_head={"steps": 6}, gate_of_seven_steps_is_a_head={"steps": 7})
def long_gate(steps: int) -> Net:
    """An activation x · g(x), g of as many elementwise steps as an activation spelled out may have, and of one more."""
    net, x = trunk()
    W = net.kernel(16, 16, 1, 1, outlier=7)
    x = gate = net.conv(x, W, net.vector(16), name="last")
    for i in range(steps):
        gate = net.op("Tanh", gate, name=f"gate_{i}")
    net.give(net.op("Mul", x, gate, name="mul"))
    if steps > 6:
        net.expect_skipped("head", "last")
    else:
        net.expect("last", naive.bounds(W), [7])
    return net


@case()
def relu_output_is_no_head() -> Net:
    """A feature extractor: Conv → Relu → output."""
    net = Net()
    W = net.kernel(16, 3, 3, 3)
    net.give(net.op("Relu", net.conv(net.feed(1, 3, 8, 8), W, net.vector(16)), name="relu"))
    net.expect("conv", naive.bounds(W))
    return net


@case()
def bn_output_is_no_head() -> Net:
    """A BN stands before the output: its channels are silenced there."""
    net = Net()
    W, norm = net.kernel(16, 3, 3, 3), net.norm(16)
    net.give(net.bn(net.conv(net.feed(1, 3, 8, 8), W), norm))
    net.expect("bn", norm.of(W))
    return net


@case()
def output_and_trained_operator_is_no_head() -> Net:
    """The Conv's output is shown to the caller, and goes on to a trained operator as well."""
    net, x = trunk()
    W = net.kernel(16, 16, 3, 3, outlier=7)
    x = net.conv(x, W, net.vector(16))
    net.give(x)
    net.tail(x, 16)
    net.expect("conv", naive.bounds(W), [7])
    return net


# ---- gates


@case(
    gate={"pool": "GlobalAveragePool"},
    gate_reduce_mean={"pool": "ReduceMean"},
    gate_reduce_mean_opset18={"pool": "ReduceMean", "opset": 18},
    gate_reduce_mean_negative_axes={"pool": "ReduceMean", "axes": (-2, -1)},
    gate_channels_last={"pool": "ReduceMean", "axes": (1, 2), "channels_last": True},
    gate_max_pool={"pool": "GlobalMaxPool"},
    gate_hard_sigmoid={"pool": "GlobalAveragePool", "squash": "HardSigmoid"},
    gate_after_bn={"pool": "GlobalAveragePool", "normalise": True},
)
def gate(
    pool: str,
    *,
    opset: int = 17,
    axes: tuple[int, int] = (2, 3),
    squash: str = "Sigmoid",
    normalise: bool = False,
    channels_last: bool = False,
) -> Net:
    """Squeeze and excitation: pool → Conv → Relu → Conv → Sigmoid, multiplied with what was pooled."""
    net = Net(opset=opset)
    W = net.kernel(16, 3, 3, 3)
    x = net.conv(net.feed(1, 3, 8, 8), W, net.vector(16))
    if normalise:
        norm = net.norm(16)
        x = net.bn(x, norm)
        net.expect("bn", norm.of(W))
    else:
        net.expect("conv", naive.bounds(W))
    x = net.op("Relu", x, name="relu")
    if pool == "ReduceMean":
        g = net.op("Transpose", x, name="to_last", perm=[0, 2, 3, 1]) if channels_last else x
        g = net.with_axes("ReduceMean", g, *axes, name="squeeze", since=18, keepdims=1)
        g = net.op("Transpose", g, name="to_first", perm=[0, 3, 1, 2]) if channels_last else g
    else:
        g = net.op(pool, x, name="squeeze")
    g = net.op("Relu", net.conv(g, net.kernel(16, 16, 1, 1), net.vector(16), name="reduce"), name="gate_relu")
    g = net.op(squash, net.conv(g, net.kernel(16, 16, 1, 1), net.vector(16), name="expand"), name="gate_squash")
    net.tail(net.op("Mul", x, g, name="excite"), 16)
    net.expect_skipped("gate", "reduce", "expand")
    return net
