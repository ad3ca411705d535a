"""Every emulation that a test calls runs in every order of threads."""

from __future__ import annotations

import sys
from types import FunctionType

import pytest

from tests.cuda.orders import in_every_order

EMULATIONS = "tests.cuda.emulation"


@pytest.fixture(autouse=True)
def _every_order_of_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(EMULATIONS)]
    for module in (*modules, request.module):
        for name, value in list(vars(module).items()):
            if isinstance(value, FunctionType) and value.__module__.startswith(EMULATIONS) and name[0] != "_":
                monkeypatch.setattr(module, name, in_every_order(value))
