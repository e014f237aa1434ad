"""The judgement of one layer against exact arithmetic, against the naive twin, and at the edges that have an answer."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from onnx_clp.defaults import DEFAULT_U
from onnx_clp.judge import ROUNDING, Judgement, Status, judge, largest_possible_z
from tests import naive

Bounds = NDArray[np.float64]

laws = settings(deadline=None, max_examples=150)

NEAR = 1e-6
"""How far from u a z must lie to be sure of its side: float64 rounds to 1e-16, times mean/std, at most 1e6 here."""

ordinary = st.floats(0.01, 100)
extreme = st.sampled_from([5e-324, 1e-310, 1e-200, 1e150, 1e300, 1.7e308])
broken = st.sampled_from([math.nan, math.inf])


def layers(*elements: st.SearchStrategy[float], smallest: int = 0) -> st.SearchStrategy[Bounds]:
    """Layers of 0 to 45 channels, many of them alike and some of them not."""
    values = [1.0, 0.3, *([1e300, 1e-310] if extreme in elements else [])]
    alike = st.builds(lambda n, value: [value] * n, st.integers(0, 25), st.sampled_from(values))
    other = st.lists(st.one_of(*elements), min_size=smallest, max_size=20)
    return st.builds(lambda left, right: np.array(left + right, np.float64), alike, other)


anything = layers(ordinary, st.just(0.0), extreme, broken)
finite = layers(ordinary, st.just(0.0), extreme)


def judged(bounds: ArrayLike, u: float = DEFAULT_U, *, count_dead: bool = False) -> Judgement:
    return judge(np.asarray(bounds, np.float64), u, count_dead=count_dead)


def spread_of(counted: list[float]) -> tuple[Fraction, Fraction]:
    """Mean and variance (n − 1), without rounding."""
    exact = [Fraction(bound) for bound in counted]
    mean = sum(exact, Fraction(0)) / len(exact)
    return mean, sum(((bound - mean) ** 2 for bound in exact), Fraction(0)) / (len(exact) - 1)


# ---- the rule


@laws
@given(anything, st.sampled_from([0.0, 0.5, 2.0, 3.0, 5.0]), st.booleans())
@example(np.array([1.0] * 11 + [1e300]), 3.0, False)  # noqa: FBT003
@example(np.array([5e-324] * 20 + [5e-323]), 3.0, False)  # noqa: FBT003
def test_a_channel_is_flagged_where_exact_arithmetic_puts_it_above_the_threshold(
    bounds: Bounds,
    u: float,
    count_dead: bool,  # noqa: FBT001  # drawn
) -> None:
    found = judge(bounds, u, count_dead=count_dead)
    counted = [float(bound) for bound in bounds if math.isfinite(bound) and (count_dead or bound > 0)]
    if len(counted) < 2:
        assert found.flagged == ()
        return
    mean, variance = spread_of(counted)
    if variance <= (Fraction(ROUNDING) * mean) ** 2 * Fraction(1001, 1000):
        assert variance > (Fraction(ROUNDING) * mean) ** 2 * Fraction(999, 1000) or found.flagged == ()
        return
    for k, bound in enumerate(bounds):
        if not math.isfinite(bound):
            assert k not in found.flagged
            continue
        above = Fraction(float(bound)) - mean
        if above <= 0:
            assert k not in found.flagged or (u == 0 and above**2 <= variance * Fraction(NEAR) ** 2)
        elif above**2 > Fraction(u + NEAR) ** 2 * variance and largest_possible_z(len(counted)) > u:
            assert k in found.flagged
        elif u > 0 and above**2 < Fraction(u - NEAR) ** 2 * variance:
            assert k not in found.flagged


@laws
@given(layers(ordinary, st.just(0.0), broken, smallest=2), st.sampled_from([1.0, 3.0, 5.0]), st.booleans())
def test_the_naive_twin_flags_the_same_channels(bounds: Bounds, u: float, count_dead: bool) -> None:  # noqa: FBT001
    found = judge(bounds, u, count_dead=count_dead)
    assume(found.status is not Status.ZERO_SPREAD)
    counted = [float(bound) for bound in bounds if math.isfinite(bound) and (count_dead or bound > 0)]
    assume(len(counted) > 1)
    mean, std = math.fsum(counted) / len(counted), float(np.std(counted, ddof=1))
    # On the threshold itself two ways of rounding may disagree.
    assume(not any(abs(bound - (mean + u * std)) < NEAR * (mean + std) for bound in counted))
    assert list(found.flagged) == naive.flagged(bounds, u, count_dead=count_dead)
    assert list(found.non_finite) == naive.broken(bounds)


def test_the_threshold_is_strict() -> None:
    # Sums of few powers of two, so nothing is rounded: mean 3, std 1, threshold 4 or 4 − 2⁻⁵⁰.
    assert judged([2, 3, 4], u=1).threshold == 4
    assert judged([2, 3, 4], u=1).flagged == ()
    assert judged([2, 3, 4], u=1 - 2**-50).flagged == (2,)


def test_mean_std_and_threshold_are_those_of_the_formula() -> None:
    found = judged([1, 2, 3, 4, 0, math.nan], u=1)
    assert found.mean == pytest.approx(2.5, rel=1e-15)  # a rounding or two of float64
    assert found.std == pytest.approx(math.sqrt(5 / 3), rel=1e-15)  # n − 1 = 3, not 4
    assert found.threshold == pytest.approx(2.5 + math.sqrt(5 / 3), rel=1e-15)
    z = (4 - found.mean) / found.std
    assert found == Judgement(Status.JUDGED, found.mean, found.std, found.threshold, (3,), (4,), (5,), found.scores)
    assert list(found.scores) == pytest.approx([z], rel=1e-15)


# ---- laws


@laws
@given(layers(ordinary, extreme, st.just(0.0)).filter(lambda bounds: len(bounds) <= 10), st.booleans())
def test_ten_channels_or_fewer_never_flag_at_three(bounds: Bounds, count_dead: bool) -> None:  # noqa: FBT001
    found = judge(bounds, 3.0, count_dead=count_dead)
    assert found.flagged == ()
    assert found.status in {Status.TOO_FEW_CHANNELS, Status.DEAD}
    assert math.isnan(found.threshold)


def test_eleven_channels_can_flag_at_three() -> None:
    assert judged([1.0] * 10 + [2.0]).flagged == (10,)


@laws
@given(layers(ordinary, st.just(0.0), smallest=2).filter(lambda bounds: len(bounds) > 1))
def test_no_z_is_larger_than_the_largest_possible(bounds: Bounds) -> None:
    mean, variance = spread_of([float(bound) for bound in bounds])
    if variance:
        z_squared = (Fraction(float(bounds.max())) - mean) ** 2 / variance
        # Exact but for the limit itself, which is rounded to 1e-16.
        assert z_squared <= Fraction(largest_possible_z(len(bounds))) ** 2 * (1 + Fraction(1, 10**14))


@pytest.mark.parametrize("channels", [2, 3, 10, 11, 64, 2048])
def test_the_largest_possible_z_is_reached_by_one_among_equals(channels: int) -> None:
    bounds = np.array([1.0] * (channels - 1) + [2.0])
    z = (bounds[-1] - bounds.mean()) / bounds.std(ddof=1)
    assert largest_possible_z(channels) == pytest.approx(z, rel=1e-12)  # sums of 2048 terms of float64


def test_the_largest_possible_z_of_nothing_is_nothing() -> None:
    assert largest_possible_z(0) == 0
    assert largest_possible_z(1) == 0
    assert largest_possible_z(10) < 3 < largest_possible_z(11)


@laws
@given(layers(ordinary, st.just(0.0)), st.integers(-60, 60), st.booleans())
def test_a_power_of_two_changes_no_judgement(bounds: Bounds, power: int, count_dead: bool) -> None:  # noqa: FBT001
    before = judge(bounds, count_dead=count_dead)
    after = judge(np.ldexp(bounds, power), count_dead=count_dead)
    assert (after.status, after.flagged, after.dead) == (before.status, before.flagged, before.dead)
    # Powers of two are not rounded, so not a bit of leeway.
    np.testing.assert_array_equal([after.mean, after.std], np.ldexp([before.mean, before.std], power))


@laws
@given(layers(ordinary, smallest=11), st.lists(st.sampled_from([0.0, math.nan, math.inf]), max_size=10))
def test_what_does_not_count_moves_nothing(bounds: Bounds, others: list[float]) -> None:
    alone, among = judge(bounds), judge(np.concatenate([bounds, others]))
    assert (among.status, among.mean, among.flagged) == (alone.status, alone.mean, alone.flagged)
    np.testing.assert_array_equal([among.std, among.threshold], [alone.std, alone.threshold])
    start = len(bounds)
    assert among.dead == tuple(start + k for k, value in enumerate(others) if value == 0)
    assert among.non_finite == tuple(start + k for k, value in enumerate(others) if value != 0)


@laws
@given(anything)
def test_every_channel_is_in_at_most_one_list_and_the_lists_ascend(bounds: Bounds) -> None:
    found = judge(bounds)
    named = [*found.flagged, *found.dead, *found.non_finite]
    assert len(named) == len(set(named))
    for part in (found.flagged, found.dead, found.non_finite):
        assert list(part) == sorted(part)
    assert found.status is Status.JUDGED or not found.flagged


@laws
@given(finite)
def test_huge_and_tiny_bounds_overflow_nothing(bounds: Bounds) -> None:
    with np.errstate(under="ignore"):
        found = judge(bounds)
    if found.status is Status.DEAD:
        assert math.isnan(found.mean)
        return
    alive = bounds[bounds > 0]
    # A mean lies among its numbers; the last bit may be rounded away, and 5e-324 is the smallest number there is.
    assert alive.min() * (1 - 1e-15) - 5e-324 <= found.mean <= alive.max()
    assert not np.isinf(found.std)


# ---- the answers of odd layers


def test_equal_bounds_have_no_spread() -> None:
    found = judged([0.7] * 20)
    assert found.status is Status.ZERO_SPREAD
    assert found.flagged == ()
    assert found.threshold == found.mean


@pytest.mark.parametrize(("spread", "status"), [(1e-8, Status.ZERO_SPREAD), (1e-4, Status.JUDGED)])
def test_a_spread_of_rounding_is_no_spread(spread: float, status: Status) -> None:
    bounds = np.full(20, 0.7)
    bounds[3] *= 1 + spread
    found = judge(bounds)
    assert found.status is status
    assert found.flagged == ((3,) if status is Status.JUDGED else ())


@pytest.mark.parametrize("bounds", [[0.0] * 20, [], [math.nan] * 20, [0.0, math.inf] * 10])
@pytest.mark.parametrize("count_dead", [False, True])
def test_a_layer_without_a_live_channel_is_dead(bounds: list[float], *, count_dead: bool) -> None:
    found = judged(bounds, count_dead=count_dead)
    assert found.status is Status.DEAD
    assert found.flagged == ()
    assert found.dead == tuple(k for k, bound in enumerate(bounds) if bound == 0)


def test_dead_channels_hide_nothing_unless_they_are_counted() -> None:
    bounds = [0.0] * 6 + [0.98, 1.02] * 12 + [1.8]
    assert judged(bounds).flagged == (30,)
    assert judged(bounds, count_dead=True).flagged == ()
    assert judged(bounds).dead == judged(bounds, count_dead=True).dead == tuple(range(6))
    assert judged(bounds).threshold < 1.8 < judged(bounds, count_dead=True).threshold


def test_counting_dead_channels_is_the_published_arithmetic() -> None:
    bounds = np.array([0.0] * 3 + [1.0] * 20 + [9.0])
    found = judge(bounds, count_dead=True)
    assert found.mean == pytest.approx(float(bounds.mean()), rel=1e-14)  # 24 terms of float64
    assert found.std == pytest.approx(float(bounds.std(ddof=1)), rel=1e-14)


def test_too_few_depends_on_u_and_on_what_counts() -> None:
    bounds = [1.0] * 5 + [100.0]
    assert judged(bounds, u=3).status is Status.TOO_FEW_CHANNELS
    assert judged(bounds, u=2).flagged == (5,)
    assert judged([*bounds, 0, 0, 0, 0, 0, 0], u=3).status is Status.TOO_FEW_CHANNELS
    assert judged([1.0] * 11 + [2.0], u=5).status is Status.TOO_FEW_CHANNELS


def test_an_infinite_channel_is_a_finding_and_hides_no_outlier() -> None:
    found = judged([1.0] * 20 + [5.0, math.inf, math.nan])
    assert found.flagged == (20,)
    assert found.non_finite == (21, 22)
    assert math.isfinite(found.threshold)
