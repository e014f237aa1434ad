"""EP and BNP through ``sanitize``: what is chosen, what is written, where silenced channels rest, what is said."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from jsonschema import Draft202012Validator
from numpy.typing import NDArray
from onnx import numpy_helper

import onnx_clp
from onnx_clp import OnnxClpError, SanitizeReport, sanitize
from onnx_clp.cli import run as run_command
from onnx_clp.correction import recipe
from onnx_clp.errors import UsageError, VerificationError
from onnx_clp.preactivation.choice import choose
from onnx_clp.report.json import render_sanitize as as_json
from onnx_clp.report.text import render_sanitize as as_text
from tests import naive_correction
from tests import naive_preactivation as naive
from tests.built import build, save
from tests.channel_nets import NETS
from tests.correction_nets import CORRECTED, branching, feeds, images, in_half, plain, quantised, saved
from tests.test_correction import assert_given_back, observed
from tests.test_preactivation_reading import folded_and_kept, one_by_one, pixels

pytestmark = pytest.mark.usefixtures("in_this_process")

Array = NDArray[Any]

SUSPECTED = images(60, seed=3)
CLEAN = images(60)


def sanitized(path: Path, **options: Any) -> tuple[Path, SanitizeReport]:  # noqa: ANN401  # those of sanitize
    """A copy without a limit on the share, and its report."""
    target = path.with_name("sanitized.onnx")
    return target, sanitize(path, target, **{"max_share": 1.0, "force": True, **options})


def channels(report: SanitizeReport) -> dict[str, tuple[int, ...]]:
    return {part.layer: part.channels for part in report.silenced}


def poisoned(count: int) -> NDArray[np.uint8]:
    """Images of which a tenth have a bright corner."""
    found = images(count, seed=4)
    found[: count // 10, -4:, -4:] = 255
    return found


def scores(model: onnx.ModelProto, method: str, pictures: Array) -> dict[str, list[tuple[float, float]]]:
    """By node, of each channel: its score and how far rounding may move it; of the inputs of all BNs, one by one."""
    nodes = {node.name: node for node in model.graph.node if node.op_type == "BatchNormalization"}
    constants = {tensor.name: numpy_helper.to_array(tensor).astype(float) for tensor in model.graph.initializer}
    values = one_by_one(model, [node.input[0] for node in nodes.values()], pictures)
    found = {}
    for (name, node), value in zip(nodes.items(), values, strict=True):
        mean, variance = (constants[constant] for constant in node.input[3:])
        rows = []
        for k in range(value.shape[1]):
            if method == "ep":
                largest = value[:, k].reshape(len(value), -1).max(axis=1).tolist()
                rows.append((naive.entropy(largest), naive.leeway(largest)))
            else:
                kl = naive.divergence(value[:, k].ravel().tolist(), float(mean[k]), float(variance[k]))
                rows.append((kl, 1e-4 * kl + 1e-5))
        found[name] = rows
    return found


def outliers(rows: Sequence[tuple[float, float]], method: str, u: float) -> tuple[int, ...]:
    """The channels beyond mean ± u·std; none so near to it that rounding decides."""
    values = np.array([score for score, _ in rows])
    z = (values - values.mean()) / values.std(ddof=1) * (-1 if method == "ep" else 1)
    room = max(leeway for _, leeway in rows) / values.std(ddof=1)
    assert (np.abs(z - u) > 2 * room).all(), "take another u"
    return tuple(np.flatnonzero(z > u).tolist())


def with_gamma_0(model: onnx.ModelProto, wanted: Mapping[str, Sequence[int]]) -> onnx.ModelProto:
    """γ = 0 and β as it was in the channels of these BatchNormalizations: the published change."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for node in made.graph.node:
        for tensor in made.graph.initializer:
            if node.name in wanted and tensor.name == node.input[1]:
                gamma = numpy_helper.to_array(tensor).copy()
                gamma[list(wanted[node.name])] = 0
                tensor.CopyFrom(numpy_helper.from_array(gamma, tensor.name))
    return made


