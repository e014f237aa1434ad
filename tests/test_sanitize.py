"""The rewrite: what it may touch, what it refuses, what it leaves behind when something goes wrong, what it says."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

import onnx_clp
from onnx_clp import SanitizeReport, rewrite, runtime, sanitize, scan
from onnx_clp.errors import ModelFileError, UsageError, VerificationError
from onnx_clp.limits import DEFAULT_LIMITS
from onnx_clp.model import save as save_module
from onnx_clp.model.save import Rewrite
from onnx_clp.report.outcome import Outcome
from onnx_clp.report.text import render
from tests import naive, oracle
from tests.built import build, run, save
from tests.cases.net import Net

pytestmark = pytest.mark.usefixtures("in_this_process")

Array = NDArray[Any]
Snapshot = dict[str, bytes]


def stored(net: Net, folder: Path, name: str = "model") -> Path:
    """A graph written to `name`.onnx."""
    return save(dataclasses.replace(net.case(name), name=name), folder)


def saved(case: str, folder: Path, name: str = "model") -> Path:
    """A built case written to `name`.onnx."""
    return save(dataclasses.replace(build(case), name=name), folder)


def contents(folder: Path) -> Snapshot:
    """Every file below a folder, by its relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def silenced(report: SanitizeReport) -> dict[str, tuple[int, ...]]:
    return {part.layer: part.channels for part in report.silenced}


def checked(report: SanitizeReport) -> dict[str, bool | None]:
    return {check.name: check.passed for check in report.checks}


def differences(source: Path, target: Path, report: SanitizeReport) -> list[str]:
    return oracle.differences(oracle.load(source), oracle.load(target), silenced(report))


def tensor(model: onnx.ModelProto, name: str) -> Array:
    """An initializer by its name."""
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


def changed_bytes(before: bytes, after: bytes) -> list[int]:
    assert len(before) == len(after)
    return [int(i) for i in np.flatnonzero(np.frombuffer(before, np.uint8) != np.frombuffer(after, np.uint8))]


# ---- which bytes


def test_without_metadata_only_the_bytes_of_the_knobs_change(tmp_path: Path) -> None:
    source, target = saved("conv_bn_2d", tmp_path), tmp_path / "out.onnx"
    sanitize(source, target, metadata=False)

    before, after = source.read_bytes(), target.read_bytes()
    model = oracle.load(source)
    allowed: set[int] = set()
    for name in ("bn.gamma", "bn.beta"):
        start = before.index(tensor(model, name).tobytes())
        allowed |= set(range(start + 4 * 5, start + 4 * 6))  # channel 5, float32
    changed = set(changed_bytes(before, after))
    assert changed
    assert changed <= allowed
    assert all(after[position] == 0 for position in allowed)


@pytest.mark.parametrize("case", ["folded_bias", "qdq_uint8", "constant_node_typed", "weight_transpose", "double_data"])
def test_a_tensor_that_feeds_one_node_is_patched_where_it_lies(case: str, tmp_path: Path) -> None:
    source, target = saved(case, tmp_path), tmp_path / "out.onnx"
    report = sanitize(source, target, metadata=False)
    assert report.unshared == ()
    assert target.stat().st_size == source.stat().st_size
    assert changed_bytes(source.read_bytes(), target.read_bytes())


def test_a_model_without_outliers_is_copied_byte_for_byte(tmp_path: Path) -> None:
    source, target = saved("zero_spread", tmp_path), tmp_path / "out.onnx"
    report = sanitize(source, target, metadata=False)
    assert report.silenced == ()
    assert target.read_bytes() == source.read_bytes()


# ---- shared tensors


def test_a_shared_gamma_is_left_as_it_is(tmp_path: Path) -> None:
    source, target = saved("shared_gamma", tmp_path), tmp_path / "out.onnx"
    report = sanitize(source, target)
    assert len(report.unshared) == 4
    assert report.unshared[0] == "gamma"
    np.testing.assert_array_equal(tensor(oracle.load(target), "gamma"), tensor(oracle.load(source), "gamma"))
    assert differences(source, target, report) == []


def test_a_kernel_shared_by_sites_that_agree_is_patched_once(tmp_path: Path) -> None:
    source, target = saved("shared_kernel", tmp_path), tmp_path / "out.onnx"
    report = sanitize(source, target, metadata=False)
    assert report.unshared == ()
    assert silenced(report) == {"conv_0": (5,), "conv_1": (5,)}
    assert target.stat().st_size == source.stat().st_size
    assert not tensor(oracle.load(target), "weight")[5].any()


def kernel_of_two(*, transposed: bool) -> Net:
    """One kernel on a Conv, and on a head or a ConvTranspose, which want other parts of it silent, or none."""
    net = Net()
    W = net.kernel(16, 16, 3, 3)
    if transposed:
        W[:, 9] *= 8
    x, weight = net.feed(1, 16, 8, 8), net.tensor(W, "weight")
    y = net.conv(x, weight, net.vector(16), pads=[1] * 4)
    net.expect("conv", naive.bounds(W))
    if transposed:
        other = net.conv(x, weight, net.vector(16), name="up", op="ConvTranspose", pads=[1] * 4)
        net.expect("up", naive.bounds(naive.conv_transpose_kernel(W)), [9])
        net.tail(net.op("Concat", y, other, name="concat", axis=1), 32)
    else:
        net.give(net.conv(net.op("Relu", y, name="relu"), weight, net.vector(16), name="head", pads=[1] * 4))
        net.expect_skipped("head", "head")
    return net


