"""Options of the suites, and the measured peak that all of them divide by."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from kronfac import _host
from kronfac.cli.bench.peak import Peak, measure_peak


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--threads` and `--quick`."""
    parser.addoption("--threads", default="1,2", help="numbers of threads, separated by commas")
    parser.addoption("--quick", action="store_true", help="only small cases: checks the harness")


@pytest.fixture(scope="session")
def peak_of() -> Callable[[int], Peak]:
    """The peak of the instruction set in use, by number of threads; measured once."""
    return cache(lambda threads: measure_peak(_host.instruction_set(), threads))
