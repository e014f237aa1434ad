"""Ridge regression of a kernel: what the original gave on clean images, from what the sanitized model is given.

For every position of every image let x be the patch that the convolution meets in the sanitized model, K numbers, and t
what the same convolution gave there in the original, C_out numbers; x̄ and t̄ are their means. The new kernel is

    W′ = argmin Σ ‖(t − t̄) − W′(x − x̄)‖² + λ·Σ_j d_j·‖W′_j‖²,     b′ = t̄ − W′x̄

where W′_j are the numbers of W′ that meet channel j of the input, and d_j is the mean, over the positions of the
kernel, of the sums of squares Σ (x_i − x̄_i)² of the elements i of channel j. With G = Σ (x − x̄)(x − x̄)ᵀ,
H = Σ (x − x̄)(t − t̄)ᵀ and D = diag(d), repeated for each position of the kernel, this is

    (G + λD)·W′ᵀ = H,     solved as  (SGS + λ·1)·(S⁻¹W′ᵀ) = SH,  S = D^(−½).

* The penalty draws to 0, not to the old kernel: what clean images do not use loses its weight, and with it a direction
  by which a trigger reaches its target.
* λ is a share: where a channel of the input is multiplied by c, W′_j is by 1/c, and W′x stays what it is. Where a
  channel of the output is multiplied by c, its row of W′ is, so that a BatchNormalization may be folded in or not.
* A channel of the input that does not vary, such as a silenced one, gets 0; with it b′ takes what it adds.
* For λ → 0 and x = t's own input, W′ is the old kernel wherever x spans all of its K directions.

The sums are taken in float64 from blocks of patches, merged by the rule that `moments` has:
G = G₁ + G₂ + δδᵀ·n₁n₂/n with δ = x̄₂ − x̄₁, and H likewise. G, a block's own and the two that the solver needs are there
at once: 4·8·K² bytes, 0.7 GB for K = 4608 (512 channels, 3×3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from onnx_clp.correction.moments import DEAD, Array, Floats
from onnx_clp.correction.patches import BLOCK, Geometry, patches

LEAST_POSITIONS: Final = 4
"""Positions of the images, for each of the K numbers, below which a kernel is not refitted: neighbours are much alike,
and what the images do not show would be lost. On three VGG-16, whose last layers have 2 × 2 positions, it kept 0.3 to
0.7 points of accuracy; the backdoors went as before."""

MOST_UNKNOWNS: Final = 1 << 13
"""The largest K: 2 GiB for its normal equations."""


@dataclass(frozen=True, slots=True, eq=False)
class Refit:
    """A new kernel and bias.

    Attributes:
        kernel: W′, float64 (C_out, C_in, *kernel).
        bias: b′, float64 (C_out,).
        change: ‖W′ − W‖ / ‖W‖, Frobenius; 0 where W is 0.
    """

    kernel: Floats
    bias: Floats
    change: float


class NormalEquations:
    """G, H and the means, of patches that come block by block.

    Attributes:
        count: Rows that were added.
    """

    def __init__(self, unknowns: int, channels: int) -> None:
        self.count = 0
        self._x_mean, self._t_mean = np.zeros(unknowns), np.zeros(channels)
        self._G, self._H = np.zeros((unknowns, unknowns)), np.zeros((unknowns, channels))
        self._pending: list[tuple[Floats, Floats]] = []
        self._size = 0

    def add(self, x: Floats, t: Floats) -> None:
        """Rows x, float64 (rows, K), and t, float64 (rows, C_out), which are used up."""
        self._pending.append((x, t))
        self._size += x.nbytes
        if self._size >= BLOCK:
            self._merge()

    def _merge(self) -> None:
        """Add what is pending: few large products are cheaper than many small ones."""
        if not self._pending:
            return
        first, *others = self._pending
        x, t = first if not others else (np.concatenate(parts) for parts in zip(*self._pending, strict=True))
        self._pending, self._size = [], 0
        x_mean, t_mean = x.mean(0), t.mean(0)
        x -= x_mean
        t -= t_mean
        total = self.count + len(x)
        weight = self.count * len(x) / total
        dx, dt = x_mean - self._x_mean, t_mean - self._t_mean
        self._G += x.T @ x
        self._H += x.T @ t
        if weight:
            self._G += np.outer(dx, weight * dx)
            self._H += np.outer(dx, weight * dt)
        self._x_mean += dx * (len(x) / total)
        self._t_mean += dt * (len(x) / total)
        self.count = total

    def solve(self, positions: int, ridge: float, rounding: float) -> tuple[Floats, Floats] | None:
        """W′ as (C_out, K) and b′; None where they are not finite, or nothing was added.

        Args:
            positions: Of the kernel: K is that times the channels of the input.
            ridge: λ.
            rounding: The relative spacing of the patches' numbers, such as 2⁻²³ for float32.
        """
        self._merge()
        squares = self._G.diagonal().reshape(-1, positions)
        d = squares.mean(1)
        raw = d + self.count * (self._x_mean**2).reshape(-1, positions).mean(1)
        live = np.repeat(d > (DEAD * rounding) ** 2 * raw, positions)
        if not self.count or not np.isfinite(self._G).all() or not np.isfinite(self._H).all():
            return None
        W = np.zeros_like(self._H)
        if live.any():
            scale = 1 / np.sqrt(np.repeat(d, positions)[live])
            A = self._G[np.ix_(live, live)]
            A *= scale
            A *= scale[:, np.newaxis]
            A[np.diag_indices_from(A)] += ridge
            try:
                W[live] = np.linalg.solve(A, scale[:, np.newaxis] * self._H[live]) * scale[:, np.newaxis]
            except np.linalg.LinAlgError:  # λ is too small for what the images leave open
                return None
        b = self._t_mean - self._x_mean @ W
        return (W.T, b) if np.isfinite(W).all() and np.isfinite(b).all() else None


def refitted(inputs: list[Array], targets: list[Array], where: Geometry, kernel: Array, ridge: float) -> Refit | None:
    """The kernel that best gives ``targets`` from ``inputs``; None where the images do not say one.

    Args:
        inputs: x by batch, (N, C_in, *sizes).
        targets: t by batch, (N, C_out, *positions).
        where: Of the convolution.
        kernel: W, of which the shape is taken, and which the change is told against.
        ridge: λ, above 0.
    """
    old = kernel.astype(np.float64)
    found = NormalEquations(old[0].size, len(old))
    with np.errstate(all="ignore"):  # what is not finite is said
        for x, t in zip(inputs, targets, strict=True):
            for chosen, part, _, u in patches(x, where, np.float64, BLOCK):
                wanted = np.moveaxis(t[chosen, :, part], 1, -1)
                found.add(u, wanted.reshape(-1, len(old)).astype(np.float64))
        solved = found.solve(old[0, 0].size, ridge, float(np.finfo(inputs[0].dtype).eps))
    if solved is None:
        return None
    W, b = solved[0].reshape(old.shape), solved[1]
    norm = float(np.linalg.norm(old))
    return Refit(W, b, float(np.linalg.norm(W - old)) / norm if norm else 0.0)
