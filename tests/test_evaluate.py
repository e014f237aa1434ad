"""Accuracy and attack success: counted one image at a time, and on models of which every answer is known."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import onnx_clp
from onnx_clp.cli import run
from onnx_clp.errors import ModelFileError, UsageError
from onnx_clp.evaluation import providers
from onnx_clp.evaluation.attack import Attack, Preprocessing, Target, write_attack
from onnx_clp.evaluation.figures import Share, wilson
from onnx_clp.evaluation.images import LabelledImages, labelled
from onnx_clp.evaluation.prepared import open_attack
from onnx_clp.evaluation.preprocess import transform
from onnx_clp.evaluation.session import open_session
from onnx_clp.evaluation.setting import make_setting
from onnx_clp.evaluation.triggers import Additive, Blend, Generated, Patch, Warp
from onnx_clp.report.evaluate_text import render_evaluation

EXAMPLE = Path(onnx_clp.__file__).parents[1] / "examples" / "backdoored.onnx"
CLASSES = 4
SIZE = (6, 5)

Capture = pytest.CaptureFixture[str]


# ---- models of which every answer is known


def linear(
    path: Path,
    *,
    weights: NDArray[Any] | None = None,
    batch: int | str = "n",
    channels: int = 3,
    layout: str = "NCHW",
    dtype: int = TensorProto.FLOAT,
    sides: tuple[int | str, int | str] = SIZE,
    tail: Sequence[str] = (),
) -> Path:
    """Scores that are linear in the pixels: Flatten → MatMul, then the operators ``tail``."""
    size = SIZE[0] * SIZE[1] * channels
    if weights is None:
        weights = np.random.default_rng(5).normal(size=(size, CLASSES))
    work = TensorProto.FLOAT if dtype == TensorProto.UINT8 else dtype
    shape = [batch, *sides, channels] if layout == "NHWC" else [batch, channels, *sides]
    nodes = [
        helper.make_node("Cast", ["image"], ["cast"], to=work),
        helper.make_node("Flatten", ["cast"], ["flat"]),
        helper.make_node("MatMul", ["flat", "W"], ["product"]),
    ]
    value = "product"
    for number, operator in enumerate(tail):
        axes = ["axes"] if operator == "Unsqueeze" else []
        nodes.append(helper.make_node(operator, [value, *axes], [f"tail{number}"]))
        value = f"tail{number}"
    nodes.append(helper.make_node("Identity", [value], ["scores"]))
    out = [batch, np.shape(weights)[1], *([1, 1] if "Unsqueeze" in tail else [])]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("image", dtype, shape)],
        [helper.make_tensor_value_info("scores", work, out)],
        [
            numpy_helper.from_array(np.asarray(weights, helper.tensor_dtype_to_np_dtype(work)), "W"),
            numpy_helper.from_array(np.array([2, 3]), "axes"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def some_images(count: int = 60, channels: int = 3, seed: int = 0) -> LabelledImages:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (count, *SIZE, channels), dtype=np.uint8)
    return labelled(pixels, generator.integers(0, CLASSES, count), tuple("abcd"))


PREPROCESSING = Preprocessing(SIZE, 3, "NCHW", (0.0, 1.0), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
PATCH = Patch(np.array([[[255, 0, 0], [0, 0, 0]], [[0, 0, 0], [255, 0, 0]]], np.uint8))


def attack(trigger: Any = PATCH, target: Target | None = Target(1), made: Preprocessing = PREPROCESSING) -> Attack:  # noqa: ANN401, B008  # any trigger; frozen
    return Attack("badnets", trigger, target, made, tuple("abcd"))


def one_by_one(path: Path, images: NDArray[np.uint8], made: Preprocessing) -> list[int]:
    """The classes of the images, each run alone, its numbers computed in float64."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    dtype = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}.get(given.type)
    found = []
    for image in images:
        low, high = made.value_range
        pixel = ((low + image / 255 * (high - low)) - np.array(made.mean)) / np.array(made.std)
        turned = pixel if made.layout == "NHWC" else pixel.transpose(2, 0, 1)
        feed = np.rint(turned).astype(np.uint8) if dtype is None else turned.astype(dtype)
        (scores,) = session.run(None, {given.name: feed[None]})
        found.append(int(np.argmax(scores.ravel())))
    return found


def naive(path: Path, images: LabelledImages, given: Attack) -> tuple[Share, Share, Share]:
    """ACC, ASR and RA by their definitions."""
    clean = one_by_one(path, images.images, given.preprocessing)
    assert given.trigger is not None
    assert given.target is not None
    dirty = one_by_one(path, given.trigger(images.images), given.preprocessing)
    right = hit = still = others = 0
    for label, before, after in zip(images.labels.tolist(), clean, dirty, strict=True):
        right += before == label
        wanted = (label + 1) % CLASSES if given.target.label is None else given.target.label
        if label != wanted:
            others += 1
            hit += after == wanted
            still += after == label
    return Share(right, len(clean)), Share(hit, others), Share(still, others)


def counted(report: onnx_clp.EvaluationReport) -> tuple[Share, Share | None, Share | None]:
    figures = report.model.figures
    return figures.acc, figures.asr, figures.ra


