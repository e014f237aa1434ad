"""Nothing of a scanned folder is read but the model and its data, whatever lies there; and nothing goes out.

Three witnesses: Python's audit hook in every process that is started, the kernel (inotify, which sees what onnxruntime
and other code in C opens too), and the tempting files themselves, which leave a mark when they are run.
"""

from __future__ import annotations

import ast
import ctypes
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_clp
from onnx_clp import scan
from tests.cases.net import Net
from tests.test_layers import sources

ROOT = Path(onnx_clp.__file__).parents[1]

MARK = "marked-by-a-tempting-file"

NAMED = f"__import__('pathlib').Path('{MARK}').touch()"
"""Python in a name of the model: nothing compiles it."""

SETTINGS = (
    *("pyproject.toml", "onnx-clp.toml", ".onnx-clp", ".onnx-clp.toml", ".onnx-clpignore", "setup.cfg", "tox.ini"),
    *("onnx_clp.cfg", "onnx_clp.json", ".gitignore", ".env", ".netrc", "matplotlibrc", "MLmodel", "config.json"),
    *(".dvc/config", ".dvc/config.local", ".dvcignore", "w.bin.dvc", "onnxruntime.config", "ort_config.json"),
    *("model.onnx.json", "model.onnx.pkl", "model.onnx.ignore", "model.onnx.profile"),
)

MODULES = (
    *("sitecustomize", "usercustomize", "conftest", "__init__", "__main__", "json", "signal", "click", "numpy", "onnx"),
    *("onnxruntime", "ml_dtypes", "google", "errors", "dataclasses", "matplotlib", "tempfile", "hashlib", "subprocess"),
    *("concurrent", "readline", "encodings"),
)

EARLY = (
    "__future__",
    "typing",
    "enum",
    "re",
    "importlib",
    "warnings",
    "collections",
    "types",
    "contextlib",
    "onnx_clp",
)
"""What ``python -m`` imports before the package can say from where; not so the command."""


def tempting(folder: Path, modules: Iterable[str] = (*MODULES, *EARLY)) -> Path:
    """A folder with a model whose weight lies beside it, amid files that others read or run; the model."""
    folder.mkdir()
    for name in SETTINGS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("u = 0\n[tool.onnx-clp]\nu = 0\n[onnx-clp]\nu = 0\n")
    (folder / "evil.pkl").write_bytes(b"cos\nsystem\n(S'touch " + MARK.encode() + b"'\ntR.")
    (folder / "evil.pth").write_text(f"import pathlib; pathlib.Path('{MARK}').touch()\n")
    for name in modules:
        (folder / f"{name}.py").write_text(f"import posix; posix.open({str(folder.parent / MARK)!r}, 66)\n")
    net = Net()
    weight = net.tensor(net.kernel(16, 3, 3, 3), "weight")
    net.tail(net.conv(net.feed(1, 3, 8, 8), weight, net.vector(16), name=NAMED, pads=[1] * 4), 16)
    net.metadata = [("onnx_clp.u", "0"), ("onnx_clp.ignore", NAMED), (NAMED, NAMED)]
    proto = net.initializers[0]
    (folder / "w.bin").write_bytes(proto.raw_data)
    proto.ClearField("raw_data")
    proto.data_location = onnx.TensorProto.EXTERNAL
    proto.external_data.add(key="location", value="w.bin")
    model = net.case("model").model
    model.doc_string = model.graph.doc_string = model.graph.node[0].doc_string = NAMED
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


# ---- the witnesses

AUDIT = """
import os, sys
log = os.open(os.environ["AUDIT_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def hook(event, arguments):
    kind = event.partition(".")[0]
    if event in {"exec", "compile"}:
        code = arguments[0]
        name = getattr(code, "co_filename", None) or arguments[-1]
        shown = [str(name), MARK in repr(code) if event == "compile" else MARK in repr(code.co_names + code.co_consts)]
    elif event == "import":
        shown = [arguments[1] or "<none>", arguments[0], [part for part in arguments[2] or () if isinstance(part, str)]]
    elif event in {"open", "os.listdir", "os.scandir"} or kind in {"socket", "pickle", "subprocess", "urllib", "http",
            "ftplib", "smtplib", "webbrowser"} or event in {"os.system", "os.exec", "os.posix_spawn", "os.fork"}:
        shown = [os.fsdecode(part) if isinstance(part, bytes) else part if isinstance(part, (str, int)) else repr(part)
            for part in arguments]
    else:
        return
    os.write(log, (repr((event, os.getcwd(), shown)) + chr(10)).encode("utf-8", "backslashreplace"))
MARK = {mark!r}
sys.addaudithook(hook)
"""

