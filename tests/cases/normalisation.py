"""BatchNormalizations that are not simply behind a Conv: on Gemm, on sums, concatenations and parts, or spelled out."""

import numpy as np
from onnx import TensorProto, helper

from tests import naive
from tests.cases.net import Bounds, Net, Norm, case

# ---- behind Gemm and MatMul


@case(
    gemm_bn={"trans": 0},
    gemm_bn_transposed={"trans": 1},
    gemm_bn_alpha={"trans": 1, "alpha": 0.25},
    gemm_bn_alpha_beta={"trans": 0, "alpha": 2.0, "beta": 0.5},
    gemm_relu_bn={"trans": 1, "relu": True},
)
def gemm_bn(trans: int, *, alpha: float = 1.0, beta: float = 1.0, relu: bool = False) -> Net:
    net = Net()
    W, norm = net.kernel(16, 12), net.norm(16)
    weight = net.tensor(W if trans else W.T, "weight")
    bias = net.tensor(net.vector(16), "bias")
    x = net.op("Gemm", net.feed(2, 12), weight, bias, name="gemm", transB=trans, alpha=alpha, beta=beta)
    if relu:
        x = net.op("Relu", x, name="relu")
    net.tail(net.bn(x, norm), 16, pooled=True)
    net.expect("bn", norm.of(np.float64(alpha) * W))
    return net


@case(matmul_bn={}, matmul_add_bn={"add": True}, matmul_add_mul_add={"add": True, "spelled": True})
def matmul_bn(*, add: bool = False, spelled: bool = False) -> Net:
    net = Net()
    W, norm = net.kernel(16, 12), net.norm(16)
    x = net.op("MatMul", net.feed(2, 12), net.tensor(W.T, "weight"), name="matmul")
    if add:
        x = net.op("Add", x, net.tensor(net.vector(16), "bias"), name="bias_add")
    if spelled:
        factor = net.rng.uniform(0.8, 1.2, 16).astype(np.float32)
        x = net.op("Mul", x, net.tensor(factor, "factor"), name="mul")
        x = net.op("Add", x, net.tensor(net.vector(16), "shift"), name="add")
        net.expect("mul", naive.scaled(naive.bounds(W), factor))
    else:
        x = net.bn(x, norm)
        net.expect("bn", norm.of(W))
    net.tail(x, 16, pooled=True)
    return net


@case()
def gemm_alone_is_no_site() -> Net:
    """No BN follows the Gemm: neither a site nor skipped."""
    net = Net()
    W = net.kernel(16, 3, 3, 3)
    x = net.op("Relu", net.conv(net.feed(1, 3, 8, 8), W, net.vector(16)), name="relu")
    x = net.op("Flatten", net.op("GlobalAveragePool", x, name="pool"), name="flatten")
    x = net.op("Gemm", x, net.tensor(net.kernel(16, 16), "w"), net.tensor(net.vector(16), "b"), name="gemm")
    net.tail(x, 16, pooled=True)
    net.expect("conv", naive.bounds(W))
    return net


# ---- a BN spelled as other operators


@case(
    mul_add={},
    mul_add_lead={"lead": 1},
    mul_add_bias={"bias": True},
    mul_add_relu_between={"relu": True},
)
def mul_add(*, lead: int = 0, bias: bool = False, relu: bool = False) -> Net:
    """Conv → Mul → Add of constants (C, 1, 1)."""
    net = Net()
    W, factor = net.kernel(16, 3, 3, 3), net.norm(16).gamma
    x = net.conv(net.feed(1, 3, 8, 8), W, net.vector(16) if bias else None)
    if relu:
        x = net.op("Relu", x, name="relu")
    x = net.per_channel("Mul", x, factor, name="mul", lead=lead)
    net.tail(net.per_channel("Add", x, net.vector(16), name="add", lead=lead), 16)
    net.expect("mul", naive.scaled(naive.bounds(W), factor))
    return net


