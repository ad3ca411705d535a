"""Ctrl-C as a flag: what the first does, what the second does, and what is there afterwards."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import pytest

from kronfac.spectrum._interrupt import interruptible


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    """Python's own handler within each test, whatever started the tests, and the one found after it."""
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, found)


def test_the_first_signal_sets_the_flag_and_the_second_raises() -> None:
    with interruptible() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        assert stop.stops(1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_from_outside_arrives() -> None:
    with interruptible() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested


@pytest.mark.parametrize("signals", [0, 1])
def test_the_handler_found_is_there_afterwards(signals: int) -> None:
    with interruptible():
        for _ in range(signals):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_the_handler_found_is_there_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), interruptible():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_with_nothing_done_it_raises() -> None:
    with interruptible() as stop:
        assert not stop.stops(0)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            stop.stops(0)


def test_each_block_starts_afresh() -> None:
    with interruptible() as stop:
        signal.raise_signal(signal.SIGINT)
    with interruptible() as later:
        assert stop.requested
        assert not later.requested


def test_blocks_within_each_other_share_the_flag() -> None:
    with interruptible() as outer:
        with interruptible() as inner:
            signal.raise_signal(signal.SIGINT)
        assert outer.requested
        assert inner.requested
        with interruptible() as again:
            assert again.requested
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_callers_goes_on_doing_its_own() -> None:
    seen: list[int] = []

    def own(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    signal.signal(signal.SIGINT, own)
    with interruptible() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert not stop.requested
    assert seen == [signal.SIGINT] * 2
    assert signal.getsignal(signal.SIGINT) is own


def test_a_handler_set_within_the_block_is_kept() -> None:
    with interruptible():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_where_it_is_ignored_it_stays_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruptible() as stop:
        signal.raise_signal(signal.SIGINT)
        assert not stop.requested
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_another_thread_is_never_asked() -> None:
    asked: list[bool] = []

    def work() -> None:
        with interruptible() as own:
            asked.append(own.requested)
            entered.set()
            assert signalled.wait(10)
            asked.append(own.requested)

    entered, signalled = threading.Event(), threading.Event()
    worker = threading.Thread(target=work)
    with interruptible() as stop:
        worker.start()
        assert entered.wait(10)
        signal.raise_signal(signal.SIGINT)
        signalled.set()
        worker.join()
        assert stop.requested
    assert asked == [False, False]
