"""Where a weight comes from: how its payload is stored, and what stands between the tensor and the operator."""

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import ArrayLike, DTypeLike
from onnx import helper, numpy_helper

from tests import naive
from tests.cases.net import Array, Net, case


def typed(value: Array) -> onnx.TensorProto:
    """A tensor with its payload in float_data, int32_data …, whichever is its type's, rather than raw_data."""
    return helper.make_tensor("", helper.np_dtype_to_tensor_dtype(value.dtype), value.shape, value.ravel())


def folded_with(net: Net, weight: str, kernel: ArrayLike) -> Net:
    """A folded Conv of that weight, expected to have the bounds of that kernel."""
    net.tail(net.conv(net.feed(1, 3, 8, 8), weight, net.vector(16)), 16)
    net.expect("conv", naive.bounds(kernel))
    return net


# ---- what stands between


@case(constant_node={}, constant_node_typed={"typed_fields": True})
def constant_node(*, typed_fields: bool = False) -> Net:
    """Every constant in a Constant node, as Paddle's converter has it."""
    net = Net()
    W, norm = net.kernel(16, 3, 3, 3), net.norm(16)
    store = typed if typed_fields else numpy_helper.from_array
    constants = [W, norm.gamma, norm.beta, norm.mean, norm.variance]
    names = [net.op("Constant", name=f"constant_{i}", value=store(c)) for i, c in enumerate(constants)]
    x = net.conv(net.feed(1, 3, 8, 8), names[0])
    net.tail(net.op("BatchNormalization", x, *names[1:], name="bn", epsilon=norm.epsilon), 16)
    net.expect("bn", norm.of(W))
    return net


@case()
def constant_value_floats() -> Net:
    """γ as the attribute value_floats of a Constant."""
    net = Net()
    W, norm = net.kernel(16, 3, 3, 3), net.norm(16)
    gamma = net.op("Constant", name="gamma", value_floats=norm.gamma.tolist())
    net.tail(net.bn(net.conv(net.feed(1, 3, 8, 8), W), norm, gamma=gamma), 16)
    net.expect("bn", norm.of(W))
    return net


@case(weight_identity={"times": 1}, weight_two_identities={"times": 2})
def weight_identity(times: int) -> Net:
    net = Net()
    W = net.kernel(16, 3, 3, 3)
    weight = net.tensor(W, "weight")
    for i in range(times):
        weight = net.op("Identity", weight, name=f"identity_{i}")
    return folded_with(net, weight, W)


@case(
    weight_cast_float16={"dtype": np.float16},
    weight_cast_bfloat16={"dtype": ml_dtypes.bfloat16},
    weight_cast_float64={"dtype": np.float64},
    weight_cast_float16_int32_data={"dtype": np.float16, "typed_fields": True},
    weight_cast_bfloat16_int32_data={"dtype": ml_dtypes.bfloat16, "typed_fields": True},
    weight_cast_double_data={"dtype": np.float64, "typed_fields": True},
)
def weight_cast(dtype: DTypeLike, *, typed_fields: bool = False) -> Net:
    """Stored in another type, and cast to float32 in the graph."""
    net = Net()
    W = net.kernel(16, 3, 3, 3).astype(dtype)
    stored = net.tensor(typed(W) if typed_fields else W, "weight")
    return folded_with(net, net.op("Cast", stored, name="cast", to=1), W.astype(np.float32))


@case()
def weight_transpose() -> Net:
    """Stored as TensorFlow has it: (*kernel, C_in, C_out)."""
    net = Net()
    W = net.kernel(16, 3, 3, 3)
    stored = net.tensor(np.ascontiguousarray(W.transpose(2, 3, 1, 0)), "weight")
    return folded_with(net, net.op("Transpose", stored, name="transpose", perm=[3, 2, 0, 1]), W)


@case(weight_reshape={}, weight_reshape_inferred={"shape": (0, 3, 3, -1)}, weight_reshape_int64_data={"fields": True})
def weight_reshape(*, shape: tuple[int, ...] = (16, 3, 3, 3), fields: bool = False) -> Net:
    net = Net()
    W = net.kernel(16, 3, 3, 3)
    to = np.array(shape, dtype=np.int64)
    stored, to_name = net.tensor(W.reshape(16, 27), "weight"), net.tensor(typed(to) if fields else to, "shape")
    return folded_with(net, net.op("Reshape", stored, to_name, name="reshape"), W)