@pytest.mark.parametrize("transposed", [False, True])
def test_a_kernel_shared_by_nodes_that_disagree_is_unshared(tmp_path: Path, *, transposed: bool) -> None:
    source, target = stored(kernel_of_two(transposed=transposed), tmp_path), tmp_path / "out.onnx"
    report = sanitize(source, target)
    assert silenced(report) == ({"conv": (5,), "up": (9,)} if transposed else {"conv": (5,)})
    assert set(report.unshared) == {"weight"}
    assert differences(source, target, report) == []
    if not transposed:
        np.testing.assert_array_equal(tensor(oracle.load(target), "weight"), tensor(oracle.load(source), "weight"))


def test_a_shared_zero_bias_needs_no_edit(tmp_path: Path) -> None:
    source, target = saved("shared_bias", tmp_path), tmp_path / "out.onnx"
    report = sanitize(source, target, metadata=False)
    assert report.unshared == ()
    assert len(report.silenced) == 4
    assert target.stat().st_size == source.stat().st_size


def test_a_constant_of_a_function_is_silenced_for_all_its_calls(tmp_path: Path) -> None:
    source, target = saved("function_constants", tmp_path), tmp_path / "out.onnx"
    report = sanitize(source, target)
    assert silenced(report) == {"call_0/conv": (5,), "call_1/conv": (5,)}
    assert report.unshared == ()
    assert differences(source, target, report) == []


def function_with_epsilon(*epsilons: float) -> Net:
    """Calls of one function Conv → BN that differ in ε: where it is large, the small var of channel 5 does not show."""
    net = Net()
    W, norm = net.kernel(16, 16, 3, 3, outlier=None), net.norm(16)
    norm.variance[5] = 1e-3
    block = net.inner("f_")
    constants = [
        block.constant(value, name)
        for name, value in (("gamma", norm.gamma), ("beta", norm.beta), ("mean", norm.mean), ("var", norm.variance))
    ]
    x = block.conv("f_x", block.constant(W, "weight"), pads=[1] * 4)
    y = block.op("BatchNormalization", x, *constants, name="bn")
    reference = onnx.AttributeProto(name="epsilon", ref_attr_name="smallest", type=onnx.AttributeProto.FLOAT)
    block.nodes[-1].attribute.append(reference)
    block.give(block.op("Relu", y, name="relu"))
    net.functions.append(block.function("com.acme", "Block", ["f_x"], ["smallest"]))
    x = net.feed(1, 16, 8, 8)
    for i, epsilon in enumerate(epsilons):
        x = net.op("Block", x, name=f"call_{i}", domain="com.acme", smallest=epsilon)
    net.tail(x, 16)
    return net


def test_a_constant_of_a_function_whose_calls_disagree_is_left(tmp_path: Path) -> None:
    source, target = stored(function_with_epsilon(1e-5, 10.0), tmp_path), tmp_path / "out.onnx"
    report = sanitize(source, target, metadata=False)
    assert report.silenced == ()
    assert [(left.layer, left.channels) for left in report.left] == [("call_0/bn", (5,))]
    assert "function" in report.left[0].reason
    assert target.read_bytes() == source.read_bytes()

    report = sanitize(stored(function_with_epsilon(1e-5, 1e-4), tmp_path), tmp_path / "agreed.onnx")
    assert silenced(report) == {"call_0/bn": (5,), "call_1/bn": (5,)}


