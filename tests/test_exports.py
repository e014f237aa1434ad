"""One network in many forms: the same flagged channels under the same layers, within the precision of each form.

The reference is the TorchScript export with its BNs kept, whose layers test_published.py compares with the published
formula. A form moves the bound b_k of channel k by Δ_k at most, Δ following from how it rounds the weights, see
`relative_errors`. The threshold mean + u·std then moves by at most mean(Δ) + u·‖Δ‖/√(n−1): the mean by the mean of the
Δs, and the std, a norm of the centred bounds over √(n−1), by that norm of Δ. So a channel is *decided* where

    |b_k − threshold| > Δ_k + mean(Δ) + u·‖Δ‖/√(n−1)

and a decided channel must be flagged in both forms or in neither. In the forms of float32, Δ is that small that all
channels are decided; in every form the planted outliers of the BNs right behind a convolution are.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

import onnx_clp
from tests import naive

pytest.importorskip("torch")
pytest.importorskip("torchvision")
onnxruntime = pytest.importorskip("onnxruntime")

import torch  # noqa: E402  as above

from tests.exported import (  # noqa: E402  needs torch
    PLANTED,
    convolution_behind,
    export,
    randomise,
    short_densenet,
    short_resnet,
)

pytestmark = pytest.mark.exporters

U = 3.0
SIZE = 32
"""Of the images: the forms are not run but for calibration."""

CONVOLUTIONS = {"Conv", "FusedConv", "ConvInteger", "QLinearConv"}

Numbers = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Original:
    """A network, its two TorchScript exports, and the names that tell which node is which module.

    Attributes:
        net: In eval(), on the CPU.
        kept: The export with its BNs.
        folded: The export as it is by default.
        names: Node → module, for the convolutions and BNs of ``kept``.
        behind: Conv2d → the BN right behind it, by module name.
        order: Position of each module in the order of definition.
        absorbed: BNs that are no layer of their own once folded: another BN judges their convolution then.
        reference: The scan of ``kept``, by BN.
    """

    net: torch.nn.Module
    kept: Path
    folded: Path
    names: dict[str, str]
    behind: dict[str, str]
    order: dict[str, int]
    absorbed: set[str]
    reference: dict[str, onnx_clp.Layer]


# The first BN of a DenseNet is folded, and its convolution reaches the BNs of the first block: those judge it.
NETWORKS: dict[str, tuple[Callable[[], torch.nn.Module], set[str]]] = {
    "resnet": (short_resnet, set()),
    "densenet": (short_densenet, {"features.norm0"}),
}


@pytest.fixture(scope="module", params=NETWORKS)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Original:
    make, absorbed = NETWORKS[request.param]
    net = randomise(make(), tiny_variances=False)
    folder = tmp_path_factory.mktemp(request.param)
    kept = export(net, folder / "kept.onnx", SIZE, fold=False)
    nodes = onnx.load(kept).graph.node
    names = {node.name: node.input[1].removesuffix(".weight") for node in nodes if is_judged(node)}
    return Original(
        net=net,
        kept=kept,
        folded=export(net, folder / "folded.onnx", SIZE, fold=True),
        names=names,
        behind={conv: bn for bn, conv in convolution_behind(net).items()},
        order={name: i for i, (name, _) in enumerate(net.named_modules())},
        absorbed=absorbed,
        reference={names[layer.name]: layer for layer in onnx_clp.scan(kept, U).layers},
    )


def is_judged(node: onnx.NodeProto) -> bool:
    return node.op_type in CONVOLUTIONS or node.op_type == "BatchNormalization"


# -- the forms ---------------------------------------------------------------------------------------------------------


def kept(original: Original, _: Path) -> Path:
    return original.kept


def folded(original: Original, _: Path) -> Path:
    return original.folded


def dynamo(original: Original, path: Path) -> Path:
    pytest.importorskip("onnxscript")
    export(original.net, path, SIZE, fold=True, dynamo=True)
    assert path.with_name(path.name + ".data").exists()  # external data, as the exporter does by default
    return path


def half(source: Path, path: Path) -> Path:
    """``source`` with every float32 in float16."""
    model = onnx.load(source)
    graph = model.graph
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    del graph.value_info[:]
    onnx.save(model, path)
    return path


def slim(source: Path, path: Path) -> Path:
    onnxslim = pytest.importorskip("onnxslim")
    onnx.save(onnxslim.slim(str(source)), path)
    return path


def simplified(source: Path, path: Path) -> Path:
    onnxsim = pytest.importorskip("onnxsim")
    model, checked = onnxsim.simplify(str(source))
    assert checked
    onnx.save(model, path)
    return path


def saved(source: Path, path: Path, level: str) -> Path:
    """``source`` as onnxruntime saves it after its optimisations of ``level``."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # it warns that the file may not fit other machines
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    return path


