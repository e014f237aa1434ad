"""What was written → checks: by a new scan, by onnx.checker, by onnxruntime.

A rewrite is trusted only for what is found in the written file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_clp import runtime
from onnx_clp.analysis import Analysis, ScanReport, analyse
from onnx_clp.errors import VerificationError
from onnx_clp.kernels import Measured
from onnx_clp.model.file import ModelFile, open_model
from onnx_clp.model.graph import MISSING
from onnx_clp.model.save import Rewrite
from onnx_clp.model.tensors import complete
from onnx_clp.sanitizer import Check


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """A measured site and the channels of it to silence."""

    part: Measured
    channels: tuple[int, ...]


def verify(
    analysis: Analysis,
    done: Sequence[Choice],
    rewrite: Rewrite,
    input_shapes: Mapping[str, tuple[int, ...]],
    name: str,
) -> tuple[tuple[Check, ...], ScanReport]:
    """Verify the written files. Raises VerificationError where one is not what was planned."""
    checks: list[Check] = []
    with open_model(rewrite.model, limits=analysis.file.meter.limits) as written:
        report = analysis.report
        again = analyse(written, report.u, count_dead=report.count_dead, name=name)
        checks.append(_check_scan(analysis, again, done))
        checks.append(_check_format(analysis.file, written))
        checks += _check_runtime(analysis, done, rewrite, input_shapes)
        return tuple(checks), again.report


def _check_scan(before: Analysis, after: Analysis, done: Sequence[Choice]) -> Check:
    """The same layers; silenced channels have bound 0; no bound grew."""
    names = [part.site.node.name for part in before.measured]
    if names != [part.site.node.name for part in after.measured] or before.report.skipped != after.report.skipped:
        raise VerificationError("a new scan of the written file finds other layers than the input has")
    silent = {id(choice.part): choice.channels for choice in done}
    for old, new in zip(before.measured, after.measured, strict=True):
        channels = list(silent.get(id(old), ()))
        if np.any(new.bounds[channels] != 0):
            raise VerificationError(f"a channel of {old.site.node.name!r} is not silent in the written file")
        # Equal kernels have equal bounds to the bit, and a sum of which a term became 0 does not grow.
        grown = new.bounds > old.bounds
        if np.any(grown):
            raise VerificationError(f"a bound of {old.site.node.name!r} grew in the written file")
    count = sum(len(choice.channels) for choice in done)
    return Check("scan", passed=True, detail=f"silenced channels found dead by a new scan: {count:,}; no bound grew")


def _check_format(source: ModelFile, written: ModelFile) -> Check:
    """onnx.checker on both models without their weights: the result must pass where the input does."""
    refusal = _format_error(source)
    if refusal:
        return Check("checker", passed=None, detail=f"onnx.checker refuses the input already: {refusal}")
    refusal = _format_error(written)
    if refusal:
        raise VerificationError(f"onnx.checker refuses the written file: {refusal}")
    return Check("checker", passed=True, detail="onnx.checker accepts it")


def _format_error(file: ModelFile) -> str:
    """What onnx.checker says against the model; empty where it accepts it."""
    model = onnx.ModelProto()
    model.CopyFrom(file.proto)
    for tensor in _tensors(model):
        # The weights stay on disk: an element of eight bytes, the size of the ticket, stands in for each tensor.
        payload = file.payload(tensor)
        if payload is not None or tensor.data_location == onnx.TensorProto.EXTERNAL:
            for field in ("dims", "external_data", "data_location"):
                tensor.ClearField(field)
            tensor.data_type = onnx.TensorProto.INT64
            tensor.raw_data = bytes(8)
        if payload is not None and payload.raw is not None and payload.typed:
            tensor.int64_data.append(0)  # two spellings at once, which the checker refuses
    try:
        for sparse in _sparse_tensors(model):
            for part in (sparse.values, sparse.indices):
                part.CopyFrom(complete(file, part))
        onnx.checker.check_model(model.SerializeToString())
    except Exception as error:  # noqa: BLE001  # ValidationError, or what the C++ side throws: all are its answer
        return runtime.first_line(error)
    return ""


def _graphs_and_attributes(model: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.AttributeProto]:
    """Every graph of ``model`` and every attribute of its nodes, subgraphs and functions included."""
    graphs = [model.graph]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield graph
            nodes += graph.node
            continue
        for attribute in nodes.pop().attribute:
            yield attribute
            graphs += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every dense tensor of ``model``."""
    for part in _graphs_and_attributes(model):
        if isinstance(part, onnx.GraphProto):
            yield from part.initializer
        else:
            yield from (*([part.t] if part.HasField("t") else []), *part.tensors)


def _sparse_tensors(model: onnx.ModelProto) -> Iterator[onnx.SparseTensorProto]:
    """Every sparse tensor of ``model``."""
    for part in _graphs_and_attributes(model):
        if isinstance(part, onnx.GraphProto):
            yield from part.sparse_initializer
        else:
            yield from (*([part.sparse_tensor] if part.HasField("sparse_tensor") else []), *part.sparse_tensors)


def _check_runtime(
    analysis: Analysis, done: Sequence[Choice], rewrite: Rewrite, input_shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Check]:
    """Load and run the written model, where onnxruntime is installed and loads the input."""
    if not runtime.available():
        yield Check("onnxruntime-load", passed=None, detail="onnxruntime is not installed")
        return
    refusal = runtime.load_error(rewrite.model)
    if refusal:
        original = runtime.load_error(analysis.file.path)
        if not original:
            raise VerificationError(f"onnxruntime does not load the written file: {refusal}")
        yield Check("onnxruntime-load", passed=None, detail=f"onnxruntime does not load the input either: {original}")
        return
    yield Check("onnxruntime-load", passed=True, detail="onnxruntime loads it")
    observed = list(_observed(analysis, done))
    if not observed:
        yield Check("onnxruntime-run", passed=None, detail="no silenced channel can be observed")
        return
    try:
        count = runtime.check_silence(rewrite.model, observed, input_shapes, rewrite.folder)
    except runtime.NotRun as reason:
        yield Check("onnxruntime-run", passed=None, detail=str(reason))
        return
    rest = sum(len(choice.channels) for choice in done) - count
    detail = f"silenced channels found silent on random input: {count:,}"
    yield Check("onnxruntime-run", passed=True, detail=detail + (f"; {rest} cannot be observed there" if rest else ""))


def _observed(analysis: Analysis, done: Sequence[Choice]) -> Iterator[runtime.Observed]:
    """The outputs of the silenced channels that can be made outputs of the model: those of the main graph."""
    for choice in done:
        site = choice.part.site
        maker = analysis.graph.producers.get(site.output)
        if site.output == MISSING or maker is None or maker.layout is None or not maker.layout.in_main_graph:
            continue
        rest = 0.0
        if site.rest != MISSING:
            rest = float(analysis.constants.array(site.rest).ravel()[0])
        yield runtime.Observed(analysis.graph.name_of(site.output), site.axis, choice.channels, rest)
