"""Names that speak: to a terminal, a table, a spreadsheet, a picture. No report can be changed by the file it is about.

The law: whatever the names in a file are, the text report has the lines and columns that it has with harmless names,
holds nothing that a terminal obeys, and is not wider than names are shown; JSON gives back every name as it is.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import onnx
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import onnx_clp
from onnx_clp import ModelFileError, OnnxClpError, sanitize, scan
from onnx_clp.cli import run
from onnx_clp.evaluation.attack import Attack, Preprocessing, Target
from onnx_clp.evaluation.correlation import Correlation
from onnx_clp.evaluation.images import labelled
from onnx_clp.evaluation.sweep import SweepReport, sweep
from onnx_clp.evaluation.tac import NotMeasured, TacLayer, TacReport, tac
from onnx_clp.evaluation.triggers import Patch
from onnx_clp.report import csv as as_csv
from onnx_clp.report import json as as_json
from onnx_clp.report import plot, sweep_json, sweep_text, tac_json, tac_text, text
from onnx_clp.report.outcome import Outcome
from onnx_clp.report.words import columns, printable, shortened
from onnx_clp.sanitizer import Left, Silenced
from tests.built import build, save
from tests.cases.net import Net

EXAMPLES = Path(onnx_clp.__file__).parents[1] / "examples"

Capture = pytest.CaptureFixture[str]

HARMLESS = "name"

NAMES = {
    "an escape": "\x1b[31m\x1b[2J\x1b[1;1H",
    "a title": "\x1b]0;owned\x07",
    "a link": "\x1b]8;;https://example.org\x1b\\click\x1b]8;;\x1b\\",
    "an 8-bit escape": "\x9b31m\x9d0;owned\x9c",
    "a bell and a backspace": "\x07\x08\x08\x08",
    "lines": "conv\n  coverage  1 of 1 layer judged\r\n\x0b\x0c\x85\u2028\u2029",
    "a carriage return": "conv\rclean",
    "tabs": "a\tb\t\tc",
    "nothing and delete": "a\x00b\x7f",
    "markup": "[bold]x[/bold]</script><b>{{7*7}}%s%n${x}",
    "a comment": "<!-- --> -- --->",
    "formatting": "{0}{name!r}%(name)s",
    "from right to left": "\u202egnp.exe\u2066\u2067\u200f\u061c",
    "Hebrew and Arabic": "\u05d0\u05d1\u05d2 \u0627\u0628 \u0661\u0662\u0663",
    "no width": "a\u200bb\u200cc\u200dd\ufeffe\u00ad",
    "not to be seen": "\u3164\u115f\u2800\u034f\ufe0f\uffa0\U000e0101",
    "a flood of marks": "a" + "\u0301\u0336\u0489" * 50,
    "marks at the start": "\u0301\u0336x",
    "wide characters": "層卷積" * 30,
    "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f1e9\U0001f1ea",
    "letters of their own use": "\ue000\U000f0000\U0010ffff",
    "spaces that look like columns": "a   Conv         16      0.5        0.1      0.9   none",
    "spaces of all kinds": " \u00a0\u2003\u3000\u205f ",
    "a list": "a, b and 5 more",
    "a formula": "=HYPERLINK(1)",
    "mathematics": r"$\frac{a}{b}$ \alpha ^_",
    "quotes": "'\"`\\",
    "a megabyte": "n" * (1 << 20),
    "many escapes": "\x1b" * (1 << 14),
}
"""What a node or a tensor may be called."""

hostile = pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)

pieces = st.sampled_from([part for name in NAMES.values() for part in (name[:40], name[:1], name[-2:])])
names = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | pieces, max_size=6).map("".join)
laws = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))


def hostile_model(name: str) -> onnx.ModelProto:
    """A model of which every kind of line of a report has something to say, and whose names begin with ``name``."""
    net = Net()
    x = net.conv(net.feed(1, 3, 8, 8, name=f"{name}x"), net.kernel(16, 3, 3, 3), net.vector(16), name=f"{name}flagged")
    broken = net.kernel(16, 16, 3, 3)
    broken[9, 1, 2, 0] = np.nan
    broken[3] = 0
    x = net.conv(net.op("Relu", x, name=f"{name}relu"), broken, net.vector(16), name=f"{name}broken")
    shared = net.tensor(net.kernel(16, 16, 1, 1), f"{name}shared")
    x = net.bn(net.conv(net.op("Relu", x, name=f"{name}r1"), shared, name=f"{name}c1"), net.norm(16), name=f"{name}bn1")
    x = net.conv(net.op("Relu", x, name=f"{name}r2"), shared, net.vector(16), name=f"{name}c2")
    few = net.kernel(4, 16, 1, 1, outlier=None)
    x = net.conv(net.op("Relu", x, name=f"{name}r3"), few, net.vector(4), name=f"{name}few")
    given_weight = net.tensor(net.kernel(16, 4, 1, 1), f"{name}overridable")
    x = net.conv(net.op("Relu", x, name=f"{name}r4"), given_weight, net.vector(16), name=f"{name}given")
    net.feed(16, 4, 1, 1, name=f"{name}overridable")
    x = net.conv(net.op("Relu", x, name=f"{name}r5"), f"{name}nowhere", name=f"{name}no_data")
    x = net.op(f"{name}Conv", x, name=f"{name}custom", domain=f"{name}.d")
    net.tail(x, 16, name=f"{name}tail")
    return net.case("hostile").model


def written(name: str, folder: str | Path) -> str:
    path = Path(folder) / "model.onnx"
    path.write_bytes(hostile_model(name).SerializeToString())
    return str(path)


def is_plain(char: str) -> bool:
    """Whether a terminal shows a character, in its place and from left to right, and does nothing else."""
    return (
        char.isprintable()
        and unicodedata.category(char) not in {"Cc", "Cf", "Cs", "Zl", "Zp", "Co", "Cn"}
        and unicodedata.bidirectional(char) not in {"R", "AL", "AN"}
        and char not in "\u3164\u115f\u1160\uffa0\u2800\u034f"
        and not 0xFE00 <= ord(char) < 0xFE10
        and not 0xE0100 <= ord(char) < 0xE01F0
    )


def wide(shown: str) -> int:
    """Columns of a line, by the East Asian width of its characters."""
    marks = sum(unicodedata.category(char) in {"Mn", "Me"} for char in shown)
    return len(shown) - marks + sum(unicodedata.east_asian_width(char) in {"W", "F"} for char in shown)


def shape(report: str) -> list[str]:
    """What is the same in each line of a report whatever the names: the label before it, or the cells beside a name."""
    found: list[str] = []
    table = False
    for line in report.split("\n"):
        if re.match(r" +layer {2,}", line):
            table = True
        cells = re.split(" {2,}", line.strip(" "))
        if not table:
            found.append(re.split(r"[ :]", line[:12].lstrip())[0] if line.startswith("  ") else "")
        elif not line:
            table = False
            found.append("")
        else:
            # The cells but for the name: a row has its first cell at the margin, its further lines have none there.
            rest = cells[1:] if re.match(r"  \S| {3}\S", line) else cells
            found.append(" | ".join(rest))
    return found


def check(report: str, harmless: str, most: int) -> None:
    """The law for a text report, of lines of at most ``most`` columns."""
    assert {char for char in report if char != "\n" and not is_plain(char)} == set()
    assert shape(report) == shape(harmless)
    assert max(map(wide, report.split("\n"))) <= most
    assert not re.search(r"(^|\s)[\u0300-\u036f\u0483-\u0489]", report)
    assert max((len(run) for run in re.findall(r"[\u0300-\u036f\u0483-\u0489]+", report)), default=0) <= 2


WIDEST = {False: 480, True: 980}
"""Columns of a line: a sentence of 300, or three names of 40, and verbose two names of 120 before a sentence; of what
is cut the number of characters is told, and a space of a table may take the columns of its escape."""


def texts(name: str, *, verbose: bool) -> tuple[str, str]:
    """The text of a scan and of a planned rewrite of a model with such names, by a path that does not change."""
    with tempfile.TemporaryDirectory() as folder:
        path = written(name, folder)
        report, planned = scan(path), sanitize(path, path, dry_run=True, max_share=1)
    report, planned = replace(report, path="model.onnx"), replace(planned, source="model.onnx")
    shown = text.render([Outcome("model.onnx", report=report)], verbose=verbose)
    return shown, text.render_sanitize(planned, verbose=verbose)


@pytest.fixture(scope="module")
def harmless() -> dict[bool, tuple[str, str]]:
    """The reports with harmless names; of these the law's shape is taken."""
    return {verbose: texts(HARMLESS, verbose=verbose) for verbose in (False, True)}


