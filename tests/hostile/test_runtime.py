"""Models made to crash, hang or fill onnxruntime: whoever asked it goes on, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import onnx_clp
from onnx_clp import Limits, SanitizeReport, VerificationError, runtime, sanitize
from onnx_clp.evaluation import providers
from onnx_clp.limits import DEFAULT_LIMITS
from onnx_clp.trial import NO_TELEMETRY
from tests.built import build, save
from tests.cases.net import Net

ROOT = Path(onnx_clp.__file__).parents[1]
HUNG = 120
"""Seconds after which a process counts as hanging."""


def net() -> Net:
    """Conv → Relu, and a second output for whatever is to go wrong; channel 5 of the Conv is silenced."""
    made = Net()
    x = made.feed(1, 3, 8, 8)
    made.tail(made.conv(x, made.kernel(16, 3, 3, 3), made.vector(16)), 16)
    return made


def body() -> onnx.GraphProto:
    """The body of a Loop that goes on and carries one value."""
    values = {
        name: helper.make_tensor_value_info(name, kind, None if kind == TensorProto.FLOAT else [])
        for name, kind in (
            ("i", TensorProto.INT64),
            ("go", TensorProto.BOOL),
            ("v", TensorProto.FLOAT),
            ("go_out", TensorProto.BOOL),
            ("v_out", TensorProto.FLOAT),
        )
    }
    given, made = [[*values.values()][part] for part in (slice(3), slice(3, 5))]
    nodes = [helper.make_node("Identity", ["go"], ["go_out"]), helper.make_node("Identity", ["v"], ["v_out"])]
    return helper.make_graph(nodes, "body", given, made)


def endless(made: Net) -> None:
    """A Loop of 2^62 rounds."""
    rounds = made.tensor(np.int64(1 << 62), "rounds")
    made.give(made.op("Loop", rounds, "", "x", name="loop", body=body()))


def omitted(made: Net) -> None:
    """A Loop whose carried value nobody asks for, which onnxruntime 1.32 follows into nowhere."""
    rounds = made.tensor(np.int64(3), "rounds")
    made.nodes.append(helper.make_node("Loop", [rounds, "", "x"], [""], name="loop", body=body()))


def inverted(made: Net) -> None:
    """A RoiAlign of boxes that end before they begin."""
    boxes = made.tensor(np.array([[1e9, 1e9, -1e9, -1e9]], np.float32), "boxes")
    made.give(made.op("RoiAlign", "x", boxes, made.integers(0, name="batch"), name="align", output_height=2))


def huge(made: Net) -> None:
    """A constant of 2^36 zeros."""
    made.give(made.op("ConstantOfShape", made.integers(1 << 36, name="shape"), name="zeros"))


def many(made: Net) -> None:
    """Eight constants of 2^30 bytes, all wanted at once."""
    shape = made.integers(1 << 28, name="shape")
    made.give(made.op("Sum", *(made.op("ConstantOfShape", shape, name=f"zeros_{i}") for i in range(8)), name="sum"))


def written(change: Callable[[Net], None], folder: Path) -> Path:
    made = net()
    change(made)
    made.not_run = "it does harm"
    return save(made.case("model"), folder)


def check(report: SanitizeReport, name: str) -> tuple[bool | None, str]:
    (found,) = (part for part in report.checks if part.name == name)
    return found.passed, found.detail


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- what onnxruntime itself does


@pytest.mark.parametrize("change", [omitted, inverted])
def test_a_model_that_crashes_onnxruntime_or_does_not_run_is_said_to(
    change: Callable[[Net], None], tmp_path: Path
) -> None:
    """An onnxruntime that was mended may refuse it or run it; none is asked in this process."""
    report = sanitize(written(change, tmp_path), tmp_path / "out.onnx")
    assert report.written
    assert check(report, "onnxruntime-load")[0] is True
    passed, detail = check(report, "onnxruntime-run")
    assert passed or "crashed on it (signal" in detail or "does not run it" in detail
    assert names(tmp_path) == ["model.onnx", "out.onnx"]


def test_an_endless_model_is_ended_and_nothing_of_it_is_left(tmp_path: Path) -> None:
    report = sanitize(written(endless, tmp_path), tmp_path / "out.onnx", limits=Limits(seconds=4))
    # A machine on which loading alone takes so long says the same of loading.
    said = [detail for name in ("onnxruntime-load", "onnxruntime-run") for _, detail in [check_or_none(report, name)]]
    assert any("did not finish in 4 s" in detail and "--limit seconds=8" in detail for detail in said)
    assert not any(part.passed for part in report.checks if part.name == "onnxruntime-run")
    assert names(tmp_path) == ["model.onnx", "out.onnx"]
    assert children() == []


def check_or_none(report: SanitizeReport, name: str) -> tuple[bool | None, str]:
    return next(((part.passed, part.detail) for part in report.checks if part.name == name), (None, ""))


@pytest.mark.parametrize("change", [huge, many])
def test_a_model_that_takes_all_memory_is_stopped(change: Callable[[Net], None], tmp_path: Path) -> None:
    report = sanitize(written(change, tmp_path), tmp_path / "out.onnx", limits=Limits(memory=1 << 26))
    passed, detail = check(report, "onnxruntime-run")
    assert passed is None
    # 1 GiB for the programs, 8 times 64 MiB, and 8 bytes for each on disk.
    assert "needs more than the 1,536 MiB it is given" in detail
    assert f"--limit memory={1 << 27}" in detail
    assert names(tmp_path) == ["model.onnx", "out.onnx"]


def test_a_model_whose_weights_are_large_has_the_memory_it_needs(tmp_path: Path) -> None:
    """64 MiB of weights pay for what loading and running them takes, where the limit itself pays for nothing."""
    made = net()
    weights = made.tensor(np.zeros((4096, 4096), np.float32), "weights")
    made.give(made.op("MatMul", made.tensor(np.ones((1, 4096), np.float32), "ones"), weights, name="product"))
    source = save(made.case("model"), tmp_path)
    report = sanitize(source, tmp_path / "out.onnx", limits=Limits(memory=1))
    assert check(report, "onnxruntime-run")[0] is True


def test_an_output_that_is_not_what_was_silenced_is_no_pass(tmp_path: Path) -> None:
    source = save(build("folded"), tmp_path)
    for value, axis, channel in (("conv.out", 1, 999), ("conv.out", 9, 0)):
        observed = [runtime.Observed(value, axis, (channel,), (0.0,))]
        answer = runtime.examine(source, source, observed, {}, source.stat().st_size, DEFAULT_LIMITS).run
        assert answer is not None
        assert (answer.kind, "has not the channels" in answer.message) == ("not-run", True)


# ---- what a stand-in does, where it must do one thing exactly

STAND_IN = """
import os, resource, signal, subprocess, sys
calls = [os.environ.get("ORT_DISABLE_TELEMETRY")]
def disable_telemetry_events():
    calls.append("no telemetry")
