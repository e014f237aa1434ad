"""The file around the operators: order, names, subgraphs, functions, opsets, training mode, shared tensors."""

from dataclasses import replace

import numpy as np
import onnx
from onnx import numpy_helper

from tests import naive
from tests.cases.net import Attribute, Net, Norm, case

# ---- order and names


def two_layers(net: Net) -> Net:
    """Conv → BN → Relu → folded Conv."""
    W_0, W_1, norm = net.kernel(16, 3, 3, 3), net.kernel(16, 16, 3, 3, outlier=9), net.norm(16)
    x = net.op("Relu", net.bn(net.conv(net.feed(1, 3, 8, 8), W_0, name="conv_0"), norm, name="bn_0"), name="relu_0")
    net.tail(net.conv(x, W_1, net.vector(16), name="conv_1"), 16)
    net.expect("bn_0", norm.of(W_0))
    net.expect("conv_1", naive.bounds(W_1), [9])
    return net


@case()
def unsorted_nodes() -> Net:
    """Every node stands before those that feed it."""
    net = two_layers(Net())
    net.nodes.reverse()
    return net


@case(nameless={"all_of_them": True}, nameless_some={"all_of_them": False})
def nameless(*, all_of_them: bool) -> Net:
    """Nodes without a name: the name of their first output stands in for it."""
    net = two_layers(Net())
    for node in net.nodes:
        if all_of_them or node.op_type == "Conv":
            node.name = ""
    for old in [site for site in net.sites if all_of_them or site.startswith("conv")]:
        net.sites[f"{old}.out"] = net.sites.pop(old)
        net.outliers[f"{old}.out"] = net.outliers.pop(old)
    return net


@case()
def doubled_metadata() -> Net:
    """The same key twice in metadata_props, as onnx.checker refuses and onnxruntime loads."""
    net = two_layers(Net())
    net.metadata = [("author", "a"), ("author", "b"), ("onnx_clp.version", "99")]
    return net


@case()
def odd_names() -> Net:
    """Names that hold markup, an escape of the terminal, a per cent sign, slashes and letters of the world."""
    net = two_layers(Net())
    for old, new in {"bn_0": "</script><b>\x1b[31m%s", "conv_1": "層/卷积:0 ../é"}.items():
        for node in net.nodes:
            node.name = new if node.name == old else node.name
        net.sites[new], net.outliers[new] = net.sites.pop(old), net.outliers.pop(old)
    return net


@case()
def unused_conv() -> Net:
    """Nobody reads the second Conv's output."""
    net = Net()
    W = net.kernel(16, 3, 3, 3)
    x = net.feed(1, 3, 8, 8)
    net.conv(x, net.kernel(16, 3, 3, 3), name="dangling")
    net.tail(net.conv(x, W, net.vector(16)), 16)
    net.expect("conv", naive.bounds(W))
    net.expect_skipped("unused", "dangling")
    return net


# ---- subgraphs


def branch(net: Net, prefix: str, x: str, weight: str, *, relu: bool = True) -> onnx.GraphProto:
    """A branch of an If with a Conv `conv` on a value and a weight from outside."""
    inner = net.inner(prefix)
    y = inner.conv(x, weight, inner.vector(16), pads=[1] * 4)
    inner.give(inner.op("Relu", y, name="relu") if relu else y)
    return inner.graph(f"{prefix}graph")


@case(
    if_outer_weights={},
    if_shared_weight={"shared": True},
    if_branch_output_is_no_head={"relu": False},
    if_head={"relu": False, "head": True},
)
def if_branches(*, shared: bool = False, relu: bool = True, head: bool = False) -> Net:
    """A Conv in each branch, with weights that are initializers of the graph around."""
    net = Net()
    W = {"then": net.kernel(16, 3, 3, 3), "else": net.kernel(16, 3, 3, 3, outlier=7)}
    x, condition = net.feed(1, 3, 8, 8), net.feed(name="condition", dtype=np.bool_)
    if shared:
        W["else"] = W["then"]
        names = dict.fromkeys(W, net.tensor(W["then"], "weight"))
    else:
        names = {side: net.tensor(kernel, f"{side}_weight") for side, kernel in W.items()}
    branches = {f"{side}_branch": branch(net, f"{side}_", x, names[side], relu=relu) for side in W}
    y = net.op("If", condition, name="if_0", then_branch=branches["then_branch"], else_branch=branches["else_branch"])
    if head:
        net.give(y)
        net.expect_skipped("head", *(f"if_0/{side}_branch/conv" for side in W))
        return net
    net.tail(y, 16)
    for side, kernel in W.items():
        outlier = 7 if side == "else" and not shared else 5
        net.expect(f"if_0/{side}_branch/conv", naive.bounds(kernel), [outlier])
    return net


