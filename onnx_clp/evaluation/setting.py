"""Images, attack and preprocessing, read once → a setting in which any number of models are measured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from onnx_clp.errors import UsageError
from onnx_clp.evaluation.attack import Attack, Preprocessing, Target
from onnx_clp.evaluation.byhand import Overrides, preprocessing_for, read_trigger, trigger_words
from onnx_clp.evaluation.classifier import (
    Classifier,
    Progress,
    TriggeredImages,
    already_triggered,
    check_input,
    class_output,
    column_count,
    make_classifier,
    measure,
    triggered_images,
)
from onnx_clp.evaluation.figures import AttackUsed, Figures
from onnx_clp.evaluation.images import LabelledImages, find_collection, read_images, some_of
from onnx_clp.evaluation.pictures import Fit
from onnx_clp.evaluation.session import Session, open_session
from onnx_clp.evaluation.triggers import Trigger

ALL_TO_ALL: Final = "all-to-all"


def make_setting(
    session: Session,
    images: Path | LabelledImages,
    attack: Attack | None = None,
    overrides: Overrides | None = None,
    by_hand: ByHand | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
    providers: Sequence[str] | None = None,
    batch_size: int | None = None,
    output_name: str | None = None,
) -> Setting:
    """Read the images and trigger them, for ``session`` and models like it.

    Arguments and errors are those of `onnx_clp.evaluate`, with ``overrides`` for what it takes of the preprocessing and
    ``by_hand`` for what it takes of the attack.
    """
    by_hand, overrides = by_hand or ByHand(), overrides or Overrides()
    by_hand.check(attack)
    columns = column_count(class_output(session, output_name))
    if attack is not None and columns is not None and columns != len(attack.classes):
        raise UsageError(
            f"{session.path} tells {columns} classes apart, attack.json names {len(attack.classes)}",
            "give the attack.json of this model",
        )
    clean, preprocessing = clean_images(session, images, attack, overrides, columns, limit, seed)
    target = _target(by_hand.target, attack, len(clean.source.classes))
    triggered, used = None, None
    if target is not None:
        triggered, used = _triggered(clean, preprocessing, attack, by_hand, target, limit, seed)
    return Setting(
        images=clean,
        triggered=triggered,
        attack=used,
        preprocessing=preprocessing,
        providers=None if providers is None else tuple(providers),
        batch_size=batch_size,
        output_name=output_name,
    )


@dataclass(frozen=True, slots=True, eq=False)
class ByHand:
    """An attack as it is given by hand; see `evaluate`."""

    trigger: str | os.PathLike[str] | Trigger | None = None
    position: str | None = None
    blend: float | None = None
    triggered: Path | None = None
    target: int | str | None = None

    def check(self, attack: Attack | None) -> None:
        """Raise UsageError where the parts do not go together."""
        if self.trigger is not None and self.triggered is not None:
            raise UsageError("a trigger and triggered images are given", "give one of them")
        if self.trigger is None and (self.position is not None or self.blend is not None):
            raise UsageError("a position or a share is given, and no trigger", "give the trigger too: --trigger FILE")
        named = attack is not None and attack.trigger is not None
        if self.trigger is None and self.triggered is None and self.target is not None and not named:
            raise UsageError("a target is given, and no trigger", "give --trigger, --triggered or --attack")
        if (self.trigger is not None or self.triggered is not None) and self.target is None and not named:
            raise UsageError("a trigger is given, and not what the attacker wants", "give --target N or all-to-all")


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """What models are measured with: read and made once, for as many models as there are.

    Attributes:
        images: The clean images.
        triggered: The triggered ones; None where only the clean accuracy is measured.
        attack: What was done to them; None likewise.
        preprocessing: How the models take the images.
        providers: As they were asked for.
        batch_size: As it was asked for.
        output_name: As it was asked for.
    """

    images: LabelledImages
    triggered: TriggeredImages | None
    attack: AttackUsed | None
    preprocessing: Preprocessing
    providers: tuple[str, ...] | None = None
    batch_size: int | None = None
    output_name: str | None = None

    def open(self, path: Path, watched: Sequence[str] = ()) -> Classifier:
        """Load a model as a classifier of these images; ``watched`` as for `open_session`, and raises as it does."""
        return self.classifier(open_session(path, self.providers, watched))

    def classifier(self, session: Session) -> Classifier:
        """The classifier of a model that is loaded. Raises UsageError where it does not fit."""
        classes = len(self.images.source.classes)
        return make_classifier(session, self.preprocessing, classes, self.batch_size, self.output_name)

    @property
    def image_count(self) -> int:
        """How many images a model is run on."""
        return len(self.images.images) + (0 if self.triggered is None else len(self.triggered.images))

    def measure(self, classifier: Classifier, progress: Progress | None = None) -> Figures:
        """The figures of a classifier. Raises as `Classifier.classify` does."""
        return measure(classifier, self.images, self.triggered, progress)


def clean_images(
    session: Session,
    images: Path | LabelledImages,
    attack: Attack | None,
    overrides: Overrides,
    columns: int | None,
    limit: int | None,
    seed: int,
) -> tuple[LabelledImages, Preprocessing]:
    """The clean images, and how the model takes them. Arguments and errors as of `make_setting`.

    ``columns`` is how many classes the model tells apart; None where it does not say.
    """
    given = attack.preprocessing if attack else None
    classes = attack.classes if attack else columns
    if isinstance(images, LabelledImages):
        height, width, channels = images.images.shape[1:]
        preprocessing = preprocessing_for(session, given, overrides, channels, (height, width))
        wanted, found = (len(classes) if isinstance(classes, tuple) else classes), len(images.source.classes)
        if wanted is not None and wanted != found:
            raise UsageError(f"the images are of {found} classes, the model tells {wanted} apart")
        check_input(session, preprocessing)
        return some_of(images, limit, seed), preprocessing
    collection = find_collection(images)
    preprocessing = preprocessing_for(session, given, overrides, collection.channels, collection.size)
    check_input(session, preprocessing)
    fit = Fit(preprocessing.size, preprocessing.channels, preprocessing.resize)
    return read_images(images, fit, classes, limit, seed, found=collection), preprocessing


def _triggered(
    clean: LabelledImages,
    preprocessing: Preprocessing,
    attack: Attack | None,
    by_hand: ByHand,
    target: Target,
    limit: int | None,
    seed: int,
) -> tuple[TriggeredImages | None, AttackUsed | None]:
    """The triggered images, and what was done to them; None where nothing is."""
    if by_hand.triggered is not None:
        fit = Fit(preprocessing.size, preprocessing.channels, preprocessing.resize)
        given = read_images(by_hand.triggered, fit, clean.source.classes, limit, seed, partial=True)
        return already_triggered(given, target), AttackUsed("", f"images of {by_hand.triggered}", target.label)
    trigger: Trigger | None = attack.trigger if attack else None
    name = attack.name if attack and by_hand.trigger is None else ""
    if isinstance(by_hand.trigger, str | os.PathLike):
        trigger = read_trigger(Path(by_hand.trigger), preprocessing, by_hand.position, by_hand.blend)
    elif by_hand.trigger is not None:
        trigger = by_hand.trigger
    if trigger is None:
        return None, None
    return triggered_images(clean, trigger, target), AttackUsed(name, trigger_words(trigger), target.label)


def _target(said: int | str | None, attack: Attack | None, classes: int) -> Target | None:
    if said is None:
        return attack.target if attack else None
    if said == ALL_TO_ALL:
        return Target(None)
    number = said if isinstance(said, int) else int(said) if said.isdecimal() and len(said) < 10 else -1
    if not 0 <= number < classes:
        raise UsageError(f"the target is {said!r}", f"give a class from 0 to {classes - 1}, or {ALL_TO_ALL}")
    return Target(number)
