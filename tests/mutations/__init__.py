"""Structured mutations: a model that is still a protobuf message, and no longer the model that it was."""

from __future__ import annotations

import contextlib

import onnx
from google.protobuf.message import DecodeError, EncodeError

from tests.mutations.chance import Chance, Dice, choice
from tests.mutations.fields import FIELDS
from tests.mutations.nodes import NODES, Mutation
from tests.mutations.tensors import TENSORS

__all__ = ["MUTATIONS", "Chance", "Dice", "Mutation", "choice", "mutate"]

MUTATIONS: tuple[Mutation, ...] = (*FIELDS, *NODES, *TENSORS)


def mutate(chance: Chance, model: onnx.ModelProto, most: int) -> None:
    """Change a model by one to ``most`` mutations, in place."""
    for _ in range(chance.integer(1, most)):
        # Protobuf takes no text that is not UTF-8, which a file may hold, and no message that is nested too deep.
        with contextlib.suppress(ValueError, DecodeError, EncodeError):
            choice(chance, MUTATIONS)(chance, model)
