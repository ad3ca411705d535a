"""K-FAC under a schedule: its statistics and steps are those of the step's examples, however they are cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import kronfac
from kronfac.schedules import AdaptiveBatch, FixedBatch, top_eigenvalue
from tests.optim.models import mlp
from tests.schedules.runs import adaptive, digits

X, Y = (tensor.double() if tensor.is_floating_point() else tensor for tensor in digits(44))


def trained(small_batch: int | None, **options: Any) -> tuple[nn.Module, kronfac.KFAC]:
    torch.manual_seed(2)
    model = mlp(64, 6, 10, dtype=torch.float64)
    optimizer = kronfac.KFAC(model, lr=0.05, damping=0.1, kl_clip=None, inverse_every=1, **options)
    schedule = FixedBatch(optimizer, examples=44, batch_size=16, small_batch=small_batch, epochs=2)
    while not schedule.finished:
        for step in schedule.steps():
            optimizer.zero_grad()
            for part in step.parts:
                loss = functional.cross_entropy(model(X[part.indices]), Y[part.indices])
                (part.weight * loss).backward()
            optimizer.step()
        schedule.end_epoch()
    return model, optimizer


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_accumulated_parts_are_one_step(fisher: str) -> None:
    # 44 examples in steps of 16, 16 and 12, cut into parts of 5: 5 5 5 1, 5 5 5 1, 5 5 2
    whole, first = trained(None, fisher=fisher)
    parts, second = trained(5, fisher=fisher)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    for name, factors in first.factors().items():
        torch.testing.assert_close(factors.A, second.factors()[name].A, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(factors.G, second.factors()[name].G, rtol=1e-9, atol=1e-11)
    assert first.diagnostics()["step"] == second.diagnostics()["step"] == 6


def test_factors_of_a_step_are_those_of_its_examples() -> None:
    torch.manual_seed(2)
    model = mlp(64, 6, 10, dtype=torch.float64)
    optimizer = kronfac.KFAC(model, lr=0.0, fisher="exact")
    schedule = FixedBatch(optimizer, examples=44, batch_size=16, small_batch=5, epochs=1)
    step = next(schedule.steps())
    chosen = torch.cat([part.indices for part in step.parts])
    for part in step.parts:
        (part.weight * functional.cross_entropy(model(X[part.indices]), Y[part.indices])).backward()
    optimizer.step()
    expected = kronfac.curvature.factors(model, (X[chosen], Y[chosen]), likelihood="categorical", fisher="exact")
    for name, factors in optimizer.factors().items():
        torch.testing.assert_close(factors.A, expected[name].A, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(factors.G, expected[name].G, rtol=1e-10, atol=1e-12)


def test_neither_the_attack_nor_the_eigenvalue_enters_the_statistics() -> None:
    torch.manual_seed(2)
    model = mlp(64, 6, 10, dtype=torch.float64)
    optimizer = kronfac.KFAC(model, lr=0.0, fisher="exact")

    def attack(model: nn.Module, loss_fn: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            loss_fn(model(10 * x.requires_grad_()), y).backward()
        return x.detach()  # as it was

    eigenvalue = top_eigenvalue(model, functional.cross_entropy, (X, Y), examples=20)
    schedule = AdaptiveBatch(
        optimizer,
        examples=44,
        batch_size=22,
        max_batch_size=44,
        epochs=2,
        eigenvalue=eigenvalue,
        adversarial=attack,
        adversarial_share=0.5,
    )
    for step in schedule.steps():
        optimizer.zero_grad()
        for part in step.parts:
            assert part.adversarial == 11
            x, y = X[part.indices], Y[part.indices]
            x = schedule.adversarial(model, functional.cross_entropy, x, y, part)
            eigenvalue()
            (part.weight * functional.cross_entropy(model(x), y)).backward()
        optimizer.step()
        expected = kronfac.curvature.factors(model, (x, y), likelihood="categorical", fisher="exact")
        if step.number == 0:  # the first statistics are the running average
            for name, factors in optimizer.factors().items():
                torch.testing.assert_close(factors.A, expected[name].A, rtol=1e-10, atol=1e-12)
                torch.testing.assert_close(factors.G, expected[name].G, rtol=1e-10, atol=1e-12)


def test_the_rates_of_groups_grow_with_the_batch() -> None:
    model = mlp(64, 6, 10)
    groups = [{"params": list(model[0].parameters()), "lr": 0.2}, {"params": list(model[2].parameters())}]
    optimizer = kronfac.KFAC(model, lr=0.1, params=groups)
    schedule = adaptive(optimizer, [4.0, 2.0, 1.0])
    seen = []
    while not schedule.finished:
        seen.append([group["lr"] for group in optimizer.param_groups])
        for _ in schedule.steps():
            pass
        schedule.end_epoch()
    assert seen == [[0.2, 0.1], [0.2, 0.1], [0.4, 0.2], [0.8, 0.4]]


def test_optimizers_that_choose_their_rate_are_refused() -> None:
    model = mlp(64, 6, 10)
    with pytest.raises(ValueError, match="KFAC has none, or chooses it"):
        FixedBatch(kronfac.KFAC(model, adaptive=True), examples=10, batch_size=2, epochs=1)
