"""Sources → origins: which channels of a value are one and the same, by whatever factors it was scaled on the way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_clp.flow import Indices, Joined, Picked, Produced, Source, Summed
from onnx_clp.limits import Meter


class Origins:
    """The origins of the channels of sources, found when they are asked for.

    The channels of a linear operator, and those of a sum, are new ones. All else passes on what it is built of.
    """

    def __init__(self, sources: Sequence[Source], meter: Meter) -> None:
        """Of ``sources``, to which more may be added."""
        self._sources = sources
        self._meter = meter
        self._begun: dict[int, tuple[int, int]] = {}
        self._known: dict[int, Indices] = {}
        self._met = 0

    def begin(self, source: int, channels: int) -> None:
        """Say how many channels begin in a linear operator or a sum."""
        self._begun[source] = (self._met, self._met + channels)
        self._met += channels

    def repeated(self, source: int) -> bool:
        """Whether a channel of ``source`` is there several times."""
        found = self._of(source)
        self._meter.touch(found.size)
        return np.unique(found).size < found.size

    def _of(self, source: int) -> Indices:
        """A number for each channel, int64 (channels,): without recursion, since sources are built of thousands."""
        pending = [source]
        while pending:
            top = pending[-1]
            missing = [index for index in _parts(self._sources[top]) if index not in self._known]
            if missing:
                pending += missing
                continue
            pending.pop()
            if top not in self._known:
                self._known[top] = self._made(top, self._sources[top])
        return self._known[source]

    def _made(self, source: int, part: Source) -> Indices:
        parts = [self._known[index] for index in _parts(part)]
        if parts and not isinstance(part, Joined | Picked):
            return parts[0]
        begin, end = self._begun.get(source, (0, 0))
        size = part.indices.size if isinstance(part, Picked) else end - begin + sum(each.size for each in parts)
        self._meter.touch(size)
        self._meter.hold(size * np.dtype(np.int64).itemsize)
        if isinstance(part, Picked):
            return parts[0][part.indices]
        return np.concatenate(parts) if parts else np.arange(begin, end)


def _parts(part: Source) -> tuple[int, ...]:
    """What the channels of a source are taken from."""
    if isinstance(part, Joined):
        return part.sources
    return () if isinstance(part, Produced | Summed) else (part.source,)
