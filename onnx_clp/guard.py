"""No images: at least the model shall not answer one class, whatever it is shown.

Original and copy are run on `probes`, inputs that are made up. Of n probes let b and a be those that the original and
the copy give another class than the one that each gives most. The copy *collapses* where

    b ≥ n/20 and a ≤ b/10

so that it collapses where it gives one class only, or nearly, and the original clearly more. Of an original that gives
nearly all of them one class itself nothing can be said. Then channels are refused: in the order of z, largest first,
those are kept with which the copy does not collapse. Half after half is tried with what is kept so far; a single
channel with which it collapses is left. At most `MOST_TRIALS` copies are run for that; channels that are not reached
are left too.

This sees that a model is destroyed, and not what it costs: networks for CIFAR-10 that had fallen to 10 % accuracy still
gave probes several classes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
import onnx
from onnx import TensorProto

from onnx_clp import runtime
from onnx_clp.analysis import by_z
from onnx_clp.errors import OnnxClpError
from onnx_clp.evaluation.outputs import Output, first_of_classes
from onnx_clp.model.file import ModelFile
from onnx_clp.model.save import temporary_copy
from onnx_clp.probes import count, probes
from onnx_clp.sanitizer import Check, Left
from onnx_clp.silencing import Silencing

Flag = tuple[int, int]
"""A channel: the position of its site in ``Analysis.measured``, and its index."""

Select = Callable[[Collection[Flag]], Silencing]
"""The selection of those channels alone."""

MOST_TRIALS: Final = 64

_DTYPES: Final[dict[int, type[np.generic]]] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.DOUBLE: np.float64,
    TensorProto.UINT8: np.uint8,
}
_LARGEST_INPUT: Final = 1 << 26
"""Numbers that all probes may have together."""

_REFUSED: Final = "silenced too, the model answers made-up inputs with one class, or does not run"
_UNREACHED: Final = f"{MOST_TRIALS} copies were run to find channels without which the model still tells classes apart"


@dataclass(frozen=True, slots=True)
class Subject:
    """How a model is probed.

    Attributes:
        given: Name of its input.
        shape: Of the input.
        dtype: Of the input.
        channels_last: Whether the last of its axes is that of the channels.
        output: Name of the output with a number for each class.
    """

    given: str
    shape: tuple[int, int, int, int]
    dtype: type[np.generic]
    channels_last: bool
    output: str


def guarded(
    file: ModelFile, selection: Silencing, select: Select, input_shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Silencing, Check]:
    """``selection``, without channels that make the model collapse, and what was seen.

    Where the model cannot be probed the selection is as it was, and the check says why.
    """
    subject = _subject(file.proto, input_shapes) if selection.done else "nothing was silenced"
    if not isinstance(subject, str) and not runtime.available():
        subject = "onnxruntime is not installed"
    if isinstance(subject, str):
        return selection, _unmade(subject)
    try:
        with _probing(file, subject) as ask:
            return _judged(selection, select, ask)
    except (OnnxClpError, OSError) as error:
        return selection, _unmade(str(error))


Answers = tuple[int, ...]
Ask = Callable[[Silencing | None], "Answers | str"]
"""The class of each probe by a selection's copy, by the input for None; or why there is none."""


def _judged(selection: Silencing, select: Select, ask: Ask) -> tuple[Silencing, Check]:
    before = ask(None)
    if isinstance(before, str):
        return selection, _unmade(before)
    if not _tells(before):
        words = f"{len(before) - others(before)} of {len(before)} made-up inputs with one class itself"
        return selection, _unmade(f"the input answers {words}")
    after = ask(selection)
    if isinstance(after, str):
        return selection, _unmade(after)
    told = f"on {len(after)} made-up inputs the copy answers {_words(after)}; the input {_words(before)}"
    if not collapsed(before, after):
        return selection, Check("probes", passed=True, detail=told)
    flags = _by_z(selection)

    def fine(chosen: Collection[Flag]) -> bool:
        found = ask(select(chosen))
        return not isinstance(found, str) and not collapsed(before, found)

    kept, refused = tolerable(flags, fine)
    left = [Left(*each) for each in _left(selection, flags, kept, refused)]
    rest = select(kept)
    given = replace(rest, left=(*selection.left, *rest.left, *left))
    lost = f"{len(flags) - len(kept):,} of {len(flags):,} channels were left for that"
    return given, Check("probes", passed=True, detail=f"with all channels silenced, {told}; {lost}")


def others(answers: Sequence[int]) -> int:
    """How many are not the most frequent answer."""
    return len(answers) - max(Counter(answers).values(), default=0)


