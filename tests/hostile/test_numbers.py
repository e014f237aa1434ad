"""Numbers that break arithmetic: no warning from NumPy reaches the user, and no verdict is false.

A channel that NaN or Inf gets into is a finding. Of the others those are flagged that exact arithmetic puts above the
threshold; a power of two on a layer changes nothing.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import DTypeLike, NDArray
from onnx import numpy_helper

from onnx_clp import SanitizeReport, ScanReport, UsageError, sanitize, scan
from onnx_clp.cli import run
from tests.built import build, save
from tests.cases.net import Net, Norm

Array = NDArray[Any]
Capture = pytest.CaptureFixture[str]

CHANNELS, LOUD = 16, 5
"""Of a layer here, and the one that stands out."""

BROKEN = {"NaN": math.nan, "Inf": math.inf, "-Inf": -math.inf}
broken = pytest.mark.parametrize("value", BROKEN.values(), ids=BROKEN)

laws = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    """Any warning fails the test, and NumPy's errors too, had the code not said that it means them."""
    with warnings.catch_warnings(), np.errstate(all="raise", under="ignore"):
        warnings.simplefilter("error")
        yield


def kernel(dtype: DTypeLike = np.float32, scale: float = 1.0, *shape: int) -> Array:
    """A random kernel with one loud channel, times ``scale``."""
    W = np.random.default_rng(0).standard_normal(shape or (CHANNELS, 3, 3, 3))
    W[LOUD] *= 8
    with np.errstate(all="ignore"):
        return (W * scale).astype(dtype)


def norm(dtype: DTypeLike = np.float32, epsilon: float = 1e-5) -> Norm:
    return replace(Net(dtype=dtype).norm(CHANNELS), epsilon=epsilon)


def layer(W: Array, bias: Array | None = None, normalised: Norm | None = None, group: int = 1) -> onnx.ModelProto:
    """A Conv, with a BN behind it where one is given."""
    net = Net(dtype=W.dtype)
    bias = net.vector(len(W)) if bias is None and normalised is None else bias
    x = net.conv(net.feed(1, W.shape[1] * group, 8, 8), W, bias, group=group)
    net.tail(x if normalised is None else net.bn(x, normalised), len(W))
    return net.case("layer").model


def scanned(model: onnx.ModelProto, **options: Any) -> ScanReport:  # noqa: ANN401  # those of scan
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return scan(path, **options)


def sanitized(model: onnx.ModelProto, folder: Path, **options: Any) -> SanitizeReport:  # noqa: ANN401  # of sanitize
    """The report of a rewrite, whose copy must be a model that is as silent as it says."""
    path, out = folder / "model.onnx", folder / "out.onnx"
    path.write_bytes(model.SerializeToString())
    report = sanitize(path, out, force=True, **{"guard": False, **options})
    again = scan(out)
    for part in report.silenced:
        (found,) = (each for each in again.layers if each.name == part.layer)
        assert set(part.channels) <= set(found.dead)
    return report


