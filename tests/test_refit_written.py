"""What a refit writes: the written file gives what was simulated, by whatever way its numbers are stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from jsonschema import Draft202012Validator
from numpy.typing import NDArray
from onnx import numpy_helper

import onnx_clp
from onnx_clp import SanitizeReport, sanitize
from onnx_clp.correction import corrector, recipe, repair
from onnx_clp.correction.source import with_copies
from onnx_clp.errors import UsageError, VerificationError
from onnx_clp.report.json import render_sanitize as as_json
from onnx_clp.report.text import render_sanitize as as_text
from tests import naive_correction
from tests.channel_nets import Net
from tests.correction_nets import (
    CORRECTED,
    IMAGES,
    as_constants,
    branching,
    called,
    feeds,
    images,
    in_half,
    quantised,
    saved,
)
from tests.test_correction import FINE, HALF, assert_given_back, folded

pytestmark = pytest.mark.usefixtures("in_this_process")

Array = NDArray[Any]


@pytest.fixture(autouse=True)
def few_positions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images of these tests are few, and every kernel is to be refitted; but for the test of that rule."""
    if "positions" not in request.node.name:
        monkeypatch.setattr(repair, "LEAST_POSITIONS", 0)


def refitted(path: Path, folder: Path, **options: Any) -> tuple[Path, SanitizeReport]:  # noqa: ANN401
    target = folder / "out" / "sanitized.onnx"
    target.parent.mkdir(exist_ok=True)
    given = {"images": images(), "max_share": 1.0, "repair": "refit", "augment": 0, **options}
    return target, sanitize(path, target, **given)


def kept(report: SanitizeReport) -> dict[str, str]:
    assert report.correction is not None
    return {part.layer: part.reason for part in report.correction.kept}


def fitted(report: SanitizeReport) -> list[str]:
    assert report.correction is not None
    return [part.layer for part in report.correction.refitted]


def scores(path: Path, batches: list[Array]) -> Array:
    (found,) = naive_correction.outputs(onnx.load(path), batches)
    return found


@pytest.mark.parametrize(
    ("net", "stored"),
    [
        *((net, "initializers") for net in ("residual", "dense", "plain", "preact", "summands", "derived", "shuffled")),
        *((net, "constants") for net in ("residual", "plain", "shared", "derived")),
        *((net, "external") for net in ("plain", "preact", "shared")),
    ],
)
def test_every_convolution_is_refitted_and_the_moments_are_given_back(net: str, stored: str, tmp_path: Path) -> None:
    model = CORRECTED[net]()
    path = saved(as_constants(model) if stored == "constants" else model, tmp_path, external=stored == "external")
    target, report = refitted(path, tmp_path)
    convolutions = [node.name for node in model.graph.node if node.op_type == "Conv"]
    assert sorted([*fitted(report), *kept(report)]) == sorted(convolutions)
    assert set(kept(report).values()) <= {"it has groups"}
    assert assert_given_back(path, target, report, feeds(images())) >= 15
    assert report.silenced
    assert {check.name for check in report.checks if check.passed} >= {"scan", "images"}


@pytest.mark.parametrize("net", ["plain", "residual", "preact"])
def test_the_same_of_float16(net: str, tmp_path: Path) -> None:
    path = saved(in_half(CORRECTED[net]()), tmp_path)
    target, report = refitted(path, tmp_path)
    assert len(fitted(report)) >= 3
    assert assert_given_back(path, target, report, feeds(images(), np.float16), HALF) >= 15


def test_kernels_are_refitted_where_nothing_is_flagged_and_the_report_says_so(tmp_path: Path) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    target, report = refitted(path, tmp_path, u=50)
    assert not report.silenced
    assert len(fitted(report)) == 7
    assert target.read_bytes() != path.read_bytes()
    text = as_text(report)
    assert "7 kernels, flagged or not" in text
    assert report.correction is not None
    assert report.correction.agreement is not None
    assert all(part.change > 0 for part in report.correction.refitted)


def test_no_repair_changes_what_silencing_alone_changes(tmp_path: Path) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    target, report = refitted(path, tmp_path, repair="none", metadata=False)
    plain = tmp_path / "plain.onnx"
    sanitize(path, plain, max_share=1.0, metadata=False)
    assert target.read_bytes() == plain.read_bytes()
    assert report.correction is not None
    assert report.correction.agreement is not None
    assert not (*report.correction.corrected, *report.correction.left, *fitted(report))