def test_the_harmless_model_has_every_kind_of_line(harmless: dict[bool, tuple[str, str]]) -> None:
    labels = {line[:12].strip() for line in "\n".join(harmless[False]).splitlines()}
    assert {"coverage", "outliers", "NaN, Inf", "dead", "inputs", "silenced", "left", "unshared"} <= labels
    for words in ("skipped 1 as no-data", "skipped 1 as custom-operator", "too few channels"):
        assert words in harmless[False][0], words


# ---- text


@hostile
@pytest.mark.parametrize("verbose", [False, True])
def test_no_name_changes_the_text(name: str, harmless: dict[bool, tuple[str, str]], *, verbose: bool) -> None:
    for report, expected in zip(texts(name, verbose=verbose), harmless[verbose], strict=True):
        check(report, expected, WIDEST[verbose])


@laws
@given(names, st.booleans())
@example("\u0301" * 9, True)  # noqa: FBT003
@example(" ", True)  # noqa: FBT003
@example("a  b", False)  # noqa: FBT003
def test_no_drawn_name_changes_the_text(
    harmless: dict[bool, tuple[str, str]],
    name: str,
    verbose: bool,  # noqa: FBT001  # drawn
) -> None:
    for report, expected in zip(texts(name, verbose=verbose), harmless[verbose], strict=True):
        check(report, expected, WIDEST[verbose])


