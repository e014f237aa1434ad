"""What was written → checks: by a new scan, by onnx.checker, by onnxruntime.

A rewrite is trusted only for what is found in the written file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx

from onnx_clp import runtime
from onnx_clp.analysis import Analysis, ScanReport, analyse
from onnx_clp.bounds import spectral_norms
from onnx_clp.defaults import ACTIVITY, DEFAULT_SCORE
from onnx_clp.errors import UsageError, VerificationError
from onnx_clp.kernels import Bounds, Measured
from onnx_clp.model.file import ModelFile, open_model
from onnx_clp.model.graph import MISSING
from onnx_clp.model.save import Rewrite
from onnx_clp.model.tensors import Array, Stored, complete
from onnx_clp.rests import AT_ZERO, Rest
from onnx_clp.sanitizer import Check
from onnx_clp.sites import NAME_LIMIT, NAMED_OPERATORS, Reason, Site

Kernels = Mapping[int, Array]
"""Kernels that were replaced as they shall be in the file, (C_out, C_in, *kernel), by the index of their node."""


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """A measured site and what is done to it.

    Attributes:
        part: The site.
        channels: To silence; none where it is only corrected.
        factors: What its channels are multiplied by, float64 (channels,); None where it is only silenced.
        rest: What silenced channels become.
    """

    part: Measured
    channels: tuple[int, ...]
    factors: Bounds | None = None
    rest: Rest = AT_ZERO


def verify(
    analysis: Analysis,
    done: Sequence[Choice],
    rewrite: Rewrite,
    input_shapes: Mapping[str, tuple[int, ...]],
    name: str,
    kernels: Kernels,
) -> tuple[tuple[Check, ...], ScanReport]:
    """Verify the written files, in which ``kernels`` were replaced.

    Raises VerificationError where one is not what was planned.
    """
    checks: list[Check] = []
    with open_model(rewrite.model, limits=analysis.file.meter.limits) as written:
        report = analysis.report
        again = analyse(
            written,
            report.u,
            count_dead=report.count_dead,
            name=name,
            score=DEFAULT_SCORE if report.score == ACTIVITY else report.score,  # that of images is not measured anew
            threshold=report.threshold,
        )
        checks.append(_check_scan(analysis, again, done, kernels))
        checks.append(_check_format(analysis.file, written))
        checks += _check_runtime(analysis, done, rewrite, input_shapes)
        return tuple(checks), again.report


def _check_scan(before: Analysis, after: Analysis, done: Sequence[Choice], kernels: Kernels) -> Check:
    """The same layers; silenced channels have bound 0, corrected ones their old bound times its factor.

    Refitted kernels are those planned, and a layer of one of them has its old bounds times what these brought. No other
    bound grew, and none changed where nothing was done.
    """
    # The copy may be given more than the input: where two names led to one data file, it has two.
    beyond = {part.name for part in before.report.skipped if part.reason == Reason.LIMIT.value}
    again = [part for part in after.measured if part.site.node.name not in beyond]
    skipped = [[part for part in report.skipped if part.name not in beyond] for report in (before.report, after.report)]
    if [part.site.node.name for part in before.measured] != [part.site.node.name for part in again] or (
        skipped[0] != skipped[1]
    ):
        raise VerificationError("a new scan of the written file finds other layers than the input has")
    choices = {id(choice.part): choice for choice in done}
    touching: dict[str, list[Choice]] = defaultdict(list)
    for choice in done:
        for name in _operators(choice.part.site):
            touching[name].append(choice)
    _check_kernels(before, after, kernels)
    brought = _brought(before, kernels)
    for old, new in zip(before.measured, again, strict=True):
        # Not all operators of a site of many are known: then every other site may share one with it.
        known = len(old.site.operators) < NAMED_OPERATORS
        near = [choice for name in _operators(old.site) for choice in touching.get(name, ())] if known else [*done]
        others = [choice for choice in near if choice.part is not old]
        if brought and (not known or not brought.keys().isdisjoint(_operators(old.site))):
            _check_refitted(old, new, choices.get(id(old)), others, brought, kernels)
        else:
            _check_bounds(before, old, new, choices.get(id(old)), others)
    count = sum(len(choice.channels) for choice in done)
    detail = f"silenced channels found dead by a new scan: {count:,}; no bound grew"
    if kernels:
        detail = f"silenced channels found dead by a new scan: {count:,}; refitted kernels as planned: {len(kernels):,}"
    elif any(choice.factors is not None for choice in done):
        detail += " but by the factor of its correction"
    return Check("scan", passed=True, detail=detail)


def _check_kernels(before: Analysis, after: Analysis, kernels: Kernels) -> None:
    """The written file holds the planned kernels. Only constants were added: convolutions stand in their old order."""
    old, new = ([node for node in each.graph.nodes if node.op_type == "Conv"] for each in (before, after))
    for node, written in zip(old, new, strict=True):
        if node.index not in kernels:
            continue
        planned = kernels[node.index]
        found = after.constants.array(written.input(1))
        room = _WRITTEN * float(np.finfo(planned.dtype).eps) * np.abs(planned.astype(np.float64))
        if found.shape != planned.shape or np.any(np.abs(found.astype(np.float64) - planned) > room):
            raise VerificationError(f"the kernel of {node.name!r} is not the one that was fitted, in the written file")


_WRITTEN: Final = 4
"""Roundings by which a number of a written kernel may differ from the planned one: it may be a product, or be cast."""


def _brought(before: Analysis, kernels: Kernels) -> dict[str, Bounds]:
    """σ_max of each channel of the planned kernels over that of the old one, by the name of their node.

    What the correction of a site multiplies its own kernel by, and what is silent in it, is in the planned one.
    """
    found: dict[str, Bounds] = {}
    for index, planned in kernels.items():
        node = before.graph.nodes[index]
        old = before.constants.array(node.input(1))
        norms = [spectral_norms(each.reshape(*each.shape[:2], -1)) for each in (planned, old)]
        name = node.name[:NAME_LIMIT]
        with np.errstate(all="ignore"):  # of a dead channel, which is not compared
            found[name] = np.full(len(old), np.nan) if name in found else norms[0] / norms[1]
    return found


def _check_refitted(
    old: Measured,
    new: Measured,
    choice: Choice | None,
    near: Sequence[Choice],
    brought: Mapping[str, Bounds],
    kernels: Kernels,
) -> None:
    """Compare the bounds of a site with a refitted operator, where it is its only one."""
    name, silent = old.site.node.name, [] if choice is None else list(choice.channels)
    if np.any(new.bounds[silent] != 0):
        raise VerificationError(f"a channel of {name!r} is not silent in the written file")
    factor = brought.get(old.site.operators[0]) if len(old.site.operators) == 1 and not near else None
    if factor is None or factor.shape != old.bounds.shape:
        return  # a sum or a concatenation of several kernels, each of which was compared
    if choice is not None and choice.factors is not None and old.site.node.index not in kernels:
        factor = factor * choice.factors
    with np.errstate(all="ignore"):  # as above
        expected = old.bounds * factor
    compared = (old.bounds > 0) & np.isfinite(expected)
    compared[silent] = False
    room = _ROUNDING if all(kernel.dtype.itemsize >= _FLOAT32 for kernel in kernels.values()) else _ROUNDING_16
    if np.any(np.abs(new.bounds - expected)[compared] > room * expected[compared]):
        raise VerificationError(f"a bound of {name!r} is not that of the kernel that was fitted")


def _check_bounds(
    before: Analysis, old: Measured, new: Measured, choice: Choice | None, near: Sequence[Choice]
) -> None:
    """Compare the bounds of one site, of which ``near`` are the other sites that share an operator with it."""
    name = old.site.node.name
    silent = [] if choice is None else list(choice.channels)
    if np.any(new.bounds[silent] != 0):
        raise VerificationError(f"a channel of {name!r} is not silent in the written file")
    if choice is None and not near:
        if not np.array_equal(new.bounds, old.bounds, equal_nan=True):
            raise VerificationError(f"a bound of {name!r} changed, and nothing was silenced there")
        return
    factors = [each.factors for each in near if each.factors is not None]
    corrected = choice is not None and choice.factors is not None
    expected = old.bounds * choice.factors if choice is not None and choice.factors is not None else old.bounds
    # Equal kernels have equal bounds to the bit, and a sum of which a term became 0 does not grow; one of which terms
    # were multiplied grows by no more than the largest factor.
    room = _rounding(before, [*near, *([] if choice is None else [choice])]) if corrected or factors else 0.0
    most = max((float(each.max()) for each in factors), default=1.0)
    if np.any(new.bounds > expected * max(1.0, most) * (1 + room)):
        raise VerificationError(f"a bound of {name!r} grew in the written file")
    others = np.ones(len(expected), bool)
    others[silent] = False
    if corrected and not near and np.any(new.bounds[others] < expected[others] * (1 - room)):
        raise VerificationError(f"a bound of {name!r} is not what its correction makes of it in the written file")


_ROUNDING: Final = 1e-5
"""By which share a bound may differ from the old one times a factor: each element of a kernel is rounded to float32,
2⁻²⁴ of it, and σ_max is computed anew, to some 10⁻⁷."""

_ROUNDING_16: Final = 2.0**-6
"""The same for kernels of 16 bits: an element is rounded by 2⁻⁹ of it at most, in bfloat16, and the norm of all these
errors is that share of the norm of all elements, which for a kernel of several rows is larger than σ_max."""


def _rounding(analysis: Analysis, choices: Sequence[Choice]) -> float:
    """By which share the bounds of these sites may differ from what they should be."""
    for choice in choices:
        for knob in choice.part.site.knobs:
            constant = analysis.constants.get(knob.value)
            stored = constant.dtype if isinstance(constant, Stored) else None
            if stored is None or stored.itemsize < _FLOAT32:
                return _ROUNDING_16
    return _ROUNDING


_FLOAT32: Final = 4
"""Bytes of a float32."""


def _operators(site: Site) -> set[str]:
    """The nodes whose constants make the bounds of ``site``, by name."""
    return {site.node.name, *site.operators}


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
    done = [choice for choice in done if choice.channels]
    observed = list(_observed(analysis, done))
    size = sum(copy.path.stat().st_size for copy in rewrite.files)
    limits = analysis.file.meter.limits
    trial = runtime.examine(rewrite.model, analysis.file.path, observed, input_shapes, size, limits)
    yield _load_check(trial)
    if not trial.load.fine:
        return
    if trial.run is None:
        detail = f"no silenced channel can be observed: {_UNSEEN}" if done else "nothing was silenced"
        yield Check("onnxruntime-run", passed=None, detail=detail)
        return
    if trial.run.kind == "usage":
        raise UsageError(trial.run.message, trial.run.hint)
    if trial.run.kind == "loud":
        raise VerificationError(trial.run.message)
    if not trial.run.fine:
        yield Check("onnxruntime-run", passed=None, detail=trial.run.words)
        return
    count = sum(len(part.channels) for part in observed)
    rest = sum(len(choice.channels) for choice in done) - count
    detail = f"silenced channels found silent on random input: {count:,}"
    unseen = f"; {rest:,} cannot be observed: {_UNSEEN}" if rest else ""
    yield Check("onnxruntime-run", passed=True, detail=detail + unseen)


_UNSEEN: Final = "that they are silent was found by the scan alone"


def _load_check(trial: runtime.Trial) -> Check:
    """Whether the written model loads. Raises VerificationError where it does not and the input does."""
    load, original = trial.load, trial.original
    if load.fine:
        return Check("onnxruntime-load", passed=True, detail="onnxruntime loads it")
    if original is None:
        return Check("onnxruntime-load", passed=None, detail=load.words)
    if load.kind == "crashed":
        if original.fine:
            raise VerificationError(f"{load.message}: on the written file, and not on the input")
        return Check("onnxruntime-load", passed=None, detail=f"{load.message}; on the input: {original.words}")
    if original.fine:
        raise VerificationError(f"onnxruntime does not load the written file: {load.message}")
    return Check(
        "onnxruntime-load", passed=None, detail=f"onnxruntime does not load the input either: {original.words}"
    )


def _observed(analysis: Analysis, done: Sequence[Choice]) -> Iterator[runtime.Observed]:
    """The outputs of the silenced channels that can be made outputs of the model: those of the main graph."""
    for choice in done:
        site = choice.part.site
        maker = analysis.graph.producers.get(site.output)
        if site.output == MISSING or maker is None or maker.layout is None or not maker.layout.in_main_graph:
            continue
        rest, values = 0.0, choice.rest.values
        if site.rest != MISSING:
            zero_point = analysis.constants.small(site.rest)
            if zero_point is None or zero_point.size != 1:
                continue  # it is known at run time only, or the file does not hold it
            rest = float(zero_point.ravel()[0])
        rests = tuple(rest if values is None else float(values[k]) for k in choice.channels)
        yield runtime.Observed(analysis.graph.name_of(site.output), site.axis, choice.channels, rests)
