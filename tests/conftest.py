"""What every test shares: two threads, a fixed seed, and a hypothesis profile that never fails for a slow machine."""

from __future__ import annotations

import os
import signal

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "kronfac",
    deadline=None,
    max_examples=int(os.environ.get("KRONFAC_EXAMPLES", "25")),
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
    derandomize=True,
)
hypothesis.settings.load_profile("kronfac")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    # A shell starts its background jobs with Ctrl-C ignored, and the tests of Ctrl-C raise it in this process.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
