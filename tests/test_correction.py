"""What a correction writes: the written file has the moments of the original, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from jsonschema import Draft202012Validator
from numpy.typing import NDArray
from onnx import helper, numpy_helper

import onnx_clp
from onnx_clp import SanitizeReport, sanitize
from onnx_clp.analysis import Analysis, analyse
from onnx_clp.cli import run as run_command
from onnx_clp.correction import compare, recipe
from onnx_clp.errors import UsageError, VerificationError
from onnx_clp.model.file import open_model
from onnx_clp.report.json import render_sanitize as as_json
from onnx_clp.report.text import render_sanitize as as_text
from tests import naive_correction
from tests.correction_nets import (
    CORRECTED,
    IMAGES,
    as_constants,
    branching,
    called,
    feeds,
    images,
    in_half,
    of_batch,
    plain,
    quantised,
    saved,
)

pytestmark = pytest.mark.usefixtures("in_this_process")

Array = NDArray[Any]

FINE = 1e-3
"""Of a standard deviation: kernels are rounded to float32, and the whole model is fused otherwise than its stages; each
of some ten layers adds a few 10⁻⁶, a variance may magnify them."""

HALF = 0.03
"""The same of float16: 2⁻¹¹ for each number, some of them sums of a hundred that were rounded on their way."""

LEVELS = 0.1
"""The same where values are rounded to levels of 1/32, of which a different one is met here and there."""


def observed(path: Path) -> Analysis:
    with open_model(path) as file:
        return analyse(file, 3, count_dead=False, name=str(path))


def run(path: Path, batches: list[Array], value: str) -> Array:
    """A value of the model at ``path`` on all batches, from a session of its own."""
    model = onnx.load(path)
    found: list[Array] = naive_correction.outputs(model, batches, [value])
    return found[0]


def assert_given_back(
    source: Path, target: Path, report: SanitizeReport, batches: list[Array], tolerance: float = FINE
) -> int:
    """Mean and standard deviation of every corrected channel are those of the original; how many were compared.

    Channels that do not vary, in one of the two, are not compared: behind a Relu a few may be at rest on all images.
    """
    assert report.correction is not None
    silenced = {part.layer: set(part.channels) for part in report.silenced}
    corrected = {part.layer: part for part in report.correction.corrected}
    analysis = observed(source)
    compared = 0
    for part in analysis.measured:
        name = part.site.node.name
        if name not in corrected:
            continue
        value = analysis.graph.name_of(part.site.output)
        (m, q), (m1, q1) = (
            naive_correction.moments(run(path, batches, value), part.site.axis) for path in (source, target)
        )
        before, after = q > 1e-6 * (m**2 + q), q1 > 1e-9 * q
        assert after[before].mean() > 0.7
        alive = before & after
        aside = silenced.get(name, set()) | set(corrected[name].clamped)
        kept = np.setdiff1d(np.flatnonzero(alive), list(aside))
        std = np.sqrt(q)[kept]
        assert (np.abs(m1 - m)[kept] <= tolerance * std).all(), name
        assert (np.abs(np.sqrt(q1)[kept] - std) <= tolerance * std).all(), name
        compared += len(kept)
    return compared


def corrected(path: Path, folder: Path, **options: Any) -> tuple[Path, SanitizeReport]:  # noqa: ANN401
    target = folder / "out" / "sanitized.onnx"
    target.parent.mkdir(exist_ok=True)
    return target, sanitize(path, target, **{"images": images(), "max_share": 1.0, **options})


def reasons(report: SanitizeReport) -> dict[str, str]:
    assert report.correction is not None
    return {part.layer: part.reason for part in report.correction.left}


# ---- the moments are given back


@pytest.mark.parametrize("net", CORRECTED)
def test_the_moments_of_every_later_layer_are_those_of_the_original(net: str, tmp_path: Path) -> None:
    path = saved(CORRECTED[net](), tmp_path)
    target, report = corrected(path, tmp_path)
    assert assert_given_back(path, target, report, feeds(images())) >= 15
    assert report.silenced
    assert not reasons(report)
    assert report.checks[-1].name == "images"
    assert report.checks[-1].passed


@pytest.mark.parametrize("net", ["residual", "plain", "transposed", "shared", "derived"])
def test_the_same_of_weights_in_constant_nodes(net: str, tmp_path: Path) -> None:
    path = saved(as_constants(CORRECTED[net]()), tmp_path)
    target, report = corrected(path, tmp_path)
    assert assert_given_back(path, target, report, feeds(images())) >= 15
    assert not reasons(report)


@pytest.mark.parametrize("net", ["residual", "plain", "shared"])
def test_the_same_of_external_data(net: str, tmp_path: Path) -> None:
    path = saved(CORRECTED[net](), tmp_path, external=True)
    target, report = corrected(path, tmp_path)
    assert assert_given_back(path, target, report, feeds(images())) >= 15
    assert not reasons(report)


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("net", ["residual", "plain"])
def test_the_same_of_models_that_take_a_fixed_number_of_images(net: str, size: int, tmp_path: Path) -> None:
    path = saved(of_batch(CORRECTED[net](), size), tmp_path)
    target, report = corrected(path, tmp_path)
    assert report.correction is not None
    count = IMAGES // size * size
    assert report.correction.images.count == count
    assert assert_given_back(path, target, report, feeds(images()[:count], size=size)) >= 15


@pytest.mark.parametrize("net", ["plain", "residual", "transposed"])
def test_the_same_of_float16(net: str, tmp_path: Path) -> None:
    path = saved(in_half(CORRECTED[net]()), tmp_path)
    target, report = corrected(path, tmp_path)
    assert assert_given_back(path, target, report, feeds(images(), np.float16), HALF) >= 15
    assert not reasons(report)


def test_the_same_of_kernels_quantised_per_channel(tmp_path: Path) -> None:
    path = saved(quantised(CORRECTED["depthwise"]()), tmp_path)
    target, report = corrected(path, tmp_path)
    assert assert_given_back(path, target, report, feeds(images()), LEVELS) >= 15
    assert not reasons(report)


def test_factors_of_a_folded_quantised_kernel_go_into_its_scales(tmp_path: Path) -> None:
    path = saved(quantised(plain()), tmp_path)
    target, report = corrected(path, tmp_path)
    assert assert_given_back(path, target, report, feeds(images()), LEVELS) >= 15
    assert not reasons(report)
    before, after = (
        {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(each).graph.initializer}
        for each in (path, target)
    )
    scaled = [name for name in before if name.endswith(".s") and not np.array_equal(before[name], after[name])]
    kernels = [name for name, array in before.items() if array.dtype == np.int8 and array.ndim == 4]
    assert len(scaled) == 2  # the first kernel sees nothing that was changed
    for name in kernels:  # levels change to 0 in silenced channels alone
        changed = np.argwhere((before[name] != after[name]).any((1, 2, 3))).ravel()
        assert (after[name][changed] == 0).all()
        assert len(changed) <= 1


def test_a_folded_kernel_with_one_scale_for_all_channels_is_left_and_said(tmp_path: Path) -> None:
    path = saved(quantised(plain(), per_channel=False), tmp_path)
    _, report = corrected(path, tmp_path)
    assert report.silenced
    assert report.correction is not None
    assert not report.correction.corrected
    assert set(reasons(report).values()) == {"one scale of its kernel is that of several channels"}


def tied(*, one_node: bool) -> onnx.ModelProto:
    """Two convolutions of one quantised kernel: by a DequantizeLinear each, or by one for both."""
    model = quantised(plain())
    second, third = (node for node in model.graph.node if node.name in {"Conv2", "Conv4"})
    kernel = second.input[1].removesuffix(".dq")
    for node in model.graph.node:
        if node.output[0] == third.input[1]:
            node.input[:] = [kernel, f"{kernel}.s", f"{kernel}.z"]
    if one_node:
        third.input[1] = second.input[1]
    return model


def test_a_scale_of_two_kernels_is_unshared(tmp_path: Path) -> None:
    path = saved(tied(one_node=False), tmp_path)
    target, report = corrected(path, tmp_path)
    assert not reasons(report)
    assert any(name.endswith(".s") for name in report.unshared)
    assert assert_given_back(path, target, report, feeds(images()), LEVELS) >= 15


def test_a_quantised_kernel_of_two_convolutions_is_left_and_said(tmp_path: Path) -> None:
    path = saved(tied(one_node=True), tmp_path)
    _, report = corrected(path, tmp_path)
    assert reasons(report) == dict.fromkeys(
        ("Conv2", "Conv4"), "the quantised kernel of it is that of something else too"
    )


def test_two_calls_measure_the_same(tmp_path: Path) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    one, _ = corrected(path, tmp_path)
    first = one.read_bytes()
    two, _ = corrected(path, tmp_path, force=True)
    assert two.read_bytes() == first


# ---- what is not seen or cannot be written


def test_a_function_that_is_called_twice_is_silenced_and_not_corrected(tmp_path: Path) -> None:
    path = saved(called(), tmp_path)
    target, report = corrected(path, tmp_path)
    inside = [part.layer for part in report.silenced if "block" in part.layer]
    assert len(inside) == 2
    assert set(reasons(report)) == set(inside)
    assert assert_given_back(path, target, report, feeds(images())) >= 10


def test_a_channel_that_is_silenced_where_nothing_can_be_observed_shifts_what_comes_after(tmp_path: Path) -> None:
    path = saved(branching(), tmp_path)
    target, report = corrected(path, tmp_path)
    inside = [part.layer for part in report.silenced if "branch" in part.layer]
    assert len(inside) == 2
    assert assert_given_back(path, target, report, feeds(images())) >= 15
    assert {layer for layer in reasons(report) if "branch" in layer} == set(inside)
    assert "cannot be observed" in reasons(report)[inside[0]]


def test_where_a_correction_overflows_float16_the_site_is_left_and_what_follows_is_measured_behind_it(
    tmp_path: Path,
) -> None:
    """Kernels as large as float16 goes: any factor above 1 is too much, and silencing the loudest asks for such."""
    model = in_half(plain())
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    first, second = (node.input[1] for node in model.graph.node if node.name in {"Conv0", "Conv2"})
    loud, W = (numpy_helper.to_array(tensors[name]).astype(np.float32) for name in (first, second))
    W *= 60000 / np.abs(W).max((1, 2, 3), keepdims=True)
    for name, array in ((first, loud * 2.0**-14), (second, W)):
        tensors[name].CopyFrom(numpy_helper.from_array(array.astype(np.float16), name))
    path = saved(model, tmp_path)
    target, report = corrected(path, tmp_path)
    assert reasons(report) == {"Conv2": "a corrected number does not fit float16"}
    assert report.correction is not None
    assert [part.layer for part in report.correction.corrected] == ["Conv4"]
    assert assert_given_back(path, target, report, feeds(images(), np.float16), HALF) >= 15


def test_nothing_silenced_changes_nothing(tmp_path: Path) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    target, report = corrected(path, tmp_path, u=50, metadata=False)
    assert report.correction is not None
    assert not report.correction.corrected
    assert not report.correction.left
    assert target.read_bytes() == path.read_bytes()


def test_a_dry_run_measures_and_writes_nothing(tmp_path: Path) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    _, written = corrected(path, tmp_path)
    report = sanitize(path, tmp_path / "dry.onnx", images=images(), max_share=1.0, dry_run=True)
    assert report.correction == written.correction
    assert not (tmp_path / "dry.onnx").exists()


def test_the_input_stays_what_it_is_where_weights_are_not_corrected(tmp_path: Path) -> None:
    """Only constants of corrected and silenced layers differ: every other initializer has its bytes."""
    path = saved(CORRECTED["dense"](), tmp_path)
    target, report = corrected(path, tmp_path)
    assert report.correction is not None
    layers = {part.layer for part in report.correction.corrected} | {part.layer for part in report.silenced}
    before, after = onnx.load(path), onnx.load(target)
    touched = {name for node in before.graph.node if node.name in layers for name in node.input}
    for old, new in zip(before.graph.initializer, after.graph.initializer, strict=True):
        assert old.name in touched or old == new
    heads = [node for node in before.graph.node if node.op_type == "Gemm"]
    assert all(name not in touched for node in heads for name in node.input[1:])


# ---- folded and not folded


def folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The BNs behind a Conv that nothing else reads folded into it, by the definition of both."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    tensors = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}
    makers = {node.output[0]: node for node in made.graph.node}
    nodes = []
    for node in made.graph.node:
        before = makers.get(node.input[0])
        if node.op_type != "BatchNormalization" or before is None or before.op_type != "Conv":
            nodes.append(node)
            continue
        gamma, beta, mean, var = (tensors[name] for name in node.input[1:5])
        W = tensors[before.input[1]]
        b = tensors[before.input[2]] if len(before.input) > 2 else np.zeros(len(W))
        scale = gamma / np.sqrt(var + 1e-5)
        pair = ((W * scale[:, None, None, None]), (b - mean) * scale + beta)
        names = [f"{node.name}.W", f"{node.name}.b"]
        made.graph.initializer.extend(
            numpy_helper.from_array(np.asarray(array, np.float32), name)
            for array, name in zip(pair, names, strict=True)
        )
        conv = helper.make_node("Conv", [before.input[0], *names], [node.output[0]], before.name)
        conv.attribute.extend(before.attribute)
        nodes[nodes.index(before)] = conv
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    onnx.checker.check_model(made)
    return made


@pytest.mark.parametrize("net", ["residual", "depthwise"])
def test_a_folded_model_is_corrected_to_the_same_function(net: str, tmp_path: Path) -> None:
    outputs = []
    for number, model in enumerate((CORRECTED[net](), folded(CORRECTED[net]()))):
        folder = tmp_path / str(number)
        folder.mkdir()
        target, _ = corrected(saved(model, folder), folder)
        outputs += naive_correction.outputs(onnx.load(target), feeds(images(20, seed=5)))
    assert np.abs(outputs[0] - outputs[1]).max() < FINE * np.abs(outputs[0]).max()
    plain_target = tmp_path / "plain.onnx"
    sanitize(tmp_path / "0" / "model.onnx", plain_target, max_share=1.0)
    (without,) = naive_correction.outputs(onnx.load(plain_target), feeds(images(20, seed=5)))
    assert np.abs(outputs[0] - without).max() > 0.05 * np.abs(outputs[0]).max()


@pytest.mark.exporters
def test_the_exports_of_one_network_are_corrected_to_the_same_function(tmp_path: Path) -> None:
    """BN kept and folded by TorchScript, and folded by dynamo: the same silenced channels, the same outputs."""
    pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    pytest.importorskip("onnxscript")
    from exporters.models import build
    from tests.exported import export, randomise

    size = 32
    net, clean = randomise(build("resnet18", classes=10, channels=3, size=size, width=16)), large_images(12)
    outputs, silenced = [], []
    for name, options in (
        ("kept", {"fold": False}),
        ("folded", {"fold": True}),
        ("dynamo", {"fold": True, "dynamo": True}),
    ):
        path = export(net, tmp_path / f"{name}.onnx", size, **options)
        target = tmp_path / f"{name}.out.onnx"
        report = sanitize(path, target, images=clean, max_share=1.0)
        assert report.correction is not None
        assert len(report.correction.corrected) > 10
        assert not report.correction.left
        silenced.append([part.channels for part in report.silenced])
        outputs.append(run_file(target, feeds(large_images(6, seed=3), size=1)))
    assert silenced[0] == silenced[1] == silenced[2]
    for other in outputs[1:]:
        assert np.abs(outputs[0] - other).max() < EXPORTS * np.abs(outputs[0]).max()


EXPORTS = 0.01
"""Of the largest output: exporters fold a BN in float32, which moves a kernel by 10⁻⁷, and statistics of channels that
hardly vary magnify it, layer by layer."""


def large_images(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return images(count, seed).repeat(4, 1).repeat(4, 2)


def run_file(path: Path, batches: list[Array]) -> Array:
    """The first output of the model at ``path``, with external data or without."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: batch})[0] for batch in batches])