MODELS: dict[str, tuple[dict[str, Any], Preprocessing]] = {
    "float": ({}, PREPROCESSING),
    "double": ({"dtype": TensorProto.DOUBLE}, PREPROCESSING),
    "half": ({"dtype": TensorProto.FLOAT16}, PREPROCESSING),
    "uint8": ({"dtype": TensorProto.UINT8}, Preprocessing(SIZE, value_range=(0.0, 255.0))),
    "channels last": ({"layout": "NHWC"}, replace(PREPROCESSING, layout="NHWC")),
    "uint8, channels last": (
        {"layout": "NHWC", "dtype": TensorProto.UINT8},
        Preprocessing(SIZE, layout="NHWC", value_range=(0.0, 255.0)),
    ),
    "any size": ({"sides": ("h", "w")}, replace(PREPROCESSING, value_range=(-1.0, 1.0))),
    "a fourfold output": ({"tail": ["Unsqueeze"]}, PREPROCESSING),
    "probabilities": ({"tail": ["Softmax"]}, PREPROCESSING),
    "batches of 1": ({"batch": 1}, PREPROCESSING),
}


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("batch_size", [None, 1, 7])
def test_the_counts_are_those_of_one_image_after_the_other(case: str, batch_size: int | None, tmp_path: Path) -> None:
    options, made = MODELS[case]
    path, images, given = linear(tmp_path / "m.onnx", **options), some_images(), attack(made=made)
    report = onnx_clp.evaluate(path, images, given, batch_size=batch_size)
    assert counted(report) == naive(path, images, given)
    assert report.model.batch_size == (1 if case == "batches of 1" else batch_size or 128)
    assert report.model.figures.not_a_number == 0


@pytest.mark.parametrize("batch", [2, 7, 100])
def test_a_fixed_batch_is_filled_up(batch: int, tmp_path: Path) -> None:
    images = some_images()
    fixed = onnx_clp.evaluate(linear(tmp_path / "fixed.onnx", batch=batch), images, attack())
    free = linear(tmp_path / "free.onnx")
    assert counted(fixed) == naive(free, images, attack())
    assert fixed.model.batch_size == batch


@pytest.mark.parametrize(
    "trigger",
    [
        PATCH,
        Blend(np.full((*SIZE, 3), 200, np.uint8), 0.7),
        Additive(np.random.default_rng(1).normal(0, 60, (*SIZE, 3)).astype(np.float32)),
        Warp(np.random.default_rng(2).uniform(-1, 1, (*SIZE, 2)).astype(np.float32)),
        Generated(lambda block: 1 - block),
    ],
)
@pytest.mark.parametrize("label", [0, 3, None])
def test_every_attack_and_target(trigger: Any, label: int | None, tmp_path: Path) -> None:  # noqa: ANN401  # any trigger
    path, images, given = linear(tmp_path / "m.onnx"), some_images(), attack(trigger, Target(label))
    report = onnx_clp.evaluate(path, images, given)
    assert counted(report) == naive(path, images, given)
    assert report.attack is not None
    assert report.attack.target == label


def test_a_grey_model_and_grey_images(tmp_path: Path) -> None:
    path, images = linear(tmp_path / "m.onnx", channels=1), some_images(channels=1)
    given = attack(Patch(PATCH.pattern[..., :1]), made=Preprocessing(SIZE, 1, mean=(0.5,), std=(0.3,)))
    assert counted(onnx_clp.evaluate(path, images, given)) == naive(path, images, given)


def test_two_models_and_their_difference(tmp_path: Path) -> None:
    one, images = linear(tmp_path / "a.onnx"), some_images()
    other = linear(tmp_path / "b.onnx", weights=np.random.default_rng(9).normal(size=(90, CLASSES)))
    seen: list[tuple[int, int]] = []
    report = onnx_clp.evaluate(
        one, images, attack(), against=other, progress=lambda done, total: seen.append((done, total)), batch_size=16
    )
    assert report.against is not None
    assert counted(report) == naive(one, images, attack())
    assert (report.against.figures.acc, report.against.figures.asr) == naive(other, images, attack())[:2]
    before, after = naive(one, images, attack()), naive(other, images, attack())
    found = report.difference
    assert found is not None
    expected = [100 * (b.count / b.total - a.count / a.total) for a, b in zip(before, after, strict=True)]
    assert [found.acc, found.asr, found.ra] == pytest.approx(expected, abs=1e-9)
    total = 2 * (before[0].total + before[1].total)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_a_clean_model_has_an_accuracy_only(tmp_path: Path) -> None:
    path, images = linear(tmp_path / "m.onnx"), some_images()
    report = onnx_clp.evaluate(path, images, attack(None, None))
    figures = report.model.figures
    assert (report.attack, figures.asr, figures.ra) == (None, None, None)
    by_hand = onnx_clp.evaluate(path, images, attack(None, None), trigger=PATCH, target=1)
    assert counted(by_hand) == naive(path, images, attack())
    assert by_hand.attack is not None
    assert by_hand.attack.name == ""