def outputs(model: onnx.ModelProto | Path, pictures: Array = CLEAN) -> Array:
    model = onnx.load(model) if isinstance(model, Path) else model
    (found,) = naive_correction.outputs(model, feeds(pictures), [model.graph.output[0].name])
    return found


def assert_rests(
    source: Path, target: Path, report: SanitizeReport, tolerance: float = 1e-6, dtype: type = np.float32
) -> int:
    """Every silenced channel is where the report says that it rests, on all images; how many were looked at."""
    analysis = observed(source)
    values = {
        part.site.node.name: (analysis.graph.name_of(part.site.output), part.site.axis) for part in analysis.measured
    }
    looked = 0
    for part in report.silenced:
        name, axis = values[part.layer]
        (value,) = naive_correction.outputs(onnx.load(target), feeds(CLEAN, dtype), [name])
        rests = part.rests or (0.0,) * len(part.channels)
        for k, rest in zip(part.channels, rests, strict=True):
            seen = np.unique(np.take(value, k, axis))
            assert (np.abs(seen - rest) <= tolerance * abs(rest)).all(), (part.layer, k)
            looked += 1
    return looked


# ---- what is chosen and written, against the formulas and onnxruntime


@pytest.mark.parametrize(
    ("net", "method", "u"), [("dense", "ep", 2.0), ("residual", "bnp", 1.45), ("dense", "bnp", 1.45)]
)
def test_the_copy_is_the_model_with_gamma_0_where_the_formulas_say_so(
    net: str, method: str, u: float, tmp_path: Path
) -> None:
    model = NETS[net]()
    pictures = poisoned(120)
    expected = {name: outliers(rows, method, u) for name, rows in scores(model, method, pictures).items()}
    expected = {name: found for name, found in expected.items() if found}
    given = {"suspected_images": pictures} if method == "ep" else {"images": pictures, "repair": "none"}
    target, report = sanitized(saved(model, tmp_path), u=u, method=method, **given)
    assert channels(report) == expected
    assert len(expected) > 1
    assert {part.rest for part in report.silenced} == {"bias"}
    assert np.array_equal(outputs(target, pictures), outputs(with_gamma_0(model, expected), pictures))
    assert not np.allclose(outputs(target, pictures), outputs(model, pictures))
    assert assert_rests(tmp_path / "model.onnx", target, report) >= len(expected)


@pytest.mark.parametrize("u", [1.0, 2.0])
def test_a_folded_model_is_left_with_the_function_of_one_that_is_not(u: float, tmp_path: Path) -> None:
    pictures = pixels(200, seed=6)
    gammas = np.random.default_rng(7).uniform(0.5, 2, 16)  # positive: of the others another end is looked at
    found = []
    for name, model in zip(("kept", "folded"), folded_and_kept(gammas, pictures), strict=True):
        (tmp_path / name).mkdir()
        target, report = sanitized(saved(model, tmp_path / name), u=u, method="ep", suspected_images=pictures)
        (part,) = report.silenced
        assert (part.rest, len(part.rests)) == ("bias" if name == "kept" else "mean", len(part.channels))
        found.append((part.channels, np.array(part.rests), outputs(target, pictures)))
    kept, folded = found
    assert kept[0] == folded[0]
    assert folded[1] == pytest.approx(kept[1], abs=1e-5)  # float32, summed over images
    assert folded[2] == pytest.approx(kept[2], abs=1e-4)
    zeroed, _ = sanitized(
        tmp_path / "kept" / "model.onnx", u=u, method="ep", suspected_images=pictures, keep_bias=False
    )
    assert np.abs(outputs(zeroed, pictures) - kept[2]).max() > 1e-2  # so that the bias can be told from 0 at all


def test_two_layers_of_one_name_are_told_apart(tmp_path: Path) -> None:
    model = NETS["residual"]()
    expected = [outliers(rows, "bnp", 1.45) for rows in scores(model, "bnp", SUSPECTED).values()]
    first, *_, last = (node for node in model.graph.node if node.op_type == "BatchNormalization")
    first.name, last.name = last.output[0], ""  # a node without a name is called as what it makes
    _, report = sanitized(saved(model, tmp_path), u=1.45, method="bnp", images=SUSPECTED, repair="none")
    assert [part.channels for part in report.silenced] == [found for found in expected if found]
    assert report.silenced[0].layer == report.silenced[-1].layer == first.name
    assert expected[0] != expected[-1]


