"""Scores and thresholds as users meet them: the API, the reports, the command; and judging again without measuring."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

import onnx_clp
from onnx_clp.analysis import Analysis, Layer, analyse, by_z, judged
from onnx_clp.cli import run
from onnx_clp.defaults import SCORES, THRESHOLDS
from onnx_clp.errors import UsageError
from onnx_clp.evaluation.attack import Attack, Preprocessing, Target
from onnx_clp.evaluation.images import LabelledImages, labelled
from onnx_clp.evaluation.sweep import sweep
from onnx_clp.evaluation.triggers import Patch
from onnx_clp.limits import Limits
from onnx_clp.model.file import open_model
from onnx_clp.report import sweep_json, sweep_text
from onnx_clp.report.words import RULES
from tests.built import NAMES, build, save

pytestmark = pytest.mark.usefixtures("in_this_process")

EXAMPLE = Path(onnx_clp.__file__).parents[1] / "examples" / "backdoored_bn.onnx"

Capture = pytest.CaptureFixture[str]


def validated(text: str, kind: str) -> Any:  # noqa: ANN401  # JSON
    schema = resources.files("onnx_clp.report").joinpath(f"{kind}-1.schema.json").read_text(encoding="utf-8")
    document = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    Draft202012Validator(json.loads(schema)).validate(document)
    return document


def flags(layers: tuple[Layer, ...]) -> list[tuple[int, ...]]:
    return [tuple(channel.index for channel in layer.flagged) for layer in layers]


def analysed(score: str) -> Analysis:
    with open_model(EXAMPLE) as file:
        return analyse(file, 3.0, count_dead=False, name="example", score=score)


# ---- judging again


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_judging_anew_is_scanning_anew(score: str, threshold: str) -> None:
    analysis = analysed(score)  # its file is closed: nothing can be measured again
    for u in (0.5, 2.0, 3.0):
        wanted = onnx_clp.scan(EXAMPLE, u, score=score, threshold=threshold)
        assert judged(analysis, u, threshold) == wanted.layers
    assert judged(analysis, 3.0) == analysis.report.layers


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_the_order_of_z_is_that_in_which_u_reaches_them(threshold: str) -> None:
    analysis = analysed("path")
    order = by_z(judged(analysis, 0.0, threshold))
    zs = [channel.z for _, channel in order]
    assert zs == sorted(zs, reverse=True)
    assert len(zs) > 50
    for u in (1.0, 1.7, 2.4, 3.0):
        layers = judged(analysis, u, threshold)
        expected = {(i, channel.index) for i, layer in enumerate(layers) for channel in layer.flagged}
        assert {(i, channel.index) for i, channel in order if channel.z > u} == expected


def test_judging_anew_refuses_what_a_scan_refuses() -> None:
    analysis = analysed("bound")
    with pytest.raises(UsageError, match="u is -1"):
        judged(analysis, -1.0)
    with pytest.raises(UsageError, match="no threshold"):
        judged(analysis, 3.0, "mad")
    assert judged(analysis, 3.0, count_dead=True) == onnx_clp.scan(EXAMPLE, count_dead=True).layers


# ---- the API


@pytest.mark.parametrize("function", ["scan", "sanitize", "sweep"])
def test_what_does_not_exist_or_not_go_together_is_an_error(function: str, tmp_path: Path) -> None:
    def call(**options: Any) -> None:  # noqa: ANN401  # of any kind
        if function == "scan":
            onnx_clp.scan(EXAMPLE, **options)
        elif function == "sanitize":
            onnx_clp.sanitize(EXAMPLE, tmp_path / "out.onnx", **options)
        else:
            sweep(EXAMPLE, IMAGES, ATTACK, u=[3.0], **options)

    with pytest.raises(UsageError, match="no score 'paths'"):
        call(score="paths")
    with pytest.raises(UsageError, match="no threshold 'mean'"):
        call(threshold="mean")
    with pytest.raises(UsageError, match="leave out counting them"):
        call(threshold="log-mad", count_dead=True)


def test_the_published_rule_is_what_nobody_asks_for() -> None:
    said = onnx_clp.scan(EXAMPLE, 3.0, score="bound", threshold="mean-std")
    assert said == onnx_clp.scan(EXAMPLE)
    assert all(not layer.scores and not layer.fallback for layer in said.layers)


def test_path_scores_leave_the_bounds_what_they_are() -> None:
    for plain, path in zip(onnx_clp.scan(EXAMPLE).layers, onnx_clp.scan(EXAMPLE, score="path").layers, strict=True):
        assert path.bounds == plain.bounds
        assert len(path.scores) == path.channels
        assert all(channel.bound == path.bounds[channel.index] for channel in path.flagged)


def test_what_path_scores_may_cost_is_limited(tmp_path: Path) -> None:
    """Beyond the limit a layer falls back to its bound and says so; it is not taken for scored."""
    path = save(build("conv_bn_chain"), tmp_path)
    whole = onnx_clp.scan(path, score="path")
    assert not any(layer.fallback for layer in whole.layers)
    for work in (1 << 16, 1 << 18, 1 << 20):
        report = onnx_clp.scan(path, score="path", limits=Limits(work=work))
        skipped = [part for part in report.skipped if part.reason == "limit"]
        assert all(bool(layer.scores) != bool(layer.fallback) for layer in report.layers)
        assert len(report.layers) + len(skipped) == len(whole.layers)


@pytest.mark.parametrize("name", NAMES)
def test_path_scores_of_any_model_are_there_or_said_not_to_be(name: str, tmp_path: Path) -> None:
    path = save(build(name), tmp_path)
    plain, scored = onnx_clp.scan(path), onnx_clp.scan(path, score="path")
    assert scored.skipped == plain.skipped
    for was, now in zip(plain.layers, scored.layers, strict=True):
        assert now.name == was.name
        np.testing.assert_array_equal(now.bounds, was.bounds)
        assert bool(now.scores) != bool(now.fallback)
        assert np.array_equal(np.isfinite(now.scores or was.bounds), np.isfinite(was.bounds))
        if now.fallback:
            assert now.flagged == was.flagged


# ---- reports


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("score", SCORES)
def test_the_json_of_a_scan_names_the_rule(score: str, threshold: str, capsys: Capture) -> None:
    assert run(["scan", str(EXAMPLE), "--score", score, "--threshold", threshold, "-u", "2", "--format", "json"]) == 0
    (file,) = validated(capsys.readouterr().out, "scan")["files"]
    report = onnx_clp.scan(EXAMPLE, 2.0, score=score, threshold=threshold)
    assert (file["report"]["score"], file["report"]["threshold"]) == (score, threshold)
    for found, layer in zip(file["report"]["layers"], report.layers, strict=True):
        assert (found["scores"], found["fallback"]) == (list(layer.scores) or None, None)
        scores = [channel["score"] for channel in found["flagged"]]
        assert scores == [layer.scores[channel.index] if layer.scores else None for channel in layer.flagged]


def test_the_text_of_a_scan_names_what_is_not_the_default(capsys: Capture) -> None:
    def told(*options: str) -> str:
        assert run(["scan", str(EXAMPLE), "-u", "2", *options]) == 0
        return capsys.readouterr().out

    assert "  score  " not in told()
    assert told() == told("--score", "bound", "--threshold", "mean-std")
    path = told("--score", "path")
    assert "  score     path: bound × outgoing norm, of 6 layers\n" in path
    assert "  score 0." in path
    assert "  bound " not in path.split("flagged", 1)[1]
    for threshold, words in {
        "median-mad": "above median + 2·1.4826·MAD of the layer\n",
        "log-std": "above mean + 2·std of the layer's logarithms\n",
        "log-mad": "above median + 2·1.4826·MAD of the layer's logarithms\n",
    }.items():
        text = told("--threshold", threshold)
        assert words in text
        assert all(title in text for title in RULES[threshold].titles)


def test_the_text_names_the_layers_that_fell_back(tmp_path: Path, capsys: Capture) -> None:
    path = save(build("head_boxes_sliced"), tmp_path)
    assert run(["scan", str(path), "--score", "path", "-v"]) in {0, 3}
    text = capsys.readouterr().out
    fallen = [layer for layer in onnx_clp.scan(path, score="path").layers if layer.fallback]
    for layer in fallen:
        assert f"{layer.name} (to {layer.fallback})" in text
    assert bool(fallen) == ("judged by the bound" in text)


def test_sanitizing_by_a_path_score_tells_the_rule(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out.onnx"
    arguments = ["sanitize", str(EXAMPLE), str(out), "--score", "path", "--threshold", "log-std", "--format", "json"]
    assert run(arguments) == 0
    document = validated(capsys.readouterr().out, "sanitize")
    for scan in (document["before"], document["after"]):
        assert (scan["score"], scan["threshold"]) == ("path", "log-std")


PATTERN = np.array([[255, 0, 255], [0, 255, 0], [255, 0, 255]], np.uint8)[..., None]
ATTACK = Attack(
    "badnets", Patch(PATTERN), Target(0), Preprocessing((28, 28), 1, "NCHW", (0, 1), (0,), (1,)), tuple("0123456789")
)


def noise(count: int = 20) -> LabelledImages:
    generator = np.random.default_rng(2)
    pixels = generator.integers(0, 256, (count, 28, 28, 1)).astype(np.uint8)
    return labelled(pixels, generator.integers(0, 10, count), tuple("0123456789"))


IMAGES = noise()


def test_a_sweep_silences_what_sanitize_does_by_the_same_rule(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    report = sweep(EXAMPLE, IMAGES, ATTACK, u=[2.0, 3.0], score="path", threshold="log-mad")
    assert (report.score, report.threshold, report.fallbacks) == ("path", "log-mad", 0)
    for row in report.rows:
        out = tmp_path / f"{row.u}.onnx"
        alone = onnx_clp.sanitize(EXAMPLE, out, row.u, max_share=1.0, score="path", threshold="log-mad")
        assert row.silenced == alone.silenced
    assert report.rows[0].silenced_channels > report.rows[1].silenced_channels
    document = validated(sweep_json.render_sweep(report), "sweep")
    assert (document["score"], document["threshold"], document["fallbacks"]) == ("path", "log-mad", 0)
    text = sweep_text.render_sweep(report)
    assert "  score     path: bound × outgoing norm\n" in text
    assert "  threshold median + u·1.4826·MAD of the layer's logarithms\n" in text
    plain = sweep_text.render_sweep(sweep(EXAMPLE, IMAGES, ATTACK, u=[3.0]))
    assert "  score  " not in plain
    assert "  threshold " not in plain


@pytest.mark.parametrize("option", [["--score", "path"], ["--threshold", "log-mad"]])
def test_evaluate_takes_a_rule_with_a_sweep_alone(option: list[str], capsys: Capture) -> None:
    assert run(["evaluate", str(EXAMPLE), "--images", "nowhere", *option]) == 2
    assert f"{option[0]} goes with --sweep" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["scan", "sanitize"])
def test_an_unknown_rule_is_a_usage_error(command: str, capsys: Capture) -> None:
    for option in (["--score", "norm"], ["--threshold", "iqr"]):
        assert run([command, str(EXAMPLE), *option]) == 2
        assert "is not one of" in capsys.readouterr().err
