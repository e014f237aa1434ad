"""A minute of coverage-guided fuzzing, and proofs that the fuzzer sees what it is to see."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnx_clp
from fuzz import trial
from tests.built import build, save

ROOT = Path(__file__).parents[2]

needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed: pip install .[fuzz]"
)


def fuzz(*options: str, planted: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command; ``planted``: a folder with a `sitecustomize.py`, which Python imports at its start."""
    path = os.pathsep.join(str(folder) for folder in (planted, ROOT) if folder)
    return subprocess.run(
        [sys.executable, "-m", "fuzz", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@pytest.mark.fuzz
@needs_atheris
def test_a_minute_of_fuzzing_finds_nothing(tmp_path: Path) -> None:
    done = fuzz("--seconds", "60", "--findings", str(tmp_path))
    begun = re.search(r"^([\d,]+) seeds", done.stdout)
    tried = re.search(r"^inputs tried: ([\d,]+)$", done.stdout, re.MULTILINE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "findings: 0" in done.stdout
    assert begun
    assert tried
    seeds, inputs = (int(match[1].replace(",", "")) for match in (begun, tried))
    assert seeds > 400
    assert inputs > seeds  # each seed is tried once, and then come the mutations: thousands on a core of its own
    assert not list(tmp_path.iterdir())


FAULTS = """
import os
from onnx_clp.model import file

walk = file.walk

def faulty(source, limits):
    skeleton, layout = walk(source, limits)
    if b"GlobalMaxPool" in skeleton:
        os.abort()
    if b"GlobalAveragePool" in skeleton:
        raise KeyError("planted")
    return skeleton, layout

file.walk = faulty
"""


@pytest.mark.fuzz
@needs_atheris
def test_planted_faults_are_found_kept_and_shown_again(tmp_path: Path) -> None:
    """One that raises, and one that kills the process; after that the fuzzer goes on without the seeds that did it."""
    planted, found = tmp_path / "planted", tmp_path / "found"
    planted.mkdir()
    (planted / "sitecustomize.py").write_text(FAULTS, encoding="utf-8")
    done = fuzz("--seconds", "20", "--findings", str(found), planted=planted)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"exception-\w+: KeyError in open_source \(file.py", done.stdout), done.stdout
    assert re.search(r"crash-\w+: the process ended with -6", done.stdout), done.stdout
    (raised,) = found.glob("exception-*.onnx")
    assert "planted" in raised.with_suffix(".txt").read_text(encoding="utf-8")
    again = fuzz("--replay", str(raised), planted=planted)
    assert again.returncode == 1
    assert "KeyError: 'planted'" in again.stdout
    mended = fuzz("--replay", str(raised))
    assert mended.returncode == 0, mended.stdout


# ---- what a trial sees, in a process of its own: it bounds its memory, leaves its folder, forgets onnxruntime

SMALL = {"LONGEST": 1.0, "LARGEST": 16 << 20, "HARD_STOP": 256 << 20}
"""Limits that are quick to go beyond; the trial of a built model stays within."""


def _raises() -> None:
    raise KeyError("planted")


def _refuses() -> None:
    raise onnx_clp.ModelFileError("planted")


def _is_not_as_planned() -> None:
    raise onnx_clp.VerificationError("planted")


def _warns() -> None:
    warnings.warn("planted", RuntimeWarning, stacklevel=1)


def _divides() -> None:
    np.float64(1) / np.float64(0)


def _computes() -> None:
    end = time.process_time() + 4 * SMALL["LONGEST"]
    while time.process_time() < end:
        pass


def _fills() -> None:
    np.ones(24 << 20, np.uint8)


def _asks_for_too_much() -> None:
    np.ones(1 << 30, np.uint8)


def _changes_the_input() -> None:
    with Path("models/model.onnx").open("r+b") as file:
        file.write(b"\0")


def _leaves_a_file() -> None:
    Path("models/.out.onnx.abcdef.tmp").mkdir()


def _leaves_a_file_elsewhere() -> None:
    Path("core").touch()


def _loses_data() -> None:
    Path("models/data.bin").unlink()


def _leaves_open() -> None:
    os.open("models/model.onnx", os.O_RDONLY)


PLANTED: dict[str, tuple[Callable[[], None], list[str]]] = {
    "nothing": (lambda: None, []),
    "an error of ours": (_refuses, []),
    "an exception": (_raises, ["exception"]),
    "an error of ours that says of a plan that it was wrong": (_is_not_as_planned, ["law"]),
    "a warning": (_warns, ["exception"]),
    "a warning of NumPy": (_divides, ["exception"]),
    "more time": (_computes, ["time"]),
    "more memory": (_fills, ["memory"]),
    "more memory than there is": (_asks_for_too_much, ["exception"]),
    "the input changed": (_changes_the_input, ["files", "files"]),  # its content, and its time
    "a folder left": (_leaves_a_file, ["files"]),
    "a file left elsewhere": (_leaves_a_file_elsewhere, ["files"]),
    "data gone": (_loses_data, ["files"]),
    "a file left open": (_leaves_open, ["law"]),
}
"""What a scan does besides, and the kinds of the findings."""


@contextmanager
def replaced(**attributes: Any) -> Iterator[None]:  # noqa: ANN401  # whatever the module holds
    """The module `fuzz.trial` with some of its names standing for something else."""
    kept = {name: getattr(trial, name) for name in attributes}
    for name, value in attributes.items():
        setattr(trial, name, value)
    yield
    for name, value in kept.items():
        setattr(trial, name, value)


def tried(folder: Path) -> dict[str, list[str]]:
    """The kinds of findings for each planted fault, and for three more that lie in the result."""
    seen: dict[str, list[str]] = {}
    with replaced(**SMALL):
        content = save(build("conv_bn_2d"), folder).read_bytes()
        each = trial.Trial(folder / "scratch", {"data.bin": b"data"})
        each.run(content)  # what is imported late is imported now

        def kinds() -> list[str]:
            return [finding.kind for finding in each.run(content).findings]

        for name, (fault, _) in PLANTED.items():

            def scan(*arguments: Any, fault: Callable[[], None] = fault) -> onnx_clp.ScanReport:  # noqa: ANN401
                report = onnx_clp.scan(*arguments)
                if len(arguments) == 1:  # not of what was written
                    fault()
                return report

            with replaced(scan=scan):
                seen[name] = kinds()
            (folder / "scratch" / "models" / "data.bin").write_bytes(b"data")

        def refuses_the_written(*arguments: Any) -> onnx_clp.ScanReport:  # noqa: ANN401
            if len(arguments) == 2:
                raise onnx_clp.ModelFileError("planted")
            return onnx_clp.scan(*arguments)

        def finds_less(*arguments: Any) -> onnx_clp.ScanReport:  # noqa: ANN401
            return onnx_clp.scan(save(build("folded"), folder) if len(arguments) == 2 else arguments[0])

        with replaced(scan=refuses_the_written):
            seen["refused"] = kinds()
        with replaced(scan=finds_less):
            seen["less"] = kinds()
        with replaced(text_report=_Colours()):
            seen["colours"] = kinds()
        seen["nothing, again"] = kinds()
    return seen


class _Colours:
    """A module whose reports obey the file."""

    @staticmethod
    def render(_: object, *, verbose: bool) -> str:
        return "\x1b[31m" * verbose


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.test_fuzzing", str(tmp_path_factory.mktemp("trial"))],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", PLANTED)
def test_a_trial_sees(name: str, seen: dict[str, list[str]]) -> None:
    assert seen[name] == PLANTED[name][1]


@pytest.mark.parametrize(
    ("name", "kinds"), [("refused", ["law"]), ("less", ["law"]), ("colours", ["exception"]), ("nothing, again", [])]
)
def test_a_trial_sees_in_the_result(name: str, kinds: list[str], seen: dict[str, list[str]]) -> None:
    assert seen[name] == kinds


def test_a_file_without_findings_is_replayed_with_exit_code_0() -> None:
    done = fuzz("--replay", str(ROOT / "examples" / "backdoored.onnx"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sanitize: done" in done.stdout


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as scratch:
        sys.stdout.write(json.dumps(tried(Path(scratch))))
