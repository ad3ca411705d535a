"""The two ways a command can end other than well."""

from __future__ import annotations


class UsageError(Exception):
    """Bad arguments or bad data: printed in one line, exit status 2."""


class RunError(RuntimeError):
    """A run that was asked for correctly and failed: printed in one line, exit status 1."""


def one_line(error: BaseException) -> str:
    """The message of an error, or its type where it has none, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