# ---- verification


def test_a_file_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    whole = recipe.Recipe.wanted

    def wrong(self: recipe.Recipe, found: Any, silenced: Any, rests: Any) -> Any:  # noqa: ANN401
        return whole(self, type(found)(found.factors, found.shifts + 0.5, found.clamped), silenced, rests)

    monkeypatch.setattr(recipe.Recipe, "wanted", wrong)
    with pytest.raises(VerificationError, match="other outputs than were simulated"):
        corrected(path, tmp_path)
    assert not (tmp_path / "out" / "sanitized.onnx").exists()


def test_a_bound_that_is_not_the_old_one_times_its_factor_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    whole = recipe.Recipe.wanted

    def wrong(self: recipe.Recipe, found: Any, silenced: Any, rests: Any) -> Any:  # noqa: ANN401
        return whole(self, type(found)(found.factors * 0.9, found.shifts, found.clamped), silenced, rests)

    monkeypatch.setattr(recipe.Recipe, "wanted", wrong)
    with pytest.raises(VerificationError, match="is not what its correction makes of it"):
        corrected(path, tmp_path)


def test_rounding_is_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    monkeypatch.setattr(compare, "FINE", 0.0)
    with pytest.raises(VerificationError, match="other outputs"):  # the bound of rounding is needed
        corrected(path, tmp_path)


