"""Files that are either complete or not there, JSON without NaN, and progress bars on the error stream."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kronfac._files import replace_file
from kronfac.cli.errors import RunError, UsageError


def make_directory(path: Path) -> Path:
    """Create an output directory.

    Raises:
        UsageError: it cannot be created or is a file.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {path}: cannot create this directory ({error.strerror})") from None
    if not os.access(path, os.W_OK):
        raise UsageError(f"--out {path}: this directory is not writable")
    return path


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old content or the new, never a part.

    Raises:
        RunError: the file system refuses (disk full, permission).
    """
    try:
        replace_file(path, content)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror})") from None


def plain(value: Any) -> Any:
    """Copy nested containers with what JSON has no number for (infinity, NaN) as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, str | bytes):
        return value
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    return value


def to_json(value: Any) -> str:
    """Strict JSON (no NaN literals), indented."""
    return json.dumps(plain(value), indent=2, allow_nan=False)


class Progress:
    """A progress bar on the error stream; a context manager.

    Args:
        total: how many there are to count, or None where that is not known.
        label: text at the left.
        unit: what is counted.
        quiet: show nothing.
    """

    def __init__(self, total: int | None, label: str, unit: str = "step", quiet: bool = False) -> None:
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:
            raise RunError("progress bars need tqdm; run `pip install 'kronfac[demo]'`") from None
        self._bar = tqdm(
            total=total, desc=label, unit=unit, disable=quiet, file=sys.stderr, mininterval=0.3, dynamic_ncols=True
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, count: int = 1) -> None:
        """Count `count` more."""
        self._bar.update(count)

    def note(self, text: str) -> None:
        """Replace the text at the right."""
        self._bar.set_postfix_str(text, refresh=False)

    def label(self, text: str) -> None:
        """Replace the text at the left."""
        self._bar.set_description(text, refresh=False)


class StagedProgress:
    """Progress bars for stages of which each counts from zero; a context manager.

    Args:
        unit: what is counted.
        quiet: show nothing.
        prefix: text before the name of the stage.
    """

    def __init__(self, unit: str, quiet: bool = False, prefix: str = "") -> None:
        self._unit, self._quiet, self._prefix = unit, quiet, prefix
        self._stage: str | None = None
        self._done = 0
        self._bar: Progress | None = None

    def __enter__(self) -> StagedProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.__exit__()

    def report(self, stage: str, done: int, total: int | None) -> None:
        """Show that `done` of `total` (None: not known beforehand) are done in `stage`."""
        if stage != self._stage:
            self.__exit__()
            self._bar = Progress(total, self._prefix + stage, unit=self._unit, quiet=self._quiet)
            self._stage, self._done = stage, 0
        assert self._bar is not None
        self._bar.advance(done - self._done)
        self._done = done
