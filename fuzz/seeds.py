"""The models that fuzzing begins with: the built ones, and those that the onnx package brings to test runtimes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx

from tests.built import cases
from tests.cases.net import Case

LARGEST: int = 1 << 16
"""Bytes of a seed at most. A larger one is slow, and most of its bytes are numbers, which mean the same to a scan."""


def data_files() -> dict[str, bytes]:
    """The external data of the built models, by the names under which the seeds know it."""
    return {f"{case.name}/{name}": data for case in cases() for name, data in (case.folder or {}).items()}


def seeds(*, operators: bool) -> Iterator[tuple[str, bytes]]:
    """Name and content of every seed; ``operators``: with the cases of onnx for single operators, nearly 2,000 more.

    Where such a case gives few enough numbers, they are made the kernel of a convolution, so that a scan computes them.
    """
    found = [(f"built_{case.name}", _with_own_folder(case)) for case in cases()]
    data = Path(onnx.__file__).parent / "backend" / "test" / "data"
    found += [(f"{path.parent.name}_{path.stem}", path.read_bytes()) for path in sorted(data.rglob("*.onnx"))]
    if operators:
        from tests import test_onnx_backend as operator_tests  # it takes seconds to make the cases

        for test in operator_tests.cases():
            model, *_ = operator_tests.as_kernel(test) or (test.model,)
            assert model is not None  # cases() gives only those with one
            found.append((f"operator_{test.name}", model.SerializeToString()))
    return (seed for seed in found if len(seed[1]) <= LARGEST)


def write(folder: Path, *, operators: bool) -> int:
    """Write every seed into a folder; how many there are."""
    count = 0
    for count, (name, content) in enumerate(seeds(operators=operators), 1):  # noqa: B007  # counted
        (folder / f"{name}.onnx").write_bytes(content)
    return count


def _with_own_folder(case: Case) -> bytes:
    """The model, its external data in a folder of its own: all data lie beside each input, whichever it came from."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"{case.name}/{entry.value}"
    return model.SerializeToString()
