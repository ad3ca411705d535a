"""Kernels are chosen when they load: these tests run once per instruction set (`KRONFAC_ISA=avx2 pytest tests/ops`).

On a GPU they run with `KRONFAC_DEVICE=cuda`.
"""

from __future__ import annotations

import os

import pytest

from kronfac import _host
from tests.ops.device import DEVICE, skip_what_is_about_the_cpu, use_device

use_device()


def pytest_report_header() -> str:
    """Name the kernels under test."""
    if DEVICE.type != "cpu":
        return f"kronfac kernels: {DEVICE}"
    return f"kronfac kernels: {_host.instruction_set()} (of {', '.join(_host.instruction_sets())})"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what another device does not have."""
    skip_what_is_about_the_cpu(items)


@pytest.fixture(autouse=True, scope="session")
def _asked_for_kernels() -> None:
    wanted = os.environ.get("KRONFAC_ISA")
    assert not wanted or _host.instruction_set() == wanted
