"""Two streams in stages, against a twin that runs the whole partly corrected model anew for each site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from onnx_clp.analysis import Analysis, analyse
from onnx_clp.correction.cuts import Variant
from onnx_clp.correction.moments import affine, merged, moments
from onnx_clp.correction.repair import Repair
from onnx_clp.correction.simulator import Simulation, Simulator
from onnx_clp.correction.stages import Pieces
from onnx_clp.correction.stream import Batches
from onnx_clp.model.file import open_model
from tests import naive_correction
from tests.channel_nets import NETS, images
from tests.naive_correction import Spot, session

Array = NDArray[Any]

TOLERANCE = 1e-4
"""Of a and of c, against the standard deviation: the twin's model has other fusions, and float32 rounds at 6e-8 in each
of some ten layers; a variance that is the small difference of such numbers may have a thousand of them."""


def analysed(model: onnx.ModelProto, folder: Path, u: float = 3.0) -> Analysis:
    path = folder / "model.onnx"
    onnx.save(model, path)
    return analyse(open_model(path), u, count_dead=False, name=str(path))


def open_piece(content: bytes) -> Any:  # noqa: ANN401
    return session(onnx.ModelProto.FromString(content))


def batches(count: int = 12, size: int = 5, counted: int | None = None, seed: int = 0) -> Batches:
    """Images in batches of ``size``, the last smaller."""
    x = images(count, seed)["x"]
    arrays = [x[start : start + size] for start in range(0, count, size)]
    return Batches(arrays, len(arrays) if counted is None else counted, x[:1])


def simulator(analysis: Analysis, model: onnx.ModelProto, given: Batches) -> Simulator:
    return Simulator(analysis, Variant(Pieces(model), open_piece), given)


def flagged(analysis: Analysis) -> dict[int, tuple[int, ...]]:
    """The flagged channels by the position of their site."""
    return {
        position: tuple(sorted(channel.index for channel in layer.flagged))
        for position, layer in enumerate(analysis.report.layers)
        if layer.flagged
    }


def spots(analysis: Analysis, choices: Mapping[int, Sequence[int]], model: onnx.ModelProto) -> dict[int, Spot]:
    """What the twin is told: the value of every site, in the order of the nodes that make them."""
    made = {name: i for i, node in enumerate(model.graph.node) for name in node.output}
    found = {
        position: Spot(analysis.graph.name_of(part.site.output), part.site.axis, tuple(choices.get(position, ())))
        for position, part in enumerate(analysis.measured)
    }
    return dict(sorted(found.items(), key=lambda entry: made[entry[1].value]))


def assert_as_twin(
    analysis: Analysis, model: onnx.ModelProto, given: Batches, choices: Mapping[int, Sequence[int]], found: Simulation
) -> None:
    planned = spots(analysis, choices, model)
    final, wanted = naive_correction.corrected(model, list(planned.values()), given.arrays, given.counted)
    for position, spot in planned.items():
        a, c = wanted[spot.value]
        change = found.affines.get(position)
        factors, shifts = (change.factors, change.shifts) if change else (np.ones_like(a), np.zeros_like(c))
        (before,) = naive_correction.outputs(model, given.arrays, [spot.value])
        std = np.sqrt(naive_correction.moments(before, spot.axis)[1])
        assert np.abs(factors - a).max() < TOLERANCE, spot
        assert (np.abs(shifts - c) <= TOLERANCE * std + 1e-6).all(), spot
    (scores,) = naive_correction.outputs(final, given.arrays)
    (name,) = (output.name for output in model.graph.output)
    simulated = np.concatenate(found.sanitized[name])
    assert np.abs(simulated - scores).max() < TOLERANCE * np.abs(scores).max()


@pytest.mark.parametrize("net", NETS)
def test_a_simulation_finds_what_running_the_whole_model_for_each_site_finds(net: str, tmp_path: Path) -> None:
    model = NETS[net]()
    analysis = analysed(model, tmp_path)
    choices = flagged(analysis)
    assert choices
    given = batches(counted=2)  # the last two images flow along
    found = simulator(analysis, model, given).run(choices)
    assert_as_twin(analysis, model, given, choices, found)
    assert any(change.changed for change in found.affines.values())
    assert not found.left


class Made(Sequence[Array]):
    """Batches that are made when they are asked for, and how often they were."""

    def __init__(self, arrays: Sequence[Array]) -> None:
        self.asked = 0
        self._arrays = arrays

    def __len__(self) -> int:
        return len(self._arrays)

    @overload
    def __getitem__(self, number: int) -> Array: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Array]: ...
    def __getitem__(self, number: int | slice) -> Array | Sequence[Array]:
        self.asked += 1
        return self._arrays[number]


def test_the_input_is_made_for_the_stages_that_read_it_and_no_others(tmp_path: Path) -> None:
    model = NETS["residual"]()
    analysis = analysed(model, tmp_path)
    plain = batches()
    given = Made(plain.arrays)
    runner = simulator(analysis, model, Batches(given, plain.counted, plain.probe))
    runner.run(flagged(analysis))
    assert len(analysis.measured) == 7
    assert given.asked == 2 * len(given)  # by the first stage, in both streams


@pytest.mark.parametrize("net", NETS)
def test_the_original_stream_gives_what_the_model_gives(net: str, tmp_path: Path) -> None:
    model = NETS[net]()
    analysis = analysed(model, tmp_path)
    given = batches()
    found = simulator(analysis, model, given).run(flagged(analysis))
    (name,) = found.original
    (scores,) = naive_correction.outputs(model, given.arrays)
    assert np.abs(np.concatenate(found.original[name]) - scores).max() < TOLERANCE * np.abs(scores).max()


@pytest.mark.parametrize("net", NETS)
def test_where_nothing_is_silenced_nothing_is_measured(net: str, tmp_path: Path) -> None:
    model = NETS[net]()
    analysis = analysed(model, tmp_path)
    found = simulator(analysis, model, batches()).run({})
    assert not found.affines
    (name,) = found.original
    for before, after in zip(found.original[name], found.sanitized[name], strict=True):
        assert before.tobytes() == after.tobytes()


def test_a_simulator_tries_choices_one_after_the_other_as_if_each_was_the_first(tmp_path: Path) -> None:
    model = NETS["residual"]()
    analysis = analysed(model, tmp_path)
    given, choices = batches(), flagged(analysis)
    shared = simulator(analysis, model, given)
    for position, channels in choices.items():
        again = shared.run({position: channels})
        alone = simulator(analysis, model, given).run({position: channels})
        assert again.affines.keys() == alone.affines.keys()
        for site, change in again.affines.items():
            assert change.factors.tobytes() == alone.affines[site].factors.tobytes()
            assert change.shifts.tobytes() == alone.affines[site].shifts.tobytes()


def test_a_site_that_shall_be_left_is_left_and_what_comes_after_is_measured_behind_it(tmp_path: Path) -> None:
    model = NETS["residual"]()
    analysis = analysed(model, tmp_path)
    given, choices = batches(), flagged(analysis)
    whole = simulator(analysis, model, given).run(choices)
    left = sorted(whole.affines)[1]
    found = simulator(analysis, model, given).run(choices, Repair(left={left: "so it is wished"}))
    assert left not in found.affines
    assert found.left == {left: "so it is wished"}
    after = max(whole.affines)
    assert not np.array_equal(found.affines[after].factors, whole.affines[after].factors)


def test_channels_that_nothing_reached_are_left_alone_to_the_bit(tmp_path: Path) -> None:
    """In a grouped convolution only the groups that read a silenced channel see a difference."""
    model = NETS["shuffled"]()
    analysis = analysed(model, tmp_path)
    first = 0
    found = simulator(analysis, model, batches()).run({first: (1,)})
    grouped = found.affines[1]
    assert 0 < len(grouped.changed) <= 4
    others = [k for k in range(16) if k not in grouped.changed]
    assert (grouped.factors[others] == 1).all()
    assert (grouped.shifts[others] == 0).all()


# ---- moments


def test_moments_of_batches_merge_to_those_of_all() -> None:
    random = np.random.default_rng(0)
    values = (random.standard_normal((23, 4, 5, 6)) * [[[[1]], [[1e-3]], [[1e3]], [[1]]]] + 100).astype(np.float32)
    parts = [moments(part, 1) for part in np.split(values, [7, 8, 20])]
    found = merged(parts)
    flat = values.astype(np.float64).transpose(1, 0, 2, 3).reshape(4, -1)
    assert found.count == flat.shape[1]
    assert np.allclose(found.mean, flat.mean(1), rtol=1e-13)
    assert np.allclose(
        found.variance, flat.var(1), rtol=1e-9
    )  # of two passes in float64: n·2⁻⁵³, the mean's error twice


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_moments_are_taken_along_any_axis(axis: int) -> None:
    values = np.random.default_rng(1).standard_normal((3, 4, 5, 6)).astype(np.float32)
    mean, variance = naive_correction.moments(values, axis)
    found = moments(values, axis)
    assert np.allclose(found.mean, mean, rtol=1e-12, atol=1e-15)
    assert np.allclose(found.variance, variance, rtol=1e-12)


def test_what_is_silenced_dead_the_same_or_not_finite_is_left_alone_and_factors_are_clamped() -> None:
    random = np.random.default_rng(2)
    before = random.standard_normal((50, 8)).astype(np.float32)
    after = before * np.array([2, 2, 0, 1, 100, 0.01, 1, 1], np.float32)
    before[:, 6], after[:, 6] = 7, random.standard_normal(50)  # does not vary in the original
    before[3, 7] = np.nan
    found = affine(moments(before, 1), moments(after, 1), [0], float(np.finfo(np.float32).eps))
    assert found.changed == (1, 4, 5)
    assert np.allclose(found.factors, [1, 0.5, 1, 1, 0.3, 3, 1, 1], rtol=1e-6)
    assert found.clamped == (4, 5)
    mean = before.astype(np.float64).mean(0)
    corrected = after * found.factors + found.shifts
    assert np.allclose(corrected.mean(0)[[1, 4, 5]], mean[[1, 4, 5]], atol=1e-9)