@case(if_constant_nodes={"constants": True}, if_own_initializers={"constants": False})
def if_inner_weights(*, constants: bool) -> Net:
    """Weights of a Conv → BN that live in the branch itself."""
    net = Net()
    x, condition = net.feed(1, 3, 8, 8), net.feed(name="condition", dtype=np.bool_)
    branches: dict[str, Attribute] = {}
    for side, outlier in (("then_branch", 5), ("else_branch", 7)):
        inner = net.inner(f"{side}_")
        W, norm = inner.kernel(16, 3, 3, 3, outlier=outlier), inner.norm(16)
        weight = inner.constant(W, "weight") if constants else inner.tensor(W, "weight")
        y = inner.bn(inner.conv(x, weight, pads=[1] * 4), norm)
        inner.give(inner.op("Relu", y, name="relu"))
        branches[side] = inner.graph(side)
        net.expect(f"if_0/{side}/bn", norm.of(W), [outlier])
    net.tail(net.op("If", condition, name="if_0", **branches), 16)
    return net


@case(loop={}, loop_with_if={"nested": True})
def loop(*, nested: bool = False) -> Net:
    """The body is a Conv of 16 to 16 channels, or an If that holds one in each branch."""
    net = Net()
    W = net.kernel(16, 16, 3, 3)
    weight = net.tensor(W, "weight")
    body = net.inner("body_")
    body.feed(name="i", dtype=np.int64)
    again, x = body.feed(name="condition", dtype=np.bool_), body.feed(1, 16, 8, 8)
    y = body.op("Identity", again, name="again")
    body.give(y, rank=0, dtype=np.bool_)
    if nested:
        sides = {side: branch(body, f"{side}_", x, weight) for side in ("then_branch", "else_branch")}
        body.give(body.op("If", again, name="if_0", then_branch=sides["then_branch"], else_branch=sides["else_branch"]))
        for side in sides:
            net.expect(f"loop_0/body/if_0/{side}/conv", naive.bounds(W))
    else:
        body.give(body.op("Relu", body.conv(x, weight, pads=[1] * 4), name="relu"))
        net.expect("loop_0/body/conv", naive.bounds(W))
    times, start = net.tensor(np.int64(3), "times"), net.tensor(np.bool_(1), "start")
    net.tail(net.op("Loop", times, start, net.feed(1, 16, 8, 8), name="loop_0", body=body.graph("body")), 16)
    return net


@case()
def scan_body() -> Net:
    """Scan: a Conv → BN on each of three steps."""
    net = Net()
    W, norm = net.kernel(16, 16, 3, 3), net.norm(16)
    body = net.inner("body_")
    x = body.feed(1, 16, 8, 8)
    body.give(body.op("Relu", body.bn(body.conv(x, W), norm), name="relu"))
    y = net.op("Scan", net.feed(3, 1, 16, 8, 8), name="scan_0", body=body.graph("body"), num_scan_inputs=1)
    net.tail(net.op("Reshape", y, net.integers(3, 16, 8, 8, name="shape"), name="reshape"), 16)
    net.expect("scan_0/body/bn", norm.of(W))
    return net


# ---- model-local functions

LOCAL = "com.acme.blocks"