def external_pair(shift: int) -> Net:
    """A Conv and a head whose kernels lie in one file, at the same bytes or some elements apart."""
    net = Net()
    W = net.kernel(16, 16, 3, 3)
    blob = np.concatenate([W.ravel(), np.ones(shift, np.float32)]).astype("<f4").tobytes()
    for name, offset in (("weight_0", 0), ("weight_1", 4 * shift)):
        proto = TensorProto(name=name, dims=W.shape, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", "shared.bin"), ("offset", str(offset)), ("length", str(W.nbytes))):
            proto.external_data.add(key=key, value=value)
        net.initializers.append(proto)
    x = net.op("Relu", net.conv(net.feed(1, 16, 8, 8), "weight_0", net.vector(16), pads=[1] * 4), name="relu")
    net.give(net.conv(x, "weight_1", net.vector(16), name="head", pads=[1] * 4))
    net.folder = {"shared.bin": blob}
    return net


@pytest.mark.parametrize("shift", [0, 9, 16 * 9 * 5])
def test_bytes_of_external_data_that_two_tensors_share_are_left(shift: int, tmp_path: Path) -> None:
    source, target = stored(external_pair(shift), tmp_path), tmp_path / "out.onnx"
    report = sanitize(source, target)
    assert silenced(report) == {"conv": (5,)}
    assert report.unshared == ("weight_0",)
    assert (tmp_path / "out.shared.bin").read_bytes() == (tmp_path / "shared.bin").read_bytes()
    assert differences(source, target, report) == []


def test_a_new_constant_takes_no_name_that_is_there(tmp_path: Path) -> None:
    net = kernel_of_two(transposed=False)
    for name in ("weight__silenced", "weight__silenced_2"):
        net.tensor(np.zeros(1, np.float32), name)
    source, target = stored(net, tmp_path), tmp_path / "out.onnx"
    report = sanitize(source, target)
    assert report.unshared == ("weight",)
    names = [t.name for t in oracle.load(target).graph.initializer]
    names += [output for node in oracle.load(target).graph.node for output in node.output]
    assert len(names) == len(set(names))
    assert differences(source, target, report) == []


# ---- external data

EXTERNAL = [
    "external_one_file",
    "external_many_files",
    "external_folder",
    "external_offsets",
    "external_without_offset",
]


@pytest.mark.parametrize("case", EXTERNAL)
def test_external_data_is_copied_under_names_that_fit_the_new_model(case: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    source = saved(case, folder)
    before = contents(tmp_path)
    report = sanitize(source, out / "new.onnx")

    assert {name: data for name, data in contents(tmp_path).items() if name.startswith("in/")} == before
    written = contents(out)
    assert sorted(written) == sorted(report.files)
    assert report.files[-1] == "new.onnx"
    locations = {
        entry.value
        for proto in onnx.load(out / "new.onnx", load_external_data=False).graph.initializer
        for entry in proto.external_data
        if entry.key == "location"
    }
    assert locations == written.keys() - {"new.onnx"}
    assert all(name.startswith("new.") for name in written)
    assert differences(source, out / "new.onnx", report) == []
    assert checked(report)["onnxruntime-run"] is True


def test_only_the_bytes_of_the_knobs_change_in_external_data(tmp_path: Path) -> None:
    source = saved("external_one_file", tmp_path)
    sanitize(source, tmp_path / "new.onnx")
    before = (tmp_path / "model.onnx.data").read_bytes()
    after = (tmp_path / "new.onnx.data").read_bytes()
    model = oracle.load(source)
    allowed: set[int] = set()
    for name in ("bn.gamma", "bn.beta"):
        start = before.index(tensor(model, name).tobytes())
        allowed |= set(range(start + 4 * 5, start + 4 * 6))
    assert set(changed_bytes(before, after)) <= allowed
    assert changed_bytes(before, after)


def test_data_files_of_one_name_in_two_folders_get_two_names(tmp_path: Path) -> None:
    net = Net()
    W = net.kernel(16, 3, 3, 3)
    net.tail(net.conv(net.feed(1, 3, 8, 8), W, net.vector(16)), 16)
    net.folder = {}
    for proto, folder in zip(net.initializers[:2], ("a", "b"), strict=True):
        net.folder[f"{folder}/data.bin"] = proto.raw_data
        proto.ClearField("raw_data")
        proto.data_location = TensorProto.EXTERNAL
        proto.external_data.add(key="location", value=f"{folder}/data.bin")
    source, target = stored(net, tmp_path), tmp_path / "out.onnx"
    report = sanitize(source, target)
    assert len(set(report.files)) == 3
    assert differences(source, target, report) == []


@pytest.mark.parametrize("force", [False, True])
def test_data_that_lies_where_the_new_data_would_is_never_overwritten(tmp_path: Path, *, force: bool) -> None:
    source = saved("external_one_file", tmp_path)
    (tmp_path / "new.onnx.data").write_bytes(b"somebody's")
    (tmp_path / "new.onnx.data.2").symlink_to("nowhere")
    before = contents(tmp_path)
    report = sanitize(source, tmp_path / "new.onnx", force=force)
    assert report.files == ("new.onnx.data.3", "new.onnx")
    assert {name: data for name, data in contents(tmp_path).items() if name in before} == before
    assert (tmp_path / "new.onnx.data.2").is_symlink()
    assert differences(source, tmp_path / "new.onnx", report) == []


def test_force_does_not_overwrite_the_data_of_the_input(tmp_path: Path) -> None:
    """The input's data lies where the new model's would: in the folder of the destination, under the fitting name."""
    source = saved("external_folder", tmp_path, "m")
    model = onnx.load(source, load_external_data=False)
    for proto in model.graph.initializer:
        for entry in proto.external_data:
            if entry.key == "location":
                (tmp_path / "weights" / f"m.{Path(entry.value).name}").write_bytes(
                    (tmp_path / entry.value).read_bytes()
                )
                entry.value = f"weights/m.{Path(entry.value).name}"
    source.write_bytes(model.SerializeToString())
    before = contents(tmp_path)
    report = sanitize(source, tmp_path / "weights" / "m.onnx", force=True)
    assert {name: data for name, data in contents(tmp_path).items() if name in before} == before
    assert all(name == "m.onnx" or name.endswith(".2") for name in report.files)
    assert differences(source, tmp_path / "weights" / "m.onnx", report) == []


def test_missing_external_data_is_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    source = saved("external_one_file", tmp_path)
    (tmp_path / "model.onnx.data").unlink()
    before = contents(tmp_path)
    with pytest.raises(ModelFileError, match=r"model\.onnx\.data"):
        sanitize(source, tmp_path / "new.onnx")
    assert contents(tmp_path) == before


def test_missing_external_data_is_named_in_the_text_report(tmp_path: Path) -> None:
    """The cause stands in the report: which file is not there."""
    source = saved("external_one_file", tmp_path)
    (tmp_path / "model.onnx.data").unlink()
    try:
        report = scan(source)
    except ModelFileError as error:
        text = str(error)
    else:
        assert not report.analysed
        text = render([Outcome(str(source), report=report)], lambda part, _: part)
    assert "model.onnx.data" in text


# ---- constants behind an operator


def shifted(*, divided: bool) -> Net:
    """Conv → Div of a constant per channel → Add, or QLinearConv → DequantizeLinear → Add; the sum is an output."""
    net = Net()
    if divided:
        W, deviation = net.kernel(16, 3, 3, 3), net.norm(16).variance
        x = net.per_channel("Div", net.conv(net.feed(1, 3, 8, 8), W, net.vector(16)), deviation, name="div")
        net.expect("conv", naive.scaled(naive.bounds(W), 1 / deviation.astype(np.float64)))
    else:
        q = np.round(net.kernel(16, 3, 3, 3) * 4).astype(np.int8)
        one, zero = net.tensor(np.float32(0.02), "scale"), net.tensor(np.uint8(128), "zero")
        weight = (net.tensor(q, "weight"), net.tensor(np.float32(0.5), "w_scale"), net.tensor(np.int8(0), "w_zero"))
        x = net.op("QuantizeLinear", net.feed(1, 3, 8, 8), one, zero, name="quantize")
        x = net.op("QLinearConv", x, one, zero, *weight, one, zero, name="conv", pads=[1] * 4)
        x = net.op("DequantizeLinear", x, one, zero, name="dequantize")
        net.expect("conv", naive.bounds(q * 0.5))
    x = net.per_channel("Add", x, net.vector(16) + np.float32(3), name="add")
    net.give(x)
    net.tail(x, 16)
    return net


@pytest.mark.parametrize("divided", [True, False])
def test_what_is_added_behind_a_quotient_or_a_quantised_conv_is_silenced_too(tmp_path: Path, *, divided: bool) -> None:
    net = shifted(divided=divided)
    source, target = stored(net, tmp_path), tmp_path / "out.onnx"
    (layer,) = scan(source).layers
    np.testing.assert_allclose(layer.bounds, net.sites["conv"], rtol=1e-5)  # the method's own figure
    report = sanitize(source, target)
    assert silenced(report) == {"conv": (5,)}
    assert checked(report)["onnxruntime-run"] is True
    before, after = (run(path, oracle.load(path))[0] for path in (source, target))
    assert before[:, 5].any()
    assert not after[:, 5].any()
    others = [k for k in range(16) if k != 5]
    np.testing.assert_array_equal(after[:, others], before[:, others])


# ---- where it may write


def test_an_existing_file_needs_force(tmp_path: Path) -> None:
    source, target = saved("folded", tmp_path), tmp_path / "out.onnx"
    target.write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists") as caught:
        sanitize(source, target)
    assert "--force" in caught.value.hint
    assert target.read_bytes() == b"mine"
    assert sanitize(source, target, force=True).written
    assert scan(target).dead_channels == 1


def test_a_dangling_link_counts_as_existing(tmp_path: Path) -> None:
    source, target = saved("folded", tmp_path), tmp_path / "out.onnx"
    target.symlink_to(tmp_path / "nowhere.onnx")
    with pytest.raises(UsageError, match="exists"):
        sanitize(source, target)
    assert target.is_symlink()


@pytest.mark.parametrize("case", ["folded", *EXTERNAL])
def test_in_place_every_file_stays_but_the_model_and_data_that_changes_gets_a_new_name(
    case: str, tmp_path: Path
) -> None:
    folder, twin = tmp_path / "folder", tmp_path / "twin"
    folder.mkdir()
    twin.mkdir()
    source, original = saved(case, folder), saved(case, twin)
    before = contents(folder)
    report = sanitize(source, source, in_place=True)
    after = contents(folder)
    assert {name: data for name, data in after.items() if name in before and name != "model.onnx"} == {
        name: data for name, data in before.items() if name != "model.onnx"
    }
    assert report.written
    assert report.input_sha256 == hashlib.sha256(original.read_bytes()).hexdigest()
    assert differences(original, source, report) == []
    # New are a data file for each that holds a number of the silenced channel, and no other.
    changed = {"bn.gamma", "bn.beta"} if case != "folded" else set()
    where = {
        entry.value
        for proto in onnx.load(original, load_external_data=False).graph.initializer
        for entry in proto.external_data
        if entry.key == "location" and proto.name in changed
    }
    assert set(report.replaced_data) == where
    assert after.keys() - before.keys() == {f"{name}.2" for name in where} == {*report.files} - {"model.onnx"}
    assert bool(where) == (case != "folded")

    again = sanitize(source, source, in_place=True)  # nothing stands out now: only the note is new
    assert again.replaced_data == ()
    assert again.files == ("model.onnx",)
    assert contents(folder).keys() == after.keys()


def test_in_place_with_two_spellings_of_one_data_file(tmp_path: Path) -> None:
    """`w.bin` and `./w.bin` are one file: both tensors' channels are silenced in it, and it stays one file."""
    net = Net()
    W_0, W_1 = net.kernel(16, 3, 3, 3), net.kernel(16, 16, 3, 3, outlier=9)
    x = net.op("Relu", net.conv(net.feed(1, 3, 8, 8), W_0, name="conv_0"), name="relu_0")
    net.tail(net.conv(x, W_1, name="conv_1"), 16)
    blob = b""
    for proto, location in zip(net.initializers[:2], ("w.bin", "./w.bin"), strict=True):
        entries = {"location": location, "offset": str(len(blob)), "length": str(len(proto.raw_data))}
        blob += proto.raw_data
        proto.ClearField("raw_data")
        proto.data_location = TensorProto.EXTERNAL
        for key, value in entries.items():
            proto.external_data.add(key=key, value=value)
    net.folder = {"w.bin": blob}
    source, twin = stored(net, tmp_path), tmp_path / "twin"
    twin.mkdir()
    original = stored(net, twin)
    report = sanitize(source, source, in_place=True)
    assert silenced(report) == {"conv_0": (5,), "conv_1": (9,)}
    assert sorted(name for name in contents(tmp_path) if "/" not in name) == ["model.onnx", "w.bin", "w.bin.2"]
    assert (tmp_path / "w.bin").read_bytes() == blob
    assert differences(original, source, report) == []
    assert [layer.dead for layer in scan(source).layers] == [(5,), (9,)]


@pytest.mark.parametrize("case", ["folded", "external_one_file"])
@pytest.mark.parametrize("named", ["source", "both", "destination"])
def test_in_place_through_a_link_rewrites_what_it_leads_to(case: str, named: str, tmp_path: Path) -> None:
    real, links = tmp_path / "real", tmp_path / "links"
    real.mkdir()
    links.mkdir()
    source = saved(case, real)
    before = contents(real)
    link = links / "model.onnx"
    link.symlink_to(source)
    given = {"source": (link, source), "both": (link, link), "destination": (source, link)}[named]
    try:
        report = sanitize(*given, in_place=True)
    except ModelFileError:  # data is looked for beside the name that was given
        assert case != "folded"
        assert named != "destination"
        assert contents(real) == before
    else:
        assert report.silenced_channels == 1
        assert {*contents(real)} - {"model.onnx.data.2"} == before.keys()
        assert contents(real)["model.onnx"] != before["model.onnx"]
        assert [layer.dead for layer in scan(source).layers] == [(5,)]
    assert link.is_symlink()
    assert [path.name for path in links.iterdir()] == ["model.onnx"]


def test_in_place_allows_another_destination_too(tmp_path: Path) -> None:
    source, target = saved("folded", tmp_path), tmp_path / "out.onnx"
    before = source.read_bytes()
    sanitize(source, target, in_place=True)
    assert source.read_bytes() == before


@pytest.mark.parametrize("target", ["missing/out.onnx", "folder"])
def test_a_destination_that_cannot_be_is_refused(target: str, tmp_path: Path) -> None:
    source = saved("folded", tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="folder"):
        sanitize(source, tmp_path / target, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "model.onnx"]


def test_a_dry_run_says_the_same_and_writes_nothing(tmp_path: Path) -> None:
    source = saved("shared_gamma", tmp_path)
    before = contents(tmp_path)
    for target in (tmp_path / "out.onnx", source, tmp_path / "missing" / "out.onnx"):
        report = sanitize(source, target, dry_run=True)
        assert contents(tmp_path) == before
        assert (report.written, report.files, report.checks, report.after) == (False, (), (), None)
        assert report.input_sha256 == ""
    real = sanitize(source, tmp_path / "out.onnx")
    assert (report.silenced, report.unshared, report.before) == (real.silenced, real.unshared, real.before)


def test_nothing_but_the_model_is_left_behind(tmp_path: Path) -> None:
    source = saved("folded", tmp_path)
    report = sanitize(source, tmp_path / "out.onnx")
    assert sorted(contents(tmp_path)) == ["model.onnx", "out.onnx"]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    assert report.files == ("out.onnx",)
    assert report.input_sha256 == hashlib.sha256(source.read_bytes()).hexdigest()


# ---- a rewrite that goes wrong


def flip(position: int) -> Callable[[Path], None]:
    """Change two bytes of a file, counted from the end where negative."""

    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        for offset in (0, 1):
            content[(position + offset) % len(content)] ^= 0x55
        path.write_bytes(content)

    return change


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def spoil(monkeypatch: pytest.MonkeyPatch, check: str, change: Callable[[Path], None], which: int) -> None:
    """Let `change` happen to a written file right before a check looks at it: the model is the last of them."""
    original = getattr(rewrite, check)

    def spoiled(*arguments: object) -> object:
        (written,) = (argument for argument in arguments if isinstance(argument, Rewrite))
        change(written.files[which].path)
        result: object = original(*arguments)
        return result

    monkeypatch.setattr(rewrite, check, spoiled)


@pytest.mark.parametrize(
    "change", [flip(0), flip(700), flip(-20), append, cut], ids=["head", "middle", "end", "longer", "shorter"]
)
@pytest.mark.parametrize(("case", "which"), [("folded", -1), ("external_one_file", -1), ("external_one_file", 0)])
def test_a_file_that_is_not_what_was_planned_is_removed(
    change: Callable[[Path], None], case: str, which: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(case, tmp_path)
    before = contents(tmp_path)
    spoil(monkeypatch, "check_bytes", change, which)
    with pytest.raises(VerificationError):
        sanitize(source, tmp_path / "out.onnx")
    assert contents(tmp_path) == before
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def loud_again(path: Path) -> None:
    """Undo the edit of the kernel: every other byte of the file stays."""
    model = oracle.load(path)
    (weight,) = (t for t in model.graph.initializer if t.name == "conv.weight")
    kernel = numpy_helper.to_array(weight)
    content = path.read_bytes()
    start = content.index(weight.raw_data)
    louder = kernel.copy()
    louder[5] = 1
    path.write_bytes(content[:start] + louder.tobytes() + content[start + len(weight.raw_data) :])


def louder_elsewhere(path: Path) -> None:
    model = oracle.load(path)
    (weight,) = (t for t in model.graph.initializer if t.name == "conv.weight")
    content = path.read_bytes()
    start = content.index(weight.raw_data)
    louder = numpy_helper.to_array(weight) * 2
    path.write_bytes(content[:start] + louder.tobytes() + content[start + len(weight.raw_data) :])


def with_unknown_operator(path: Path) -> None:
    model = oracle.load(path)
    model.graph.node[-1].op_type = "NoSuchOperator"
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (loud_again, "is not silent"),
        (louder_elsewhere, "grew"),
        (with_unknown_operator, "other layers|checker refuses"),
    ],
)
def test_the_written_file_is_scanned_anew(
    change: Callable[[Path], None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved("folded", tmp_path)
    before = contents(tmp_path)
    spoil(monkeypatch, "verify", change, -1)
    with pytest.raises(VerificationError, match=message):
        sanitize(source, tmp_path / "out.onnx")
    assert contents(tmp_path) == before


def test_a_bound_may_only_change_where_something_was_silenced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer that was left has half the numbers it had: no bound grew, but it is not the model any more."""

    def quieter(path: Path) -> None:
        model = oracle.load(path)
        first = next(node for node in model.graph.node if node.op_type == "Conv")
        (weight,) = (t for t in model.graph.initializer if t.name == first.input[1])
        halved = (numpy_helper.to_array(weight) / 2).tobytes()
        path.write_bytes(path.read_bytes().replace(weight.raw_data, halved))

    source = saved("conv_bn_chain", tmp_path)
    before = contents(tmp_path)
    spoil(monkeypatch, "verify", quieter, -1)
    with pytest.raises(VerificationError, match="'bn_0' changed, and nothing was silenced there"):
        sanitize(source, tmp_path / "out.onnx", max_share=0.05)  # which leaves bn_0
    assert contents(tmp_path) == before


def test_a_channel_that_is_not_silent_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made loud after the new scan, so that only onnxruntime can see it."""
    source = saved("folded", tmp_path)
    before = contents(tmp_path)
    examine = runtime.examine

    def spoiled(model: Path, *arguments: Any) -> runtime.Trial:  # noqa: ANN401  # as they are, to the function itself
        loud_again(model)
        return examine(model, *arguments)

    monkeypatch.setattr(runtime, "examine", spoiled)
    with pytest.raises(VerificationError, match=r"channel 5 of 'conv\.out' is not silent"):
        sanitize(source, tmp_path / "out.onnx")
    assert contents(tmp_path) == before


def test_onnxruntime_sees_a_channel_that_is_not_silent(tmp_path: Path) -> None:
    source = saved("folded", tmp_path)
    observed = [runtime.Observed("conv.out", 1, (5,), (0.0,))]

    def ran(model: Path) -> runtime.Answer | None:
        return runtime.examine(model, source, observed, {}, model.stat().st_size, DEFAULT_LIMITS).run

    loud = ran(source)
    assert loud is not None
    assert (loud.kind, loud.message) == ("loud", "channel 5 of 'conv.out' is not silent in the rewritten model")
    sanitize(source, tmp_path / "out.onnx")
    silent = ran(tmp_path / "out.onnx")
    assert silent is not None
    assert silent.fine
    assert sorted(contents(tmp_path)) == ["model.onnx", "out.onnx"]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(OSError(errno.ENOSPC, "No space left on device"), UsageError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["disk full", "interrupted"],
)
def test_an_interrupted_rewrite_leaves_nothing(
    raised: BaseException, expected: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved("external_one_file", tmp_path)
    before = contents(tmp_path)

    def full(*_: object) -> None:
        raise raised

    monkeypatch.setattr(save_module, "_write_all", full)
    with pytest.raises(expected):
        sanitize(source, source, in_place=True)
    assert contents(tmp_path) == before
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_without_onnxruntime_the_report_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "available", lambda: False)
    report = sanitize(saved("folded", tmp_path), tmp_path / "out.onnx")
    none = {"probes": None, "onnxruntime-load": None}
    assert checked(report) == {"bytes": True, "scan": True, "checker": True, **none}
    assert "not installed" in report.checks[-1].detail


# ---- metadata


def note(path: Path) -> dict[str, str]:
    entries = [(entry.key, entry.value) for entry in onnx.load(path, load_external_data=False).metadata_props]
    ours = [(key, value) for key, value in entries if key.startswith("onnx_clp.")]
    assert len(dict(ours)) == len(ours), "a key twice"
    return dict(ours)


def test_the_note_says_what_was_done(tmp_path: Path) -> None:
    source, target = saved("conv_bn_chain", tmp_path), tmp_path / "out.onnx"
    report = sanitize(source, target, u=2.5)
    found = note(target)
    assert found.keys() == {"onnx_clp.version", "onnx_clp.u", "onnx_clp.input_sha256", "onnx_clp.silenced"}
    assert found["onnx_clp.version"] == onnx_clp.__version__
    assert float(found["onnx_clp.u"]) == 2.5
    assert found["onnx_clp.input_sha256"] == report.input_sha256
    assert json.loads(found["onnx_clp.silenced"]) == {part.layer: list(part.channels) for part in report.silenced}
    assert report.silenced


def test_a_second_note_replaces_the_first_and_leaves_the_rest(tmp_path: Path) -> None:
    source, once, twice = saved("doubled_metadata", tmp_path), tmp_path / "once.onnx", tmp_path / "twice.onnx"
    sanitize(source, once)
    sanitize(once, twice)
    assert note(once).keys() == note(twice).keys()
    assert note(twice)["onnx_clp.version"] == onnx_clp.__version__  # not the 99 that the file came with
    assert note(twice)["onnx_clp.input_sha256"] == hashlib.sha256(once.read_bytes()).hexdigest()
    kept = [(entry.key, entry.value) for entry in oracle.load(twice).metadata_props if entry.key == "author"]
    assert kept == [("author", "a"), ("author", "b")]


def test_without_the_note_there_is_none(tmp_path: Path) -> None:
    sanitize(saved("folded", tmp_path), tmp_path / "out.onnx", metadata=False)
    assert note(tmp_path / "out.onnx") == {}


def test_nothing_that_a_file_says_of_itself_is_believed(tmp_path: Path) -> None:
    honest = saved("conv_bn_chain", tmp_path)
    model = oracle.load(honest)
    claims = {"version": "9.9", "u": "0", "input_sha256": "0" * 64, "silenced": '{"bn_0":[3],"bn_1":[30],"bn_2":[0]}'}
    for key, value in claims.items():
        model.metadata_props.add(key=f"onnx_clp.{key}", value=value)
    liar = tmp_path / "liar.onnx"
    liar.write_bytes(model.SerializeToString())
    assert dataclasses.replace(scan(liar), path="") == dataclasses.replace(scan(honest), path="")
    assert silenced(sanitize(liar, tmp_path / "out.onnx")) == {"bn_0": (3,), "bn_1": (30,), "bn_2": (0,)}


# ---- how much may be silenced


def test_a_layer_that_would_lose_more_than_the_share_is_left(tmp_path: Path) -> None:
    source, target = saved("conv_bn_chain", tmp_path), tmp_path / "out.onnx"
    report = sanitize(source, target, max_share=0.05)  # of 16, 32 and 24 channels one is 6.3 %, 3.1 % and 4.2 %
    assert silenced(report) == {"bn_1": (30,), "bn_2": (0,)}
    assert [(left.layer, left.channels) for left in report.left] == [("bn_0", (3,))]
    assert "6.2%" in report.left[0].reason
    assert "5.0%" in report.left[0].reason
    assert differences(source, target, report) == []
    assert [len(layer.flagged) for layer in report.before.layers] == [1, 1, 1]


def test_a_share_of_exactly_the_limit_is_silenced(tmp_path: Path) -> None:
    source = saved("folded", tmp_path)
    assert sanitize(source, tmp_path / "a.onnx", max_share=1 / 16).silenced_channels == 1
    report = sanitize(source, tmp_path / "b.onnx", max_share=0)
    assert (report.silenced_channels, len(report.left)) == (0, 1)
    assert report.max_share == 0


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_share_that_is_none_is_refused(share: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="share"):
        sanitize(saved("folded", tmp_path), tmp_path / "out.onnx", max_share=share)
    assert sorted(contents(tmp_path)) == ["model.onnx"]


@pytest.mark.parametrize("u", [-1.0, float("nan"), float("inf")])
def test_a_u_that_is_none_is_refused(u: float, tmp_path: Path) -> None:
    source = saved("folded", tmp_path)
    with pytest.raises(UsageError, match="u is"):
        sanitize(source, tmp_path / "out.onnx", u=u)
    with pytest.raises(UsageError, match="u is"):
        scan(source, u=u)


# ---- the run in onnxruntime


def with_input(*shape: int | str) -> Net:
    net = Net()
    x = net.feed(*shape)
    net.tail(net.conv(x, net.kernel(16, 3, 3, 3), net.vector(16)), 16)
    return net


def test_an_open_batch_is_run_with_one(tmp_path: Path) -> None:
    report = sanitize(stored(with_input("batch", 3, 8, 8), tmp_path), tmp_path / "out.onnx")
    assert checked(report)["onnxruntime-run"] is True


def test_an_open_size_needs_a_shape_and_the_report_says_which(tmp_path: Path) -> None:
    source = stored(with_input(1, 3, "height", "width"), tmp_path)
    report = sanitize(source, tmp_path / "a.onnx")
    (check,) = (check for check in report.checks if check.name == "onnxruntime-run")
    assert check.passed is None
    assert "'x'" in check.detail
    assert "--input-shape x=" in check.detail
    assert "height" in check.detail

    report = sanitize(source, tmp_path / "b.onnx", input_shapes={"x": (1, 3, 16, 12)})
    assert checked(report)["onnxruntime-run"] is True


def test_a_shape_for_an_input_that_is_not_there_is_refused(tmp_path: Path) -> None:
    source = stored(with_input(1, 3, 8, 8), tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="'y'") as caught:
        sanitize(source, tmp_path / "out.onnx", input_shapes={"y": (1, 3, 8, 8)})
    assert "x" in caught.value.hint
    assert contents(tmp_path) == before


def test_a_shape_that_does_not_fit_is_said(tmp_path: Path) -> None:
    source = stored(with_input(1, 3, 8, 8), tmp_path)
    for shape in ((1, 4, 8, 8), (1, 3)):
        with pytest.raises(UsageError, match=r"'x' has the shape \(1,3,8,8\), not 1,"):
            sanitize(source, tmp_path / "out.onnx", input_shapes={"x": shape})
    assert not (tmp_path / "out.onnx").exists()


# ---- what a second look says


def hidden() -> Net:
    """A channel so loud that the next one does not stand out beside it."""
    net = Net()
    W = net.kernel(32, 3, 3, 3, outlier=4, factor=1000)
    W[9] *= 8
    net.tail(net.conv(net.feed(1, 3, 8, 8), W, net.vector(32)), 32)
    return net


def flagged(path: Path, *, count_dead: bool = False) -> tuple[int, ...]:
    (layer,) = scan(path, count_dead=count_dead).layers
    return tuple(sorted(channel.index for channel in layer.flagged))


def test_a_second_scan_leaves_the_silenced_out_and_may_flag_what_they_hid(tmp_path: Path) -> None:
    source, once, twice = stored(hidden(), tmp_path), tmp_path / "once.onnx", tmp_path / "twice.onnx"
    assert flagged(source) == (4,)
    report = sanitize(source, once)
    assert silenced(report) == {"conv": (4,)}

    (layer,) = scan(once).layers
    assert layer.dead == (4,)
    assert layer.bounds[4] == 0
    alive = np.delete(np.array(layer.bounds), 4)
    # Sums of 31 numbers in float64.
    assert layer.mean == pytest.approx(alive.mean(), rel=1e-13)
    assert layer.std == pytest.approx(alive.std(ddof=1), rel=1e-13)
    assert flagged(once) == (9,)
    assert report.after is not None
    assert report.after.layers == scan(once).layers

    assert silenced(sanitize(once, twice)) == {"conv": (9,)}
    assert scan(twice).layers[0].dead == (4, 9)


def test_counting_the_dead_is_the_published_arithmetic(tmp_path: Path) -> None:
    source, once = stored(hidden(), tmp_path), tmp_path / "once.onnx"
    sanitize(source, once)
    (layer,) = scan(once, count_dead=True).layers
    bounds = np.array(layer.bounds)
    assert layer.mean == pytest.approx(bounds.mean(), rel=1e-13)  # sums of 32 numbers in float64
    assert layer.std == pytest.approx(bounds.std(ddof=1), rel=1e-13)
    assert list(flagged(once, count_dead=True)) == naive.flagged(bounds, count_dead=True)
    report = sanitize(once, tmp_path / "twice.onnx", count_dead=True)
    assert report.before.count_dead
    assert report.after is not None
    assert report.after.count_dead


def test_sanitizing_again_until_nothing_stands_out_ends(tmp_path: Path) -> None:
    path = stored(hidden(), tmp_path)
    dead: Iterable[int] = ()
    for step in range(10):
        target = tmp_path / f"{step}.onnx"
        report = sanitize(path, target, max_share=1)
        assert set(dead) <= set(scan(target).layers[0].dead)
        dead, path = scan(target).layers[0].dead, target
        if not report.silenced:
            break
    else:
        pytest.fail("ten rounds, and still something to silence")
    assert scan(path).flagged_channels == 0


# ---- the results


def parts(report: SanitizeReport) -> list[Any]:
    """A report and everything in it that is a result of its own."""
    layer = report.before.layers[0]
    found = [report, report.before, layer, layer.flagged[0], report.silenced[0], report.checks[0]]
    return [*found, *report.left, *report.before.skipped]


@pytest.fixture
def full_report(tmp_path: Path) -> SanitizeReport:
    """A report with something in every part."""
    net = Net()
    W_0, W_1 = net.kernel(16, 3, 3, 3), net.kernel(32, 16, 3, 3)
    x = net.op("Relu", net.conv(net.feed(1, 3, 8, 8), W_0, net.vector(16), name="conv_0"), name="relu_0")
    x = net.op("Relu", net.conv(x, W_1, net.vector(32), name="conv_1"), name="relu_1")
    net.give(net.conv(x, net.kernel(4, 32, 1, 1, outlier=None), name="head"))
    return sanitize(stored(net, tmp_path), tmp_path / "out.onnx", max_share=0.05)


def test_results_are_frozen_and_can_be_pickled(full_report: SanitizeReport) -> None:
    found = parts(full_report)
    assert len({type(part) for part in found}) == 8
    for part in found:
        field = dataclasses.fields(part)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, field, None)
        assert hash(part) == hash(pickle.loads(pickle.dumps(part)))
        assert pickle.loads(pickle.dumps(part)) == part


@pytest.mark.parametrize("case", ["nan_weight", "few_channels", "odd_names", "external_one_file"])
def test_the_report_of_any_model_survives_pickling(case: str, tmp_path: Path) -> None:
    report = scan(saved(case, tmp_path))
    # By their representation: a NaN is not equal to itself.
    assert repr(pickle.loads(pickle.dumps(report))) == repr(report)


@pytest.mark.parametrize("kind", [ModelFileError, UsageError, VerificationError])
def test_errors_can_be_pickled(kind: type[onnx_clp.OnnxClpError]) -> None:
    error = pickle.loads(pickle.dumps(kind("what", "advice")))
    assert type(error) is kind
    assert (error.message, error.hint, str(error)) == ("what", "advice", "what (advice)")
    assert str(kind("what")) == "what"


def test_every_result_type_is_public(full_report: SanitizeReport) -> None:
    for part in parts(full_report):
        name = type(part).__name__
        assert name in onnx_clp.__all__
        assert getattr(onnx_clp, name) is type(part)


def test_paths_may_be_strings(tmp_path: Path) -> None:
    source, target = str(saved("folded", tmp_path)), str(tmp_path / "out.onnx")
    report = sanitize(source, target)
    assert (report.source, report.destination) == (source, target)
    assert report.before.path == scan(source).path == source
    assert report.after is not None
    assert report.after.path == target


def test_metadata_of_the_wrong_wire_type_is_no_metadata(tmp_path: Path) -> None:
    """Field 14 as a varint is an unknown field to protobuf: kept as it is, and counted as no entry."""
    source = saved("conv_bn_2d", tmp_path)
    source.write_bytes(source.read_bytes() + bytes([14 << 3, 1]))
    report = sanitize(source, tmp_path / "out.onnx")
    assert report.silenced
    keys = [entry.key for entry in onnx.load(tmp_path / "out.onnx").metadata_props]
    assert keys == ["onnx_clp.version", "onnx_clp.u", "onnx_clp.input_sha256", "onnx_clp.silenced"]


def test_nan_in_bfloat16_is_no_warning(tmp_path: Path) -> None:
    """Warnings are errors here: ml_dtypes warns where NaN is compared."""
    case = build("bfloat16_int32_data")
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    (beta,) = (tensor for tensor in model.graph.initializer if tensor.name == "bn.beta")
    beta.int32_data[0] = 0x7FC0
    source = tmp_path / "model.onnx"
    source.write_bytes(model.SerializeToString())
    assert sanitize(source, tmp_path / "out.onnx").silenced
