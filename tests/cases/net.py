"""What the cases are made of: a graph under construction, and the case that comes out of it.

A case says by itself what a scan should find. A site is named by the node whose constants silence it: the
BatchNormalization where there is one, the Conv where its BN was folded into it, the last per-channel Mul where the BN
is spelled as Mul and Add.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, DTypeLike, NDArray
from onnx import helper, numpy_helper

from tests import naive

Array = NDArray[Any]
Bounds = NDArray[np.float64]
Attribute = Any
"""Whatever onnx.helper.make_node takes as the value of an attribute."""

PLANTED = 5
"""The channel that stands out, unless a case says otherwise."""


@dataclass(frozen=True)
class Case:
    """A model and what a scan of it should find; keys are node names, `outer/attribute/inner` within a subgraph."""

    name: str
    model: onnx.ModelProto
    sites: dict[str, Bounds]
    """Expected bound of each channel."""
    skipped: dict[str, str]
    """Nodes seen and not judged: head, gate, untraced, training-mode, dynamic-weight, custom-operator, no-data …"""
    folder: dict[str, bytes] | None = None
    """External data files beside the model, by their relative path."""
    outliers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Which channels of each site u = 3 flags."""
    undecided: frozenset[str] = frozenset()
    """Nodes of which the case says nothing: they may be sites, skipped, or neither."""
    not_run: str = ""
    """Why onnxruntime does not run this model; empty where it does."""
    left: frozenset[str] = frozenset()
    """Sites that a rewrite leaves as they are, since what it would write to is ambiguous."""


@dataclass(frozen=True)
class Norm:
    """The constants of a BatchNormalization in inference: γ, β, mean, var (C,), and ε."""

    gamma: Array
    beta: Array
    mean: Array
    variance: Array
    epsilon: float = 1e-5

    def after(self, before: ArrayLike) -> Bounds:
        """Bounds behind this BN, from those before it."""
        return naive.normalised(before, self.gamma, self.variance, self.epsilon)

    def of(self, kernel: ArrayLike) -> Bounds:
        """Bounds of an operator with this BN behind it."""
        return naive.bounds(kernel, self.gamma, self.variance, self.epsilon)


