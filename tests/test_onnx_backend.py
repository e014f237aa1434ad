"""Every model that the installed onnx package brings to test runtimes: each ends with a report or with an OnnxClpError.

They are files under onnx/backend/test/data, and cases made by onnx.backend.test.case.node, which older versions of onnx
ship as files too: one or more for each operator, with its inputs and the outputs that it must give. Those are an oracle
for the constants that `scan` computes on its way to a kernel.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.case.test_case import TestCase

import onnx_clp
from tests.rewritten import assert_differs_as_planned

pytestmark = pytest.mark.usefixtures("in_this_process")

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
FILES = sorted(DATA.rglob("*.onnx"))
CHUNKS = 8
"""Tests among which the models are dealt out: an id for each of the thousands would only slow pytest down."""

U = 1.0
"""Low, so that layers of four channels and more can have an outlier: (n − 1)/√n > 1 from n = 3 on."""


@cache
def cases() -> tuple[TestCase, ...]:
    """The cases of onnx for single operators, with a model each."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they compute infinities on purpose
        return tuple(case for case in collect_testcases(None) if case.model is not None)


def scan_or_refuse(path: Path) -> onnx_clp.ScanReport | None:
    """The report; None where there is an OnnxClpError. Any other exception comes through."""
    try:
        return onnx_clp.scan(path, U)
    except onnx_clp.OnnxClpError:
        return None


def test_there_are_models() -> None:
    assert len(FILES) > 100
    assert len(cases()) > 1000


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_file_ends_well(chunk: int) -> None:
    for path in FILES[chunk::CHUNKS]:
        report = scan_or_refuse(path)
        assert report is not None, path  # all of them are models
        assert_all_seen(onnx.load(path, load_external_data=False), report)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_case_ends_well(chunk: int, tmp_path: Path) -> None:
    """The case as it is, and with every input but the first made an initializer, as weights are."""
    path = tmp_path / "model.onnx"
    for case in cases()[chunk::CHUNKS]:
        assert case.model is not None
        for model in (case.model, *frozen(case, first=1)):
            path.write_bytes(model.SerializeToString())
            report = scan_or_refuse(path)
            assert report is not None, case.name
            assert_all_seen(model, report)


def assert_all_seen(model: onnx.ModelProto, report: onnx_clp.ScanReport) -> None:
    """Each convolution and BN of the main graph is in a layer or skipped. By number: their names may be missing."""
    wanted = sum(node.op_type in {"Conv", "ConvTranspose", "BatchNormalization"} for node in model.graph.node)
    layers = [(layer.name, *layer.operators) for layer in report.layers]
    assert len({name for names in layers for name in names} | {part.name for part in report.skipped}) >= wanted


def as_array(value: Any) -> Any:  # noqa: ANN401  a value of any of ONNX's types
    """The value of a case as an array, where it is a tensor."""
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def frozen(case: TestCase, first: int) -> Iterator[onnx.ModelProto]:
    """The model of ``case`` with its inputs from ``first`` on made initializers; nothing where they are no tensors."""
    assert case.model is not None
    assert case.data_sets is not None
    given = list(map(as_array, case.data_sets[0][0]))
    names = [value.name for value in case.model.graph.input]
    if len(given) != len(names) or not all(isinstance(array, np.ndarray) for array in given):
        return
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    for name, array in list(zip(names, given, strict=True))[first:]:
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    del model.graph.input[first:]
    yield model


# -- constants ---------------------------------------------------------------------------------------------------------


LARGEST = 4096
"""Numbers in a kernel: more would show nothing more."""


