"""External data that leads where it should not: it is refused without a word of what is there, or read as it is run.

The oracle is onnxruntime: where it loads a file, the weight that it computes with is the one that was judged here, or
this tool says that it cannot tell.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from onnx_clp import Limits, sanitize, scan
from onnx_clp.cli import run
from onnx_clp.errors import ModelFileError, OnnxClpError, PayloadError
from onnx_clp.model import containment, file
from onnx_clp.model.constants import Constants
from onnx_clp.model.expand import build_graph
from onnx_clp.model.file import open_model
from tests.cases.net import PLANTED, Net

pytestmark = pytest.mark.usefixtures("in_this_process")

Array = NDArray[Any]
Entries = Sequence[tuple[str, str]]
Capture = pytest.CaptureFixture[str]

FINE, ERROR, NOT_ANALYSED = 0, 2, 3

KERNEL: Array = Net().kernel(16, 3, 3, 3)
"""What the data file beside the model holds."""

OTHER: Array = Net(rng=np.random.default_rng(1)).kernel(16, 3, 3, 3, outlier=9)
"""What a file holds that is not to be read, or not by this name."""

SECRET = b"TOP-SECRET" + OTHER.tobytes()[10:]


def write_model(path: Path, *tensors: Entries) -> Path:
    """Convolutions one behind the other, each of a weight with these external_data entries; the weights are outputs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    net = Net()
    x = net.feed(1, 3, 8, 8)
    for number, entries in enumerate(tensors):
        shape = KERNEL.shape if not number else (16, 16, 3, 3)
        proto = TensorProto(
            name=f"weight_{number}", dims=shape, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL
        )
        for key, value in entries:
            proto.external_data.add(key=key, value=value)
        net.initializers.append(proto)
        x = net.op("Relu", net.conv(x, proto.name, name=f"conv_{number}", pads=[1] * 4), name=f"relu_{number}")
    net.tail(x, 16)
    for proto in net.initializers[: len(tensors)]:
        net.give(net.op("Identity", proto.name, name=f"{proto.name}_itself"))
    path.write_bytes(net.case("model").model.SerializeToString())
    return path


def named(location: str, path: Path) -> Path:
    """A model at ``path`` whose weight lies in ``location``."""
    return write_model(path, [("location", location)])


def beside(folder: Path, location: str = "w.bin") -> Path:
    """A model in ``folder`` whose weight lies in ``location``, and ``w.bin`` with the weight beside it."""
    model = named(location, folder / "model.onnx")
    (folder / "w.bin").write_bytes(KERNEL.tobytes())
    return model


