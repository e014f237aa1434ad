"""Imports only go down: read from the source, and seen in a process of its own."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import onnx_clp
from tests.built import build, save

PACKAGE = Path(onnx_clp.__file__).parent

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "_version"),
    ("defaults", "limits"),
    ("auto",),
    ("methods",),
    ("bounds", "judge"),
    # the file, its graph and its bytes
    ("model.source", "model.containment"),
    ("model.edits",),
    ("model.wire",),
    ("model.file",),
    ("model.ambiguity", "model.tensors"),
    ("model.graph", "model.calls"),
    ("model.attributes",),
    ("model.expand",),
    ("model.fold",),
    ("model.cost",),
    ("model.constants",),
    ("model.knob", "model.save"),
    ("model.follow",),
    ("model.patch",),
    ("model.place",),
    # the sites and their bounds
    ("operators",),
    ("extents", "heads", "flow", "quantised"),
    ("shapes", "origins"),
    ("trace", "gains"),
    ("sites", "readers"),
    ("kernels",),
    ("paths",),
    ("analysis",),
    # onnxruntime, images, and a model that classifies them
    ("trial",),
    ("runtime",),
    ("probes",),
    ("evaluation.triggers", "evaluation.files", "evaluation.outputs"),
    ("evaluation.npy",),
    ("evaluation.attack",),
    ("evaluation.figures", "evaluation.preprocess", "evaluation.pictures", "evaluation.providers"),
    ("evaluation.correlation",),
    ("evaluation.collection", "evaluation.unpickle", "evaluation.session"),
    ("evaluation.arrays", "evaluation.datasets", "evaluation.running"),
    ("evaluation.images",),
    ("evaluation.labels",),
    ("evaluation.byhand", "evaluation.classifier"),
    ("evaluation.setting",),
    ("evaluation.prepared", "evaluation.changes"),
    # what silencing shifts, and how it is given back
    ("evaluation.unlabelled",),
    ("correction.budget",),
    ("correction.request",),
    ("correction.moments", "correction.stages", "correction.drawn"),
    ("correction.patches",),
    ("correction.refit",),
    ("correction.convolutions", "correction.activity"),
    ("correction.cuts", "correction.recipe"),
    ("correction.stream", "rests"),
    ("correction.answers",),
    ("correction.repair",),
    ("correction.simulator",),
    ("correction.source",),
    ("correction.compare", "correction.corrector"),
    # what pre-activations give away
    ("preactivation.scores", "preactivation.entropy", "preactivation.divergence"),
    ("preactivation.choice", "preactivation.places", "preactivation.selection"),
    ("preactivation.reading",),
    ("preactivation.selecting",),
    # the rewrite
    ("sanitizer",),
    ("verify",),
    ("silencing", "correction.rewriting"),
    ("correction.walking", "guard"),
    ("rewrite",),
    # accuracy and attack success
    ("evaluation.evaluator", "evaluation.sweep", "evaluation.tac"),
    ("demonstration",),
    # what users see
    ("report.words", "report.outcome"),
    ("report.correction_text", "report.budget_text", "report.values"),
    ("report.selection_text", "report.selection_json"),
    ("report.text", "report.json"),
    ("report.evaluate_text", "report.csv", "report.plot", "report.sweep_json", "report.tac_json"),
    ("report.sweep_text", "report.tac_text", "report.demo_text"),
    ("",),  # onnx_clp itself: the names that users import
    ("cli.exits", "cli.output"),
    ("cli.options", "cli.image_options"),
    ("cli.scan", "cli.sanitize", "cli.evaluate", "cli.demo"),
    ("cli.command",),
    ("cli",),
    ("__main__",),
)
"""Every module, the lowest first; one imports only those before its own line."""

EXCEPTIONS = {
    ("sanitizer", "rewrite"): "deferred: the input is hashed in a thread while the heavy modules are imported",
}

RANK = {module: rank for rank, line in enumerate(LAYERS) for module in line}

ONLY = {
    "onnx": ("model.", "verify", "runtime", "guard", "evaluation.session", "correction."),
    "google": ("model.",),
    "click": ("cli.",),
    "onnxruntime": ("trial",),
    "PIL": ("evaluation.pictures",),
    "matplotlib": ("report.plot",),
    "ml_dtypes": ("model.", "bounds"),
    "numpy": (
        "model.",
        "bounds",
        "judge",
        "operators",
        "quantised",
        "heads",
        "flow",
        "origins",
        "trace",
        "gains",
        "sites",
        "kernels",
        "paths",
        "rests",
        "verify",
        "trial",
        "probes",
        "guard",
        "evaluation.",
        "correction.",
        "preactivation.",
    ),
}
"""Which modules may import a package that is not Python's own. No other may be imported at all."""


