"""Sweeps over u: each row against a sanitized copy of its own, grids against exact decimals, what users see."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from dataclasses import replace
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import onnx_clp
from onnx_clp.cli import run
from onnx_clp.errors import UsageError
from onnx_clp.evaluation import sweep as module
from onnx_clp.evaluation.attack import Attack, Preprocessing, Target, write_attack
from onnx_clp.evaluation.figures import Figures, Share
from onnx_clp.evaluation.images import LabelledImages, labelled
from onnx_clp.evaluation.sweep import MOST_ROWS, SweepReport, grid, sweep
from onnx_clp.evaluation.triggers import Patch
from onnx_clp.report import plot
from onnx_clp.report.csv import render_sweep as as_csv
from onnx_clp.report.sweep_json import render_sweep as as_json
from onnx_clp.report.sweep_text import render_sweep as as_text
from onnx_clp.sanitizer import Left, sanitize

pytestmark = pytest.mark.usefixtures("in_this_process")

EXAMPLE = Path(onnx_clp.__file__).parents[1] / "examples" / "backdoored_bn.onnx"
CHECKS = Patch(np.array([[255, 0, 255], [0, 255, 0], [255, 0, 255]], np.uint8)[..., None])
ATTACK = Attack(
    "badnets", CHECKS, Target(0), Preprocessing((28, 28), 1, "NCHW", (0, 1), (0,), (1,)), tuple("0123456789")
)
WHOLE = "0.5:4.5:0.5"

Capture = pytest.CaptureFixture[str]


def some_images(count: int = 40) -> LabelledImages:
    """Noise of few brightnesses, which the example takes for clothes of several kinds."""
    generator = np.random.default_rng(2)
    pixels = generator.integers(0, 256, (count, 28, 28, 1)) * generator.integers(0, 2, (count, 1, 28, 1))
    return labelled(pixels.astype(np.uint8), generator.integers(0, 10, count), tuple("0123456789"))


IMAGES = some_images()


# ---- grids


@given(st.integers(0, 1000), st.integers(1, 300), st.integers(0, MOST_ROWS - 1), st.integers(0, 4))
def test_a_grid_is_that_of_exact_decimals(start: int, step: int, rows: int, places: int) -> None:
    first, width = (Decimal(number).scaleb(-places) for number in (start, step))
    last = first + rows * width
    found = grid(f"{first}:{last}:{width}")
    assert found == tuple(float(first + row * width) for row in range(rows + 1))
    assert found[-1] == float(last)
    # A stop between two steps adds no row.
    if rows < MOST_ROWS - 1:
        assert grid(f"{first}:{last + width / 2}:{width}") == found


def test_grids_that_binary_fractions_would_get_wrong() -> None:
    assert grid("2:6:0.25") == tuple(2 + row / 4 for row in range(17))
    assert grid("0:1:0.1") == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    assert grid(" 3 : 3 : 1 ") == (3.0,)
    assert grid("1e1:2e1:5") == (10.0, 15.0, 20.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3",
        "2:6",
        "2:6:1:1",
        "a:b:c",
        "2::1",
        "6:2:1",
        "2:6:0",
        "2:6:-1",
        "-1:2:1",
        "2:inf:1",
        "nan:6:1",
        "2:6:nan",
        "0:200:1",
        "2:6:1e-300",
        "0:1e999999999:1",
        "0:1:1e-999999999",
        f"0:{'9' * 100}:1",
        "0:1:0.\x1b[31m",
    ],
)
def test_what_is_no_grid_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        grid(text)


def test_the_longest_grid_has_its_rows() -> None:
    assert len(grid(f"0:{MOST_ROWS - 1}:1")) == MOST_ROWS


def test_values_are_sorted_and_checked() -> None:
    assert module.check_grid([3, 2.5, 3.0]) == (2.5, 3.0)
    for values in ([], [-1.0], [float("nan")], [float("inf")], list(range(MOST_ROWS + 1))):
        with pytest.raises(UsageError):
            module.check_grid([float(value) for value in values])


# ---- rows


@pytest.fixture(scope="module")
def found() -> SweepReport:
    return sweep(EXAMPLE, IMAGES, ATTACK, u=WHOLE)


def same(one: Figures, other: Figures) -> bool:
    """Whether figures are the same but for the speed."""
    return replace(one, images_per_second=1.0) == replace(other, images_per_second=1.0)


def test_each_row_is_a_sanitized_copy_evaluated(found: SweepReport, tmp_path: Path) -> None:
    assert [row.u for row in found.rows] == list(grid(WHOLE))
    plain = onnx_clp.evaluate(EXAMPLE, IMAGES, ATTACK)
    assert same(found.evaluation.model.figures, plain.model.figures)
    for row in found.rows:
        copy = tmp_path / f"{row.u}.onnx"
        written = sanitize(EXAMPLE, copy, row.u, max_share=1.0)
        assert row.silenced == written.silenced
        assert row.left == written.left == ()
        assert same(row.figures, onnx_clp.evaluate(copy, IMAGES, ATTACK).model.figures)
    distinct = {row.figures.acc.count for row in found.rows} | {row.figures.asr for row in found.rows}
    assert len(distinct) > 3, "rows differ, so that a row in the wrong place would be seen"


def test_nothing_is_run_twice(found: SweepReport, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[float] = []

    def spy(source: Path, copy: Path, u: float, **options: Any) -> Any:  # noqa: ANN401  # as sanitize
        written.extend([] if options["dry_run"] else [u])
        return sanitize(source, copy, u, **options)

    monkeypatch.setattr(module, "sanitize", spy)
    seen: list[tuple[int, int]] = []
    again = sweep(EXAMPLE, IMAGES, ATTACK, u=WHOLE, progress=lambda done, total: seen.append((done, total)))
    sets = {row.silenced for row in found.rows if row.silenced}
    assert len(written) == len(sets) < len(found.rows)
    assert written == [row.u for row in found.rows if row.measured]
    assert seen[-1][0] == seen[-1][1] == (len(sets) + 1) * (40 + int(np.count_nonzero(IMAGES.labels != 0)))
    assert [row.u for row in again.rows if not row.silenced], "some u flags nothing"
    for one, other in zip(again.rows, found.rows, strict=True):
        assert (one.u, one.silenced, one.measured) == (other.u, other.silenced, other.measured)
        assert same(one.figures, other.figures)
        if not one.silenced:
            assert one.figures == again.evaluation.model.figures


def test_copies_are_gone_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sweep(EXAMPLE, IMAGES, ATTACK, u=[2.0])
    assert list(tmp_path.iterdir()) == []


def test_a_layer_beyond_the_share_is_left_and_told(tmp_path: Path) -> None:
    report = sweep(EXAMPLE, IMAGES, ATTACK, u=[0.5, 3.0], max_share=0.1)
    low, high = report.rows
    written = sanitize(EXAMPLE, tmp_path / "m.onnx", 0.5, max_share=0.1)
    assert (low.silenced, low.left) == (written.silenced, written.left)
    assert low.left_channels == sum(len(part.channels) for part in written.left) > 0
    assert low.largest_share <= 0.1
    assert (high.left, high.silenced_channels) == ((), 2)
    text = as_text(report)
    assert "at most 10 % of a layer may be silenced" in text
    assert any(line.split()[:3] == ["u", "silenced", "left"] for line in text.splitlines())
    assert "left" not in as_text(replace(report, rows=(high,)))
    assert f"{low.left[0].layer} from u = 0.5: " in text
    if not low.silenced:
        assert low.figures == report.evaluation.model.figures
        assert not low.measured


def test_nothing_may_be_silenced() -> None:
    seen: list[tuple[int, int]] = []
    report = sweep(
        EXAMPLE, IMAGES, ATTACK, u=[3.0], max_share=0.0, progress=lambda done, total: seen.append((done, total))
    )
    (row,) = report.rows
    assert (row.silenced, row.left_channels, row.largest_share, row.measured) == ((), 2, 0.0, False)
    assert row.figures == report.evaluation.model.figures
    assert seen[-1][0] == seen[-1][1]


def test_the_largest_share_is_that_of_a_layer(found: SweepReport) -> None:
    layers = {layer.name: layer.channels for layer in onnx_clp.scan(EXAMPLE).layers}
    for row in found.rows:
        shares = [len(part.channels) / layers[part.layer] for part in row.silenced]
        assert row.largest_share == max(shares, default=0.0)
    assert found.rows[0].largest_share > 0.1
    note = next(line for line in as_text(found).splitlines() if "--max-share" in line)
    beyond = max(row.u for row in found.rows if row.largest_share > 0.1)
    assert f"up to u = {beyond:g} " in note
    enough = float(note.rpartition(" ")[2].removesuffix("%")) / 100
    assert max(row.largest_share for row in found.rows) <= enough < 1


def test_the_share_that_sanitize_is_told_is_enough(found: SweepReport) -> None:
    text = as_text(replace(found, rows=(replace(found.rows[0], largest_share=13 / 108),)))  # 12.037 %
    assert "--max-share 12.1%" in text


def test_dead_channels_count_where_that_is_asked_for(tmp_path: Path) -> None:
    silent = tmp_path / "silent.onnx"
    sanitize(EXAMPLE, silent, 1.0, max_share=1.0)
    left_out, counted = (sweep(silent, IMAGES, ATTACK, u=[1.5], count_dead=dead).rows[0] for dead in (False, True))
    assert left_out.silenced == sanitize(silent, tmp_path / "a.onnx", 1.5, max_share=1.0).silenced
    assert counted.silenced == sanitize(silent, tmp_path / "b.onnx", 1.5, max_share=1.0, count_dead=True).silenced
    assert left_out.silenced != counted.silenced


def test_a_model_with_external_data_is_swept(found: SweepReport, tmp_path: Path) -> None:
    path = tmp_path / "external.onnx"
    onnx.save(onnx.load(EXAMPLE), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    report = sweep(path, IMAGES, ATTACK, u=[2.0, 3.0])
    expected = [row for row in found.rows if row.u in {2.0, 3.0}]
    for row, other in zip(report.rows, expected, strict=True):
        assert row.silenced == other.silenced
        assert same(row.figures, other.figures)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_cannot_be_swept_is_refused() -> None:
    with pytest.raises(UsageError, match="largest share is 2"):
        sweep(EXAMPLE, IMAGES, ATTACK, max_share=2)
    with pytest.raises(UsageError, match="START:STOP:STEP"):
        sweep(EXAMPLE, IMAGES, ATTACK, u="2:6")
    with pytest.raises(UsageError, match="u is -1"):
        sweep(EXAMPLE, IMAGES, ATTACK, u=[-1.0])


# ---- the report


def checked(report: SweepReport) -> Any:  # noqa: ANN401  # JSON
    schema = resources.files("onnx_clp.report").joinpath("sweep-1.schema.json").read_text(encoding="utf-8")
    document = json.loads(as_json(report), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    Draft202012Validator(json.loads(schema)).validate(document)
    return document


@pytest.mark.parametrize("kind", ["sweep", "tac"])
def test_a_schema_leaves_nothing_open_and_says_what_evaluate_says(kind: str) -> None:
    documents = [
        json.loads(resources.files("onnx_clp.report").joinpath(f"{name}-1.schema.json").read_text(encoding="utf-8"))
        for name in (kind, "evaluate")
    ]
    Draft202012Validator.check_schema(documents[0])
    pending: list[Any] = [documents[0]]
    while pending:
        part = pending.pop()
        if isinstance(part, dict) and "properties" in part:
            assert part["additionalProperties"] is False
            assert sorted(part["required"]) == sorted(part["properties"])
            assert all(len(field["description"]) > 3 for field in part["properties"].values())
        pending += part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
    mine, theirs = (document["$defs"] for document in documents)
    shared = mine.keys() & theirs.keys()
    assert {"images", "attack", "preprocessing"} <= shared
    assert {name: mine[name] for name in shared} == {name: theirs[name] for name in shared}


def test_json_and_csv_hold_every_row(found: SweepReport) -> None:
    document, table = checked(found), list(csv.DictReader(io.StringIO(as_csv(found))))
    assert table[0]["u"] == ""
    assert float(table[0]["acc_share"]) == found.evaluation.model.figures.acc.value
    for row, written, cells in zip(found.rows, document["rows"], table[1:], strict=True):
        assert row.u == written["u"] == float(cells["u"])
        assert row.silenced_channels == written["silenced_channels"] == int(cells["silenced_channels"])
        assert sum(len(part["channels"]) for part in written["silenced"]) == row.silenced_channels
        for name in ("acc", "asr", "ra"):
            share: Share = getattr(row.figures, name)
            low, high = share.interval
            cell = [float(cells[f"{name}_{part}"]) for part in ("count", "total", "share", "low", "high")]
            assert list(written[name].values()) == cell == [share.count, share.total, share.value, low, high]
        assert row.measured == written["measured"] == (cells["measured"] == "true")
    assert document["model"]["acc"]["count"] == found.evaluation.model.figures.acc.count


def test_the_text_has_a_row_for_each_u(found: SweepReport) -> None:
    lines = as_text(found).splitlines()
    start = next(place for place, line in enumerate(lines) if line.lstrip().startswith("u  silenced"))
    assert lines[start + 1].split()[0] == "none"
    for row, line in zip(found.rows, lines[start + 2 :], strict=False):
        u, silenced, acc, *_ = line.split()
        assert (float(u), int(silenced)) == (row.u, row.silenced_channels)
        assert acc == f"{100 * row.figures.acc.value:.2f}"


def test_a_sweep_without_an_attack_tells_the_accuracy(found: SweepReport) -> None:
    report = sweep(EXAMPLE, IMAGES, replace(ATTACK, trigger=None, target=None), u=[2.0, 3.0])
    assert [row.figures.asr for row in report.rows] == [None, None]
    wanted = {row.u: row.figures.acc for row in found.rows}
    assert [row.figures.acc for row in report.rows] == [wanted[2.0], wanted[3.0]]
    assert checked(report)["rows"][0]["asr"] is None
    assert "ASR" not in as_text(report)
    assert list(csv.DictReader(io.StringIO(as_csv(report))))[1]["asr_share"] == ""
    assert b"ASR" not in plot.draw_sweep(report, "svg")


def test_names_are_shown_harmlessly(found: SweepReport) -> None:
    row = replace(found.rows[0], left=(Left("\x1b[31m$x$", (1, 2), "why\x1b"),))
    text = as_text(replace(found, rows=(row,)))
    assert "\x1b" not in text
    assert "\\x1b[31m$x$ from u = 0.5" in text


MAGIC = {"png": b"\x89PNG\r\n", "svg": b"<?xml", "pdf": b"%PDF-"}


@pytest.mark.parametrize("form", plot.FORMATS)
def test_a_picture_is_of_its_format_and_the_same_each_time(form: str, found: SweepReport) -> None:
    picture = plot.draw_sweep(found, form)
    assert picture.startswith(MAGIC[form])
    assert plot.draw_sweep(found, form) == picture
    assert plot.draw_sweep(replace(found, rows=found.rows[:2]), form) != picture


def test_a_picture_of_one_row_and_of_layers_left_can_be_drawn(found: SweepReport) -> None:
    row = replace(found.rows[0], left=(Left("x", (1, 2), "why"),))
    evaluation = replace(found.evaluation, model=replace(found.evaluation.model, path="$\\frac$<b>.onnx"))
    assert plot.draw_sweep(replace(found, rows=(row,), evaluation=evaluation), "png").startswith(MAGIC["png"])


# ---- the command


def test_the_command_tells_what_the_function_finds(tmp_path: Path, capsys: Capture) -> None:
    np.savez(tmp_path / "images.npz", images=IMAGES.images, labels=IMAGES.labels)
    attack, images = write_attack(ATTACK, tmp_path), tmp_path / "images.npz"
    picture = tmp_path / "sweep.png"
    arguments = ["evaluate", str(EXAMPLE), "--attack", str(attack), "--images", str(images), "--sweep", "1:3:1"]
    expected = sweep(EXAMPLE, images, attack, u="1:3:1")
    assert run([*arguments, "--format", "json", "--plot", str(picture)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["acc"] for row in document["rows"]] == [row["acc"] for row in json.loads(as_json(expected))["rows"]]
    assert picture.read_bytes().startswith(MAGIC["png"])
    assert run([*arguments, "--format", "csv"]) == 0
    assert capsys.readouterr().out == as_csv(expected)
    assert run([*arguments, "--max-share", "10%", "-o", str(tmp_path / "report.txt")]) == 0
    assert capsys.readouterr().out == ""
    limited = sweep(EXAMPLE, images, attack, u="1:3:1", max_share=0.1)
    assert (tmp_path / "report.txt").read_text(encoding="utf-8") == as_text(limited)


@pytest.mark.parametrize("text", ["2:6", "6:2:1", "0:1e9:1", "a:b:c"])
def test_a_sweep_that_is_none_gets_one_line(text: str, capsys: Capture) -> None:
    assert run(["evaluate", str(EXAMPLE), "--images", str(EXAMPLE), "--sweep", text]) == 2
    error = capsys.readouterr().err
    assert "sweep" in error
    assert len(error.splitlines()) == 1