# ---- reports


@pytest.mark.parametrize("make", [CORRECTED["residual"], CORRECTED["plain"], branching, called])
def test_a_report_fits_its_schema_and_says_what_was_done(make: Callable[[], onnx.ModelProto], tmp_path: Path) -> None:
    path = saved(make(), tmp_path)
    _, report = corrected(path, tmp_path, images=images(20))
    schema = json.loads((Path(onnx_clp.__file__).parent / "report" / "sanitize-1.schema.json").read_text())
    document = json.loads(as_json(report))
    Draft202012Validator(schema).validate(document)
    found = document["correction"]
    assert found["images"]["count"] == 20
    assert found["agreement"]["total"] == 20
    assert report.correction is not None
    assert len(found["corrected"]) == len(report.correction.corrected) > 0
    text = as_text(report)
    assert "only 20 images" in text
    assert f"{report.correction.channels} channels in {len(report.correction.corrected)} layer" in text
    if make in {branching, called}:
        assert "cannot be observed" in text
    if make is CORRECTED["plain"]:
        assert "a bias to 2 convolutions without one" in text


def test_the_note_says_on_how_many_images(tmp_path: Path) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    target, report = corrected(path, tmp_path)
    note = {entry.key: entry.value for entry in onnx.load(target).metadata_props}
    assert note["onnx_clp.images"] == str(IMAGES)
    assert report.correction is not None
    assert json.loads(note["onnx_clp.corrected"]) == [part.layer for part in report.correction.corrected]


