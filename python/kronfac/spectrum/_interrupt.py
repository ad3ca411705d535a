"""Ctrl-C during long work: the first ends it with what has been computed so far, the second raises at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Whether the user has asked to stop; the loop polls it between products.

    Attributes:
        requested: a KeyboardInterrupt has arrived.
    """

    def __init__(self) -> None:
        self.requested = False

    def stops(self, done: int) -> bool:
        """Whether to leave the loop, with this much done.

        Raises:
            KeyboardInterrupt: it was requested and nothing has been done that could be returned.
        """
        if self.requested and done <= 0:
            raise KeyboardInterrupt
        return self.requested


_active: Interrupt | None = None


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Turn the first KeyboardInterrupt within the block into a flag.

    The handler of SIGINT that is found is called as before; where it raises KeyboardInterrupt, as Python's own does,
    this is caught, the flag is set and the handler found is put back, so that the next one raises. A handler that does
    something else goes on doing it. In threads other than the main one, which no signal reaches, and where SIGINT is
    ignored or not Python's to handle, nothing is ever requested. A block within another one shares its flag; the outer
    one polls before it calls on.

    Yields:
        The flag.
    """
    global _active
    if threading.current_thread() is not threading.main_thread():
        yield Interrupt()
        return
    if _active is not None:
        yield _active
        return
    found = signal.getsignal(signal.SIGINT)
    stop = Interrupt()
    if not callable(found):  # SIG_IGN, SIG_DFL, or a handler that C code installed
        yield stop
        return
    handler = _handler(stop, found)
    try:
        _active = stop
        signal.signal(signal.SIGINT, handler)
        yield stop
    finally:
        _active = None
        if signal.getsignal(signal.SIGINT) is handler:
            signal.signal(signal.SIGINT, found)


_Handler = Callable[[int, FrameType | None], object]


def _handler(stop: Interrupt, found: _Handler) -> _Handler:
    # Workers of a DataLoader that are forked within the block inherit it: the first Ctrl-C, which a terminal sends to
    # them too, then leaves them alive to serve the product that is under way.
    def handle(number: int, frame: FrameType | None) -> None:
        try:
            found(number, frame)
        except KeyboardInterrupt:
            stop.requested = True
            signal.signal(signal.SIGINT, found)

    return handle