# ---- where channels rest, in every form of a site


@pytest.mark.parametrize("net", CORRECTED)
def test_a_channel_rests_where_the_report_says_it_does(net: str, tmp_path: Path) -> None:
    path = saved(CORRECTED[net](), tmp_path)
    target, report = sanitized(path, images=CLEAN, keep_bias=True, repair="none")
    assert assert_rests(path, target, report) >= 2
    assert report.checks[-1].passed
    assert_at_means(path, report)


@pytest.mark.parametrize("net", ["plain", "residual", "transposed"])
def test_the_same_of_float16(net: str, tmp_path: Path) -> None:
    path = saved(in_half(CORRECTED[net]()), tmp_path)
    target, report = sanitized(path, images=CLEAN, keep_bias=True, repair="none")
    assert assert_rests(path, target, report, 2.0**-10, np.float16) >= 2  # a rounding of what is written
    assert report.checks[-1].passed
    assert_at_means(path, report, 1e-2, np.float16)  # sums of a hundred numbers that are rounded at 2⁻¹¹


def assert_at_means(source: Path, report: SanitizeReport, room: float = 1e-4, dtype: type = np.float32) -> None:
    """Channels of folded layers rest at the mean of what they gave, to ``room`` of its standard deviation."""
    analysis = observed(source)
    for part in report.silenced:
        assert part.rest in {"bias", "mean"}
        if part.rest == "bias":
            continue
        (site,) = (each.site for each in analysis.measured if each.site.node.name == part.layer)
        name = analysis.graph.name_of(site.output)
        (value,) = naive_correction.outputs(onnx.load(source), feeds(CLEAN, dtype), [name])
        mean, q = naive_correction.moments(value, site.axis)
        for k, rest in zip(part.channels, part.rests, strict=True):
            assert abs(rest - mean[k]) <= room * np.sqrt(q[k])


@pytest.mark.parametrize("net", ["residual", "plain", "summands", "transposed", "derived", "shared"])
def test_what_is_shifted_by_channels_at_rest_is_given_back(net: str, tmp_path: Path) -> None:
    path = saved(CORRECTED[net](), tmp_path)
    target, report = sanitized(path, u=1.5, method="ep", suspected_images=SUSPECTED, images=CLEAN)
    assert report.checks[-1].name == "images"
    assert report.checks[-1].passed
    assert assert_given_back(path, target, report, feeds(CLEAN)) >= 15
    assert assert_rests(path, target, report) >= 2


def test_a_refit_leaves_channels_at_rest(tmp_path: Path) -> None:
    path = saved(plain(), tmp_path)
    options = {"u": 1.5, "method": "ep", "suspected_images": SUSPECTED, "images": CLEAN}
    target, report = sanitized(path, repair="refit", **options)
    assert report.correction is not None
    assert len(report.correction.refitted) == 3
    assert report.checks[-1].passed
    assert assert_rests(path, target, report) >= 2


def test_without_images_the_mean_of_a_folded_channel_is_not_known_and_it_is_said(tmp_path: Path) -> None:
    for net, rest in (("plain", "zero"), ("preact", "bias")):
        (tmp_path / net).mkdir()
        path = saved(CORRECTED[net](), tmp_path / net)
        target, report = sanitized(path, u=2.0, keep_bias=True)
        assert assert_rests(path, target, report) >= 2
        kinds = {part.rest for part in report.silenced}
        assert kinds == ({"zero"} if net == "plain" else {"zero", "bias"} & kinds | {rest})
        assert all(bool(part.why) is (part.rest == "zero") for part in report.silenced)
        if net == "plain":
            text = as_text(report)
            assert "  rest      " in text
            assert "is known on images alone" in text
            bare = path.with_name("bare.onnx")
            sanitize(path, bare, 2.0, max_share=1.0, metadata=False)
            again = sanitized(path, u=2.0, keep_bias=True, metadata=False)[0]
            assert bare.read_bytes() == again.read_bytes()