IN_OPEN, IN_ISDIR, IN_Q_OVERFLOW = 0x20, 0x40000000, 0x4000


@contextmanager
def opened_in(folder: Path) -> Iterator[set[str]]:
    """The names of the files in a folder and the folders below it that anybody opens meanwhile, as the kernel says."""
    library = ctypes.CDLL(None, use_errno=True)
    watch = library.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert watch >= 0
    found: set[str] = set()
    for below in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        assert library.inotify_add_watch(watch, os.fsencode(below), IN_OPEN) >= 0
    try:
        yield found
        while True:
            try:
                events = os.read(watch, 1 << 20)
            except BlockingIOError:
                break
            while events:
                _, mask, _, length = struct.unpack_from("iIII", events)
                assert not mask & IN_Q_OVERFLOW
                if not mask & IN_ISDIR:
                    found.add(os.fsdecode(events[16 : 16 + length].rstrip(b"\0")))
                events = events[16 + length :]
    finally:
        os.close(watch)


def complaints(log: Path, folder: Path, allowed: Callable[[str], bool]) -> list[str]:
    """What the processes did, by their audit log, and should not have."""
    found = []
    started = False
    for line in log.read_text(encoding="utf-8").splitlines():
        event, working, arguments = ast.literal_eval(line)
        inside = [_inside(part, working, folder) for part in arguments]
        started |= event == "import" and arguments[1] == "onnx_clp.cli"
        if event == "open":
            wrong = not allowed(inside[0])
        elif event in {"exec", "compile"}:
            wrong = bool(inside[0]) or arguments[1]
        elif event == "import":
            wrong = bool(inside[0]) or (started and any(_inside(part, working, folder) for part in arguments[2]))
        elif event == "subprocess.Popen":
            wrong = not _is_this_python(arguments[0])
        else:
            wrong = event not in {"os.listdir", "os.scandir", "os.fork", "os.posix_spawn"}
        if wrong:
            found.append(line)
    return found


def _is_this_python(program: str) -> bool:
    """Whether it is the interpreter of these tests, whose environment may hold it under several names."""
    bare = Path(sys.executable)
    return Path(program).parent == bare.parent and Path(program).samefile(bare)


def _inside(path: object, working: str, folder: Path) -> str:
    """The path from the folder, if it is one and lies there."""
    if not isinstance(path, str) or path.startswith("<"):
        return ""
    whole = Path(os.path.normpath(os.path.join(working, path)))  # noqa: PTH118  # it may be absolute or not
    return whole.relative_to(folder).as_posix() if whole.is_relative_to(folder) else ""