@pytest.mark.parametrize("net", ["residual", "depthwise"])
@pytest.mark.parametrize("u", [3, 50])
def test_a_folded_model_is_refitted_to_the_same_function(net: str, u: float, tmp_path: Path) -> None:
    outputs = []
    for number, model in enumerate((CORRECTED[net](), folded(CORRECTED[net]()))):
        folder = tmp_path / str(number)
        folder.mkdir()
        target, report = refitted(saved(model, folder), folder, u=u)
        assert len(fitted(report)) >= 5
        outputs.append(scores(target, feeds(images(20, seed=5))))
    # As of statistics alone: kernels are rounded to float32 once more, and fused otherwise.
    assert np.abs(outputs[0] - outputs[1]).max() < FINE * np.abs(outputs[0]).max()


def scaled(model: onnx.ModelProto, factor: float) -> onnx.ModelProto:
    """Channel 3 of the first layer times ``factor``, and what the second reads of it by as much less; through Relu."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    tensors = {tensor.name: tensor for tensor in made.graph.initializer}
    first, second = [node for node in made.graph.node if node.op_type == "Conv"][:2]
    for name, chosen, by in (
        (first.input[1], (3,), factor),
        (second.input[1], (slice(None), 3), 1 / factor),
    ):
        array = numpy_helper.to_array(tensors[name]).copy()
        array[chosen] *= by
        tensors[name].CopyFrom(numpy_helper.from_array(array, name))
    return made


@pytest.mark.parametrize("factor", [2.0**-10, 2.0**10])
def test_a_model_whose_channels_were_scaled_is_refitted_to_the_same_function(factor: float, tmp_path: Path) -> None:
    outputs = []
    for number, model in enumerate((CORRECTED["plain"](), scaled(CORRECTED["plain"](), factor))):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = saved(model, folder)
        target, _ = refitted(path, folder, u=50)  # by bounds other channels would be flagged
        outputs.append((scores(path, feeds(images(20, seed=5))), scores(target, feeds(images(20, seed=5)))))
    (before, after), (before_scaled, after_scaled) = outputs
    assert np.abs(before - before_scaled).max() < 1e-5 * np.abs(before).max()  # float32, by powers of two
    assert np.abs(after - after_scaled).max() < FINE * np.abs(after).max()
    assert np.abs(after - before).max() > 0.01 * np.abs(before).max()  # and the refit changed something


def test_what_silenced_channels_gave_is_read_with_no_weight(tmp_path: Path) -> None:
    path = saved(CORRECTED["plain"](), tmp_path)
    target, report = refitted(path, tmp_path)
    silenced = {part.layer: part.channels for part in report.silenced}
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(target).graph.initializer}
    nodes = [node for node in onnx.load(target).graph.node if node.op_type == "Conv"]
    for one, next_one in pairwise(nodes):
        channels = list(silenced.get(one.name, ()))
        assert (tensors[one.input[1]][channels] == 0).all()
        assert (tensors[next_one.input[1]][:, channels] == 0).all()
    assert silenced


# ---- what is left


def gated() -> onnx.ModelProto:
    """A convolution whose channels are multiplied by what two convolutions make of their means."""
    net, n = Net(), 16
    x = net.op("Relu", net.conv("x", 3, n))
    pooled = net.op("Relu", net.conv(net.op("GlobalAveragePool", x), n, 4, k=1))
    x = net.op("Mul", x, net.op("Sigmoid", net.conv(pooled, 4, n, k=1)))
    return net.head(net.op("Relu", net.conv(x, n, n)), n)


@pytest.mark.parametrize(
    ("model", "reasons"),
    [
        (CORRECTED["depthwise"], {"it has groups"}),
        (CORRECTED["transposed"], {"ConvTranspose is not refitted, only Conv is"}),
        (lambda: quantised(CORRECTED["plain"]()), {"its kernel or bias is quantised"}),
        (called, {"it is in a subgraph or a function, whose values cannot be observed"}),
        (branching, {"it is in a subgraph or a function, whose values cannot be observed"}),
        (gated, {"it works on pooled values, of which each image gives one"}),
    ],
)
def test_what_is_no_convolution_to_refit_is_left_and_said(
    model: Callable[[], onnx.ModelProto], reasons: set[str], tmp_path: Path
) -> None:
    path = saved(model(), tmp_path)
    _, report = refitted(path, tmp_path)
    assert set(kept(report).values()) == reasons
    assert next(iter(reasons)) in as_text(report)


def test_where_a_kernel_overflows_float16_it_is_left_and_what_follows_is_fitted_behind_it(tmp_path: Path) -> None:
    """Images that hardly vary in one channel of three, of which a kernel makes much: a share less is still too much."""
    model = in_half(CORRECTED["plain"]())
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    first, second = (node.input[1] for node in model.graph.node if node.name in {"Conv0", "Conv2"})
    loud, W = (numpy_helper.to_array(tensors[name]).astype(np.float32) for name in (first, second))
    W *= 65500 / np.abs(W).max((1, 2, 3), keepdims=True)
    for name, array in ((first, loud * 2.0**-14), (second, W)):
        tensors[name].CopyFrom(numpy_helper.from_array(array.astype(np.float16), name))
    path = saved(model, tmp_path)
    _, report = refitted(path, tmp_path, ridge=1e-6)
    assert kept(report) == {"Conv2": "a corrected number does not fit float16"}
    assert fitted(report) == ["Conv0", "Conv4"]


# ---- that nothing written is trusted


def test_a_kernel_that_is_not_what_was_fitted_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    kernel = recipe.written_kernel
    monkeypatch.setattr(corrector, "written_kernel", lambda *given: kernel(*given) * np.float32(1.001))
    with pytest.raises(VerificationError, match="not the one that was fitted"):
        refitted(path, tmp_path)
    assert not (tmp_path / "out" / "sanitized.onnx").exists()


def test_a_bias_that_is_not_what_was_fitted_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    whole = recipe.with_refit

    def wrong(changes: Any, part: Any, found: Any, *rest: Any) -> Any:  # noqa: ANN401  # as with_refit
        return whole(changes, part, type(found)(found.kernel, found.bias + 0.1, found.change), *rest)

    monkeypatch.setattr(corrector, "with_refit", wrong)
    with pytest.raises(VerificationError, match="gives other outputs than were simulated"):
        refitted(path, tmp_path)


# ---- options and reports


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"repair": "both"}, "there is no repair 'both'"),
        ({"repair": "statistics", "ridge": 0.1}, "--ridge goes with --repair refit"),
        ({"ridge": 0.0}, "the ridge is 0.0"),
        ({"ridge": float("nan")}, "the ridge is nan"),
        ({"augment": -1}, "-1 copies"),
        ({"images": None, "augment": None}, "--repair goes with --images"),
        ({"images": None, "augment": None, "repair": "statistics", "score": "activity"}, "--score activity goes with"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = saved(CORRECTED["plain"](), tmp_path)
    with pytest.raises(UsageError, match=words):
        refitted(path, tmp_path, **options)


def test_the_report_as_json_fits_its_schema(tmp_path: Path) -> None:
    path = saved(CORRECTED["depthwise"](), tmp_path)
    _, report = refitted(path, tmp_path, score="activity", augment=2, ridge=0.05)
    schema = json.loads((Path(onnx_clp.__file__).parent / "report" / "sanitize-1.schema.json").read_text())
    found = json.loads(as_json(report))
    Draft202012Validator(schema).validate(found)
    correction = found["correction"]
    assert (correction["repair"], correction["ridge"], correction["augment"]) == ("refit", 0.05, 2)
    assert len(correction["refitted"]) == 5
    assert len(correction["kept"]) == 2
    assert "2 shifted or mirrored copies of each" in as_text(report)
    assert correction["agreement"]["total"] == IMAGES


def test_copies_are_shifts_and_mirror_images() -> None:
    given = images(8)
    found = with_copies(given, 3, 5)
    assert found.shape == (32, *given.shape[1:])
    assert (found[:8] == given).all()
    assert (found == with_copies(given, 3, 5)).all()
    assert (found != with_copies(given, 3, 6)).any()
    mirrored = 0
    for number, copy in enumerate(found[8:]):
        padded = np.pad(given[number % 8], ((1, 1), (1, 1), (0, 0)), "edge")
        parts = [padded[top : top + 8, left : left + 8] for top in range(3) for left in range(3)]
        plain, other = (any((part == each).all() for part in parts) for each in (copy, copy[:, ::-1]))
        assert plain or other
        mirrored += other
    assert 0 < mirrored < 24


# ---- by activity


def test_channels_are_judged_by_their_bound_over_what_they_do_on_the_images(tmp_path: Path) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    _, report = refitted(path, tmp_path, score="activity", repair="statistics")
    assert report.before.score == "activity"
    assert report.after is not None
    assert report.after.score == "bound"
    model = onnx.load(path)
    makers = {node.name: node.output[0] for node in model.graph.node}
    for layer in report.before.layers:
        (values,) = naive_correction.outputs(model, feeds(images()), [makers[layer.name]])
        deviation = np.sqrt(naive_correction.moments(values, 1)[1])
        assert np.allclose(layer.scores, np.array(layer.bounds) / deviation, rtol=1e-4)  # stages are fused otherwise
    assert report.silenced


def test_activity_does_not_move_when_channels_are_scaled(tmp_path: Path) -> None:
    found = []
    for number, model in enumerate((CORRECTED["plain"](), scaled(CORRECTED["plain"](), 2.0**10))):
        folder = tmp_path / str(number)
        folder.mkdir()
        _, report = refitted(saved(model, folder), folder, score="activity")
        found.append(report)
    one, two = found
    assert one.silenced == two.silenced
    first, second = (np.array(report.before.layers[0].scores) for report in found)
    assert np.allclose(first, second, rtol=1e-4)  # of float32, in which biases are not scaled: this net has none


def test_a_channel_that_does_not_vary_counts_as_dead_and_hides_no_other(tmp_path: Path) -> None:
    model = CORRECTED["plain"]()
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    first, second = (node.input[1] for node in model.graph.node if node.name in {"Conv0", "Conv2"})
    W, V = (numpy_helper.to_array(tensors[name]).copy() for name in (first, second))
    W[2] = 0  # dead, and channel 4 of the next layer sees it alone
    V[4] = 0
    V[4, 2] = 5
    for name, array in ((first, W), (second, V)):
        tensors[name].CopyFrom(numpy_helper.from_array(array, name))
    _, report = refitted(saved(model, tmp_path), tmp_path, score="activity")
    layer = report.before.layers[1]
    assert layer.bounds[4] > 0
    assert layer.scores[4] == 0
    assert 4 in layer.dead
    assert all(0 < score < 100 for k, score in enumerate(layer.scores) if k != 4)
    assert layer.threshold < 100  # which its bound over nothing would have raised beyond all


def test_layers_that_cannot_be_observed_are_judged_by_their_bounds_and_it_is_said(tmp_path: Path) -> None:
    path = saved(branching(), tmp_path)
    _, report = refitted(path, tmp_path, score="activity")
    inside = [layer for layer in report.before.layers if "branch" in layer.name]
    assert len(inside) == 2
    assert all(not layer.scores and "cannot be observed" in layer.fallback for layer in inside)
    assert "2 layers judged by the bound: they cannot be observed" in as_text(report)


@pytest.mark.parametrize("copies", [0, 3])
def test_a_kernel_that_the_positions_of_the_images_do_not_tell_is_kept(copies: int, tmp_path: Path) -> None:
    model = CORRECTED["residual"]()
    path = saved(model, tmp_path)
    _, report = refitted(path, tmp_path, augment=copies)
    kernels = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    few = {}
    for node in model.graph.node:
        if node.op_type == "Conv":
            (made,) = naive_correction.outputs(model, feeds(images()), [node.output[0]])
            positions = (1 + copies) * made.size // made.shape[1]
            unknowns = int(np.prod(kernels[node.input[1]][1:]))
            if positions < 4 * unknowns:
                few[node.name] = f"{unknowns:,} numbers a channel, too many for {positions:,} positions in the images"
    assert bool(few) is (copies == 0)
    assert kept(report) == few
    assert len(fitted(report)) == 7 - len(few)