def test_a_quantised_kernel_has_its_rest_in_a_bias_in_float(tmp_path: Path) -> None:
    path = saved(quantised(plain()), tmp_path)
    target, report = sanitized(path, images=CLEAN, keep_bias=True, repair="none")
    assert {part.rest for part in report.silenced} == {"mean"}
    # onnxruntime makes integers of the bias where it fuses the levels around the convolution.
    assert assert_rests(path, target, report, 1e-3) >= 2
    assert next(check for check in report.checks if check.name == "onnxruntime-run").passed  # which fuses nothing


def test_where_no_constant_can_take_the_rest_channels_are_0_and_it_is_said(tmp_path: Path) -> None:
    path = save(build("qlinear_conv"), tmp_path)
    _, report = sanitized(path, keep_bias=True)
    assert report.silenced
    assert {part.rest for part in report.silenced} == {"zero"}
    assert all("integers" in part.why for part in report.silenced)


def test_a_rest_beyond_float16_becomes_0_and_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(in_half(plain()), tmp_path)
    wanted = recipe.Recipe.wanted
    monkeypatch.setattr(
        recipe.Recipe,
        "wanted",
        lambda self, found, silenced, rests=None: wanted(self, found, silenced, None if rests is None else rests * 1e9),
    )
    _, report = sanitized(path, images=CLEAN, keep_bias=True, repair="none")
    assert report.silenced
    assert all("does not fit float16" in part.why and part.rest == "zero" for part in report.silenced)


# ---- what was written is not trusted


def test_a_channel_that_does_not_rest_where_it_should_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    wanted = recipe.Recipe.wanted
    monkeypatch.setattr(
        recipe.Recipe,
        "wanted",
        lambda self, found, silenced, rests=None: wanted(
            self, found, silenced, None if rests is None else rests + 1e-3
        ),
    )
    with pytest.raises(VerificationError, match="is not silent in the rewritten model"):
        sanitized(path, u=1.5, method="ep", suspected_images=SUSPECTED)
    assert not path.with_name("sanitized.onnx").exists()


# ---- what is said


def test_bnp_of_a_folded_model_reads_nothing_says_so_and_is_not_analysed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(plain(), tmp_path)
    np.save(tmp_path / "clean.npy", CLEAN)
    code = run_command(
        ["sanitize", str(path), str(tmp_path / "out.onnx"), "--method", "bnp", "--images", str(tmp_path / "clean.npy")]
    )
    text = capsys.readouterr().out
    assert code == 3
    assert "0 of 3 layers judged" in text
    assert "not read: 3 layers" in text
    assert "the running statistics, which BNP compares with, are in no constant of a Conv" in text
    assert "nothing could be judged, which is not the same as clean" in text
    assert "only 60 clean images: BNP is published with 500" in text
    assert onnx.load(path).graph == onnx.load(tmp_path / "out.onnx").graph


def test_what_ep_cannot_read_is_named_beside_what_it_reads(tmp_path: Path) -> None:
    path = saved(branching(), tmp_path)
    _, report = sanitized(path, u=1.5, method="ep", suspected_images=SUSPECTED)
    assert report.analysed
    assert report.selection is not None
    assert len(report.selection.choice.unread) == 2
    text = as_text(report)
    assert "2 of 4 layers judged" in text
    assert "not read: 2 layers" in text
    assert "whose values are no outputs" in text


def test_mirrored_channels_are_told_and_not_silenced(tmp_path: Path) -> None:
    pictures = pixels(200, seed=10)
    _, folded = folded_and_kept(np.where(np.arange(16) % 2, -1.0, 1.0), pictures)
    _, report = sanitized(saved(folded, tmp_path), u=1.0, method="ep", suspected_images=pictures)
    assert report.selection is not None
    (site,) = report.selection.choice.sites
    assert site.mirrored
    assert not set(site.mirrored) & set(channels(report).get(site.name, ()))
    assert "if the γ that is folded into them was negative; not silenced" in as_text(report)


