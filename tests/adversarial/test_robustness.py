"""Robust accuracy where it is known, and that neither it nor an attack changes anything."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import kronfac
from kronfac.adversarial import Accuracy, fgsm, l2, pgd, robust_accuracy
from tests.spectrum.test_untouched import Subject, make_subject, untouched

ATTACKS = {"fgsm": partial(fgsm, eps=0.3), "l2": partial(l2, eps=0.6), "pgd": partial(pgd, eps=0.3, steps=20)}


def linear() -> tuple[nn.Linear, Tensor, Tensor]:
    """Two classes, told apart by w·x + b, and 200 examples on both sides of the line."""
    torch.manual_seed(4)
    model = nn.Linear(6, 2).double()
    x = torch.randn(200, 6, dtype=torch.float64)
    y = (model(x).argmax(dim=1) + (torch.rand(200) < 0.1).long()) % 2
    return model, x, y


def test_linear_model_is_right_where_its_margin_is_wider_than_the_ball() -> None:
    model, x, y = linear()
    weight = (model.weight[1] - model.weight[0]).detach()
    margin = (2 * y - 1) * (model(x) @ torch.tensor([-1.0, 1.0], dtype=torch.float64)).detach()
    result = robust_accuracy(model, F.cross_entropy, (x, y), ATTACKS, bounds=None)
    assert result.clean.correct == int((margin > 0).sum())
    assert 0 < result.worst.correct < result.clean.correct < 200
    expected = {"fgsm": 0.3 * weight.abs().sum(), "l2": 0.6 * weight.norm(), "pgd": 0.3 * weight.abs().sum()}
    for name, loss in expected.items():
        assert result.attacked[name].correct == int((margin > loss).sum()), name
        assert result.attacked[name].examples == 200
    assert result.worst.correct == min(found.correct for found in result.attacked.values())
    p = result.clean.correct / 200
    assert result.clean.value == p
    assert result.clean.stderr == pytest.approx(math.sqrt(p * (1 - p) / 200))


def test_worst_counts_an_example_once() -> None:
    """Two attacks, each of which spoils another example: neither alone is the worst case."""
    x, y = torch.tensor([[1.0, 0.0]]).repeat(4, 1), torch.zeros(4, dtype=torch.int64)

    def spoil(number: int, model: Any, loss_fn: Any, inputs: Tensor, targets: Tensor, bounds: Any) -> Tensor:
        moved = inputs.clone()
        moved[number] = moved[number].flip(0)
        return moved

    attacks = {str(number): partial(spoil, number) for number in (0, 2)}
    result = robust_accuracy(nn.Identity(), F.cross_entropy, (x, y), attacks)
    assert [result.attacked[name] for name in ("0", "2")] == [Accuracy(3, 4, unchanged=3)] * 2
    assert result.worst == Accuracy(2, 4)
    assert result.worst.value == 0.5
    assert result.worst.stderr == 0.25


def test_forms_of_data_agree() -> None:
    model, x, y = linear()
    attacks = {name: ATTACKS[name] for name in ("fgsm", "l2")}
    forms = [(x, y), [(x[:150], y[:150]), (x[150:], y[150:])], DataLoader(TensorDataset(x, y), batch_size=64)]
    results = [robust_accuracy(model, F.cross_entropy, form, attacks) for form in forms]
    assert results[0] == results[1] == results[2]
    # The range is that of all the data, not that of a batch: a batch alone would have been clipped more.
    assert results[0] == robust_accuracy(model, F.cross_entropy, forms[1], attacks, bounds=(x.min(), x.max()))


def test_judge_of_ones_own_and_outputs_that_are_not_finite() -> None:
    x, y = torch.randn(8, 1), torch.ones(8)
    model = nn.Flatten(0)
    result = robust_accuracy(
        model,
        F.binary_cross_entropy_with_logits,
        (x, y),
        {"fgsm": partial(fgsm, eps=0.5)},
        bounds=None,
        judge=lambda output, targets: (output > 0) == (targets > 0.5),
    )
    assert result.clean.correct == int((x > 0).sum())
    assert result.attacked["fgsm"].correct == int((x > 0.5).sum())
    broken = nn.Linear(1, 2)
    with torch.no_grad():
        broken.bias.fill_(math.nan)
    assert robust_accuracy(broken, F.cross_entropy, (x, torch.zeros(8).long()), {}).clean == Accuracy(0, 8)


def test_vanishing_gradients_are_reported() -> None:
    x, y = torch.tensor([[3.0, 0.0], [200.0, 0.0]]), torch.zeros(2, dtype=torch.int64)
    result = robust_accuracy(nn.Identity(), F.cross_entropy, (x, y), {"fgsm": partial(fgsm, eps=2.0)}, bounds=None)
    assert result.attacked["fgsm"] == Accuracy(1, 2, unchanged=1)


USES = {
    **{
        name: lambda s, attack=attack: attack(s.model, F.cross_entropy, *s.batch)  # type: ignore[misc]
        for name, attack in {**ATTACKS, "pgd l2": partial(pgd, eps=0.3, norm="l2")}.items()
    },
    "batch": lambda s: robust_accuracy(s.model, F.cross_entropy, s.batch, ATTACKS),
    "loader": lambda s: robust_accuracy(s.model, F.cross_entropy, s.loader, ATTACKS),
}


@pytest.mark.parametrize("use", USES)
def test_nothing_changes(use: str) -> None:
    subject: Subject = make_subject()
    with untouched(subject):
        USES[use](subject)
    with untouched(subject), torch.no_grad():
        USES[use](subject)
    with untouched(subject), torch.inference_mode():
        USES[use](subject)


def test_kfac_records_nothing() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = kronfac.KFAC(model, lr=0.1, seed=0)
    x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))

    def train(attacked: bool) -> list[Tensor]:
        state = [p.detach().clone() for p in model.parameters()], optimizer.state_dict()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if attacked:
            pgd(model, F.cross_entropy, x[:5], y[:5], eps=0.1)
            robust_accuracy(model, F.cross_entropy, (x[:3], y[:3]), ATTACKS)
        loss.backward()
        optimizer.step()
        after = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            for parameter, before in zip(model.parameters(), state[0], strict=True):
                parameter.copy_(before)
        optimizer.load_state_dict(state[1])
        return after

    train(False)
    plain, attacked = train(False), train(True)
    assert all(torch.equal(one, other) for one, other in zip(plain, attacked, strict=True))


@pytest.mark.parametrize("kind", ["recurrent", "transformer", "compiled", "half", "stochastic"])
def test_models_that_are_awkward_in_eval_mode(kind: str) -> None:
    torch.manual_seed(5)
    x, y = torch.randn(4, 3, 8), torch.randint(0, 3, (4,))

    class Head(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body, self.last = body, nn.Linear(8, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            found = self.body(inputs)
            found = found[0] if isinstance(found, tuple) else found
            if kind == "stochastic":
                found = F.dropout(found, 0.3, training=True)
            out: Tensor = self.last(found.mean(dim=1))
            return out

    body: nn.Module = nn.Linear(8, 8)
    if kind == "recurrent":
        body = nn.LSTM(8, 8, batch_first=True)
    elif kind == "transformer":
        body = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    model: Any = Head(body)
    if kind == "half":
        model, x = model.bfloat16(), x.bfloat16()
    called: Any = torch.compile(model, backend="eager") if kind == "compiled" else model
    before = torch.get_rng_state()
    moved = fgsm(called, F.cross_entropy, x, y, eps=0.01)
    assert torch.equal(torch.get_rng_state(), before)
    assert (moved != x).float().mean() > 0.9
    assert all(parameter.grad is None for parameter in model.parameters())
    if kind != "stochastic":
        model.eval()
        assert F.cross_entropy(model(moved).float(), y) > F.cross_entropy(model(x).float(), y)
