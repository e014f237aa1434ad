"""Kernels that are refitted on images: against a twin that solves for each anew, and by the laws of the fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnx_clp.correction import refit, repair
from onnx_clp.correction.convolutions import convolutions
from onnx_clp.correction.cuts import Variant
from onnx_clp.correction.patches import convolved, geometry
from onnx_clp.correction.repair import Repair
from onnx_clp.correction.simulator import Simulation, Simulator
from onnx_clp.correction.stages import Pieces
from onnx_clp.correction.stream import Batches
from onnx_clp.model.graph import Node
from tests import naive_correction, naive_refit
from tests.channel_nets import NETS
from tests.correction_nets import CORRECTED
from tests.test_correction_simulation import analysed, batches, flagged, open_piece, spots

Array = NDArray[Any]

TOLERANCE = 1e-4
"""Of a kernel, against its norm, and of an output, against the largest: float32 rounds at 6e-8 in each of some ten
layers, and the smallest eigenvalue of the scaled normal equations is at least λ, here 0.1."""

RIDGE = 0.1

FITTED = ["residual", "dense", "depthwise", "shuffled", "plain", "preact", "shared", "summands"]


@pytest.fixture(autouse=True)
def few_positions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images of these tests are few, and every kernel is to be refitted; but for the test of that rule."""
    if "positions" not in request.node.name:
        monkeypatch.setattr(repair, "LEAST_POSITIONS", 0)


def simulated(model: onnx.ModelProto, folder: Path, given: Batches, ridge: float, *, silence: bool) -> Any:  # noqa: ANN401
    """The analysis, what is silenced, the simulation, and the names of nodes by their index."""
    analysis = analysed(model, folder)
    choices = flagged(analysis) if silence else {}
    pieces = Pieces(model)
    found, _ = convolutions(analysis, pieces, ())
    simulator = Simulator(analysis, Variant(pieces, open_piece), given, tuple(found.values()))
    return analysis, choices, simulator.run(choices, Repair(ridge=ridge))


@pytest.mark.parametrize("silence", [True, False])
@pytest.mark.parametrize("net", FITTED)
def test_a_refit_is_what_running_the_whole_model_for_each_convolution_finds(
    net: str,
    silence: bool,  # noqa: FBT001  # a parameter of the test
    tmp_path: Path,
) -> None:
    model = CORRECTED[net]()
    given = batches(counted=2)  # the last two images flow along
    analysis, choices, found = simulated(model, tmp_path, given, RIDGE, silence=silence)
    assert isinstance(found, Simulation)
    assert bool(choices) == silence
    planned = list(spots(analysis, choices, model).values())
    final, wanted = naive_refit.refitted(model, planned, given.arrays, given.counted, RIDGE)
    names = {index: analysis.graph.nodes[index].name for index in found.refits}
    assert set(names.values()) == set(wanted)
    for index, made in found.refits.items():
        W, b = wanted[names[index]]
        assert np.abs(made.kernel - W).max() < TOLERANCE * np.linalg.norm(W), names[index]
        assert np.abs(made.bias - b).max() < TOLERANCE * (1 + np.abs(b).max()), names[index]
    (scores,) = naive_correction.outputs(final, given.arrays)
    (name,) = (output.name for output in model.graph.output)
    simulated_scores = np.concatenate(found.sanitized[name])
    assert np.abs(simulated_scores - scores).max() < TOLERANCE * np.abs(scores).max()


def test_statistics_alone_are_the_same_beside_convolutions_that_could_be_refitted(tmp_path: Path) -> None:
    model = NETS["residual"]()
    analysis = analysed(model, tmp_path)
    given, pieces, choices = batches(), Pieces(model), flagged(analysis)
    found, _ = convolutions(analysis, pieces, ())
    one = Simulator(analysis, Variant(pieces, open_piece), given).run(choices)
    two = Simulator(analysis, Variant(pieces, open_piece), given, tuple(found.values())).run(choices)
    assert not two.refits
    for position, change in one.affines.items():  # cut in more places, fused otherwise
        assert np.allclose(change.factors, two.affines[position].factors, rtol=1e-4)


# ---- the fit itself


def rows(count: int, channels: int, positions: int, outputs: int, seed: int = 0) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    x = random.normal(1, 1, (count, channels * positions)) * random.uniform(0.1, 10, channels).repeat(positions)
    return x, random.normal(2, 1, (count, outputs)) + x[:, :outputs]


@pytest.mark.parametrize("block", [1, 7, 10**6])
def test_normal_equations_of_blocks_give_the_least_squares_of_all(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refit, "BLOCK", block)
    x, t = rows(60, 3, 4, 2)
    x += 1000  # deviations are small beside the mean: sums of raw squares would lose six digits
    found = refit.NormalEquations(12, 2)
    for start in range(0, 60, 9):
        found.add(x[start : start + 9].copy(), t[start : start + 9].copy())
    W, b = found.solve(4, 0.3, 2.0**-52) or pytest.fail("nothing was solved")
    wanted = naive_refit.ridge(x, t, 4, 0.3)
    assert np.allclose(W, wanted[0], rtol=1e-8, atol=1e-10)  # two float64 solvers of one well-conditioned system
    assert np.allclose(b, wanted[1], rtol=1e-8)


def fitted(x: Array, W: Array, b: Array, ridge: float, targets: Array | None = None) -> refit.Refit:
    where = geometry(conv(), W.shape[2:])
    assert where is not None
    t = convolved(x, where, W, b) if targets is None else targets
    found = refit.refitted([x], [t], where, W, ridge)
    assert found is not None
    return found