class SessionOptions: pass
class GraphOptimizationLevel:
    ORT_DISABLE_ALL = 0
class Given:
    name, shape, type = "x", [1, 3, 8, 8], "tensor(float)"
class InferenceSession:
    def __init__(self, path, options, **_):
        name = os.path.basename(path)
        original, probe = name == "model.onnx", name.startswith("probe-")
        calls.append(name)
{load}
    def get_inputs(self):
        return [Given]
    def run(self, names, feed):
        import numpy
{run}
        return [numpy.zeros((1, 16, 8, 8), numpy.float32) for _ in names]
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts an onnxruntime in the place of the real one, for the process that is started."""

    def put(load: str = "pass", run: str = "pass") -> None:
        folder = tmp_path / "stand_in" / "onnxruntime"
        folder.mkdir(parents=True)
        parts = {name: textwrap.indent(code, " " * 8) for name, code in (("load", load), ("run", run))}
        (folder / "__init__.py").write_text(STAND_IN.format(**parts))
        monkeypatch.syspath_prepend(folder.parent)

    return put


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model, model.onnx."""
    folder = tmp_path / "place"
    folder.mkdir()
    save(net().case("model"), folder)
    return folder


def test_a_stand_in_that_does_no_harm_passes(stand_in: Callable[..., None], place: Path) -> None:
    """Or the tests below would show nothing."""
    stand_in()
    report = sanitize(place / "model.onnx", place / "out.onnx")
    assert [part.passed for part in report.checks if part.name != "probes"] == [True] * 5


def test_a_crash_while_running_is_no_pass(stand_in: Callable[..., None], place: Path) -> None:
    stand_in(run="os.abort()")
    report = sanitize(place / "model.onnx", place / "out.onnx")
    assert check(report, "onnxruntime-load")[0] is True
    assert check(report, "onnxruntime-run") == (None, f"onnxruntime crashed on it (signal {signal.SIGABRT:d})")
    assert names(place) == ["model.onnx", "out.onnx"]