def spelled_out(net: Net, x: str, norm: Norm, prefix: str = "") -> str:
    """(x − mean) / √(var + ε) · γ + β, one operator each."""
    deviation = np.sqrt(norm.variance + np.float32(norm.epsilon))
    x = net.per_channel("Sub", x, norm.mean, name=f"{prefix}sub", lead=1)
    x = net.per_channel("Div", x, deviation, name=f"{prefix}div", lead=1)
    x = net.per_channel("Mul", x, norm.gamma, name=f"{prefix}mul", lead=1)
    return net.per_channel("Add", x, norm.beta, name=f"{prefix}add", lead=1)


@case()
def sub_div_mul_add() -> Net:
    net = Net()
    W, norm = net.kernel(16, 3, 3, 3), net.norm(16)
    x = net.conv(net.feed(1, 3, 8, 8), W, net.vector(16))
    net.tail(spelled_out(net, x, norm), 16)
    net.expect("mul", norm.of(W))
    return net


@case(sum_mul_add={"operators": ("Mul", "Add")}, sum_sub_div_mul_add={"operators": ("Sub", "Div", "Mul", "Add")})
def spelled_sum(operators: tuple[str, ...]) -> Net:
    """The sum of two Convs, normalised by constants."""
    net = Net()
    W_0, W_1, norm = net.kernel(16, 3, 3, 3), net.kernel(16, 3, 3, 3), net.norm(16)
    x = net.feed(1, 3, 8, 8)
    x = net.op("Add", net.conv(x, W_0, name="conv_0"), net.conv(x, W_1, name="conv_1"), name="sum")
    both = naive.summed(naive.bounds(W_0), naive.bounds(W_1))
    if "Div" in operators:
        x = spelled_out(net, x, norm)
        net.expect("mul", norm.after(both))
    else:
        x = net.per_channel("Mul", x, norm.gamma, name="mul")
        x = net.per_channel("Add", x, norm.beta, name="add")
        net.expect("mul", naive.scaled(both, norm.gamma))
    net.tail(x, 16)
    return net


@case()
def bn_mul_add() -> Net:
    """As Caffe has it: a BN without γ and β of its own, and a Scale behind it."""
    net = Net()
    W, norm, factor = net.kernel(16, 3, 3, 3), net.norm(16), net.norm(16).gamma
    x = net.per_channel("Mul", net.bn(net.conv(net.feed(1, 3, 8, 8), W), norm), factor, name="mul")
    net.tail(net.per_channel("Add", x, net.vector(16), name="add"), 16)
    net.expect("mul", naive.scaled(norm.of(W), factor))
    return net


@case()
def bn_bn() -> Net:
    """Two BNs in a row: the last one judges both."""
    net = Net()
    W, norm_0, norm_1 = net.kernel(16, 3, 3, 3), net.norm(16), net.norm(16)
    x = net.bn(net.conv(net.feed(1, 3, 8, 8), W), norm_0, name="bn_0")
    net.tail(net.bn(x, norm_1, name="bn_1"), 16)
    net.expect("bn_1", norm_1.after(norm_0.of(W)))
    return net


@case()
def decoy_bn() -> Net:
    """A BN beside the main way, whose γ hides the outlier: what the Conv sends past it is judged, too."""
    net = Net()
    W, W_1, norm = net.kernel(16, 3, 3, 3), net.kernel(16, 16, 3, 3, outlier=7), net.norm(16)
    norm.gamma[5] = 1e-3
    x = net.conv(net.feed(1, 3, 8, 8), W, net.vector(16))
    decoy = net.bn(x, norm)
    y = net.conv(net.op("Relu", x, name="relu"), W_1, net.vector(16), name="conv_1")
    net.tail(net.op("Add", y, decoy, name="sum"), 16)
    net.expect("conv", naive.bounds(W))
    net.expect("conv_1", naive.bounds(W_1), [7])
    net.expect("bn", norm.of(W), [])
    return net


