"""What a reviewer found of patching: bytes that another tensor reads, zero points, doubt, and numbers one by one."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from onnx_clp import rewrite, sanitize, scan
from onnx_clp.model.edits import length_delimited
from onnx_clp.model.graph import MISSING
from tests.cases.net import PLANTED, Net


def external(name: str, data_type: int, shape: list[int], *entries: tuple[str, str]) -> TensorProto:
    """A tensor in w.bin."""
    made = TensorProto(name=name, data_type=data_type, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "w.bin"), *entries):
        made.external_data.add(key=key, value=value)
    return made


@pytest.mark.parametrize(
    "offsets",
    [["64"], ["0" * 20 + "64"], [" 64"], ["+64"], ["6_4"], ["64", "0"], ["0", "64"]],
    ids=["plain", "zeros", "space", "plus", "underscore", "twice", "twice_the_other_way"],
)
def test_bytes_of_a_tensor_whose_offset_is_spelled_strangely_are_left(offsets: list[str], tmp_path: Path) -> None:
    """γ lies in the elements of a weight of INT4; some reader finds them there whatever the offset looks like."""
    net = Net(opset=21, ir=10)
    x = net.conv(net.feed("N", 3, 4, 4), net.tensor(net.kernel(16, 3, 1, 1), "kernel"), name="conv")
    net.initializers += [
        external("gamma", TensorProto.FLOAT, [16], ("offset", "64"), ("length", "64")),
        external("four", TensorProto.INT4, [128], *(("offset", text) for text in offsets), ("length", "64")),
    ]
    constants = [net.tensor(np.full(16, value, np.float32), f"bn{i}") for i, value in enumerate((0.5, 0, 1))]
    y = net.op("BatchNormalization", x, "gamma", *constants, name="bn")
    net.give(net.op("Relu", y, name="relu"))
    net.give(net.op("DequantizeLinear", "four", net.tensor(np.float32(1), "scale"), name="dequantise"))
    data = np.concatenate([np.full(16, 9, np.float32), np.full(16, 1.5, np.float32)]).tobytes()
    (tmp_path / "model.onnx").write_bytes(net.case("model").model.SerializeToString())
    (tmp_path / "w.bin").write_bytes(data)
    report = sanitize(tmp_path / "model.onnx", tmp_path / "out.onnx")
    assert [part.channels for part in report.silenced] == [(PLANTED,)]
    assert "gamma" in report.unshared
    assert (tmp_path / "out.w.bin").read_bytes() == data


def test_what_is_left_out_is_not_doubtful() -> None:
    """An output and an input that are left out have the same number, and nothing to do with each other."""
    nodes = [SimpleNamespace(inputs=(1,), outputs=(2, MISSING)), SimpleNamespace(inputs=(5, MISSING), outputs=(6,))]
    graph: Any = SimpleNamespace(doubtful={1}, nodes=nodes)
    assert rewrite._doubtful(graph) == {1: 1, 2: 1}


def one_by_one(count: int, between: bytes, folder: Path) -> Path:
    """A model whose kernel is spelled number by number, with ``between`` behind each."""
    numbers = np.random.default_rng(0).normal(size=count).astype("<f4")
    kernel = TensorProto(name="kernel", data_type=TensorProto.FLOAT, dims=[16, count // 16, 1, 1])
    spelled = kernel.SerializeToString() + b"".join(b"\x25" + number.tobytes() + between for number in numbers)
    net = Net()
    x = net.conv(net.feed("N", count // 16, 4, 4), "kernel", name="conv", kernel_shape=[1, 1])
    net.tail(net.op("Relu", x, name="relu"), 16)
    path = folder / "model.onnx"
    path.write_bytes(net.case("model").model.SerializeToString() + length_delimited(7, length_delimited(5, spelled)))
    return path


def test_numbers_that_follow_each_other_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    pread = os.pread

    def counted(descriptor: int, length: int, start: int) -> bytes:
        calls.append(start)
        return pread(descriptor, length, start)

    monkeypatch.setattr(os, "pread", counted)
    assert [layer.name for layer in scan(one_by_one(1024, b"", tmp_path)).layers] == ["conv"]
    assert len(calls) < 10


def test_numbers_that_are_read_one_by_one_are_paid_for(tmp_path: Path, touched: list[int]) -> None:
    """With a field that no tensor has between any two of them."""
    assert [layer.name for layer in scan(one_by_one(1024, b"\xa0\x06\x01", tmp_path)).layers] == ["conv"]
    assert len(touched) > 1024


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("zero", [np.nan, np.inf, 1e30])
def test_a_zero_point_that_is_no_whole_number_warns_of_nothing(zero: float, tmp_path: Path) -> None:
    net = Net()
    zeros = np.zeros(16, np.float32)
    zeros[0] = zero
    kernel = np.random.default_rng(0).integers(-4, 5, (16, 3, 1, 1)).astype(np.int8)
    kernel[PLANTED] = 100
    x = net.feed("N", 3, 4, 4, dtype=np.uint8)
    y = net.op(
        "ConvInteger",
        x,
        net.tensor(kernel, "k8"),
        net.tensor(np.uint8(0), "zx"),
        net.tensor(zeros, "zeros"),
        name="conv",
    )
    y = net.op("Cast", y, name="cast", to=TensorProto.FLOAT)
    net.tail(net.op("Relu", y, name="relu"), 16)
    (tmp_path / "model.onnx").write_bytes(net.case("model").model.SerializeToString())
    report = sanitize(tmp_path / "model.onnx", tmp_path / "out.onnx", dry_run=True, max_share=1)
    assert report.silenced_channels or report.left
