"""``attack.json``: what an attack does to an image, what it wants, and how the model takes its images.

The exporters write it, ``onnx-clp evaluate`` reads it. The arrays of a trigger lie in .npy files beside it, and the
network of a generated trigger in a .onnx file; a name that leads out of the folder is refused.

    {
      "format": "onnx-clp/attack", "version": 1,
      "attack": "badnets",
      "trigger": {"kind": "patch", "file": "trigger.npy", "positions": ["bottom-right"]},
      "target": {"mode": "all-to-one", "label": 0},
      "preprocessing": {"size": [32, 32], "channels": 3, "layout": "NCHW", "range": [0, 1], "mean": […], "std": […]},
      "classes": ["airplane", …],
      …anything else is kept as it is: dataset, training, versions, measured
    }

A model without a backdoor has ``"trigger": null`` and ``"target": null``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from onnx_clp.errors import UsageError
from onnx_clp.evaluation.files import beside, open_regular
from onnx_clp.evaluation.npy import load_array
from onnx_clp.evaluation.triggers import POSITIONS, Additive, Blend, Generated, Patch, Trigger, Warp

FORMAT: Final = "onnx-clp/attack"
VERSION: Final = 1
LAYOUTS: Final = ("NCHW", "NHWC")
_LARGEST_DOCUMENT: Final = 16 << 20
"""Bytes of attack.json that are read; a real one has a few thousand."""
_LARGEST_SIDE: Final = 16384
_LARGEST_INPUT: Final = 1 << 24
"""Pixels of a model's input: every image is brought to it, however small its file; classifiers have at most 2²⁰."""
_LARGEST_TRIGGER: Final = 1 << 30
"""Bytes of a trigger's array."""

