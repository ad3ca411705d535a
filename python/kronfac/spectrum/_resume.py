"""Checkpoints of long analyses: a JSON file of what is done, taken up again only by the very same analysis."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kronfac._files import replace_file

_VERSION = 1
# A file of this age is replaced: writing after every point would cost more than many a point.
_SECONDS = 5.0


class ResumeFile:
    """What of an analysis is done, kept in a file.

    Args:
        path: of the file, which is read where it exists; None to keep nothing.
        kind: name of the analysis, in the file and in messages.
        settings: what has to agree for the saved results to be those of this analysis: plain values by a name in words.
        caller: the public function that error messages name.

    Attributes:
        done: the saved results: plain values by key, to be extended.

    Raises:
        TypeError: `path` is no path.
        ValueError: the file is something else, or of other settings.
        OSError: it cannot be read, or its directory does not exist.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, kind: str, settings: Mapping[str, Any], caller: str
    ) -> None:
        self._kind = kind
        # As JSON gives it back: tuples become lists.
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._caller = caller
        self._path = _check_path(path, caller)
        self.done: dict[str, Any] = {} if self._path is None else self._read(self._path)
        self._written = time.monotonic()
        self._changed = False

    def put(self, key: str, value: Any) -> None:
        """Add a result; the file follows within a few seconds, or with `write`."""
        self.done[key] = value
        self._changed = True
        if self._path is not None and time.monotonic() - self._written >= _SECONDS:
            self.write()

    def write(self) -> None:
        """Write the file, if there is one and something is new.

        Raises:
            OSError: the file system refuses.
        """
        if self._path is None or not self._changed:
            return
        content = {"kind": self._kind, "version": _VERSION, "settings": self._settings, "done": self.done}
        replace_file(self._path, json.dumps(content, allow_nan=False))
        self._written, self._changed = time.monotonic(), False

    def refuse(self, what: str) -> ValueError:
        """The error for a file of another analysis."""
        return ValueError(
            f"{self._caller}: checkpoint: {self._path} is of another analysis: {what}; give another file, or delete "
            "this one to start anew"
        )

    def _read(self, path: Path) -> dict[str, Any]:
        if not path.exists():
            return {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise self._foreign(path) from error
        if not isinstance(content, dict) or content.get("kind") != self._kind:
            raise self._foreign(path)
        if content.get("version") != _VERSION:
            raise ValueError(
                f"{self._caller}: checkpoint: {path} has version {content.get('version')}, expected {_VERSION}; "
                "give another file"
            )
        saved, done = content.get("settings"), content.get("done")
        if not isinstance(saved, dict) or not isinstance(done, dict):
            raise self._foreign(path)
        for name in [*self._settings, *(name for name in saved if name not in self._settings)]:
            before, now = saved.get(name), self._settings.get(name)
            if before != now:
                raise self.refuse(f"{name} differs ({_short(before)} there, {_short(now)} now)")
        return done

    def _foreign(self, path: Path) -> ValueError:
        return ValueError(
            f"{self._caller}: checkpoint: {path} is not a checkpoint of it, or damaged; give another file"
        )


def encode(value: float) -> float | str:
    """A float as JSON has it: Python writes it with all its digits, and infinity and NaN as words."""
    return value if math.isfinite(value) else repr(value)


def decode(value: float | str) -> float:
    """What `encode` was given."""
    return float(value)


def _check_path(path: str | os.PathLike[str] | None, caller: str) -> Path | None:
    if path is None:
        return None
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{caller}: checkpoint: expected a path or None, got {type(path).__name__}")
    found = Path(path)
    if found.is_dir():
        raise IsADirectoryError(f"{caller}: checkpoint: {found} is a directory; give a file in it")
    if not found.parent.is_dir():
        raise FileNotFoundError(f"{caller}: checkpoint: the directory {found.parent} does not exist; create it first")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
