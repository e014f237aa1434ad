"""One input through open → scan → sanitize, and the laws that it must hold.

* Nothing comes out but a report or an OnnxClpError; a warning is an error.
* A scan, and a rewrite, takes at most LONGEST seconds of a processor; the input takes at most LARGEST bytes of memory.
* The input and its data are what they were; beside them lie the files that a rewrite says it wrote, and nothing else.
* What a rewrite plans passes its own verification, and what was written can be scanned.
* Reports can be printed, and hold no control character but the newline.
* No file is left open.
"""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import signal
import time
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final, TypeVar

from onnx_clp import OnnxClpError, ScanReport, VerificationError, runtime, sanitize, scan
from onnx_clp.report import json as json_report
from onnx_clp.report import text as text_report
from onnx_clp.report.outcome import Outcome as Reported

LONGEST: Final = 5
"""Seconds of a processor that one scan or one rewrite may take. Not of the clock: a busy machine is no finding."""

LARGEST: Final = 512 << 20
"""Bytes of memory that one input may take, beyond what the process had before the first."""

HARD_STOP: Final = 1 << 30
"""Bytes of address space that the process may take beyond what it has: further ones give a MemoryError, a finding."""

U: Final = 1.0
"""Low, so that nearly every layer has an outlier for the rewrite to silence."""

Files = dict[str, tuple[int, int, int]]
Result = TypeVar("Result")


class OverTimeError(BaseException):
    """Raised where LONGEST seconds have passed. No Exception: nobody may catch it on the way."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A law that an input broke.

    Attributes:
        kind: ``exception``, ``time``, ``memory``, ``files``, ``law`` or ``crash``.
        summary: One line: what was seen, and where.
        detail: A traceback, or what there is to say.
    """

    kind: str
    summary: str
    detail: str

    @property
    def name(self) -> str:
        """The same for findings that are likely the same fault; fit for a file name."""
        return f"{self.kind}-{hashlib.sha256(self.summary.encode()).hexdigest()[:10]}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one input did.

    Attributes:
        findings: The laws it broke.
        ended: How each step ended, in a few words.
        seconds: Of a processor, of the slowest step.
        memory: Bytes at the highest, beyond what the process had before the first input.
    """

    findings: tuple[Finding, ...]
    ended: tuple[str, ...]
    seconds: float
    memory: int


class Trial:
    """A scratch folder with the data files of the seeds, in which inputs are tried one after the other."""

    def __init__(self, folder: Path, data: Mapping[str, bytes]) -> None:
        """Fill ``folder``, which must be new; the process works in it and takes at most HARD_STOP more memory."""
        self.root = folder
        self.inner = folder / "models"
        self.path = self.inner / "model.onnx"
        self.out = self.inner / "out.onnx"
        for name, content in data.items():
            (self.inner / name).parent.mkdir(parents=True, exist_ok=True)
            (self.inner / name).write_bytes(content)
        self.inner.mkdir(exist_ok=True)
        self.path.write_bytes(b"")
        os.chdir(folder)  # what is written to no particular folder is seen, too
        runtime.available = _never  # as if onnxruntime was not installed: it is not what is tried here
        signal.signal(signal.SIGPROF, _over_time)
        resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + HARD_STOP, resource.RLIM_INFINITY))
        self._known = self._files()
        self._base = _status("VmRSS")

    def run(self, content: bytes) -> Outcome:
        """Try one input."""
        self.path.write_bytes(content)
        before, descriptors = self._files(), _descriptors()
        _forget_highest()
        steps = _Steps()
        allowed = self._steps(steps)
        memory = max(0, _status("VmHWM") - self._base)
        if memory > LARGEST:
            steps.find("memory", f"an input took more than {LARGEST >> 20} MB", f"{memory >> 20} MB")
        if not steps.cut_short:
            for finding in self._left(before, allowed, content):
                steps.find("files", finding, "")
            if _descriptors() != descriptors:
                steps.find("law", "a file is left open", "")
        self._clean()
        return Outcome(tuple(steps.findings), tuple(steps.ended), steps.slowest, memory)

    def _steps(self, steps: _Steps) -> set[str]:
        """Scan, plan, rewrite, scan again; the files that may be there afterwards."""
        report = steps.take("scan", lambda: scan(self.path))
        if report is not None:
            steps.take("report", lambda: _rendered(report))
        steps.take("dry run", lambda: sanitize(self.path, self.out, dry_run=True))
        done = steps.take("sanitize", lambda: sanitize(self.path, self.out, U, max_share=1))
        if done is None:
            return set()
        written = steps.take("scan of what was written", lambda: scan(self.out, U), refusal=False)
        if written is not None and repr(written.layers) != repr((done.after or done.before).layers):
            steps.find("law", "a scan of what was written finds other layers than the rewrite did", "")
        return {str((self.inner / name).relative_to(self.root)) for name in done.files}

    def _files(self) -> Files:
        """Every file and folder of the scratch folder: size, time of the last change, number."""
        found: Files = {}
        for folder, folders, files in os.walk(self.root):
            for name in (*folders, *files):
                path = os.path.join(folder, name)  # noqa: PTH118  # quick: done twice for each input
                status = os.lstat(path)
                whole = (status.st_size, status.st_mtime_ns) if name in files else (0, 0)
                found[os.path.relpath(path, self.root)] = (*whole, status.st_ino)
        return found

    def _left(self, before: Files, allowed: set[str], content: bytes) -> Iterator[str]:
        """What is not as it should be after an input."""
        after = self._files()
        if self.path.read_bytes() != content:
            yield "the input was changed"
        for name in sorted(before.keys() | after.keys()):
            if name not in before:
                if name not in allowed:
                    yield "a file is left behind that no report names"
            elif before[name] != after.get(name):
                yield f"{name} was changed or is gone"
        if allowed - after.keys():
            yield "a file that the report names is not there"

    def _clean(self) -> None:
        """Remove whatever an input left."""
        for name in sorted(self._files().keys() - self._known.keys()):
            path = self.root / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


class _Steps:
    """The steps of one input, so far."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.ended: list[str] = []
        self.slowest = 0.0
        self.cut_short = False

    def find(self, kind: str, summary: str, detail: str) -> None:
        """Note a finding."""
        self.findings.append(Finding(kind, summary, detail))

    def take(self, name: str, step: Callable[[], Result], *, refusal: bool = True) -> Result | None:
        """What a step gives; None where it raises, with a finding unless it is an OnnxClpError and may be one.

        After a step that took too long none is taken: they would take as long.
        """
        if self.cut_short:
            return None
        began, result = time.process_time(), None
        try:
            with _timed(), warnings.catch_warnings():
                warnings.simplefilter("error")
                result = step()
            self.ended.append(f"{name}: done")
        except OnnxClpError as error:
            self.ended.append(f"{name}: {type(error).__name__}")
            if not refusal or isinstance(error, VerificationError):
                self._note("law", name, error)
        except OverTimeError as error:
            self.cut_short = True  # a rewrite that is broken off at any place may leave its files
            self._note("time", name, error)
        except BaseException as error:  # noqa: BLE001  # whatever it is, it should not have come out
            self._note("exception", name, error)
        self.slowest = max(self.slowest, time.process_time() - began)
        return result

    def _note(self, kind: str, step: str, error: BaseException) -> None:
        self.ended.append(f"{step}: {kind}")
        detail = "".join(traceback.format_exception(error))
        where = _where(error)
        if kind == "time":  # where it was when the time was over is chance, but for the module
            where = where.rpartition("(")[2].partition(":")[0]
        self.find(kind, f"{type(error).__name__} {where}", f"step: {step}\n\n{detail}")