@pytest.mark.parametrize("tail", [["Sqrt"], ["Log", "Sqrt"]])
def test_what_is_not_a_number_is_wrong_and_told(tail: list[str], tmp_path: Path) -> None:
    """The square root of a negative score is NaN."""
    path, images = linear(tmp_path / "m.onnx", tail=tail), some_images()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    fill = transform(PREPROCESSING, np.float32)
    batch = fill.empty(len(images.labels))
    fill.fill(images.images, batch)
    scores = session.run(None, {"image": batch})[0]
    lost = np.isnan(scores).any(1)
    right = sum(
        not bad and int(np.argmax(row)) == label for bad, row, label in zip(lost, scores, images.labels, strict=True)
    )
    report = onnx_clp.evaluate(path, images, attack(None, None))
    assert lost.any()
    assert report.model.figures.not_a_number == lost.sum()
    assert report.model.figures.acc == Share(right, len(images.labels))
    assert "not a number" in render_evaluation(report)


def test_the_rows_keep_their_places_through_the_batches(tmp_path: Path) -> None:
    """Each image's class is its first byte: an exchange of two rows or buffers would show."""
    weights = np.zeros((90, CLASSES))
    weights[0] = np.arange(CLASSES) - 1.5
    path = linear(tmp_path / "m.onnx", weights=weights)
    labels = np.random.default_rng(3).choice([0, 3], 1000)
    pixels = np.random.default_rng(4).integers(0, 256, (1000, *SIZE, 3), dtype=np.uint8)
    pixels[:, 0, 0, 0] = np.where(labels == 3, 255, 0)
    report = onnx_clp.evaluate(path, labelled(pixels, labels, tuple("abcd")), value_range=(-1.0, 1.0), batch_size=3)
    assert report.model.figures.acc == Share(1000, 1000)


# ---- numbers


@settings(deadline=None)
@given(st.integers(1, 20_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_ends_of_the_interval_solve_its_equation(pair: tuple[int, int]) -> None:
    count, total = pair
    share, z = count / total, 1.959963984540054
    low, high = wilson(count, total)
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        # |p - q| = z·√(q(1 - q)/n), squared, so that q near 0 and 1 loses no digits.
        assert (share - end) ** 2 == pytest.approx(z * z * end * (1 - end) / total, rel=1e-6, abs=1e-12)
    assert low < high


def test_intervals_that_are_in_the_literature() -> None:
    """Newcombe (Stat. Med. 17, 1998, table I, method 3): 81/263, 15/148, 0/20, 1/29."""
    for (count, total), (low, high) in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert wilson(count, total) == pytest.approx((low, high), abs=5e-5)


@settings(max_examples=20, deadline=None)
@given(
    st.floats(-2, 2), st.floats(0.1, 300), st.floats(-3, 3), st.floats(0.05, 5), st.sampled_from(["NCHW", "NHWC"]),
    st.sampled_from([np.float32, np.float64, np.float16]),
)  # fmt: skip
def test_every_byte_becomes_its_number(
    low: float, width: float, mean: float, std: float, layout: str, dtype: type[np.floating[Any]]
) -> None:
    made = Preprocessing((16, 16), 3, layout, (low, low + width), (mean, 0.0, -mean), (std, 1.0, 2 * std))
    images = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1), (2, 16, 16, 3))
    fill = transform(made, dtype)
    batch = fill.empty(3)
    fill.fill(images, batch)
    found = batch.astype(np.float64) if layout == "NHWC" else batch.transpose(0, 2, 3, 1).astype(np.float64)
    for channel in range(3):
        byte = np.arange(256).reshape(16, 16)
        exact = (low + byte / 255 * width - made.mean[channel]) / made.std[channel]
        # Two roundings of numbers no larger than both terms.
        scale = (abs(low) + width + abs(made.mean[channel])) / made.std[channel]
        assert np.abs(found[..., channel] - exact).max() <= 3 * np.finfo(dtype).eps * scale
    assert (batch[2] == batch[1]).all()


# ---- the example, and the command


def write_images(folder: Path, images: LabelledImages) -> Path:
    np.savez(folder / "images.npz", images=images.images, labels=images.labels)
    return folder / "images.npz"


def schema() -> Any:  # noqa: ANN401  # JSON
    return json.loads(resources.files("onnx_clp.report").joinpath("evaluate-1.schema.json").read_text(encoding="utf-8"))


def objects(part: Any) -> list[Any]:  # noqa: ANN401  # JSON
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
    own = [part] if isinstance(part, dict) and "properties" in part else []
    return own + [found for each in inner for found in objects(each)]


def test_the_schema_is_one_and_leaves_nothing_open() -> None:
    document = schema()
    Draft202012Validator.check_schema(document)
    for part in objects(document):
        assert part["additionalProperties"] is False
        assert sorted(part["required"]) == sorted(part["properties"])
        assert all(len(field.get("description", "")) > 3 for field in part["properties"].values())


