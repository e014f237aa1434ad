"""The documents show what the tool does: every command and snippet in them is run, every output compared.

Convention: a ```console block holds lines ``$ command``, each followed by its output; a ```sh block is run for its exit
code; a ```python block is run, and a ```text block right after it is what it prints. Each block runs in a new folder
that holds ``examples/``. After a change of the output, ``python tests/test_docs.py`` writes it into the documents.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Final

import numpy as np
import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
README: Final = ROOT / "README.md"
METHOD: Final = ROOT / "docs" / "method.md"
DOCUMENTS: Final = (README, *sorted((ROOT / "docs").glob("*.md")))
MARK: Final = "<!-- test-command -->\n"

BLOCK: Final = re.compile(r"(?ms)(?P<mark>^<!-- test-command -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$")
LINK: Final = re.compile(r"(?<!!)\[[^]]+\]\(([^)\s]+)\)")
ONNX_CLP: Final = f"#!/bin/sh\nexec '{sys.executable}' -m onnx_clp \"$@\"\n"
# Stands in for `python3 -m venv .venv`: no installation needs the network, pip does nothing and onnx-clp is this one.
PYTHON3: Final = """#!/bin/sh
mkdir -p .venv/bin && cp "$(dirname "$0")/onnx-clp" .venv/bin/ && printf '#!/bin/sh\\n' >.venv/bin/pip &&
chmod +x .venv/bin/pip
"""

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="the commands are run by bash")


class Failed(Exception):  # noqa: N818  # what a reader would see, not an error of the test
    """A command of a document that ends with an error."""


def refreshed(document: str) -> str:
    """``document`` with every output in it replaced by the real one. Raises Failed where a block does not run."""
    output: list[str] = []
    end = 0
    printed: str | None = None
    for match in BLOCK.finditer(document):
        language, text = match["language"], match["text"]
        follows = not document[end : match.start()].strip()
        with tempfile.TemporaryDirectory() as name:
            if language == "console":
                text = _console(text, Path(name))
            elif language == "text" and follows and printed is not None:
                text = printed
            elif language == "sh" and not match["mark"]:
                _run(["bash", "-euo", "pipefail", "-c", text], Path(name))
            printed = _run([sys.executable, "-c", text], Path(name)) if language == "python" else None
        output += [document[end : match.start("text")], text, "```"]
        end = match.end()
    return "".join([*output, document[end:]])


def _console(text: str, folder: Path) -> str:
    commands = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
    return "".join(f"$ {command}\n{_run(['bash', '-euc', command], folder)}" for command in commands)


def _run(command: list[str], folder: Path) -> str:
    """Run ``command`` in ``folder``, where ``onnx-clp`` and ``python3`` are at hand; what it says on stdout."""
    tools = folder / "tools"
    if not tools.exists():
        tools.mkdir()
        shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("*.py"))
        for name, script in (("onnx-clp", ONNX_CLP), ("python3", PYTHON3)):
            (tools / name).write_text(script, encoding="utf-8")
            (tools / name).chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "PYTHONUTF8": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise Failed(f"{command[-1]!r} ends with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def anchors(document: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"(?m)^#+ (.+)$", BLOCK.sub("", document))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: str, folder: Path) -> list[str]:
    """The relative links of a ``document`` in ``folder`` that lead nowhere."""
    broken = []
    for link in LINK.findall(BLOCK.sub("", document)):
        path, _, anchor = link.partition("#")
        target = folder / path
        if re.match(r"\w+:", link):
            continue
        text = document if not path else target.read_text(encoding="utf-8") if target.is_file() else ""
        if (path and not target.exists()) or (anchor and anchor not in anchors(text)):
            broken.append(link)
    return broken


@needs_bash
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_snippets_run_and_give_what_the_document_shows(path: Path) -> None:
    document = path.read_text(encoding="utf-8")
    assert refreshed(document) == document


@needs_bash
def test_a_wrong_output_and_a_command_that_fails_are_noticed() -> None:
    document = "```console\n$ onnx-clp scan examples/backdoored.onnx\nno outlier\n```\n"
    assert "z 3.66" in refreshed(document)
    printing = "```python\nprint(6 * 7)\n```\n\n```text\n41\n```\n"
    assert refreshed(printing) == printing.replace("41", "42")
    for block in ("console\n$ onnx-clp scan nope.onnx\n", "sh\nonnx-clp scna x\n", "python\nimport onnx_clpp\n"):
        with pytest.raises(Failed):
            refreshed(f"```{block}```\n")


def test_every_help_is_shown() -> None:
    document = README.read_text(encoding="utf-8")
    for command in ("onnx-clp", "onnx-clp scan", "onnx-clp sanitize"):
        assert f"```console\n$ {command} --help\n" in document


def test_the_test_command_is_where_ci_looks_for_it() -> None:
    document = README.read_text(encoding="utf-8")
    assert document.count(MARK) == 1
    (match,) = (match for match in BLOCK.finditer(document) if match["mark"])
    assert match["language"] == "sh"
    assert "pip install" in match["text"]
    assert match["text"].endswith("pytest\n")
    assert MARK.strip() in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_resolve(path: Path) -> None:
    assert broken_links(path.read_text(encoding="utf-8"), path.parent) == []


def test_broken_links_are_noticed() -> None:
    links = ["nope.md", "README.md#no-such-heading", "#neither"]
    document = "# Here\n" + " ".join(f"[x]({link})" for link in [*links, "README.md#scan", "#here", "https://x.org"])
    assert broken_links(document, ROOT) == links


def test_every_reason_and_status_is_explained() -> None:
    from onnx_clp.judge import Status
    from onnx_clp.sites import Reason

    for path, word in product((README, METHOD), (*Reason, *Status)):
        assert f"`{word.value}` |" in path.read_text(encoding="utf-8"), f"{path.name} has no row for {word.value}"


def _convolution(W: np.ndarray, n: int, stride: int, dilation: int, pad: int) -> np.ndarray:
    """The map of a channel with kernel W (C, k, k) on an n × n image, as a matrix."""
    C, k, _ = W.shape
    size = (n + 2 * pad - dilation * (k - 1) - 1) // stride + 1
    T = np.zeros((size, size, C, n, n))
    for row, column, i, j in product(range(size), range(size), range(k), range(k)):
        y, x = row * stride + i * dilation - pad, column * stride + j * dilation - pad
        if 0 <= y < n and 0 <= x < n:
            T[row, column, :, y, x] += W[:, i, j]
    return T.reshape(size * size, C * n * n)


def test_what_bounds_what() -> None:
    generator = np.random.default_rng(0)
    for C, k, stride, dilation, pad in product((1, 3), (1, 2, 3), (1, 2), (1, 2), (0, 1)):
        W = generator.standard_normal((C, k, k))
        A = W.reshape(C, k * k)
        sigma, frobenius = np.linalg.norm(A, 2), np.linalg.norm(A)
        norm = np.linalg.norm(_convolution(W, 7, stride, dilation, pad), 2)
        # σ_max(A) ≤ ‖A‖_F ≤ ‖T‖ ≤ √K·σ_max(A)
        assert sigma <= frobenius * (1 + 1e-12) <= norm * (1 + 1e-9) <= k * sigma * (1 + 1e-6)
        # A ConvTranspose spreads each x(q): channel k is Σ_c of the adjoints of one-channel convolutions.
        spread = np.hstack([_convolution(W[c : c + 1], 9, stride, 1, 0).T for c in range(C)])
        assert sigma <= np.linalg.norm(spread, 2) * (1 + 1e-9) <= k * sigma * (1 + 1e-6)


def test_the_square_root_of_the_kernel_size_cannot_be_improved() -> None:
    norm = np.linalg.norm(_convolution(np.ones((1, 3, 3)), 21, 1, 1, 1), 2)
    assert 0.98 < norm / (3 * 3) < 1


def test_the_figures_of_the_method() -> None:
    from onnx_clp.judge import judge, largest_possible_z

    for u, n in ((3, 11), (4, 18), (5, 27)):
        assert largest_possible_z(n - 1) <= u < largest_possible_z(n)
        assert f"u = {u}: n ≥ {n}" in METHOD.read_text(encoding="utf-8")
    for spread, factor in ((1e-3, 2.0), (0.1, 2.03), (0.2, 2.11)):
        live = np.tile([1 - spread, 1 + spread], 4000)  # mean 1, standard deviation `spread`
        judgement = judge(np.concatenate([live, np.zeros(2000)]), count_dead=True)
        assert judgement.threshold == pytest.approx(factor, abs=6e-3)
        assert judge(live).threshold == pytest.approx(1 + 3 * spread, rel=1e-3)


def write() -> None:
    """Write the real outputs into the documents."""
    for path in DOCUMENTS:
        path.write_text(refreshed(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write()