def oracle(W: Array) -> list[float]:
    """σ_max of each channel by an SVD in float64, each channel brought near 1 by a power of two."""
    found = []
    for channel in W.reshape(len(W), W.shape[1], -1).astype(np.float64):
        exponent = int(np.frexp(np.abs(channel).max())[1])
        near = np.ldexp(np.ldexp(channel, -exponent // 2), -exponent - -exponent // 2)
        found.append(math.ldexp(float(np.linalg.svd(near, compute_uv=False)[0]), exponent))
    return found


def exactly_flagged(bounds: list[float], u: float = 3.0) -> tuple[set[int], set[int]]:
    """The channels above mean + u·std in exact arithmetic, and those that are too near the threshold to tell."""
    exact = {k: Fraction(bound) for k, bound in enumerate(bounds) if math.isfinite(bound) and bound > 0}
    if len(exact) < 2:
        return set(), set()
    mean = sum(exact.values(), Fraction(0)) / len(exact)
    variance = sum(((bound - mean) ** 2 for bound in exact.values()), Fraction(0)) / (len(exact) - 1)
    sure, near = set(), set()
    for k, bound in exact.items():
        above = bound - mean
        # Bounds of float32 and narrower kernels are good to some 1e-6 (bounds.py).
        if above > 0 and abs(above**2 - Fraction(u) ** 2 * variance) <= Fraction(1, 10**4) * variance:
            near.add(k)
        elif above > 0 and above**2 > Fraction(u) ** 2 * variance:
            sure.add(k)
    return sure, near


def verdict(report: ScanReport) -> list[tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """What is said of each layer, without its numbers."""
    return [
        (part.status, tuple(channel.index for channel in part.flagged), part.dead, part.non_finite)
        for part in report.layers
    ]


# ---- the ends of the formats

SCALES = [
    (np.float16, 65504 / 64),
    (np.float16, 6e-5),
    (np.float16, 6e-6),
    (ml_dtypes.bfloat16, 5e36),
    (ml_dtypes.bfloat16, 1e-38),
    (ml_dtypes.bfloat16, 1e-39),
    (np.float32, 5e36),
    (np.float32, 1e-30),
    (np.float32, 1e-38),
    (np.float32, 1e-43),
    (np.float64, 1e300),
    (np.float64, 2e306),
    (np.float64, 1e-300),
    (np.float64, 1e-320),
    (np.float64, 5e-323),
]


@pytest.mark.parametrize(("dtype", "scale"), SCALES)
def test_a_layer_at_the_ends_of_a_format_is_judged_as_exact_arithmetic_judges_it(
    dtype: DTypeLike, scale: float
) -> None:
    W = kernel(dtype, scale)
    (found,) = scanned(layer(W)).layers
    assert found.status == "judged"
    assert found.non_finite == ()
    wanted, near = exactly_flagged(oracle(W))
    assert wanted == {LOUD}
    assert near == set()
    assert {channel.index for channel in found.flagged} == wanted
    # Among the smallest numbers of float64 bounds are rounded to multiples of 5e-324.
    np.testing.assert_allclose(found.bounds, oracle(W), rtol=5e-6, atol=5e-324)


def test_squares_beyond_float16_do_not_make_a_channel_infinite() -> None:
    """A Gram matrix in float16 would overflow from 256 on; the largest number is 65504."""
    W = np.full((CHANNELS, 64, 3, 3), 30000, np.float16)
    W[LOUD] = 65504
    (found,) = scanned(layer(W)).layers
    assert [channel.index for channel in found.flagged] == [LOUD]
    assert found.bounds[LOUD] == pytest.approx(65504 * math.sqrt(64 * 9), rel=5e-6)
    assert found.non_finite == ()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("power", [-12, -7, 7, 9])
def test_a_power_of_two_on_a_layer_changes_no_verdict(dtype: DTypeLike, power: int) -> None:
    """Down to the last bit, where neither kernel leaves its format: of three bits all numbers here keep."""
    W = np.random.default_rng(1).integers(-4, 5, (CHANNELS, 3, 3, 3)).astype(dtype)
    W[LOUD] *= 8
    one, other = scanned(layer(W)), scanned(layer((W * np.float32(2.0**power)).astype(dtype)))
    assert verdict(one) == verdict(other)
    assert verdict(one)[0][1] == (LOUD,)
    before, after = one.layers[0], other.layers[0]
    np.testing.assert_allclose(after.bounds, np.array(before.bounds) * 2.0**power, rtol=5e-6)
    assert [each.z for each in after.flagged] == pytest.approx([each.z for each in before.flagged], rel=1e-4)


@pytest.mark.parametrize("power", [-1072, -1060, -1022, 900, 1010])
def test_a_power_of_two_changes_no_verdict_among_the_smallest_and_largest_numbers(power: int) -> None:
    """Depthwise kernels of one number, whose bound is that number: nothing is rounded but by the judgement."""
    W = np.array([2.0] * 7 + [3.0] * 8 + [12.0]).reshape(-1, 1, 1, 1)
    one, other = (scanned(layer(np.ldexp(W, exponent), group=CHANNELS)) for exponent in (0, power))
    assert verdict(one) == verdict(other)
    assert verdict(one)[0][1] == (15,)
    assert one.layers[0].flagged[0].z == other.layers[0].flagged[0].z


def test_a_spread_that_float64_cannot_say_is_one_all_the_same() -> None:
    """Twenty bounds of 5e-324 and one of 1e-323: their std would be rounded to 0, and the layer taken for equal."""
    W = np.full((21, 1, 1, 1), 5e-324)
    W[3] *= 2
    (found,) = scanned(layer(W, group=21)).layers
    assert found.status == "judged"
    assert [channel.index for channel in found.flagged] == [3]
    assert found.flagged[0].z == pytest.approx(20 / math.sqrt(21), rel=1e-12)


numbers = st.sampled_from([1.0, 0.5, -1.0, 3.0, 1e-3]) | st.floats(-2, 2, width=16)
extremes = st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, -1e-45, 3e38, -3e38, 1e-38, 1e30, 1e-30])


@laws
@given(st.lists(st.lists(numbers | extremes, min_size=4, max_size=4), min_size=1, max_size=24), st.sampled_from([0, 3]))
def test_any_mixture_is_judged_as_exact_arithmetic_judges_it(channels: list[list[float]], quiet: int) -> None:
    """Also layers of which all but one channel are dead: ``quiet`` ones without a number are added."""
    W = np.array([*channels, *[[0.0] * 4] * quiet], np.float64).astype(np.float32).reshape(-1, 2, 2, 1)
    (found,) = scanned(layer(W)).layers
    spoilt = {k for k, channel in enumerate(W) if not np.isfinite(channel).all()}
    whole = [math.nan if k in spoilt else bound for k, bound in enumerate(oracle(np.where(np.isfinite(W), W, 0)))]
    assert set(found.non_finite) == spoilt
    assert set(found.dead) == {k for k, bound in enumerate(whole) if bound == 0}
    flagged = {channel.index for channel in found.flagged}
    assert not flagged & (spoilt | set(found.dead))
    if found.status == "judged":
        sure, near = exactly_flagged(whole)
        assert sure <= flagged <= sure | near
    elif found.status == "zero-spread":
        counted = [bound for bound in whole if bound > 0]
        assert max(counted) <= min(counted) * (1 + 2e-5)
    else:
        # No bound of ten or fewer can be above mean + 3·std.
        assert sum(bound > 0 for bound in whole) <= 10


# ---- NaN and Inf, wherever they come from


def with_bias(value: float) -> onnx.ModelProto:
    bias = Net().vector(CHANNELS)
    bias[9] = value
    return layer(kernel(), bias)


def with_weight(value: float) -> onnx.ModelProto:
    W = kernel()
    W[9, 1, 2, 0] = value
    return layer(W)


def with_statistic(name: str, value: float) -> onnx.ModelProto:
    made = norm()
    getattr(made, name)[9] = value
    return layer(kernel(), normalised=made)


def with_conv_bias_before_bn(value: float) -> onnx.ModelProto:
    bias = Net().vector(CHANNELS)
    bias[9] = value
    return layer(kernel(), bias, norm())


def spelled_out(position: str, value: float) -> onnx.ModelProto:
    """A BN as Mul and Add."""
    net = Net()
    constants = {
        name: np.random.default_rng(0).uniform(0.9, 1.1, CHANNELS).astype(np.float32) for name in ("Mul", "Add")
    }
    constants[position][9] = value
    x = net.conv(net.feed(1, 3, 8, 8), kernel())
    for op, constant in constants.items():
        x = net.per_channel(op, x, constant, name=op.lower())
    net.tail(x, CHANNELS)
    return net.case("spelled").model


def with_beta_before_another(value: float) -> onnx.ModelProto:
    net, first = Net(), norm()
    first.beta[9] = value
    x = net.bn(net.conv(net.feed(1, 3, 8, 8), kernel()), first, name="first")
    net.tail(net.bn(x, norm(), name="second"), CHANNELS)
    return net.case("two").model


def quantised(scales: Array, zero: int = 0) -> onnx.ModelProto:
    """DequantizeLinear of an int8 kernel with a scale a channel, and a Conv."""
    net = Net()
    W = np.random.default_rng(0).integers(-8, 9, (CHANNELS, 3, 3, 3)).astype(np.int8)
    W[LOUD] *= 8
    W[:, 0, 0, 0] = 8  # no kernel is 0 by chance
    names = [net.tensor(W, "W"), net.tensor(scales, "scale"), net.tensor(np.full(len(scales), zero, np.int8), "zero")]
    weight = net.op("DequantizeLinear", *names, name="dequantised", axis=0)
    net.tail(net.conv(net.feed(1, 3, 8, 8), weight, net.vector(CHANNELS), name="conv", pads=[1] * 4), CHANNELS)
    return net.case("quantised").model


def with_scale(value: float) -> onnx.ModelProto:
    scales = np.full(CHANNELS, 0.01, np.float32)
    scales[9] = value
    return quantised(scales)


def gemm(alpha: float = 1.0, bias: float = 0.0) -> onnx.ModelProto:
    """Gemm and BN."""
    net = Net()
    W, b = kernel(np.float32, 1.0, CHANNELS, 32), net.vector(CHANNELS)
    b[9] = bias
    names = [net.tensor(W, "W"), net.tensor(b, "b")]
    x = net.op("Gemm", net.feed(4, 32), *names, name="gemm", transB=1, alpha=alpha)
    net.tail(net.bn(x, norm()), CHANNELS, pooled=True)
    return net.case("gemm").model


PLACES: dict[str, Callable[[float], onnx.ModelProto]] = {
    "a weight": with_weight,
    "a bias": with_bias,
    "γ": lambda value: with_statistic("gamma", value),
    "β": lambda value: with_statistic("beta", value),
    "β of a BN before another": with_beta_before_another,
    "a mean": lambda value: with_statistic("mean", value),
    "a variance": lambda value: with_statistic("variance", value),
    "the bias of the Conv before a BN": with_conv_bias_before_bn,
    "a factor": lambda value: spelled_out("Mul", value),
    "a term": lambda value: spelled_out("Add", value),
    "a scale": with_scale,
    "the bias of a Gemm": lambda value: gemm(bias=value),
}


@broken
@pytest.mark.parametrize("place", PLACES)
def test_what_is_not_finite_is_a_finding_wherever_it_is(place: str, value: float, tmp_path: Path) -> None:
    """Never clean, never flagged as an outlier, never silenced: zeros would not silence it. Outliers beside it are."""
    model = PLACES[place](value)
    report = scanned(model)
    (found,) = report.layers
    assert 9 in found.non_finite
    assert not math.isfinite(found.bounds[9])
    assert report.findings >= 2
    assert [channel.index for channel in found.flagged] == [LOUD]
    rewrite = sanitized(model, tmp_path)
    assert [part.channels for part in rewrite.silenced] == [(LOUD,)]
    assert [part.channels for part in rewrite.left] == [found.non_finite]
    assert "NaN" in rewrite.left[0].reason


@broken
def test_an_alpha_that_is_not_finite_spoils_every_channel(value: float, tmp_path: Path, capsys: Capture) -> None:
    report = scanned(gemm(alpha=value))
    (found,) = report.layers
    assert found.non_finite == tuple(range(CHANNELS))
    assert not report.analysed
    rewrite = sanitized(gemm(alpha=value), tmp_path)
    assert rewrite.silenced == ()
    assert run(["scan", str(tmp_path / "model.onnx")]) == 3
    assert run(["scan", str(tmp_path / "model.onnx"), "--fail-on", "1"]) == 1
    assert run(["scan", str(tmp_path / "model.onnx"), "--fail-on", "100%"]) == 1
    out = capsys.readouterr().out
    assert "nothing could be judged" in out
    assert "NaN, Inf" in out
    assert "no channel above" not in out


@pytest.mark.parametrize("alpha", [0.0, -2.0, 1e-30, 1e-45, 1e30, 3e38])
def test_alpha_scales_bounds_and_no_verdict(alpha: float) -> None:
    """In float32 the kernel times alpha would be 0 or Inf; what the layer computes need not be."""
    W = kernel(np.float32, 1e-20, CHANNELS, 32)
    models = [gemm(), gemm(alpha)]
    for model in models:
        (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "W")
        weight.CopyFrom(numpy_helper.from_array(W, "W"))
    one, other = map(scanned, models)
    if alpha == 0:
        assert other.layers[0].dead == tuple(range(CHANNELS))
        return
    assert verdict(one) == verdict(other)
    factor = abs(float(np.float32(alpha)))
    np.testing.assert_allclose(other.layers[0].bounds, np.array(one.layers[0].bounds) * factor, rtol=1e-12)


@broken
def test_counting_gates_count_what_is_not_finite(value: float, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    W = kernel(np.float32)
    W[LOUD] /= 8
    W[9, 0, 0, 0] = value
    path.write_bytes(layer(W).SerializeToString())
    assert scan(path).flagged_channels == 0
    assert [run(["scan", "-q", str(path), "--fail-on", gate]) for gate in ("1", "2", "0.1%", "6.25%", "7%")] == [
        *(1, 0),
        *(1, 1, 0),
    ]


@pytest.mark.parametrize("gate", ["0", "nan", "nan%", "inf%", "-1", "1e-400%", "101%", "9" * 5000, "\u00b2", "0x1"])
def test_a_gate_that_is_no_number_is_refused(gate: str, capsys: Capture) -> None:
    assert run(["scan", "model.onnx", "--fail-on", gate]) == 2
    err = capsys.readouterr().err
    assert "--fail-on" in err
    assert "fault of onnx-clp" not in err


@pytest.mark.parametrize("shape", ["x=1,nan", "x=" + "9" * 5000, "x=1e3", "x=-1", "x=0", "x=", "=1"])
def test_a_shape_that_is_none_is_refused(shape: str, capsys: Capture) -> None:
    assert run(["sanitize", "a.onnx", "b.onnx", "--input-shape", shape]) == 2
    err = capsys.readouterr().err
    assert "--input-shape" in err
    assert "fault of onnx-clp" not in err


# ---- normalisation without a root

EPSILON = float(np.float32(1e-5))


@pytest.mark.parametrize(
    ("variance", "epsilon", "finite"),
    [
        (-1.0, 1e-5, False),
        (-EPSILON, 1e-5, False),
        (float(np.nextafter(np.float32(-EPSILON), np.float32(0))), 1e-5, True),
        (float(np.nextafter(np.float32(-EPSILON), np.float32(-1))), 1e-5, False),
        (0.0, 0.0, False),
        (-0.0, 0.0, False),
        (1e-45, 0.0, True),
        (0.5, -0.5, False),
        (0.5, -0.25, True),
        (0.25, -0.5, False),
        (math.nan, 1e-5, False),
        (1.0, math.nan, False),
        (1.0, math.inf, True),
        (1.0, -math.inf, False),
        (3e38, 3e38, True),
    ],
)
def test_a_variance_without_a_positive_root_is_a_finding(
    variance: float, epsilon: float, *, finite: bool, tmp_path: Path
) -> None:
    """As the operator is defined, γ / √(var + ε): the sum must be above 0, however small."""
    made = norm(epsilon=epsilon)
    made.variance[:] = 1.0
    made.variance[9] = variance
    model = layer(kernel(), normalised=made)
    report = scanned(model)
    (found,) = report.layers
    assert (9 not in found.non_finite) is finite
    rewrite = sanitized(model, tmp_path, max_share=1)
    assert all(9 not in part.channels for part in rewrite.silenced) or finite
    if math.isfinite(epsilon) and abs(variance) < 1e-5 < 1 + epsilon and finite:
        # The root of next to nothing makes the channel as loud as can be.
        assert found.flagged[0].index == 9


def test_no_gain_anywhere_is_no_clean_layer(tmp_path: Path, capsys: Capture) -> None:
    made = norm()
    made.gamma[:] = 0
    model = layer(kernel(), normalised=made)
    report = scanned(model)
    assert verdict(report) == [("dead", (), tuple(range(CHANNELS)), ())]
    assert not report.analysed
    assert sanitized(model, tmp_path).silenced == ()
    assert run(["scan", str(tmp_path / "model.onnx")]) == 3
    assert "not the same as clean" in capsys.readouterr().out


# ---- products beyond float64, sums of layers


def test_a_product_beyond_float64_is_a_finding_and_not_a_warning() -> None:
    """σ = 1e300 times a factor of 1e20; and nothing times Inf."""
    W, made = kernel(np.float64, 1e290), norm(np.float64)
    W[7], made.gamma[7] = 0, math.inf
    made.gamma[9] = 1e20
    (found,) = scanned(layer(W, normalised=made)).layers
    assert found.non_finite == (7, 9)
    assert [channel.index for channel in found.flagged] == [LOUD]


def test_arithmetic_on_constants_warns_of_nothing() -> None:
    """A kernel times 1/c, where c is 0, too small, or too large in one channel."""
    net = Net()
    c = np.ones((CHANNELS, 1, 1, 1), np.float32)
    c[[0, 1, 9, 11]] = np.array([0, math.nan, 1e-44, math.inf], np.float32).reshape(-1, 1, 1, 1)
    factor = net.op("Reciprocal", net.tensor(c, "c"), name="reciprocal")
    weight = net.op("Mul", net.tensor(kernel(), "W"), factor, name="mul")
    net.tail(net.conv(net.feed(1, 3, 8, 8), weight, net.vector(CHANNELS), name="conv", pads=[1] * 4), CHANNELS)
    (found,) = scanned(net.case("made").model).layers
    assert found.non_finite == (0, 1, 9)
    assert found.dead == (11,)
    assert [channel.index for channel in found.flagged] == [LOUD]


@broken
def test_a_scale_of_a_quantised_convolution_that_is_not_finite_is_a_finding(value: float) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(build("qlinear_conv_per_axis").model)
    names = {node.input[4] for node in model.graph.node if node.op_type == "QLinearConv"}
    for tensor in model.graph.initializer:
        if tensor.name in names and tensor.dims:
            for number, broken_scale in ((7, value), (9, 3e38)):
                scales = numpy_helper.to_array(tensor).copy()
                scales[number] = broken_scale
                tensor.CopyFrom(numpy_helper.from_array(scales, tensor.name))
    report = scanned(model)
    assert report.layers
    assert all({7, 9} == set(part.non_finite) for part in report.layers)


@pytest.mark.parametrize("scale", [1e-250, 1e-160, 1.0, 1e160, 1e250])
def test_the_bound_of_a_sum_is_not_lost_to_squares(scale: float) -> None:
    """√(σ₁² + σ₂²) of float64 layers whose bounds have no square in float64: not dead, and not infinite."""
    net = Net(dtype=np.float64)
    x = net.feed(1, 3, 8, 8)
    W, V = kernel(np.float64, scale), kernel(np.float64, scale / 2)
    x = net.op("Add", net.conv(x, W, name="one"), net.conv(x, V, name="other"), name="sum")
    made = norm(np.float64)
    net.tail(net.bn(x, made), CHANNELS)
    (found,) = scanned(net.case("sum").model).layers
    assert found.name == "bn"
    gain = np.abs(made.gamma) / np.sqrt(made.variance + float(np.float32(1e-5)))
    np.testing.assert_allclose(found.bounds, np.array(oracle(W)) * math.sqrt(1.25) * gain, rtol=1e-7)
    assert [channel.index for channel in found.flagged] == [LOUD]


# ---- quantised


def test_a_scale_of_zero_is_a_dead_channel_and_hides_nothing() -> None:
    scales = np.full(CHANNELS, 0.01, np.float32)
    scales[[0, 3]] = 0
    (found,) = scanned(quantised(scales)).layers
    assert found.dead == (0, 3)
    assert [channel.index for channel in found.flagged] == [LOUD]
    (found,) = scanned(quantised(np.zeros(CHANNELS, np.float32))).layers
    assert found.status == "dead"


def test_a_scale_beyond_float32_is_a_finding() -> None:
    """8 · 3e38 is Inf in the arithmetic of the operator."""
    scales = np.full(CHANNELS, 0.01, np.float32)
    scales[9] = 3e38
    (found,) = scanned(quantised(scales)).layers
    assert found.non_finite == (9,)
    assert [channel.index for channel in found.flagged] == [LOUD]


@pytest.mark.parametrize("scale", [1e-42, 1e-30, -0.01, 1e30])
def test_one_scale_on_all_channels_changes_no_verdict(scale: float) -> None:
    expected = verdict(scanned(quantised(np.full(CHANNELS, 0.01, np.float32))))
    assert expected[0][1] == (LOUD,)
    assert verdict(scanned(quantised(np.full(CHANNELS, scale, np.float32)))) == expected


@pytest.mark.parametrize("data_type", ["COMPLEX64", "COMPLEX128", "STRING", "UNDEFINED", "BOOL"])
@pytest.mark.parametrize("place", ["weight", "gamma", "cast"])
def test_a_weight_of_no_real_numbers_is_not_analysed(data_type: str, place: str) -> None:
    net = Net()
    code = onnx.TensorProto.DataType.Value(data_type)
    odd = onnx.TensorProto(data_type=code, raw_data=bytes([1, 0, 0, 0] * CHANNELS * 4))
    odd.dims.extend([CHANNELS, 1, 1, 1] if place == "weight" else [CHANNELS])
    x = net.feed(1, 1 if place == "weight" else 3, 8, 8)
    if place == "weight":
        x = net.conv(x, net.tensor(odd, "weight"), net.vector(CHANNELS))
    elif place == "gamma":
        x = net.bn(net.conv(x, kernel()), norm(), gamma=net.tensor(odd, "gamma"))
    else:
        W = net.op("Cast", net.tensor(kernel(), "W"), name="cast", to=code)
        x = net.conv(x, W, net.vector(CHANNELS))
    net.tail(x, CHANNELS)
    report = scanned(net.case("odd").model)
    assert all(part.status != "judged" or data_type == "BOOL" for part in report.layers)
    assert report.skipped or data_type == "BOOL"


# ---- few, many, large


@pytest.mark.parametrize("W", [np.ones((1, 3, 3, 3)), np.full((1, 1, 1, 1), 1e30), np.zeros((1, 3, 1, 1))])
def test_one_channel_is_not_judged_and_not_clean(W: Array) -> None:
    report = scanned(layer(W.astype(np.float32)))
    assert report.layers[0].status in {"too-few-channels", "dead"}
    assert not report.analysed
    assert math.isnan(report.layers[0].std)


def test_all_but_one_dead_are_not_judged_and_not_clean() -> None:
    W = np.zeros((64, 3, 3, 3), np.float32)
    W[LOUD] = 1e30
    report = scanned(layer(W))
    assert verdict(report) == [("too-few-channels", (), tuple(k for k in range(64) if k != LOUD), ())]
    assert not report.analysed
    # As published, where dead channels count, it stands out.
    assert [channel.index for channel in scanned(layer(W), count_dead=True).layers[0].flagged] == [LOUD]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("count", [11, 100, 1000])
def test_equal_channels_are_equal_to_the_last_bit(dtype: DTypeLike, count: int) -> None:
    """At any place among them: none stands out by rounding, and one that differs by a thousandth does."""
    W = np.repeat(kernel(dtype, 1.0, CHANNELS, 17, 3, 3)[:1], count, axis=0)
    (found,) = scanned(layer(W)).layers
    assert found.status == "zero-spread"
    assert len(set(found.bounds)) == 1
    W[7] = (W[7].astype(np.float64) * 1.01).astype(dtype)
    (found,) = scanned(layer(W)).layers
    assert [channel.index for channel in found.flagged] == [7]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((CHANNELS, 8, 1, 1), np.float32),
        ((CHANNELS, 1, 1, 1), np.float32),
        ((CHANNELS, 2, 31, 31), np.float32),
        ((CHANNELS, 12, 31, 31), np.float16),
        ((CHANNELS, 1, 31, 31), np.float32),
        ((CHANNELS, 3, 31, 31), np.float64),
    ],
)
def test_kernels_of_one_and_of_961_positions(shape: tuple[int, ...], dtype: DTypeLike) -> None:
    W = kernel(dtype, 1.0, *shape)
    if shape[1:] == (1, 1, 1):
        W[:] = np.linspace(0.9, 1.1, CHANNELS).reshape(-1, 1, 1, 1)
        W[LOUD] = 8
    (found,) = scanned(layer(W)).layers
    np.testing.assert_allclose(found.bounds, oracle(W), rtol=5e-6)
    assert [channel.index for channel in found.flagged] == [LOUD]