@case(weight_squeeze={"opset": 17}, weight_squeeze_opset11={"opset": 11})
def weight_squeeze(opset: int) -> Net:
    """Squeeze → Unsqueeze of a stored weight."""
    net = Net(opset=opset)
    W = net.kernel(16, 3, 1, 3)
    weight = net.with_axes("Squeeze", net.tensor(W.reshape(1, 16, 3, 3), "weight"), 0, name="squeeze")
    return folded_with(net, net.with_axes("Unsqueeze", weight, 2, name="unsqueeze"), W)


@case(weight_mul={"shape": (16, 1, 1, 1)}, weight_mul_scalar={"shape": ()})
def weight_mul(shape: tuple[int, ...]) -> Net:
    """The product of two constants: weight normalisation, for one."""
    net = Net()
    W, factor = net.kernel(16, 3, 3, 3), net.rng.uniform(0.5, 2.0, shape).astype(np.float32)
    weight = net.op("Mul", net.tensor(W, "direction"), net.tensor(factor, "magnitude"), name="mul")
    return folded_with(net, weight, W * factor)


@case(weight_cast_mul_add={}, weight_cast_mul_add_int32_data={"fields": True})
def weight_cast_mul_add(*, fields: bool = False) -> Net:
    """Integers, scaled and shifted by operators of the graph: Cast → Mul → Add."""
    net = Net()
    q = np.round(net.kernel(16, 3, 3, 3) * 20).astype(np.int8)
    weight = net.op("Cast", net.tensor(typed(q) if fields else q, "weight"), name="cast", to=1)
    weight = net.op("Mul", weight, net.tensor(np.float32(0.05), "scale"), name="mul")
    weight = net.op("Add", weight, net.tensor(np.float32(0.01), "shift"), name="add")
    return folded_with(net, weight, q.astype(np.float32) * np.float32(0.05) + np.float32(0.01))


@case()
def weight_constant_of_shape() -> Net:
    """All channels equal: no spread, no outlier."""
    net = Net()
    value = helper.make_tensor("", onnx.TensorProto.FLOAT, [1], [0.25])
    weight = net.op("ConstantOfShape", net.integers(16, 3, 3, 3, name="shape"), name="filled", value=value)
    folded_with(net, weight, np.full((16, 3, 3, 3), 0.25))
    net.outliers["conv"] = ()
    return net


@case()
def bn_constants_cast() -> Net:
    """γ and var are stored as float16 and cast, β and the mean aliased."""
    net = Net()
    W, norm = net.kernel(16, 3, 3, 3), net.norm(16)
    gamma, variance = norm.gamma.astype(np.float16), norm.variance.astype(np.float16)
    constants = [
        net.op("Cast", net.tensor(gamma, "gamma"), name="gamma_cast", to=1),
        net.op("Identity", net.tensor(norm.beta, "beta"), name="beta_alias"),
        net.op("Identity", net.tensor(norm.mean, "mean"), name="mean_alias"),
        net.op("Cast", net.tensor(variance, "var"), name="var_cast", to=1),
    ]
    x = net.conv(net.feed(1, 3, 8, 8), W)
    net.tail(net.op("BatchNormalization", x, *constants, name="bn", epsilon=norm.epsilon), 16)
    net.expect("bn", naive.bounds(W, gamma, variance, norm.epsilon))
    return net


# ---- graph inputs with a default


@case(default_input_ir3={"ir": 3, "opset": 8}, default_input_ir8={"ir": 8, "opset": 17})
def default_input(ir: int, opset: int) -> Net:
    """The weight is a graph input too: the caller may override it, and it is judged by its default."""
    net = Net(ir=ir, opset=opset)
    W = net.kernel(16, 3, 3, 3)
    weight = net.tensor(W, "weight")
    folded_with(net, weight, W)
    if ir >= 4:  # before that, every initializer is an input
        net.feed(16, 3, 3, 3, name="weight")
    return net