@dataclass(frozen=True)
class Import:
    """One import statement of a module of the package."""

    target: str
    """A module of the package, from its root, or the name of another package."""
    own: bool
    """Whether it is a module of the package."""
    typing: bool
    """Whether only type checkers see it."""
    deferred: bool
    """Whether it stands in a function."""


def sources() -> dict[str, str]:
    """The source of every module, by its name from the root of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        found[".".join(parts)] = path.read_text(encoding="utf-8")
    return found


def imports(source: str, modules: Mapping[str, str]) -> Iterator[Import]:
    """Every import statement of a module."""
    yield from _imports(ast.parse(source), modules, typing=False, deferred=False)


def _imports(node: ast.AST, modules: Mapping[str, str], *, typing: bool, deferred: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for name in node.names:
            yield _import(name.name, modules, typing=typing, deferred=deferred)
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, "imports are written out"
        for name in node.names:
            full = f"{node.module}.{name.name}"
            inner = full.removeprefix("onnx_clp.")
            yield _import(full if inner in modules else node.module or "", modules, typing=typing, deferred=deferred)
    for field, part in ast.iter_fields(node):
        for child in part if isinstance(part, list) else [part]:
            if isinstance(child, ast.AST):
                inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                checked = isinstance(node, ast.If) and field == "body" and "TYPE_CHECKING" in ast.unparse(node.test)
                yield from _imports(child, modules, typing=typing or checked, deferred=deferred or inside)


def _import(name: str, modules: Mapping[str, str], *, typing: bool, deferred: bool) -> Import:
    if name == "onnx_clp" or name.startswith("onnx_clp."):
        target = name.removeprefix("onnx_clp").removeprefix(".")
        assert target in modules, f"{name} is no module"
        return Import(target, own=True, typing=typing, deferred=deferred)
    return Import(name.partition(".")[0], own=False, typing=typing, deferred=deferred)


def violations(modules: Mapping[str, str]) -> list[str]:
    """What the modules import and should not."""
    found = []
    for module, source in modules.items():
        if module not in RANK and source.strip() and any(imports(source, modules)):
            found.append(f"{module} stands in no layer")
            continue
        for each in imports(source, modules):
            if each.own:
                down = RANK.get(each.target, -1) < RANK.get(module, len(RANK))
                if not down and not ((module, each.target) in EXCEPTIONS and each.deferred):
                    found.append(f"{module} imports {each.target}, which is not below it")
            elif each.target not in sys.stdlib_module_names and not module.startswith(ONLY.get(each.target, ("\0",))):
                found.append(f"{module} imports {each.target}")
    return found


def loaded_with(module: str, modules: Mapping[str, str]) -> set[str]:
    """Every package that is loaded when a module is, by its statements outside functions, and theirs."""
    seen: set[str] = set()
    pending, packages = [module], set()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        parent = current.rpartition(".")[0]
        pending += [parent, ""] if parent else [""]
        for each in imports(modules[current], modules):
            if each.typing or each.deferred:
                continue
            if each.own:
                pending.append(each.target)
            else:
                packages.add(each.target)
    return packages


def test_imports_go_down() -> None:
    assert violations(sources()) == []


def test_every_layer_is_there() -> None:
    assert sorted(RANK.keys() - sources().keys()) == []


@pytest.mark.parametrize(
    "module",
    [
        "",
        "errors",
        "defaults",
        "bounds",
        "judge",
        "report.text",
        "report.json",
        "report.evaluate_text",
        "report.csv",
        "report.plot",
        "report.sweep_json",
        "report.sweep_text",
        "report.tac_json",
        "report.tac_text",
        "report.correction_text",
        "report.budget_text",
        "correction.budget",
        "report.words",
        "cli",
        "cli.command",
        "cli.scan",
        "cli.sanitize",
        "cli.evaluate",
        "evaluation.figures",
        "preactivation.scores",
        "preactivation.selection",
        "report.selection_text",
        "report.selection_json",
        "report.values",
        "auto",
        "methods",
    ],
)
def test_light_modules_load_no_onnx(module: str) -> None:
    heavy = {"onnx", "google", "onnxruntime", "torch"} | (set() if module in {"bounds", "judge"} else {"numpy"})
    assert loaded_with(module, sources()) & heavy == set()


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("model.source", "import torch", "model.source imports torch"),
        ("model.source", "def f() -> None:\n    import torch.nn", "model.source imports torch"),
        ("analysis", "import onnxruntime", "analysis imports onnxruntime"),
        ("report.text", "import onnx", "report.text imports onnx"),
        ("judge", "from onnx import helper", "judge imports onnx"),
        ("bounds", "from onnx_clp.model.tensors import Array", "bounds imports model.tensors, which is not below it"),
        ("errors", "from onnx_clp import analysis", "errors imports analysis, which is not below it"),
        (
            "errors",
            "if TYPE_CHECKING:\n    from onnx_clp.sites import Site",
            "errors imports sites, which is not below it",
        ),
        (
            "sites",
            "def f() -> None:\n    from onnx_clp.rewrite import rewrite",
            "sites imports rewrite, which is not below it",
        ),
        ("sanitizer", "from onnx_clp.rewrite import rewrite", "sanitizer imports rewrite, which is not below it"),
        ("analysis", "import onnx_clp.analysis", "analysis imports analysis, which is not below it"),
        ("brand_new", "import json", "brand_new stands in no layer"),
    ],
)
def test_an_import_that_should_not_be_is_caught(module: str, source: str, complaint: str) -> None:
    assert complaint in violations({**sources(), module: source})


def test_a_heavy_import_is_caught_through_others() -> None:
    modules = sources()
    modules["report.words"] += "\nfrom onnx_clp.model import tensors\n"
    assert "onnx" in loaded_with("report.text", modules)
    assert "onnx" not in loaded_with("report.text", sources())


# ---- in a process of its own


def loaded(code: str) -> set[str]:
    """The packages, and the modules of onnx_clp, that are loaded after some code has run."""
    found = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    names = json.loads(found.stdout.splitlines()[-1])
    return {name for name in names if name.startswith("onnx_clp") or "." not in name}


HEAVY = {"numpy", "onnx", "google", "onnxruntime", "torch", "ml_dtypes", "click"}


def test_importing_the_package_loads_next_to_nothing() -> None:
    found = loaded("import onnx_clp")
    assert found & HEAVY == set()
    assert {name for name in found if name.startswith("onnx_clp")} == {
        "onnx_clp",
        "onnx_clp._version",
        "onnx_clp.errors",
    }


def test_a_scan_loads_neither_onnxruntime_nor_the_rewrite_nor_the_command(tmp_path: Path) -> None:
    path = save(build("conv_bn_2d"), tmp_path)
    found = loaded(f"import onnx_clp; onnx_clp.scan({str(path)!r})")
    assert {"numpy", "onnx", "onnx_clp.analysis"} <= found
    assert found & {"onnxruntime", "torch", "click"} == set()
    assert not [name for name in found if name.startswith(("onnx_clp.cli", "onnx_clp.report", "onnx_clp.rewrite"))]


def test_rendering_a_report_needs_no_onnx() -> None:
    code = "from onnx_clp.report import text, json; text.render([]); json.render([])"
    assert loaded(code) & {"numpy", "onnx", "onnxruntime", "torch"} == set()


@pytest.mark.parametrize("module", ["bounds", "judge"])
def test_the_arithmetic_needs_numpy_alone(module: str) -> None:
    assert loaded(f"import onnx_clp.{module}") & HEAVY - {"numpy"} == set()


@pytest.mark.parametrize(
    "code",
    [
        "from onnx_clp import sanitize, scan",
        "from onnx_clp import scan, sanitize",
        "import onnx_clp; onnx_clp.sanitize; scan, sanitize = onnx_clp.scan, onnx_clp.sanitize",
        "import onnx_clp; onnx_clp.scan; scan, sanitize = onnx_clp.scan, onnx_clp.sanitize",
        "import onnx_clp.cli.scan, onnx_clp.cli.sanitize, onnx_clp.rewrite; from onnx_clp import scan, sanitize",
        "from onnx_clp import *",
    ],
)
def test_the_functions_are_functions_in_whatever_order_they_are_imported(code: str, tmp_path: Path) -> None:
    source, target = save(build("folded"), tmp_path), tmp_path / "out.onnx"
    loaded(f"{code}\nassert scan({str(source)!r}).layers\nassert sanitize({str(source)!r}, {str(target)!r}).written")


def test_the_public_names_are_all_there_and_no_others() -> None:
    assert sorted(onnx_clp.__all__) == onnx_clp.__all__
    assert {"scan", "sanitize", "evaluate", "ScanReport", "SanitizeReport", "EvaluationReport", "OnnxClpError"} <= set(
        onnx_clp.__all__
    )
    for name in onnx_clp.__all__:
        assert getattr(onnx_clp, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        onnx_clp.no_such_name  # noqa: B018  # asking for it is the point
    assert (PACKAGE / "py.typed").exists()