def quantised(source: Path, path: Path, form: str, *, per_channel: bool) -> Path:
    """``source`` in int8, the activations calibrated on one random image."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    image = np.random.default_rng(0).standard_normal((1, 3, SIZE, SIZE)).astype(np.float32)

    class Images(quantization.CalibrationDataReader):  # type: ignore[name-defined]  # a module that may be missing
        def __init__(self) -> None:
            self.left: Iterator[dict[str, Any]] = iter([{"x": image}])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.left, None)

    quantization.quantize_static(
        str(source),
        str(path),
        Images(),
        quant_format=getattr(quantization.QuantFormat, form),
        per_channel=per_channel,
        weight_type=quantization.QuantType.QInt8,
    )
    return path


def integer(source: Path, path: Path) -> Path:
    quantization = pytest.importorskip("onnxruntime.quantization")
    quantization.quantize_dynamic(str(source), str(path), weight_type=quantization.QuantType.QUInt8)
    return path


@dataclass(frozen=True)
class Form:
    """A way to write a network.

    Attributes:
        build: Writes it, and says where.
        rounding: How its weights are rounded, see `relative_errors`.
        folds: Whether BNs right behind a convolution are folded into it.
        rounds_gamma: Whether the γ of the BNs that are left are rounded to int8 too.
        operators: Operators that must be in the file: what this form is about.
        only: The one network it is for; empty for all.
    """

    build: Callable[[Original, Path], Path]
    rounding: str = "float32"
    folds: bool = True
    rounds_gamma: bool = False
    operators: frozenset[str] = frozenset({"Conv"})
    only: str = ""


FUSED = frozenset({"Conv", "FusedConv"})
QDQ = frozenset({"Conv", "DequantizeLinear"})
FORMS = {
    "kept": Form(kept, folds=False),
    "folded": Form(folded),
    "dynamo": Form(dynamo),
    "half": Form(lambda o, p: half(o.kept, p), "float16", folds=False),
    "folded-half": Form(lambda o, p: half(o.folded, p), "float16"),
    "onnxslim": Form(lambda o, p: slim(o.kept, p)),
    "folded-onnxslim": Form(lambda o, p: slim(o.folded, p)),
    "onnxsim": Form(lambda o, p: simplified(o.kept, p)),
    "folded-onnxsim": Form(lambda o, p: simplified(o.folded, p)),
    "saved-basic": Form(lambda o, p: saved(o.kept, p, "BASIC")),
    "saved-extended": Form(lambda o, p: saved(o.kept, p, "EXTENDED"), operators=FUSED),
    "folded-saved-extended": Form(lambda o, p: saved(o.folded, p, "EXTENDED"), operators=FUSED),
    "qdq-tensor": Form(
        lambda o, p: quantised(o.folded, p, "QDQ", per_channel=False), "int8-tensor", rounds_gamma=True, operators=QDQ
    ),
    "qdq-channel": Form(
        lambda o, p: quantised(o.folded, p, "QDQ", per_channel=True), "int8-channel", rounds_gamma=True, operators=QDQ
    ),
    # Of a DenseNet onnxruntime writes its own QLinearConcat, see test_what_cannot_be_judged_is_skipped.
    "qlinear-tensor": Form(
        lambda o, p: quantised(o.folded, p, "QOperator", per_channel=False),
        "int8-tensor",
        operators=frozenset({"QLinearConv"}),
        only="resnet",
    ),
    "qlinear-channel": Form(
        lambda o, p: quantised(o.folded, p, "QOperator", per_channel=True),
        "int8-channel",
        operators=frozenset({"QLinearConv"}),
        only="resnet",
    ),
    "integer": Form(lambda o, p: integer(o.folded, p), "uint8-tensor", operators=frozenset({"ConvInteger"})),
}


# -- how far a form may move a bound -----------------------------------------------------------------------------------

ACCURACY = 1e-5
"""Of a bound itself: kernels in float32 are multiplied in float32, see onnx_clp/bounds.py."""

FLOAT32 = ACCURACY + 1e-6
"""Folding computes W·γ/√(var + ε) in float32: four roundings of 2⁻²⁴ per weight at most. An error of share e in every
weight moves σ_max by ‖E‖_F ≤ e·‖A‖_F ≤ e·√rank·σ_max, and the rank of a 3×3 or a 7×7×3 kernel is 9 at most: 7.2e-7."""

FLOAT16 = ACCURACY + 6 * 2.0**-11
"""A weight is rounded by 2⁻¹¹ of itself, which moves σ_max by √9 times that, see above; γ by 2⁻¹¹; var by 2⁻¹¹, of
which the root takes half. At most two BNs in a row: 3 + 2·1.5. (The weights below 6e-5, which float16 rounds to
multiples of 2⁻²⁴, are too few and too small to be seen in σ_max.)"""


def relative_errors(original: Original, rounding: str, convolution: str) -> Numbers:
    """By how much ``rounding`` may move the bound of each channel of a convolution, as a share of it.

    Integers of step s move a weight by s/2 at most, and σ_max by ‖E‖_F ≤ √(weights of the channel)·s/2. The step is
    max|W|/127 over the tensor or the channel. For uint8 with a zero point it is (max − min)/255, which is less, but the
    rounding of the zero point moves the ends by up to s/2 more. Zero stays zero in all of them.
    """
    kernel = folded_kernels(original)[convolution]
    if rounding in {"float32", "float16"}:
        return np.full(len(kernel), FLOAT32 if rounding == "float32" else FLOAT16)
    rows = np.abs(kernel.reshape(len(kernel), -1)).astype(np.float64)
    largest = rows.max(axis=1) if rounding == "int8-channel" else np.full(len(rows), rows.max())
    step = largest / 127 * (1 if rounding == "uint8-tensor" else 0.5)
    sigmas = naive.bounds(kernel)
    moved = np.sqrt(rows.shape[1]) * step
    return np.asarray(np.divide(moved, sigmas, out=np.zeros_like(moved), where=sigmas > 0) + FLOAT32)


def gamma_errors(original: Original, name: str) -> Numbers:
    """By how much int8 may move each γ of a BN, as a share of it: half a step of max|γ|/127; 0 stays 0."""
    gamma = np.abs(dict(original.net.named_modules())[name].weight.detach().numpy().astype(np.float64))
    return np.asarray(np.divide(gamma.max() / 254, gamma, out=np.zeros_like(gamma), where=gamma > 0))


def folded_kernels(original: Original) -> dict[str, NDArray[np.float32]]:
    """The kernels as the folded export has them, by module."""
    graph = onnx.load(original.folded).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    return {
        original.names[node.name]: numpy_helper.to_array(tensors[node.input[1]])
        for node in graph.node
        if node.op_type == "Conv"
    }


# -- a scan, in the words of the network -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scanned:
    """A layer of a form, and the convolutions that it says its channels come from, in the order of definition."""

    layer: onnx_clp.Layer
    convolutions: tuple[str, ...]


def by_module(original: Original, path: Path, report: onnx_clp.ScanReport) -> dict[str, Scanned]:
    """The layers of a form by the BN that they judge, folded or not; by their convolution where none is behind it."""
    nodes = {node.name: node for node in onnx.load(path, load_external_data=False).graph.node}

    def module(name: str) -> str:
        # The dynamo exporter keeps the names of parameters, the other one, and all that read it, those of nodes.
        known = original.names.get(name.removesuffix("_quant").removesuffix("_output_0"))
        return known or nodes[name].input[1].removesuffix(".weight")

    found = {}
    for layer in report.layers:
        name = module(layer.name)
        key = original.behind.get(name, name)
        assert key not in found
        convolutions = sorted(map(module, layer.operators), key=original.order.__getitem__)
        found[key] = Scanned(layer, tuple(convolutions))
    return found


def assert_all_seen(path: Path, report: onnx_clp.ScanReport) -> None:
    """Every convolution and BN of the file is in a layer or skipped, once."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    seen = {name for layer in report.layers for name in layer.operators} | {part.name for part in report.skipped}
    seen |= {layer.name for layer in report.layers}
    wanted = {node.name for node in nodes if is_judged(node)}
    assert wanted <= seen
    assert not {layer.name for layer in report.layers} & {part.name for part in report.skipped}