MILLION = """
import sys, resource
from onnx_clp import scan
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
(layer,) = scan(sys.argv[1]).layers
print(layer.status, layer.channels, [channel.index for channel in layer.flagged][:3], len(layer.non_finite))
"""

ADDRESS_SPACE = 2 << 30
"""Of a process that scans a million channels: 24 MB in the file, 0.2 GB of Python's floats, and libraries."""


@pytest.mark.parametrize("normalised", [False, True])
def test_a_million_channels(tmp_path: Path, *, normalised: bool) -> None:
    count = 10**6
    W = np.random.default_rng(0).uniform(0.9, 1.1, (count, 1, 1, 1)).astype(np.float32)
    W[123_456] = 100
    W[654_321] = np.nan
    path = tmp_path / "model.onnx"
    made = Net().norm(count) if normalised else None
    net = Net()
    x = net.conv(net.feed(1, count, 1, 1), W, None if normalised else net.vector(count), group=count)
    x = net.op("Relu", x if made is None else net.bn(x, made), name="relu")
    net.give(net.op("ReduceSum", x, name="sum"))
    path.write_bytes(net.case("million").model.SerializeToString())
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", MILLION, str(path), str(ADDRESS_SPACE)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert found.stderr == ""
    assert found.stdout == f"judged {count} [123456] 1\n"


