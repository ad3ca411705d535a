"""The adaptive mode over two processes: the same step on both ranks, and that of the whole batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from kronfac.optim import KFAC
from tests.optim.models import mlp
from tests.optim.test_distributed import SIZES, batch, share
from tests.processes import run_ranks

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without torch.distributed")

STEPS = 22


def make() -> tuple[nn.Module, KFAC]:
    torch.manual_seed(0)
    model = mlp(4, 5, 3, dtype=torch.float64)
    return model, KFAC(model, adaptive=True, fisher="exact", weight_decay=0.01, damping=0.1)


def closure_of(model: nn.Module, optimizer: KFAC, x: Tensor, y: Tensor, own: bool) -> Callable[[], float]:
    def closure() -> float:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y, reduction="sum")
        # DDP averages gradients over ranks; what the closure returns is the mean over this rank's own terms.
        (loss * 2 / sum(SIZES) if own else loss / len(x)).backward()
        return loss.item() / len(x)

    return closure


def worker(rank: int, folder: Path) -> None:
    model, optimizer = make()
    wrapped = DistributedDataParallel(model)
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.step(closure_of(wrapped, optimizer, x[share(rank)], y[share(rank)], own=True))
    assert optimizer.adaptation is not None
    before = [p.detach().clone() for p in model.parameters()]
    x, y = batch(STEPS)
    if rank == 1:
        x = x * float("nan")
    optimizer.step(closure_of(model, optimizer, x, y, own=False))
    results = {
        "weights": before,
        "unchanged": all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)),
        "adaptation": dataclasses.asdict(optimizer.adaptation),
    }
    torch.save(results, folder / f"rank{rank}.pt")


@pytest.mark.filterwarnings("ignore")
def test_two_ranks_take_the_step_of_the_whole_batch(tmp_path: Path) -> None:
    run_ranks(worker, tmp_path)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2))
    assert one["adaptation"] == two["adaptation"]
    assert one["unchanged"]
    assert two["unchanged"]

    model, optimizer = make()
    for step in range(STEPS):
        optimizer.step(closure_of(model, optimizer, *batch(step), own=False))
    assert optimizer.adaptation is not None
    for a, b, c in zip(one["weights"], two["weights"], model.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c.detach(), rtol=1e-6, atol=1e-8)
    raised = optimizer.adaptation.damping / (19 / 20) ** 5  # by the step that rank 1 could not take
    assert one["adaptation"]["damping"] == pytest.approx(raised)
    assert one["adaptation"]["gamma"] == optimizer.adaptation.gamma
    assert one["adaptation"]["rho"] == pytest.approx(optimizer.adaptation.rho, rel=1e-5)