@pytest.mark.parametrize("method", ["clp", "ep", "bnp", "auto"])
def test_a_report_fits_its_schema_and_the_note_says_the_method(method: str, tmp_path: Path) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    given = {"ep": {"suspected_images": SUSPECTED, "guard": False}, "clp": {}}.get(method, {"images": CLEAN})
    target, report = sanitized(path, u=1.5, method=method, **given)
    schema = Path(onnx_clp.__file__).parent / "report" / "sanitize-1.schema.json"
    document = json.loads(as_json(report))
    Draft202012Validator(json.loads(schema.read_text(encoding="utf-8"))).validate(document)
    used = "clp" if method == "auto" else method
    assert document["method"] == used
    assert (document["auto"] is not None) is (method == "auto")
    note = {entry.key: entry.value for entry in onnx.load(target).metadata_props}
    assert note.get("onnx_clp.method", "clp") == used
    if used == "clp":
        assert document["selection"] is None
        assert "onnx_clp.rests" not in note
        return
    assert report.selection is not None
    assert json.loads(note["onnx_clp.rests"]) == {part.layer: list(part.rests) for part in report.silenced}
    for layer, scored in zip(document["selection"]["layers"], report.selection.scores.sites, strict=True):
        assert [each["index"] for each in layer["chosen"]] == list(channels(report).get(layer["name"], ()))
        assert all(each["score"] == scored.scores[each["index"]] for each in layer["chosen"])


def test_auto_says_what_it_chose_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    np.save(tmp_path / "suspected.npy", SUSPECTED)
    np.save(tmp_path / "clean.npy", CLEAN)
    suspected = ["--suspected-images", str(tmp_path / "suspected.npy")]
    clean = ["--images", str(tmp_path / "clean.npy")]
    for given, words in (
        ([], "clp, score bound, u = 3: without images"),
        (clean, "clp, score activity, u = 3, repair refit, ridge 0.12: clean images"),
        ([*clean, "-u", "2", "--score", "bound"], "clp, score bound, u = 2, repair refit, ridge 0.12: clean images"),
        (suspected, "ep, u = 3: triggered images"),
        ([*suspected, *clean, "--repair", "none"], "ep, u = 3, repair none: triggered images"),
    ):
        code = run_command(["sanitize", str(path), "--dry-run", "--method", "auto", *given])
        assert (code, f"  auto      {words}" in capsys.readouterr().out) == (0, True)