def run_weights(model: Path) -> list[Array] | None:
    """The weights that onnxruntime computes with; None where it does not load the model."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception:  # noqa: BLE001  # onnxruntime raises kinds of its own, and for some paths a SystemError
        return None
    outputs: list[Array] = session.run(None, {"x": np.zeros((1, 3, 8, 8), np.float32)})
    return outputs[1:]


def judged_weight(model: Path, number: int = 0, **options: Any) -> Array | str:  # noqa: ANN401  # those of open_model
    """The weight that a scan sees, or why it sees none."""
    with open_model(model, **options) as opened:
        graph = build_graph(opened)
        (value,) = (value for value in graph.initializers if graph.name_of(value) == f"weight_{number}")
        try:
            return Constants(opened, graph).array(value)
        except PayloadError as error:
            return str(error)


def seen(model: Path, **options: Any) -> Array | str:  # noqa: ANN401  # those of open_model
    """What a scan sees, after it was compared with what onnxruntime runs."""
    judged, run_with = judged_weight(model, **options), run_weights(model)
    if run_with is not None and not isinstance(judged, str):
        np.testing.assert_array_equal(judged, run_with[0])
    return judged


def assert_read(model: Path, *, runs: bool = True, **options: Any) -> None:  # noqa: ANN401  # those of open_model
    """The weight is read, by onnxruntime too where it ``runs``, and its outlier is found."""
    np.testing.assert_array_equal(seen(model, **options), KERNEL)
    assert (run_weights(model) is not None) == runs
    flagged = scan(model, **options).layers[0].flagged
    assert [channel.index for channel in flagged] == [PLANTED]


def assert_unreadable(model: Path, why: str, **options: Any) -> str:  # noqa: ANN401  # those of open_model
    """The weight is not read, for this reason, and nor by onnxruntime as another; the layer is not analysed."""
    refusal = seen(model, **options)
    assert isinstance(refusal, str)
    assert why in refusal
    report = scan(model, **options)
    assert [(part.name, part.reason) for part in report.skipped] == [("conv_0", "unreadable")]
    assert not report.analysed
    assert "SECRET" not in refusal + repr(report)
    return refusal


def assert_refused(model: Path, why: str, **options: Any) -> str:  # noqa: ANN401  # those of open_model
    """As ``assert_unreadable``, and no copy is written either."""
    refusal = assert_unreadable(model, why, **options)
    target = model.with_name("out.onnx")
    before = sorted(model.parent.iterdir())
    with pytest.raises(OnnxClpError) as caught:
        sanitize(model, target, **options)
    assert "SECRET" not in str(caught.value)
    assert sorted(model.parent.iterdir()) == before
    return refusal


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file that is not to be read, outside the folder of the model."""
    path = tmp_path / "outside" / "secret.bin"
    path.parent.mkdir()
    path.write_bytes(SECRET)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of the model."""
    path = tmp_path / "m"
    path.mkdir()
    return path


@contextmanager
def unless_it_hangs(seconds: int = 30) -> Iterator[None]:
    """Fail where what is done inside waits for something that never comes."""

    def hung(*_: object) -> None:
        pytest.fail("it hangs")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---- where data lie


@pytest.mark.parametrize("location", ["w.bin", "./w.bin", ".//w.bin", "../m/w.bin", "real/../w.bin", "../m/./w.bin"])
def test_data_beside_the_model_are_read_however_the_name_is_spelled(location: str, folder: Path) -> None:
    (folder / "real").mkdir()
    assert_read(beside(folder, location))


@pytest.mark.parametrize("location", ["../outside/secret.bin", "real/../../outside/secret.bin", "..", "../../../.."])
def test_dot_dot_out_of_the_folder(location: str, folder: Path, outside: Path) -> None:
    (folder / "real").mkdir()
    assert outside.exists()
    assert_refused(beside(folder, location), "lies outside its folder")


def test_a_folder_beside_it_whose_name_begins_alike(folder: Path, outside: Path) -> None:
    outside.parent.rename(folder.with_name("mother"))
    assert_refused(named("../mother/secret.bin", folder / "model.onnx"), "lies outside its folder")


def test_an_absolute_path(folder: Path, outside: Path) -> None:
    assert_refused(named(str(outside), folder / "model.onnx"), "absolute path")
    assert_refused(beside(folder, str(folder / "w.bin")), "absolute path")
    assert_refused(named(str(outside), folder / "model.onnx"), "absolute path", allow_roots=[outside.parent])


@pytest.mark.parametrize("target", ["../outside/secret.bin", "ABSOLUTE", "chain", "up/outside/secret.bin"])
def test_a_symlink_out_of_the_folder(target: str, folder: Path, outside: Path) -> None:
    model = named("link.bin", folder / "model.onnx")
    (folder / "link.bin").symlink_to(outside if target == "ABSOLUTE" else target)
    (folder / "chain").symlink_to("deeper")
    (folder / "deeper").symlink_to(outside)
    (folder / "up").symlink_to("..")
    assert_refused(model, "lies outside its folder")
    with pytest.raises(ModelFileError, match="lies outside"):
        sanitize(model, folder / "out.onnx")


def test_a_symlinked_folder_out_of_the_folder(folder: Path, outside: Path) -> None:
    (folder / "sub").symlink_to(outside.parent)
    assert_refused(named("sub/secret.bin", folder / "model.onnx"), "lies outside its folder")


@pytest.mark.parametrize(
    "links",
    [
        {"l": "w.bin"},
        {"l": "./real/../w.bin"},
        {"l": "../m/w.bin"},
        {"l": "ABSOLUTE/w.bin"},
        {"l": "here/w.bin", "here": "."},
        {"l": "a", "a": "b", "b": "real/c", "real/c": "../w.bin"},
    ],
    ids=str,
)
def test_a_symlink_that_stays_in_the_folder_is_read(links: dict[str, str], folder: Path) -> None:
    (folder / "real").mkdir()
    for name, target in links.items():
        (folder / name).symlink_to(target.replace("ABSOLUTE", str(folder)))
    assert_read(beside(folder, "l"))


def test_an_absolute_link_is_followed_where_it_spells_the_folder_as_it_was_given(tmp_path: Path) -> None:
    """As on macOS, where /tmp is a link: the link spells a path that is not the real one."""
    (tmp_path / "real").mkdir()
    (tmp_path / "home").symlink_to("real")
    model = beside(tmp_path / "home" / "m", "l")
    (tmp_path / "home" / "m" / "l").symlink_to(tmp_path / "home" / "m" / "w.bin")
    assert_read(model)
    assert_refused(tmp_path / "real" / "m" / "model.onnx", "lies outside its folder")
    assert_read(tmp_path / "real" / "m" / "model.onnx", allow_roots=[tmp_path / "home" / "m"])


def test_a_model_that_is_a_link_has_its_data_beside_the_link(folder: Path, tmp_path: Path) -> None:
    beside(folder)
    (folder / "w.bin").write_bytes(OTHER.tobytes())
    link = tmp_path / "links" / "model.onnx"
    link.parent.mkdir()
    link.symlink_to(folder / "model.onnx")
    assert_refused(link, "is missing")
    (link.parent / "w.bin").write_bytes(KERNEL.tobytes())
    assert_read(link)


def test_links_that_lead_in_a_circle(folder: Path) -> None:
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    assert_refused(named("a", folder / "model.onnx"), "more than 40 links")


LOCATION_PARTS = ("", ".", "..", "w.bin", "sub", "nope", "in", "up", "out", "loop", "file")


def test_a_location_leads_where_the_system_says(folder: Path, outside: Path) -> None:
    """Against os.stat and realpath, for every path of up to four of these parts.

    What is read is the same and lies inside; what is outside has left the folder at some part, even if it came back;
    what is refused otherwise does not exist.
    """
    beside(folder)
    (folder / "sub").mkdir()
    (folder / "sub" / "w.bin").write_bytes(OTHER.tobytes())
    for name, target in {"in": "sub", "up": "..", "out": str(outside.parent), "loop": "loop", "file": "w.bin"}.items():
        (folder / name).symlink_to(target)
    allowed = containment.roots(folder)
    counts = dict.fromkeys(("read", "outside", "refused"), 0)
    for length in range(1, 5):
        for parts in itertools.product(LOCATION_PARTS, repeat=length):
            location = "/".join(parts)
            if not location or location.startswith("/"):
                continue
            path = f"{folder}/{location}"
            try:
                found = containment.resolve(location, allowed)
            except containment.Outside:
                counts["outside"] += 1
                assert not is_inside_all_the_way(location, folder), location
            except containment.Refused:
                counts["refused"] += 1
                with pytest.raises(OSError):  # noqa: PT011  # whatever the system has against it
                    os.stat(path)  # noqa: PTH116  # Path would tidy the path up
            else:
                counts["read"] += 1
                assert os.stat(path).st_ino == os.stat(found).st_ino, location  # noqa: PTH116  # likewise
                assert found == os.path.realpath(path)
                assert Path(found).is_relative_to(folder)
    assert min(counts.values()) > 100, counts


def is_inside_all_the_way(location: str, folder: Path) -> bool:
    """Whether every part of the way there lies in the folder or above it, and the last in it."""
    parts = location.split("/")
    steps = [Path(os.path.realpath(f"{folder}/{'/'.join(parts[:count])}")) for count in range(1, len(parts) + 1)]
    above = [folder.is_relative_to(step) and step != folder for step in steps]
    return not above[-1] and all(high or step.is_relative_to(folder) for high, step in zip(above, steps, strict=True))


@pytest.mark.parametrize("location", ["nope/../w.bin", "w.bin/../w.bin", "w.bin/", "w.bin/.", "w.bin/x", "nope", "sub"])
def test_a_name_that_only_text_makes_a_file(location: str, folder: Path) -> None:
    (folder / "sub").mkdir()
    refusal = assert_refused(beside(folder, location), "external data file")
    assert "is missing" in refusal or "is not a regular file" in refusal


def test_dot_dot_behind_a_link_is_the_link_s_folder_and_not_the_model_s(folder: Path, outside: Path) -> None:
    """Text says w.bin; the system says outside/w.bin."""
    (outside.parent / "inner").mkdir()
    (outside.parent / "w.bin").write_bytes(SECRET)
    (folder / "sub").symlink_to(outside.parent / "inner")
    assert_refused(beside(folder, "sub/../w.bin"), "lies outside its folder")


def test_two_spellings_that_look_alike_and_lead_to_two_files(folder: Path) -> None:
    """Both read w.bin by text; one is real/w.bin."""
    (folder / "real" / "inner").mkdir(parents=True)
    (folder / "sub").symlink_to("real/inner")
    (folder / "real" / "w.bin").write_bytes(OTHER.tobytes())
    model = write_model(folder / "model.onnx", [("location", "w.bin")], [("location", "sub/../w.bin")])
    (folder / "w.bin").write_bytes(KERNEL.tobytes() * 6)
    for number in (0, 1):
        assert "lead to two files" in str(judged_weight(model, number))
    assert_read(beside(folder))


# ---- nothing of what lies outside


def nothing(path: Path) -> None:
    assert not path.exists()


def a_secret(path: Path) -> None:
    path.write_bytes(SECRET)


def a_large_file(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def a_dead_link(path: Path) -> None:
    path.symlink_to(path.with_name("gone"))


@pytest.mark.parametrize("link", [False, True])
def test_a_refusal_is_the_same_whatever_lies_outside(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, link: bool
) -> None:
    """Neither a word nor a look: the message is the same, and no system call names anything outside."""
    target = tmp_path / "outside" / "thing"
    model = named("link.bin" if link else "../outside/thing", folder / "model.onnx")
    (folder / "link.bin").symlink_to(target)
    named_outside: list[str] = []
    for name in ("stat", "lstat", "readlink", "open", "scandir", "listdir"):
        original = getattr(os, name)

        def watched(path: Any, *rest: Any, original: Any = original, **others: Any) -> Any:  # noqa: ANN401  # any call
            if isinstance(path, str | os.PathLike) and "outside" in os.fspath(path):
                named_outside.append(os.fspath(path))
            return original(path, *rest, **others)

        monkeypatch.setattr(os, name, watched)
    refusals = set()
    for put in (None, nothing, a_secret, a_large_file, Path.mkdir, os.mkfifo, a_dead_link):
        if put is not None:
            target.parent.mkdir()
            put(target)
        named_outside.clear()
        refusals.add(str(judged_weight(model)))
        assert named_outside == []
        shutil.rmtree(target.parent, ignore_errors=True)
    (refusal,) = refusals
    assert "lies outside" in refusal


def test_a_way_that_leaves_and_comes_back_does_not_tell_what_is_on_it(folder: Path, tmp_path: Path) -> None:
    model = beside(folder, "../home/../m/w.bin")
    without = judged_weight(model)
    (tmp_path / "home").mkdir()
    assert judged_weight(model) == without
    assert "lies outside" in str(without)


# ---- hard links


def test_a_hard_link_out_of_the_folder(folder: Path, outside: Path) -> None:
    model = named("w.bin", folder / "model.onnx")
    (folder / "w.bin").hardlink_to(outside)
    assert_refused(model, "has other names (hard links), and not all of them lie in its folder")
    (folder / "second.bin").hardlink_to(outside)
    assert_refused(model, "hard links")


def test_a_hard_link_to_a_file_that_is_too_short_tells_nothing_of_its_size(folder: Path, outside: Path) -> None:
    refusals = set()
    for size in (0, 1, 1 << 20):
        outside.write_bytes(bytes(size))
        (folder / "w.bin").unlink(missing_ok=True)
        (folder / "w.bin").hardlink_to(outside)
        refusals.add(assert_refused(named("w.bin", folder / "model.onnx"), "hard links"))
    assert len(refusals) == 1


def test_hard_links_within_the_folder_are_read(folder: Path) -> None:
    model = beside(folder)
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "x.bin").hardlink_to(folder / "w.bin")
    assert_read(model)


def test_names_in_a_linked_folder_do_not_count(folder: Path, outside: Path) -> None:
    model = named("w.bin", folder / "model.onnx")
    (folder / "w.bin").hardlink_to(outside)
    (folder / "sub").symlink_to(outside.parent)
    assert_refused(model, "hard links")


@pytest.mark.parametrize("cache", [".dvc/cache/files/md5/ab", ".dvc/cache/ab"])
def test_a_hard_link_into_the_dvc_cache_is_read(cache: str, tmp_path: Path) -> None:
    kept = tmp_path / cache / "cdef"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(KERNEL.tobytes())
    model = named("w.bin", tmp_path / "models" / "a" / "model.onnx")
    (model.parent / "w.bin").hardlink_to(kept)
    assert_read(model)
    sanitize(model, model, in_place=True)
    assert kept.read_bytes() == KERNEL.tobytes()

    model.unlink()
    kept.parent.mkdir(exist_ok=True)
    (model.parent / "w.bin").unlink()
    (model.parent / "w.bin").hardlink_to(kept)
    named("w.bin", model)
    (tmp_path / "elsewhere").hardlink_to(kept)
    assert_refused(model, "hard links")


@pytest.mark.parametrize("linked", [".dvc", ".dvc/cache"])
def test_a_dvc_cache_that_is_a_link_does_not_count(linked: str, tmp_path: Path, outside: Path) -> None:
    kept = tmp_path / "elsewhere" / "cache" / "secret"
    kept.parent.mkdir(parents=True)
    model = named("w.bin", tmp_path / "repository" / "m" / "model.onnx")
    outside.rename(kept)
    (model.parent / "w.bin").hardlink_to(kept)
    link = tmp_path / "repository" / linked
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(kept.parent if linked == ".dvc/cache" else kept.parents[1])
    assert_refused(model, "hard links")


def test_looking_for_the_other_names_ends(folder: Path) -> None:
    model = beside(folder)
    for number in range(8):
        (folder / f"d{number}").mkdir()
        (folder / f"d{number}" / "file").touch()
    (folder / "d0" / "w.bin").hardlink_to(folder / "w.bin")
    assert_read(model)
    refusal = judged_weight(model, limits=Limits(entries=5))
    assert "--limit entries=50" in str(refusal)
    assert run(["scan", "--limit", "entries=5", str(model)]) == NOT_ANALYSED
    assert run(["scan", "--limit", "entries=50", str(model)]) == FINE


# ---- what is no regular file


def test_a_fifo_does_not_hang(folder: Path, capsys: Capture) -> None:
    os.mkfifo(folder / "fifo")
    with unless_it_hangs():
        assert_refused(named("fifo", folder / "model.onnx"), "is not a regular file")
        assert run(["scan", str(folder / "fifo")]) == ERROR
    assert "not a regular file" in capsys.readouterr().err


def test_a_device(folder: Path, capsys: Capture) -> None:
    (folder / "zero").symlink_to("/dev/zero")
    model = named("zero", folder / "model.onnx")
    assert_refused(model, "lies outside its folder")
    assert_refused(model, "is not a regular file", allow_roots=[Path("/dev")])
    assert run(["scan", "/dev/zero"]) == ERROR
    assert "not a regular file" in capsys.readouterr().err


def test_a_device_is_not_even_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a tape rewinds it."""
    (folder / "null").symlink_to("/dev/null")
    model = named("null", folder / "model.onnx")
    opened: list[str] = []
    original = os.open

    def watched(path: Any, *rest: Any, **others: Any) -> int:  # noqa: ANN401  # any call
        opened.append(os.fspath(path))
        return original(path, *rest, **others)

    monkeypatch.setattr(os, "open", watched)
    assert "is not a regular file" in str(judged_weight(model, allow_roots=[Path("/dev")]))
    with pytest.raises(ModelFileError, match="is not a regular file"):
        scan("/dev/null")
    assert str(model) in opened
    assert not [path for path in opened if path.endswith("null")]