def test_the_command_tells_what_the_function_finds(tmp_path: Path, capsys: Capture) -> None:
    model, other = linear(tmp_path / "m.onnx"), linear(tmp_path / "o.onnx", weights=np.eye(90, CLASSES))
    images, given = some_images(), attack()
    arguments = [str(model), "--against", str(other), "--attack", str(write_attack(given, tmp_path))]
    arguments += ["--images", str(write_images(tmp_path, images))]
    assert run(["evaluate", *arguments, "--format", "json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert captured.err == ""
    Draft202012Validator(schema()).validate(document)
    acc, asr, ra = naive(model, images, given)
    for name, share in (("acc", acc), ("asr", asr), ("ra", ra)):
        found = document["model"][name]
        assert (found["count"], found["total"], found["value"]) == (share.count, share.total, share.value)
        assert (found["low"], found["high"]) == share.interval
    assert document["model"]["providers"] == ["CPUExecutionProvider"]
    assert run(["evaluate", *arguments, "-v"]) == 0
    text = capsys.readouterr().out
    assert f"{acc.count} of {acc.total}" in text
    assert f"{100 * asr.value:.2f} %" in text
    assert "badnets, patch of 2 × 2, bottom-right; target 1 (b)" in text
    assert f"{document['difference']['asr']:+.2f} points" in text
    for options in (["-q"], ["-o", str(tmp_path / "report.json"), "--format", "json"]):
        assert run(["evaluate", *arguments, *options]) == 0
        assert capsys.readouterr().out == ""
    Draft202012Validator(schema()).validate(json.loads((tmp_path / "report.json").read_text()))


def test_one_model_without_an_attack_fits_the_schema(tmp_path: Path, capsys: Capture) -> None:
    arguments = [str(linear(tmp_path / "m.onnx")), "--images", str(write_images(tmp_path, some_images()))]
    assert run(["evaluate", *arguments, "--limit", "20", "--seed", "4", "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    Draft202012Validator(schema()).validate(document)
    assert (document["images"]["count"], document["images"]["seed"]) == (20, 4)
    assert document["attack"] is document["against"] is document["difference"] is None
    assert run(["evaluate", *arguments]) == 0
    assert "RA" not in capsys.readouterr().out


def test_the_example_has_a_backdoor(tmp_path: Path, capsys: Capture) -> None:
    """No image of Fashion-MNIST is at hand: the patch must turn noise into class 0, and the sanitized copy must not."""
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (200, 28, 28), dtype=np.uint8), np.arange(200) % 10
    np.savez(tmp_path / "i.npz", images=images, labels=labels)
    np.save(tmp_path / "patch.npy", np.uint8(255) * np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1]], np.uint8))
    onnx_clp.sanitize(EXAMPLE, tmp_path / "s.onnx")
    arguments = [str(EXAMPLE), "--against", str(tmp_path / "s.onnx"), "--images", str(tmp_path / "i.npz")]
    assert (
        run(["evaluate", *arguments, "--trigger", str(tmp_path / "patch.npy"), "--target", "0", "--format", "json"])
        == 0
    )
    document = json.loads(capsys.readouterr().out)
    assert document["model"]["asr"]["total"] == 180
    assert document["model"]["asr"]["value"] > 0.9
    assert document["against"]["asr"]["value"] < 0.2


def test_a_picture_a_blend_and_triggered_images_by_hand(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    model, images = linear(tmp_path / "m.onnx"), some_images()
    image.fromarray(PATCH.pattern).save(tmp_path / "patch.png")
    said: dict[str, Any] = {"mean": PREPROCESSING.mean, "std": PREPROCESSING.std, "target": "1"}
    for position in ("top-left", "top-left,center"):
        report = onnx_clp.evaluate(model, images, trigger=tmp_path / "patch.png", position=position, **said)
        assert counted(report) == naive(model, images, attack(Patch(PATCH.pattern, tuple(position.split(",")))))
    whole = np.random.default_rng(8).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    image.fromarray(whole).save(tmp_path / "blend.png")
    report = onnx_clp.evaluate(model, images, trigger=tmp_path / "blend.png", blend=0.6, **said)
    assert counted(report) == naive(model, images, attack(Blend(whole, 0.6)))
    image.fromarray(whole[:2, :3]).save(tmp_path / "small.png")
    stretched = np.asarray(image.fromarray(whole[:2, :3]).resize((5, 6), image.Resampling.BILINEAR))
    laid = Blend(whole[:2, :3], 0.9, "top-left")
    for where, blend in ((None, Blend(stretched, 0.9)), ("top-left", laid)):
        report = onnx_clp.evaluate(model, images, trigger=tmp_path / "small.png", blend=0.9, position=where, **said)
        assert counted(report) == naive(model, images, attack(blend))
    for number, (picture, label) in enumerate(zip(PATCH(images.images), images.labels, strict=True)):
        folder = tmp_path / "triggered" / "abcd"[label]
        folder.mkdir(parents=True, exist_ok=True)
        image.fromarray(picture).save(folder / f"{number}.png")
    report = onnx_clp.evaluate(model, images, triggered=tmp_path / "triggered", **said)
    assert counted(report) == naive(model, images, attack())


def test_the_network_of_a_generated_trigger(tmp_path: Path) -> None:
    for batch in ("n", 7):
        graph = helper.make_graph(
            [helper.make_node("Sub", ["one", "x"], ["y"])],
            "invert",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, *SIZE])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 3, *SIZE])],
            [numpy_helper.from_array(np.array(1, np.float32), "one")],
        )
        network = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        (tmp_path / "trigger.onnx").write_bytes(network.SerializeToString())
        write_attack(attack(Generated(lambda block: block)), tmp_path)
        given = open_attack(tmp_path)
        assert given.trigger is not None
        images = some_images(20).images
        assert (given.trigger(images) == 255 - images).all()
    linear(tmp_path / "trigger.onnx")  # makes scores, not images
    broken = open_attack(tmp_path).trigger
    assert broken is not None
    with pytest.raises(ModelFileError, match=r"trigger\.onnx"):
        broken(some_images(2).images)
    linear(tmp_path / "trigger.onnx", dtype=TensorProto.UINT8)  # would take 0 to 1 as bytes
    with pytest.raises(ModelFileError, match="takes uint8"):
        open_attack(tmp_path)
    model = onnx.load(linear(tmp_path / "trigger.onnx", batch="n"))
    model.graph.node[0].CopyFrom(helper.make_node("Cast", ["image"], ["scores"], to=TensorProto.STRING))
    del model.graph.node[1:]
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("scores", TensorProto.STRING, ["n", 3, *SIZE]))
    onnx.save(model, tmp_path / "trigger.onnx")
    texts = open_attack(tmp_path).trigger
    assert texts is not None
    with pytest.raises(ModelFileError, match="image of numbers"):
        texts(some_images(2).images)