@case()
def function_inputs() -> Net:
    """A function Conv → BN → Relu, called twice with weights as inputs."""
    net = Net()
    block = net.inner("f_")
    names = ["x", "weight", "gamma", "beta", "mean", "var"]
    x, weight, *constants = (f"f_{name}" for name in names)
    y = block.op("BatchNormalization", block.conv(x, weight, pads=[1] * 4), *constants, name="bn")
    block.give(block.op("Relu", y, name="relu"))
    net.functions.append(block.function(LOCAL, "Block", [f"f_{name}" for name in names]))
    x, inputs = net.feed(1, 3, 8, 8), 3
    for i, outlier in enumerate([5, 9]):
        W, norm = net.kernel(16, inputs, 3, 3, outlier=outlier), net.norm(16)
        values = [W, norm.gamma, norm.beta, norm.mean, norm.variance]
        given = [net.tensor(value, f"{name}_{i}") for name, value in zip(names[1:], values, strict=True)]
        x, inputs = net.op("Block", x, *given, name=f"call_{i}", domain=LOCAL), 16
        net.expect(f"call_{i}/bn", norm.of(W), [outlier])
    net.tail(x, 16)
    return net


@case(function_constants={}, function_uncalled={"uncalled": True})
def function_constants(*, uncalled: bool = False) -> Net:
    """A function with its weight in a Constant node, called twice: one site per call. Another is never called."""
    net = Net()
    block = net.inner("f_")
    W = block.kernel(16, 16, 3, 3)
    y = block.conv("f_x", block.constant(W, "weight"), pads=[1] * 4)
    block.give(block.op("Relu", y, name="relu"))
    net.functions.append(block.function(LOCAL, "Block", ["f_x"]))
    if uncalled:
        net.functions.append(block.function(LOCAL, "Uncalled", ["f_x"]))
    x = net.feed(1, 16, 8, 8)
    for i in range(2):
        x = net.op("Block", x, name=f"call_{i}", domain=LOCAL)
        net.expect(f"call_{i}/conv", naive.bounds(W))
    net.tail(x, 16)
    return net


@case()
def function_nested() -> Net:
    """A function that calls another one, which holds the Conv."""
    net = Net()
    block, stage = net.inner("f_"), net.inner("g_")
    W = block.kernel(16, 16, 3, 3)
    y = block.conv("f_x", block.constant(W, "weight"), pads=[1] * 4)
    block.give(block.op("Relu", y, name="relu"))
    x = "g_x"
    for i in range(2):
        x = stage.op("Block", x, name=f"block_{i}", domain=LOCAL)
    stage.give(x)
    net.functions += [block.function(LOCAL, "Block", ["f_x"]), stage.function(LOCAL, "Stage", ["g_x"])]
    net.tail(net.op("Stage", net.feed(1, 16, 8, 8), name="stage", domain=LOCAL), 16)
    for i in range(2):
        net.expect(f"stage/block_{i}/conv", naive.bounds(W))
    return net


@case()
def function_attribute() -> Net:
    """The ε of the BN in a function is an attribute of the call: the same constants, two bounds."""
    net = Net()
    W, norm = net.kernel(16, 16, 3, 3), net.norm(16)
    block = net.inner("f_")
    constants = [
        block.constant(c, n)
        for n, c in (("gamma", norm.gamma), ("beta", norm.beta), ("mean", norm.mean), ("var", norm.variance))
    ]
    x = block.conv("f_x", block.constant(W, "weight"), pads=[1] * 4)
    y = block.op("BatchNormalization", x, *constants, name="bn")
    reference = onnx.AttributeProto(name="epsilon", ref_attr_name="smallest", type=onnx.AttributeProto.FLOAT)
    block.nodes[-1].attribute.append(reference)
    block.give(block.op("Relu", y, name="relu"))
    net.functions.append(block.function(LOCAL, "Block", ["f_x"], ["smallest"]))
    x = net.feed(1, 16, 8, 8)
    for i, epsilon in enumerate([1e-5, 0.5]):
        x = net.op("Block", x, name=f"call_{i}", domain=LOCAL, smallest=epsilon)
        net.expect(f"call_{i}/bn", replace(norm, epsilon=epsilon).of(W))
    net.tail(x, 16)
    return net


@case()
def function_in_if() -> Net:
    """A function called in the branches of an If."""
    net = Net()
    block = net.inner("f_")
    block.give(block.op("Relu", block.conv("f_x", "f_weight", pads=[1] * 4), name="relu"))
    net.functions.append(block.function(LOCAL, "Block", ["f_x", "f_weight"]))
    W = net.kernel(16, 3, 3, 3)
    x, condition, weight = net.feed(1, 3, 8, 8), net.feed(name="condition", dtype=np.bool_), net.tensor(W, "weight")
    net.domains[LOCAL] = 1
    sides: dict[str, Attribute] = {}
    for side in ("then_branch", "else_branch"):
        inner = net.inner(f"{side}_")
        inner.give(inner.op("Block", x, weight, name="call", domain=LOCAL))
        sides[side] = inner.graph(side)
        net.expect(f"if_0/{side}/call/conv", naive.bounds(W))
    net.tail(net.op("If", condition, name="if_0", **sides), 16)
    return net