@case()
def scalar_mul_add_per_channel() -> Net:
    """A scale for all channels, a shift for each: the Conv is the site, and the shift is silenced with it."""
    net = Net()
    W = net.kernel(16, 3, 3, 3)
    x = net.conv(net.feed(1, 3, 8, 8), W)
    x = net.op("Mul", x, net.tensor(np.float32(0.5), "scale"), name="mul")
    net.tail(net.per_channel("Add", x, net.vector(16), name="add"), 16)
    net.expect("conv", naive.bounds(W))
    return net


@case()
def layer_scale_is_no_site() -> Net:
    """MatMul → Mul of a constant per channel and nothing added, as networks without BN have it."""
    net = Net()
    W = net.kernel(16, 3, 3, 3)
    x = net.op("Relu", net.conv(net.feed(1, 3, 8, 8), W, net.vector(16)), name="relu")
    x = net.op("Flatten", net.op("GlobalAveragePool", x, name="pool"), name="flatten")
    x = net.op("MatMul", x, net.tensor(net.kernel(16, 16).T, "w"), name="matmul")
    net.tail(net.op("Mul", x, net.tensor(net.norm(16).gamma, "factor"), name="mul"), 16, pooled=True)
    net.expect("conv", naive.bounds(W))
    return net


@case()
def scalar_mul_is_no_bn() -> Net:
    """A scale and a shift that are the same for all channels normalise nothing: the Conv is the site."""
    net = Net()
    W = net.kernel(16, 3, 3, 3)
    x = net.conv(net.feed(1, 3, 8, 8), W, net.vector(16))
    x = net.op("Mul", x, net.tensor(np.float32(0.5), "scale"), name="mul")
    net.tail(net.op("Add", x, net.tensor(np.float32(0.1), "shift"), name="add"), 16)
    net.expect("conv", naive.bounds(W))
    return net


# ---- sums: pre-activation residual networks


@case()
def sum_of_two_ranks() -> Net:
    """(1, C) of a Gemm lies along the last axis of (1, C, H, W) of a Conv, though both have C on axis 1."""
    net = Net()
    W, norm = net.kernel(16, 3, 3, 3), net.norm(16)
    y = net.op("Gemm", net.feed(1, 12, name="y"), net.tensor(net.kernel(12, 16, outlier=None), "w"), name="gemm")
    x = net.conv(net.feed(1, 3, 8, 16), W, net.vector(16))
    net.tail(net.bn(net.op("Add", x, y, name="sum"), norm), 16)
    net.expect("conv", naive.bounds(W))
    net.expect_skipped("untraced", "bn")
    return net


@case()
def reshape_of_the_batch() -> Net:
    """(2, C, H, W) reshaped to (1, C, 2·H·W): the batch is mixed into the channels."""
    net = Net()
    W, norm = net.kernel(16, 3, 3, 3), net.norm(16)
    x = net.conv(net.feed(2, 3, 8, 8), W, net.vector(16))
    net.outputs.append(helper.make_tensor_value_info(x, TensorProto.FLOAT, [2, 16, 8, 8]))
    x = net.op("Reshape", x, net.integers(1, 16, -1, name="shape"), name="reshape")
    net.tail(net.bn(x, norm), 16)
    net.expect("conv", naive.bounds(W))
    net.expect_skipped("untraced", "bn")
    return net


@case()
def unsqueeze_of_an_axis_from_the_end() -> Net:
    """A MatMul of a value of unknown rank has its channels on the last axis, which is not counted on behind it."""
    net = Net()
    x = net.feed(1, 8, 12)
    size = net.op("Shape", net.feed(1, 8, 12, name="like"), name="shape")
    x = net.op(
        "Reshape", x, net.op("Compress", size, net.tensor(np.ones(3, np.bool_), "all"), name="size"), name="unknown"
    )
    x = net.op("MatMul", x, net.tensor(net.kernel(16, 12).T, "w"), name="matmul")
    net.give(x, rank=3)
    x = net.with_axes("Unsqueeze", x, 2, name="unsqueeze")
    x = net.op("Transpose", x, name="transpose", perm=[0, 3, 1, 2])
    net.tail(net.bn(x, net.norm(16)), 16)
    net.expect_skipped("untraced", "bn")
    return net


PRE_ACTIVATION = 5
"""The channel that stands out in every sum of the pre-activation networks."""


