"""The spectral norms against an oracle, against the laws of a norm, and at the edges of the number formats."""

from __future__ import annotations

import tracemalloc
import warnings
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnx_clp import bounds
from onnx_clp.bounds import spectral_norms

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from numpy.typing import DTypeLike, NDArray

RTOL = 2e-9
"""The 1e-9 of ``TOLERANCE``, twice where two bounds are compared; rounding adds less than 1e-11 at these sizes."""

RTOL_SINGLE = 5e-6
"""The same where products are in float32. ``TOLERANCE_SINGLE`` is 1e-6. Rounding is below 1e-6 on random kernels and at
most 4.3e-6 on 3x3 kernels with one singular value that dominates; half of that where the sums grow steadily."""

SHAPES = [
    (5, 8, 9),  # 3x3, rows < columns
    (5, 9, 9),
    (6, 64, 9),
    (6, 64, 25),
    (7, 3, 49),  # the 7x7 stem of three inputs
    (4, 64, 1),  # 1x1, or a matrix product
    (4, 1, 9),  # depthwise
    (3, 1, 961),  # 31x31 depthwise
    (3, 20, 5),  # one axis
    (3, 16, 27),  # three axes, 3x3x3
    (1, 64, 9),  # one channel
    (1, 1, 1),
    (3, 2, 2),
    (2, 70, 60),
]

laws = settings(deadline=None, max_examples=60)


def naive(kernel: NDArray[Any]) -> NDArray[np.float64]:
    """Return the largest singular value of each channel, one SVD in float64 at a time."""
    return np.array([np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[0] for matrix in kernel])


def rtol(dtype: DTypeLike) -> float:
    """Return the tolerance for kernels of this dtype."""
    return RTOL if np.dtype(dtype) == np.float64 else RTOL_SINGLE


def randn(*shape: int, seed: int = 0) -> NDArray[np.float64]:
    """Return normally distributed numbers, the same ones each time."""
    return np.random.default_rng(seed).standard_normal(shape)


@st.composite
def kernels(draw: st.DrawFn) -> NDArray[np.float64]:
    """Draw kernels whose elements are 0 or within [2^-20, 2^20], so that no law meets the ends of a format."""
    shape = draw(hnp.array_shapes(min_dims=3, max_dims=3, max_side=12))
    magnitude = st.floats(2.0**-20, 2.0**20)
    return draw(hnp.arrays(np.float64, shape, elements=magnitude | magnitude.map(lambda x: -x) | st.just(0.0)))


def rotation(size: int, seed: int) -> NDArray[np.float64]:
    """Return an orthogonal matrix."""
    return np.linalg.qr(randn(size, size, seed=seed))[0]


def identity(kernel: NDArray[Any]) -> NDArray[Any]:
    """Return the kernel as it is."""
    return kernel


def channels_last(kernel: NDArray[Any]) -> NDArray[Any]:
    """Return a view of the same shape over memory in the reverse order."""
    return np.ascontiguousarray(kernel.T).T


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_oracle(shape: tuple[int, int, int], dtype: DTypeLike) -> None:
    kernel = randn(*shape).astype(dtype)
    norms = spectral_norms(kernel)
    assert norms.dtype == np.float64
    assert norms.shape == shape[:1]
    np.testing.assert_allclose(norms, naive(kernel), rtol=rtol(dtype))


@laws
@given(kernels())
def test_oracle_on_drawn_kernels(kernel: NDArray[np.float64]) -> None:
    np.testing.assert_allclose(spectral_norms(kernel), naive(kernel), rtol=RTOL)


@pytest.mark.parametrize("gap", [0, 1e-14, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2, 0.5, 1])
@pytest.mark.parametrize("equal", [1, 2, 5, 9])
def test_singular_values_that_are_close(gap: float, equal: int) -> None:
    """Power sums separate slowly here: the interval has to carry the accuracy by itself."""
    singular = np.full(9, 1 - gap)
    singular[:equal] = 1
    kernel = (rotation(20, 1)[:, :9] * singular @ rotation(9, 2))[None]
    np.testing.assert_allclose(spectral_norms(kernel), 1, rtol=RTOL)


@pytest.mark.parametrize("columns", [2, 9, 16, 17])
@pytest.mark.parametrize("gap", [0, *np.geomspace(1e-7, 0.1, 25)])
def test_singular_values_that_are_close_in_float32(gap: float, columns: int) -> None:
    """Gaps that float32 tells apart are told apart, those near its resolution included."""
    singular = np.full(columns, 1 - gap)
    singular[0] = 1
    kernel = np.zeros((2, 60, columns), np.float32)
    kernel[0, :columns] = np.diag(singular)
    kernel[1] = rotation(60, 1)[:, :columns] * singular @ rotation(columns, 2)
    # The tolerance, and a few units of the last place.
    np.testing.assert_allclose(spectral_norms(kernel), naive(kernel), rtol=1.5e-6)


