"""The registry of built models, and its self-check: `python -m tests.built` runs each through onnxruntime."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from tests import naive
from tests.cases import convolution, degenerate, normalisation, quantised, structure, weights
from tests.cases.net import BUILDERS, Case

__all__ = ["NAMES", "Case", "build", "cases", "save", "session"]

_registering = (convolution, normalisation, quantised, weights, structure, degenerate)

NAMES = tuple(BUILDERS)
"""Every case, in the order of the files: to parametrise a test with."""


@cache
def build(name: str) -> Case:
    """The case of that name. Built once: copy its model before changing it."""
    return BUILDERS[name]()


def cases() -> Iterator[Case]:
    """Every case."""
    return map(build, NAMES)


def save(case: Case, folder: Path) -> Path:
    """Write the model, and the external data beside it; the path of the model."""
    path = folder / f"{case.name}.onnx"
    path.write_bytes(case.model.SerializeToString())
    for name, data in (case.folder or {}).items():
        beside = folder / name
        beside.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(data)
    return path


def random_inputs(model: onnx.ModelProto, seed: int = 0) -> dict[str, NDArray[np.generic]]:
    """A random value for each graph input that has no default: true for a bool, 1 for a dimension without a size."""
    rng = np.random.default_rng(seed)
    given = {tensor.name for tensor in model.graph.initializer}
    values: dict[str, NDArray[np.generic]] = {}
    for value in model.graph.input:
        if value.name not in given:
            kind = value.type.tensor_type
            shape = [dim.dim_value or 1 for dim in kind.shape.dim]
            dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
            random = np.asarray(np.ones(shape) if dtype == np.bool_ else rng.standard_normal(shape))
            values[value.name] = np.asarray(random.astype(dtype))
    return values


def session(source: Path | bytes, level: str = "ORT_ENABLE_ALL", folder: Path | None = None) -> Any:  # noqa: ANN401
    """A session of onnxruntime, which has no types: on one thread, and silent.

    ``level`` is its graph optimisation; ``folder`` is where external data lies, for a model in memory.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(path: Path, model: onnx.ModelProto) -> list[NDArray[np.generic]]:
    """What onnxruntime computes on a random input."""
    outputs: list[NDArray[np.generic]] = session(path).run(None, random_inputs(model))
    return outputs


def refusal(case: Case) -> str:
    """Why onnxruntime does not run the case, in its own words; empty where it does."""
    with tempfile.TemporaryDirectory() as folder:
        path = save(case, Path(folder))
        try:
            run(path, case.model)
        except Exception as error:  # noqa: BLE001  onnxruntime raises kinds of its own
            return " ".join(str(error).split())
    return ""


def faults(case: Case, refused: str) -> list[str]:
    """What is wrong with a case by itself, and with what it says of onnxruntime; empty where nothing is."""
    wrong = []
    for site, bounds in case.sites.items():
        found = tuple(naive.flagged(bounds))
        if found != case.outliers[site]:
            wrong.append(f"{site}: u = 3 flags {found}, planned {case.outliers[site]}")
    if both := case.sites.keys() & case.skipped.keys():
        wrong.append(f"both judged and skipped: {sorted(both)}")
    if refused and not case.not_run:
        wrong.append("should run in onnxruntime")
    if case.not_run and not refused:
        wrong.append(f"runs in onnxruntime, though noted: {case.not_run}")
    return wrong


def main() -> int:
    """Run every case through onnxruntime; exit code 1 where one does not do what it says."""
    parser = argparse.ArgumentParser(prog="python -m tests.built", description=main.__doc__)
    parser.add_argument("names", nargs="*", help="only these cases")
    parser.add_argument("-v", "--verbose", action="store_true", help="list the sites and the skipped of each case")
    options = parser.parse_args()
    names, failed = options.names or NAMES, 0
    for name in names:
        case = build(name)
        refused = refusal(case)
        wrong = faults(case, refused)
        failed += bool(wrong)
        lines = [f"{'WRONG' if wrong else 'not run' if case.not_run else 'ok':8}{name}"]
        lines += wrong
        lines += [f"noted: {case.not_run}"] if case.not_run else []
        lines += [f"onnxruntime: {refused[:300]}"] if refused else []
        if options.verbose:
            lines += [f"site {s}: {len(b)} channels, outliers {list(case.outliers[s])}" for s, b in case.sites.items()]
            lines += [f"skipped {node}: {reason}" for node, reason in case.skipped.items()]
            lines += [f"undecided {node}" for node in sorted(case.undecided)]
        sys.stdout.write("\n        ".join(lines) + "\n")
    sys.stdout.write(f"{len(names)} cases, {failed} wrong\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