def conv(**attributes: Any) -> Node:  # noqa: ANN401  # what ONNX has
    made = helper.make_node("Conv", ["x", "W"], ["y"], **attributes)
    by_name = {attribute.name: attribute for attribute in made.attribute}
    return Node(0, "Conv", "", 17, "conv", (0, 1), (2,), by_name, None)


def test_with_images_enough_and_hardly_a_penalty_a_kernel_stays_what_it_is() -> None:
    random = np.random.default_rng(0)
    x, W, b = random.normal(1, 1, (40, 3, 6, 6)), random.normal(0, 1, (5, 3, 3, 3)), random.normal(0, 1, 5)
    found = fitted(x, W, b, 1e-12)
    assert np.abs(found.kernel - W).max() < 1e-9  # float64, of a condition near 1; λ itself moves it by 1e-12
    assert np.abs(found.bias - b).max() < 1e-9
    assert found.change < 1e-9
    assert fitted(x, W, b, 0.1).change > 0.05  # and with one it is drawn to 0
    assert np.linalg.norm(fitted(x, W, b, 0.1).kernel) < np.linalg.norm(W)


def test_what_the_images_do_not_use_loses_its_weight() -> None:
    """On images whose two channels are equal, what a kernel does to their difference is not seen."""
    random = np.random.default_rng(1)
    x = random.normal(0, 1, (40, 1, 6, 6)).repeat(2, 1)
    W = np.zeros((1, 2, 1, 1))
    W[0, :, 0, 0] = 101, -99
    found = fitted(x, W, np.zeros(1), 0.01)
    assert np.allclose(found.kernel.ravel(), 1, atol=0.02)  # 2 over the sum of both, a share λ/2 less


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_the_fit_does_not_move_when_channels_are_scaled(scale: float) -> None:
    random = np.random.default_rng(2)
    x, W, b = random.normal(1, 1, (20, 3, 6, 6)), random.normal(0, 1, (5, 3, 3, 3)), random.normal(0, 1, 5)
    one = fitted(x, W, b, 0.1)
    inputs, outputs = np.array([1, scale, 1]).reshape(1, 3, 1, 1), np.array([1, 1, scale, 1, 1])
    other = fitted(x * inputs, W / inputs * outputs.reshape(5, 1, 1, 1), b * outputs, 0.1)
    wanted = one.kernel / inputs * outputs.reshape(5, 1, 1, 1)
    assert np.allclose(other.kernel, wanted, rtol=1e-7, atol=0)  # the scaled equations differ by rounding alone
    assert np.allclose(other.bias, one.bias * outputs, rtol=1e-7)


def test_a_channel_that_does_not_vary_gets_nothing_and_the_bias_what_it_added() -> None:
    random = np.random.default_rng(3)
    x, W, b = random.normal(1, 1, (20, 3, 6, 6)), random.normal(0, 1, (5, 3, 1, 1)), random.normal(0, 1, 5)
    x[:, 1] = 7
    found = fitted(x, W, b, 1e-12)
    assert (found.kernel[:, 1] == 0).all()
    assert np.allclose(found.bias, b + 7 * W[:, 1, 0, 0], rtol=1e-8)


def test_images_that_are_not_finite_give_no_kernel() -> None:
    random = np.random.default_rng(4)
    x, W = random.normal(1, 1, (4, 3, 6, 6)), random.normal(0, 1, (5, 3, 1, 1))
    x[0, 0, 0, 0] = np.inf
    where = geometry(conv(), (1, 1))
    assert where is not None
    assert refit.refitted([x], [x.repeat(2, 1)[:, :5]], where, W, 0.1) is None


# ---- patches


@pytest.mark.parametrize("most", [1, 3000, 1 << 26])
@pytest.mark.parametrize(
    ("shape", "kernel", "attributes"),
    [
        ((3, 2, 9, 8), (3, 3), {}),
        ((3, 2, 9, 8), (3, 2), {"pads": [1, 0, 2, 1], "strides": [2, 3]}),
        ((3, 2, 9, 8), (2, 3), {"dilations": [2, 1], "pads": [0, 1, 1, 0]}),
        ((3, 2, 9, 8), (3, 3), {"dilations": [2, 2], "strides": [2, 1]}),
        ((3, 2, 9, 8), (2, 4), {"auto_pad": "SAME_UPPER", "strides": [2, 1]}),
        ((3, 2, 9, 8), (2, 2), {"auto_pad": "SAME_LOWER", "strides": [2, 1]}),
        ((3, 2, 9, 8), (4, 3), {"auto_pad": "VALID", "strides": [2, 1]}),
        ((3, 2, 11), (4,), {"pads": [2, 1], "strides": [2]}),
        ((3, 2, 5, 6, 4), (2, 3, 1), {"pads": [1, 0, 0, 0, 1, 0], "strides": [1, 2, 2]}),
    ],
)
def test_a_convolution_of_patches_is_that_of_onnxruntime(
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    attributes: dict[str, Any],
    most: int,
    monkeypatch: Any,  # noqa: ANN401
) -> None:
    monkeypatch.setattr("onnx_clp.correction.patches.BLOCK", most)
    random = np.random.default_rng(0)
    x, W, b = (random.normal(0, 1, each).astype(np.float32) for each in (shape, (4, 2, *kernel), (4,)))
    node = helper.make_node("Conv", ["x", "W", "b"], ["y"], **attributes)
    given, made = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    tensors = [numpy_helper.from_array(array, name) for array, name in ((W, "W"), (b, "b"))]
    graph = helper.make_graph([node], "conv", [given], [made], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (wanted,) = naive_correction.outputs(model, [x])
    where = geometry(conv(**attributes), kernel)
    assert where is not None
    found = convolved(x, where, W, b)
    assert found.dtype == x.dtype
    assert np.allclose(found, wanted, rtol=1e-5, atol=1e-5)  # sums of at most 24 products in float32
