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

TOLERANCE, TOLERANCE_SINGLE = 1e-9, 1e-6
"""Largest relative error of σ_max left by the interval, where the Gram matrix is in float64 and in float32."""

SLAB = 128
"""Rows that one product of matrices sums up, before float64 goes on: this bounds the rounding of float32."""

BLOCK = 2**18
"""Most float64 elements of one batch of Gram matrices: 2 MB, about the second-level cache, and large enough that the
calls into NumPy cost little. About six such arrays live at once, 12 MB; one Gram matrix beyond 512 × 512 is larger."""

SAFE = 2.0**-80, 2.0**80
"""Where the trace of a Gram matrix in float32 lies if neither overflow nor underflow can have mattered."""

FIRST_SQUARINGS, NEXT_SQUARINGS = 6, 2
"""Squarings before the first and between later looks at the interval. Between looks nothing is normalised:
tr M^64 ≥ m^-63 stays far above the smallest float64 for any Gram matrix that fits in memory."""


def spectral_norms(kernel: NDArray[Any]) -> Float64s:
    if kernel.ndim != 3:
        raise ValueError(f"a kernel has the axes (channels, rows, columns), not the shape {kernel.shape}")
    if np.iscomplexobj(kernel):
        raise TypeError("a kernel is real, not complex")
    norms = np.zeros(len(kernel))
    if kernel.size == 0:
        return norms
    tall = kernel if kernel.shape[1] >= kernel.shape[2] else kernel.transpose(0, 2, 1)
    rows, m = tall.shape[1:]
    # The slabs may be eight times as large as the Gram matrices: most are never copied.
    step = max(1, BLOCK // (m * max(m, min(rows, SLAB) // 8)))
    narrow = tall.dtype == np.float32 or tall.dtype.itemsize < np.dtype(np.float32).itemsize
    # Under- and overflow are meant here, and NaN and Inf travel through the products to the trace.
    with np.errstate(all="ignore"):
        for first in range(0, len(tall), step):
            a, here = tall[first : first + step], norms[first : first + step]
            careful = np.arange(len(a))
            if narrow:
                here[:], trace = _norms(_gram(a, np.float32), TOLERANCE_SINGLE)
                careful = np.flatnonzero(~((trace > SAFE[0]) & (trace < SAFE[1])))
            if careful.size:
                exponent = _exponents(a)[careful]
                gram = _gram(a, np.float64, careful, exponent)
                here[careful] = np.ldexp(_norms(gram, TOLERANCE)[0], exponent)
    return norms


def _norms(gram: Float64s, tolerance: float) -> tuple[Float64s, Float64s]:
    """Return σ_max of the matrices whose Gram matrices these are, shape (n, m, m), and the traces."""
    # A sum of squares: 0 only if all are 0, nan if one is NaN, inf if one is infinite and none is NaN.
    trace = np.einsum("nii->n", gram)
    regular = np.isfinite(trace) & (trace > 0)
    eigenvalue = trace
    if gram.shape[1] > 1 and regular.any():
        eigenvalue = np.where(regular, trace * _largest_eigenvalues(gram / trace[:, None, None], tolerance), trace)
    return np.sqrt(eigenvalue), trace


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
    a: NDArray[Any],
    dtype: type[np.floating[Any]],
    which: NDArray[np.intp] | None = None,
    exponent: NDArray[np.intc] | None = None,
) -> Float64s:
    """Return (2^-e·A)ᵀ(2^-e·A) for each matrix A of ``a``, shape (n, rows, m): products in ``dtype``, slabs in float64."""
    _, rows, m = a.shape
    n = len(a) if which is None else len(which)
    # BLAS reads rows or columns that lie in one piece; all else is copied, some slabs at a time.
    direct = a.dtype == dtype and a.itemsize in a.strides[1:] and which is None
    chunk = rows if direct else SLAB * max(1, 8 * BLOCK // (n * m * SLAB))
    columns, corner = np.zeros((n, m, m - 1)), np.zeros(n)
    for r in range(0, rows, chunk):
        x = a[:, r : r + chunk]
        if not direct:
            x = (x if n == len(a) else x[which]).astype(dtype, order="C")
            if exponent is not None and exponent.any():
                x = np.ldexp(x, -exponent[:, None, None])
        whole = x.shape[1] // SLAB * SLAB
        for slabs in (x[:, :whole].reshape(n, -1, SLAB, m), x[:, None, whole:]):
            if slabs.size:
                # For XᵀX, NumPy calls syrk, twice as slow as gemm at these sizes: all columns but one are gemm's.
                last = slabs[..., -1:]
                columns += (slabs.swapaxes(2, 3) @ slabs[..., :-1]).sum(axis=1, dtype=np.float64)
                corner += (last.swapaxes(2, 3) @ last).sum(axis=(1, 2, 3), dtype=np.float64)
    gram = np.empty((n, m, m))
    gram[:, :, :-1], gram[:, :-1, -1], gram[:, -1, -1] = columns, columns[:, -1], corner
    return gram


def _largest_eigenvalues(gram: Float64s, tolerance: float) -> Float64s:
    """Return λ₁ of positive semidefinite matrices of trace 1, shape (n, m, m), m > 1; anything for those with NaN."""
    n, m, _ = gram.shape
    shift = 0.5 / m
    m_p = gram - shift * np.eye(m)
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
        wide = upper - lower > 4 * p * tolerance * lower
        if not wide.any():
            return shift + np.exp(log_eigenvalue)
        todo, log_root = todo[wide], log_root[wide]
        m_p = m_p[wide] / trace[wide, None, None]
