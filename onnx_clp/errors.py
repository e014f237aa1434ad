"""What can go wrong, in few kinds. Every error says what was met, where, and what to do next."""

from __future__ import annotations

from typing import TypeVar


class OnnxClpError(Exception):
    """Base of every error this package raises on purpose.

    Attributes:
        message: One line: what was met and where.
        hint: One line: what to do next; empty where the message says it all.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def __reduce__(self) -> tuple[type[OnnxClpError], tuple[str, str]]:
        return (type(self), (self.message, self.hint))


class ModelFileError(OnnxClpError):
    """The file is missing, unreadable, truncated, corrupt, or no ONNX model."""


class UsageError(OnnxClpError):
    """The caller asked for something that cannot be done as asked."""


class PayloadError(OnnxClpError):
    """The elements of one tensor cannot be had; the message says why and becomes the detail of a skipped layer.

    Attributes:
        reason: In one word: ``unreadable``, ``no-data``, ``shape``, ``dynamic-weight``, ``custom-operator`` or
            ``limit``.
    """

    def __init__(self, message: str, reason: str = "unreadable") -> None:
        super().__init__(message)
        self.reason = reason


class VerificationError(OnnxClpError):
    """A rewritten file did not pass its own verification and was removed."""


Kept = TypeVar("Kept", bound=OnnxClpError)


def kept(error: Kept) -> Kept:
    """``error`` as a value to keep, without the frames that it came through: all that they hold would be kept too."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