@laws
@given(st.text(max_size=200) | names, st.integers(12, 130))
def test_what_is_shown_of_a_name_is_plain_and_no_wider_than_asked_for(name: str, width: int) -> None:
    """Lone surrogates included, as the names of files may hold them."""
    cut, short = printable(name, width), shortened(name, width)
    assert all(map(is_plain, cut + short))
    tail = f"… ({len(name)} characters)"
    assert wide(cut.removesuffix(tail)) <= width
    assert wide(short) <= width
    assert columns(cut) == wide(cut)
    assert unicodedata.category((cut or "x")[0])[0] != "M"
    if name.isascii() and name.isprintable() and len(name) <= width:
        assert cut == name


def test_a_name_in_any_script_that_is_written_from_left_to_right_is_shown_as_it_is() -> None:
    for name in ("層/卷积:0", "жлж1", "στρώμα", "レイヤー", "परत", "ชั้น", "lớp", "lo\u031b\u0301p", "층", "შრე"):
        assert printable(name) == name


@hostile
def test_colours_are_the_reports_own(name: str, tmp_path: Path) -> None:
    """A terminal gets as many escapes as with harmless names: those that onnx-clp writes itself."""

    def style(words: str, _: str) -> str:
        return f"\x1b[1m{words}\x1b[0m"

    counted = []
    for each in (name, HARMLESS):
        report = scan(written(each, tmp_path))
        counted.append(text.render([Outcome("m", report=report)], style).count("\x1b"))
    assert counted[0] == counted[1] > 0


# ---- JSON


@hostile
def test_json_gives_back_every_name_as_it_is(name: str, tmp_path: Path) -> None:
    """But for those that may stand in very many places: of an operator and of an input, 1,000 characters."""
    path = written(name, tmp_path)
    shown = as_json.render([Outcome(path, report=scan(path))])
    assert shown.isascii()
    assert {char for char in shown if char != "\n" and not char.isprintable()} == set()
    (entry,) = json.loads(shown)["files"]
    layers = [layer["name"] for layer in entry["report"]["layers"]]
    assert layers == [f"{name}{part}" for part in ("flagged", "broken", "bn1", "c2", "few", "given")]
    skipped = {part["name"]: part["operator"] for part in entry["report"]["skipped"]}
    assert skipped[f"{name}custom"] == f"{name}.d.{name}Conv"[:1000]
    overridable = [value for layer in entry["report"]["layers"] for value in layer["overridable"]]
    assert overridable == [f"{name}overridable"[:1000]]


