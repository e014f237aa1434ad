"""What a trace is written in: sources, and how values carry their channels.

The bound of a channel is that of the operators it is made of. A trace writes this down as a small expression, one
*source* per step, each built of earlier ones, so that all are evaluated in one sweep:

* ``Produced``: the channels of a linear operator, σ_max(A_k) each;
* ``Normalised``: a source times |γ|/√(var + ε) of a BatchNormalization;
* ``Scaled``: a source times a constant;
* ``Summed``: √(a² + b²) of the channels of two sources (Add);
* ``Joined``: the channels of sources one after the other (Concat);
* ``Picked``: some channels of a source, in another order (Split, Slice, Gather, channel shuffle).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_clp.errors import PayloadError
from onnx_clp.model.graph import Node

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Produced:
    """The channels of a linear operator."""

    node: Node


@dataclass(frozen=True, slots=True, eq=False)
class Normalised:
    """A source times |γ|/√(var + ε) of the BatchNormalization ``node``."""

    source: int
    node: Node


@dataclass(frozen=True, slots=True, eq=False)
class Scaled:
    """A source times (or divided by) the value ``constant``.

    ``axis`` is that of the channels in the constant, counted from its end; 0 where it is one number for all.
    """

    source: int
    constant: int
    axis: int
    divides: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Summed:
    """The sum of sources with the same channels."""

    sources: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """Sources whose channels follow each other."""

    sources: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Picked:
    """The channels ``indices`` of a source."""

    source: int
    indices: Indices


Source = Produced | Normalised | Scaled | Summed | Joined | Picked


@dataclass(frozen=True, slots=True)
class Flow:
    """How a value carries channels.

    Attributes:
        source: Index of the source in the trace.
        sizes: Extents of the axes that the channels lie on; one, but for a channel shuffle half done.
        axes: Those axes. A single -1 is the last axis of a value whose rank is not known.
    """

    source: int
    sizes: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def channels(self) -> int:
        """Number of channels."""
        return math.prod(self.sizes)

    @property
    def axis(self) -> int | None:
        """The one axis of the channels; None in the middle of a channel shuffle."""
        return self.axes[0] if len(self.axes) == 1 else None


@dataclass(frozen=True, slots=True)
class Lost:
    """A value whose channels cannot be traced.

    Attributes:
        operator: The operator (or input) that lost them.
        refusal: What is wrong with its weight, where it is a linear operator.
    """

    operator: str
    refusal: PayloadError | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """What one pass over the graph found.

    Attributes:
        sources: In an order in which each is built of earlier ones.
        flows: By value; constants and values never made are absent.
        refused: Linear operators whose weight is not known, by node index, with the reason.
    """

    sources: tuple[Source, ...]
    flows: Mapping[int, Flow | Lost]
    refused: Mapping[int, PayloadError]
