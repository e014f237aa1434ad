"""The spectral norm of every channel's kernel matrix.

The upper bound of the channel Lipschitz constant (UCLC) of Zheng, Tang, Li and Liu, *Data-free Backdoor Removal Based
on Channel Lipschitzness*, ECCV 2022, arXiv:2208.03111, is for channel k

    UCLC_k = σ_max(A_k),    A_k = the kernel of k as a matrix of C_in/groups rows and ∏kernel columns.

**Gram matrix.** σ_max(A)² = λ_max(G), where G is the smaller of AᵀA and AAᵀ, m × m and positive semidefinite.
Products and sums are in float64: squares of float32 neither overflow nor vanish there, and float64 kernels are
first scaled by a power of two.

**Power sums.** Let λ₁ ≥ … ≥ λ_m ≥ 0 be the eigenvalues of G, s_p = Σ λᵢ^p = tr G^p, and M = G^p / s_p, with the
eigenvalues μᵢ = λᵢ^p / s_p, which sum to 1. Then

    λ₁ = (s_p · μ₁)^(1/p),    lower(t) ≤ μ₁ ≤ upper(t),    t = Σ μᵢ² = ‖M‖_F²

    upper(t) = (1 + √((m − 1)(m·t − 1))) / m     from Cauchy's  (1 − μ₁)² ≤ (m − 1)(t − μ₁²)
    lower(t) = (1 + √(2t − 1)) / 2               from  t ≤ μ₁² + (1 − μ₁)²,  where t > ½
    lower(t) = t                                 from  t ≤ μ₁ · Σ μᵢ,        elsewhere

Squaring M doubles p, so the interval for λ₁ shrinks by the p-th root whatever the spectrum (equal singular values
included), and faster than geometrically once λ₂^p ≪ λ₁^p. A channel is done when the interval for σ_max is narrower
than its tolerance; nothing is assumed to have converged.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["spectral_norms"]

Float64s: TypeAlias = NDArray[np.float64]

TOLERANCE = 1e-9
"""Largest relative error of σ_max left by the interval: four digits beyond what a comparison of channels needs."""

BLOCK = 2**18
"""Most float64 elements of one intermediate array: 2 MB, about the second-level cache, and large enough that the calls
into NumPy cost little. About six such arrays live at once, 12 MB; one Gram matrix beyond 512 × 512 is larger."""

FIRST_SQUARINGS, NEXT_SQUARINGS = 6, 2
"""Squarings before the first and between later looks at the interval. Between looks nothing is normalised:
tr M^64 ≥ m^-63 stays far above the smallest float64 for any Gram matrix that fits in memory."""


def spectral_norms(kernel: NDArray[Any]) -> Float64s:
    """Return σ_max of each channel's kernel matrix.

    Args:
        kernel: shape (channels, rows, columns), rows = C_in/groups, columns = product of the spatial sizes. Any real
            dtype that casts to float64 (float16, float32, float64, bfloat16, float8, integers); any strides.

    Returns:
        float64, shape (channels,). The relative error is at most ``TOLERANCE`` + max(rows, columns) · min(rows,
        columns) · 2⁻⁵³, the second term from rounding in the Gram matrix. Exactly 0.0 if and only if all of the
        channel is zero (or it has no elements); nan where the channel holds NaN; inf where it holds an infinity and no
        NaN, or where σ_max itself exceeds the largest float64. Equal channels of one kernel get equal bits at any
        position.

    Raises:
        ValueError: the kernel does not have three axes.
        TypeError: the kernel is complex.

    """
    if kernel.ndim != 3:  # noqa: PLR2004
        raise ValueError(f"a kernel has the axes (channels, rows, columns), not the shape {kernel.shape}")
    if np.iscomplexobj(kernel):
        raise TypeError("a kernel is real, not complex")
    norms = np.zeros(len(kernel))
    if kernel.size == 0:
        return norms
    tall = kernel if kernel.shape[1] >= kernel.shape[2] else kernel.transpose(0, 2, 1)
    step = max(1, BLOCK // tall.shape[2] ** 2)
    # Under- and overflow are meant here, and NaN and Inf travel through the products to the trace.
    with np.errstate(all="ignore"):
        for first in range(0, len(tall), step):
            norms[first : first + step] = _norms_of_block(tall[first : first + step])
    return norms


def _norms_of_block(a: NDArray[Any]) -> Float64s:
    """Return σ_max of each matrix of ``a``, shape (n, rows, m) with rows ≥ m."""
    exponent = _exponents(a)
    gram = _gram(a, np.ldexp(1.0, -exponent))
    # A sum of squares: 0 only if all are 0, nan if one is NaN, inf if one is infinite and none is NaN.
    trace = np.einsum("nii->n", gram)
    regular = np.isfinite(trace) & (trace > 0)
    eigenvalue = trace
    if gram.shape[1] > 1 and regular.any():
        gram /= trace[:, None, None]
        eigenvalue = np.where(regular, trace * _largest_eigenvalues(gram), trace)
    norms: Float64s = np.ldexp(np.sqrt(eigenvalue), exponent)
    return norms


def _exponents(a: NDArray[Any]) -> NDArray[np.intc]:
    """Return for each matrix the e for which 2^-e times its elements can be squared in float64."""
    if a.dtype.itemsize < np.dtype(np.float64).itemsize:
        return np.zeros(len(a), np.intc)
    peak = np.maximum(a.max(axis=(1, 2)).astype(np.float64), -a.min(axis=(1, 2)).astype(np.float64))
    # The exponent that frexp gives for NaN and Inf is unspecified.
    exponent = np.frexp(np.where(np.isfinite(peak), peak, 1.0))[1]
    # 2^1000 lifts the smallest denormal far enough, and 2^1074 would not be a float64.
    return np.maximum(exponent, -1000)


def _gram(a: NDArray[Any], scale: Float64s) -> Float64s:
    """Return (scale·A)ᵀ(scale·A) in float64 for each matrix A of ``a``, shape (n, rows, m)."""
    n, rows, m = a.shape
    gram = np.zeros((n, m, m))
    channels, slab = max(1, BLOCK // (rows * m)), max(1, BLOCK // m)
    for c in range(0, n, channels):
        here = slice(c, c + channels)
        for r in range(0, rows, slab):
            x = a[here, r : r + slab].astype(np.float64, order="C")
            if (scale[here] != 1).any():
                x *= scale[here, None, None]
            # For XᵀX, NumPy calls syrk, which takes twice the time of gemm at these sizes; all rows but one are gemm's.
            gram[here, :-1] += x[:, :, :-1].transpose(0, 2, 1) @ x
            gram[here, -1, -1] += np.einsum("nr,nr->n", x[:, :, -1], x[:, :, -1])
    gram[:, -1, :-1] = gram[:, :-1, -1]
    return gram


def _largest_eigenvalues(m_p: Float64s) -> Float64s:
    """Return λ₁ of positive semidefinite matrices of trace 1, shape (n, m, m), m > 1; anything for those with NaN."""
    n, m, _ = m_p.shape
    log_eigenvalue = np.empty(n)
    log_root = np.zeros(n)  # (log s_p) / p
    todo = np.arange(n)
    p, squarings = 1, FIRST_SQUARINGS
    while True:
        for _ in range(squarings):
            m_p = m_p @ m_p
        p, squarings = p << squarings, NEXT_SQUARINGS
        trace = np.einsum("nii->n", m_p)
        log_root += np.log(trace) / p
        t = np.einsum("nij,nij->n", m_p, m_p) / trace**2
        upper = (1 + np.sqrt(np.maximum((m - 1) * (m * t - 1), 0))) / m
        lower = np.where(t > 0.5, (1 + np.sqrt(np.maximum(2 * t - 1, 0))) / 2, t)  # noqa: PLR2004
        log_eigenvalue[todo] = log_root + np.log((lower + upper) / 2) / p
        # Half the interval of μ₁, through the p-th root to λ₁ and the square root to σ_max.
        wide = upper - lower > 4 * p * TOLERANCE * lower
        if not wide.any():
            return np.exp(log_eigenvalue)
        todo, log_root = todo[wide], log_root[wide]
        m_p = m_p[wide] / trace[wide, None, None]