# ---- opsets and training mode


@case(
    opset1={"opset": 1, "ir": 3, "is_test": 1, "spatial": 1, "consumed_inputs": [0, 0, 0, 1, 1]},
    opset6={"opset": 6, "ir": 3, "is_test": 1, "spatial": 1},
    opset7={"opset": 7, "ir": 3, "spatial": 1},
    opset8={"opset": 8, "ir": 3},
    opset9={"opset": 9, "ir": 4},
    opset13={"opset": 13, "ir": 7},
    opset14={"opset": 14, "ir": 7, "training_mode": 0},
    opset15={"opset": 15, "ir": 8},
    opset21={"opset": 21, "ir": 10},
)
def opset(opset: int, ir: int, **attributes: Attribute) -> Net:
    """Conv → BN as each version of BatchNormalization has it."""
    net = Net(opset=opset, ir=ir)
    W, norm = net.kernel(16, 3, 3, 3), net.norm(16)
    net.tail(net.bn(net.conv(net.feed(1, 3, 8, 8), W), norm, **attributes), 16)
    net.expect("bn", norm.of(W))
    if opset < 7:
        net.not_run = f"no BatchNormalization of opset {opset}: support begins with 7"
    return net


@case()
def opset6_broadcast_add() -> Net:
    """Before opset 7 an Add takes a bias (C,) with broadcast=1 and axis=1."""
    net = Net(opset=6, ir=3)
    W, norm = net.kernel(16, 3, 3, 3), net.norm(16)
    x = net.conv(net.feed(1, 3, 8, 8), W)
    x = net.op("Add", x, net.tensor(net.vector(16), "bias"), name="bias_add", broadcast=1, axis=1)
    net.tail(net.bn(x, norm, is_test=1), 16)
    net.expect("bn", norm.of(W))
    net.not_run = "no Add nor BatchNormalization of opset 6: support begins with 7"
    return net


@case(
    training_mode={"opset": 15, "outputs": 3, "training_mode": 1},
    training_mode_opset14={"opset": 14, "outputs": 3, "training_mode": 1},
    training_opset6={"opset": 6, "outputs": 5, "is_test": 0},
    training_opset6_default={"opset": 6, "outputs": 1},
    training_opset7={"opset": 7, "outputs": 5},
)
def training(opset: int, outputs: int, **attributes: Attribute) -> Net:
    """A BN that normalises by its batch: what its constants say is not what it computes."""
    net = Net(opset=opset, ir=3 if opset < 9 else 8)
    norm = net.norm(16)
    x = net.conv(net.feed(1, 3, 8, 8), net.kernel(16, 3, 3, 3))
    net.bn(x, norm, **attributes)
    bn = net.nodes[-1]
    bn.output.extend(f"bn.statistics_{i}" for i in range(1, outputs))
    net.tail(bn.output[0], 16)
    net.expect_skipped("training-mode", "bn")
    net.undecided.add("conv")
    if opset < 7:
        net.not_run = f"no BatchNormalization of opset {opset}: support begins with 7"
    return net


@case()
def spatial_0() -> Net:
    """A BN with constants for each position (C, H, W) rather than each channel."""
    net = Net(opset=7, ir=3)
    gamma, beta, mean, variance = (net.rng.uniform(0.5, 1, (16, 8, 8)).astype(np.float32) for _ in range(4))
    norm = Norm(gamma, beta, mean, variance)
    net.tail(net.bn(net.conv(net.feed(1, 3, 8, 8), net.kernel(16, 3, 3, 3)), norm, spatial=0), 16)
    net.expect_skipped("shape", "bn")
    net.undecided.add("conv")
    return net


# ---- shared tensors


