"""Knobs: the constants that turn the channels of a site, and what is wanted of them.

A channel k of a knob, the slice x_k, becomes

    0, or the zero point           where channel k shall be silent,
    r_k                            where it shall be silent and its output rest there,
    a_k·x_k + c_k                  otherwise, or
    a_k·x′_k + c_k                 where the constant as a whole is replaced by another, x′.

Where only channels are silenced, a_k = 1 and c_k = 0. Elements that do not change keep their bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_clp.errors import PayloadError
from onnx_clp.model.graph import MISSING, Node
from onnx_clp.model.tensors import Array

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Knob:
    """A constant that silences channel k where its slice of channel k is made zero (or the zero point).

    Attributes:
        node: The node that reads it.
        position: At which input.
        axis: The axis of the channels, counted from the end (negative).
        groups: 1, but for a ConvTranspose kernel, whose output channels lie in groups over its first axis.
        zero_point: Position of the input that holds the zero point; MISSING where zero is zero.
    """

    node: Node
    position: int
    axis: int
    groups: int = 1
    zero_point: int = MISSING

    @property
    def value(self) -> int:
        """The value of the constant; MISSING where the node has no such input."""
        return self.node.input(self.position)

    @property
    def edge(self) -> tuple[int, int]:
        """The node's index and the position: who reads, and where."""
        return (self.node.index, self.position)


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What is wanted of one knob.

    Attributes:
        knob: The knob.
        silent: Channels to silence, ascending.
        factors: a, float64 (channels,); None where all are 1.
        shifts: c, likewise; None where all are 0.
        absent: Zeros (channels,) that stand in for the constant where the node has no such input yet.
        replacement: x′, float64, of the constant's shape; None where it is changed, and not replaced.
        rests: r, float64 (channels,), of which those of silent channels are used; None where they become 0.
    """

    knob: Knob
    silent: tuple[int, ...]
    factors: Floats | None = None
    shifts: Floats | None = None
    absent: Array | None = None
    replacement: Floats | None = None
    rests: Floats | None = None

    @property
    def corrects(self) -> bool:
        """Whether it does more than to silence."""
        return any(part is not None for part in (self.factors, self.shifts, self.replacement, self.rests))

    def factor_of(self, shape: tuple[int, ...]) -> Floats:
        """The a of each element of a constant of ``shape``, in a form that broadcasts against it."""
        return np.ones(()) if self.factors is None else self.factors[channel_of(shape, self.knob)]

    def shift_of(self, shape: tuple[int, ...]) -> Floats:
        """The c of each element, likewise."""
        return np.zeros(()) if self.shifts is None else self.shifts[channel_of(shape, self.knob)]


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """What is wanted of the knobs of one site: all of it or nothing."""

    changes: tuple[Change, ...]


def silencing(knobs: Sequence[Knob], channels: Sequence[int]) -> Wanted:
    """``channels`` shall be silent, and nothing else shall change."""
    return Wanted(tuple(Change(knob, tuple(channels)) for knob in knobs))


BEYOND = "range"
"""The reason of a PayloadError where a number does not fit its type."""


def turned(change: Change, current: Array, rest: Array) -> Array:
    """What ``change`` makes of ``current``, the constant of its knob; ``rest`` broadcasts against that.

    Raises PayloadError where a number does not fit the type of the constant.
    """
    made = current.copy()
    if change.corrects:
        factor, shift = change.factor_of(current.shape), change.shift_of(current.shape)
        with np.errstate(all="ignore"):  # ml_dtypes warns where it converts NaN, and numbers may overflow
            wide = current.astype(np.float64) if change.replacement is None else change.replacement
            made = np.where((factor == 1) & (shift == 0), wide, wide * factor + shift).astype(current.dtype)
            if np.any(np.isfinite(wide) & ~np.isfinite(made.astype(np.float64))):
                raise PayloadError(f"a corrected number does not fit {current.dtype}", BEYOND)
    for channel in change.silent:
        chosen = selection(current.shape, change.knob, channel)
        made[chosen] = np.broadcast_to(rest, current.shape)[chosen]
        if change.rests is not None:
            made[chosen] = _fitting(change.rests[channel], current)
    return made


def _fitting(number: float, current: Array) -> Array:
    """``number`` in the type of ``current``. Raises PayloadError where it does not fit."""
    with np.errstate(all="ignore"):  # as above
        made = np.asarray(number).astype(current.dtype)
    if not np.isfinite(made.astype(np.float64)):
        raise PayloadError(f"what a channel rests at does not fit {current.dtype}", BEYOND)
    return made


def channel_of(shape: tuple[int, ...], knob: Knob) -> Indices:
    """The channel of each element of an array of ``shape``, in a form that broadcasts against it."""
    axis = len(shape) + knob.axis
    within = np.arange(shape[axis]).reshape([-1 if each == axis else 1 for each in range(len(shape))])
    if knob.groups == 1:
        return within
    group = np.arange(shape[0]) // (shape[0] // knob.groups)
    return group.reshape([-1 if not each else 1 for each in range(len(shape))]) * shape[axis] + within


def selection(shape: tuple[int, ...], knob: Knob, channel: int) -> tuple[slice | int, ...]:
    """The slice of ``channel`` in an array of ``shape``."""
    axis = len(shape) + knob.axis
    chosen: list[slice | int] = [slice(None)] * len(shape)
    per_group = shape[axis]
    chosen[axis] = channel % per_group if knob.groups > 1 else channel
    if knob.groups > 1:
        rows = shape[0] // knob.groups
        group = channel // per_group
        chosen[0] = slice(group * rows, (group + 1) * rows)
    return tuple(chosen)


def flat_indices(shape: tuple[int, ...], knob: Knob, channels: Sequence[int]) -> Indices:
    """The flat indexes, ascending, of the slices of ``channels`` in an array of ``shape``."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    parts: list[Indices] = []
    for channel in channels:
        flat = np.zeros((), np.int64)
        for chosen, size, stride in zip(selection(shape, knob, channel), shape, strides, strict=True):
            steps = np.arange(size)[chosen] if isinstance(chosen, slice) else np.array([chosen])
            flat = np.add.outer(flat, steps * stride)
        parts.append(flat.ravel())
    return np.sort(np.concatenate(parts)) if parts else np.zeros(0, np.int64)