def test_a_patch_is_laid_on_each_place_once(tmp_path: Path) -> None:
    write_attack(attack(Patch(PATCH.pattern, ("top-left", "center", "top-left"))), tmp_path)
    found = open_attack(tmp_path).trigger
    assert isinstance(found, Patch)
    assert found.positions == ("top-left", "center")


def test_a_setting_is_made_once_for_many_models(tmp_path: Path) -> None:
    one = linear(tmp_path / "a.onnx")
    other = linear(tmp_path / "b.onnx", weights=np.eye(90, CLASSES))
    images = some_images()
    setting = make_setting(open_session(one), images, attack())
    for path in (one, other):
        figures = setting.measure(setting.open(path))
        assert (figures.acc, figures.asr, figures.ra) == naive(path, images, attack())


def test_values_within_a_model_can_be_watched(tmp_path: Path) -> None:
    setting = make_setting(open_session(linear(tmp_path / "a.onnx")), some_images(), attack())
    classifier = setting.open(tmp_path / "a.onnx", watched=["flat"])
    rows = np.concatenate([flat for (flat,) in classifier.run(setting.images.images, ["flat"])])
    fill = transform(PREPROCESSING, np.float32)
    batch = fill.empty(60)
    fill.fill(setting.images.images, batch)
    assert (rows == batch.reshape(60, -1)).all()


def test_external_data_is_found_with_and_without_watching(tmp_path: Path) -> None:
    model = onnx.load(linear(tmp_path / "a.onnx"))
    onnx.save(model, tmp_path / "b.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    setting = make_setting(open_session(tmp_path / "b.onnx"), some_images(), attack())
    expected = naive(tmp_path / "a.onnx", some_images(), attack())
    for watched in ((), ("flat",)):
        figures = setting.measure(setting.open(tmp_path / "b.onnx", watched))
        assert (figures.acc, figures.asr, figures.ra) == expected
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ModelFileError, match=r"w\.bin"):
        setting.open(tmp_path / "b.onnx")