@hostile
def test_the_note_in_the_copy_gives_back_every_name(name: str, tmp_path: Path) -> None:
    net = Net()
    x = net.conv(net.feed(1, 3, 8, 8), net.kernel(16, 3, 3, 3), net.vector(16), name=f"{name}conv")
    net.tail(x, 16)
    out = tmp_path / "out.onnx"
    sanitize(save(net.case("model"), tmp_path), out)
    notes = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    assert json.loads(notes["onnx_clp.silenced"]) == {f"{name}conv": [5]}


def test_a_rewrite_with_names_in_all_its_messages_changes_nothing_but_these(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """onnx.checker and onnxruntime refuse the model and name its parts; what they print themselves counts too."""
    seen: list[str] = []
    for name in (HARMLESS, *(value for key, value in NAMES.items() if "megabyte" not in key)):
        path = written(name, tmp_path)
        assert run(["sanitize", path, str(tmp_path / "out.onnx"), "--force", "--max-share", "100%"]) == 0
        out, err = capfd.readouterr()
        assert err == ""
        check(out, seen[0] if seen else out, WIDEST[False])
        seen.append(out)


ODD_MODES = {"not UTF-8": b"\xff\xfe\x1b[31m", "an escape": b"\x1b[31m\nEP Error", "long": b"m" * 100_000}


@pytest.mark.parametrize("mode", ODD_MODES.values(), ids=ODD_MODES)
def test_what_onnxruntime_says_of_a_file_stays_within_the_report(
    mode: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its Python wrapper prints of an error it does not know, here one that cannot be decoded, on stdout."""
    net = Net()
    x = net.conv(net.feed(1, 3, 8, 8), net.kernel(16, 3, 3, 3), net.vector(16))
    scales = net.tensor(np.array([1, 1, 2, 2], np.float32), "scales")
    net.tail(net.op("Resize", x, "", scales, name="resize", coordinate_transformation_mode=mode), 16)
    path = str(save(net.case("model"), tmp_path))
    assert run(["sanitize", path, str(tmp_path / "out.onnx"), "--format", "json"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    checks = {check["name"]: check["passed"] for check in json.loads(out)["checks"]}
    assert checks["onnxruntime-load"] is None


# ---- invalid UTF-8, surrogates

NOT_TEXT = {
    "never a byte": b"\xff\xfe",
    "a surrogate as three bytes": b"\xed\xa0\x80",
    "a pair of surrogates (CESU-8)": b"\xed\xa0\xbd\xed\xb8\x80",
    "a zero of two bytes": b"\xc0\x80",
    "cut short": b"\xe5\xb1",
    "beyond Unicode": b"\xf4\x90\x80\x80",
    "an 8-bit escape": b"\x9b31m",
}
MARK = "\x01\x02\x03\x04\x05\x06"


def strings(message: Message, path: str = "") -> Iterator[tuple[str, Callable[[str], None], str]]:
    """Every string of a message: the fields that lead to it, what sets it, and what it is."""
    for field, value in message.ListFields():
        for index, part in enumerate(value if field.is_repeated else [value]):
            if field.type == FieldDescriptor.TYPE_STRING:
                yield f"{path}/{field.name}", _setter(message, field, index), part
            elif field.message_type is not None:
                yield from strings(part, f"{path}/{field.name}")


def _setter(message: Message, field: FieldDescriptor, index: int) -> Callable[[str], None]:
    def put(value: str) -> None:
        if field.is_repeated:
            getattr(message, field.name)[index] = value
        else:
            setattr(message, field.name, value)

    return put


@pytest.mark.parametrize("bad", NOT_TEXT.values(), ids=NOT_TEXT)
def test_a_name_that_is_not_utf8_is_refused_and_cannot_speak(bad: bytes, tmp_path: Path, capsys: Capture) -> None:
    """Protobuf and onnxruntime read such files; which name means which value this tool cannot tell, and says so."""
    path = tmp_path / "model.onnx"
    path.write_bytes(hostile_model(MARK).SerializeToString().replace(MARK.encode(), bad.ljust(len(MARK), b"a")))
    with pytest.raises(ModelFileError, match="not UTF-8"):
        scan(path)
    assert run(["scan", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert all(map(is_plain, err.rstrip("\n")))


STRINGS = ("function_nested", "function_attribute", "if_constant_nodes", "sparse", "sparse_constant_node", "loop")


@pytest.mark.parametrize("case", STRINGS)
def test_any_string_that_is_not_utf8_gives_a_report_or_an_error_of_ours(case: str, tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(build(case).model)
    model.doc_string, model.producer_name, model.graph.doc_string = "a", "b", "c"
    model.metadata_props.add(key="a", value="b")
    model.graph.metadata_props.add(key="a", value="b")
    path, out = save(build(case), tmp_path), tmp_path / "out.onnx"
    outcomes: dict[str, bool] = {}
    for where, put, old in list(strings(model)):
        if where not in outcomes:
            put(MARK)
            path.write_bytes(model.SerializeToString().replace(MARK.encode(), b"\xff\xfe\x80abc"))
            put(old)
            try:
                outcomes[where] = sanitize(path, out, force=True).written
            except OnnxClpError as error:
                outcomes[where] = False
                assert "\n" not in str(error)  # noqa: PT017  # that it raises is not what is shown
    # What nobody resolves names by need not be text.
    for where in ("/doc_string", "/producer_name", "/graph/doc_string", "/metadata_props/key", "/metadata_props/value"):
        assert outcomes[where], where
    for where in ("/graph/node/op_type", "/graph/node/input", "/graph/node/output", "/graph/node/name"):
        assert not outcomes[where], where


# ---- names of files and folders

PATHS = {
    "an escape": "\x1b[31mred",
    "lines": "two\nlines\r\x85",
    "a title": "\x1b]0;owned\x07",
    "from right to left": "\u202egnp",
    "not UTF-8": os.fsdecode(b"\xff\xfe\x9b31m"),
    "markup": "[bold]<b>&amp;",
    "marks": "\u0301\u0301\u0301\u0301",
    "quotes and formulas": "='\"$x$",
}
in_paths = pytest.mark.parametrize("name", PATHS.values(), ids=PATHS)


@in_paths
@pytest.mark.parametrize("options", [[], ["-v"]])
def test_names_of_folders_and_files_cannot_speak(
    name: str, options: list[str], tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / f"{name}.onnx").write_bytes(build("folded").model.SerializeToString())
    (folder / f"{name}2.onnx").write_bytes(b"")
    out_path = folder / f"{name}.out.onnx"
    for arguments, code in (
        (["scan", str(folder), *options], 2),
        (["sanitize", str(folder / f"{name}.onnx"), str(out_path), *options], 0),
        (["sanitize", str(folder / f"{name}.onnx"), str(out_path), *options], 2),
        (["scan", str(folder / "missing.onnx"), *options], 2),
        (["evaluate", str(folder / f"{name}.onnx"), "--images", str(folder / "missing"), *options], 2),
    ):
        assert run(arguments) == code
        out, err = capsys.readouterr()
        assert {char for char in out + err if char != "\n" and not is_plain(char)} == set()
        assert len(err.splitlines()) == (code == 2)
        assert out.count("coverage") <= 1
        assert "fault of onnx-clp" not in err


@in_paths
def test_json_gives_back_every_path(name: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / f"{name}.onnx"
    path.write_bytes(build("folded").model.SerializeToString())
    assert run(["scan", str(path), "--format", "json"]) == 0
    out = capsys.readouterr().out
    assert out.isascii()
    assert json.loads(out)["files"][0]["path"] == str(path)
    report = tmp_path / f"{name}.json"
    assert run(["scan", str(path), "--format", "json", "-o", str(report)]) == 0
    assert json.loads(report.read_text("utf-8"))["files"][0]["path"] == str(path)


@in_paths
def test_a_text_report_of_any_path_can_be_written_to_a_file(name: str, tmp_path: Path) -> None:
    path, report = tmp_path / f"{name}.onnx", tmp_path / "report.txt"
    path.write_bytes(build("folded").model.SerializeToString())
    assert run(["scan", str(path), "-o", str(report)]) == 0
    assert all(is_plain(char) for char in report.read_text("utf-8").replace("\n", ""))


@in_paths
def test_a_traceback_for_debugging_cannot_speak(name: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / f"{name}.onnx"
    path.write_bytes(b"")
    for arguments in (["scan", str(path), "--debug"], ["sanitize", str(path), str(tmp_path / "o"), "--debug"]):
        assert run(arguments) == 2
        err = capsys.readouterr().err
        assert "Traceback" in err
        assert {char for char in err if char != "\n" and not is_plain(char)} == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ["scan", "--\x1b[31mred.onnx"],
        ["scan", "-\x1b[31mred.onnx"],
        ["sanitize", "a.onnx", "b.onnx", "\x1b[31mred\n\nError: none"],
        ["\x1b[31mred"],
        ["scan", "a.onnx", "--format", "\x1b[31mred\u202e"],
        ["scan", "a.onnx", "--allow-root", "\x1b[31mred\n"],
    ],
)
def test_a_name_that_a_shell_takes_for_an_argument_cannot_speak(arguments: list[str], capsys: Capture) -> None:
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert {char for char in err if char != "\n" and not is_plain(char)} == set()
    # How to use it, where to read more, nothing, and the error.
    assert len(err.splitlines()) == 4


def test_progress_says_no_name(tmp_path: Path) -> None:
    """On a terminal: the bar's own escapes are the same whatever the files are called."""
    pty = pytest.importorskip("pty")
    seen = []
    for name in ("aaaaaaaaaaaaa", "\x1b]0;owned\x07"):
        folder = tmp_path / name
        folder.mkdir()
        for number in "12":
            (folder / f"{name}{number}.onnx").write_bytes(build("folded").model.SerializeToString())
        ours, theirs = pty.openpty()
        with subprocess.Popen(
            [sys.executable, "-m", "onnx_clp", "scan", str(folder)], stdout=subprocess.DEVNULL, stderr=theirs
        ) as process:
            os.close(theirs)
            shown = b""
            while True:
                try:
                    part = os.read(ours, 1 << 16)
                except OSError:  # how Linux says that the other end is closed
                    break
                if not part:
                    break
                shown += part
        os.close(ours)
        assert process.returncode == 0
        seen.append(shown)
    assert b"scanning" in seen[1]
    assert b"owned" not in seen[1]
    assert seen[0].count(b"\x1b") == seen[1].count(b"\x1b")


# ---- trigger-activated changes, sweeps, tables, pictures

GREY = Preprocessing((28, 28), 1, "NCHW", (0.0, 1.0), (0.0,), (1.0,))
CHECKS = Patch(np.array([[255, 0, 255], [0, 255, 0], [255, 0, 255]], np.uint8)[..., None])
ATTACK = Attack("badnets", CHECKS, Target(0), GREY, tuple("0123456789"))


@pytest.fixture(scope="module")
def changes() -> TacReport:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (10, 28, 28, 1), dtype=np.uint8)
    images = labelled(pixels, generator.integers(0, 10, 10), tuple("0123456789"))
    return tac(EXAMPLES / "backdoored.onnx", images, ATTACK)


@pytest.fixture(scope="module")
def swept() -> SweepReport:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (10, 28, 28, 1), dtype=np.uint8)
    images = labelled(pixels, generator.integers(0, 10, 10), tuple("0123456789"))
    return sweep(EXAMPLES / "backdoored.onnx", images, ATTACK, u=[3.0, 5.0])


