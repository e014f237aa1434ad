"""The reports: JSON against the schemas that the package ships, text and JSON against files that were read by a person.

`python -m tests.test_reports` writes tests/golden/ anew; look at what git says has changed.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError

import onnx_clp
from onnx_clp.judge import Status
from onnx_clp.report import json as as_json
from onnx_clp.report import text as as_text
from onnx_clp.report.outcome import Outcome
from onnx_clp.report.words import count, listed, number, printable, shortened
from onnx_clp.sites import Reason
from tests.built import NAMES, build, save

pytestmark = pytest.mark.usefixtures("in_this_process")

GOLDEN = Path(__file__).parent / "golden"

Json = Any


def schema(kind: str) -> Json:
    """A schema as the installed package has it."""
    return json.loads(resources.files("onnx_clp.report").joinpath(f"{kind}-1.schema.json").read_text(encoding="utf-8"))


@functools.cache
def validator(kind: str) -> Draft202012Validator:
    return Draft202012Validator(schema(kind))


def strict(text: str) -> Json:
    """Parse JSON as the standard has it: no NaN, no Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def scanned(case: str, folder: Path) -> onnx_clp.ScanReport:
    return onnx_clp.scan(save(build(case), folder))


# ---- JSON and its schemas


@pytest.mark.parametrize("kind", ["scan", "sanitize"])
def test_a_schema_is_one_and_leaves_nothing_open(kind: str) -> None:
    document = schema(kind)
    Draft202012Validator.check_schema(document)
    assert document["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    for part in objects(document):
        assert part["additionalProperties"] is False
        assert sorted(part["required"]) == sorted(part["properties"])
        for name, field in part["properties"].items():
            assert len(field.get("description", "")) > 3, f"{name} is not described"
    assert all(part["description"] for part in document["$defs"].values())


def objects(part: Json) -> Iterator[Json]:
    """Every description of an object within a schema."""
    if isinstance(part, dict):
        if "properties" in part:
            yield part
        for inner in part.values():
            yield from objects(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from objects(inner)


def test_what_both_schemas_describe_they_describe_alike() -> None:
    one, other = schema("scan")["$defs"], schema("sanitize")["$defs"]
    shared = one.keys() & other.keys()
    assert {"report", "coverage", "layer", "flagged", "skipped", "number"} <= shared
    assert {name: one[name] for name in shared} == {name: other[name] for name in shared}


def test_the_schemas_name_every_status_and_reason() -> None:
    found = schema("scan")["$defs"]
    assert found["layer"]["properties"]["status"]["enum"] == [status.value for status in Status]
    assert found["skipped"]["properties"]["reason"]["enum"] == [reason.value for reason in Reason]


@pytest.mark.parametrize("name", NAMES)
def test_the_json_of_any_scan_fits_its_schema(name: str, tmp_path: Path) -> None:
    report = scanned(name, tmp_path)
    text = as_json.render([Outcome(report.path, report=report)])
    document = strict(text)
    validator("scan").validate(document)
    assert text.isascii()
    assert text.endswith("}\n")
    (entry,) = document["files"]
    assert entry["path"] == report.path
    same(entry["report"], report)


def same(found: Json, report: onnx_clp.ScanReport) -> None:
    """The JSON says what the report says."""
    assert [layer["name"] for layer in found["layers"]] == [layer.name for layer in report.layers]
    for shown, layer in zip(found["layers"], report.layers, strict=True):
        # Written with all their digits: not a bit of leeway.
        assert list(map(plain_number, shown["bounds"])) == list(map(comparable, layer.bounds))
        for field in ("mean", "std", "threshold"):
            assert plain_number(shown[field]) == comparable(getattr(layer, field))
        assert shown["channels"] == len(shown["bounds"])
        assert [channel["index"] for channel in shown["flagged"]] == [channel.index for channel in layer.flagged]
        assert all(channel["z"] > report.u for channel in shown["flagged"])
        assert all(channel["bound"] == shown["bounds"][channel["index"]] for channel in shown["flagged"])
    coverage = found["coverage"]
    assert coverage["channels"] == sum(layer["channels"] for layer in found["layers"])
    assert coverage["layers"] == len(found["layers"])
    assert coverage["skipped"] == len(found["skipped"]) == len(report.skipped)
    assert found["flagged_channels"] == sum(len(layer["flagged"]) for layer in found["layers"])
    assert found["dead_channels"] == sum(len(layer["dead"]) for layer in found["layers"])
    assert found["non_finite_channels"] == sum(len(layer["non_finite"]) for layer in found["layers"])


def plain_number(value: float | str) -> float | str:
    return "NaN" if value == "NaN" else float(value)


def comparable(value: float) -> float | str:
    """A number that is equal to itself."""
    return "NaN" if math.isnan(value) else value


def test_numbers_that_json_cannot_hold_are_words(tmp_path: Path) -> None:
    shown = {
        name: as_json.scan_object(scanned(name, tmp_path))["layers"][0]
        for name in ("nan_weight", "inf_weight", "all_dead")
    }
    assert shown["nan_weight"]["bounds"][9] == "NaN"
    assert shown["inf_weight"]["bounds"][9] == "Infinity"
    assert (shown["all_dead"]["mean"], shown["all_dead"]["threshold"]) == ("NaN", "NaN")


SANITIZED = [
    "folded",
    "shared_gamma",
    "external_one_file",
    "nan_weight",
    "few_channels",
    "doubled_metadata",
    "odd_names",
]


@pytest.mark.parametrize("name", SANITIZED)
@pytest.mark.parametrize("dry_run", [False, True])
def test_the_json_of_a_rewrite_fits_its_schema(name: str, tmp_path: Path, *, dry_run: bool) -> None:
    report = onnx_clp.sanitize(save(build(name), tmp_path), tmp_path / "out.onnx", dry_run=dry_run)
    document = strict(as_json.render_sanitize(report))
    validator("sanitize").validate(document)
    assert document["written"] is not dry_run
    assert {part["layer"]: tuple(part["channels"]) for part in document["silenced"]} == {
        part.layer: part.channels for part in report.silenced
    }
    same(document["before"], report.before)
    if report.after is not None:
        same(document["after"], report.after)


def test_the_json_of_a_rewrite_that_leaves_something_fits_its_schema(tmp_path: Path) -> None:
    report = onnx_clp.sanitize(save(build("folded"), tmp_path), tmp_path / "out.onnx", max_share=0)
    document = strict(as_json.render_sanitize(report))
    validator("sanitize").validate(document)
    assert document["left"][0]["channels"] == [5]


def test_the_json_of_a_failure_fits_its_schema() -> None:
    outcomes = [
        Outcome("a\x1b.onnx", error=kind("what", "advice")) for kind in (onnx_clp.ModelFileError, onnx_clp.UsageError)
    ]
    document = strict(as_json.render(outcomes))
    validator("scan").validate(document)
    assert document["files"][0] == {
        "path": "a\x1b.onnx",
        "error": {"kind": "ModelFileError", "message": "what", "hint": "advice"},
    }
    validator("scan").validate(strict(as_json.render([])))


def remove(*path: str | int) -> Callable[[Json], None]:
    def change(document: Json) -> None:
        del functools.reduce(lambda part, key: part[key], path[:-1], document)[path[-1]]

    return change


def put(value: Json, *path: str | int) -> Callable[[Json], None]:
    def change(document: Json) -> None:
        functools.reduce(lambda part, key: part[key], path[:-1], document)[path[-1]] = value

    return change


REPORT = ("files", 0, "report")
LAYER = (*REPORT, "layers", 0)


@pytest.mark.parametrize(
    "change",
    [
        remove("format_version"),
        remove(*REPORT, "skipped"),
        remove(*LAYER, "mean"),
        put(1, "extra"),
        put(1, *LAYER, "extra"),
        put(2, "format_version"),
        put("sanitize", "kind"),
        put("clean", *LAYER, "status"),
        put("nan", *LAYER, "mean"),
        put(None, *LAYER, "mean"),
        put(-1, *LAYER, "bounds", 0),
        put("-Infinity", *LAYER, "bounds", 0),
        put(-1, *LAYER, "dead"),
        put([1, 1], *LAYER, "dead"),
        put(1.5, *LAYER, "channels"),
        put([{"name": "a", "operator": "Conv", "reason": "whim", "detail": "x"}], *REPORT, "skipped"),
        put({"kind": "ModelFileError", "message": "x", "hint": ""}, "files", 0, "error"),
    ],
)
def test_a_document_that_is_wrong_does_not_fit(change: Callable[[Json], None], tmp_path: Path) -> None:
    report = scanned("folded", tmp_path)
    document = strict(as_json.render([Outcome(report.path, report=report)]))
    wrong = copy.deepcopy(document)
    change(wrong)
    validator("scan").validate(document)
    with pytest.raises(ValidationError):
        validator("scan").validate(wrong)


# ---- files that were read by a person


def golden_scan(case: str) -> onnx_clp.ScanReport:
    """The scan of a built case by a path that is the same everywhere."""
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        save(build(case), Path())
        return onnx_clp.scan(f"{case}.onnx")


def golden_sanitize(case: str, max_share: float) -> onnx_clp.SanitizeReport:
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        save(build(case), Path())
        return onnx_clp.sanitize(f"{case}.onnx", "sanitized.onnx", max_share=max_share)


def made() -> dict[str, str]:
    """Every golden file as the package writes it now; what depends on versions is left out."""
    found = {}
    for case in ("conv_bn_chain", "head_boxes_sliced", "nan_weight", "dead_kernels"):
        outcome = Outcome(f"{case}.onnx", report=golden_scan(case))
        found[f"{case}.txt"] = as_text.render([outcome])
        found[f"{case}.verbose.txt"] = as_text.render([outcome], verbose=True)
    found["nan_weight.json"] = as_json.render([Outcome("nan_weight.onnx", report=golden_scan("nan_weight"))])
    report = golden_sanitize("conv_bn_chain", 0.05)
    dry = replace(report, written=False, files=(), input_sha256="", checks=(), after=None)
    found["conv_bn_chain.sanitize.txt"] = as_text.render_sanitize(report)
    found["conv_bn_chain.sanitize.json"] = as_json.render_sanitize(report)
    found["conv_bn_chain.dry_run.txt"] = as_text.render_sanitize(dry, verbose=True)
    return {name: _timeless(text) for name, text in found.items()}


def _timeless(text: str) -> str:
    text = text.replace(f'"tool_version": "{onnx_clp.__version__}"', '"tool_version": "VERSION"')
    return re.sub(r"\b[0-9a-f]{64}\b", "SHA256", text)


@pytest.fixture(scope="module")
def now() -> dict[str, str]:
    return made()


def test_every_golden_file_is_written_and_no_other_is_there(now: dict[str, str]) -> None:
    assert sorted(now) == sorted(path.name for path in GOLDEN.iterdir())


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.glob("*.txt")))
def test_the_text_is_what_was_read(name: str, now: dict[str, str]) -> None:
    assert now[name] == (GOLDEN / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.glob("*.json")))