def _where(error: BaseException) -> str:
    """The innermost place of the package that an error came through."""
    own = [
        f"in {frame.f_code.co_qualname} ({Path(frame.f_code.co_filename).name}:{line})"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if "/onnx_clp/" in frame.f_code.co_filename
    ]
    return own[-1] if own else "outside the package"


def _rendered(report: ScanReport) -> None:
    """Both reports of a scan, which must be plain text."""
    read = Reported("model.onnx", report)
    for text in (text_report.render([read], verbose=True), json_report.render([read])):
        odd = {unicodedata.category(letter) for letter in text if letter != "\n"} & {"Cc", "Cs", "Cf"}
        if odd:
            raise AssertionError(f"a report holds characters of the kinds {sorted(odd)}")


@contextmanager
def _timed() -> Iterator[None]:
    """Raise OverTimeError within, where LONGEST seconds of a processor have passed."""
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _over_time(_: int, __: FrameType | None) -> None:
    raise OverTimeError(f"more than {LONGEST} s")


def _never() -> bool:
    return False


def _status(field: str) -> int:
    """A size of this process in bytes, as the kernel tells it."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.partition(f"{field}:")[2].split(maxsplit=1)[0]) << 10


def _descriptors() -> int:
    """How many files the process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _forget_highest() -> None:
    """Make the highest memory so far that of now; where the kernel does not allow it, it is that of all inputs."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