# ---- options


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"images": images(1)}, "holds 1 image"),
        ({"num_images": 1}, "number of images is 1"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"images": None, "size": (8, 8)}, "--size goes with --images"),
        ({"images": None, "value_range": (0.0, 1.0)}, "--range goes with --images"),
        ({"images": None, "num_images": 5}, "--num-images goes with --images"),
        ({"images": images(4)[:, :, :, :2]}, "uint8"),
        ({"images": "nowhere"}, "is not there"),
        ({"output_name": "nothing"}, "has no output 'nothing'"),
        ({"providers": ["nothing"]}, "no execution provider"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    path = saved(CORRECTED["plain"](), tmp_path)
    with pytest.raises(UsageError, match=complaint):
        corrected(path, tmp_path, **options)


def test_a_model_that_takes_more_images_than_there_are_is_refused(tmp_path: Path) -> None:
    path = saved(of_batch(CORRECTED["plain"](), 8), tmp_path)
    with pytest.raises(UsageError, match="takes 8 images at once, and there are 7"):
        corrected(path, tmp_path, images=images(7))


def test_the_command_says_what_was_corrected_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    np.save(tmp_path / "clean.npy", images())
    target, form = tmp_path / "out.onnx", ["--format", "json", "--max-share", "100%"]
    assert run_command(["sanitize", str(path), str(target), "--images", str(tmp_path / "clean.npy"), *form]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["correction"]["images"]["kind"] == "arrays"
    assert document["correction"]["corrected"]
    other, report = corrected(path, tmp_path, metadata=False)
    assert report.correction is not None
    weights = [{t.name: t.raw_data for t in onnx.load(each).graph.initializer} for each in (target, other)]
    assert weights[0] == weights[1]


def test_the_command_takes_the_preprocessing_and_a_part_of_the_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    np.save(tmp_path / "clean.npy", images())
    said = ["--mean", "0.5", "--std", "0.2,0.3,0.4", "--range", "0,1", "--num-images", "16", "--seed", "3", "-q"]
    arguments = ["sanitize", str(path), str(tmp_path / "out.onnx"), "--images", str(tmp_path / "clean.npy"), *said]
    assert (
        run_command([*arguments, "--max-share", "100%", "-o", str(tmp_path / "report.json"), "--format", "json"]) == 0
    )
    assert capsys.readouterr().out == ""
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["correction"]["images"] | {"path": "", "used": ""} == {
        "path": "", "kind": "arrays", "used": "", "count": 16, "available": IMAGES, "seed": 3,
    }  # fmt: skip
    assert document["correction"]["preprocessing"]["std"] == [0.2, 0.3, 0.4]
    drawn = np.sort(np.random.default_rng(3).permutation(IMAGES)[:16])
    x = (feeds(images()[drawn])[0] - 0.5) / np.array([0.2, 0.3, 0.4], np.float32)[:, None, None]
    report = sanitize(
        path, tmp_path / "same.onnx", max_share=1.0, images=images(), num_images=16, seed=3, mean=(0.5,),
        std=(0.2, 0.3, 0.4),
    )  # fmt: skip
    assert assert_given_back(path, tmp_path / "out.onnx", report, [x]) >= 15


@pytest.mark.parametrize("option", ["OUT", "-o"])
def test_the_command_overwrites_no_images(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, clean = saved(CORRECTED["residual"](), tmp_path), tmp_path / "clean.npy"
    np.save(clean, images())
    before = clean.read_bytes()
    target = [str(clean)] if option == "OUT" else [str(tmp_path / "out.onnx"), "-o", str(clean)]
    assert run_command(["sanitize", str(path), *target, "--images", str(clean), "--force"]) == 2
    assert "would overwrite" in capsys.readouterr().err
    assert clean.read_bytes() == before