def block(net: Net, x: str, before: Bounds, name: str, outlier: int) -> tuple[str, Bounds]:
    """BN → Relu → Conv → BN → Relu → Conv, added to x; the sum and its bounds before any BN."""
    channels = len(before)
    norm_1, norm_2 = net.norm(channels), net.norm(channels)
    W_1 = net.kernel(channels, channels, 3, 3, outlier=outlier)
    W_2 = net.kernel(channels, channels, 3, 3, outlier=PRE_ACTIVATION, factor=16)
    y = net.op("Relu", net.bn(x, norm_1, name=f"{name}_bn1"), name=f"{name}_relu1")
    net.expect(f"{name}_bn1", norm_1.after(before), [PRE_ACTIVATION])
    y = net.op("Relu", net.bn(net.conv(y, W_1, name=f"{name}_conv1"), norm_2, name=f"{name}_bn2"), name=f"{name}_relu2")
    net.expect(f"{name}_bn2", norm_2.of(W_1), [outlier])
    y = net.conv(y, W_2, name=f"{name}_conv2")
    return net.op("Add", y, x, name=f"{name}_sum"), naive.summed(before, naive.bounds(W_2))


@case()
def sum_bn() -> Net:
    """BN on the sum of two Convs."""
    net = Net()
    W_0, W_1, norm = net.kernel(16, 3, 3, 3), net.kernel(16, 3, 3, 3, outlier=None), net.norm(16)
    x = net.feed(1, 3, 8, 8)
    x = net.op("Add", net.conv(x, W_0, name="conv_0"), net.conv(x, W_1, name="conv_1"), name="sum")
    net.tail(net.bn(x, norm), 16)
    net.expect("bn", norm.after(naive.summed(naive.bounds(W_0), naive.bounds(W_1))))
    return net


@case(sum_operator_bn={"bias": False}, sum_bias_bn={"bias": True})
def sum_of_three_bn(*, bias: bool) -> Net:
    """BN on a Sum of three Convs, one of which has its bias as an Add of a constant."""
    net = Net()
    x = net.feed(1, 3, 8, 8)
    kernels = [net.kernel(16, 3, 3, 3, outlier=outlier) for outlier in (None, 5, None)]
    terms = [net.conv(x, W, name=f"conv_{i}") for i, W in enumerate(kernels)]
    if bias:
        terms[0] = net.per_channel("Add", terms[0], net.vector(16), name="bias_add")
    norm = net.norm(16)
    net.tail(net.bn(net.op("Sum", *terms, name="sum"), norm), 16)
    net.expect("bn", norm.after(naive.summed(*map(naive.bounds, kernels))))
    return net


@case()
def pre_activation() -> Net:
    """Two stages of two blocks; the second begins with a shortcut Conv, its first block's BN feeds both branches."""
    net = Net()
    W_0 = net.kernel(16, 3, 3, 3, outlier=PRE_ACTIVATION)
    x, before = net.conv(net.feed(1, 3, 8, 8), W_0, name="stem"), naive.bounds(W_0)
    x, before = block(net, x, before, "s1b1", outlier=2)
    x, before = block(net, x, before, "s1b2", outlier=3)
    norm_1, norm_2 = net.norm(16), net.norm(24)
    W_s = net.kernel(24, 16, 1, 1, outlier=None)
    W_1, W_2 = net.kernel(24, 16, 3, 3, outlier=9), net.kernel(24, 24, 3, 3, outlier=PRE_ACTIVATION, factor=16)
    y = net.op("Relu", net.bn(x, norm_1, name="s2b1_bn1"), name="s2b1_relu1")
    net.expect("s2b1_bn1", norm_1.after(before), [PRE_ACTIVATION])
    shortcut = net.conv(y, W_s, name="s2b1_shortcut", strides=[2, 2])
    y = net.conv(y, W_1, name="s2b1_conv1", strides=[2, 2])
    y = net.op("Relu", net.bn(y, norm_2, name="s2b1_bn2"), name="s2b1_relu2")
    net.expect("s2b1_bn2", norm_2.of(W_1), [9])
    x = net.op("Add", net.conv(y, W_2, name="s2b1_conv2"), shortcut, name="s2b1_sum")
    x, before = block(net, x, naive.summed(naive.bounds(W_2), naive.bounds(W_s)), "s2b2", outlier=11)
    norm = net.norm(24)
    net.tail(net.bn(x, norm, name="bn"), 24)
    net.expect("bn", norm.after(before), [PRE_ACTIVATION])
    return net


