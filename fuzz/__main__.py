"""Fuzz onnx-clp: `python -m fuzz --seconds 600`, from the root of the project; `pip install .[fuzz,test]` first.

An input that broke a law is kept with what it did, and `--replay FILE` tries it again, without atheris. A scan or a
rewrite that took too long or an input that took too much memory is tried again in a process of its own before it
counts: what it took may have been the fuzzer's.

Exit code: 0 where nothing was found, 1 where something was, 2 where there was no fuzzing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fuzz import seeds
from fuzz.keep import keep
from fuzz.trial import Finding, Trial

ROOT = Path(__file__).resolve().parent.parent
GRACE = 120
"""Seconds after which a worker that was to end by itself is ended."""

MANY_SECONDS = 300
"""From here on the cases for single operators are among the seeds: half a minute goes by until each was tried once."""

MOST_CRASHES = 20
"""An input that kills the process costs a new one; after so many, fuzzing has found enough."""


@dataclass
class Figures:
    """What all workers saw together."""

    inputs: int = 0
    slowest: float = 0.0
    highest: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)

    def add(self, path: Path) -> int:
        """Add what one worker noted; the number of its inputs."""
        if not path.exists():
            return 0
        noted = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
        self.inputs += noted["inputs"]
        self.slowest = max(self.slowest, noted["slowest"])
        self.highest = max(self.highest, noted["highest"])
        self.ended.update(noted["ended"])
        self.found.update(noted["found"])
        return int(noted["inputs"])


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=600, help="how long to try inputs (600)")
    parser.add_argument("--seed", type=int, default=1, help="of libFuzzer's random numbers (1)")
    parser.add_argument("--corpus", type=Path, help="a folder of inputs to begin with, too; interesting ones are added")
    parser.add_argument("--findings", type=Path, help="where inputs that broke a law are kept (a new temporary folder)")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="try one input, say what it does, and end")
    options = parser.parse_args()
    if options.replay:
        return replay(options.replay)
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed: pip install .[fuzz,test]", file=sys.stderr)
        return 2
    findings = options.findings or Path(tempfile.gettempdir()) / f"onnx-clp-findings-{time.strftime('%Y%m%d-%H%M%S')}"
    with _scratch() as work:
        return fuzz(work, options.seconds, options.seed, options.corpus or work / "corpus", findings.absolute())


def fuzz(work: Path, seconds: int, seed: int, corpus: Path, findings: Path) -> int:
    """Run workers for so long, and say what they saw."""
    start, figures = work / "seeds", Figures()
    start.mkdir()
    corpus.mkdir(parents=True, exist_ok=True)
    count = seeds.write(start, operators=seconds >= MANY_SECONDS)
    print(f"{count} seeds, {seconds} s")
    deadline, crashes = time.monotonic() + seconds, 0
    while (left := round(deadline - time.monotonic())) > 0 and crashes < MOST_CRASHES:
        scratch, noted, log = work / f"scratch-{crashes}", work / "figures.json", work / "log.txt"
        places = [scratch, corpus.absolute(), start, noted, findings]
        with log.open("wb") as out:
            command = [sys.executable, "-X", "faulthandler", "-m", "fuzz.worker", *map(str, places)]
            process = subprocess.Popen([*command, str(left), str(seed + crashes)], cwd=ROOT, stdout=out, stderr=out)
            try:
                process.wait(left + GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        said = log.read_text(encoding="utf-8", errors="replace")
        if not figures.add(noted):
            print(f"the fuzzer did not start; it said:\n{said[-3000:]}", file=sys.stderr)
            return 2
        if process.returncode == 0:
            break
        killer = Finding("crash", f"the process ended with {process.returncode} {_last_place(said)}", said[-8000:])
        figures.found[killer.name] += 1
        content = (scratch / "models" / "model.onnx").read_bytes()
        keep(findings, killer, content)
        _forget(content, start, corpus)  # else it would kill the next worker, too
        shutil.rmtree(scratch)
        crashes += 1
    confirmed = _confirmed(findings, figures.found)
    _tell(figures, confirmed, findings)
    return 1 if confirmed else 0


def _forget(content: bytes, *folders: Path) -> None:
    """Remove an input from the folders that fuzzing begins with."""
    for path in (path for folder in folders for path in folder.iterdir()):
        if path.stat().st_size == len(content) and path.read_bytes() == content:
            path.unlink()


def _last_place(said: str) -> str:
    """The innermost place of the package in what Python's fault handler wrote; it lists that first."""
    lines = [line.strip() for line in said.splitlines() if "/onnx_clp/" in line and "File" in line]
    return lines[0] if lines else "somewhere"


def _confirmed(folder: Path, found: Counter[str]) -> list[str]:
    """The names of the findings; without those of time and memory that a process of its own does not show."""
    names = []
    for name in sorted(found):
        if name.startswith(("time-", "memory-")) and not _again(folder / f"{name}.onnx"):
            for suffix in (".onnx", ".txt"):
                (folder / name).with_suffix(suffix).unlink()
            continue
        names.append(name)
    return names


def _again(file: Path) -> bool:
    """Whether an input breaks a law in a process of its own, too."""
    command = [sys.executable, "-m", "fuzz", "--replay", str(file)]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=GRACE).returncode != 0
    except subprocess.TimeoutExpired:
        return True


def _tell(figures: Figures, confirmed: list[str], folder: Path) -> None:
    """Print what was seen."""
    for ended, count in sorted(figures.ended.items()):
        print(f"{count:>9,}  {ended}")
    print(f"inputs tried: {figures.inputs:,}")
    print(f"slowest scan or rewrite: {figures.slowest:.2f} s, with the fuzzer's own work")
    print(f"highest memory of one input: {figures.highest >> 20} MB")
    print(f"findings: {len(confirmed)}")
    for name in confirmed:
        summary = (folder / f"{name}.txt").read_text(encoding="utf-8").partition("\n")[0]
        print(f"  {name}: {summary} ({figures.found[name]} times)")
    if confirmed:
        print(f"kept in {folder}; to try one again: python -m fuzz --replay {folder / confirmed[0]}.onnx")


def replay(file: Path) -> int:
    """Try one input in this process, and say what it does."""
    content = file.read_bytes()
    with _scratch() as work:
        outcome = Trial(work / "scratch", seeds.data_files()).run(content)
        for ended in outcome.ended:
            print(ended)
        print(f"slowest scan or rewrite: {outcome.seconds:.2f} s; memory: {outcome.memory >> 20} MB")
        for finding in outcome.findings:
            print(f"\n{finding.kind}: {finding.summary}\n{finding.detail}")
    return 1 if outcome.findings else 0


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder that is gone at the end, in memory where that can be: each input is written and removed."""
    memory = Path("/dev/shm")  # noqa: S108  # mkdtemp makes a folder of our own in it
    with tempfile.TemporaryDirectory(prefix="onnx-clp-fuzz-", dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


if __name__ == "__main__":
    sys.exit(main())
