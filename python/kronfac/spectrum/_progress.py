"""Progress on the error stream for who asks with `progress=True`: a bar of tqdm, or plain lines without it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kronfac.spectrum._options import Progress

_SECONDS = 5.0  # between lines


@contextmanager
def shown(progress: Progress | bool | None, caller: str, unit: str = "product") -> Iterator[Progress | None]:
    """What a function calls with the products done and those in all.

    Args:
        progress: a function, which is passed on; True for a bar; False or None for nothing.
        caller: the public function that error messages and the bar name.
        unit: what is counted.

    Yields:
        A function or None. At the end of the block the bar is closed.

    Raises:
        TypeError: anything else.
    """
    if progress is None or progress is False:
        yield None
    elif progress is True:
        with _bar(caller.rpartition(".")[2], unit) as report:
            yield report
    elif callable(progress):
        yield progress
    else:
        raise TypeError(
            f"{caller}: progress: expected a function (products done, products in all or None), True for a progress "
            f"bar, or None, got {progress!r}"
        )


@contextmanager
def _bar(label: str, unit: str) -> Iterator[Progress]:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        lines = _Lines(label, unit)
        try:
            yield lines
        finally:
            lines.close()
        return
    with tqdm(desc=label, unit=unit, file=sys.stderr, mininterval=0.3, dynamic_ncols=True) as bar:

        def report(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


class _Lines:
    """A line every few seconds and one at the end."""

    def __init__(self, label: str, unit: str) -> None:
        self._label = label
        self._unit = unit
        self._start = self._shown = time.monotonic()
        self._latest: tuple[int, int | None] | None = None

    def __call__(self, done: int, total: int | None) -> None:
        self._latest = (done, total)
        if time.monotonic() - self._shown >= _SECONDS:
            self._write()

    def close(self) -> None:
        """Write the last state, unless that was just done."""
        if self._latest is not None:
            self._write()

    def _write(self) -> None:
        assert self._latest is not None
        done, total = self._latest
        self._shown, self._latest = time.monotonic(), None
        count = f"{done} {self._unit}s" if total is None else f"{done} of {total} {self._unit}s"
        print(f"{self._label}: {count}, {self._shown - self._start:.0f} s", file=sys.stderr, flush=True)
