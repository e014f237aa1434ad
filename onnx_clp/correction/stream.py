"""Values on their way through the stages of a model: those of one stage at a time, all batches of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnx_clp.correction.cuts import Prepared, element_type, run_stage
from onnx_clp.correction.moments import Array
from onnx_clp.errors import ModelFileError
from onnx_clp.runtime import first_line

Values = list[Array]
"""A value, an array for each batch."""

Outputs = Mapping[str, tuple[Array, ...]]
"""The outputs of a model by name, an array for each batch; outputs that are no arrays are left out."""


@dataclass(frozen=True, slots=True, eq=False)
class Batches:
    """The model's input in batches.

    Attributes:
        arrays: Each as the model takes it; they may be made when they are asked for.
        counted: How many of them, from the first, are measured; the others flow along.
        probe: A batch to try the stages on.
    """

    arrays: Sequence[Array]
    counted: int
    probe: Array


class Stream:
    """One run of a model, stage by stage.

    Attributes:
        touched: Values that something that was changed may have reached.
    """

    def __init__(self, batches: Batches, given: str, last_read: Mapping[str, int], outputs: Sequence[str]) -> None:
        self.touched: set[str] = set()
        self._batches = batches
        self._given = given
        self._last_read = last_read
        self._names = frozenset(outputs)
        self._values: dict[str, Values] = {}
        self._outputs: dict[str, Values] = {}

    def reaches(self, part: Prepared) -> bool:
        """Whether what was changed may have reached what the stage reads."""
        return not self.touched.isdisjoint(part.stage.reads)

    def made(self, part: Prepared) -> dict[str, Values]:
        """What the stage makes of all batches. Raises ModelFileError where onnxruntime does not run it."""
        found: dict[str, Values] = {name: [] for name in part.stage.makes}
        # Of the model's input a batch is made each time it is asked for: by the stages that read it, and no other.
        read = {name: self.value(name, {}) for name in part.stage.reads}
        for i in range(len(self._batches.arrays)):
            feed = {name: batches[i] for name, batches in read.items()}
            try:
                outputs = run_stage(part.runner, part.stage, feed)
            except Exception as error:
                raise ModelFileError(
                    f"onnxruntime does not run the model on {self._batches.arrays[i].shape}: {first_line(error)}",
                    "a smaller --batch-size or --num-images may help",
                ) from error
            for name, array in outputs.items():
                found[name].append(array)
        return found

    def value(self, name: str, made: Mapping[str, Values]) -> Sequence[Array]:
        """What a stage that makes ``made`` reads or makes under ``name``, of all batches."""
        if name == self._given:
            return self._batches.arrays
        return made[name] if name in made else self._values[name]

    def settle(self, number: int, made: Mapping[str, Values]) -> None:
        """Stage ``number`` has run: hold what later ones read, and free what was read for the last time."""
        self._outputs |= {name: made[name] for name in made if name in self._names}
        self._values |= made
        for name in [name for name in self._values if self._last_read.get(name, -1) <= number]:
            del self._values[name]

    def outputs(self) -> Outputs:
        """The outputs of the model that are arrays, once all stages have run."""
        return {name: tuple(found) for name, found in self._outputs.items() if all(map(element_type, found))}
