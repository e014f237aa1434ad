"""Where a mutation takes its choices from: a random generator, which is quick, or Hypothesis, which can shrink them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol, TypeVar

from google.protobuf.message import Message

Item = TypeVar("Item")
AnyMessage = TypeVar("AnyMessage", bound=Message)

EXTENTS = (0, -1, 1, 2, 3, 5, 16, 17, 1 << 31, 1 << 60, (1 << 63) - 1, -(1 << 63))
"""What takes the place of a size, an axis, a step or an index."""

FLOATS = (0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), float("-inf"), 1e38, 65504.0, 1e-40, 1e-300)
"""What takes the place of a weight, a variance or an epsilon: not a number, too large, denormal, zero."""

TEXTS = ("", "x", "\0", "\n", "\x1b[31m", "[bold]", "</script>", "\u202e", "../up", "/dev/zero", "é" * 300, "n" * 5000)
"""What takes the place of a name, a key, an operator or a file name."""

CROWD = 20_000
"""Messages of a model that are looked at: a mutation of a larger one changes one of the first."""


class Chance(Protocol):
    """A source of choices."""

    def integer(self, low: int, high: int) -> int:
        """An integer from ``low`` to ``high``, both included."""
        ...


class Dice:
    """Choices of a random generator."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        """An integer from ``low`` to ``high``, both included."""
        return self._random.randint(low, high)


def choice(chance: Chance, items: Sequence[Item]) -> Item:
    """One of some items, of which there must be one."""
    return items[chance.integer(0, len(items) - 1)]


def place(chance: Chance, items: Sequence[object]) -> int:
    """The index of one of some items, of which there must be one."""
    return chance.integer(0, len(items) - 1)


def parts(root: Message) -> list[Message]:
    """The message and every message within it, by protobuf's own description; at most CROWD."""
    found = [root]
    for message in found:  # grows while it is walked
        if len(found) > CROWD:
            break
        for field, value in message.ListFields():
            if field.message_type is not None:
                found += value if field.is_repeated else [value]
    return found


def of_kind(root: Message, kind: type[AnyMessage]) -> list[AnyMessage]:
    """Every message of a kind within a message."""
    return [part for part in parts(root) if isinstance(part, kind)]


def copied(message: AnyMessage) -> AnyMessage:
    """A message equal to this one."""
    other = type(message)()
    other.CopyFrom(message)
    return other
