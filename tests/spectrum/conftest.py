from __future__ import annotations

import pytest

from tests.spectrum.trained import NAMES, Trained


@pytest.fixture(scope="session", params=NAMES)
def network(request: pytest.FixtureRequest) -> Trained:
    return Trained(request.param)