# ---- options


def test_any_u_is_answered_and_a_larger_one_flags_no_more() -> None:
    model = layer(kernel())
    before = None
    for u in (0.0, 5e-324, 1e-300, 0.5, 1.0, 3.0, 3.7, 3.8, 100.0, 1e300, sys.float_info.max):
        flagged = {channel.index for channel in scanned(model, u=u).layers[0].flagged}
        assert before is None or flagged <= before
        before = flagged
    assert before == set()
    for u in (math.nan, math.inf, -math.inf, -1.0, -5e-324):
        with pytest.raises(UsageError, match="u is"):
            scanned(model, u=u)


def test_any_share_is_answered_and_a_larger_one_leaves_no_more(tmp_path: Path) -> None:
    model = layer(kernel())
    silenced = [
        bool(sanitized(model, tmp_path, max_share=share).silenced)
        for share in (0.0, 5e-324, 0.0624, 1 / CHANNELS, 0.5, 1.0)
    ]
    assert silenced == [False, False, False, True, True, True]
    for share in (math.nan, math.inf, -math.inf, -1.0, 1.0000001):
        with pytest.raises(UsageError, match="the largest share is"):
            sanitized(model, tmp_path, max_share=share)


# ---- as users run it

ODD = ("nan_weight", "inf_weight", "nan_gamma", "negative_variance", "zero_variance", "all_dead", "tiny_weights",
       "huge_weights", "zero_spread", "one_channel", "float8_e5m2", "model_bfloat16", "gemm_bn_alpha")  # fmt: skip