def watched(
    folder: Path, arguments: list[str], allowed: Callable[[str], bool]
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """What a command that is run in a folder gave, and what it did that it should not."""
    place = folder.parent
    log, hook = place / "audit.log", place / "hook" / "sitecustomize.py"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(AUDIT.replace("{mark!r}", repr(MARK)))
    log.write_text("")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))},
        "PYTHONPATH": f"{hook.parent}{os.pathsep}{ROOT}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "AUDIT_LOG": str(log),
    }
    with opened_in(folder) as opened:
        result = subprocess.run(
            arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
    wrong = complaints(log, folder, allowed)
    assert "open" in log.read_text(encoding="utf-8"), "the hook was not there"
    wrong += [f"the kernel saw {name} opened" for name in sorted(opened) if not allowed(name)]
    marks = list(place.rglob(MARK))
    return result, wrong + [f"{mark} was left" for mark in marks]


def of_a_scan(name: str) -> bool:
    """What a scan may open in the folder, and the folder itself."""
    return name in {"", ".", "model.onnx", "w.bin"}


def of_a_rewrite(name: str) -> bool:
    """What writing out.onnx may open besides: the folder that it is made in, and what was made."""
    head = name.split("/", maxsplit=1)[0]
    return of_a_scan(name) or name in {"out.onnx", "out.w.bin"} or head.startswith(".onnx-clp-")


def as_module() -> list[str]:
    return [sys.executable, "-m", "onnx_clp"]


def as_command() -> list[str]:
    command = Path(sys.executable).with_name("onnx-clp")
    if not command.exists():
        pytest.skip("the package is not installed")
    return [str(command)]


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")


@pytest.mark.parametrize("start", [as_module, as_command])
@pytest.mark.parametrize("path", ["model.onnx", "."])
def test_a_scan_reads_nothing_but_the_model_and_its_data(
    start: Callable[[], list[str]], path: str, tmp_path: Path
) -> None:
    model = tempting(tmp_path / "folder", MODULES if start is as_module else (*MODULES, *EARLY))
    (expected,) = scan(model).layers
    result, wrong = watched(model.parent, [*start(), "scan", "--format", "json", path], of_a_scan)
    assert wrong == []
    assert result.returncode == 0, result.stderr
    (entry,) = json.loads(result.stdout)["files"]
    (layer,) = entry["report"]["layers"]
    assert entry["report"]["u"] == 3
    assert [channel["index"] for channel in layer["flagged"]] == [channel.index for channel in expected.flagged] == [5]


@pytest.mark.parametrize("start", [as_module, as_command])
def test_a_rewrite_reads_nothing_but_the_model_and_its_data(start: Callable[[], list[str]], tmp_path: Path) -> None:
    model = tempting(tmp_path / "folder", MODULES if start is as_module else (*MODULES, *EARLY))
    before = {path: path.read_bytes() for path in model.parent.rglob("*") if path.is_file()}
    result, wrong = watched(model.parent, [*start(), "sanitize", "model.onnx", "out.onnx"], of_a_rewrite)
    assert wrong == []
    assert result.returncode == 0, result.stderr
    assert "onnxruntime" in result.stdout
    after = {path: path.read_bytes() for path in model.parent.rglob("*") if path.is_file()}
    assert after.keys() - before.keys() == {model.with_name("out.onnx"), model.with_name("out.w.bin")}
    assert {path: after[path] for path in before} == before


def test_the_library_reads_nothing_but_the_model_and_its_data(tmp_path: Path) -> None:
    """In a program that lies elsewhere, as a service does."""
    model = tempting(tmp_path / "folder")
    program = tmp_path / "program" / "main.py"
    program.parent.mkdir()
    program.write_text("import onnx_clp; onnx_clp.scan('model.onnx'); onnx_clp.sanitize('model.onnx', 'out.onnx')")
    result, wrong = watched(model.parent, [sys.executable, str(program)], of_a_rewrite)
    assert (wrong, result.returncode, result.stderr) == ([], 0, "")


DEEDS = {
    "opens a setting": ("open('pyproject.toml').read()", "pyproject.toml"),
    "lists it in C": ("import ctypes; ctypes.CDLL(None).open(b'setup.cfg', 0)", "the kernel saw setup.cfg"),
    "imports from there": ("import sys; sys.path.insert(0, ''); import errors", "errors.py"),
    "makes a socket": ("import socket; socket.socket()", "socket"),
    "asks for an address": ("import socket; socket.getaddrinfo('localhost', 80)", "socket"),
    "runs a command": ("import subprocess; subprocess.run(['true'])", "subprocess"),
    "runs a shell": ("import os; os.system('true')", "os.system"),
    "runs a pickle": ("import pickle; pickle.load(open('evil.pkl', 'rb'))", "pickle.find_class"),
    "compiles a name": (f"compile({NAMED!r}, 'x', 'eval')", "compile"),
    "runs a file": ("import runpy; runpy.run_path('json.py')", "was left"),
}


@pytest.mark.parametrize("deed", DEEDS)
def test_the_witnesses_see_what_they_should(deed: str, tmp_path: Path) -> None:
    model = tempting(tmp_path / "folder")
    program = tmp_path / "program" / "main.py"
    program.parent.mkdir()
    code, word = DEEDS[deed]
    program.write_text(code)
    _, wrong = watched(model.parent, [sys.executable, str(program)], of_a_scan)
    assert [complaint for complaint in wrong if word in complaint]


# ---- python -m, which puts the working folder first


@pytest.mark.parametrize("options", [["-m", "onnx_clp"], ["-Bm", "onnx_clp"], ["-monnx_clp"], ["-P", "-m", "onnx_clp"]])
def test_python_m_runs_nothing_of_the_working_folder(options: list[str], tmp_path: Path) -> None:
    model = tempting(tmp_path / "folder", (*MODULES, *EARLY) if "-P" in options else MODULES)
    result, wrong = watched(model.parent, [sys.executable, *options, "--version"], of_a_scan)
    assert (wrong, result.returncode) == ([], 0)
    assert result.stdout.startswith("onnx-clp ")


def test_python_m_runs_from_a_checkout_too(tmp_path: Path) -> None:
    """Where the package itself lies in the working folder and nowhere else."""
    shutil.copytree(ROOT / "onnx_clp", tmp_path / "onnx_clp", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "json.py").write_text("raise SystemExit('json.py of the working folder')")
    model = tempting(tmp_path / "folder")
    found = subprocess.run(
        [sys.executable, "-m", "onnx_clp", "scan", str(model)],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stderr) == (0, "")


# ---- what the package could do at all

IMPORTS = frozenset(
    {
        *("asyncio", "cffi", "code", "codeop", "ctypes", "dbm", "dill", "ftplib", "http", "imp", "marshal", "yaml"),
        *("multiprocessing", "nntplib", "pickle", "poplib", "requests", "runpy", "shelve", "smtplib", "socket", "ssl"),
        *("socketserver", "subprocess", "telnetlib", "urllib", "urllib3", "webbrowser", "xmlrpc"),
    }
)
"""Modules that run what they read, start programs or speak to others."""

CALLS = frozenset({"eval", "exec", "compile", "__import__", "breakpoint", "input"})

METHODS = frozenset({"system", "popen", "fork", "forkpty", "posix_spawn", "posix_spawnp", "startfile"})
"""Of os."""

ALLOWED = {
    ("evaluation.unpickle", "pickle"): "its unpickler in Python, which is kept from naming anything",
    ("runtime", "subprocess"): "onnxruntime is run in a process of its own",
}


def suspicions(modules: Mapping[str, str]) -> list[str]:
    """What the source could run, start or speak to."""
    found = []
    for module, source in modules.items():
        for node in ast.walk(ast.parse(source)):
            names = []
            if isinstance(node, ast.Import):
                names = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            roots = {name.partition(".")[0] for name in names}
            found += [f"{module} imports {root}" for root in sorted(roots & IMPORTS) if (module, root) not in ALLOWED]
            if isinstance(node, ast.Name) and node.id in CALLS:
                found.append(f"{module} names {node.id}")
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                whole = f"{node.value.id}.{node.attr}"
                run = node.value.id == "os" and (node.attr in METHODS or node.attr.startswith(("exec", "spawn")))
                if run or whole in {"onnx.load", "onnx.load_model", "builtins.eval", "builtins.exec", "np.memmap"}:
                    found.append(f"{module} names {whole}")
            off = isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant) and node.value.value is False
            if isinstance(node, ast.keyword) and node.arg in {"allow_pickle", "shell"} and not off:
                found.append(f"{module} says {node.arg}")
    return found


