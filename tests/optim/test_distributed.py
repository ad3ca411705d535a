"""Two processes over gloo: one optimizer, as if the batches had been one."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from kronfac.optim import KFAC, reading
from tests.optim.models import mlp
from tests.processes import run_ranks

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch was built without torch.distributed")

SIZES = (5, 3)  # uneven on purpose: factors are weighted by examples, not by ranks


class Branching(nn.Module):
    """Ranks may use different layers."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.left, self.right = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))

    def forward(self, x: Tensor, branch: str) -> Tensor:
        return getattr(self, branch)(torch.tanh(self.trunk(x)))  # type: ignore[no-any-return]


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(sum(SIZES), 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (sum(SIZES),), generator=generator)


def share(rank: int) -> slice:
    return slice(0, SIZES[0]) if rank == 0 else slice(SIZES[0], None)


def model_and_optimizer(**options: Any) -> tuple[nn.Module, KFAC]:
    torch.manual_seed(0)
    model = mlp(4, 5, 3, dtype=torch.float64)
    return model, KFAC(model, 0.1, fisher="exact", damping=0.01, inverse_every=2, **options)


def worker(rank: int, folder: Path) -> None:
    results: dict[str, Any] = {}

    model, optimizer = model_and_optimizer()
    wrapped = DistributedDataParallel(model)
    for step in range(4):
        x, y = batch(step)
        optimizer.zero_grad()
        # DDP averages over ranks; the mean over all examples needs each rank's sum times ranks / examples.
        loss = functional.cross_entropy(wrapped(x[share(rank)]), y[share(rank)], reduction="sum") * 2 / sum(SIZES)
        loss.backward()
        optimizer.step()
    results["weights"] = [p.detach() for p in model.parameters()]
    results["factors"] = {name: tuple(pair) for name, pair in optimizer.factors().items()}

    # One rank alone has a value that is not finite, at a plain and at an inverse step: both skip.
    before = [p.detach().clone() for p in model.parameters()]
    for step in (4, 4):
        x, y = batch(step)
        model.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        if rank == 1:
            model[0].weight.grad.fill_(float("nan"))  # type: ignore[index, union-attr]
        optimizer.step()
    unchanged = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    results["skipped"] = (optimizer.skipped_steps, unchanged)

    torch.manual_seed(0)
    branching = Branching()
    other = KFAC(branching, 0.1, fisher="mc", seed=0, kl_clip=None, damping=0.1)
    x, y = batch(7)
    functional.cross_entropy(branching(x, "left" if rank == 0 else "right"), y).backward()
    for p in branching.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        distributed.all_reduce(p.grad)
    other.step()
    results["branching"] = [p.detach() for p in branching.parameters()]
    results["covered"] = set(other.factors())
    results["seed"] = other.state_dict()["kronfac"]["generator"]["seed"]

    results["waiting"] = without_waiting(rank, at_hand=True)
    results["not waiting"] = without_waiting(rank, at_hand=False)

    torch.save(results, folder / f"rank{rank}.pt")


def without_waiting(rank: int, at_hand: bool) -> list[Any]:
    """A run the accelerator's way or the CPU's; one rank has a gradient that is not finite at step 6."""
    torch.manual_seed(0)
    model = mlp(4, 5, 3, dtype=torch.float64)
    exchanged = []
    reduce = distributed.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        exchanged[-1] += 1
        return reduce(tensor, *args, **kwargs)

    with (
        mock.patch.object(reading, "at_hand", return_value=at_hand),
        mock.patch.object(distributed, "all_reduce", counting),
    ):
        optimizer = KFAC(model, 0.1, fisher="exact", damping=0.01, factor_every=2, inverse_every=4)
        for step in range(12):
            x, y = batch(step)
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            if rank == 1 and step == 6:
                model[0].weight.grad.fill_(float("nan"))  # type: ignore[index, union-attr]
            exchanged.append(0)
            optimizer.step()
    counts = optimizer.steps, optimizer.skipped_steps
    return [exchanged, counts, [p.detach() for p in model.parameters()]]


@pytest.mark.filterwarnings("ignore")
def test_two_ranks_are_one_large_batch_and_never_diverge(tmp_path: Path) -> None:
    run_ranks(worker, tmp_path)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2))

    model, optimizer = model_and_optimizer()
    for step in range(4):
        x, y = batch(step)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    for a, b, c in zip(one["weights"], two["weights"], model.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c.detach(), rtol=1e-7, atol=1e-9)
    for name, pair in optimizer.factors().items():
        for ours, theirs in zip(pair, one["factors"][name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)

    assert one["skipped"] == two["skipped"] == (2, True)
    assert one["covered"] == two["covered"] == {"trunk", "left", "right"}
    for a, b in zip(one["branching"], two["branching"], strict=True):
        assert torch.equal(a, b)
    assert (one["seed"], two["seed"]) == (0, 1)

    for way in ("waiting", "not waiting"):
        (exchanged, counts, weights), (others, other_counts, other_weights) = one[way], two[way]
        assert exchanged == others
        assert counts == other_counts == (11, 1)
        assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))
    # A plain step, without statistics, exchanges the verdict and nothing else.
    assert [exchanged[step] for step in (1, 3, 5, 7)] == [1] * 4