@case()
def sum_without_last_bn() -> Net:
    """No BN stands behind the last sum: its Conv is a site of its own, the stem is judged at the BN of the branch."""
    net = Net()
    W_0, W_1, norm = net.kernel(16, 3, 3, 3), net.kernel(16, 16, 3, 3, outlier=7), net.norm(16)
    stem = net.conv(net.feed(1, 3, 8, 8), W_0, name="stem")
    x = net.conv(net.op("Relu", net.bn(stem, norm), name="relu"), W_1)
    net.tail(net.op("Add", x, stem, name="sum"), 16)
    net.expect("bn", norm.of(W_0))
    net.expect("conv", naive.bounds(W_1), [7])
    return net


@case()
def sum_through_bn() -> Net:
    """The shortcut has a BN of its own; the sum of both is normalised again, back through that BN."""
    net = Net()
    W_0, W_1 = net.kernel(16, 3, 3, 3), net.kernel(16, 3, 3, 3, outlier=None)
    norm_1, norm = net.norm(16), net.norm(16)
    x = net.feed(1, 3, 8, 8)
    shortcut = net.bn(net.conv(x, W_1, name="conv_1"), norm_1, name="bn_1")
    x = net.op("Add", net.conv(x, W_0, name="conv_0"), shortcut, name="sum")
    net.tail(net.bn(x, norm), 16)
    net.expect("bn_1", norm_1.of(W_1), [])
    net.expect("bn", norm.after(naive.summed(naive.bounds(W_0), norm_1.of(W_1))))
    return net


# ---- concatenations


@case()
def concat_bn() -> Net:
    """BN on two Convs side by side: each channel its own."""
    net = Net()
    W_0, W_1, norm = net.kernel(12, 3, 3, 3), net.kernel(12, 3, 5, 5, outlier=None), net.norm(24)
    x = net.feed(1, 3, 8, 8)
    x = net.op("Concat", net.conv(x, W_0, name="conv_0"), net.conv(x, W_1, name="conv_1"), name="concat", axis=1)
    net.tail(net.bn(x, norm), 24)
    net.expect("bn", norm.after(naive.concatenated(naive.bounds(W_0), naive.bounds(W_1))))
    return net


@case(densenet={"pool": "MaxPool"}, densenet_average_pool={"pool": "AveragePool"})
def densenet(pool: str) -> Net:
    """A stem with BN, Relu and pooling, then two dense layers that each read all that came before."""
    net = Net()
    W_0, norm_0 = net.kernel(16, 3, 3, 3), net.norm(16)
    x = net.bn(net.conv(net.feed(1, 3, 8, 8), W_0, name="stem"), norm_0, name="stem_bn")
    net.expect("stem_bn", norm_0.of(W_0))
    x = net.op("Relu", x, name="stem_relu")
    x = net.op(pool, x, name="stem_pool", kernel_shape=[2, 2], strides=[2, 2])
    features, bounds = [x], norm_0.of(W_0)
    for i in (1, 2):
        channels = len(bounds)
        norm_1, norm_2 = net.norm(channels), net.norm(16)
        W_1, W_2 = net.kernel(16, channels, 1, 1, outlier=i), net.kernel(8, 16, 3, 3, outlier=None)
        x = net.op("Concat", *features, name=f"concat_{i}", axis=1) if i > 1 else features[0]
        x = net.op("Relu", net.bn(x, norm_1, name=f"bn_{i}a"), name=f"relu_{i}a")
        net.expect(f"bn_{i}a", norm_1.after(bounds))
        x = net.bn(net.conv(x, W_1, name=f"conv_{i}a"), norm_2, name=f"bn_{i}b")
        net.expect(f"bn_{i}b", norm_2.of(W_1), [i])
        features.append(net.conv(net.op("Relu", x, name=f"relu_{i}b"), W_2, name=f"conv_{i}b"))
        bounds = naive.concatenated(bounds, naive.bounds(W_2))
    norm = net.norm(len(bounds))
    net.tail(net.bn(net.op("Concat", *features, name="concat", axis=1), norm), len(bounds))
    net.expect("bn", norm.after(bounds))
    return net


