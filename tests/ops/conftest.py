"""Kernels are chosen when they load: these tests run once per instruction set (`KRONFAC_ISA=avx2 pytest tests/ops`)."""

from __future__ import annotations

import os

import pytest

from kronfac import _host


def pytest_report_header() -> str:
    """Name the kernels under test."""
    return f"kronfac kernels: {_host.instruction_set()} (of {', '.join(_host.instruction_sets())})"


@pytest.fixture(autouse=True, scope="session")
def _asked_for_kernels() -> None:
    wanted = os.environ.get("KRONFAC_ISA")
    assert not wanted or _host.instruction_set() == wanted
