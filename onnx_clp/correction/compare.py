"""The written model on the images, against what was simulated: one run of the whole, not of its stages.

Outputs are compared by the root mean square of their difference, as a share of that of the simulated ones. Kernels and
biases are rounded once more in the file than in the simulation, and the whole model is fused otherwise than its stages:
that is 10⁻⁶ to 10⁻⁵ in float32. Where numbers of 16 bits or levels are rounded, one of them can fall on the other side
at each layer, and an output moves by some levels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from onnx_clp.correction.source import ImageSource
from onnx_clp.correction.stream import Outputs
from onnx_clp.errors import ModelFileError, VerificationError
from onnx_clp.evaluation.session import open_session
from onnx_clp.runtime import first_line

FINE: Final = 1e-3
"""The largest share in float32."""

ROUGH: Final = 0.1
"""The largest share where numbers of 16 bits, or levels, are rounded on the way."""


def compare(model: Path, source: ImageSource, expected: Outputs, *, rough: bool) -> str:
    """Run ``model`` on the images and compare its floating-point outputs with ``expected``.

    Returns what was seen, empty where there is nothing to compare.

    Raises:
        ModelFileError: onnxruntime does not load or run it.
        VerificationError: It does not compute what was simulated.
    """
    names = [name for name, batches in expected.items() if batches[0].dtype.kind == "f"]
    session = open_session(model, source.session.providers)
    squares, total = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for number, batch in enumerate(source.batches.arrays):
        try:
            outputs = session.runner.run(names, {session.input_name: batch}) if names else []
        except Exception as error:
            raise ModelFileError(f"onnxruntime does not run {model}: {first_line(error)}") from error
        for name, found in zip(names, outputs, strict=True):
            wanted = expected[name][number].astype(np.float64)
            known = np.isfinite(wanted)
            if found.shape != wanted.shape or not np.isfinite(found[known]).all():
                raise VerificationError(f"the output {name!r} of the written file is not what was simulated")
            squares[name] += float(np.square(found[known] - wanted[known]).sum())
            total[name] += float(np.square(wanted[known]).sum())
    shares = [float(np.sqrt(squares[name] / total[name])) if total[name] else 0.0 for name in names]
    most = ROUGH if rough else FINE
    if max(shares, default=0.0) > most:
        raise VerificationError(
            f"the written file gives other outputs than were simulated: they are off by {max(shares):.1%}, "
            f"{most:.1%} is rounding"
        )
    count = source.count
    return (
        f"outputs on {count:,} images are those simulated, but for rounding: {max(shares):.0e} of them"
        if shares
        else ""
    )
