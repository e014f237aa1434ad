"""The rule of auto: a row of the documented table for each test, and what is said wins or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import onnx_clp
from onnx_clp import sanitize
from onnx_clp.auto import ACCURACY_DROP, LEAST_LABELLED, WITH_IMAGES, Has, Plan, Settings, chosen
from onnx_clp.defaults import LOWEST_U
from onnx_clp.errors import UsageError
from onnx_clp.evaluation.images import find_collection, labelled
from onnx_clp.evaluation.labels import label_count
from onnx_clp.methods import METHODS, Said, Settled, settled
from tests.channel_nets import CLASSES
from tests.correction_nets import CORRECTED, images, saved

pytestmark = pytest.mark.usefixtures("in_this_process")

DOCUMENT = (Path(onnx_clp.__file__).parents[1] / "docs" / "sanitize.md").read_text(encoding="utf-8")
PUBLISHED = Settings("bound", 3.0)


def rows() -> dict[str, tuple[str, ...]]:
    """The table of the document, by what the user has: method, score, u, repair."""
    section = DOCUMENT.partition("\n### auto\n")[2].partition("\n## ")[0]
    cells = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    return {cell[0]: tuple(cell[1:]) for cell in cells[2:]}


HAS = {
    "nothing": Has(),
    "clean images": Has(images=True),
    "200 clean images with labels": Has(images=True, labels=True),
    "suspected images": Has(suspected=True),
    "suspected and clean images": Has(suspected=True, images=True),
}


@pytest.mark.parametrize("name", HAS)
def test_every_row_of_the_table_is_what_is_chosen(name: str) -> None:
    has = HAS[name]
    plan = chosen(has)
    made = settled(Said("auto"), has)
    repair = f"{made.repair}, ridge {made.ridge:g}" if made.ridge is not None else made.repair
    shown = (
        made.method,
        made.score if made.method == "clp" else "entropy",
        f"{made.u:g}",
        repair if has.images else "–",
    )
    assert rows()[name] == shown
    assert made.auto.endswith(plan.why)
    assert set(rows()) == set(HAS)


@pytest.mark.parametrize(
    ("has", "method", "settings", "drop"),
    [
        (Has(), "clp", PUBLISHED, None),
        (Has(images=True), "clp", WITH_IMAGES, None),
        (Has(images=True, labels=True), "clp", WITH_IMAGES, ACCURACY_DROP),
        (Has(suspected=True), "ep", PUBLISHED, None),
        (Has(suspected=True, images=True), "ep", PUBLISHED, None),
        (Has(suspected=True, images=True, labels=True), "ep", PUBLISHED, None),
    ],
)
def test_what_is_chosen(has: Has, method: str, settings: Settings, drop: float | None) -> None:
    plan = chosen(has)
    assert plan == Plan(method, settings, plan.why, drop)
    assert plan.why


def test_what_is_said_wins_over_what_auto_picks() -> None:
    images = Has(images=True)
    plain = settled(Said("auto"), images)
    picked = WITH_IMAGES
    assert (plain.score, plain.u, plain.repair, plain.ridge) == (picked.score, picked.u, picked.repair, picked.ridge)
    assert settled(Said("auto", u=4.5), images).u == 4.5
    assert settled(Said("auto", score="path"), images).score == "path"
    assert settled(Said("auto", threshold="log-mad"), images).threshold == "log-mad"
    assert settled(Said("auto", ridge=7.0), images).ridge == 7.0
    kept = settled(Said("auto", keep_bias=True), images)
    assert (kept.keep_bias, plain.keep_bias) == (True, False)
    # The penalty is one of the repair that auto picks.
    other = settled(Said("auto", repair="statistics"), images)
    assert (other.repair, other.ridge) == ("statistics", None)
    assert "repair statistics" in other.auto
    assert "ridge" not in other.auto
    assert "u = 4.5" in settled(Said("auto", u=4.5), images).auto


@pytest.mark.parametrize("method", ["clp", "ep", "bnp"])
def test_a_method_by_name_has_its_published_settings(method: str) -> None:
    has = Has(images=method != "ep", suspected=method == "ep")
    keeps = method != "clp"
    assert settled(Said(method), has) == Settled(method, 3.0, "bound", "mean-std", "statistics", None, keeps)
    assert settled(Said(method, keep_bias=not keeps), has).keep_bias is not keeps


@pytest.mark.parametrize(
    ("said", "has", "words"),
    [
        (Said("fp"), Has(), "there is no method 'fp'"),
        (Said("ep"), Has(), "--suspected-images PATH"),
        (Said("ep"), Has(images=True), "the wrong ones"),
        (Said("bnp"), Has(), "--images PATH"),
        (Said("bnp"), Has(images=True, suspected=True), "does not go with --method bnp"),
        (Said("clp"), Has(suspected=True), "say --method ep or auto"),
        (Said("ep", score="path"), Has(suspected=True), "--score does not go with the method ep"),
        (Said("auto", score="bound"), Has(suspected=True), "which auto takes with --suspected-images"),
        (Said("bnp", threshold="log-std"), Has(images=True), "--threshold does not go"),
        (Said("ep", count_dead=True), Has(suspected=True), "--count-dead does not go"),
    ],
)
def test_what_does_not_go_together_is_refused(said: Said, has: Has, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        settled(said, has)
    assert words in str(caught.value)


def test_every_method_is_documented() -> None:
    for method in METHODS:
        assert f"`{method}`" in DOCUMENT


def written(folder: Path, *, images: int, labels: bool) -> Path:
    """An .npz of grey images, with labels or without."""
    arrays: dict[str, Any] = {"images": np.zeros((images, 4, 4, 3), np.uint8)}
    np.savez(folder / "some.npz", **arrays | ({"labels": np.arange(images) % 3} if labels else {}))
    return folder / "some.npz"


def test_labels_are_counted_where_they_lie_with_the_images(tmp_path: Path) -> None:
    assert label_count(written(tmp_path, images=7, labels=True)) == 7
    assert label_count(written(tmp_path, images=7, labels=False)) == 0
    pixels = np.zeros((5, 4, 4, 3), np.uint8)
    assert label_count(pixels) == 0
    assert label_count(labelled(pixels, np.arange(5), list("abcde"))) == 5
    assert label_count(tmp_path / "nowhere") == 0


def test_the_folders_of_pictures_are_no_labels_that_nobody_has_said(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / name / "1.png")
    assert len(find_collection(tmp_path).labels) == 2
    assert label_count(tmp_path) == 0


@pytest.mark.parametrize(("count", "options", "budget"), [
    (LEAST_LABELLED, {}, (None, ACCURACY_DROP)),
    (LEAST_LABELLED - 1, {}, None),
    (LEAST_LABELLED, {"num_images": LEAST_LABELLED - 1}, None),
    (LEAST_LABELLED, {"method": "clp"}, None),
    (LEAST_LABELLED, {"min_agreement": 90.0}, (90.0, None)),
])  # fmt: skip
def test_enough_labels_bring_a_budget(
    count: int, options: dict[str, Any], budget: tuple[float | None, float | None] | None, tmp_path: Path
) -> None:
    path = saved(CORRECTED["plain"](), tmp_path)
    pixels = np.resize(images(), (count, *images().shape[1:]))
    given = labelled(pixels, np.arange(count) % CLASSES, [str(number) for number in range(CLASSES)])
    asked: dict[str, Any] = {"method": "auto", "images": given, "dry_run": True, **options}
    report = sanitize(path, tmp_path / "c.onnx", **asked)
    kept = None if report.budget is None else report.budget.budget
    assert (None if kept is None else (kept.min_agreement, kept.max_accuracy_drop)) == budget
    assert ("labels tell what it costs" in report.auto) is (budget == (None, ACCURACY_DROP))


def test_a_budget_goes_lower_than_u_would() -> None:
    assert settled(Said(budget=True), Has(images=True)).u == LOWEST_U
    assert settled(Said("auto", budget=True), Has(images=True)).u == LOWEST_U
    assert settled(Said("auto"), Has(images=True, labels=True)).u == WITH_IMAGES.u
    assert "2 points of accuracy at most" in settled(Said("auto"), Has(images=True, labels=True)).auto