def test_the_package_runs_nothing_it_reads_and_speaks_to_nobody() -> None:
    assert suspicions(sources()) == []


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("import pickle", "analysis imports pickle"),
        ("def f():\n    from urllib.request import urlopen", "analysis imports urllib"),
        ("import http.client as c", "analysis imports http"),
        ("import subprocess", "analysis imports subprocess"),
        ("eval('1')", "analysis names eval"),
        ("run = exec", "analysis names exec"),
        ("__import__('os')", "analysis names __import__"),
        ("import os\nos.system('true')", "analysis names os.system"),
        ("import os\nos.execvp('true', [])", "analysis names os.execvp"),
        ("np.load(path, allow_pickle=True)", "analysis says allow_pickle"),
        ("onnx.load(path)", "analysis names onnx.load"),
    ],
)
def test_what_could_run_something_is_seen(source: str, complaint: str) -> None:
    assert suspicions({**sources(), "analysis": source}) == [complaint]


def test_the_exceptions_are_needed() -> None:
    assert "import pickle" in sources()["evaluation.unpickle"]
    assert suspicions({"elsewhere": sources()["evaluation.unpickle"]}) == ["elsewhere imports pickle"]


def test_numpy_reads_no_pickle_by_default(tmp_path: Path) -> None:
    """What the package leaves out, allow_pickle, is off."""
    np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="pickle"):
        np.load(tmp_path / "a.npy")