@pytest.mark.parametrize("value", [1, 1.1, 0.3, 1 / 3, np.pi])
@pytest.mark.parametrize("shape", [(100_000, 9), (9, 100_000), (1_000_000, 1), (30_000, 40)], ids=str)
def test_roundings_that_add_up(value: float, shape: tuple[int, int]) -> None:
    """Of equal products each sum is rounded the same way: float32 alone would lose four digits and more."""
    kernel = np.full((1, *shape), value, np.float32)
    expected = float(kernel[0, 0, 0]) * np.sqrt(shape[0] * shape[1])
    np.testing.assert_allclose(spectral_norms(kernel), expected, rtol=RTOL_SINGLE)


@pytest.mark.parametrize("rows", [1, 2, 127, 128, 129, 255, 256, 300])
@pytest.mark.parametrize("columns", [2, 9, 16, 17])
def test_rows_beside_whole_slabs(rows: int, columns: int) -> None:
    kernel = randn(3, rows, columns).astype(np.float32)
    np.testing.assert_allclose(spectral_norms(kernel), naive(kernel), rtol=RTOL_SINGLE)


@pytest.mark.parametrize("exponent", [*range(-149, -30, 7), *range(30, 120, 7)])
@pytest.mark.parametrize("shape", [(40, 9), (3, 49), (200, 1)], ids=str)
def test_every_size_of_float32(exponent: int, shape: tuple[int, int]) -> None:
    """Squares beyond float32 are formed in float64, beside channels that need none of it."""
    kernel = randn(3, *shape).astype(np.float32)
    kernel[1] = np.ldexp(kernel[1], exponent)
    np.testing.assert_allclose(spectral_norms(kernel), naive(kernel), rtol=RTOL_SINGLE)


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 0, 2), (0, 2, 1)], ids=str)
def test_strided_views(order: tuple[int, int, int]) -> None:
    view = randn(24, 18, 22)[::2, ::-1, ::2].transpose(order)
    assert not view.flags.c_contiguous
    np.testing.assert_allclose(spectral_norms(view), naive(view), rtol=RTOL)


@pytest.mark.parametrize("shape", [(50, 8, 9), (50, 9, 8), (50, 1, 9), (50, 40, 1), (2, 130, 9)], ids=str)
def test_small_blocks(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels split over blocks, and one channel's rows over slabs, add up to the same bounds."""
    monkeypatch.setattr(bounds, "BLOCK", 200)
    kernel = randn(*shape)
    np.testing.assert_allclose(spectral_norms(kernel), naive(kernel), rtol=RTOL)


@laws
@given(kernels(), st.floats(2.0**-10, 2.0**10), st.sampled_from([-1, 1]))
def test_law_scaling(kernel: NDArray[np.float64], size: float, sign: int) -> None:
    np.testing.assert_allclose(spectral_norms(sign * size * kernel), size * spectral_norms(kernel), rtol=RTOL)


@laws
@given(kernels(), st.randoms(use_true_random=False))
def test_law_permutation(kernel: NDArray[np.float64], random: Random) -> None:
    rows = random.sample(range(kernel.shape[1]), kernel.shape[1])
    columns = random.sample(range(kernel.shape[2]), kernel.shape[2])
    permuted = kernel[:, rows][:, :, columns]
    np.testing.assert_allclose(spectral_norms(permuted), spectral_norms(kernel), rtol=RTOL)


@laws
@given(kernels())
def test_law_transposition(kernel: NDArray[np.float64]) -> None:
    np.testing.assert_allclose(spectral_norms(kernel.transpose(0, 2, 1)), spectral_norms(kernel), rtol=RTOL)


@laws
@given(kernels(), st.integers(0, 2**32 - 1))
def test_law_rotation(kernel: NDArray[np.float64], seed: int) -> None:
    rotated = rotation(kernel.shape[1], seed) @ kernel @ rotation(kernel.shape[2], seed + 1)
    np.testing.assert_allclose(spectral_norms(rotated), spectral_norms(kernel), rtol=RTOL)


@laws
@given(kernels())
def test_law_between_frobenius_norms(kernel: NDArray[np.float64]) -> None:
    frobenius = np.sqrt((kernel**2).sum(axis=(1, 2)))
    norms = spectral_norms(kernel)
    assert (norms <= frobenius * (1 + RTOL)).all()
    assert (norms >= frobenius / np.sqrt(min(kernel.shape[1:])) * (1 - RTOL)).all()


@laws
@given(kernels(), st.randoms(use_true_random=False))
def test_law_channel_order(kernel: NDArray[np.float64], random: Random) -> None:
    order = random.sample(range(len(kernel)), len(kernel))
    np.testing.assert_array_equal(spectral_norms(kernel[order]), spectral_norms(kernel)[order])


@pytest.mark.parametrize("shape", [(8, 9), (64, 9), (3, 49), (1, 9), (300, 1), (512, 25)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_channels_have_equal_bits(shape: tuple[int, int], dtype: DTypeLike) -> None:
    """Alone, or anywhere among other channels that take more or fewer squarings, in any block and any layout."""
    one = randn(*shape, seed=3).astype(dtype)
    many = randn(150, *shape, seed=4).astype(dtype)
    positions = [0, 1, 2, 3, 50, 77, 149]
    many[positions] = one
    for layout in (identity, channels_last):
        np.testing.assert_array_equal(spectral_norms(layout(many))[positions], spectral_norms(one[None])[0])


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (np.float16, 6e-8),
        (np.float16, 65504),
        (ml_dtypes.bfloat16, 1e-40),
        (ml_dtypes.bfloat16, 3e38),
        (np.float32, 1e-45),
        (np.float32, 1e38),
        (np.float64, 5e-324),
        (np.float64, 1e-300),
        (np.float64, 1e300),
        (np.float64, 1e306),
        (np.float64, -1e306),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (1, 9), (16, 1)], ids=str)
def test_ends_of_the_formats(dtype: DTypeLike, value: float, shape: tuple[int, int]) -> None:
    """A constant matrix has the norm |c|·√(rows·columns); one element alone has its own size."""
    kernel = np.zeros((2, *shape), dtype)
    kernel[0] = value
    kernel[1, 0, 0] = value
    size = float(kernel[1, 0, 0])
    constant, single = spectral_norms(kernel)
    # Among denormals the spacing of float64 is 5e-324.
    np.testing.assert_allclose(constant, abs(size) * np.sqrt(shape[0] * shape[1]), rtol=rtol(dtype), atol=5e-324)
    np.testing.assert_allclose(single, abs(size), rtol=4e-16 if dtype == np.float64 else 2e-7, atol=0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_one_number_is_its_own_norm(dtype: DTypeLike) -> None:
    kernel = randn(1000, 1, 1).astype(dtype)
    np.testing.assert_array_equal(spectral_norms(kernel), abs(kernel[:, 0, 0].astype(np.float64)))


def test_norm_beyond_float64_is_inf() -> None:
    assert spectral_norms(np.full((1, 9, 9), 1e308))[0] == np.inf


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(20, 9), (3, 49), (1, 9), (30, 1)], ids=str)
def test_zero_nan_and_inf_stay_in_their_channels(dtype: DTypeLike, shape: tuple[int, int]) -> None:
    kernel = randn(7, *shape).astype(dtype)
    kernel[1] = 0
    kernel[2, -1, -1] = np.nan
    kernel[3, 0, 0] = np.inf
    kernel[4, 0, 0], kernel[4, -1, -1] = np.inf, np.nan
    kernel[5, 0, 0], kernel[5, -1, -1] = np.inf, -np.inf
    norms = spectral_norms(kernel)
    np.testing.assert_array_equal(norms[1:6], [0, np.nan, np.inf, np.nan, np.inf])
    np.testing.assert_allclose(norms[[0, 6]], naive(kernel[[0, 6]]), rtol=rtol(dtype))