def test_a_written_file_that_crashes_onnxruntime_where_the_input_does_not_is_removed(
    stand_in: Callable[..., None], place: Path
) -> None:
    stand_in(load="if not original: os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(VerificationError, match=r"crashed on it \(signal 11\): on the written file, and not on the in"):
        sanitize(place / "model.onnx", place / "out.onnx")
    assert names(place) == ["model.onnx"]


def test_a_written_file_that_is_refused_where_the_input_is_not_is_removed(
    stand_in: Callable[..., None], place: Path
) -> None:
    stand_in(load="if not original: raise RuntimeError('never heard of it')")
    with pytest.raises(VerificationError, match="does not load the written file: never heard of it"):
        sanitize(place / "model.onnx", place / "out.onnx")
    assert names(place) == ["model.onnx"]


@pytest.mark.parametrize(
    ("load", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "crashed on it (signal 11); on the input: onnxruntime crashed on it"),
        ("raise RuntimeError('no')", "does not load the input either: no"),
        ("if original: os.abort()\nraise RuntimeError('no')", "not load the input either: onnxruntime crashed on it"),
        ("if original: raise RuntimeError('no')\nos.abort()", "crashed on it (signal 6); on the input: no"),
        ("raise MemoryError", "needs more than the"),
        ("sys.stderr.write('terminate called: std::bad_alloc'); sys.stderr.flush(); os.abort()", "needs more than the"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "ended from outside (signal 9)"),
        ("os._exit(3)", "ended with code 3"),
    ],
)
def test_a_load_that_tells_nothing_of_the_rewrite_is_no_pass_and_no_failure(
    load: str, said: str, stand_in: Callable[..., None], place: Path
) -> None:
    stand_in(load=load)
    report = sanitize(place / "model.onnx", place / "out.onnx")
    passed, detail = check(report, "onnxruntime-load")
    assert passed is None
    assert said in detail
    assert [part.name for part in report.checks if part.name == "onnxruntime-run"] == []


def test_a_load_that_never_ends_is_ended(stand_in: Callable[..., None], place: Path) -> None:
    stand_in(load="signal.pause()")
    report = sanitize(place / "model.onnx", place / "out.onnx", limits=Limits(seconds=1))
    passed, detail = check(report, "onnxruntime-load")
    assert passed is None
    assert detail == "onnxruntime did not finish in 1 s: more is given with --limit seconds=2"
    assert children() == []


def test_the_process_ends_itself_where_nobody_is_left_to_end_it(stand_in: Callable[..., None], place: Path) -> None:
    stand_in(load="raise RuntimeError(str(signal.alarm(0)))")
    answer = examined(place, Limits(seconds=1000))
    assert 1000 < int(answer.message) <= 1005


def examined(place: Path, limits: Limits = DEFAULT_LIMITS) -> runtime.Answer:
    source = place / "model.onnx"
    return runtime.examine(source, source, [], {}, 1 << 20, limits).load


def test_the_process_may_do_little(stand_in: Callable[..., None], place: Path) -> None:
    """No core dump, so much address space and no more, no large files, no input, and it works in no folder of users."""
    stand_in(
        load="""
import json
limits = [resource.getrlimit(getattr(resource, "RLIMIT_" + name))[1] for name in ("CORE", "FSIZE", "AS")]
raise RuntimeError(json.dumps([limits, sys.stdin.read(), os.getcwd()]))
"""
    )
    limits, stdin, folder = json.loads(examined(place, Limits(memory=1000)).message)
    assert limits == [0, 1 << 20, (1 << 30) + 8 * (1 << 20) + 8 * 1000]
    assert (stdin, folder) == ("", "/")


