"""Parameters that model.to has taken to another type while inverses are pending and averages are kept."""

from __future__ import annotations

import torch

from kronfac.optim import KFAC
from tests.optim.models import convnet, images, train_step


def test_what_is_kept_goes_along() -> None:
    torch.manual_seed(0)
    model = convnet()
    optimizer = KFAC(model, 0.05, inverse_every=2, max_staleness=3, averaging=0.9, seed=0)
    for _ in range(4):
        train_step(model, optimizer, *images(6))
    assert optimizer.state_dict()["kronfac"]["pending"]
    model.double()
    for _ in range(4):
        x, y = images(6)
        train_step(model, optimizer, x.double(), y)
    assert optimizer.skipped_steps == optimizer.inverse_failures == 0
    assert all(pair.A.dtype == pair.G.dtype == torch.float64 for pair in optimizer.factors().values())
    state = optimizer.state_dict()
    own = state["kronfac"]
    kept = [layer["factorisation"] for layer in own["layers"].values()]
    kept += [value for request in own["pending"] for value in request["layers"].values()]
    assert {tensor.dtype for value in kept for tensor in value.values()} == {torch.float64}
    assert {entry["value"].dtype for entry in own["averages"].values()} == {torch.float64}
    optimizer.load_state_dict(state)  # fits the parameters as they are now