def test_no_warning_and_no_change_of_the_callers_error_state() -> None:
    kernel = randn(4, 9, 9)
    kernel[0], kernel[1], kernel[2] = 0, np.nan, np.inf
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        spectral_norms(kernel)
        spectral_norms(kernel.astype(np.float32))
        assert np.geterr()["divide"] == "raise"


def test_kernel_is_not_written_to() -> None:
    kernel = randn(4, 9, 9) * 1e200
    before = kernel.copy()
    kernel.flags.writeable = False
    spectral_norms(kernel)
    np.testing.assert_array_equal(kernel, before)


@pytest.mark.parametrize("shape", [(0, 3, 9), (3, 0, 9), (3, 9, 0), (0, 0, 0)], ids=str)
def test_no_elements(shape: tuple[int, int, int]) -> None:
    np.testing.assert_array_equal(spectral_norms(np.zeros(shape, np.float32)), np.zeros(shape[0]))


def test_integers() -> None:
    kernel = np.full((1, 9, 9), -128, np.int8)
    np.testing.assert_allclose(spectral_norms(kernel), 128 * 9, rtol=RTOL_SINGLE)


def test_a_million_channels() -> None:
    kernel = np.ones((10**6, 1, 9), np.float32)
    kernel[:, 0, 0] = np.arange(10**6) % 7
    expected = np.sqrt((np.arange(10**6) % 7) ** 2 + 8.0)
    # One square root and nine exact sums: the last bit.
    np.testing.assert_allclose(spectral_norms(kernel), expected, rtol=2**-52)


@pytest.mark.parametrize("layout", [identity, channels_last])
@pytest.mark.parametrize(
    "shape", [(4, 512, 512), (8, 60_000, 9), (1, 600_000, 9), (4, 9, 120_000), (100_000, 5, 9)], ids=str
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extra_memory(shape: tuple[int, int, int], dtype: DTypeLike, layout: Callable[[Any], Any]) -> None:
    kernel = layout(np.ones(shape, dtype))
    tracemalloc.start()
    try:
        spectral_norms(kernel)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32e6


@pytest.mark.parametrize("shape", [(3,), (3, 9), (3, 3, 3, 3)], ids=str)
def test_other_axes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(channels, rows, columns\)"):
        spectral_norms(np.zeros(shape))


def test_complex_is_refused() -> None:
    with pytest.raises(TypeError, match="complex"):
        spectral_norms(np.zeros((1, 1, 1), np.complex64))