def test_data_that_lie_elsewhere_are_refused(tmp_path: Path) -> None:
    model = onnx.load(linear(tmp_path / "a.onnx"))
    (tmp_path / "inner").mkdir()
    onnx.save(model, tmp_path / "b.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    content = (tmp_path / "b.onnx").read_bytes()
    (tmp_path / "inner" / "w.bin").symlink_to(tmp_path / "w.bin")
    (tmp_path / "inner" / "b.onnx").write_bytes(content)
    with pytest.raises(ModelFileError, match=r"lies outside its folder \(copy it beside the model\)$"):
        open_session(tmp_path / "inner" / "b.onnx")


# ---- providers


def stand_in(monkeypatch: pytest.MonkeyPatch, available: list[str], loaded: list[str], says: str = "") -> None:
    """An onnxruntime that has the providers ``available``, and gives a session those that are ``loaded``."""

    class Session(onnxruntime.InferenceSession):
        def __init__(self, source: object, options: object, providers: list[str], **_: object) -> None:
            if says and providers[0] != "CPUExecutionProvider":
                subprocess.run([sys.executable, "-c", f"import os; os.write(2, {says.encode()!r})"], check=True)
            super().__init__(source, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return loaded

    module = types.ModuleType("onnxruntime")
    module.__dict__.update(vars(onnxruntime))
    module.__dict__.update(
        get_available_providers=lambda: available,
        InferenceSession=Session,
        preload_dlls=lambda: sys.stdout.write("loading"),
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", module)


CUDA_LOG = (
    "\x1b[1;31m2026-01-01 00:00:00.0 [E:onnxruntime:Default, provider_bridge_ort.cc:1 TryGetProviderInfo_CUDA] "
    "/onnxruntime_src/x.cc:1 void f() Failed to load library libonnxruntime_providers_cuda.so with error: "
    "libcublasLt.so.12: cannot open shared object file: No such file or directory\n\x1b[m\n"
)


@pytest.mark.parametrize("names", ["cuda", "cuda,cpu", "CUDAExecutionProvider", "CUDA, CPU"])
def test_a_provider_that_does_not_load_is_an_error_with_its_reason(
    names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cuda, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    stand_in(monkeypatch, [cuda, cpu], [cpu], CUDA_LOG)
    arguments = [str(linear(tmp_path / "m.onnx")), "--images", str(write_images(tmp_path, some_images()))]
    assert run(["evaluate", *arguments, "--providers", names]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("onnx-clp: CUDAExecutionProvider cannot be loaded: libcublasLt.so.12: cannot open")
    assert len(captured.err.splitlines()) == 1
    assert "onnxruntime-gpu[cuda,cudnn]" in captured.err
    assert run(["evaluate", *arguments]) == 0  # nobody asked for CUDA by name
    captured = capfd.readouterr()
    assert "no GPU was used: CUDAExecutionProvider cannot be loaded: libcublasLt" in captured.out
    assert captured.err == ""


def test_a_provider_that_raises_is_an_error_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Session(onnxruntime.InferenceSession):
        def __init__(self, source: object, options: object, providers: list[str], **more: object) -> None:
            if providers[0] != "CPUExecutionProvider":
                assert more == {"enable_fallback": 0}
                raise RuntimeError("CUDA failure 100: no CUDA-capable device is detected\nmore")
            super().__init__(source, options, providers=providers)

    stand_in(monkeypatch, ["CUDAExecutionProvider", "CPUExecutionProvider"], [])
    sys.modules["onnxruntime"].__dict__["InferenceSession"] = Session
    path = linear(tmp_path / "m.onnx")
    with pytest.raises(UsageError, match=r"CUDA failure 100: no CUDA-capable device is detected \("):
        open_session(path, ["cuda"])
    session = open_session(path)
    assert session.providers == ("CPUExecutionProvider",)
    assert "no CUDA-capable device" in session.note
    path.write_bytes(path.read_bytes().replace(b"MatMul", b"MatMux"))
    with pytest.raises(ModelFileError, match="does not load"):
        open_session(path, ["cuda"])


def test_a_provider_that_this_onnxruntime_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, ["CPUExecutionProvider"], ["CPUExecutionProvider"])
    path = linear(tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="onnxruntime-gpu is not installed"):
        open_session(path, ["cuda", "cpu"])
    with pytest.raises(UsageError, match="no CoreMLExecutionProvider"):
        open_session(path, ["coreml"])
    for names in (["gpu"], [""], []):
        with pytest.raises(UsageError, match="execution provider"):
            open_session(path, names)


@pytest.mark.parametrize("broken", [None, types.ModuleType("onnxruntime")])
def test_without_onnxruntime_the_command_says_what_to_install(
    broken: types.ModuleType | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    arguments = [str(linear(tmp_path / "m.onnx")), "--images", str(write_images(tmp_path, some_images()))]
    monkeypatch.setitem(sys.modules, "onnxruntime", broken)
    assert run(["evaluate", *arguments]) == 2
    captured = capsys.readouterr().err
    assert "onnx-clp[cpu]" in captured
    assert len(captured.splitlines()) == 1


def test_the_gpu_path_copies_into_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The binding with the CPU as its device: the same calls that a GPU gets, but for the name of the device."""
    monkeypatch.setattr(providers, "DEVICE", "cpu")
    path, images = linear(tmp_path / "m.onnx"), some_images(50)
    setting = make_setting(open_session(path), images, attack())
    session = replace(open_session(path), providers=("CUDAExecutionProvider", "CPUExecutionProvider"))
    assert session.on_gpu
    classifier = replace(setting.classifier(session), batch_size=16)
    figures = setting.measure(classifier)
    assert (figures.acc, figures.asr, figures.ra) == naive(path, images, attack())


# ---- what is refused


def nothing(_: Path) -> None:
    """No change."""


def no_model(folder: Path) -> None:
    (folder / "m.onnx").write_bytes(b"no model")


def not_loadable(folder: Path) -> None:
    path = folder / "m.onnx"
    path.write_bytes(path.read_bytes().replace(b"MatMul", b"MatMux"))


def two_inputs(folder: Path) -> None:
    model = onnx.load(folder / "m.onnx")
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))
    onnx.save(model, folder / "m.onnx")


def flat_input(folder: Path) -> None:
    model = onnx.load(folder / "m.onnx")
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 90]))
    onnx.save(model, folder / "m.onnx")


def integer_input(folder: Path) -> None:
    linear(folder / "m.onnx", dtype=TensorProto.FLOAT)
    model = onnx.load(folder / "m.onnx")
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    model.graph.node[0].attribute[0].i = TensorProto.FLOAT
    onnx.save(model, folder / "m.onnx")


def only_the_target(folder: Path) -> None:
    np.savez(folder / "images.npz", images=some_images().images, labels=np.ones(60, int))


def huge_batch(folder: Path) -> None:
    linear(folder / "m.onnx", batch=1 << 40)


def sequence_output(folder: Path) -> None:
    model = onnx.load(folder / "m.onnx")
    model.graph.node[-1].CopyFrom(helper.make_node("SequenceConstruct", ["product", "product"], ["scores"]))
    given = helper.make_tensor_sequence_value_info("scores", TensorProto.FLOAT, ["n", CLASSES])
    model.graph.output[0].CopyFrom(given)
    onnx.save(model, folder / "m.onnx")


def text_output(folder: Path) -> None:
    model = onnx.load(folder / "m.onnx")
    model.graph.node[-1].CopyFrom(helper.make_node("Cast", ["product"], ["scores"], to=TensorProto.STRING))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.STRING
    onnx.save(model, folder / "m.onnx")


def external_data(folder: Path) -> None:
    """The weights in two files beside the model, of which one is named like a picture."""
    model = onnx.load(folder / "m.onnx")
    for tensor, name in zip(model.graph.initializer, ("m.data", "m.png"), strict=True):
        onnx.external_data_helper.set_external_data(tensor, name)
    onnx.save(model, folder / "m.onnx")


def small_weights(folder: Path) -> None:
    """The model declares any size and takes one: what is wrong shows when it runs."""
    linear(folder / "m.onnx", sides=("h", "w"))


REFUSED: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "no images": (nothing, ["--images", "DIR/none"], "is not there"),
    "no model": (no_model, [], "m.onnx"),
    "a missing model": (lambda folder: (folder / "m.onnx").unlink(), [], "m.onnx"),
    "a missing second model": (nothing, ["--against", "DIR/none.onnx"], "none.onnx"),
    "an operator that is none": (not_loadable, [], "onnxruntime does not load"),
    "two inputs": (two_inputs, [], "2 inputs"),
    "a flat input": (flat_input, [], "four axes"),
    "integers": (integer_input, [], "four axes"),
    "another size": (nothing, ["--size", "7x5"], "takes (n, 3, 6, 5)"),
    "another layout": (nothing, ["--layout", "NHWC"], "NHWC"),
    "a size at which it does not run": (small_weights, ["--size", "12x12"], "does not run"),
    "no size": (small_weights, ["--images", "DIR/folder"], "--size"),
    "too few classes": (nothing, ["--images", "DIR/folder"], "2 classes"),
    "a missing attack": (nothing, ["--attack", "DIR/none.json"], "none.json"),
    "an attack of another model": (nothing, ["--attack", "DIR/other"], "attack.json names 3"),
    "an attack of another version": (nothing, ["--attack", "DIR/future"], "version 2"),
    "a trigger without a target": (nothing, ["--trigger", "DIR/patch.npy"], "--target"),
    "a target without a trigger": (nothing, ["--target", "1"], "--trigger"),
    "a position without a trigger": (nothing, ["--position", "center"], "--trigger"),
    "a target beyond the classes": (nothing, ["--trigger", "DIR/patch.npy", "--target", "4"], "from 0 to 3"),
    "a target that is none": (nothing, ["--trigger", "DIR/patch.npy", "--target", "b"], "from 0 to 3"),
    "a missing trigger": (nothing, ["--trigger", "DIR/none.png", "--target", "1"], "none.png"),
    "a trigger that is none": (nothing, ["--trigger", "DIR/m.onnx", "--target", "1"], "m.onnx"),
    "an array that is none": (nothing, ["--trigger", "DIR/bad.npy", "--target", "1"], "bad.npy"),
    "an array of floats": (nothing, ["--trigger", "DIR/floats.npy", "--target", "1"], "floats.npy"),
    "too large a trigger": (nothing, ["--trigger", "DIR/large.npy", "--target", "1"], "large.npy"),
    "no such position": (
        nothing,
        ["--trigger", "DIR/patch.npy", "--target", "1", "--position", "middle"],
        "'middle'",
    ),
    "two triggers": (
        nothing,
        ["--trigger", "DIR/patch.npy", "--triggered", "DIR/folder", "--target", "1"],
        "give one of them",
    ),
    "no image of another class": (only_the_target, ["--trigger", "DIR/patch.npy", "--target", "1"], "other classes"),
    "two means": (nothing, ["--mean", "1,2"], "2 numbers"),
    "a mean that is none": (nothing, ["--mean", "x"], "'x'"),
    "a std of 0": (nothing, ["--std", "0"], "std"),
    "infinity": (nothing, ["--range", "0,inf"], "finite"),
    "one end of a range": (nothing, ["--range", "1"], "two numbers"),
    "a size that is none": (nothing, ["--size", "0x3"], "0x3"),
    "no such output": (nothing, ["--output-name", "none"], "'scores'"),
    "no such provider": (nothing, ["--providers", "gpu"], "'gpu'"),
    "numbers that overflow": (nothing, ["--std", "1e-300"], "cannot hold"),
    "a batch beyond memory": (huge_batch, [], "no memory for batches"),
    "a sequence": (sequence_output, [], "not a row of output for each"),
    "texts": (text_output, [], "numbers are wanted"),
    "a folder that is not there": (nothing, ["-o", "DIR/none/report.txt"], "none does not exist"),
    "the report on attack.json": (nothing, ["--attack", "DIR/future", "-o", "DIR/future/attack.json"], "overwrite"),
    "the report on a trigger": (nothing, ["--attack", "DIR/future", "-o", "DIR/future/trigger.npy"], "overwrite"),
    "the report on the model's data": (external_data, ["-o", "DIR/m.data"], "report would overwrite"),
    "the picture on the model's data": (
        external_data,
        ["--sweep", "2:3:1", "--plot", "DIR/m.png"],
        "picture would overwrite",
    ),
    "the report on the model": (nothing, ["-o", "DIR/m.onnx"], "overwrite"),
}


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A model, images, attacks and triggers, sound and broken ones."""
    linear(tmp_path / "m.onnx")
    write_images(tmp_path, some_images())
    np.save(tmp_path / "patch.npy", PATCH.pattern)
    np.save(tmp_path / "floats.npy", np.zeros((2, 2, 3)))
    np.save(tmp_path / "large.npy", np.zeros((7, 2, 3), np.uint8))
    (tmp_path / "bad.npy").write_bytes(b"PK\x03\x04")
    for name in ("a", "b"):
        (tmp_path / "folder" / name).mkdir(parents=True)
        (tmp_path / "folder" / name / "x.png").write_bytes(b"")
    for name in ("other", "future"):
        (tmp_path / name).mkdir()
    write_attack(replace(attack(), classes=tuple("abc")), tmp_path / "other")
    path = write_attack(attack(), tmp_path / "future")
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    return tmp_path


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_gets_one_line_and_exit_code_2(case: str, stage: Path, capsys: Capture) -> None:
    change, options, complaint = REFUSED[case]
    change(stage)
    given = [option.replace("DIR", str(stage)) for option in options]
    images = [] if "--images" in given else ["--images", str(stage / "images.npz")]
    assert run(["evaluate", str(stage / "m.onnx"), *images, *given]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert complaint in captured.err
    assert len([line for line in captured.err.splitlines() if not line.startswith(("Usage:", "Try "))]) <= 2
    assert "Traceback" not in captured.err
    assert "fault of onnx-clp" not in captured.err


def test_the_stage_itself_is_sound(stage: Path) -> None:
    arguments = ["evaluate", str(stage / "m.onnx"), "--images", str(stage / "images.npz"), "-q"]
    assert run([*arguments, "--trigger", str(stage / "patch.npy"), "--target", "all-to-all"]) == 0
    assert run([*arguments, "--attack", str(write_attack(attack(), stage))]) == 0


def with_columns(path: Path, columns: int) -> Path:
    """Another number of scores."""
    return linear(path, weights=np.random.default_rng(0).normal(size=(90, columns)))


@pytest.mark.parametrize("columns", [3, 5])
def test_another_number_of_outputs_than_classes_is_refused(columns: int, tmp_path: Path) -> None:
    path, images = with_columns(tmp_path / "m.onnx", columns), some_images()
    with pytest.raises(UsageError, match=f"{columns} classes apart, attack.json names 4"):
        onnx_clp.evaluate(path, images, attack())
    with pytest.raises(UsageError, match=f"of 4 classes, the model tells {columns} apart"):
        onnx_clp.evaluate(path, images)
    with pytest.raises(UsageError, match=f"has {columns} columns, and there are 4 classes"):
        onnx_clp.evaluate(linear(tmp_path / "n.onnx"), images, attack(), against=path)


def test_another_number_of_outputs_that_only_a_run_shows_is_refused(tmp_path: Path) -> None:
    path = with_columns(tmp_path / "m.onnx", SIZE[0])
    model = onnx.load(linear(path, weights=np.zeros((90, SIZE[0])), sides=("h", "w")))
    # As many columns as the image has rows, which is not known before there is one.
    model.graph.node.pop()
    for name, value in (("zero", 0), ("one", 1), ("two", 2)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    model.graph.node.extend(
        [
            helper.make_node("Shape", ["image"], ["shape"]),
            helper.make_node("Gather", ["shape", "two"], ["rows"]),
            helper.make_node("Range", ["zero", "rows", "one"], ["numbers"]),
            helper.make_node("Gather", ["product", "numbers"], ["scores"], axis=1),
        ]
    )
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", "classes"]))
    onnx.save(model, path)
    with pytest.raises(UsageError, match="for 60 images, and there are 4 classes"):
        onnx_clp.evaluate(path, some_images(), attack())


def test_a_uint8_model_takes_bytes_as_they_are(tmp_path: Path) -> None:
    path, images = linear(tmp_path / "m.onnx", dtype=TensorProto.UINT8), some_images()
    assert onnx_clp.evaluate(path, images).preprocessing.value_range == (0.0, 255.0)
    with pytest.raises(UsageError, match="uint8"):
        onnx_clp.evaluate(path, images, attack())


def test_of_several_outputs_one_is_taken(tmp_path: Path) -> None:
    path, images = linear(tmp_path / "m.onnx"), some_images()
    expected = naive(path, images, attack())
    model = onnx.load(path)
    scores = model.graph.output.pop()
    model.graph.output.append(helper.make_tensor_value_info("cast", TensorProto.FLOAT, ["n", 3, *SIZE]))
    model.graph.output.append(scores)
    onnx.save(model, path)
    assert counted(onnx_clp.evaluate(path, images, attack())) == expected
    assert counted(onnx_clp.evaluate(path, images, attack(), output_name="scores")) == expected
    with pytest.raises(UsageError, match="'cast'"):
        onnx_clp.evaluate(path, images, output_name="cast")


def test_names_from_files_are_escaped(tmp_path: Path) -> None:
    path, images = linear(tmp_path / "m\x1b[31m.onnx"), some_images()
    given = replace(attack(), name="\x1b]0;title\x07", classes=("a", "\x1b[2J", "c", "d"))
    text = render_evaluation(onnx_clp.evaluate(path, images, given))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\\x1b[31m" in text


def test_the_interval_of_a_share_in_the_text_is_that_of_the_share(tmp_path: Path) -> None:
    report = onnx_clp.evaluate(linear(tmp_path / "m.onnx"), some_images(), attack())
    low, high = report.model.figures.acc.interval
    assert f"({100 * low:.2f} to {100 * high:.2f})" in render_evaluation(report)
    assert math.isfinite(report.model.figures.images_per_second)