def changes_of(name: str, report: TacReport) -> TacReport:
    found = Correlation(4, 0.5, -0.5)
    layer = TacLayer(name, "Conv", name, (1, 2, 3, 9), (1, 2, 4, 9), (0, 1, 2, 3), (3,), 2.5, found)
    attack = replace(report.attack, name=name, trigger=name)
    images = replace(report.images, path=name, kind=name, used=name, classes=(name,) * 10)
    unmeasured = (NotMeasured(name, name), NotMeasured(f"{name}2", name))
    return replace(
        report,
        path=name,
        layers=(layer, layer),
        not_measured=unmeasured,
        attack=attack,
        images=images,
        providers=(name,),
    )


def sweep_of(name: str, report: SweepReport) -> SweepReport:
    rows = tuple(
        replace(row, silenced=(Silenced(name, (1,)),), left=(Left(name, (2,), name),), measured=True)
        for row in report.rows
    )
    was = report.evaluation
    evaluation = replace(
        was,
        model=replace(was.model, path=name),
        images=replace(was.images, path=name, kind=name, used=name, classes=(name,) * 10),
        attack=None if was.attack is None else replace(was.attack, name=name, trigger=name),
        notes=(name,),
    )
    return replace(report, evaluation=evaluation, rows=rows)


@hostile
@pytest.mark.parametrize("verbose", [False, True])
def test_no_name_changes_the_text_of_measurements(
    name: str, changes: TacReport, swept: SweepReport, *, verbose: bool
) -> None:
    for report, expected in (
        (tac_text.render_tac(changes_of(each, changes), verbose=verbose) for each in (name, HARMLESS)),
        (sweep_text.render_sweep(sweep_of(each, swept), verbose=verbose) for each in (name, HARMLESS)),
    ):
        # The path of a model, on a line of its own, may be longer than other names.
        head, rest = report.split("\n", 1)
        assert all(map(is_plain, head))
        check(rest, expected.split("\n", 1)[1], WIDEST[True])


