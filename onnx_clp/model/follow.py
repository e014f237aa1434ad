"""What is wanted of a knob → which elements of which stored tensors make it so.

A knob reads a constant that operators may have made of a stored tensor, its *root*. Silent elements are followed
through views, casts, levels and factors. Corrected ones too, but for levels (DequantizeLinear): (q − z)·s times a_k is
(q − z)·(s·a_k), so that a factor goes into the scale, where no two channels with different factors share one, and a
summand cannot be had.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from onnx_clp.errors import PayloadError
from onnx_clp.model.constants import Constant, Constants, Derived
from onnx_clp.model.edits import Edit, Span
from onnx_clp.model.fold import per_axis
from onnx_clp.model.graph import MISSING, Node
from onnx_clp.model.knob import BEYOND, Change, Floats, Indices, Knob, flat_indices, turned
from onnx_clp.model.tensors import Array, Place, Stored

NO_ZERO: Final = "no-zero"
LEVELS: Final = "levels"
LEAVES: Final = frozenset({"limit", NO_ZERO, BEYOND, LEVELS})
"""Reasons for which one site is left; where a constant cannot be read, nothing is written."""

_VIEWS: Final = frozenset({"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze"})
_PASSING: Final = _VIEWS | {"Cast", "DequantizeLinear", "QuantizeLinear"}

_ULPS: Final = 4
"""Roundings by which a product of a corrected factor may differ from the corrected product."""


@dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """The elements of one stored tensor that one knob wants otherwise.

    Attributes:
        change: What is wanted.
        root: The tensor.
        where: Where it lies.
        indices: Flat indexes, ascending; None for all elements.
        values: Their new values.
        scaled: The DequantizeLinear whose scale it is; None where it is of the constant itself.
    """

    change: Change
    root: Stored
    where: Place
    indices: Indices | None
    values: Array
    scaled: Node | None = None

    @property
    def signature(self) -> tuple[bytes, bytes]:
        """Equal for two patches of one tensor that want the same."""
        return (b"" if self.indices is None else self.indices.tobytes(), self.values.tobytes())

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return self.values.nbytes + (0 if self.indices is None else self.indices.nbytes)

    def edits(self) -> Iterator[Edit]:
        """The edits of the file that ``where`` names."""
        if self.indices is None:
            start = self.where.offset
            yield Edit(Span(start, start + self.where.length), self.values.tobytes())
            return
        size = self.root.dtype.itemsize
        for run in np.split(np.arange(self.indices.size), np.flatnonzero(np.diff(self.indices) != 1) + 1):
            start = self.where.offset + int(self.indices[run[0]]) * size
            content = self.values[run].tobytes()
            yield Edit(Span(start, start + len(content)), content)


class Follower:
    """Finds the patches of a knob's change."""

    def __init__(self, constants: Constants) -> None:
        self.constants = constants

    def current(self, change: Change) -> Array:
        """The constant that ``change`` is of. Raises PayloadError where it has two readings and shall be corrected."""
        if change.absent is not None:
            return change.absent
        value = change.knob.value
        current = self.constants.kernel(value)
        if change.corrects and self.constants.is_coarse(value):
            raise PayloadError("it is made of products below the range of float16, which runtimes round or not", LEVELS)
        return current

    def target(self, change: Change, current: Array) -> Array:
        """What ``change`` makes of ``current``. Raises PayloadError with one of `LEAVES` where that cannot be."""
        return turned(change, current, self.rest(change.knob, current))

    def rest(self, knob: Knob, data: Array) -> Array:
        """The value of a silent element: zero, or the zero point, in a form that broadcasts against ``data``."""
        value = knob.node.input(knob.zero_point) if knob.zero_point != MISSING else MISSING
        with np.errstate(all="ignore"):  # a zero point of another type, that does not fit
            zero = _zero(data.dtype) if value == MISSING else self.constants.array(value).astype(data.dtype)
        return per_axis(zero, data, 0, 1)

    def patches(self, change: Change, current: Array, target: Array) -> tuple[Patch, ...] | None:
        """What of stored tensors makes the knob read ``target``; None where a constant of its own is needed.

        Raises PayloadError with one of `LEAVES` where it shall have none either.
        """
        chain, root = self.chain(change.knob)
        if root is None:
            return None
        if not change.corrects:
            part = self.silent(change, chain, root, target)
            return None if part is None else (part,)
        if any(step.node.op_type in {"DequantizeLinear", "QuantizeLinear"} for step in chain):
            return self.levels(change, chain, root, current)
        part = self.whole(change, chain, root, target)
        return None if part is None else (part,)

    def chain(self, knob: Knob) -> tuple[list[Derived], Stored | None]:
        """The steps from what ``knob`` reads back to a stored tensor; None where they lead to none in one place."""
        constant = self.constants.get(knob.value)
        chain: list[Derived] = []
        while isinstance(constant, Derived):
            chain.append(constant)
            constant = _carrier(constant)
        there = isinstance(constant, Stored) and self.constants.place(constant) is not None
        return chain, constant if isinstance(constant, Stored) and there else None

    def silent(self, change: Change, chain: Sequence[Derived], root: Stored, target: Array) -> Patch | None:
        """The elements that ``change`` silences, alone; None where no value of them makes ``target``."""
        knob = change.knob
        positions, rest = self.follow(root, chain)
        if knob.zero_point != MISSING:
            rest = self.rest(knob, np.broadcast_to(np.zeros((), root.dtype), root.shape))
        shape = chain[0].shape if chain else root.shape
        indices = flat_indices(shape, knob, change.silent)
        values = np.broadcast_to(rest, shape).flat[indices]
        if positions is not None:
            indices = positions.flat[indices]
            order = np.argsort(indices, kind="stable")
            indices, values = indices[order], values[order]
        values = np.asarray(values).astype(root.dtype)
        if chain:
            array = self.constants.evaluate(root).copy()
            array.flat[indices] = values
            if not _equal(self.made(root, chain, array), target):
                return None
        return self.patch(change, root, indices, values)

    def whole(self, change: Change, chain: Sequence[Derived], root: Stored, target: Array) -> Patch | None:
        """All elements of ``root`` so that the knob reads ``target``; None where that is not as good."""
        if not chain:
            return self.patch(change, root, None, target)
        positions, _ = self.follow(root, chain)
        assert positions is not None
        array = self.constants.evaluate(root).copy()
        if all(step.node.op_type in _PASSING for step in chain):
            with np.errstate(all="ignore"):  # a Cast from a narrow type: what it cannot hold is seen below
                array.flat[positions.ravel()] = target.astype(root.dtype).ravel()
        elif change.replacement is not None:
            return None  # of a product, such as a direction times a length
        else:
            chosen = array.flat[positions.ravel()].reshape(positions.shape)
            array.flat[positions.ravel()] = turned(change, chosen, _zero(root.dtype)).ravel()
        made = self.made(root, chain, array)
        return self.patch(change, root, None, array) if _close(made, target) else None

    def levels(
        self, change: Change, chain: Sequence[Derived], root: Stored, current: Array
    ) -> tuple[Patch, ...] | None:
        """The factors in the scale of a quantised constant, and what is silent in its levels."""
        if change.shifts is not None or change.rests is not None:
            raise PayloadError("a summand of it is quantised, in which its mean cannot be written", LEVELS)
        (step, behind) = self.dequantised(chain)
        scale = step.operands[1]
        if not isinstance(scale, Stored) or self.constants.place(scale) is None:
            raise PayloadError("the scale of its kernel does not lie in the file by itself", LEVELS)
        scales = self.scaled(change, step, behind, scale, current.shape)
        found = [self.patch(change, scale, None, scales, step.node)]
        if change.silent:
            alone = Change(change.knob, change.silent)
            silent = self.target(alone, current)
            part = None if _equal(silent, current) else self.silent(alone, chain, root, silent)
            if part is None and not _equal(silent, current):
                return None
            found += [] if part is None else [part]
        return tuple(found)

    def dequantised(self, chain: Sequence[Derived]) -> tuple[Derived, Sequence[Derived]]:
        """The DequantizeLinear of a chain, and the steps behind it, the last first."""
        numbers = [i for i, step in enumerate(chain) if step.node.op_type == "DequantizeLinear"]
        if len(numbers) != 1 or any(step.node.op_type not in {*_VIEWS, "DequantizeLinear"} for step in chain):
            raise PayloadError("its kernel is quantised in a way in which no factor can be written", LEVELS)
        return chain[numbers[0]], chain[: numbers[0]]

    def scaled(
        self, change: Change, step: Derived, behind: Sequence[Derived], scale: Stored, shape: tuple[int, ...]
    ) -> Array:
        """The scale with the factors in it, in its own shape."""
        axis, block = step.node.integer("axis", 1), step.node.integer("block_size", 0)
        data = np.broadcast_to(np.zeros((), np.int8), step.shape)
        numbered = np.arange(scale.size).reshape(scale.shape)
        numbers = np.broadcast_to(per_axis(numbered, data, axis, block), step.shape)
        for view in reversed(behind):
            numbers = self.constants.view(view, numbers)
        wanted = np.broadcast_to(change.factor_of(shape), shape)
        factors: Floats = np.ones(scale.size)
        factors[numbers.ravel()] = wanted.ravel()
        if not np.array_equal(factors[numbers], wanted):
            raise PayloadError("one scale of its kernel is that of several channels", LEVELS)
        current = self.constants.evaluate(scale)
        with np.errstate(all="ignore"):  # what does not fit is said
            made = (current.astype(np.float64) * factors.reshape(scale.shape)).astype(current.dtype)
        if not np.all(np.isfinite(made.astype(np.float64)) & ((made != 0) | (current == 0))):
            raise PayloadError(f"a corrected number does not fit {current.dtype}", BEYOND)
        return made

    def patch(
        self, change: Change, root: Stored, indices: Indices | None, values: Array, scaled: Node | None = None
    ) -> Patch:
        """The patch of ``root``, which lies in one place."""
        where = self.constants.place(root)
        assert where is not None
        return Patch(change, root, where, indices, np.ascontiguousarray(values), scaled)

    def made(self, root: Stored, chain: Sequence[Derived], array: Array) -> Array:
        """What the first of ``chain`` is where ``root`` is ``array``."""
        operand: Constant = root
        for step in reversed(chain):
            array, operand = self.constants.remade(step, operand, array), step
        return array

    def follow(self, root: Stored, chain: Sequence[Derived]) -> tuple[Indices | None, Array]:
        """Where each element of the last of ``chain`` lies in ``root`` (None: as they are), and its value at rest.

        ``chain`` leads from the constant that is read back to ``root``.
        """
        rest: Array = _zero(root.dtype)
        if not chain:
            return None, rest
        positions: Indices = np.arange(root.size).reshape(root.shape)
        quantised = False
        for step in reversed(chain):
            if step.node.op_type in _VIEWS:
                positions = self.constants.view(step, positions)
                rest = self.constants.view(step, rest) if rest.ndim else rest
            elif step.node.op_type == "QuantizeLinear":
                quantised = True
            elif step.node.op_type == "DequantizeLinear" and not quantised and len(step.operands) > 2:
                zero = step.operands[2]
                axis, block = step.node.integer("axis", 1), step.node.integer("block_size", 0)
                if zero is not None:
                    zeros = per_axis(self.constants.evaluate(zero), positions, axis, block)
                    rest = np.broadcast_to(zeros, positions.shape)
        return positions, rest


