"""The spectral norm of every channel's kernel matrix.

The upper bound of the channel Lipschitz constant (UCLC) of Zheng, Tang, Li and Liu, *Data-free Backdoor Removal Based
on Channel Lipschitzness*, ECCV 2022, arXiv:2208.03111, is for channel k

    UCLC_k = σ_max(A_k),    A_k = the kernel of k as a matrix of C_in/groups rows and ∏kernel columns.

**Gram matrix.** σ_max(A)² = λ_max(G), where G is the smaller of AᵀA and AAᵀ, m × m and positive semidefinite. Kernels
in float32 and narrower formats are multiplied in float32, ``SLAB`` rows at a time, and the slabs added up in float64.
Where squares may have over- or underflowed there, and for float64 kernels, all is in float64; float64 kernels are
first scaled by a power of two.

**Rounding.** A sum of K products, in any order, is off by at most K·u·Σ|a_ri·a_rj| (to first order; u = 2⁻²⁴ or 2⁻⁵³),
and the matrix of these sums of sizes has at most the norm ‖A‖_F² = tr G. With q = tr G/λ₁, 1 ≤ q ≤ m, σ_max is off by
at most the fraction ½·K·u·q, K = ``SLAB`` in float32 and the rows in float64. q is near 1 where one singular value
dominates, so also where all signs agree and roundings add up. To come near the bound where q is large, the roundings of
all m² sums would have to line up with one eigenvector; those of random kernels do not.

**Shift.** With s = tr G / 2m ≤ λ₁/2, the eigenvalue of B = G − s·I of largest size is λ₁ − s ≥ s: the others lie
between −s and λ₁ − s. It stands out more than λ₁ in G.

**Power sums.** Let β₁ = λ₁ − s, |β₁| ≥ … ≥ |β_m| be the eigenvalues of B, p even, s_p = Σ βᵢ^p = tr B^p, and
M = B^p / s_p, with the eigenvalues μᵢ = βᵢ^p / s_p ≥ 0, which sum to 1. Then

    β₁ = (s_p · μ₁)^(1/p),    lower(t) ≤ μ₁ ≤ upper(t),    t = Σ μᵢ² = ‖M‖_F²

    upper(t) = (1 + √((m − 1)(m·t − 1))) / m     from Cauchy's  (1 − μ₁)² ≤ (m − 1)(t − μ₁²)
    lower(t) = (1 + √(2t − 1)) / 2               from  t ≤ μ₁² + (1 − μ₁)²,  where t > ½
    lower(t) = t                                 from  t ≤ μ₁ · Σ μᵢ,        elsewhere

Squaring M doubles p, so the interval for β₁ shrinks by the p-th root whatever the spectrum (equal singular values
included), and faster than geometrically once β₂^p ≪ β₁^p. A channel is done when the interval for σ_max is narrower
than its tolerance; nothing is assumed to have converged.

The square of B^p is off by at most m·u·‖B^p‖_F², the fraction m·u·‖B‖_F²/β₁² of its largest eigenvalue, of which the
root leaves 1/2p. Over p = 1, 2, 4, … and with ‖B‖_F² ≤ β₁·Σ|βᵢ| ≤ β₁·1.5·tr G, that is ¾·m·u·q of σ_max. The sums in
t and tr M are in float64 for both formats: off by 2m·2⁻⁵³, they move upper(t) by no more than m·2⁻²⁶ of μ₁, which is
m·2⁻³³ of σ_max at p = 64.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["spectral_norms"]

Float64s: TypeAlias = NDArray[np.float64]

TOLERANCE, TOLERANCE_SINGLE = 1e-9, 1e-6
"""Largest relative error of σ_max left by the interval, where the Gram matrix is in float64 and in float32."""

SLAB = 128
"""Rows that are summed up in float32 before float64 goes on. It bounds the rounding; 512 would not be faster."""

SAFE = 2.0**-80, 2.0**80
"""Where the trace of a Gram matrix in float32 lies if neither overflow nor underflow can have mattered: no sum exceeds
the trace, and what a square loses below 2^-126 is less than 2^-46 of it."""

SINGLE_SIDE = 16
"""Largest Gram matrix that is squared in float32: ¾·16·2⁻²⁴ = 0.7e-6. Beyond it float64 costs little more."""

BLOCK = 2**18
"""Most elements of one batch of Gram matrices: 2 MB in float64, about the second-level cache, and large enough that the
calls into NumPy cost little. About six such arrays live at once, 12 MB; one Gram matrix beyond 512 × 512 is larger.
A copy of slabs may have four times as many, 8 MB; contiguous matrices in float32 are not copied."""

SQUARINGS, FIRST_LOOK = 3, 64
"""Squarings between two normalisations, and the p from which on these come with a look at the interval. Both formats
hold tr B^8 ≥ (2m)^-8 and tr M^8 ≥ m^-7 of any Gram matrix they are used for."""


def spectral_norms(kernel: NDArray[Any]) -> Float64s:
    """Return σ_max of each channel's kernel matrix.

    Args:
        kernel: shape (channels, rows, columns), rows = C_in/groups, columns = product of the spatial sizes. Any real
            dtype that casts to float64 (float16, float32, float64, bfloat16, float8, integers); any strides.

    Returns:
        float64, shape (channels,). With q = ‖A‖_F²/σ_max², 1 ≤ q ≤ min(rows, columns), the relative error is at most
        1e-6 + 4.7e-6·q for float32 and all formats of one or two bytes (below 1e-6 on random kernels), and at most
        1e-9 + min(rows, columns)·2⁻³³ + (rows + columns)·q·2⁻⁵³ for the others. Exactly 0.0 if and only if all of the
        channel is zero (or it has no elements); nan where the channel holds NaN; inf where it holds an infinity and no
        NaN, or where σ_max itself exceeds the largest float64. Equal channels of one kernel get equal bits at any
        position.

    Raises:
        ValueError: the kernel does not have three axes.
        TypeError: the kernel is complex.

    """
    if kernel.ndim != 3:
        raise ValueError(f"a kernel has the axes (channels, rows, columns), not the shape {kernel.shape}")
    if np.iscomplexobj(kernel):
        raise TypeError("a kernel is real, not complex")
    norms = np.zeros(len(kernel))
    if kernel.size == 0:
        return norms
    rows, m = max(kernel.shape[1:]), min(kernel.shape[1:])
    step = max(1, BLOCK // (m * max(m, min(rows, SLAB) // 4)))
    # One number is its own norm, exactly: the square of a float32 fits in float64.
    single = rows > 1 and (kernel.dtype == np.float32 or kernel.dtype.itemsize < np.dtype(np.float32).itemsize)
    # Under- and overflow are meant here, and NaN and Inf travel through the products to the trace.
    with np.errstate(all="ignore"):
        for first in range(0, len(kernel), step):
            a, here = kernel[first : first + step], norms[first : first + step]
            careful = np.arange(len(a))
            if single:
                gram, trace = _gram(a)
                here[:] = _norms(gram, trace, TOLERANCE_SINGLE)
                careful = np.flatnonzero(~((trace > SAFE[0]) & (trace < SAFE[1])))
            if careful.size:
                exponent = _exponents(a)[careful]
                here[careful] = np.ldexp(_norms(*_gram(a, careful, exponent), TOLERANCE), exponent)
    return norms


def _norms(gram: NDArray[Any], trace: Float64s, tolerance: float) -> Float64s:
    """Return σ_max of the matrices with the Gram matrices trace·gram."""
    regular = np.isfinite(trace) & (trace > 0)
    if gram.shape[1] == 1 or not regular.any():
        return np.sqrt(trace)
    return np.sqrt(np.where(regular, trace * _largest_eigenvalues(gram, tolerance), trace))


def _exponents(a: NDArray[Any]) -> NDArray[np.intc]:
    """Return for each matrix the e for which 2^-e times its elements can be squared in float64."""
    if a.dtype.itemsize < np.dtype(np.float64).itemsize:
        return np.zeros(len(a), np.intc)
    peak = np.maximum(a.max(axis=(1, 2)).astype(np.float64), -a.min(axis=(1, 2)).astype(np.float64))
    # The exponent that frexp gives for NaN and Inf is unspecified.
    exponent = np.frexp(np.where(np.isfinite(peak), peak, 1.0))[1]
    # 2^1000 lifts the smallest denormal far enough, and 2^1074 would not be a float64.
    return np.maximum(exponent, -1000)


def _gram(
    a: NDArray[Any], which: NDArray[np.intp] | None = None, exponent: NDArray[np.intc] | None = None
) -> tuple[NDArray[Any], Float64s]:
    """Return G/tr G and tr G, for G = the smaller of AᵀA and AAᵀ of each matrix A of ``a``.

    Products are in float32; or, of the matrices named and with 2^-exponent·A for A, in float64.
    """
    n, wide = len(a) if which is None else len(which), a.shape[1] < a.shape[2]
    rows, m = (a.shape[2], a.shape[1]) if wide else a.shape[1:]
    dtype = np.float32 if which is None else np.float64
    # One memory order for all, so that equal channels get equal bits.
    direct = which is None and a.dtype == dtype and a.strides[1:] == (a.shape[2] * a.itemsize, a.itemsize)
    chunk = rows if direct else SLAB * max(1, 4 * BLOCK // (n * m * SLAB))
    columns, corner = np.zeros((n, m, m - 1)), np.zeros(n)
    for r in range(0, rows, chunk):
        x = a[:, :, r : r + chunk] if wide else a[:, r : r + chunk]
        if not direct:
            x = (x if n == len(a) else x[which]).astype(dtype, order="C")
        if exponent is not None and exponent.any():
            np.ldexp(x, -exponent[:, None, None], out=x)
        x = x.swapaxes(1, 2) if wide else x
        whole = x.shape[1] // SLAB * SLAB
        for slabs in (x[:, :whole].reshape(n, -1, SLAB, m), x[:, None, whole:]):
            if slabs.size:
                # For XᵀX, NumPy calls syrk, slower than gemm at these sizes: all columns but the last are gemm's.
                last = slabs[..., -1:]
                columns += (slabs.swapaxes(2, 3) @ slabs[..., :-1]).sum(axis=1, dtype=np.float64)
                corner += (last.swapaxes(2, 3) @ last).sum(axis=(1, 2, 3), dtype=np.float64)
    # A sum of squares: 0 only if all are 0, nan if one is NaN, inf if one is infinite and none is NaN.
    trace = np.einsum("nii->n", columns[:, :-1]) + corner
    gram = np.empty((n, m, m), dtype if m <= SINGLE_SIDE else np.float64)
    gram[:, :, :-1], gram[:, :-1, -1], gram[:, -1, -1] = columns, columns[:, -1], corner
    gram /= trace.astype(gram.dtype)[:, None, None]
    return gram, trace


def _largest_eigenvalues(m_p: NDArray[Any], tolerance: float) -> Float64s:
    """Return λ₁ of positive semidefinite matrices of trace 1, shape (n, m, m), m > 1; anything for those with NaN."""
    n, m, _ = m_p.shape
    shift = 0.5 / m
    np.einsum("nii->ni", m_p)[...] -= shift  # the caller needs them no more
    log_eigenvalue = np.empty(n)
    log_root = np.zeros(n)  # (log s_p) / p
    todo = np.arange(n)
    p = 1
    while True:
        for _ in range(SQUARINGS):
            m_p = m_p @ m_p
        p <<= SQUARINGS
        look = p >= FIRST_LOOK
        # In float64: where all μᵢ are close, they differ by the root of what t exceeds 1/m by.
        exact = m_p.astype(np.float64, copy=False) if look else m_p
        trace = np.einsum("nii->n", exact)
        log_root += np.log(trace, dtype=np.float64) / p
        if look:
            t = np.einsum("nij,nij->n", exact, exact) / trace**2
            upper = (1 + np.sqrt(np.maximum((m - 1) * (m * t - 1), 0))) / m
            lower = np.where(t > 0.5, (1 + np.sqrt(np.maximum(2 * t - 1, 0))) / 2, t)
            log_eigenvalue[todo] = log_root + np.log((lower + upper) / 2) / p
            # Half the interval of μ₁, through the p-th root to β₁ and the square root to σ_max.
            wide = upper - lower > 4 * p * tolerance * lower
            if not wide.any():
                eigenvalues: Float64s = shift + np.exp(log_eigenvalue)
                return eigenvalues
            todo, log_root, trace, m_p = todo[wide], log_root[wide], trace[wide], m_p[wide]
        m_p /= trace.astype(m_p.dtype, copy=False)[:, None, None]