Runner = Callable[[Path], Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]]
"""From the file of a network to what runs it."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """From an 8-bit image to the model's input.

    Attributes:
        size: Height and width of the input, in pixels.
        channels: 1 (grey) or 3 (red, green, blue).
        layout: The order of the axes, ``NCHW`` or ``NHWC``.
        value_range: What the bytes 0 and 255 become before ``mean`` and ``std``: (0, 1), (0, 255), (-1, 1) …
        mean: Subtracted, one number a channel.
        std: Divided by, one number a channel.
        resize: Length to which the shorter side is brought before the centre is cut out; None stretches the image to
            ``size``.
    """

    size: tuple[int, int]
    channels: int = 3
    layout: str = "NCHW"
    value_range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    resize: int | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """What the attacker wants: ``label`` for every image; where it is None the next class, (label + 1) mod classes."""

    label: int | None

    def of(self, labels: npt.NDArray[np.int64], classes: int) -> npt.NDArray[np.int64]:
        """The class that the attacker wants for images of the classes ``labels`` (N,)."""
        return (labels + 1) % classes if self.label is None else np.full_like(labels, self.label)


@dataclass(frozen=True, slots=True)
class Attack:
    """An attack on an image classifier.

    Attributes:
        name: As the exporters call it: ``badnets``, …; ``clean`` for none.
        trigger: What is done to an image; None where the model has no backdoor.
        target: What the attacker wants; None with the trigger.
        preprocessing: How the model takes its images.
        classes: The names of the classes, in the order of the model's outputs.
        notes: Everything else in the document, JSON values: dataset, training, versions, measured.
    """

    name: str
    trigger: Trigger | None
    target: Target | None
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    notes: Mapping[str, Any] = field(default_factory=dict)


def write_attack(attack: Attack, folder: Path, generator: str = "trigger.onnx") -> Path:
    """Write ``attack.json`` and the arrays of its trigger into ``folder``; the path of the former.

    A generated trigger's network must lie there already, as ``generator``.
    """
    trigger: dict[str, Any] | None
    match attack.trigger:
        case None:
            trigger = None
        case Patch(pattern, positions):
            trigger = {"kind": "patch", **_saved(folder, pattern), "positions": list(positions)}
        case Blend(pattern, alpha, position):
            trigger = {"kind": "blend", **_saved(folder, pattern), "alpha": alpha, "position": position}
        case Additive(signal):
            trigger = {"kind": "additive", **_saved(folder, signal)}
        case Warp(grid):
            trigger = {"kind": "warp", **_saved(folder, grid)}
        case Generated():
            trigger = {"kind": "generated", "file": generator}
    target = attack.target
    preprocessing = attack.preprocessing
    document = {
        "format": FORMAT,
        "version": VERSION,
        "attack": attack.name,
        "trigger": trigger,
        "target": None
        if target is None
        else {"mode": "all-to-all"}
        if target.label is None
        else {"mode": "all-to-one", "label": target.label},
        "preprocessing": {
            "size": list(preprocessing.size),
            "channels": preprocessing.channels,
            "layout": preprocessing.layout,
            "range": list(preprocessing.value_range),
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            **({} if preprocessing.resize is None else {"resize": preprocessing.resize}),
        },
        "classes": list(attack.classes),
        **attack.notes,
    }
    path = folder / "attack.json"
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read_attack(path: Path, runner: Runner) -> Attack:
    """Read ``attack.json``.

    Args:
        path: The file.
        runner: Makes of a generated trigger's network what runs it.

    Raises:
        UsageError: It is not there, is not such a document, is of another version, or names a file that cannot be read.
    """
    document = _read_document(path)
    reader = _Reader(path)
    target, trigger = document.get("target"), document.get("trigger")
    if (target is None) != (trigger is None):
        raise reader.wrong("'trigger' and 'target'", "both or neither")
    classes = reader.texts(document, "classes")
    known = {"format", "version", "attack", "trigger", "target", "preprocessing", "classes"}
    return Attack(
        name=reader.text(document, "attack"),
        trigger=None if trigger is None else _trigger(reader, reader.mapping(document, "trigger"), runner),
        target=None if target is None else _target(reader, reader.mapping(document, "target"), len(classes)),
        preprocessing=_preprocessing(reader, reader.mapping(document, "preprocessing")),
        classes=classes,
        notes={key: value for key, value in document.items() if key not in known},
    )


def named_files(path: Path) -> tuple[Path, ...]:
    """The files that an ``attack.json`` names, unread: that of its trigger. Raises UsageError as `read_attack` does."""
    trigger = _read_document(path).get("trigger")
    return (_Reader(path).file(trigger),) if isinstance(trigger, dict) and "file" in trigger else ()


def _saved(folder: Path, array: npt.NDArray[Any]) -> dict[str, str]:
    np.save(folder / "trigger.npy", array, allow_pickle=False)
    return {"file": "trigger.npy"}


def _read_document(path: Path) -> dict[str, Any]:
    hint = "an attack.json is what `python -m exporters train` writes beside its models"
    try:
        with open_regular(path) as file:
            content = file.read(_LARGEST_DOCUMENT + 1)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}", hint) from error
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        why = "it is larger than 16 MiB" if len(content) > _LARGEST_DOCUMENT else str(error) or type(error).__name__
        raise UsageError(f"{path} is not JSON: {why}", hint) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UsageError(f"{path} is not an attack.json: its format is not {FORMAT!r}", hint)
    if document.get("version") != VERSION:
        raise UsageError(
            f"{path} is of version {document.get('version')!r}, this onnx-clp reads version {VERSION}",
            "install the onnx-clp it was written with, or export the attack again",
        )
    return document


@dataclass(frozen=True, slots=True)
class _Reader:
    """Fields of the document, each of the kind it must be."""

    path: Path

    def wrong(self, what: str, wanted: str) -> UsageError:
        return UsageError(f"{self.path}: {what} must be {wanted}", "correct it, or export the attack again")

    def mapping(self, document: Mapping[str, Any], key: str) -> dict[str, Any]:
        value = document.get(key)
        if not isinstance(value, dict):
            raise self.wrong(f"{key!r}", "an object")
        return value

    def text(self, document: Mapping[str, Any], key: str) -> str:
        value = document.get(key)
        if not isinstance(value, str):
            raise self.wrong(f"{key!r}", "a text")
        return value

    def texts(self, document: Mapping[str, Any], key: str) -> tuple[str, ...]:
        value = document.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise self.wrong(f"{key!r}", "a list of texts")
        return tuple(value)

    def integer(self, document: Mapping[str, Any], key: str, low: int, high: int) -> int:
        value = document.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.wrong(f"{key!r}", f"an integer from {low} to {high}")
        return value

    def numbers(self, document: Mapping[str, Any], key: str, length: int) -> tuple[float, ...]:
        value = document.get(key)
        if not isinstance(value, list) or len(value) != length or not all(_is_finite(item) for item in value):
            raise self.wrong(f"{key!r}", f"a list of {length} finite numbers")
        return tuple(float(item) for item in value)

    def choice(self, document: Mapping[str, Any], key: str, choices: Sequence[str]) -> str:
        value = document.get(key)
        if value not in choices:
            raise self.wrong(f"{key!r}", f"one of {', '.join(choices)}")
        return str(value)

    def file(self, document: Mapping[str, Any]) -> Path:
        """The file that ``document`` names, in the folder of attack.json."""
        name = document.get("file")
        plain = isinstance(name, str) and name not in {"", ".", ".."} and not {"/", "\\", "\0"} & set(name)
        if not isinstance(name, str) or not plain:
            raise self.wrong("'file'", "the plain name of a file beside it")
        return beside(self.path, name)

    def array(self, document: Mapping[str, Any], axes: int) -> npt.NDArray[Any]:
        """The array in the file that ``document`` names; pickled objects are refused."""
        path = self.file(document)
        array = load_array(path)
        if array.ndim != axes or max(array.shape) > _LARGEST_SIDE or not 0 < array.nbytes <= _LARGEST_TRIGGER:
            raise UsageError(
                f"{path} has the shape {array.shape}, {axes} axes are wanted", f"{self.path.name} names it"
            )
        return np.array(array)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _trigger(reader: _Reader, document: Mapping[str, Any], runner: Runner) -> Trigger:
    match document.get("kind"):
        case "patch":
            positions = reader.texts(document, "positions")
            unknown = sorted(set(positions) - set(POSITIONS))
            if unknown:
                raise reader.wrong("'positions'", f"of {', '.join(POSITIONS)}")
            return Patch(_as_bytes(reader, reader.array(document, 3)), tuple(dict.fromkeys(positions)))
        case "blend":
            (alpha,) = reader.numbers({"alpha": [document.get("alpha")]}, "alpha", 1)
            if not 0 <= alpha <= 1:
                raise reader.wrong("'alpha'", "from 0 to 1")
            position = reader.choice(document, "position", POSITIONS)
            return Blend(_as_bytes(reader, reader.array(document, 3)), alpha, position)
        case "additive":
            return Additive(_as_floats(reader, reader.array(document, 3)))
        case "warp":
            return Warp(_as_floats(reader, reader.array(document, 3)))
        case "generated":
            return Generated(runner(reader.file(document)))
        case kind:
            raise reader.wrong(f"the trigger's kind {kind!r}", "patch, blend, additive, warp or generated")


def _as_bytes(reader: _Reader, array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    if array.dtype != np.uint8:
        raise reader.wrong(f"the trigger (of {array.dtype})", "8-bit: uint8, 0 to 255")
    return array


def _as_floats(reader: _Reader, array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        floats = array.astype(np.float32) if array.dtype.kind == "f" else np.array(np.nan, np.float32)
    if not np.isfinite(floats).all():
        raise reader.wrong(f"the trigger (of {array.dtype})", "finite floating-point numbers")
    return floats


def _target(reader: _Reader, document: Mapping[str, Any], classes: int) -> Target:
    if reader.choice(document, "mode", ("all-to-one", "all-to-all")) == "all-to-all":
        return Target(None)
    return Target(reader.integer(document, "label", 0, classes - 1))


def _preprocessing(reader: _Reader, document: Mapping[str, Any]) -> Preprocessing:
    channels = reader.integer(document, "channels", 1, 3)
    if channels == 2:
        raise reader.wrong("'channels'", "1 or 3")
    height, width = reader.numbers(document, "size", 2)
    if not all(side == int(side) and 1 <= side <= _LARGEST_SIDE for side in (height, width)):
        raise reader.wrong("'size'", f"height and width, from 1 to {_LARGEST_SIDE}")
    if height * width > _LARGEST_INPUT:
        raise reader.wrong("'size'", f"of {_LARGEST_INPUT:,} pixels at most")
    std = reader.numbers(document, "std", channels)
    if 0.0 in std:
        raise reader.wrong("'std'", "other than 0")
    low, high = reader.numbers(document, "range", 2)
    return Preprocessing(
        size=(int(height), int(width)),
        channels=channels,
        layout=reader.choice(document, "layout", LAYOUTS),
        value_range=(low, high),
        mean=reader.numbers(document, "mean", channels),
        std=std,
        resize=reader.integer(document, "resize", 1, _LARGEST_SIDE) if "resize" in document else None,
    )