def test_a_device_node_in_the_folder(folder: Path) -> None:
    try:
        os.mknod(folder / "node", 0o600 | 0o020000, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("only root makes a device")
    assert_refused(named("node", folder / "model.onnx"), "is not a regular file")


def test_a_socket(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        assert_refused(named("socket", folder / "model.onnx"), "is not a regular file")
        assert run(["scan", "socket"]) == ERROR
    assert "not a regular file" in capsys.readouterr().err


# ---- offset and length


LENGTH = KERNEL.nbytes


def with_numbers(folder: Path, offset: str, length: str) -> Path:
    (folder / "w.bin").write_bytes(bytes(64) + KERNEL.tobytes() + bytes(64))
    return write_model(folder / "model.onnx", [("location", "w.bin"), ("offset", offset), ("length", length)])


@pytest.mark.parametrize(
    ("offset", "length"), [("64", str(LENGTH)), ("0064", f"0{LENGTH}"), ("64", "0"), ("64", "00000000000000000000000")]
)
def test_offset_and_length_as_onnxruntime_reads_them(offset: str, length: str, folder: Path) -> None:
    """A length of 0 is one that is not given."""
    assert_read(with_numbers(folder, offset, length))


@pytest.mark.parametrize("length", ["1", str(LENGTH - 1), str(LENGTH + 1), str(LENGTH + 64), str((1 << 63) - 1)])
def test_a_length_that_is_not_what_the_shape_needs(length: str, folder: Path) -> None:
    assert_unreadable(with_numbers(folder, "64", length), "needs 1728 bytes and its external data has")


@pytest.mark.parametrize("offset", ["129", "192", str(1 << 40), str((1 << 63) - 1), str((1 << 63) - LENGTH)])
def test_data_shorter_than_offset_and_length(offset: str, folder: Path) -> None:
    refusal = assert_unreadable(with_numbers(folder, offset, str(LENGTH)), "past the end of its file: 'w.bin' has ")
    assert f"{LENGTH:,} bytes from byte {int(offset):,}, " in refusal


NO_NUMBERS = (
    *("-1", "-0", "+0", " 0", "0 ", "0\n", "", "0x0", "0_0", "0abc", "0.0", "1e3", "\u0660", "\u00b2"),
    *(str(1 << 63), str(1 << 64), "9" * 5000),
)


@pytest.mark.parametrize("number", NO_NUMBERS)
@pytest.mark.parametrize("key", ["offset", "length"])
def test_numbers_that_are_none(number: str, key: str, folder: Path) -> None:
    numbers = {"offset": "64", "length": str(LENGTH)} | {key: number}
    assert_unreadable(with_numbers(folder, **numbers), f"external data {key} that is no number")


@pytest.mark.parametrize("again", [("location", "w.bin"), ("location", "v.bin"), ("offset", "0"), ("length", "0")])
@pytest.mark.parametrize("first", [False, True])
def test_an_entry_that_is_given_twice(again: tuple[str, str], folder: Path, *, first: bool) -> None:
    """As onnxruntime takes the last offset and refuses two locations, and others may take the first."""
    entries = [("location", "w.bin"), ("offset", "64"), ("length", str(LENGTH))]
    (folder / "v.bin").write_bytes(OTHER.tobytes())
    with_numbers(folder, "64", str(LENGTH))
    model = write_model(folder / "model.onnx", [again, *entries] if first else [*entries, again])
    assert_unreadable(model, "twice")


@pytest.mark.parametrize("entries", [[], [("offset", "0")], [("location", "")]])
def test_data_without_a_location(entries: Entries, folder: Path) -> None:
    beside(folder)
    assert_unreadable(write_model(folder / "model.onnx", entries), "without a location")


# ---- names


def test_a_name_with_nul(folder: Path) -> None:
    """That onnxruntime reads w.bin is not what another may do: it cannot be told."""
    model = beside(folder, "w.bin\0.txt")
    weights = run_weights(model)
    assert weights is not None
    np.testing.assert_array_equal(weights[0], KERNEL)
    refusal = assert_refused(model, "NUL character")
    assert "\0" not in refusal


def test_a_name_with_newline(folder: Path, capsys: Capture) -> None:
    model = named("a\nb", folder / "model.onnx")
    refusal = assert_refused(model, "is missing")
    assert "\n" not in refusal
    (folder / "a\nb").write_bytes(KERNEL.tobytes())
    assert_read(model)
    report = sanitize(model, folder / "out.onnx")
    assert scan(folder / "out.onnx").dead_channels == 1
    assert len(report.files) == 2
    assert run(["scan", str(model)]) == FINE
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["x" * 4096, "x/" * 2047 + "x", "../" * 1365, "x" * 256, "./" * 2044 + "w.bin"])
def test_a_name_of_4096_characters(name: str, folder: Path) -> None:
    """Those of fewer too. Whatever the reason, the name is shown in part."""
    model = beside(folder, name)
    if name.endswith("w.bin"):  # 4,093 characters that the system, which counts the folder too, may find too many
        assert isinstance(seen(model), np.ndarray)
        return
    refusal = assert_refused(model, "external data file")
    assert f"({len(name):,} characters)" in refusal
    assert ("more than 4,095 characters" in refusal) == (len(name) > 4095)
    assert len(refusal) < 400 + len(str(model))


def test_a_name_that_is_not_utf_8(folder: Path) -> None:
    """Protobuf gives bytes for it, and the text of those is another name."""
    model = named("w~.bin", folder / "model.onnx")
    model.write_bytes(model.read_bytes().replace(b"w~.bin", b"w\xff.bin"))
    (folder / os.fsdecode(b"w\xff.bin")).write_bytes(KERNEL.tobytes())
    (folder / "b'w\\xff.bin'").write_bytes(OTHER.tobytes())
    assert_refused(model, "is not UTF-8")


@pytest.mark.parametrize("name", ["\x1b[31mred", "a\u202eb", "\x9b1m", "a\tb", "a\rb", "\u2028"])
def test_a_name_that_a_terminal_would_obey(name: str, folder: Path, capsys: Capture) -> None:
    model = named(name, folder / "model.onnx")
    refusal = assert_refused(model, "is missing")
    assert refusal.isprintable()
    run(["scan", "-v", str(model)])
    out, err = capsys.readouterr()
    assert name not in out + err


# ---- the model itself, and one file for two tensors


@pytest.mark.parametrize("how", ["itself", "hard link", "symlink"])
def test_the_model_file_itself_as_its_data(how: str, folder: Path) -> None:
    model = named("model.onnx" if how == "itself" else "other", folder / "model.onnx")
    with model.open("ab") as end:  # an unknown field, which holds enough bytes to be the weight
        end.write(b"\xfa\x3e\x80\x80\x01" + bytes(1 << 14))
    if how == "hard link":
        (folder / "other").hardlink_to(model)
    elif how == "symlink":
        (folder / "other").symlink_to(model.name)
    assert run_weights(model) is not None
    assert_refused(model, "is the model file itself")


SECOND: Array = Net(rng=np.random.default_rng(2)).kernel(16, 16, 3, 3, outlier=9)


def silent(weight: Array, channels: Sequence[int]) -> Array:
    """A weight with silent channels."""
    changed = weight.copy()
    changed[list(channels)] = 0
    return changed


def without_outputs(model: Path) -> None:
    """Take the weights out of the outputs, so that they may be silenced where they lie."""
    proto = onnx.load(model, load_external_data=False)
    del proto.graph.output[1:]
    del proto.graph.node[-2:]
    model.write_bytes(proto.SerializeToString())


@pytest.mark.parametrize("shift", [0, 4, 4 * 27, 4 * 27 * 5, 1000])
def test_two_tensors_that_overlap(shift: int, folder: Path) -> None:
    """Silencing a channel of one must not touch the other."""
    first, second = KERNEL.tobytes(), SECOND.tobytes()
    blob = first + second[len(first) - shift :] if shift else first + second
    (folder / "w.bin").write_bytes(blob.ljust(shift + len(second), b"\0"))
    model = write_model(folder / "model.onnx", [("location", "w.bin")], [("location", "w.bin"), ("offset", str(shift))])
    before = run_weights(model)
    assert before is not None
    for number, weight in enumerate(before):
        np.testing.assert_array_equal(judged_weight(model, number), weight)
    for target, options in ((folder / "out.onnx", {}), (model, {"in_place": True})):
        report = sanitize(model, target, **options)  # type: ignore[arg-type]  # in_place is a bool
        silenced = {part.layer: part.channels for part in report.silenced}
        assert silenced["conv_0"] == (PLANTED,)
        assert "weight_0" in report.unshared
        found = {layer.name: layer.dead for layer in scan(target).layers}
        assert {name: dead for name, dead in found.items() if dead} == silenced
        after = run_weights(target)
        assert after is not None
        for old, new in zip(before, after, strict=True):
            np.testing.assert_array_equal(old, new)  # the outputs are the shared tensors, which stay


def symlink(folder: Path) -> str:
    (folder / "v.bin").symlink_to("w.bin")
    return "v.bin"


def hard_link(folder: Path) -> str:
    (folder / "v.bin").hardlink_to(folder / "w.bin")
    return "v.bin"


def dotted(_: Path) -> str:
    return "./w.bin"


def through_a_folder(folder: Path) -> str:
    (folder / "real").mkdir()
    return "real/../w.bin"


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("other", [symlink, hard_link, dotted, through_a_folder])
def test_one_file_under_two_spellings(other: Callable[[Path], str], folder: Path, *, in_place: bool) -> None:
    """Both tensors are read from it, and both are silenced."""
    (folder / "w.bin").write_bytes(KERNEL.tobytes() + SECOND.tobytes())
    second = other(folder)
    # Where a length is not given, a tensor may have all that follows: what lies there is not changed in place.
    first = [("location", "w.bin"), ("length", str(LENGTH))]
    model = write_model(folder / "model.onnx", first, [("location", second), ("offset", str(LENGTH))])
    weights = run_weights(model)
    assert weights is not None
    np.testing.assert_array_equal(weights[0], KERNEL)
    for number, weight in enumerate(weights):
        np.testing.assert_array_equal(judged_weight(model, number), weight)
    without_outputs(model)
    target = model if in_place else folder / "out.onnx"
    report = sanitize(model, target, in_place=in_place)
    assert report.unshared == ()
    np.testing.assert_array_equal(judged_weight(target, 0), silent(KERNEL, [PLANTED]))
    np.testing.assert_array_equal(judged_weight(target, 1), silent(SECOND, [9]))
    assert [layer.dead for layer in scan(target).layers] == [(PLANTED,), (9,)]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("other", [symlink, hard_link, dotted, through_a_folder])
def test_two_tensors_that_overlap_under_two_spellings(
    other: Callable[[Path], str], folder: Path, *, in_place: bool
) -> None:
    (folder / "w.bin").write_bytes(SECOND.tobytes())
    model = write_model(folder / "model.onnx", [("location", "w.bin")], [("location", other(folder))])
    weights = run_weights(model)
    assert weights is not None
    without_outputs(model)
    target = model if in_place else folder / "out.onnx"
    report = sanitize(model, target, in_place=in_place)
    silenced = {part.layer: part.channels for part in report.silenced}
    assert silenced["conv_1"] == (9,)
    layers = {layer.name: layer.dead for layer in scan(target).layers}
    assert {name: dead for name, dead in layers.items() if dead} == silenced
    if not report.unshared:
        for number, weight in enumerate(weights):
            changed = silent(weight, silenced.get(f"conv_{number}", ()))
            np.testing.assert_array_equal(judged_weight(target, number), changed)


# ---- Hugging Face


def hub(tmp_path: Path, blobs: str = "blobs") -> Path:
    """A repository in a Hugging Face cache, all of it links to ``blobs``; the model."""
    repository = tmp_path / "hub" / "models--acme--net"
    (repository / blobs).mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123" / "onnx"
    snapshot.mkdir(parents=True)
    named("w.bin", repository / blobs / "aa")
    (repository / blobs / "bb").write_bytes(KERNEL.tobytes())
    for name, blob in (("model.onnx", "aa"), ("w.bin", "bb")):
        (snapshot / name).symlink_to(f"../../../{blobs}/{blob}")
    return snapshot / "model.onnx"


def test_a_hugging_face_cache_is_read(tmp_path: Path) -> None:
    model = hub(tmp_path)
    assert_read(model)
    (tmp_path / "link").symlink_to(tmp_path / "hub")
    assert_read(tmp_path / "link" / model.relative_to(tmp_path / "hub"))
    blob = model.parents[3] / "blobs" / "bb"
    sanitize(model, tmp_path / "out.onnx")
    assert scan(tmp_path / "out.onnx").dead_channels == 1
    assert blob.read_bytes() == KERNEL.tobytes()


def test_a_model_that_is_no_link_in_a_hugging_face_cache(tmp_path: Path) -> None:
    model = hub(tmp_path)
    content = model.read_bytes()
    model.unlink()
    model.write_bytes(content)
    assert_read(model, runs=False)


def test_blobs_that_are_a_link_or_another_repository_s(tmp_path: Path, outside: Path) -> None:
    model = hub(tmp_path, "elsewhere")
    assert_refused(model, "lies outside its folder")
    (model.parents[3] / "blobs").symlink_to("elsewhere")
    assert_refused(model, "lies outside its folder")
    (model.parents[3] / "blobs").unlink()
    (model.parents[3] / "blobs").symlink_to(outside.parent)
    (model.parent / "w.bin").unlink()
    (model.parent / "w.bin").symlink_to("../../../blobs/secret.bin")
    assert_refused(model, "lies outside its folder")
    other = hub(tmp_path / "other")
    (model.parent / "w.bin").unlink()
    (model.parent / "w.bin").symlink_to(other.parents[3] / "blobs" / "bb")
    assert_refused(model, "lies outside its folder")


def test_a_folder_that_only_looks_like_a_cache(tmp_path: Path) -> None:
    for parts in ("models--x/w/0123", "x/snapshots/0123", "models--x/snapshots"):
        model = named("w.bin", tmp_path / parts / "model.onnx")
        blobs = tmp_path / parts.split("/")[0] / "blobs"
        blobs.mkdir(exist_ok=True)
        (blobs / "bb").write_bytes(KERNEL.tobytes())
        (model.parent / "w.bin").symlink_to(blobs / "bb")
        assert_refused(model, "lies outside its folder")


# ---- --allow-root


def test_allow_root_reads_links_and_dot_dot_below_it_and_nothing_else(folder: Path, outside: Path) -> None:
    outside.write_bytes(KERNEL.tobytes())
    (folder / "link.bin").symlink_to(outside)
    for location in ("link.bin", "../outside/secret.bin"):
        model = named(location, folder / "model.onnx")
        assert_read(model, runs=False, allow_roots=[outside.parent])
        assert_refused(model, "lies outside its folder", allow_roots=[folder / "sub", outside.parent / "sub"])
    assert run(["scan", str(model)]) == NOT_ANALYSED
    assert run(["scan", "--allow-root", str(outside.parent), str(model)]) == FINE
    target = str(folder.parent / "out.onnx")
    assert run(["sanitize", str(model), target]) == ERROR
    assert run(["sanitize", "--allow-root", str(outside.parent), str(model), target]) == FINE
    report = sanitize(model, folder / "out.onnx", allow_roots=[outside.parent])
    assert {check.name: check.passed for check in report.checks}["onnxruntime-run"] is True
    weights = run_weights(folder / "out.onnx")
    assert weights is not None
    assert scan(folder / "out.onnx").dead_channels == 1
    assert outside.read_bytes() == KERNEL.tobytes()


def test_allow_root_counts_the_names_of_a_hard_link(folder: Path, outside: Path) -> None:
    outside.write_bytes(KERNEL.tobytes())
    (folder / "w.bin").hardlink_to(outside)
    model = named("w.bin", folder / "model.onnx")
    assert_refused(model, "hard links")
    assert_read(model, allow_roots=[outside.parent])


# ---- replaced while it is opened


def test_a_folder_that_is_replaced_by_a_link_before_it_is_opened(
    folder: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = named("sub/w.bin", folder / "model.onnx")
    (folder / "sub").mkdir()
    (folder / "sub" / "w.bin").write_bytes(KERNEL.tobytes())
    (outside.parent / "w.bin").write_bytes(SECRET)
    original = containment.open_regular

    def late(*arguments: Any) -> Any:  # noqa: ANN401  # passed on as they are
        shutil.rmtree(folder / "sub")
        (folder / "sub").symlink_to(outside.parent)
        return original(*arguments)

    assert_read(model)
    monkeypatch.setattr(file, "open_regular", late)
    assert "cannot be opened" in str(judged_weight(model))


@pytest.mark.parametrize("by", ["link", "file", "fifo"])
def test_a_file_that_is_replaced_between_looking_and_opening(
    by: str, folder: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = beside(folder)
    original = os.stat

    def replaced(path: Any, *rest: Any, **others: Any) -> os.stat_result:  # noqa: ANN401  # any call
        status = original(path, *rest, **others)
        if path == "w.bin" and others.get("dir_fd") is not None:
            (folder / "w.bin").rename(folder / "kept")
            if by == "fifo":
                os.mkfifo(folder / "w.bin")
            else:
                (folder / "w.bin").symlink_to(outside) if by == "link" else (folder / "w.bin").write_bytes(SECRET)
        return status

    monkeypatch.setattr(os, "stat", replaced)
    with unless_it_hangs():
        refusal = str(judged_weight(model))
    assert ("cannot be opened" if by == "link" else "was replaced") in refusal


# ---- folders to scan


def saved(path: Path) -> Path:
    """A model that needs nothing beside it, with one flagged channel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    net = Net()
    net.tail(net.conv(net.feed(1, 3, 8, 8), KERNEL), 16)
    path.write_bytes(net.case("model").model.SerializeToString())
    return path


def scanned(capsys: Capture, *arguments: str | Path) -> tuple[int, dict[str, str]]:
    """The exit code, and by path ``ok`` or the error."""
    code = run(["scan", "--format", "json", *map(str, arguments)])
    files = json.loads(capsys.readouterr().out)["files"]
    return code, {entry["path"]: entry["error"]["message"] if "error" in entry else "ok" for entry in files}


def test_a_link_in_a_scanned_folder_that_leads_out_is_an_error(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    inside, secret = saved(folder / "deep" / "a.onnx"), saved(tmp_path / "outside" / "secret.onnx")
    link, good = folder / "link.onnx", folder / "other" / "good.onnx"
    good.parent.mkdir()
    link.symlink_to(secret)
    good.symlink_to("../deep/a.onnx")
    refusal = f"{link} is a link that leads out of the folder"
    found = {str(inside): "ok", str(good): "ok", str(link): refusal}
    assert scanned(capsys, folder) == (ERROR, found)
    assert scanned(capsys, folder, "--allow-root", secret.parent) == (FINE, found | {str(link): "ok"})
    assert scanned(capsys, link) == (FINE, {str(link): "ok"})
    secret.unlink()  # the same, whatever is there
    assert scanned(capsys, folder) == (ERROR, found)
    secret.mkdir()
    assert scanned(capsys, folder) == (ERROR, found)


def test_a_hugging_face_cache_is_scanned_as_a_folder(tmp_path: Path, capsys: Capture) -> None:
    model = hub(tmp_path)
    for top in (tmp_path, model.parents[3], model.parent):
        assert scanned(capsys, top) == (FINE, {str(model): "ok"})


def test_links_in_a_scanned_folder_that_lead_nowhere(folder: Path, capsys: Capture) -> None:
    """What is no model by any name is an error, and a link to a folder, which is scanned by its own name, is none."""
    saved(folder / "real" / "a.onnx")
    (folder / "dead.onnx").symlink_to("gone.onnx")
    (folder / "loop.onnx").symlink_to("loop.onnx")
    (folder / "folder.onnx").symlink_to("real")
    (folder / "real" / "triton.onnx").mkdir()
    code, found = scanned(capsys, folder)
    assert code == ERROR
    assert {Path(path).name: "is missing" in text or text for path, text in found.items()} == {
        "a.onnx": "ok",
        "dead.onnx": True,
        "loop.onnx": f"{folder / 'loop.onnx'} is a link to a file that leads through more than 40 links",
    }


@pytest.fixture
def for_all() -> Iterator[Path]:
    """A folder that somebody without privileges can reach, and is asked for as such."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    identity = os.geteuid()
    saved(path / "a.onnx")
    scan(path / "a.onnx")  # loads what cannot be loaded later
    try:
        if identity == 0:
            os.seteuid(65534)
        yield path
    finally:
        os.seteuid(identity)
        shutil.rmtree(path)


def test_a_folder_that_cannot_be_read_is_an_error(for_all: Path, capsys: Capture) -> None:
    closed, identity = for_all / "closed", os.geteuid()
    os.seteuid(os.getuid())
    saved(closed / "b.onnx")
    closed.chmod(0)
    os.seteuid(identity)
    code, found = scanned(capsys, for_all)
    os.seteuid(os.getuid())
    closed.chmod(0o755)
    assert code == ERROR
    assert found.pop(str(for_all / "a.onnx")) == "ok"
    assert found == {str(closed): f"the folder {closed} cannot be read: Permission denied"}


def test_a_folder_too_deep_to_be_named_is_an_error(folder: Path, capsys: Capture) -> None:
    """A model below 4,096 characters of folders is not scanned, and that is said."""
    saved(folder / "a.onnx")
    descriptor = os.open(folder, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=descriptor)
        inner = os.open("d" * 250, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    os.close(os.open("hidden.onnx", os.O_CREAT | os.O_WRONLY, dir_fd=descriptor))
    os.close(descriptor)
    code, found = scanned(capsys, folder)
    assert code == ERROR
    assert [text == "ok" for text in found.values()].count(True) == 1
    assert [text for text in found.values() if text.endswith("cannot be read: File name too long")]


@pytest.mark.parametrize("location", ["*/_ORT_MEM_ADDR_/*", "*/_ORT_NATIVE_ENDIAN_MEM_ADDR_/*"])
def test_data_in_the_memory_of_onnxruntime(location: str, folder: Path) -> None:
    """Not compared: where a file has that name, onnxruntime 1.32 reads at the offset in its memory, and crashes."""
    model = named(location, folder / "model.onnx")
    (folder / location).parent.mkdir(parents=True)
    (folder / location).write_bytes(KERNEL.tobytes())
    refusal = judged_weight(model)
    assert isinstance(refusal, str)
    assert "makes onnxruntime read its own memory" in refusal
    with pytest.raises(OnnxClpError, match="makes onnxruntime read its own memory"):
        sanitize(model, folder / "out.onnx")
    assert not (folder / "out.onnx").exists()
