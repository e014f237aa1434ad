"""Options that commands share, and how a report reaches the user."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final

import click

from onnx_clp.cli.output import write_whole
from onnx_clp.defaults import DEFAULT_SCORE, DEFAULT_THRESHOLD, DEFAULT_U, SCORES, THRESHOLDS
from onnx_clp.errors import OnnxClpError, UsageError
from onnx_clp.limits import DEFAULT_LIMITS, Limits

LONGEST_NUMBER: Final = 20
"""Digits; Python itself reads numbers of up to 4,300."""


def share(_: click.Context, __: click.Parameter, value: str) -> float:
    """A share of a whole, ``10%`` or ``0.1``, as a number between 0 and 1."""
    try:
        number = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise click.BadParameter(f"{value!r} is no share: give 10% or 0.1")
    return number


def limit_numbers(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> Limits:
    """Each ``name=number`` in place of the default of that limit."""
    changed: dict[str, int] = {}
    names = [field.name for field in fields(Limits)]
    for value in values:
        name, _equals, number = value.partition("=")
        if name not in names:
            raise click.BadParameter(f"{value!r}: the limits are {', '.join(names)}; give one as nodes=2000000")
        try:
            whole = float(number)
            changed[name] = int(whole)
        except (ValueError, OverflowError):
            raise click.BadParameter(f"{value!r}: give a number, as {name}=2000000 or {name}=2e6") from None
        if changed[name] != whole:
            raise click.BadParameter(f"{value!r}: give a whole number, as {name}=2000000 or {name}=2e6")
    return replace(DEFAULT_LIMITS, **changed)


def common(
    scores: tuple[str, ...] = SCORES, words: str = "", u: float | None = DEFAULT_U
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options that every command has; ``words`` say what ``scores`` has that a scan does not.

    With None for ``u`` the command knows whether it was said.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(
            (
                click.option("-u", "u", type=float, default=u, show_default=u is not None, metavar="NUMBER",
                             help="Flag a channel above mean + NUMBER·std of its layer"
                             + ("." if u is not None else f"; {DEFAULT_U:g} unless said.")),
                click.option("--score", type=click.Choice(scores), default=DEFAULT_SCORE, show_default=True,
                             metavar="NAME", help="Judge channels by their bound, or by path: bound × norm of the "
                             f"outgoing weights, which no scaling of channels moves{words}."),
                click.option("--threshold", type=click.Choice(THRESHOLDS), default=DEFAULT_THRESHOLD, show_default=True,
                             metavar="NAME", help="What stands out: mean-std, median-mad, or the same of logarithms: "
                             "log-std, log-mad."),
                click.option("--count-dead", is_flag=True,
                             help="Count channels of bound 0 in mean and std, as the published code does."),
                click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True,
                             help="Format of the report."),
                click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
                             help="Write the report to FILE instead of stdout."),
                click.option("-q", "--quiet", is_flag=True, help="No report on stdout, no progress."),
                click.option("-v", "--verbose", is_flag=True, help="Every layer and every skipped part."),
                click.option("--allow-root", "allow_roots", multiple=True, metavar="DIR",
                             type=click.Path(exists=True, file_okay=False, path_type=Path),
                             help="Read external data that lies below DIR too, not only below the model's folder."),
                click.option("--limit", "limits", multiple=True, metavar="NAME=NUMBER", callback=limit_numbers,
                             help="What a file may cost however small it is: nodes, skeleton, work, memory, entries, "
                             "seconds. See docs/security.md."),
                click.option("--debug", is_flag=True, help="Show the traceback of an error."),
            )
        ):  # fmt: skip
            command = option(command)
        return command

    return decorate


def protect(output: Path | None, files: Iterable[str | Path], what: str = "report", option: str = "-o") -> None:
    """Raise UsageError where ``what``, which ``option`` names, would overwrite one of ``files``, there or not yet."""
    for file in files:
        if output is not None and os.path.realpath(output) == os.path.realpath(file):
            raise UsageError(f"the {what} would overwrite {file}", f"name another file with {option}")


def abandon_stdout() -> None:
    """Let what is still buffered for stdout go nowhere, so that it does not raise again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def deliver(report: str, output: Path | None, *, quiet: bool) -> None:
    """Put the report where it was asked for. Raises UsageError where it cannot be written."""
    try:
        if output is not None:
            write_whole(output, report.encode("utf-8"))
        elif not quiet and sys.stdout is not None:
            # A terminal that cannot show a character of a name gets a question mark, not a traceback.
            encoding = sys.stdout.encoding or "utf-8"
            click.echo(report.encode(encoding, "replace").decode(encoding), nl=False)
    except BrokenPipeError:
        raise
    except OSError as error:
        if output is None:
            abandon_stdout()
        raise UsageError(f"cannot write the report to {output or 'stdout'}: {error.strerror}") from error


def complain(error: Exception, *, debug: bool) -> None:
    """Say on stderr, in one line, what went wrong and what to do next; with ``debug`` the traceback before it."""
    from onnx_clp.report.words import printable

    if debug:
        for line in "".join(traceback.format_exception(error)).rstrip("\n").split("\n"):
            click.echo(printable(line, 2000), err=True)
    text = str(error) if isinstance(error, OnnxClpError) else f"{type(error).__name__}: {error}"
    click.echo(f"onnx-clp: {printable(text, 2000)}", err=True)


def show_usage(error: click.ClickException) -> None:
    """Say on stderr how the command is used. An argument may be a file's name that a shell has filled in."""
    from onnx_clp.report.words import printable

    error.message = printable(error.message, 2000)  # type: ignore[misc]  # a constant for its readers
    error.show()


def terminal_style(output: Path | None) -> Callable[[str, str], str]:
    """Colours where stdout is a terminal and NO_COLOR (https://no-color.org) is not set."""
    styles: dict[str, dict[str, Any]] = {
        "head": {"bold": True},
        "bad": {"fg": "red"},
        "warn": {"fg": "yellow"},
        "good": {"fg": "green"},
        "dim": {"dim": True},
    }
    coloured = output is None and sys.stdout is not None and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return lambda text, name: click.style(text, **styles[name]) if coloured else text