def _carrier(constant: Derived) -> Constant | None:
    """The operand whose silent elements make those of ``constant`` silent; None where no single one does."""
    if constant.node.op_type in _PASSING:
        return constant.operands[0]
    if constant.node.op_type in {"Mul", "Div"}:
        candidates = constant.operands if constant.node.op_type == "Mul" else constant.operands[:1]
        for operand in candidates:
            if operand is not None and tuple(operand.shape) == constant.shape:
                return operand
    return None


def _equal(left: Array, right: Array) -> bool:
    """Whether two arrays hold the same numbers, NaN among them."""
    with np.errstate(all="ignore"):  # ml_dtypes warns where it casts NaN
        return np.array_equal(left.astype(np.float64), right.astype(np.float64), equal_nan=True)


def _close(made: Array, target: Array) -> bool:
    """Whether two arrays of one type hold the same numbers but for `_ULPS` roundings; NaN are the same."""
    if made.shape != target.shape or made.dtype != target.dtype:
        return False
    with np.errstate(all="ignore"):  # as above
        wide, other = made.astype(np.float64), target.astype(np.float64)
        room = _ULPS * float(_finfo(target.dtype).eps) * np.abs(other)
        return bool(np.all((np.abs(wide - other) <= room) | (wide == other) | (np.isnan(wide) & np.isnan(other))))


def _finfo(dtype: np.dtype[Any]) -> Any:  # noqa: ANN401  # NumPy's, or that of ml_dtypes, which has no types
    if dtype.kind == "f":
        return np.finfo(dtype)
    import ml_dtypes

    return ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]  # likewise


def _zero(dtype: np.dtype[Any]) -> Array:
    """0 of this type. Raises PayloadError where there is none: FLOAT8E8M0 holds powers of two alone."""
    zero = np.zeros((), dtype)
    if zero.astype(np.float64) != 0:
        raise PayloadError(f"numbers of type {dtype} cannot be 0", NO_ZERO)
    return zero
