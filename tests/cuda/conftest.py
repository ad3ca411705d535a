"""Every emulation that a test calls runs in every order of threads."""

from __future__ import annotations

import sys
from types import FunctionType

import pytest

from tests.cuda.orders import in_every_order

EMULATIONS = "tests.cuda.emulat"
"""How the modules begin whose functions run kernels; those of a test module count where they ask for a library."""


def emulates(function: FunctionType, name: str) -> bool:
    """Whether a function is called for what a kernel makes of its tensors."""
    if name.startswith(("_", "test_")):
        return False
    return function.__module__.startswith(EMULATIONS) or "library" in function.__code__.co_names


@pytest.fixture(autouse=True)
def _every_order_of_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(EMULATIONS)]
    for module in (*modules, request.module):
        for name, value in list(vars(module).items()):
            if isinstance(value, FunctionType) and emulates(value, name):
                monkeypatch.setattr(module, name, in_every_order(value))