def test_nothing_is_said_on_stderr_and_no_warning_stops_it(tmp_path: Path) -> None:
    """With warnings as errors from the first line on; onnx and NumPy have given their own by then."""
    paths = [str(save(build(name), tmp_path)) for name in ODD]
    for place, make in PLACES.items():
        made = tmp_path / f"{place}.onnx"
        made.write_bytes(make(math.nan).SerializeToString())
        paths.append(str(made))
    found = subprocess.run(
        [sys.executable, "-W", "error", "-m", "onnx_clp", "scan", *paths, "--format", "json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stderr == ""
    assert [entry["path"] for entry in json.loads(found.stdout)["files"]] == paths
    for path in (paths[0], paths[2], paths[3], paths[-1]):
        found = subprocess.run(
            [sys.executable, "-W", "error", "-m", "onnx_clp", "sanitize", path, str(tmp_path / "out"), "--force"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (found.returncode, found.stderr) == (0, "")


# ---- NaN that signals: a processor sets a flag where it is converted, of which NumPy makes a warning

SIGNALLING: dict[str, Array] = {
    "float16": np.array(0x7C01, np.uint16).view(np.float16),
    "float32": np.array(0x7F800001, np.uint32).view(np.float32),
    "float64": np.array(0x7FF0000000000001, np.uint64).view(np.float64),
}

Step = tuple[str, str]
STEPS: dict[str, tuple[Step, ...]] = {
    "kernel": (("Conv", "kernel"),),
    "bias": (("Conv", "kernel row"),),
    "added": (("Conv", "kernel"), ("Add", "column")),
    "factor": (("Conv", "kernel"), ("Mul", "column"), ("Add", "column")),
    "divisor": (("Conv", "kernel"), ("Div", "column")),
    "gamma": (("Conv", "kernel"), ("BatchNormalization", "row ones ones ones")),
    "beta": (("Conv", "kernel"), ("BatchNormalization", "ones row ones ones")),
    "mean": (("Conv", "kernel"), ("BatchNormalization", "ones ones row ones")),
    "variance": (("Conv", "kernel"), ("BatchNormalization", "ones ones ones row")),
    "slope": (("Conv", "kernel"), ("PRelu", "column"), ("BatchNormalization", "ones ones ones ones")),
    "limit": (("Conv", "kernel"), ("Clip", "number number")),
    "scale": (("Conv", "kernel"), ("Resize", "nothing four")),
    "kernel that reads out": (("Conv", "kernel"), ("Relu", ""), ("Conv", "bins")),
    "kernel that enlarges": (("Conv", "kernel"), ("ConvTranspose", "enlargement")),
}
"""Where the NaN is: in all but the ones and, but for the first, the kernel."""


def signalling(place: str, dtype: str) -> onnx.ModelProto:
    """Nodes in a row, of which one reads a NaN that signals."""
    one = np.ones(CHANNELS, dtype)
    bad = one.copy()
    bad[LOUD] = SIGNALLING[dtype]
    four = np.ones(4, np.float32)
    four[0] = SIGNALLING["float32"]
    bins = np.arange(CHANNELS).astype(dtype)
    bins[LOUD] = SIGNALLING[dtype]
    levels = kernel(dtype, 1.0, CHANNELS, CHANNELS, 1, 1)
    if place == "kernel":
        levels[LOUD, 0] = SIGNALLING[dtype]
    stored: dict[str, Array] = {
        "kernel": levels,
        "ones": one,
        "row": bad,
        "column": bad.reshape(-1, 1, 1),
        "number": SIGNALLING[dtype],
        "nothing": np.ones(0, np.float32),
        "four": four,
        "bins": bins.reshape(1, -1, 1, 1),
        "enlargement": np.tile(bad.reshape(-1, 1, 1, 1), (1, 1, 2, 2)),
    }
    nodes, value = [], "x"
    for i, (operator, inputs) in enumerate(STEPS[place]):
        nodes.append(onnx.helper.make_node(operator, [value, *inputs.split()], [f"v{i}"]))
        value = f"v{i}"
    if operator == "ConvTranspose":
        nodes[-1].attribute.append(onnx.helper.make_attribute("group", CHANNELS))
    nodes.append(onnx.helper.make_node("Relu", [value], ["y"]))
    code = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        [onnx.helper.make_tensor_value_info("x", code, [1, CHANNELS, 8, 8])],
        [onnx.helper.make_tensor_value_info("y", code, None)],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=10)


@pytest.mark.parametrize("dtype", SIGNALLING)
@pytest.mark.parametrize("place", STEPS)
def test_a_nan_that_signals_is_no_warning(place: str, dtype: str, tmp_path: Path) -> None:
    model = signalling(place, dtype)
    assert any(SIGNALLING[dtype].tobytes() in tensor.raw_data for tensor in model.graph.initializer)
    report = scanned(model)
    if place in {"kernel", "bias", "added", "factor", "divisor", "gamma", "beta", "mean", "variance"}:
        assert {part.non_finite for part in report.layers} == {(LOUD,)}
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert sanitize(path, tmp_path / "out.onnx", u=1.0, max_share=1.0, dry_run=True).before.layers


def test_a_sparse_kernel_with_indices_that_are_no_integers_is_skipped() -> None:
    """One that signals would be cast to an integer."""
    model = signalling("kernel", "float32")
    (dense,) = (tensor for tensor in model.graph.initializer if tensor.name == "kernel")
    values = numpy_helper.from_array(np.ones(1, np.float32), "kernel")
    indices = numpy_helper.from_array(SIGNALLING["float32"].reshape(1), "indices")
    sparse = onnx.SparseTensorProto(values=values, indices=indices, dims=dense.dims)
    model.graph.initializer.remove(dense)
    model.graph.sparse_initializer.append(sparse)
    (part,) = scanned(model).skipped
    assert (part.reason, "no integers" in part.detail) == ("unreadable", True)