# ---- parts and shuffles


@case(
    split_bn={"opset": 17, "op": "Split"},
    split_bn_opset11={"opset": 11, "op": "Split"},
    split_even_bn={"opset": 17, "op": "Split", "even": True},
    slice_bn={"opset": 17, "op": "Slice"},
    slice_bn_opset9={"opset": 9, "op": "Slice"},
    slice_bn_negative={"opset": 17, "op": "Slice", "negative": True},
)
def parts_bn(opset: int, op: str, *, even: bool = False, negative: bool = False) -> Net:
    """One Conv, cut in two along its channels, each part with a BN of its own."""
    net = Net(opset=opset)
    first, second = (16, 16) if even else (18, 14)
    W = net.kernel(32, 3, 3, 3)
    W[21] *= 8
    x = net.conv(net.feed(1, 3, 8, 8), W)
    if op == "Split":
        parts = cut_by_split(net, x, [] if even else [first, second])
    else:
        last = (-14, 2**62) if negative else (first, 32)
        axis = -3 if negative else 1
        parts = [cut_by_slice(net, x, "slice_0", (0, first), axis), cut_by_slice(net, x, "slice_1", last, axis)]
    for i, (part, kernel, outlier) in enumerate([(parts[0], W[:first], 5), (parts[1], W[first:], 21 - first)]):
        norm = net.norm(len(kernel))
        net.tail(net.bn(part, norm, name=f"bn_{i}"), len(kernel), name=f"tail_{i}")
        net.expect(f"bn_{i}", norm.of(kernel), [outlier])
    return net


def cut_by_split(net: Net, x: str, sizes: list[int]) -> list[str]:
    """Split in two, in parts of these sizes, or evenly where there are none."""
    if net.opset < 13:
        return net.ops("Split", x, name="split", outputs=2, axis=1, split=sizes)
    given = [net.integers(*sizes, name="sizes")] if sizes else []
    return net.ops("Split", x, *given, name="split", outputs=2, axis=1)


def cut_by_slice(net: Net, x: str, name: str, span: tuple[int, int], axis: int) -> str:
    """Slice from start to end along an axis."""
    start, end = span
    if net.opset < 10:
        return net.op("Slice", x, name=name, starts=[start], ends=[end], axes=[axis])
    where = {"starts": start, "ends": end, "axes": axis}
    return net.op("Slice", x, *(net.integers(i, name=f"{name}.{n}") for n, i in where.items()), name=name)