@hostile
def test_json_of_measurements_gives_back_every_name(name: str, changes: TacReport, swept: SweepReport) -> None:
    document = json.loads(tac_json.render_tac(changes_of(name, changes)))
    assert document["path"] == document["attack"]["name"] == document["layers"][0]["name"] == name
    document = json.loads(sweep_json.render_sweep(sweep_of(name, swept)))
    assert document["model"]["path"] == document["rows"][0]["silenced"][0]["layer"] == name


def as_a_spreadsheet(table: str, parting: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(table), delimiter=parting))


FORMULAS = ("=1+1", "+1", "-1", "@x", "\t=1", "\r=1", " =1", "\uff1d1", "\uff0b1", "\uff0d1", "\uff201")
CELLS = ('a;=1+1;"', 'a,=1+1,"', '";=1', '"', '",=1+1', "a|=1", "a\n=1+1", "a\r\n=1+1", "a\t=1")


@pytest.mark.parametrize("name", [*FORMULAS, *CELLS, *(value for key, value in NAMES.items() if "mega" not in key)])
@pytest.mark.parametrize("parting", [",", ";", "\t", "|"], ids=["comma", "semicolon", "tab", "bar"])
def test_no_name_is_a_formula_or_a_second_cell_of_a_table(name: str, parting: str, changes: TacReport) -> None:
    """Where a comma is the decimal point, spreadsheets part cells by semicolons; the rows stay rows in any case."""
    report = changes_of(name, changes)
    rows = as_a_spreadsheet(as_csv.render_tac(report), parting)
    expected = as_a_spreadsheet(as_csv.render_tac(changes_of(HARMLESS, changes)), parting)
    assert [len(row) for row in rows] == [len(row) for row in expected]
    for row in rows[1:]:
        assert not re.match(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]", row[0]), row[0]
        assert all(map(is_plain, "".join(row)))
    if parting == ",":
        assert [row[1:] for row in rows] == [row[1:] for row in expected]


