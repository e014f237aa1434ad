"""What is kept of a finding: the input, and beside it what it did."""

from __future__ import annotations

from pathlib import Path

from fuzz.trial import Finding


def keep(folder: Path, finding: Finding, content: bytes) -> None:
    """Keep a finding, unless one that is likely the same is there with an input that is as short."""
    model = folder / f"{finding.name}.onnx"
    if model.exists() and model.stat().st_size <= len(content):
        return
    folder.mkdir(parents=True, exist_ok=True)
    model.write_bytes(content)
    model.with_suffix(".txt").write_text(f"{finding.summary}\n\n{finding.detail}", encoding="utf-8", errors="replace")