def as_kernel(case: TestCase) -> tuple[onnx.ModelProto, NDArray[np.float32]] | None:
    """A model with a Conv whose kernel (n, 1, 1, 1) the case computes from constants alone, and these n numbers.

    None where the case gives no numbers, or too many.
    """
    assert case.data_sets is not None
    models, result = list(frozen(case, first=0)), as_array(case.data_sets[0][1][0])
    if (
        not models
        or not isinstance(result, np.ndarray)
        or not 0 < result.size <= LARGEST
        or result.dtype.kind in "OUSc"
    ):
        return None
    (model,) = models
    graph = model.graph
    graph.node.extend([
        helper.make_node("Cast", [graph.output[0].name], ["kernel_float"], "kernel_cast", to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["kernel_float", "kernel_shape"], ["kernel"], "kernel_reshape"),
        helper.make_node("Conv", ["kernel_image", "kernel"], ["kernel_made"], "kernel_conv"),
        helper.make_node("Relu", ["kernel_made"], ["kernel_end"], "kernel_relu"),
    ])  # fmt: skip
    graph.initializer.append(numpy_helper.from_array(np.array([-1, 1, 1, 1]), "kernel_shape"))
    del graph.output[:]
    graph.input.append(helper.make_tensor_value_info("kernel_image", TensorProto.FLOAT, [1, 1, 4, 4]))
    graph.output.append(helper.make_tensor_value_info("kernel_end", TensorProto.FLOAT, [1, result.size, 4, 4]))
    with np.errstate(all="ignore"):
        return model, result.ravel().astype(np.float32)


FOLDED = {"Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "DequantizeLinear", "Mul"}
"""Operators on constants that scan must see through, of those that onnx has a case for."""


def test_a_kernel_computed_from_constants_is_right_or_skipped(tmp_path: Path) -> None:
    """The kernel of shape (n, 1, 1, 1) has the bounds |w_k|: what onnx says the operator gives, or a reason why not."""
    path = tmp_path / "model.onnx"
    judged: Counter[str] = Counter()
    wrong: list[str] = []
    for case in cases():
        made = as_kernel(case)
        if made is None:
            continue
        model, numbers = made
        path.write_bytes(model.SerializeToString())
        report = scan_or_refuse(path)
        assert report is not None, case.name
        layers = [layer for layer in report.layers if layer.name == "kernel_conv"]
        if not layers:
            assert "kernel_conv" in {part.name for part in report.skipped}, case.name
            continue
        bounds = np.array(layers[0].bounds)
        # The accuracy of a bound, see onnx_clp/bounds.py; the numbers are the same.
        if bounds.shape != numbers.shape or not np.allclose(bounds, np.abs(numbers), rtol=1e-5, atol=0, equal_nan=True):
            wrong.append(case.name)
        judged[model.graph.node[0].op_type] += 1
    assert wrong == []
    assert judged.keys() >= FOLDED


# -- sanitize ----------------------------------------------------------------------------------------------------------


def loads(path: Path) -> bool:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception:  # noqa: BLE001  onnxruntime raises kinds of its own
        return False
    return True


LIKE_ALEXNET = {"light_vgg19.onnx", "light_zfnet512.onnx"}
"""Chains of convolutions and Gemms, too, of which the twin computes kernels of up to 400 MB."""


def test_sanitized_files_load_and_differ_only_where_planned(tmp_path: Path) -> None:
    """Those with layers: the networks under light/, all of whose larger kernels are ConstantOfShape."""
    silenced = 0
    for path in FILES:
        if path.name in LIKE_ALEXNET or not onnx_clp.scan(path, U).layers:
            continue
        out = tmp_path / path.name
        report = onnx_clp.sanitize(path, out, U, max_share=1.0)
        assert_differs_as_planned(path, out, report)
        assert loads(out) or not loads(path), path
        silenced += report.silenced_channels
    assert silenced


def test_a_difference_beside_the_plan_is_seen(tmp_path: Path) -> None:
    """A proof that the test above can fail: one more number of a BN differs, of a channel that was not silenced."""
    (source,) = (path for path in FILES if path.name == "light_resnet50.onnx")
    out = tmp_path / source.name
    report = onnx_clp.sanitize(source, out, U, max_share=1.0)
    assert_differs_as_planned(source, out, report)
    part = report.silenced[0]
    loud = next(k for k in range(64) if k not in part.channels)
    model = onnx.load(out)
    node = next(node for node in model.graph.node if part.layer in {node.name, node.output[0]})
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    gamma = numpy_helper.to_array(tensor).copy()
    gamma[loud] *= 2
    tensor.CopyFrom(numpy_helper.from_array(gamma, tensor.name))
    onnx.save(model, out)
    with pytest.raises(AssertionError, match="not silenced differs"):
        assert_differs_as_planned(source, out, report)