def test_there_is_no_telemetry(stand_in: Callable[..., None], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr("onnxruntime.disable_telemetry_events", lambda: called.append("no telemetry"))
    providers.onnxruntime()
    assert called == ["no telemetry"]
    monkeypatch.delenv(NO_TELEMETRY)
    stand_in(load="raise RuntimeError(repr(calls))")
    assert examined(place).message == "['1', 'no telemetry', 'model.onnx']"


@pytest.mark.parametrize("evaluated", [False, True])
def test_onnxruntime_leaves_no_identifier_of_the_machine(place: Path, *, evaluated: bool) -> None:
    """Official builds from 1.30 on leave one in the cache of the user, and a session in TMPDIR, as soon as imported."""
    home = place.parent / "home"
    home.mkdir()
    code = (
        "from onnx_clp.evaluation.providers import version; version()"
        if evaluated
        else "from onnx_clp import sanitize; print(sanitize('model.onnx', 'out.onnx').checks[-1].passed)"
    )
    quiet = {NO_TELEMETRY, "CI", "GITHUB_ACTIONS", "GITLAB_CI", "CIRCLECI", "XDG_CACHE_HOME"}
    environment = {name: value for name, value in os.environ.items() if name not in quiet}
    environment |= {"HOME": str(home), "TMPDIR": str(home), "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HUNG,
        check=False,
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "" if evaluated else "True\n", "")
    assert list(home.rglob("*")) == []


def test_what_anyone_prints_is_no_answer(stand_in: Callable[..., None], place: Path) -> None:
    lie = json.dumps({"step": "run", "kind": "fine", "message": "", "hint": ""}) + "\n"
    stand_in(run=f"os.write(1, {lie.encode()!r}); print({lie!r}, flush=True); os.abort()")
    report = sanitize(place / "model.onnx", place / "out.onnx")
    assert check(report, "onnxruntime-run")[0] is None
    assert "crashed" in check(report, "onnxruntime-run")[1]


def test_a_flood_of_words_fills_nothing(stand_in: Callable[..., None], place: Path) -> None:
    stand_in(
        run="""
for descriptor in (1, 2):
    try:
        for _ in range(100):
            os.write(descriptor, bytes(1 << 20))
    except OSError:  # File too large
        pass
"""
    )
    report = sanitize(place / "model.onnx", place / "out.onnx")
    assert check(report, "onnxruntime-run")[0] is True


def test_an_onnxruntime_that_cannot_be_imported_is_said_to(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libcrypt.so.9: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    report = sanitize(place / "model.onnx", place / "out.onnx")
    passed, detail = check(report, "onnxruntime-load")
    assert passed is None
    assert detail == "onnxruntime cannot be imported: libcrypt.so.9: cannot open shared object file"


def test_where_there_is_no_onnxruntime_no_process_is_started(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "available", lambda: False)
    monkeypatch.setattr(subprocess, "Popen", None)
    assert check(sanitize(place / "model.onnx", place / "out.onnx"), "onnxruntime-load")[0] is None


# ---- from where the process imports


def strangers_modules(folder: Path, mark: Path) -> None:
    """Modules under the names of those that the process imports, which leave a mark where they are."""
    for name in ("json", "os", "signal", "resource", "encodings", "site", "sitecustomize", "numpy", "onnxruntime"):
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'a').write({name!r})\n")
    (folder / "onnx_clp").mkdir(exist_ok=True)
    (folder / "onnx_clp" / "__init__.py").write_text(f"open({str(mark)!r}, 'a').write('onnx_clp')\n")


@pytest.mark.parametrize("entries", [["FOLDER"], ["", "FOLDER"], [".", "FOLDER"], ["place", "FOLDER", "FOLDER/"]])
def test_nothing_is_imported_from_the_current_folder_or_that_of_the_model(
    entries: list[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = place.parent / "mark"
    strangers_modules(place, mark)
    monkeypatch.chdir(place)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", str(place)]))
    path = [entry.replace("FOLDER", str(place)) for entry in entries]
    monkeypatch.setattr(sys, "path", [*path, *sys.path])
    report = sanitize("model.onnx", "out.onnx")
    assert [part.passed for part in report.checks] == [True] * 6
    assert not mark.exists(), mark.read_text()


def command(*arguments: str | Path, cwd: Path, python: tuple[str, ...] = ("-m", "onnx_clp")) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.Popen(
        [sys.executable, *python, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_checkout_asks_onnxruntime_too(place: Path) -> None:
    with command("sanitize", place / "model.onnx", place / "out.onnx", cwd=ROOT) as process:
        out, err = process.communicate(timeout=HUNG)
    assert (process.returncode, err) == (0, "")
    assert "onnxruntime-run: silenced channels found silent on random input: 1" in out


def test_a_script_without_a_main_guard_runs_once(place: Path) -> None:
    script = place.parent / "script.py"
    script.write_text(
        f"import sys; sys.path.append({str(ROOT)!r}); print('once')\n"
        f"import onnx_clp\nreport = onnx_clp.sanitize('model.onnx', 'out.onnx')\nprint(report.checks[-1].passed)\n"
    )
    with command(script, cwd=place, python=()) as process:
        out, err = process.communicate(timeout=HUNG)
    assert (process.returncode, out, err) == (0, "once\nTrue\n", "")


# ---- interrupted


def children(parent: int | None = None) -> list[int]:
    """The processes that were started by one and have not been waited for."""
    return [
        int(word)
        for word in Path(f"/proc/{parent or os.getpid()}/task/{parent or os.getpid()}/children").read_text().split()
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_process_and_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    source = written(endless, tmp_path)
    with command("sanitize", source, tmp_path / "out.onnx", cwd=ROOT) as process:
        started: list[int] = []
        deadline = time.monotonic() + HUNG
        while not started and time.monotonic() < deadline:
            started = [child for child in children(process.pid) if b"trial.py" in command_line(child)]
            time.sleep(0.05)
        time.sleep(0.5)  # into the Loop; that it is not there yet makes no other end
        process.send_signal(number)
        _, err = process.communicate(timeout=HUNG)
    assert started
    assert process.returncode == 130
    assert "interrupted" in err
    assert names(tmp_path) == ["model.onnx"]
    assert not any(Path(f"/proc/{child}").exists() for child in started)


def command_line(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:  # it has ended
        return b""
