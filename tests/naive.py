"""The method, written slowly from its formula: the twin that the fast routines are compared with.

Output channel k of a linear operator has the kernel W_k of shape (C_in/groups, *kernel). Let

    A_k    = W_k reshaped to (C_in/groups, ∏kernel)
    bound_k = σ_max(A_k) · |γ_k| / √(var_k + ε)

where the last factor stands for a BatchNormalization behind the operator, and is 1 where there is none. Channel k is
an outlier where bound_k > mean + u · std over the layer, with std of n − 1.

One channel at a time, plain loops, `numpy.linalg.svd`: nothing here is shared with the package.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Bounds = NDArray[np.float64]


def largest_singular_value(matrix: ArrayLike) -> float:
    """σ_max of one matrix; NaN where it holds a NaN, infinity where it holds an infinity and no NaN."""
    A = np.asarray(matrix, dtype=np.float64)
    if np.isnan(A).any():
        return math.nan
    if np.isinf(A).any():
        return math.inf
    if A.size == 0:
        return 0.0
    return float(max(np.linalg.svd(A, compute_uv=False)))


def norm_factor(gamma: float, variance: float, epsilon: float) -> float:
    """|γ| / √(var + ε) of one channel, in the arithmetic of IEEE 754: infinite over 0, NaN under a negative root."""
    with np.errstate(all="ignore"):
        return float(np.abs(np.float64(gamma)) / np.sqrt(np.float64(variance) + np.float64(epsilon)))


def bounds(
    kernel: ArrayLike,
    gamma: ArrayLike | None = None,
    variance: ArrayLike | None = None,
    epsilon: float | None = None,
) -> Bounds:
    """The bound of each output channel of a kernel (C_out, C_in/groups, *kernel), with a BN behind it where given."""
    sigmas = []
    for W_k in np.asarray(kernel, dtype=np.float64):
        C_in = W_k.shape[0]
        sigmas.append(largest_singular_value(W_k.reshape(C_in, W_k.size // C_in)))
    return normalised(sigmas, gamma, variance, epsilon)


def normalised(
    before: ArrayLike,
    gamma: ArrayLike | None = None,
    variance: ArrayLike | None = None,
    epsilon: float | None = None,
) -> Bounds:
    """Bounds behind a BN, channel by channel, from the bounds before it."""
    before = np.asarray(before, dtype=np.float64)
    if gamma is None:
        return before
    assert variance is not None
    assert epsilon is not None
    gamma, variance = np.asarray(gamma, dtype=np.float64), np.asarray(variance, dtype=np.float64)
    result = []
    for k in range(len(before)):
        result.append(float(before[k]) * norm_factor(gamma[k], variance[k], epsilon))  # noqa: PERF401  a plain loop
    return np.array(result, dtype=np.float64)


def scaled(before: ArrayLike, factor: ArrayLike) -> Bounds:
    """Bounds behind a multiplication by one constant per channel: bound_k · |c_k|."""
    before, factor = np.asarray(before, dtype=np.float64), np.asarray(factor, dtype=np.float64)
    return np.array([float(before[k]) * abs(float(factor[k])) for k in range(len(before))], dtype=np.float64)


def summed(*terms: ArrayLike) -> Bounds:
    """Bounds of a sum of operators' outputs: √Σσ² of its terms, channel by channel."""
    columns = [np.asarray(term, dtype=np.float64) for term in terms]
    result = []
    for k in range(len(columns[0])):
        total = 0.0
        for column in columns:
            total += float(column[k]) ** 2
        result.append(math.sqrt(total))
    return np.array(result, dtype=np.float64)


def concatenated(*parts: ArrayLike) -> Bounds:
    """Bounds of a concatenation along the channels: each channel keeps its own."""
    result: list[float] = []
    for part in parts:
        result.extend(float(bound) for bound in np.asarray(part, dtype=np.float64))
    return np.array(result, dtype=np.float64)


def conv_transpose_kernel(weight: ArrayLike, groups: int = 1) -> NDArray[np.float64]:
    """A ConvTranspose weight (C_in, C_out/groups, *kernel) as a kernel (C_out, C_in/groups, *kernel).

    Output channel j of group g is fed by the input channels of group g alone.
    """
    weight = np.asarray(weight, dtype=np.float64)
    ins, outs = weight.shape[0] // groups, weight.shape[1]
    kernels = []
    for g in range(groups):
        for j in range(outs):
            W_k = [weight[g * ins + i, j] for i in range(ins)]
            kernels.append(np.stack(W_k))
    return np.stack(kernels)


def flagged(bounds: ArrayLike, u: float = 3.0, *, count_dead: bool = False) -> list[int]:
    """The channels whose bound is above mean + u · std of their layer.

    Dead channels (bound exactly 0) stay out of mean and std, unless `count_dead`, which is the published arithmetic.
    So do channels without a finite bound, see `broken`: a layer that holds one still has outliers.
    """
    layer = [float(bound) for bound in np.asarray(bounds, dtype=np.float64)]
    counted = [bound for bound in layer if math.isfinite(bound) and (count_dead or bound != 0.0)]
    n = len(counted)
    if n < 2:
        return []
    mean = math.fsum(counted) / n
    std = math.sqrt(math.fsum((bound - mean) ** 2 for bound in counted) / (n - 1))
    return [k for k, bound in enumerate(layer) if math.isfinite(bound) and bound > mean + u * std]


def broken(bounds: ArrayLike) -> list[int]:
    """The channels whose bound is NaN or infinite: findings, whatever the threshold."""
    return [k for k, bound in enumerate(np.asarray(bounds, dtype=np.float64)) if not math.isfinite(bound)]
