"""What steers ABS and ABSA: eigenvalues of all sorts, the adversarial share, attacks that leave no trace."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kronfac
from kronfac.schedules import AdaptiveBatch, FixedBatch
from kronfac.spectrum import eigsh
from tests.optim.models import equal
from tests.schedules.runs import adaptive, column, digits, sgd, walk


def pair(value: float, residual: float, converged: bool | None = None) -> SimpleNamespace:
    result = SimpleNamespace(values=torch.tensor([value]), residuals=torch.tensor([residual]), products=7)
    if converged is not None:
        result.converged = torch.tensor([converged])
    return result


BAD: dict[str, tuple[Any, str]] = {
    "nan": (float("nan"), "eigenvalue not finite"),
    "minus infinity": (-float("inf"), "eigenvalue not finite"),
    "negative": (-3.0, "eigenvalue not positive"),
    "limit": (pair(0.5, 0.001, False), "eigenvalue not converged"),
    "rough": (pair(0.5, 0.1), "eigenvalue not converged"),
    "residual": (pair(0.5, float("nan"), True), "eigenvalue not converged"),
    "none": (SimpleNamespace(values=[], residuals=[], converged=[]), "eigenvalue not converged"),
}


@pytest.mark.parametrize("kind", list(BAD))
def test_a_bad_eigenvalue_is_recorded_and_decides_nothing(kind: str) -> None:
    bad, reason = BAD[kind]
    schedule = adaptive(sgd(), [bad, 4.0, bad, 3.0])
    walk(schedule)
    assert column(schedule, "batch_size") == [4] * 5
    assert column(schedule, "reference") == [None, 4.0, 4.0, 4.0, 4.0]
    assert column(schedule, "reason") == [reason, "reference", reason, "unchanged", "end"]
    found = schedule.log[0]["eigenvalue"]
    assert found is None or found == pytest.approx(float(bad if isinstance(bad, float) else bad.values[0]))


def test_growth_by_duration_at_a_bad_eigenvalue_leaves_the_reference_open() -> None:
    # 8 is no reference for what comes after: the 4 is the new one, though it is half of 8
    schedule = adaptive(sgd(), [8.0, 8.0, float("nan"), 4.0, 2.0], duration=3)
    walk(schedule)
    assert column(schedule, "reference") == [8.0, 8.0, None, 4.0, 2.0, 2.0]
    assert column(schedule, "batch_size") == [4, 4, 4, 8, 8, 16]
    assert column(schedule, "reason") == [
        "reference", "unchanged", "eigenvalue not finite, duration", "reference", "eigenvalue", "end"
    ]  # fmt: skip


def test_results_of_several_kinds_are_read() -> None:
    values = [
        eigsh(torch.diag(torch.tensor([8.0, 1.0, 0.5])), 1, "largest"),
        pair(7.0, 0.01),
        torch.tensor(6.0),
        pair(5.0, 0.01, True),
    ]
    schedule = adaptive(sgd(), values)
    walk(schedule)
    assert column(schedule, "eigenvalue") == pytest.approx([8.0, 7.0, 6.0, 5.0, None])
    assert column(schedule, "converged") == [True, True, None, True, None]
    assert column(schedule, "products")[1:] == [7, None, 7, None]
    assert column(schedule, "reference")[-1] == pytest.approx(8.0)


@pytest.mark.parametrize("value", ["8", None, True, [8.0], {"values": 1}])
def test_what_is_no_eigenvalue_is_refused(value: Any) -> None:
    schedule = adaptive(sgd(), [value])
    for _ in schedule.steps():
        pass
    with pytest.raises(TypeError, match="AdaptiveBatch: eigenvalue: expected it to return a number"):
        schedule.end_epoch()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_computation_that_fails_changes_nothing(error: type[BaseException]) -> None:
    def failing() -> float:
        if not failed:
            failed.append(1)
            raise error
        return 8.0

    failed: list[int] = []
    schedule = AdaptiveBatch(sgd(), examples=8, batch_size=2, max_batch_size=8, epochs=2, eigenvalue=failing)
    for _ in schedule.steps():
        pass
    before = schedule.state_dict()
    with pytest.raises(error):
        schedule.end_epoch()
    assert schedule.state_dict() == before
    assert schedule.end_epoch()["reason"] == "reference"


def test_an_interrupted_result_interrupts() -> None:
    schedule = adaptive(sgd(), [SimpleNamespace(values=[1.0], residuals=[0.0], ended="interrupted")])
    for _ in schedule.steps():
        pass
    with pytest.raises(KeyboardInterrupt):
        schedule.end_epoch()


def unchanged(model: nn.Module, loss_fn: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
    return x


def test_adversarial_share() -> None:
    schedule = adaptive(
        sgd(), [8.0, 4.0, 2.0], examples=400, batch_size=20, max_batch_size=80, adversarial=unchanged, epochs=8
    )
    counts = []
    while not schedule.finished:
        counts.append([part.adversarial for part in next(schedule.steps()).parts])
        for _ in schedule.steps():
            pass
        schedule.end_epoch()
    # ω: 0.2, 0.2, 0.1 after growing to 40, 0 at the largest batch
    assert counts == [[4], [4], [2, 2], [0] * 4, [0] * 4, [0] * 4, [0] * 4, [0] * 4]
    assert column(schedule, "omega") == [0.2, 0.2, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert column(schedule, "next_omega")[:3] == [0.2, 0.1, 0.0]


@pytest.mark.parametrize(("epochs", "perturbed"), [(6, 3), (5, 3), (1, 1)])
def test_no_adversarial_examples_from_half_of_the_epochs_on(epochs: int, perturbed: int) -> None:
    schedule = adaptive(sgd(), [8.0] * epochs, adversarial=unchanged, adversarial_share=0.5, epochs=epochs)
    walk(schedule)
    assert column(schedule, "omega") == [0.5] * perturbed + [0.0] * (epochs - perturbed)
    assert column(schedule, "reason").count("half of the epochs") == (epochs > 1)


def test_a_share_of_one_example_or_less_perturbs_none() -> None:
    # ω > 1/b is strict: 0.2 of 5 is one example, and is none; the short last part of 3 has none either
    schedule = adaptive(sgd(), [], examples=29, batch_size=11, small_batch=6, max_batch_size=20, adversarial=unchanged)
    found = [[(len(part.indices), part.adversarial) for part in step.parts] for step in schedule.steps()]
    assert found == [[(6, 1), (5, 0)], [(6, 1), (5, 0)], [(6, 1), (1, 0)]]


def normed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))


def careless(model: nn.Module, loss_fn: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
    """FGSM as it is often written: backward() into everything."""
    assert not model.training
    x.requires_grad_()
    loss_fn(model(x), y).backward()
    assert x.grad is not None
    return x + 0.1 * x.grad.sign()


@pytest.mark.parametrize("kind", ["sgd", "kfac"])
def test_an_attack_leaves_no_trace(kind: str) -> None:
    model, (x, y) = normed(), digits(40)
    model[0].eval()  # a mode of its own, which must come back
    optimizer: Any = kronfac.KFAC(model, lr=0.1) if kind == "kfac" else torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = adaptive(optimizer, [], examples=40, batch_size=20, small_batch=10, adversarial=careless)
    part = next(iter(next(schedule.steps()).parts))
    functional.cross_entropy(model(x), y).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    values = [gradient.clone() for gradient in gradients]
    buffers = [buffer.clone() for buffer in model.buffers()]
    clean = x[part.indices]
    found = schedule.adversarial(model, functional.cross_entropy, clean, y[part.indices], part)
    assert part.adversarial == 2
    assert torch.equal(found[2:], clean[2:])
    assert torch.equal(clean, x[part.indices])
    assert not found.requires_grad
    difference = (found[:2] - clean[:2]).abs()
    assert bool((((difference - 0.1).abs() < 1e-6) | (difference == 0)).all())
    assert difference.max() > 0.05
    assert all(parameter.grad is one for parameter, one in zip(model.parameters(), gradients, strict=True))
    assert equal(gradients, values)
    assert equal(list(model.buffers()), buffers)
    assert [module.training for module in model.modules()] == [True, False, True, True, True]
    optimizer.step()


def test_inputs_come_back_as_they_are_without_perturbed_examples() -> None:
    schedule = FixedBatch(sgd(), examples=10, batch_size=10, epochs=1)
    part = next(iter(next(schedule.steps()).parts))
    x = torch.randn(10, 3)
    assert schedule.adversarial(nn.Linear(3, 2), functional.mse_loss, x, x, part) is x


ATTACKS: dict[str, tuple[Any, type[Exception], str]] = {
    "nothing": (lambda *_: None, TypeError, "to return a tensor, got NoneType"),
    "shape": (lambda model, loss_fn, x, y: x[:1], ValueError, r"tensor of shape \(2, 3\)"),
    "type": (lambda model, loss_fn, x, y: x.double(), ValueError, "expected the attack to return a torch.float32"),
}


@pytest.mark.parametrize("kind", list(ATTACKS))
def test_what_an_attack_returns_is_checked(kind: str) -> None:
    attack, error, message = ATTACKS[kind]
    schedule = adaptive(sgd(), [], examples=20, batch_size=10, max_batch_size=20, adversarial=attack)
    part = next(iter(next(schedule.steps()).parts))
    x, y = torch.randn(10, 3), torch.zeros(10)
    with pytest.raises(error, match=message):
        schedule.adversarial(nn.Linear(3, 2), functional.mse_loss, x, y, part)
    with pytest.raises(ValueError, match="x: expected 2 examples or more"):
        schedule.adversarial(nn.Linear(3, 2), functional.mse_loss, x[:1], y, part)
    with pytest.raises(TypeError, match="y: expected a tensor"):
        schedule.adversarial(nn.Linear(3, 2), functional.mse_loss, x, [0] * 10, part)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="this one has none"):
        adaptive(sgd(), []).adversarial(nn.Linear(3, 2), functional.mse_loss, x, y, part)