# ---- how the payload is stored


@case(
    float_data={"dtype": np.float32},
    float16_int32_data={"dtype": np.float16},
    double_data={"dtype": np.float64},
    bfloat16_int32_data={"dtype": ml_dtypes.bfloat16},
)
def payload_fields(dtype: DTypeLike) -> Net:
    """Every tensor of the model in the field of its type."""
    net = kept_bn(dtype)
    for tensor in net.initializers:
        name, fields = tensor.name, typed(numpy_helper.to_array(tensor))
        tensor.CopyFrom(fields)
        tensor.name = name
    return net


def kept_bn(dtype: DTypeLike = np.float32) -> Net:
    """Conv → BN, all of one type."""
    net = Net(dtype=dtype, opset=22, ir=10) if dtype == ml_dtypes.bfloat16 else Net(dtype=dtype)
    W, norm = net.kernel(16, 3, 3, 3), net.norm(16)
    net.tail(net.bn(net.conv(net.feed(1, 3, 8, 8), W), norm), 16)
    net.expect("bn", norm.of(W))
    if net.dtype in (np.float64, ml_dtypes.bfloat16):
        net.not_run = f"no Conv of {net.dtype} on the CPU"
    return net


@case(
    model_float64={"dtype": np.float64},
    model_float16={"dtype": np.float16},
    model_bfloat16={"dtype": ml_dtypes.bfloat16},
)
def whole_model(dtype: DTypeLike) -> Net:
    """Input, weights, BN and output of one type."""
    return kept_bn(dtype)


@case()
def raw_data_and_float_data() -> Net:
    """A tensor with two payloads: onnxruntime takes raw_data, the other is a decoy without an outlier."""
    net = Net()
    W = net.kernel(16, 3, 3, 3)
    proto = numpy_helper.from_array(W)
    proto.float_data.extend(net.kernel(16, 3, 3, 3, outlier=None).ravel())
    net.left.add("conv")
    return folded_with(net, net.tensor(proto, "weight"), W)


@case()
def external_offsets() -> Net:
    """Two payloads in one file, not in the order of the graph, with other bytes before and between them."""
    return external({"conv.weight": ("all.bin", 4096), "bn.gamma": ("all.bin", 128)})


@case(
    external_one_file={"where": "one"},
    external_many_files={"where": "many"},
    external_folder={"where": "folder"},
    external_without_offset={"where": "bare"},
)
def external_layout(where: str) -> Net:
    """Payloads beside the model: all in one file, a file each, in a folder, or with nothing but a location."""
    names = ["conv.weight", "bn.gamma", "bn.beta", "bn.mean", "bn.var"]
    if where == "one":
        return external(dict.fromkeys(names, ("model.onnx.data", None)))
    folder = "weights/" if where == "folder" else ""
    return external({name: (f"{folder}{name}.bin", None) for name in names}, bare=where == "bare")


def external(where: dict[str, tuple[str, int | None]], *, bare: bool = False) -> Net:
    """Conv → BN with the payloads of these tensors in files, each at its offset or behind the one before it."""
    net = kept_bn()
    files: dict[str, bytearray] = {}
    for tensor in net.initializers:
        if tensor.name not in where:
            continue
        location, offset = where[tensor.name]
        data, blob = tensor.raw_data, files.setdefault(location, bytearray())
        start = len(blob) if offset is None else offset
        blob.extend(b"\xff" * (start + len(data) - len(blob)))
        blob[start : start + len(data)] = data
        entries = {"location": location} | ({} if bare else {"offset": str(start), "length": str(len(data))})
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
    net.folder = {location: bytes(blob) for location, blob in files.items()}
    return net


@case(sparse={"linear": True}, sparse_coordinates={"linear": False})
def sparse_initializer(*, linear: bool) -> Net:
    """A pruned kernel as a sparse_initializer, its indices linear or as coordinates."""
    net = Net()
    W = net.kernel(16, 3, 3, 3)
    W[net.rng.random(W.shape) < 0.5] = 0
    where = np.flatnonzero(W) if linear else np.argwhere(W)
    values = numpy_helper.from_array(W[W != 0], "weight")
    indices = numpy_helper.from_array(where.astype(np.int64), "weight_indices")
    net.sparse.append(helper.make_sparse_tensor(values, indices, W.shape))
    return folded_with(net, "weight", W)