def test_the_json_is_what_was_read(name: str, now: dict[str, str]) -> None:
    alike(json.loads(now[name]), json.loads((GOLDEN / name).read_text(encoding="utf-8")))


def alike(found: Json, wanted: Json) -> None:
    """Equal, but for the last digits of a float."""
    assert type(found) is type(wanted)
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted:
            alike(found[key], wanted[key])
    elif isinstance(wanted, list):
        for left, right in zip(found, wanted, strict=True):
            alike(left, right)
    elif isinstance(wanted, float):
        # Bounds of float32 kernels are good to about 1e-6, see bounds.py; std and z are differences of them.
        assert found == pytest.approx(wanted, rel=1e-5)
    else:
        assert found == wanted


# ---- words


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("conv", "conv"),
        ("層/卷积:0", "層/卷积:0"),
        ("a\nb\t\x1b[0m", "a\\nb\\t\\x1b[0m"),
        ("\u202ex\ufeff", "\\u202ex\\ufeff"),
        ("\udcff", "\\udcff"),
        ("x" * 121, "x" * 120 + "… (121 characters)"),
    ],
)
def test_a_name_is_printable(name: str, shown: str) -> None:
    assert printable(name) == shown


def test_a_name_is_shortened_in_its_middle() -> None:
    assert shortened("abcdefghij", 10) == "abcdefghij"
    assert shortened("abcdefghijk", 10) == "abc…fghijk"
    assert len(shortened("layer/" * 50, 48)) == 48


def test_numbers_counts_and_lists() -> None:
    assert [number(value) for value in (math.nan, math.inf, 0.0, 1234567.0, 0.000123456)] == [
        "–",
        "inf",
        "0",
        "1.235e+06",
        "0.0001235",
    ]
    assert [count(amount, "layer") for amount in (0, 1, 1234)] == ["0 layers", "1 layer", "1,234 layers"]
    assert listed(["a", "b", "c"], 2) == "a, b and 1 more"
    assert listed(iter(["a", "b"]), 2) == "a, b"


def test_styles_are_applied_and_change_nothing_else(tmp_path: Path) -> None:
    report = scanned("nan_weight", tmp_path)
    seen: set[str] = set()

    def style(text: str, name: str) -> str:
        seen.add(name)
        return f"<{name}>{text}</{name}>"

    styled = as_text.render([Outcome("model.onnx", report=report)], style)
    assert {"head", "bad", "dim"} <= seen <= {"head", "bad", "warn", "good", "dim"}
    assert re.sub(r"</?(head|bad|warn|good|dim)>", "", styled) == as_text.render([Outcome("model.onnx", report=report)])


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for file, content in made().items():
        (GOLDEN / file).write_text(content, encoding="utf-8")