DRAWN = ("mathematics", "a comment", "markup", "an escape", "a flood of marks", "Hebrew and Arabic", "a megabyte")


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((NAMES[key], "svg") for key in DRAWN),
        *((NAMES["mathematics"], form) for form in plot.FORMATS),
        ("\u0995", "png"),
    ],
)
def test_no_name_is_mathematics_or_markup_of_a_picture(
    name: str, form: str, changes: TacReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib import mathtext

    def refuse(*_: Any, **__: Any) -> None:  # noqa: ANN401  # whatever matplotlib passes
        pytest.fail("a name is set as mathematics")

    monkeypatch.setattr(mathtext.MathTextParser, "parse", refuse)
    report = changes_of(name, changes)
    report = replace(report, layers=report.layers[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = plot.draw_tac(report, form)
    if form == "svg":
        # Parsed as XML: the same elements, but for those that draw the glyphs of the name.
        kinds = {element.tag.rpartition("}")[2] for element in ET.fromstring(picture).iter()}  # noqa: S314  # our own
        assert kinds <= {"svg", "g", "path", "defs", "use", "clipPath", "rect", "style", "metadata", *METADATA}
        assert b"\x1b" not in picture


METADATA = ("RDF", "Work", "type", "date", "format", "creator", "Agent", "title")


def test_a_name_of_an_attack_or_a_model_is_no_mathematics_in_a_picture_of_a_sweep(swept: SweepReport) -> None:
    for name in (r"$\frac{$", "$x$", "<!-- -->", "\x1b[31m"):
        assert plot.draw_sweep(sweep_of(name, swept), "svg").startswith(b"<?xml")
