"""Every built model: the scan finds what the case says, and the rewrite changes what was found and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from onnx_clp import runtime, sanitize, scan
from tests import naive, oracle
from tests.built import NAMES, Case, build, random_inputs, save

RTOL = 1e-5
"""The figure of the method's own test: a bound may differ by that from an SVD in float64."""

every_case = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the test itself runs what was written, sanitize need not."""
    monkeypatch.setattr(runtime, "available", lambda: False)


def planned(case: Case) -> dict[str, tuple[int, ...]]:
    """What a rewrite of the case silences, by layer."""
    return {site: outliers for site, outliers in outstanding(case).items() if site not in case.left}


def outstanding(case: Case) -> dict[str, tuple[int, ...]]:
    """What stands out in the case, by layer."""
    return {site: tuple(sorted(channels)) for site, channels in case.outliers.items() if channels}


@every_case
def test_scan_finds_the_sites_and_outliers_of_the_case(name: str, tmp_path: Path) -> None:
    case = build(name)
    report = scan(save(case, tmp_path))

    found = [layer for layer in report.layers if layer.name not in case.undecided]
    assert sorted(layer.name for layer in found) == sorted(case.sites)
    for layer in found:
        np.testing.assert_allclose(layer.bounds, case.sites[layer.name], rtol=RTOL, atol=0, err_msg=layer.name)
        assert sorted(channel.index for channel in layer.flagged) == sorted(case.outliers[layer.name])
        assert [channel.bound for channel in layer.flagged] == [layer.bounds[k.index] for k in layer.flagged]
        assert layer.dead == tuple(np.flatnonzero(case.sites[layer.name] == 0))
        assert layer.non_finite == tuple(np.flatnonzero(~np.isfinite(case.sites[layer.name])))
    skipped = [part for part in report.skipped if part.name not in case.undecided]
    assert sorted((part.name, part.reason) for part in skipped) == sorted(case.skipped.items())
    assert all(part.detail for part in skipped)
    assert bool(report.ambiguities) == bool(case.left)


@pytest.mark.usefixtures("unasked")
@every_case
def test_sanitize_silences_the_outliers_and_changes_nothing_else(name: str, tmp_path: Path) -> None:
    case = build(name)
    source, target = save(case, tmp_path), tmp_path / "sanitized.onnx"
    report = sanitize(source, target)

    silenced = {part.layer: part.channels for part in report.silenced}
    assert {layer: k for layer, k in silenced.items() if layer not in case.undecided} == planned(case)
    broken = {site: tuple(naive.broken(bounds)) for site, bounds in case.sites.items() if naive.broken(bounds)}
    left = {site: outliers for site, outliers in outstanding(case).items() if site in case.left}
    assert {part.layer: part.channels for part in report.left} == broken | left
    assert oracle.differences(oracle.load(source), oracle.load(target), silenced) == []

    again = {layer.name: layer for layer in scan(target).layers}
    assert again.keys() == {layer.name for layer in report.before.layers}
    for layer, channels in silenced.items():
        assert [again[layer].bounds[k] for k in channels] == [0.0] * len(channels)
    assert {entry.name for entry in tmp_path.iterdir()} >= {"sanitized.onnx", source.name}


@pytest.mark.usefixtures("in_this_process")
@every_case
def test_sanitize_makes_every_check_that_can_be_made(name: str, tmp_path: Path) -> None:
    case = build(name)
    source = save(case, tmp_path)
    report = sanitize(source, tmp_path / "sanitized.onnx")
    checks = {check.name: check for check in report.checks}

    assert checks["bytes"].passed is True
    assert checks["scan"].passed is True
    assert checks["onnxruntime-load"].passed is (None if not _loads(source) else True)
    # What lies in a subgraph or function cannot be made an output of the model.
    outer = {name for node in case.model.graph.node for name in (node.name, *node.output)}
    observable = any(part.layer in outer for part in report.silenced)
    assert case.not_run or checks["onnxruntime-run"].passed is (True if observable else None)
    refusal = _refusal(source)
    assert checks["checker"].passed is (None if refusal else True)
    assert refusal[:40] in checks["checker"].detail
    assert all(check.detail for check in checks.values())


@pytest.mark.usefixtures("unasked")
@every_case
def test_onnxruntime_loads_the_sanitized_file_where_it_loads_the_original(name: str, tmp_path: Path) -> None:
    case = build(name)
    source, target = save(case, tmp_path), tmp_path / "sanitized.onnx"
    sanitize(source, target)
    assert _loads(target) == _loads(source)
    assert case.not_run or _loads(target)


def _refusal(path: Path) -> str:
    """What onnx.checker says against a file; empty where it accepts it."""
    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        return str(error).strip().splitlines()[0]
    return ""


def _session(path: Path) -> Any:  # noqa: ANN401  # onnxruntime has no types
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    # As written: an optimiser that fuses may round otherwise in two models that compute the same.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _loads(path: Path) -> bool:
    try:
        _session(path)
    except Exception:  # noqa: BLE001  # onnxruntime raises kinds of its own
        return False
    return True


def _outputs(path: Path, case: Case) -> list[NDArray[Any]]:
    outputs: list[NDArray[Any]] = _session(path).run(None, random_inputs(case.model))
    return outputs


# ---- what the sanitized model computes

REFERENCE_EDITS = [
    "conv_bn_2d",
    "conv_bn_grouped",
    "conv_bn_depthwise",
    "conv_bn_chain",
    "conv_float16_cast_bn_float32",
    "folded_bias",
    "folded_add_lead",
    "folded_residual",
    "conv_transpose_folded_grouped",
    "conv_transpose_bn_grouped",
    "fused_conv",
    "densenet",
    "shuffle_bn",
    "unsorted_nodes",
    "shared_gamma",
    "shared_kernel",
    "shared_constants",
    "shared_with_shape_of_another",
    "qdq_uint8",
    "qdq_int8_bias",
    "qlinear_conv_uint8",
    "conv_integer",
    "weight_transpose",
    "weight_cast_float16",
    "external_offsets",
    "sparse",
]
"""One of each form whose sites lie in the main graph."""


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("name", REFERENCE_EDITS)
def test_the_sanitized_model_computes_what_a_plain_edit_of_the_model_computes(name: str, tmp_path: Path) -> None:
    case = build(name)
    source, target, reference = save(case, tmp_path), tmp_path / "sanitized.onnx", tmp_path / "reference.onnx"
    sanitize(source, target)
    reference.write_bytes(_plainly_edited(oracle.load(source), planned(case)).SerializeToString())

    before, after, expected = _outputs(source, case), _outputs(target, case), _outputs(reference, case)
    assert len(after) == len(expected)
    for found, wanted in zip(after, expected, strict=True):
        # Not a bit of leeway: the same operators on the same numbers, one thread, nothing fused.
        np.testing.assert_array_equal(found, wanted)
    assert any(not np.array_equal(x, y) for x, y in zip(before, after, strict=True)), "the outlier reaches no output"


def _plainly_edited(model: onnx.ModelProto, outliers: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    """The model with each knob of an outlier channel replaced by an initializer of its own, in which it is zero."""
    nodes = {node.name: node for node in model.graph.node}
    reading = oracle.Model(model)
    edits = []
    for site, channels in outliers.items():
        total = oracle.channels_of(reading, site)
        edits += [
            (knob.place, oracle.silent(reading, knob, channels, total)) for knob in oracle.knobs(reading, site, total)
        ]
    for number, ((node, position), array) in enumerate(edits):
        name = f"plain_edit_{number}"
        model.graph.initializer.append(numpy_helper.from_array(array, name))
        nodes[node].input[position] = name
    return model