class Net:
    """A graph under construction. Methods that add nodes return the names of the values these make."""

    def __init__(
        self,
        *,
        opset: int = 17,
        ir: int = 8,
        dtype: DTypeLike = np.float32,
        prefix: str = "",
        rng: np.random.Generator | None = None,
    ) -> None:
        """Start an empty graph; `prefix` keeps the values of a subgraph apart from those around it."""
        self.opset, self.ir, self.prefix = opset, ir, prefix
        self.dtype = np.dtype(dtype)
        self.rng = rng or np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.declared: list[onnx.ValueInfoProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.sparse: list[onnx.SparseTensorProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self.domains: dict[str, int] = {}
        self.folder: dict[str, bytes] | None = None
        self.metadata: list[tuple[str, str]] = []
        self.sites: dict[str, Bounds] = {}
        self.outliers: dict[str, tuple[int, ...]] = {}
        self.skipped: dict[str, str] = {}
        self.undecided: set[str] = set()
        self.not_run = ""
        self.left: set[str] = set()

    # ---- what a scan should find

    def expect(self, site: str, bounds: ArrayLike, outliers: Iterable[int] = (PLANTED,)) -> None:
        """Node `site` is a site with these bounds, of which u = 3 flags `outliers`."""
        self.sites[site] = np.asarray(bounds, dtype=np.float64)
        self.outliers[site] = tuple(outliers)

    def expect_skipped(self, reason: str, *nodes: str) -> None:
        """Each of `nodes` is seen and not judged, for this reason."""
        self.skipped.update(dict.fromkeys(nodes, reason))

    # ---- random constants

    def kernel(self, *shape: int, outlier: int | None = PLANTED, factor: float = 8.0) -> Array:
        """A random kernel (C_out, C_in/groups, *kernel) in which one channel is `factor` times the others."""
        W = self.rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))
        if outlier is not None:
            W[outlier] *= factor
        return W.astype(self.dtype)

    def vector(self, channels: int) -> Array:
        """A random bias (C,)."""
        return self.rng.normal(0, 0.1, channels).astype(self.dtype)

    def norm(self, channels: int, epsilon: float = 1e-5) -> Norm:
        """Random constants of a BN, with γ of both signs."""
        sign = self.rng.choice([-1.0, 1.0], channels)
        gamma = self.rng.uniform(0.8, 1.2, channels) * sign
        variance = self.rng.uniform(0.8, 1.2, channels)
        beta, mean = self.vector(channels), self.vector(channels)
        return Norm(gamma.astype(self.dtype), beta, mean, variance.astype(self.dtype), epsilon)

    # ---- values and nodes

    def feed(self, *shape: int | str, name: str = "x", dtype: DTypeLike | None = None) -> str:
        """A graph input."""
        element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype or self.dtype))
        self.inputs.append(helper.make_tensor_value_info(self.prefix + name, element, shape))
        return self.prefix + name

    def tensor(self, value: ArrayLike | onnx.TensorProto, name: str) -> str:
        """An initializer."""
        proto = onnx.TensorProto()
        proto.CopyFrom(value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(np.asarray(value)))
        proto.name = self.prefix + name
        self.initializers.append(proto)
        return proto.name

    def integers(self, *values: int, name: str) -> str:
        """A 1-D int64 initializer: a shape, axes, sizes."""
        return self.tensor(np.array(values, dtype=np.int64), name)

    def ops(
        self, op: str, *inputs: str, name: str, outputs: int, domain: str = "", **attributes: Attribute
    ) -> list[str]:
        """Add a node; the names of its outputs."""
        made = [f"{self.prefix}{name}.out{i or ''}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, made, name=name, domain=domain, **attributes))
        if domain:
            self.domains[domain] = 1
        return made

    def op(self, op: str, *inputs: str, name: str, domain: str = "", **attributes: Attribute) -> str:
        """Add a node of one output; the name of that."""
        return self.ops(op, *inputs, name=name, outputs=1, domain=domain, **attributes)[0]

    def constant(self, value: ArrayLike, name: str) -> str:
        """A Constant node."""
        return self.op("Constant", name=name, value=numpy_helper.from_array(np.asarray(value)))

    def with_axes(self, op: str, x: str, *axes: int, name: str, since: int = 13, **attributes: Attribute) -> str:
        """A node whose axes are an attribute before opset `since` and an input from then on."""
        if self.opset < since:
            return self.op(op, x, name=name, axes=axes, **attributes)
        return self.op(op, x, self.integers(*axes, name=f"{name}.axes"), name=name, **attributes)

    def conv(
        self,
        x: str,
        weight: Array | str,
        bias: Array | str | None = None,
        *,
        name: str = "conv",
        op: str = "Conv",
        **attributes: Attribute,
    ) -> str:
        """A Conv; of a weight given as an array the output is as large as the input, unless `pads` are given."""
        if not isinstance(weight, str):
            attributes.setdefault("kernel_shape", weight.shape[2:])
            if op != "ConvTranspose":
                attributes.setdefault("pads", [size // 2 for size in weight.shape[2:]] * 2)
            weight = self.tensor(weight, f"{name}.weight")
        if bias is not None and not isinstance(bias, str):
            bias = self.tensor(bias, f"{name}.bias")
        return self.op(op, x, weight, *([bias] if bias else []), name=name, **attributes)

    def bn(self, x: str, norm: Norm, *, name: str = "bn", gamma: str = "", **attributes: Attribute) -> str:
        """A BatchNormalization in inference; `gamma` names a value to take instead of a γ of its own."""
        constants = [
            gamma or self.tensor(norm.gamma, f"{name}.gamma"),
            self.tensor(norm.beta, f"{name}.beta"),
            self.tensor(norm.mean, f"{name}.mean"),
            self.tensor(norm.variance, f"{name}.var"),
        ]
        return self.op("BatchNormalization", x, *constants, name=name, epsilon=norm.epsilon, **attributes)

    def per_channel(self, op: str, x: str, value: Array, *, name: str, lead: int = 0) -> str:
        """Add, Sub, Mul or Div of one constant per channel: shape (C, 1, 1), with `lead` ones before it."""
        return self.op(op, x, self.tensor(value.reshape((1,) * lead + (-1, 1, 1)), f"{name}.c"), name=name)

    # ---- ends

    def give(self, value: str, rank: int = 4, dtype: DTypeLike | None = None) -> None:
        """Make a value a graph output."""
        element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype or self.dtype))
        self.outputs.append(helper.make_tensor_value_info(value, element, [None] * rank))

    def tail(self, x: str, channels: int, *, pooled: bool = False, name: str = "tail") -> None:
        """Relu → GlobalAveragePool → Flatten → Gemm → output, after which no operator before it is a head.

        `pooled`: x is (N, C) already.
        """
        x = self.op("Relu", x, name=f"{name}_relu")
        if not pooled:
            x = self.op("GlobalAveragePool", x, name=f"{name}_pool")
            x = self.op("Flatten", x, name=f"{name}_flatten")
        weight = self.tensor(self.kernel(10, channels, outlier=None), f"{name}_fc.weight")
        bias = self.tensor(self.vector(10), f"{name}_fc.bias")
        old: dict[str, Attribute] = {"broadcast": 1} if self.opset < 7 else {}
        self.give(self.op("Gemm", x, weight, bias, name=f"{name}_fc", transB=1, **old), rank=2)

    def inner(self, prefix: str) -> Net:
        """A graph for a subgraph or a function, to be filled and then passed to `graph` or `function` of its own."""
        return Net(opset=self.opset, ir=self.ir, dtype=self.dtype, prefix=prefix, rng=self.rng)

    def graph(self, name: str = "graph") -> onnx.GraphProto:
        """The graph as a proto."""
        graph = helper.make_graph(
            self.nodes,
            name,
            self.inputs,
            self.outputs,
            self.initializers,
            value_info=self.declared,
            sparse_initializer=self.sparse,
        )
        if self.ir < 4:  # every initializer has to be an input, too
            for tensor in self.initializers:
                graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        return graph

    def function(
        self, domain: str, name: str, inputs: Sequence[str], attributes: Sequence[str] = ()
    ) -> onnx.FunctionProto:
        """The graph as a model-local function: its inputs by name, its outputs as given by `give`."""
        outputs = [output.name for output in self.outputs]
        return helper.make_function(domain, name, inputs, outputs, self.nodes, self._opsets(), attributes)

    def case(self, name: str) -> Case:
        """The finished case."""
        model = helper.make_model(
            self.graph(), opset_imports=self._opsets(), ir_version=self.ir, functions=self.functions
        )
        for key, value in self.metadata:
            model.metadata_props.add(key=key, value=value)
        return Case(
            name,
            model,
            self.sites,
            self.skipped,
            self.folder,
            self.outliers,
            frozenset(self.undecided),
            self.not_run,
            frozenset(self.left),
        )

    def _opsets(self) -> list[onnx.OperatorSetIdProto]:
        return [helper.make_opsetid("", self.opset), *(helper.make_opsetid(d, v) for d, v in self.domains.items())]


BUILDERS: dict[str, Callable[[], Case]] = {}
"""Every case by its name."""

Build = Callable[..., "Net | Case"]


def case(**variants: Mapping[str, Any]) -> Callable[[Build], Build]:
    """Register a builder: under its own name, or once for each variant, called with the arguments of that."""

    def register(build: Build) -> Build:
        for name, arguments in (variants or {build.__name__: {}}).items():
            assert name not in BUILDERS, f"two cases are named {name}"
            inspect.signature(build).bind(**arguments)
            BUILDERS[name] = _builder(build, name, arguments)
        return build

    return register


def _builder(build: Build, name: str, arguments: Mapping[str, Any]) -> Callable[[], Case]:
    def built() -> Case:
        made = build(**arguments)
        return made.case(name) if isinstance(made, Net) else made

    return built
