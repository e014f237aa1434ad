"""The command as users run it: exit codes, streams, files that are no models, terminals, hostile names."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

import onnx_clp
import onnx_clp.analysis
from onnx_clp import runtime
from onnx_clp.cli import run
from onnx_clp.errors import VerificationError
from tests.built import build, save
from tests.cases.net import Net

ROOT = Path(onnx_clp.__file__).parents[1]
"""Where the package under test lies, for processes of their own."""

FINE, FLAGGED, ERROR, NOT_ANALYSED, UNVERIFIED = range(5)

Capture = pytest.CaptureFixture[str]


def saved(case: str, folder: Path, name: str = "model") -> str:
    """A built case written to `name`.onnx."""
    return str(save(replace(build(case), name=name), folder))


def environment(**changes: str) -> dict[str, str]:
    """The environment of a process of its own: nothing that colours, and the package under test."""
    kept = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "FORCE_COLOR", "CLICOLOR"}}
    return {**kept, "PYTHONPATH": str(ROOT), "TERM": "xterm", **changes}


def command(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "onnx_clp", *arguments],
        env=environment(**changes),
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


# ---- exit codes


@pytest.mark.parametrize(
    ("case", "options", "expected"),
    [
        ("folded", [], FINE),  # one outlier: evidence, not a verdict
        ("folded", ["--fail-on", "never"], FINE),
        ("folded", ["--fail-on", "1"], FLAGGED),
        ("folded", ["--fail-on", "2"], FINE),
        ("conv_bn_chain", ["--fail-on", "3"], FLAGGED),
        ("conv_bn_chain", ["--fail-on", "4"], FINE),
        ("folded", ["--fail-on", "6.25%"], FLAGGED),  # one of 16 channels
        ("folded", ["--fail-on", "6.3%"], FINE),
        ("zero_spread", ["--fail-on", "1"], FINE),
        ("zero_spread", ["--fail-on", "0.001%"], FINE),
        ("nan_weight", ["--fail-on", "2"], FLAGGED),  # an outlier and a NaN
        ("nan_weight", ["--fail-on", "3"], FINE),
        ("folded", ["-u", "2", "--fail-on", "1"], FLAGGED),
        ("conv_bn_chain", ["-u", "6", "--fail-on", "1"], NOT_ANALYSED),  # 32 channels hold no z above 5.5
        ("folded", ["--strict"], FINE),
        ("head_output", [], FINE),
        ("head_output", ["--strict"], NOT_ANALYSED),
        ("few_channels", [], NOT_ANALYSED),
        ("all_dead", [], NOT_ANALYSED),
        ("all_dead", ["--fail-on", "1"], NOT_ANALYSED),
        ("head_output", ["--strict", "--fail-on", "1"], FLAGGED),
    ],
)
@pytest.mark.parametrize("form", ["text", "json"])
def test_the_exit_code_of_a_scan(
    case: str, options: list[str], expected: int, form: str, tmp_path: Path, capsys: Capture
) -> None:
    assert run(["scan", saved(case, tmp_path), "--format", form, *options]) == expected
    assert capsys.readouterr().err == ""


def test_a_model_without_anything_to_judge_is_not_analysed(tmp_path: Path, capsys: Capture) -> None:
    net = Net()
    net.give(net.op("Relu", net.feed(1, 3), name="relu"), rank=2)
    path = str(save(net.case("relu"), tmp_path))
    assert run(["scan", path]) == NOT_ANALYSED
    assert "nothing to analyse" in capsys.readouterr().out
    assert run(["sanitize", path, str(tmp_path / "out.onnx")]) == NOT_ANALYSED


@pytest.mark.parametrize(
    "arguments",
    [
        ["scan"],
        ["scan", "--no-such-option", "MODEL"],
        ["no-such-command"],
        ["scan", "MODEL", "-u", "-1"],
        ["scan", "MODEL", "-u", "nan"],
        ["scan", "MODEL", "-u", "x"],
        ["scan", "MODEL", "--format", "xml"],
        *(["scan", "MODEL", "--fail-on", gate] for gate in ["0", "-1", "x", "0%", "101%", "1.5", "", "%", "nan%", "²"]),
        ["sanitize", "MODEL"],
        ["sanitize", "MODEL", "MODEL"],
        ["sanitize", "MODEL", "FOLDER"],
        ["sanitize", "MODEL", "FOLDER/missing/out.onnx"],
        ["sanitize", "missing.onnx", "FOLDER/out.onnx"],
        *(["sanitize", "MODEL", "OUT", "--max-share", share] for share in ["x", "-1", "2", "101%", "nan"]),
        *(
            ["sanitize", "MODEL", "OUT", "--input-shape", s]
            for s in ["x", "x=", "=1,2", "x=0,3", "x=a", "x=1,,2", "x=-1", "x=²"]
        ),
        ["sanitize", "MODEL", "OUT", "--input-shape", "nothing=1,4,8,8"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_done_as_asked_is_two_and_a_line(arguments: list[str], tmp_path: Path, capsys: Capture) -> None:
    model = saved("folded", tmp_path)
    names = {"MODEL": model, "OUT": str(tmp_path / "out.onnx")}
    given = [names.get(part, part.replace("FOLDER", str(tmp_path))) for part in arguments]
    assert run(given) == ERROR
    out, err = capsys.readouterr()
    assert out == ""
    assert err.strip()
    assert "Traceback" not in err
    assert "fault of onnx-clp" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx"]


def test_an_error_is_worse_than_a_finding(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.onnx")
    assert run(["scan", saved("folded", tmp_path), missing, "--fail-on", "1"]) == ERROR
    assert run(["scan", missing, saved("few_channels", tmp_path, "few"), "--strict"]) == ERROR


def test_a_rewrite_that_fails_its_verification_is_four(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loud(*_: object) -> int:
        raise VerificationError("channel 5 is not silent", "tell somebody")

    monkeypatch.setattr(runtime, "examine", loud)
    source = saved("folded", tmp_path)
    assert run(["sanitize", source, str(tmp_path / "out.onnx")]) == UNVERIFIED
    out, err = capsys.readouterr()
    assert out == ""
    assert "channel 5 is not silent" in err
    assert "tell somebody" in err
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_bug_is_one_line_that_asks_for_a_report(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(runtime, "examine", broken)
    assert run(["sanitize", saved("folded", tmp_path), str(tmp_path / "out.onnx")]) == ERROR
    err = capsys.readouterr().err
    assert "a bug" in err
    assert "--debug" in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


# ---- files that are no models

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 12345\n"

NO_MODELS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "lfs": (LFS, "LFS"),
    "apple": (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        ", "AppleDouble"),
    "text": (b"This is not a model at all, it is a note to self.\n", "not a"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
    "json": (b'{"a": 1}', "JSON"),
    "zip": (b"PK\x03\x04\x14\x00\x00\x00\x08\x00archive/data.pkl", "zip"),
    "pickle": (b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01.", "pickle"),
    "pickle5": (
        b"\x80\x05\x95\x1e\x00\x00\x00\x00\x00\x00\x00\x8c\x0bcollections\x94\x8c\x0bOrderedDict\x94\x93\x94)R\x94.",
        "not a",
    ),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
    "gzip": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00", "gzip"),
    "zeros": (bytes(1000), "byte 0"),
    "ones": (b"\xff" * 1000, "byte 0"),
}


def complaint(capsys: Capture, path: str) -> str:
    """What the command says on stderr: one line that names the file, and perhaps a line of advice."""
    out, err = capsys.readouterr()
    assert out == ""
    first, *advice = err.splitlines()
    assert first.startswith("onnx-clp: ")
    assert path in first
    assert len(advice) <= 1
    assert all(line.startswith("  ") for line in advice)
    assert "Traceback" not in err
    assert "fault of onnx-clp" not in err
    return str(err)


@pytest.mark.parametrize("kind", NO_MODELS)
def test_a_file_that_is_no_model_gives_a_clear_line(kind: str, tmp_path: Path, capsys: Capture) -> None:
    content, word = NO_MODELS[kind]
    path = tmp_path / f"{kind}.onnx"
    path.write_bytes(content)
    assert run(["scan", str(path)]) == ERROR
    assert word in complaint(capsys, str(path))
    assert run(["sanitize", str(path), str(tmp_path / "out.onnx")]) == ERROR
    assert word in complaint(capsys, str(path))
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_model_gives_a_clear_line(share: float, tmp_path: Path, capsys: Capture) -> None:
    path = Path(saved("folded", tmp_path))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert run(["scan", str(path)]) == ERROR
    assert "truncated" in complaint(capsys, str(path))


def test_a_missing_file_a_fifo_and_an_unreadable_one(tmp_path: Path, capsys: Capture) -> None:
    fifo = tmp_path / "fifo.onnx"
    os.mkfifo(fifo)
    loop = tmp_path / "loop.onnx"
    loop.symlink_to(loop)
    for path in (tmp_path / "missing.onnx", fifo, loop, tmp_path / ("x" * 300 + ".onnx")):
        assert run(["scan", str(path)]) == ERROR
        complaint(capsys, str(path))


def test_one_bad_file_does_not_stop_the_others(tmp_path: Path, capsys: Capture) -> None:
    good, bad, last = saved("folded", tmp_path, "a"), tmp_path / "b.onnx", saved("conv_bn_2d", tmp_path, "c")
    bad.write_bytes(LFS)
    assert run(["scan", good, str(bad), last]) == ERROR
    out, err = capsys.readouterr()
    assert out.index(good) < out.index(last)
    assert out.count("1 of 1 layer judged") == 2
    assert str(bad) in err
    assert "LFS" in err

    assert run(["scan", "--format", "json", good, str(bad), last]) == ERROR
    files = json.loads(capsys.readouterr().out)["files"]
    assert [sorted(entry) for entry in files] == [["path", "report"], ["error", "path"], ["path", "report"]]
    assert files[1]["error"]["kind"] == "ModelFileError"


def test_quiet_still_says_what_went_wrong(tmp_path: Path, capsys: Capture) -> None:
    missing = str(tmp_path / "missing.onnx")
    assert run(["scan", "-q", missing]) == ERROR
    out, err = capsys.readouterr()
    assert out == ""
    assert missing in err


@pytest.mark.parametrize("arguments", [["scan", "MISSING"], ["sanitize", "MISSING", "out.onnx"]])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(arguments: list[str], tmp_path: Path) -> None:
    given = [str(tmp_path / "missing.onnx") if part == "MISSING" else part for part in arguments]
    found = command(*given, "--debug")
    assert "Traceback" in found.stderr
    assert "ModelFileError" in found.stderr
    assert found.returncode == ERROR
    assert "Traceback" not in command(*given).stderr


# ---- folders


def test_a_folder_stands_for_the_models_below_it(tmp_path: Path, capsys: Capture) -> None:
    deep = tmp_path / "a" / "b"
    triton = tmp_path / "net" / "1" / "model.onnx"
    deep.mkdir(parents=True)
    triton.mkdir(parents=True)
    found = [saved("folded", tmp_path, "z"), saved("folded", deep, "y"), saved("external_one_file", triton, "model")]
    (tmp_path / "notes.txt").write_text("no model")
    assert run(["scan", str(tmp_path), "--format", "json"]) == FINE
    files = json.loads(capsys.readouterr().out)["files"]
    assert sorted(entry["path"] for entry in files) == sorted(found)
    assert all("report" in entry for entry in files)

    assert run(["scan", str(triton)]) == FINE
    assert found[2] in capsys.readouterr().out


def test_a_folder_without_models_is_an_error(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "empty").mkdir()
    assert run(["scan", str(tmp_path / "empty"), saved("folded", tmp_path)]) == ERROR
    out, err = capsys.readouterr()
    assert "holds no .onnx file" in out + err
    assert "1 of 1 layer judged" in out


# ---- where things are written


def test_the_report_goes_to_a_file(tmp_path: Path, capsys: Capture) -> None:
    model, target = saved("folded", tmp_path), tmp_path / "report.txt"
    assert run(["scan", model]) == FINE
    shown = capsys.readouterr().out
    assert run(["scan", model, "-o", str(target)]) == FINE
    assert capsys.readouterr() == ("", "")
    assert target.read_text(encoding="utf-8") == shown

    assert run(["sanitize", model, str(tmp_path / "out.onnx"), "--format", "json", "-o", str(target)]) == FINE
    assert capsys.readouterr() == ("", "")
    assert json.loads(target.read_text(encoding="utf-8"))["kind"] == "sanitize"


def test_a_report_that_cannot_be_written_is_an_error(tmp_path: Path, capsys: Capture) -> None:
    assert run(["scan", saved("folded", tmp_path), "-o", str(tmp_path / "missing" / "report.txt")]) == ERROR
    assert "cannot write" in capsys.readouterr().err
    assert run(["scan", saved("folded", tmp_path), "-o", str(tmp_path)]) == ERROR


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "arguments",
    [
        ["scan", "in.onnx", "-o", "in.onnx"],
        ["scan", "in.onnx", "-o", "./link.onnx"],
        ["scan", "in.onnx", "-o", "model.onnx.data"],
        ["scan", "missing.onnx", "in.onnx", "-o", "model.onnx.data"],
        ["scan", "missing.onnx", "-o", "missing.onnx"],
        ["sanitize", "in.onnx", "out.onnx", "-o", "in.onnx"],
        ["sanitize", "in.onnx", "out.onnx", "-o", "out.onnx"],
        ["sanitize", "in.onnx", "there.onnx", "--force", "-o", "there.onnx"],
        ["sanitize", "in.onnx", "--dry-run", "-o", "model.onnx.data"],
        ["sanitize", "in.onnx", "there.onnx", "--dry-run", "-o", "there.onnx"],
        ["sanitize", "in.onnx", "--in-place", "-o", "in.onnx"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("form", ["text", "json"])
def test_a_report_never_takes_the_place_of_a_model_or_its_data(
    arguments: list[str], form: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved("external_one_file", tmp_path, "in")
    saved("folded", tmp_path, "there")
    (tmp_path / "link.onnx").symlink_to("in.onnx")
    before = snapshot(tmp_path)
    assert run([*arguments, "--format", form]) == ERROR
    assert snapshot(tmp_path) == before
    out, err = capsys.readouterr()
    assert out == ""
    assert "would overwrite" in err


@pytest.mark.parametrize("data", ["model.onnx.data", "out.model.onnx.data"])
def test_a_report_does_not_take_the_place_of_data_read_or_just_written(
    data: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = saved("external_one_file", tmp_path, "in")
    before = snapshot(tmp_path)
    assert run(["sanitize", model, "out.onnx", "-o", data]) == ERROR
    assert "would overwrite" in capsys.readouterr().err
    assert {name: snapshot(tmp_path)[name] for name in before} == before
    if (tmp_path / "out.onnx").exists():  # the rewrite was done: it is whole
        (layer,) = onnx_clp.scan("out.onnx").layers
        assert layer.dead == (5,)


def test_a_bug_in_one_file_does_not_hide_the_others(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad, last = (saved("folded", tmp_path, name) for name in "abc")
    analyse = onnx_clp.analysis.analyse

    def broken(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401  # passed on as they are
        if options["name"] == bad:
            raise RuntimeError("a bug")
        return analyse(*arguments, **options)

    monkeypatch.setattr("onnx_clp.analysis.analyse", broken)
    assert run(["scan", good, bad, last, "--fail-on", "1"]) == ERROR
    out, err = capsys.readouterr()
    assert out.count("1 of 1 layer judged") == 2
    assert len(lines_of(err)) == 1
    assert bad in err
    assert "RuntimeError: a bug" in err
    assert "Traceback" not in err

    assert run(["scan", good, bad, last, "--format", "json"]) == ERROR
    files = json.loads(capsys.readouterr().out)["files"]
    assert ["report" in entry for entry in files] == [True, False, True]
    assert run(["scan", bad, "--debug"]) == ERROR
    assert "in broken" in capsys.readouterr().err


def test_a_file_whose_graph_is_broken_does_not_stop_the_others(tmp_path: Path, capsys: Capture) -> None:
    """A Slice with a step of 0, a kernel of half a channel, a Conv without a weight: each loses its own layer."""
    good, last = saved("folded", tmp_path, "a"), saved("folded", tmp_path, "z")
    broken = []
    for name in ("step", "groups", "inputs"):
        model = onnx.ModelProto()
        model.CopyFrom(build("folded").model)
        (conv,) = (node for node in model.graph.node if node.op_type == "Conv")
        if name == "step":
            model.graph.initializer.append(onnx.helper.make_tensor("zero", onnx.TensorProto.INT64, [1], [0]))
            model.graph.node.append(onnx.helper.make_node("Slice", [conv.output[0], *["zero"] * 4], ["cut"]))
            model.graph.output.append(onnx.helper.make_tensor_value_info("cut", 1, None))
        elif name == "groups":
            del conv.attribute[:]
            conv.attribute.append(onnx.helper.make_attribute("group", 0))
            conv.op_type = "ConvTranspose"
        else:
            del conv.input[1:]
        broken.append(tmp_path / f"{name}.onnx")
        broken[-1].write_bytes(model.SerializeToString())
    code = run(["scan", good, *map(str, broken), last])
    out, err = capsys.readouterr()
    assert code in {FINE, ERROR, NOT_ANALYSED}
    assert "Traceback" not in err
    assert "fault of onnx-clp" not in err
    assert out.count("1 of 1 layer judged") >= 2
    assert good in out
    assert last in out


def test_a_path_that_is_too_long_does_not_stop_the_others(tmp_path: Path, capsys: Capture) -> None:
    long = str(tmp_path / ("x" * 5000))
    assert run(["scan", long, saved("folded", tmp_path)]) == ERROR
    out, err = capsys.readouterr()
    assert "1 of 1 layer judged" in out
    assert "Traceback" not in err
    assert "fault of onnx-clp" not in err
    for arguments in (
        ["sanitize", long, str(tmp_path / "out.onnx")],
        ["sanitize", saved("folded", tmp_path), long],
        ["scan", saved("folded", tmp_path), "-o", long],
    ):
        assert run(arguments) == ERROR
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        assert "fault of onnx-clp" not in err


@pytest.mark.parametrize("arguments", [["scan"], ["scan", "--format", "json"], ["sanitize", "--dry-run"]])
def test_without_a_stdout_the_exit_code_still_tells(arguments: list[str], tmp_path: Path) -> None:
    """As a service starts a program: file descriptor 1 is closed."""
    call = [sys.executable, "-m", "onnx_clp", *arguments, saved("folded", tmp_path)]
    found = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *call],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert "Traceback" not in found.stderr
    assert "fault of onnx-clp" not in found.stderr
    assert found.returncode == FINE


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [["scan"], ["scan", "--format", "json"], ["sanitize", "--dry-run"]])
def test_a_full_disk_is_a_line_and_two(arguments: list[str], tmp_path: Path) -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        found = subprocess.run(
            [sys.executable, "-m", "onnx_clp", *arguments, saved("folded", tmp_path)],
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert found.returncode == ERROR
    assert len(lines_of(found.stderr)) == 1
    assert found.stderr.startswith("onnx-clp: cannot write the report to stdout: No space left")


def test_quiet_prints_no_report(tmp_path: Path, capsys: Capture) -> None:
    model = saved("folded", tmp_path)
    assert run(["scan", "-q", model, "--fail-on", "1"]) == FLAGGED
    assert run(["sanitize", "-q", model, str(tmp_path / "out.onnx")]) == FINE
    assert capsys.readouterr() == ("", "")


def test_verbose_names_every_layer_and_every_skipped_part(tmp_path: Path, capsys: Capture) -> None:
    net = Net()
    x = net.feed(1, 3, 8, 8)
    for i in range(6):
        x = net.op(
            "Relu",
            net.conv(x, net.kernel(16, 3 if i == 0 else 16, 3, 3, outlier=None), name=f"layer_{i}"),
            name=f"r_{i}",
        )
    for i in range(6):
        net.give(net.conv(x, net.kernel(16, 16, 1, 1), name=f"head_{i}"))
    path = str(save(net.case("wide"), tmp_path))
    names = [f"{kind}_{i}" for kind in ("layer", "head") for i in range(6)]
    run(["scan", path])
    brief = capsys.readouterr().out
    assert not all(name in brief for name in names)
    run(["scan", "-v", path])
    full = capsys.readouterr().out
    assert all(name in full for name in names)


def test_sanitize_on_the_command_line(tmp_path: Path, capsys: Capture) -> None:
    model, out = saved("conv_bn_chain", tmp_path), tmp_path / "out.onnx"
    before = Path(model).read_bytes()
    assert run(["sanitize", model, "--dry-run"]) == FINE
    assert re.search(r"silenced\s+would be 3 channels in 3 layers", capsys.readouterr().out)
    assert (
        run(["sanitize", model, str(out), "--max-share", "5%", "--no-metadata", "--input-shape", "x=1,3,8,8"]) == FINE
    )
    text = capsys.readouterr().out
    assert re.search(r"silenced\s+2 channels in 2 layers", text)
    assert re.search(r"left\s+bn_0: channel 3", text)
    assert text.count("passed") == 5
    assert run(["sanitize", model, str(out)]) == ERROR
    assert "--force" in capsys.readouterr().err
    assert run(["sanitize", model, str(out), "--force"]) == FINE
    assert Path(model).read_bytes() == before
    assert run(["sanitize", model, "--in-place", "-q"]) == FINE
    assert Path(model).read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "out.onnx"]


# ---- terminals


def on_a_terminal(*arguments: str, streams: Sequence[str] = ("stdout",), **changes: str) -> str:
    """What the command writes to a terminal."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "onnx_clp", *arguments],
            env=environment(**changes),
            stdin=subprocess.DEVNULL,
            stdout=theirs if "stdout" in streams else subprocess.DEVNULL,
            stderr=theirs if "stderr" in streams else subprocess.DEVNULL,
        )
        os.close(theirs)
        pieces = []
        while True:
            try:
                piece = os.read(ours, 1 << 16)
            except OSError:  # the other side is closed: Linux says EIO
                break
            if not piece:
                break
            pieces.append(piece)
        process.wait()
    finally:
        os.close(ours)
    return b"".join(pieces).decode()