@case()
def sparse_constant_node() -> Net:
    """A Constant node with the attribute sparse_value."""
    net = Net()
    W = net.kernel(16, 3, 3, 3)
    W[net.rng.random(W.shape) < 0.5] = 0
    values = numpy_helper.from_array(W[W != 0], "values")
    indices = numpy_helper.from_array(np.flatnonzero(W).astype(np.int64), "indices")
    sparse = helper.make_sparse_tensor(values, indices, W.shape)
    return folded_with(net, net.op("Constant", name="constant", sparse_value=sparse), W)


# ---- weights that cannot be read


def skipped_with(net: Net, weight: str, reason: str) -> Net:
    """A folded Conv of a weight that cannot be read, and one behind it that can."""
    W = net.kernel(16, 16, 3, 3)
    x = net.op("Relu", net.conv(net.feed(1, 3, 8, 8), weight, net.vector(16)), name="relu")
    net.tail(net.conv(x, W, net.vector(16), name="after"), 16)
    net.expect("after", naive.bounds(W))
    net.expect_skipped(reason, "conv")
    return net


def from_the_input(net: Net) -> str:
    """A constant times a number that is known at run time only."""
    number = net.op("Mul", net.feed(1, name="gain"), net.tensor(np.float32(2), "two"), name="double")
    return net.op("Mul", net.tensor(net.kernel(16, 3, 3, 3), "weight"), number, name="mul")


def by_the_caller(net: Net) -> str:
    """A graph input without a default."""
    return net.feed(16, 3, 3, 3, name="weight")


def custom(net: Net) -> str:
    """A quantiser of QONNX."""
    net.not_run = "no operator qonnx.custom_op.general::Quant"
    numbers = [net.tensor(np.float32(value), name) for value, name in ((0.05, "scale"), (0, "zero"), (8, "bits"))]
    weight = net.tensor(net.kernel(16, 3, 3, 3), "weight")
    options = {"signed": 1, "narrow": 1, "rounding_mode": "ROUND"}
    return net.op("Quant", weight, *numbers, name="quant", domain="qonnx.custom_op.general", **options)


def without_data(net: Net) -> str:
    """An initializer of a shape and a type and no payload."""
    net.not_run = "the weight has no payload"
    return net.tensor(onnx.TensorProto(dims=[16, 3, 3, 3], data_type=onnx.TensorProto.FLOAT), "weight")


@case(
    dynamic_weight={"weight": from_the_input, "reason": "dynamic-weight"},
    dynamic_weight_input={"weight": by_the_caller, "reason": "dynamic-weight"},
    custom_quant={"weight": custom, "reason": "custom-operator"},
    no_data={"weight": without_data, "reason": "no-data"},
)
def unreadable(weight: Callable[[Net], str], reason: str) -> Net:
    net = Net()
    return skipped_with(net, weight(net), reason)


@case()
def dynamic_weight_bn() -> Net:
    """A BN behind a Conv whose weight is known at run time only."""
    net = Net()
    x = net.conv(net.feed(1, 3, 8, 8), from_the_input(net))
    net.tail(net.bn(x, net.norm(16)), 16)
    net.expect_skipped("dynamic-weight", "bn")
    net.undecided.add("conv")
    return net


@case(custom_conv={"normalise": False}, custom_conv_bn={"normalise": True})
def custom_conv(*, normalise: bool) -> Net:
    """A Conv of somebody's own domain; who knows what it computes."""
    net = Net()
    net.not_run = "no operator com.acme::Conv"
    W = net.kernel(16, 16, 3, 3)
    x = net.conv(net.feed(1, 3, 8, 8), net.kernel(16, 3, 3, 3), name="custom", domain="com.acme")
    if normalise:
        x = net.bn(x, net.norm(16))
        net.expect_skipped("untraced", "bn")
    net.tail(net.conv(net.op("Relu", x, name="relu"), W, net.vector(16)), 16)
    net.expect("conv", naive.bounds(W))
    net.expect_skipped("custom-operator", "custom")
    return net
