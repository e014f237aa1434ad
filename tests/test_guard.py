"""Without images: made-up inputs, what counts as a collapse, and which channels are refused for it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from onnx_clp import SanitizeReport, UsageError, guard, runtime, sanitize
from onnx_clp.evaluation.classifier import class_output
from onnx_clp.evaluation.outputs import Output, first_of_classes
from onnx_clp.evaluation.session import open_session
from onnx_clp.evaluation.sweep import sweep
from onnx_clp.guard import Flag, collapsed, others, tolerable
from onnx_clp.probes import count, probes
from onnx_clp.report.text import render_sanitize as as_text
from tests.channel_nets import CLASSES, NETS, SIZE, Net
from tests.correction_nets import images, of_batch, saved
from tests.naive_correction import outputs

N = 16
CARRIER, OTHERS = 8, (2, 5)


def carried() -> onnx.ModelProto:
    """Three channels stand out; the classes hang on one of them alone, ``CARRIER``."""
    net = Net(seed=3)
    W = net.random.normal(0, 0.05, (N, 3, 3, 3))
    for channel, factor in ((CARRIER, 20), (OTHERS[0], 30), (OTHERS[1], 10)):
        W[channel] *= factor
    W[CARRIER] = np.abs(W[CARRIER])
    x = net.op("Relu", net.op("Conv", "x", net.constant(W), net.constant(np.zeros(N)), pads=[1] * 4))
    head = np.zeros((CLASSES, N))
    head[:, CARRIER] = 1, 2, 4, 0, 0
    flat = net.op("Flatten", net.op("GlobalAveragePool", x))
    bias = np.array([0, -1, -8, -9, -9.0])
    return net.model(net.op("Gemm", flat, net.constant(head), net.constant(bias), transB=1))


def guarded(path: Path, folder: Path, **options: Any) -> tuple[Path, SanitizeReport]:  # noqa: ANN401
    target = folder / "out.onnx"
    target.unlink(missing_ok=True)
    return target, sanitize(path, target, **{"u": 0.2, "max_share": 1.0, "metadata": False, **options})


def probes_check(report: SanitizeReport) -> tuple[bool | None, str]:
    (found,) = (check for check in report.checks if check.name == "probes")
    return found.passed, found.detail


def silenced(report: SanitizeReport) -> list[int]:
    return [channel for part in report.silenced for channel in part.channels]


def classes(path: Path) -> NDArray[np.int64]:
    """Of all probes, from a session of its own."""
    given = probes((1, 3, SIZE, SIZE), np.float32, channels_last=False)
    return np.asarray(outputs(onnx.load(path), list(given))[0].argmax(1), np.int64)


# ---- the rule


def test_a_channel_that_carries_all_classes_is_left(tmp_path: Path) -> None:
    path = saved(carried(), tmp_path)
    target, report = guarded(path, tmp_path)
    assert silenced(report) == list(OTHERS)
    (left,) = report.left
    assert left.channels == (CARRIER,)
    assert left.reason == "silenced too, the model answers made-up inputs with one class, or does not run"
    assert not collapsed(classes(path).tolist(), classes(target).tolist())
    passed, detail = probes_check(report)
    assert passed
    assert detail.startswith("with all channels silenced, on 84 made-up inputs the copy answers 1 class")
    assert detail.endswith("1 of 3 channels were left for that")
    dry = sanitize(path, tmp_path / "dry.onnx", 0.2, max_share=1.0, dry_run=True)
    assert (dry.silenced, dry.left) == (report.silenced, report.left)


def test_without_the_guard_it_is_silenced(tmp_path: Path) -> None:
    path = saved(carried(), tmp_path)
    target, report = guarded(path, tmp_path, guard=False)
    assert silenced(report) == sorted((CARRIER, *OTHERS))
    assert collapsed(classes(path).tolist(), classes(target).tolist())
    assert not [check for check in report.checks if check.name == "probes"]
    with pytest.raises(UsageError, match="there is no guard to leave out"):
        guarded(path, tmp_path, guard=False, images=images(60))


def test_a_sweep_measures_what_the_guard_would_refuse(tmp_path: Path) -> None:
    path = saved(carried(), tmp_path)
    np.savez(tmp_path / "set.npz", images=images(10), labels=np.zeros(10, np.int64))
    report = sweep(path, tmp_path / "set.npz", u=[0.2])
    assert [row.silenced_channels for row in report.rows] == [3]


def test_a_model_that_does_not_collapse_is_written_as_it_would_be(tmp_path: Path) -> None:
    path = saved(NETS["residual"](), tmp_path)
    target, report = guarded(path, tmp_path, u=3.0)
    content = target.read_bytes()
    passed, detail = probes_check(report)
    assert passed
    assert report.silenced
    before, after = classes(path).tolist(), classes(target).tolist()
    for answers in (before, after):
        share = 1 - others(answers) / 84
        assert f"{len(set(answers))} class{'es' * (len(set(answers)) > 1)}, the most frequent {share:.0%}" in detail
    assert guarded(path, tmp_path, u=3.0, guard=False)[0].read_bytes() == content


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([0] * 40 + [1] * 40, [0] * 80, True),
        ([0] * 76 + [1] * 4, [2] * 80, True),
        ([0] * 77 + [1] * 3, [2] * 80, False),
        ([0] * 80, [1] * 80, False),
        ([0] * 40 + [1] * 40, [3] * 76 + [1] * 4, True),
        ([0] * 40 + [1] * 40, [3] * 75 + [1] * 5, False),
        ([0] * 51 + [1] * 49, [3] * 95 + [1] * 5, False),
        ([0] * 79 + [1], [0] * 79 + [1], False),
        ([0] * 40 + [1] * 40, [-1] * 80, True),
    ],
)
def test_what_a_collapse_is(before: list[int], after: list[int], expected: bool) -> None:  # noqa: FBT001
    assert collapsed(before, after) is expected


@pytest.mark.parametrize("seed", range(30))
def test_what_is_kept_is_fine_and_what_is_refused_is_not(seed: int) -> None:
    """Against adding one channel after the other, where what is not fine never becomes fine by more."""
    random = np.random.default_rng(seed)
    flags: list[Flag] = [(0, int(channel)) for channel in random.permutation(20)]
    heavy = {flag for flag in flags if random.random() < 0.2} | {flags[seed % 20]}
    room = int(random.integers(0, len(heavy)))

    def fine(chosen: Collection[Flag]) -> bool:
        return len(heavy & {*chosen}) <= room

    one_by_one: list[Flag] = []
    for flag in flags:
        if fine([*one_by_one, flag]):
            one_by_one.append(flag)
    kept, refused = tolerable(flags, fine)
    assert [*kept] == one_by_one
    assert {*refused} == {*flags} - {*kept}


def test_trials_are_bounded_and_what_is_not_reached_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[list[Flag]] = []
    monkeypatch.setattr(guard, "MOST_TRIALS", 5)

    def never(chosen: Collection[Flag]) -> bool:
        tried.append([*chosen])
        return False

    kept, refused = tolerable([(0, channel) for channel in range(8)], never)
    assert len(tried) == 5
    assert not kept
    assert refused == ((0, 0), (0, 1))
    assert tolerable([(0, 0)], never) == ((), ((0, 0),))


# ---- the probes


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.uint8])
def test_probes_are_finite_varied_and_always_the_same(dtype: type[np.generic]) -> None:
    found = probes((1, 3, 12, 10), dtype, channels_last=False)
    assert found.dtype == dtype
    assert found.shape == (count(dtype), 1, 3, 12, 10)
    assert np.isfinite(found.astype(np.float64)).all()
    assert len({each.tobytes() for each in found}) == len(found)
    assert found.max() > 200
    assert found.min() == 0 if dtype is np.uint8 else found.min() < -1
    assert np.array_equal(found, probes((1, 3, 12, 10), dtype, channels_last=False))


def test_probes_are_images_whatever_the_order_of_the_axes() -> None:
    first, last = (probes(shape, np.float32, channels_last=shape[1] != 3) for shape in ((1, 3, 12, 10), (1, 12, 10, 3)))
    assert np.array_equal(first, last.transpose(0, 1, 4, 2, 3))


def test_probes_fill_whole_batches() -> None:
    one, many = (probes((size, 1, 6, 6), np.float32, channels_last=False) for size in (1, 16))
    assert many.shape == (6, 16, 1, 6, 6)
    flat = many.reshape(-1, 1, 6, 6)
    assert np.array_equal(flat[:84], one[:, 0])
    assert (flat[84:] == one[-1]).all()


def test_a_model_of_a_fixed_batch_is_probed_like_any(tmp_path: Path) -> None:
    details = []
    for number, model in enumerate((carried(), of_batch(carried(), 16))):
        folder = tmp_path / str(number)
        folder.mkdir()
        details.append(probes_check(guarded(saved(model, folder), folder)[1]))
    assert details[0] == details[1]


# ---- where it is not made


def unprobed(model: onnx.ModelProto, folder: Path, **options: Any) -> str:  # noqa: ANN401
    _, report = guarded(saved(model, folder), folder, **options)
    passed, detail = probes_check(report)
    assert passed is None
    assert f"not made  probes: {detail}" in as_text(report)
    return detail


def changed(**axes: int) -> onnx.ModelProto:
    """The network with an axis of its input left open."""
    model = carried()
    for axis in axes.values():
        dim = model.graph.input[0].type.tensor_type.shape.dim[axis]
        dim.Clear()
        dim.dim_param = "open"
    return model


def test_a_model_without_classes_is_not_probed(tmp_path: Path) -> None:
    model = carried()
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("v1", TensorProto.FLOAT, ["n", N, SIZE, SIZE]))
    assert unprobed(model, tmp_path) == "it has no output with a number for each class"


def test_a_model_of_two_inputs_is_not_probed(tmp_path: Path) -> None:
    model = carried()
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))
    assert "2 inputs" in unprobed(model, tmp_path)


def test_a_model_of_open_size_is_probed_where_one_is_given(tmp_path: Path) -> None:
    assert "dynamic shape: give --input-shape x=" in unprobed(changed(height=2), tmp_path)
    _, report = guarded(saved(changed(height=2), tmp_path), tmp_path, input_shapes={"x": (1, 3, SIZE, SIZE)})
    assert probes_check(report)[0]
    assert silenced(report) == list(OTHERS)


def test_without_onnxruntime_nothing_is_probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "available", lambda: False)
    assert unprobed(carried(), tmp_path) == "onnxruntime is not installed"


def test_where_nothing_is_silenced_nothing_is_probed_and_nothing_warned(tmp_path: Path) -> None:
    assert unprobed(carried(), tmp_path, u=50) == "nothing was silenced"
    assert not guarded(tmp_path / "model.onnx", tmp_path, u=50)[1].warnings


def test_a_model_that_has_one_answer_for_all_says_nothing(tmp_path: Path) -> None:
    model = carried()
    bias = model.graph.initializer[-1]
    bias.CopyFrom(onnx.numpy_helper.from_array(np.array([1e9, 0, 0, 0, 0], np.float32), bias.name))
    assert unprobed(model, tmp_path) == "the input answers 84 of 84 made-up inputs with one class itself"


def test_a_model_that_onnxruntime_does_not_load_is_written_all_the_same(tmp_path: Path) -> None:
    model = carried()
    model.graph.node[-1].domain = "nobody"
    model.opset_import.append(helper.make_opsetid("nobody", 1))
    assert "nobody" in unprobed(model, tmp_path)


def test_what_costs_was_not_measured_is_said(tmp_path: Path) -> None:
    _, report = guarded(saved(carried(), tmp_path), tmp_path)
    (warning,) = report.warnings
    assert "was not measured" in warning
    assert "--images" in warning
    assert warning in as_text(report)
    assert not guarded(tmp_path / "model.onnx", tmp_path, images=images(60))[1].warnings


@pytest.mark.parametrize("name", NETS)
def test_the_output_is_the_one_that_an_evaluation_takes(name: str, tmp_path: Path) -> None:
    model = NETS[name]()
    extra = [helper.make_tensor_value_info("v0", TensorProto.FLOAT, ["n", None, None, None])]
    last = model.graph.output[0]
    for order in ([last], [*extra, last]):
        del model.graph.output[:]
        model.graph.output.extend(order)
        session = open_session(saved(model, tmp_path), ["cpu"])
        found = first_of_classes([Output(info.name, guard._shape(info)) for info in model.graph.output])
        assert found is not None
        assert found.name == class_output(session).name == last.name