def flags(layer: onnx_clp.Layer) -> set[int]:
    return {channel.index for channel in layer.flagged}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_channels_in_every_form(original: Original, form: str, tmp_path: Path) -> None:
    how = FORMS[form]
    if how.only and how.only not in original.kept.parent.name:
        pytest.skip(f"a form of the {how.only}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other tools say about themselves
        path = how.build(original, tmp_path / "model.onnx")
    operators = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
    assert how.operators <= operators
    report = onnx_clp.scan(path, U)
    found = by_module(original, path, report)

    assert_all_seen(path, report)
    assert report.skipped == ()
    assert found.keys() == original.reference.keys() - (original.absorbed if how.folds else set())
    for name, scanned in found.items():
        reference, layer = original.reference[name], scanned.layer
        assert scanned.convolutions == convolutions(original, reference), name
        errors = np.concatenate([relative_errors(original, how.rounding, conv) for conv in scanned.convolutions])
        if how.rounds_gamma and name not in original.behind.values():
            errors += (1 + errors) * gamma_errors(original, name)
        compare(reference, layer, errors, planted(original, name))
        if how.rounding == "float32":  # to the last one
            assert flags(layer) == flags(reference), name


def convolutions(original: Original, layer: onnx_clp.Layer) -> tuple[str, ...]:
    """The convolutions of a layer of the reference, in the order of definition, which is that of concatenation."""
    return tuple(sorted((original.names[name] for name in layer.operators), key=original.order.__getitem__))


def planted(original: Original, name: str) -> set[int]:
    """The outliers planted in a BN; none where it stands behind a concatenation, whose channels differ as much."""
    if name not in original.behind.values():
        return set()
    gamma = dict(original.net.named_modules())[name].weight.detach().numpy()
    return set(np.flatnonzero(gamma >= PLANTED).tolist())


def compare(reference: onnx_clp.Layer, layer: onnx_clp.Layer, errors: Numbers, planted: set[int]) -> None:
    """Compare a layer with that of the reference, as the module's docstring says."""
    wanted, bounds = np.array(reference.bounds), np.array(layer.bounds)
    assert layer.dead == reference.dead
    assert bounds.shape == wanted.shape == errors.shape
    delta = errors * wanted
    off = np.abs(bounds - wanted)
    assert np.all(off <= delta), (layer.name, float(np.max(off - delta)))
    alive = delta[wanted > 0]
    margin = delta + alive.mean() + U * np.linalg.norm(alive) / np.sqrt(alive.size - 1)
    decided = set(np.flatnonzero(np.abs(wanted - reference.threshold) > margin).tolist())
    assert flags(layer) & decided == flags(reference) & decided, layer.name
    assert planted <= flags(reference) & decided, layer.name


def test_the_comparison_sees_one_changed_channel(original: Original, tmp_path: Path) -> None:
    """A proof that the test above can fail: one channel of a folded kernel moves by 1e-4, and only its layer is off."""
    model = onnx.load(original.folded)
    node = [node for node in model.graph.node if original.names.get(node.name) in original.behind][2]
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    kernel = numpy_helper.to_array(tensor).copy()
    kernel[np.argmax(naive.bounds(kernel))] *= 1 + 1e-4
    tensor.CopyFrom(numpy_helper.from_array(kernel, tensor.name))
    onnx.save(model, tmp_path / "model.onnx")

    off = []
    report = onnx_clp.scan(tmp_path / "model.onnx", U)
    for name, scanned in by_module(original, tmp_path / "model.onnx", report).items():
        try:
            compare(original.reference[name], scanned.layer, np.full(scanned.layer.channels, FLOAT32), set())
        except AssertionError:
            off.append(name)
    assert off == [original.behind[original.names[node.name]]]


@pytest.mark.parametrize("source", ["kept", "folded"])
def test_blocked_layouts_are_skipped_not_missing(original: Original, source: str, tmp_path: Path) -> None:
    """A graph saved with all optimisations holds its kernels in blocks that suit one processor: each is skipped."""
    path = saved(getattr(original, source), tmp_path / "model.onnx", "ALL")
    nodes = onnx.load(path).graph.node
    blocked = [node.name for node in nodes if node.domain == "com.microsoft.nchwc" and node.op_type == "Conv"]
    if not blocked:
        pytest.skip("onnxruntime has no blocked layout for this processor")
    report = onnx_clp.scan(path, U)
    assert_all_seen(path, report)
    convolutions = [part for part in report.skipped if part.operator == "com.microsoft.nchwc.Conv"]
    assert Counter(part.name for part in convolutions) == Counter(blocked)
    assert {part.reason for part in convolutions} == {"custom-operator"}
    assert not report.analysed


def test_bns_behind_an_unknown_concatenation_are_skipped(original: Original, tmp_path: Path) -> None:
    """In a quantised DenseNet BNs stand behind com.microsoft.QLinearConcat: they are skipped with its name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = quantised(original.folded, tmp_path / "model.onnx", "QOperator", per_channel=True)
    report = onnx_clp.scan(path, U)
    assert_all_seen(path, report)
    nodes = onnx.load(path).graph.node
    left = [node.name for node in nodes if node.op_type == "BatchNormalization"]
    assert [part.name for part in report.skipped] == left
    assert all("QLinearConcat" in part.detail for part in report.skipped)
