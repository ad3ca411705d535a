"""Runs the command line and kills itself, with no chance to clean up, while a certain checkpoint is being written.

    python -m tests.cli.killed POINT COUNT ARGUMENTS...

POINT is "written" (half of the bytes are in the temporary file), "renamed" (the file is complete, under its temporary
name) or "done" (it has its name, history.json does not know yet); COUNT says at which checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from kronfac.cli.checkpoint import save_checkpoint
from kronfac.cli.main import run


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Torn:
    """A file that takes half of what is written to it, and then the process dies."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> Torn:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        self._file.write(data[: len(data) // 2])
        self._file.flush()
        die()


def arm(point: str, count: int) -> None:
    """Set the trap at the checkpoint number `count`."""
    seen = 0
    replace, path_open = os.replace, Path.open

    def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        file = path_open(path, mode, *args, **kwargs)
        if mode == "wb" and path.name.startswith(".checkpoint.pt"):
            seen += 1
            if point == "written" and seen == count:
                return Torn(file)
        return file

    def replaced(source: Any, target: Any) -> None:
        ours = Path(target).name == "checkpoint.pt" and seen == count
        if ours and point == "renamed":
            die()
        replace(source, target)
        if ours and point == "done":
            die()

    Path.open = opened  # type: ignore[method-assign,assignment]
    os.replace = replaced


if __name__ == "__main__":
    assert save_checkpoint.__module__ == "kronfac.cli.checkpoint"  # whose writing is what `arm` knows
    arm(sys.argv[1], int(sys.argv[2]))
    sys.argv[1:] = sys.argv[3:]
    run()
