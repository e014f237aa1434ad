"""What several of these tests ask for."""

from __future__ import annotations

import pytest

from onnx_clp.limits import Meter


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many numbers each step was paid for."""
    steps: list[int] = []
    touch = Meter.touch

    def counted(meter: Meter, elements: int) -> None:
        steps.append(elements)
        touch(meter, elements)

    monkeypatch.setattr(Meter, "touch", counted)
    return steps