@case()
def slice_step_bn() -> Net:
    """Even channels to one BN, odd ones to another."""
    net = Net()
    W = net.kernel(32, 3, 3, 3, outlier=10)
    W[21] *= 8
    x = net.conv(net.feed(1, 3, 8, 8), W)
    for i in (0, 1):
        where = {"starts": i, "ends": 32, "axes": 1, "steps": 2}
        y = net.op("Slice", x, *(net.integers(v, name=f"slice_{i}.{n}") for n, v in where.items()), name=f"slice_{i}")
        norm = net.norm(16)
        net.tail(net.bn(y, norm, name=f"bn_{i}"), 16, name=f"tail_{i}")
        net.expect(f"bn_{i}", norm.of(W[i::2]), [(10, 21)[i] // 2])
    return net


def shuffle(net: Net, x: str, groups: int, batch: int = 1) -> str:
    """Of (batch, 32, 8, 8), channel j of group g becomes channel g of group j: Reshape → Transpose → Reshape."""
    split = net.integers(batch, groups, 32 // groups, 8, 8, name="split_shape")
    x = net.op("Reshape", x, split, name="shuffle_split")
    x = net.op("Transpose", x, name="shuffle", perm=[0, 2, 1, 3, 4])
    return net.op("Reshape", x, net.integers(batch, 32, 8, 8, name="join_shape"), name="shuffle_join")


def shuffled(bounds: Bounds, groups: int) -> tuple[Bounds, list[int]]:
    """The bounds after a channel shuffle, and where each came from."""
    per = len(bounds) // groups
    order = [g * per + j for j in range(per) for g in range(groups)]
    return np.array([bounds[k] for k in order]), order


@case(shuffle_bn={"groups": 4}, shuffle_bn_two={"groups": 2}, shuffle_bn_any_batch={"groups": 4, "batch": -1})
def shuffle_bn(groups: int, *, batch: int = 1) -> Net:
    net = Net()
    W, norm = net.kernel(32, 3, 3, 3, outlier=13), net.norm(32)
    x = net.conv(net.feed(1, 3, 8, 8), W)
    net.tail(net.bn(shuffle(net, x, groups, batch), norm), 32)
    bounds, order = shuffled(naive.bounds(W), groups)
    net.expect("bn", norm.after(bounds), [order.index(13)])
    return net


@case()
def concat_shuffle_split_bn() -> Net:
    """ShuffleNet's way: two Convs concatenated, shuffled, and cut in two, with a BN on each half."""
    net = Net()
    W_0, W_1 = net.kernel(16, 3, 3, 3, outlier=2), net.kernel(16, 3, 3, 3, outlier=9)
    x = net.feed(1, 3, 8, 8)
    x = net.op("Concat", net.conv(x, W_0, name="conv_0"), net.conv(x, W_1, name="conv_1"), name="concat", axis=1)
    parts = cut_by_split(net, shuffle(net, x, 2), [16, 16])
    bounds, order = shuffled(naive.concatenated(naive.bounds(W_0), naive.bounds(W_1)), 2)
    for i, channel in enumerate([2, 16 + 9]):
        norm = net.norm(16)
        net.tail(net.bn(parts[i], norm, name=f"bn_{i}"), 16, name=f"tail_{i}")
        net.expect(f"bn_{i}", norm.after(bounds[16 * i : 16 * (i + 1)]), [order.index(channel) - 16 * i])
    return net


# ---- what cannot be traced


@case()
def swish_bn() -> Net:
    """Swish, x · sigmoid(x), is not traced: the BN behind it is skipped, the Conv judged as folded."""
    net = Net()
    W = net.kernel(16, 3, 3, 3)
    x = net.conv(net.feed(1, 3, 8, 8), W, net.vector(16))
    x = net.op("Mul", x, net.op("Sigmoid", x, name="sigmoid"), name="mul")
    net.tail(net.bn(x, net.norm(16)), 16)
    net.expect("conv", naive.bounds(W))
    net.expect_skipped("untraced", "bn")
    return net


@case(input_bn={}, input_relu_bn={"relu": True})
def input_bn(*, relu: bool = False) -> Net:
    """BN on the graph input: no operator makes its channels."""
    net = Net()
    W = net.kernel(16, 16, 3, 3)
    x = net.feed(1, 16, 8, 8)
    if relu:
        x = net.op("Relu", x, name="relu")
    net.tail(net.conv(net.bn(x, net.norm(16)), W, net.vector(16)), 16)
    net.expect("conv", naive.bounds(W))
    net.expect_skipped("untraced", "bn")
    return net


@case()
def sum_with_input_bn() -> Net:
    """One term of the sum is the graph input: the BN is skipped, the Conv judged as folded."""
    net = Net()
    W = net.kernel(16, 16, 3, 3)
    x = net.feed(1, 16, 8, 8)
    x = net.op("Add", net.conv(x, W), x, name="sum")
    net.tail(net.bn(x, net.norm(16)), 16)
    net.expect("conv", naive.bounds(W))
    net.expect_skipped("untraced", "bn")
    return net