@case()
def shared_gamma() -> Net:
    """One γ feeds a BN, and three more through Identity nodes."""
    net = Net()
    gamma = net.tensor(net.norm(16).gamma, "gamma")
    value = numpy_helper.to_array(net.initializers[-1])
    x, inputs = net.feed(1, 3, 8, 8), 3
    for i in range(4):
        W = net.kernel(16, inputs, 3, 3, outlier=i)
        norm = replace(net.norm(16), gamma=value)
        name = gamma if i == 0 else net.op("Identity", gamma, name=f"alias_{i}")
        x = net.bn(net.conv(x, W, name=f"conv_{i}"), norm, name=f"bn_{i}", gamma=name)
        x, inputs = net.op("Relu", x, name=f"relu_{i}"), 16
        net.expect(f"bn_{i}", norm.of(W), [i])
    net.tail(x, 16)
    return net


@case(shared_kernel={"normalise": False}, shared_kernel_bn={"normalise": True})
def shared_kernel(*, normalise: bool) -> Net:
    """One kernel and one bias on two branches: two sites."""
    net = Net()
    W, x = net.kernel(16, 3, 3, 3), net.feed(1, 3, 8, 8)
    weight, bias = net.tensor(W, "weight"), net.tensor(net.vector(16), "bias")
    parts = []
    for i, value in enumerate([x, net.op("Tanh", x, name="tanh")]):
        y = net.conv(value, weight, bias, name=f"conv_{i}", pads=[1] * 4)
        if normalise:
            norm = net.norm(16)
            y = net.bn(y, norm, name=f"bn_{i}")
            net.expect(f"bn_{i}", norm.of(W))
        else:
            net.expect(f"conv_{i}", naive.bounds(W))
        parts.append(net.op("Relu", y, name=f"relu_{i}"))
    net.tail(net.op("Concat", *parts, name="concat", axis=1), 32)
    return net


@case()
def shared_bias() -> Net:
    """One bias tensor of zeros on four Convs."""
    net = Net()
    bias = net.tensor(np.zeros(16, dtype=np.float32), "zeros")
    x, inputs = net.feed(1, 3, 8, 8), 3
    for i in range(4):
        W = net.kernel(16, inputs, 3, 3, outlier=i)
        x, inputs = net.op("Relu", net.conv(x, W, bias, name=f"conv_{i}"), name=f"relu_{i}"), 16
        net.expect(f"conv_{i}", naive.bounds(W), [i])
    net.tail(x, 16)
    return net


@case()
def shared_constants() -> Net:
    """One tensor is β and the mean of a BN; another is its var and the γ of the next."""
    net = Net()
    W_0, W_1 = net.kernel(16, 3, 3, 3), net.kernel(16, 16, 3, 3, outlier=9)
    first, second = net.norm(16), net.norm(16)
    zeros = net.tensor(np.zeros(16, dtype=np.float32), "zeros")
    shared = net.tensor(first.variance, "shared")
    gamma, variance = net.tensor(first.gamma, "gamma"), net.tensor(second.variance, "var")
    x = net.conv(net.feed(1, 3, 8, 8), W_0, name="conv_0")
    x = net.op("BatchNormalization", x, gamma, zeros, zeros, shared, name="bn_0", epsilon=1e-5)
    x = net.conv(net.op("Relu", x, name="relu"), W_1, name="conv_1")
    net.tail(net.op("BatchNormalization", x, shared, zeros, zeros, variance, name="bn_1", epsilon=1e-5), 16)
    net.expect("bn_0", first.of(W_0))
    net.expect("bn_1", naive.bounds(W_1, first.variance, second.variance, 1e-5), [9])
    return net


@case()
def shared_with_shape_of_another() -> Net:
    """The kernel also feeds a MatMul, as a matrix: one edit would reach both."""
    net = Net()
    W = net.kernel(16, 16, 1, 1)
    weight = net.tensor(W, "weight")
    x = net.op("Relu", net.conv(net.feed(1, 16, 8, 8), weight, net.vector(16)), name="relu")
    x = net.op("Flatten", net.op("GlobalAveragePool", x, name="pool"), name="flatten")
    matrix = net.op("Reshape", weight, net.integers(16, 16, name="shape"), name="reshape")
    net.tail(net.op("MatMul", x, matrix, name="matmul"), 16, pooled=True)
    net.expect("conv", naive.bounds(W))
    return net