ESCAPE = "\x1b["


def test_colours_are_for_terminals_that_want_them(tmp_path: Path) -> None:
    model = saved("folded", tmp_path)
    assert ESCAPE in on_a_terminal("scan", model)
    assert ESCAPE not in on_a_terminal("scan", model, NO_COLOR="1")
    assert ESCAPE not in on_a_terminal("scan", model, "--format", "json")
    assert ESCAPE not in command("scan", model).stdout
    target = tmp_path / "report.txt"
    on_a_terminal("scan", model, "-o", str(target))
    assert ESCAPE not in target.read_text(encoding="utf-8")


def test_progress_is_shown_on_a_terminal_and_nowhere_else(tmp_path: Path) -> None:
    models = [saved("folded", tmp_path, name) for name in ("a", "b", "c")]
    assert "scanning" in on_a_terminal("scan", *models, streams=["stderr"])
    assert on_a_terminal("scan", *models, "-q", streams=["stderr"]) == ""
    assert command("scan", *models).stderr == ""
    assert "scanning" not in on_a_terminal("scan", *models)


@pytest.mark.parametrize("words", [["scan", "-v"], ["scan", "--format", "json"], ["--help"], ["--version"]])
def test_a_reader_that_has_enough_is_no_error_to_see(tmp_path: Path, words: list[str]) -> None:
    """The pipe has no reader from the start: no traceback, and no code that says something was flagged."""
    reading, writing = os.pipe()
    os.close(reading)
    arguments = [*words, str(saved("densenet", tmp_path))] if words[0] == "scan" else words
    with os.fdopen(writing, "w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "onnx_clp", *arguments],
            env=environment(),
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert process.stderr is not None
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait() == ERROR
    assert err == ""


def test_a_terminal_that_cannot_show_a_name_gets_no_traceback(tmp_path: Path) -> None:
    found = command("scan", "-v", saved("odd_names", tmp_path), PYTHONIOENCODING="ascii")
    assert found.returncode == FINE
    assert "Traceback" not in found.stderr


# ---- hostile names


HOSTILE = {
    "escape": "\x1b]0;owned\x07\x1b[2J\x1b[31m",
    "right to left": "\u202egnp.exe",
    "newline": "conv\n  coverage  all good\r\n",
    "null and delete": "a\x00b\x7f\x9b31m",
    "markup": "</script><b>{{7*7}}%s%n",
    "surrogate escape": "\ufeff\u2028\u2029\u00ad",
}


def is_plain(char: str) -> bool:
    """Whether a terminal shows a character and does nothing else."""
    return char == "\n" or unicodedata.category(char) not in {"Cc", "Cf", "Cs", "Zl", "Zp", "Co", "Cn"}


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("options", [[], ["-v"]])
def test_names_of_the_scanned_file_cannot_speak_to_the_terminal(
    name: str, options: list[str], tmp_path: Path, capsys: Capture
) -> None:
    net = Net()
    weight = net.tensor(net.kernel(16, 3, 3, 3), f"weight{name}")
    x = net.conv(net.feed(1, 3, 8, 8), weight, net.vector(16), name=f"a{name}", pads=[1] * 4)
    x = net.op("Relu", x, name=f"r{name}")
    net.give(net.conv(x, net.kernel(16, 16, 1, 1), net.vector(16), name=f"head{name}"))
    path = str(save(net.case("hostile"), tmp_path))
    assert run(["scan", path, *options]) == FINE
    text = capsys.readouterr().out
    assert run(["sanitize", path, str(tmp_path / "out.onnx"), *options]) == FINE
    text += capsys.readouterr().out
    assert [char for char in text if not is_plain(char)] == []
    assert "all good" not in [line.strip() for line in text.splitlines()]

    run(["scan", path, "--format", "json"])
    shown = capsys.readouterr().out
    assert shown.isascii()
    assert json.loads(shown)["files"][0]["report"]["layers"][0]["name"] == f"a{name}"


@pytest.mark.parametrize("options", [[], ["-v"]])
def test_a_name_of_a_megabyte_is_cut(options: list[str], tmp_path: Path, capsys: Capture) -> None:
    net = Net()
    x = net.conv(net.feed(1, 3, 8, 8), net.kernel(16, 3, 3, 3), net.vector(16), name="n" * (1 << 20))
    net.tail(x, 16)
    path = str(save(net.case("long"), tmp_path))
    assert run(["scan", path, *options]) == FINE
    assert run(["sanitize", path, str(tmp_path / "out.onnx"), *options]) == FINE
    out, err = capsys.readouterr()
    assert max(map(len, (out + err).splitlines())) < 1000


def _save(path: Path) -> None:
    path.write_bytes(build("folded").model.SerializeToString())


@pytest.mark.parametrize("name", ["\x1b[31mred", "two\nlines", "\udcff\udcfe"])
@pytest.mark.parametrize("write", [lambda path: path.write_bytes(b""), _save])
def test_names_of_files_cannot_speak_either(
    name: str, write: Callable[[Path], object], tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / f"{name}.onnx"
    write(path)
    code = run(["scan", str(path)])
    out, err = capsys.readouterr()
    assert code == (ERROR if path.stat().st_size == 0 else FINE)
    assert [char for char in out + err if not is_plain(char)] == []
    run(["sanitize", str(path), str(tmp_path / f"{name}.out.onnx")])
    out, err = capsys.readouterr()
    assert "fault of onnx-clp" not in err
    assert [char for char in out + err if not is_plain(char)] == []


# ---- the command itself


def test_version_is_printed_without_numpy_and_onnx() -> None:
    code = (
        "import sys\n"
        "from onnx_clp.cli import run\n"
        "code = run(['--version'])\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "print(code, sorted(loaded & {'numpy', 'onnx', 'google', 'onnxruntime', 'ml_dtypes', 'torch'}))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == [f"onnx-clp {onnx_clp.__version__}", "0 []"]


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["scan", "--help"], ["sanitize", "--help"]])
def test_help_is_there(arguments: list[str], capsys: Capture) -> None:
    assert run(arguments) == FINE
    out, err = capsys.readouterr()
    assert "Usage: onnx-clp" in out
    assert err == ""


def test_help_says_what_the_exit_codes_mean(capsys: Capture) -> None:
    run(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"{code} " in text.partition("Exit codes:")[2] for code in range(5))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_can_complete_the_command(shell: str) -> None:
    found = command(_ONNX_CLP_COMPLETE=f"{shell}_source")
    assert found.returncode == 0
    assert "_ONNX_CLP_COMPLETE" in found.stdout
    assert "onnx-clp" in found.stdout


def test_completion_names_commands_and_options() -> None:
    def completed(words: str) -> list[str]:
        count = len(words.split()) - (not words.endswith(" "))
        found = command(_ONNX_CLP_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=str(count))
        return [line.partition(",")[2] for line in found.stdout.splitlines()]

    assert completed("onnx-clp s") == ["sanitize", "scan"]
    assert "--fail-on" in completed("onnx-clp scan --f")
    assert completed("onnx-clp scan --format ") == ["text", "json"]


def test_the_package_is_run_as_a_module() -> None:
    command = [sys.executable, "-m", "onnx_clp", "--version"]
    found = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert found.stdout == f"onnx-clp {onnx_clp.__version__}\n"


def test_numbers_are_counted_per_file_for_the_gate(tmp_path: Path) -> None:
    models = [saved("folded", tmp_path, name) for name in ("a", "b")]
    assert run(["scan", *models, "-q", "--fail-on", "1"]) == FLAGGED
    assert run(["scan", *models, "-q", "--fail-on", "2"]) == FINE


def test_too_little_memory_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 8 GiB")

    monkeypatch.setattr("onnx_clp.evaluation.evaluator.evaluate", fail)
    assert run(["evaluate", saved("folded", tmp_path), "--images", str(tmp_path)]) == ERROR
    said = capsys.readouterr().err
    assert "fault of onnx-clp" not in said
    assert "not enough memory: Unable to allocate 8 GiB" in said
    assert said.count("\n") == 1
