"""A budget: the walk against a loop that sanitizes at each u and measures each file; what held-out images may do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from jsonschema import Draft202012Validator
from numpy.typing import NDArray

import onnx_clp
from onnx_clp import SanitizeReport, Share, evaluate, sanitize
from onnx_clp.cli import run as run_command
from onnx_clp.correction.budget import Budget, Step, grid
from onnx_clp.errors import UsageError
from onnx_clp.evaluation.images import LabelledImages, labelled, stratified
from onnx_clp.report.json import render_sanitize as as_json
from onnx_clp.report.text import render_sanitize as as_text
from tests.channel_nets import CLASSES
from tests.correction_nets import CORRECTED, feeds, images, of_batch, saved
from tests.naive_correction import outputs

pytestmark = pytest.mark.usefixtures("in_this_process")

Pixels = NDArray[np.uint8]
NAMES = [str(number) for number in range(CLASSES)]


def answered(path: Path, pixels: Pixels) -> NDArray[np.int64]:
    """The class of each image, from a session of its own."""
    (scores,) = outputs(onnx.load(path), feeds(pixels))
    return np.asarray(scores.argmax(1), np.int64)


def with_labels(path: Path, pixels: Pixels) -> LabelledImages:
    """The labels are what the model answers, but for every fifth."""
    labels = answered(path, pixels)
    labels[::5] = (labels[::5] + 1) % CLASSES
    return labelled(pixels, labels, NAMES)


@dataclass(frozen=True)
class Held:
    """The two parts of the images."""

    correcting: Pixels
    rest: LabelledImages


def parts(all_images: LabelledImages, *, by_class: bool, share: float = 0.5) -> Held:
    """As they are documented: drawn at random, with labels each class by its share."""
    labels = all_images.labels if by_class else np.zeros_like(all_images.labels)
    held = stratified(labels, round(share * len(labels)), 0)
    rest = labelled(all_images.images[held], all_images.labels[held], NAMES)
    return Held(np.delete(all_images.images, held, 0), rest)


def naive(path: Path, held: Held, budget: Budget, folder: Path, **options: Any) -> list[tuple[Step, Path]]:  # noqa: ANN401
    """Each u in turn, a file each, until one breaks the budget; of those in a row that silence the same, the last."""
    before, pixels = answered(path, held.rest.images), held.rest.images
    found: list[tuple[Step, Path]] = []
    silenced: object = None
    for number, u in enumerate([99.0, *(6 - 0.25 * step for step in range(19))]):
        copy = folder / f"{number}.onnx"
        report = sanitize(path, copy, u, images=held.correcting, metadata=False, **options)
        after = answered(copy, pixels)
        agreement = Share(int((before == after).sum()), len(pixels))
        accuracy = evaluate(path, held.rest, against=copy)
        assert accuracy.against is not None
        lost = 100 * (accuracy.model.figures.acc.value - accuracy.against.figures.acc.value)
        kept = budget.min_agreement is None or 100 * agreement.value >= budget.min_agreement
        kept &= budget.max_accuracy_drop is None or lost <= budget.max_accuracy_drop
        told = accuracy.against.figures.acc if budget.max_accuracy_drop is not None else None
        if found and silenced == report.silenced:
            found.pop()
        found.append((Step(None if u > 6 else u, report.silenced_channels, agreement, told, kept), copy))
        silenced = report.silenced
        if not kept:
            break
    return found


@pytest.mark.parametrize(
    ("net", "budget", "options"),
    [
        ("residual", Budget(min_agreement=80), {"max_share": 1.0}),
        ("residual", Budget(max_accuracy_drop=12), {"max_share": 1.0, "repair": "refit", "augment": 1}),
        ("residual", Budget(60, 40), {"max_share": 1.0, "repair": "none", "score": "path"}),
        ("residual", Budget(80, 40), {"max_share": 0.1, "repair": "none", "score": "activity", "threshold": "log-std"}),
    ],
)
def test_the_walk_is_that_of_a_loop_that_writes_and_measures_each_file(
    net: str, budget: Budget, options: dict[str, Any], tmp_path: Path
) -> None:
    path = saved(CORRECTED[net](), tmp_path)
    given = with_labels(path, images(60))
    held = parts(given, by_class=budget.max_accuracy_drop is not None)
    expected = naive(path, held, budget, tmp_path, **options)
    target = tmp_path / "walked.onnx"
    asked: dict[str, Any] = {"min_agreement": budget.min_agreement, "max_accuracy_drop": budget.max_accuracy_drop}
    report = sanitize(path, target, images=given, metadata=False, **asked, **options)
    assert report.budget is not None
    assert list(report.budget.steps) == [step for step, _ in expected]
    assert len(expected) > 2
    assert expected[-1][0].kept == (options.get("score") == "activity")
    step, copy = [each for each in expected if each[0].kept][-1]
    assert report.budget.taken == step
    assert target.read_bytes() == copy.read_bytes()
    assert report.correction is not None
    assert report.correction.agreement == (
        step.agreement if step.channels or options.get("repair") == "refit" else None
    )
    assert report.before.u == step.u


def walked(path: Path, folder: Path, **options: Any) -> tuple[Path, SanitizeReport]:  # noqa: ANN401
    target = folder / "walked.onnx"
    target.unlink(missing_ok=True)
    return target, sanitize(path, target, **{"images": images(60), "max_share": 1.0, "metadata": False, **options})


# ---- held-out images


@pytest.mark.parametrize("repair", ["statistics", "refit"])
def test_nothing_is_corrected_by_held_out_images(repair: str, tmp_path: Path) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    given = images(60)
    held = stratified(np.zeros(60, np.int64), 20, 0)
    options: dict[str, Any] = {"u": 3.0, "repair": repair, "min_agreement": 0, "hold_out": 1 / 3}
    target, report = walked(path, tmp_path, images=given, **options)
    content = target.read_bytes()
    other = given.copy()
    other[held] = 255 - other[held]
    assert walked(path, tmp_path, images=other, **options)[0].read_bytes() == content
    other = given.copy()
    first = np.setdiff1d(np.arange(60), held)[0]
    other[first] = 255 - other[first]
    assert walked(path, tmp_path, images=other, **options)[0].read_bytes() != content
    assert report.correction is not None
    assert report.budget is not None
    assert (report.correction.images.count, report.budget.held_out) == (40, 20)
    assert report.budget.steps[-1].u == 3.0


def test_both_parts_of_a_model_with_a_fixed_batch_are_whole_batches(tmp_path: Path) -> None:
    path = saved(of_batch(CORRECTED["plain"](), 8), tmp_path)
    target, report = walked(path, tmp_path, u=2.0, min_agreement=0)
    assert report.correction is not None
    assert report.budget is not None
    assert (report.correction.images.count, report.budget.held_out) == (24, 32)
    held = stratified(np.zeros(60, np.int64), 32, 0)
    after, before = (outputs(onnx.load(each), feeds(images(60)[held], size=8))[0].argmax(1) for each in (target, path))
    assert report.budget.steps[-1].agreement == Share(int((after == before).sum()), 32)
    with pytest.raises(UsageError, match="8 images at once are needed to correct by, and others to judge by"):
        walked(path, tmp_path, images=images(15), min_agreement=0)


# ---- what is written where nothing keeps it


def test_where_no_step_silences_anything_the_input_is_written(tmp_path: Path) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    strict = next(
        report
        for seed in range(20)
        for _, report in [
            walked(path, tmp_path, images=images(60, seed), u=6.5, min_agreement=100, threshold="log-mad")
        ]
        if report.budget is not None and not report.budget.steps[-1].kept
    )
    assert strict.budget is not None
    taken = strict.budget.taken
    assert taken is not None
    assert (taken.u, taken.channels) == (None, 0)
    assert not strict.silenced
    assert strict.before.u == 6.5
    assert {part.reason for part in strict.left} == {"silencing what is flagged does not keep the budget"}
    assert (tmp_path / "walked.onnx").read_bytes() == path.read_bytes()
    assert "no channel: u = 6.5 is beyond the budget" in as_text(strict)


def test_where_a_refit_alone_is_too_much_the_input_is_written(tmp_path: Path) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    target, report = walked(path, tmp_path, repair="refit", ridge=1e6, min_agreement=100)
    assert report.budget is not None
    assert report.budget.taken is None
    assert [step.kept for step in report.budget.steps] == [False]
    assert target.read_bytes() == path.read_bytes()
    assert report.correction is not None
    assert not report.correction.refitted
    assert "the copy is the input" in as_text(report)
    assert json.loads(as_json(report))["budget"]["taken"] is None


# ---- the rule


def test_counts_are_compared_exactly() -> None:
    """Every tenth of a per cent of 1,000 images, of which 32.3·10 and others are no whole number in binary."""
    whole = Share(1000, 1000)
    for count in range(1001):
        drop, least = Budget(max_accuracy_drop=count / 10), Budget(min_agreement=count / 10)
        assert drop.keeps(whole, whole, Share(1000 - count, 1000))
        assert least.keeps(Share(count, 1000), None, None)
        if count < 1000:
            assert not drop.keeps(whole, whole, Share(999 - count, 1000))
        if count:
            assert not least.keeps(Share(count - 1, 1000), None, None)


def test_of_two_budgets_both_hold() -> None:
    both, whole = Budget(90, 5), Share(100, 100)
    assert both.keeps(Share(90, 100), whole, Share(95, 100))
    assert not both.keeps(Share(89, 100), whole, Share(95, 100))
    assert not both.keeps(Share(90, 100), whole, Share(94, 100))


@pytest.mark.parametrize(
    ("lowest", "values"),
    [(5.5, (6.0, 5.75, 5.5)), (5.6, (6.0, 5.75, 5.6)), (6.0, (6.0,)), (7.5, (7.5,)), (5.75, (6.0, 5.75))],
)
def test_the_values_of_u(lowest: float, values: tuple[float, ...]) -> None:
    assert grid(lowest) == values
    assert grid(1.5) == tuple(6 - step / 4 for step in range(19))


# ---- options, reports


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"images": None, "min_agreement": 97}, "--min-agreement goes with --images"),
        ({"images": None, "max_accuracy_drop": 1}, "--max-accuracy-drop goes with --images"),
        ({"min_agreement": 100.1}, "--min-agreement is 100.1"),
        ({"min_agreement": float("nan")}, "--min-agreement is nan"),
        ({"max_accuracy_drop": -1}, "--max-accuracy-drop is -1"),
        ({"hold_out": 0.5}, "--hold-out goes with a budget"),
        ({"min_agreement": 97, "hold_out": 1.0}, "held out is 1.0"),
        ({"min_agreement": 97, "hold_out": 0.0}, "held out is 0.0"),
        ({"max_accuracy_drop": 1}, "an accuracy needs labels"),
        ({"min_agreement": 97, "images": images(2)}, "holds 2 images, of which 1 would be held out"),
        ({"min_agreement": 97, "images": images(2), "hold_out": 0.9}, "holds 2 images, of which 1 would be held out"),
        ({"min_agreement": 97, "output_name": "nothing"}, "has no output 'nothing'"),
    ],
)
def test_what_cannot_be_asked_for(options: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    path = saved(CORRECTED["plain"](), tmp_path)
    with pytest.raises(UsageError, match=complaint):
        walked(path, tmp_path, **options)


def test_a_model_without_classes_has_no_budget(tmp_path: Path) -> None:
    model = CORRECTED["plain"]()
    feature = next(node.output[0] for node in model.graph.node if node.op_type == "Relu")
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(feature, onnx.TensorProto.FLOAT, ["n", 16, 8, 8]))
    path = saved(model, tmp_path)
    with pytest.raises(UsageError, match="no output"):
        walked(path, tmp_path, min_agreement=97)


def test_the_report_fits_its_schema_and_the_note_tells_the_budget(tmp_path: Path) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    given = with_labels(path, images(60))
    options: dict[str, Any] = {"images": given, "min_agreement": 70, "max_accuracy_drop": 30.5, "metadata": True}
    target, report = walked(path, tmp_path, **options)
    document = json.loads(as_json(report))
    schema = json.loads((Path(onnx_clp.__file__).parent / "report" / "sanitize-1.schema.json").read_text())
    Draft202012Validator(schema).validate(document)
    assert report.budget is not None
    found, taken = document["budget"], report.budget.taken
    assert taken is not None
    assert found["steps"][found["taken"]]["u"] == taken.u
    assert found["hold_out"] == 0.5
    assert found["accuracy"]["total"] == 30
    note = {entry.key: entry.value for entry in onnx.load(target).metadata_props}
    assert note["onnx_clp.u"] == repr(taken.u)
    assert (note["onnx_clp.min_agreement"], note["onnx_clp.max_accuracy_drop"]) == ("70.0", "30.5")
    assert note["onnx_clp.images"] == "30"
    text = as_text(report)
    assert "70 % answered as before at least and 30.5 points of accuracy lost at most, on 30 images held out" in text
    assert f"u = {taken.u:g}, {taken.channels} channel" in text


def test_the_command_reads_labels_where_accuracy_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    given = with_labels(path, images(60))
    np.savez(tmp_path / "set.npz", images=given.images, labels=given.labels)
    np.save(tmp_path / "alone.npy", given.images)
    common = ["sanitize", str(path), str(tmp_path / "out.onnx"), "--max-share", "1", "--hold-out", "40%", "--force"]
    asked = ["--max-accuracy-drop", "30", "--format", "json", "-u", "2"]
    assert run_command([*common, *asked, "--images", str(tmp_path / "set.npz")]) == 0
    document = json.loads(capsys.readouterr().out)
    _, report = walked(path, tmp_path, images=given, u=2.0, max_accuracy_drop=30, hold_out=0.4)
    assert document["budget"] == json.loads(as_json(report))["budget"]
    assert document["budget"]["accuracy"]["total"] == 24
    assert run_command([*common, *asked, "--images", str(tmp_path / "alone.npy")]) == 2
    assert "no .npz" in capsys.readouterr().err
    assert run_command([*common, "--min-agreement", "0", "--images", str(tmp_path / "alone.npy")]) == 0


# ---- what no budget can be judged on


def test_one_number_an_image_tells_no_class(tmp_path: Path) -> None:
    model = CORRECTED["plain"]()
    first = onnx.numpy_helper.from_array(np.array([0], np.int64), "first")
    model.graph.initializer.append(first)
    model.graph.node.append(onnx.helper.make_node("Gather", [model.graph.output[0].name, "first"], ["one"], axis=1))
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("one", onnx.TensorProto.FLOAT, ["n", 1]))
    with pytest.raises(UsageError, match="answers cannot be told"):
        walked(saved(model, tmp_path), tmp_path, min_agreement=97)


def test_answers_that_are_nan_to_begin_with_are_none(tmp_path: Path) -> None:
    model = CORRECTED["plain"]()
    model.graph.node.append(onnx.helper.make_node("Sqrt", [model.graph.output[0].name], ["root"]))
    shape = [each.dim_param or each.dim_value for each in model.graph.output[0].type.tensor_type.shape.dim]
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("root", onnx.TensorProto.FLOAT, shape))
    with pytest.raises(UsageError, match="answers cannot be told"):
        walked(saved(model, tmp_path), tmp_path, min_agreement=97)


def test_a_layer_is_not_left_for_its_share_where_a_budget_says_how_much(tmp_path: Path) -> None:
    path = saved(CORRECTED["residual"](), tmp_path)
    free = walked(path, tmp_path, min_agreement=0, max_share=None)[1]
    assert free.max_share == 1
    assert free.budget is not None
    assert not free.left
    assert [step.channels for step in free.budget.steps] == sorted(step.channels for step in free.budget.steps)
    assert walked(path, tmp_path, min_agreement=0, max_share=0.1)[1].left
    assert walked(path, tmp_path, max_share=None)[1].max_share == 0.1


def test_few_images_that_are_held_out_are_warned_of(tmp_path: Path) -> None:
    path = saved(CORRECTED["plain"](), tmp_path)
    correction = walked(path, tmp_path, min_agreement=0)[1].correction
    assert correction is not None
    assert "only 30 images are held out" in correction.warnings[-1]