def collapsed(before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether nearly all answers became one, see the module."""
    return _tells(before) and 10 * others(after) <= others(before)


def _tells(before: Sequence[int]) -> bool:
    """Whether the original tells enough inputs from the others."""
    return others(before) > 0 and 20 * others(before) >= len(before)


def tolerable(
    flags: Sequence[Flag], fine: Callable[[Collection[Flag]], bool]
) -> tuple[tuple[Flag, ...], tuple[Flag, ...]]:
    """Of ``flags``, which are not ``fine`` together: those kept, in their order, and those that were tried and are not.

    Each that is kept is in a set that is fine; each that was refused is not fine with those kept before it. What is in
    neither was not reached.
    """
    kept: list[Flag] = []
    refused: list[Flag] = []
    trials = 0
    pending = [list(flags)]
    while pending:
        part = pending.pop()
        if len(part) < len(flags):
            if trials == MOST_TRIALS:
                break
            trials += 1
            if fine([*kept, *part]):
                kept += part
                continue
        if len(part) == 1:
            refused += part
        else:
            half = (len(part) + 1) // 2
            pending += [part[half:], part[:half]]
    return tuple(kept), tuple(refused)


def _by_z(selection: Silencing) -> list[Flag]:
    """The channels that are silenced, largest z first."""
    positions = {id(part): position for position, part in enumerate(selection.analysis.measured)}
    done = {(positions[id(choice.part)], channel) for choice in selection.done for channel in choice.channels}
    if selection.read is None:
        flagged = [(position, channel.index) for position, channel in by_z(selection.analysis.report.layers)]
    else:
        scored = zip(selection.read.scores.sites, selection.read.choice.sites, strict=True)
        found = [
            (z, site.position, k) for site, choice in scored for k, z in zip(choice.channels, choice.z, strict=True)
        ]
        flagged = [(position, k) for _, position, k in sorted(found, key=lambda each: -each[0])]
    return [flag for flag in flagged if flag in done]


def _left(
    selection: Silencing, flags: Sequence[Flag], kept: Collection[Flag], refused: Collection[Flag]
) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """The channels that are not kept, by layer and by why."""
    for reason, missing in ((_REFUSED, set(refused)), (_UNREACHED, {*flags} - {*kept} - {*refused})):
        for position, layer in enumerate(selection.analysis.report.layers):
            channels = tuple(sorted(channel for other, channel in missing if other == position))
            if channels:
                yield layer.name, channels, reason


def _words(answers: Sequence[int]) -> str:
    classes, share = len(set(answers)), 1 - others(answers) / len(answers)
    return f"{classes} class{'es' * (classes != 1)}, the most frequent {share:.0%} of the time"


def _unmade(reason: str) -> Check:
    return Check("probes", passed=None, detail=reason)


@contextmanager
def _probing(file: ModelFile, subject: Subject) -> Iterator[Ask]:
    """What runs the input, and copies of it, on the probes."""
    with TemporaryDirectory(prefix="onnx-clp-", ignore_cleanup_errors=True) as folder:
        given = Path(folder) / "probes.npy"
        np.save(given, probes(subject.shape, subject.dtype, channels_last=subject.channels_last))
        wanted = count(subject.dtype)
        size = file.source.size + sum(file.data_file(location).size for location in file.locations())

        def answered(model: Path) -> Answers | str:
            limits = file.meter.limits
            answer = runtime.classify(model, given, subject.given, subject.output, Path(folder), size, limits)
            return tuple(json.loads(answer.message))[:wanted] if answer.fine else answer.words

        def ask(selection: Silencing | None) -> Answers | str:
            if selection is None:
                return answered(file.path)
            with temporary_copy(file, selection.plan.edits) as copy:
                return answered(copy.model)

        yield ask


def _subject(proto: onnx.ModelProto, input_shapes: Mapping[str, tuple[int, ...]]) -> Subject | str:
    """How the model is probed, or why it cannot be."""
    graph = proto.graph
    constants = {tensor.name for tensor in graph.initializer} | {each.values.name for each in graph.sparse_initializer}
    inputs = [info for info in graph.input if info.name not in constants]
    if len(inputs) != 1:
        return f"the model has {len(inputs)} inputs, and made-up images are for one"
    (given,) = inputs
    dtype, declared = _DTYPES.get(given.type.tensor_type.elem_type), _shape(given)
    if dtype is None or declared is None or len(declared) != 4:
        return f"its input {given.name!r} is none for images"
    output = first_of_classes([Output(info.name, _shape(info)) for info in graph.output])
    if output is None:
        return "it has no output with a number for each class"
    shape = input_shapes.get(given.name, (declared[0] if isinstance(declared[0], int) else 1, *declared[1:]))
    sizes = [size for size in shape if isinstance(size, int) and size > 0]
    if len(shape) != 4 or len(sizes) != 4:
        return f"its input {given.name!r} has a dynamic shape: give --input-shape {given.name}=1,3,224,224 or what fits"
    if count(dtype) * int(np.prod(sizes[1:])) > _LARGEST_INPUT or sizes[0] > count(dtype):
        return f"its input {given.name!r} is too large for made-up images"
    n, *rest = sizes
    last = rest[0] not in {1, 3} and rest[2] in {1, 3}
    return Subject(given.name, (n, rest[0], rest[1], rest[2]), dtype, last, output.name)


def _shape(info: onnx.ValueInfoProto) -> tuple[int | str | None, ...] | None:
    """The declared shape; None where there is none."""
    tensor = info.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim)