def test_suspected_images_are_drawn_and_take_the_preprocessing(tmp_path: Path) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    options = {"u": 1.5, "method": "ep", "num_suspected": 30, "seed": 5, "dry_run": True}
    _, report = sanitized(path, suspected_images=SUSPECTED, mean=(0.25,), value_range=(0, 255), **options)
    assert report.selection is not None
    used = report.selection.images
    assert (used.count, used.available, used.seed) == (30, 60, 5)
    assert report.selection.preprocessing.mean == (0.25,) * 3
    assert report.selection.warnings == ("only 30 suspected images: 500 or more are wanted, some of them triggered",)
    drawn = np.sort(np.random.default_rng(5).permutation(60)[:30])
    options |= {"num_suspected": None, "seed": 0}
    _, same = sanitized(path, suspected_images=SUSPECTED[drawn], mean=(0.25,), value_range=(0, 255), **options)
    assert same.silenced == report.silenced
    assert report.silenced


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "ep"}, "--suspected-images PATH"),
        ({"method": "ep", "images": CLEAN}, "--suspected-images PATH"),
        ({"method": "bnp"}, "give --images PATH"),
        ({"suspected_images": SUSPECTED}, "does not go with --method clp"),
        ({"num_suspected": 5}, "--num-suspected goes with --suspected-images"),
        ({"method": "ep", "suspected_images": SUSPECTED, "num_suspected": 1}, "the number of images is 1"),
        ({"method": "ep", "suspected_images": SUSPECTED, "num_images": 5}, "--num-images goes with --images"),
        ({"method": "ep", "suspected_images": SUSPECTED, "repair": "refit"}, "--repair goes with --images"),
        ({"method": "ep", "suspected_images": "nowhere"}, "nowhere"),
        ({"method": "ep", "suspected_images": SUSPECTED[:1]}, "holds 1 image"),
        ({"method": "ep", "suspected_images": SUSPECTED, "score": "path"}, "--score does not go with the method ep"),
        ({"method": "ep", "suspected_images": SUSPECTED, "u": -1}, "u is -1"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    with pytest.raises(OnnxClpError) as caught:
        sanitized(path, **options)
    assert isinstance(caught.value, UsageError)
    assert words in str(caught.value)


@pytest.mark.parametrize("option", ["OUT", "-o"])
def test_the_command_overwrites_no_suspected_images(option: str, tmp_path: Path) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    images_at = tmp_path / "suspected.npy"
    np.save(images_at, SUSPECTED)
    before = images_at.read_bytes()
    out = [str(images_at), "--force"] if option == "OUT" else [str(tmp_path / "out.onnx"), "-o", str(images_at)]
    given = ["--method", "ep", "--suspected-images", str(images_at)]
    assert run_command(["sanitize", str(path), *out, *given]) == 2
    assert images_at.read_bytes() == before


def test_a_channel_without_finite_numbers_is_left(tmp_path: Path) -> None:
    model = NETS["dense"]()
    given = {"u": 2.0, "method": "ep", "suspected_images": poisoned(120)}
    _, report = sanitized(saved(model, tmp_path), **given)
    last = report.silenced[-1]
    (node,) = (node for node in model.graph.node if node.name == last.layer)
    for tensor in model.graph.initializer:
        if tensor.name == node.input[2]:
            beta = numpy_helper.to_array(tensor).copy()
            beta[last.channels[0]] = np.nan
            tensor.CopyFrom(numpy_helper.from_array(beta, tensor.name))
    _, again = sanitized(saved(model, tmp_path), **given)
    assert [(part.layer, part.channels) for part in again.left] == [(last.layer, last.channels[:1])]
    assert again.selection is not None
    assert set(last.channels[:1]) <= set(again.selection.choice.sites[-1].channels)
    assert channels(again).get(last.layer, ()) == last.channels[1:]


def test_bnp_reads_no_copies_of_the_images(tmp_path: Path) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    plain_report, refitted = (
        sanitized(path, u=1.5, method="bnp", images=CLEAN, repair=repair)[1] for repair in ("none", "refit")
    )
    assert plain_report.selection is not None
    assert refitted.selection is not None
    assert refitted.selection.scores == plain_report.selection.scores
    assert refitted.selection.scores.images == len(CLEAN)
    assert refitted.checks[-1].passed


def test_where_the_summand_is_quantised_channels_are_0_and_it_is_said(tmp_path: Path) -> None:
    path = save(build("qdq_int8_bias"), tmp_path)
    _, report = sanitized(path, images=CLEAN, keep_bias=True, repair="none")
    assert report.silenced
    assert {part.rest for part in report.silenced} == {"zero"}
    assert all("a summand of it is quantised" in part.why for part in report.silenced)


def test_a_budget_walks_over_what_ep_chooses(tmp_path: Path) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    given = {"method": "ep", "suspected_images": SUSPECTED, "images": CLEAN, "max_share": 1.0}
    target, report = sanitized(path, min_agreement=0, u=1.5, metadata=False, **given)
    assert report.budget is not None
    assert report.selection is not None
    counts = [choose(report.selection.scores, step.u).chosen for step in report.budget.steps if step.u is not None]
    assert [step.channels for step in report.budget.steps if step.u is not None] == counts
    assert counts[-1] == report.silenced_channels > counts[0]
    assert report.selection.choice.u == 1.5
    assert target.exists()


def test_without_clean_images_ep_is_guarded(tmp_path: Path) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    given = {"method": "ep", "suspected_images": SUSPECTED, "u": 1.5}
    assert sanitized(path, **given)[1].checks[0].name == "probes"
    assert "probes" not in [check.name for check in sanitized(path, **given, images=CLEAN)[1].checks]
    assert "probes" not in [check.name for check in sanitized(path, **given, guard=False)[1].checks]
