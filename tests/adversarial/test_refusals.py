"""What the attacks refuse, and what they say."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kronfac.adversarial import fgsm, l2, pgd, robust_accuracy
from tests.operators.state import unchanged

MODEL = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
X, Y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])


def constant(output: Tensor, target: Tensor) -> Tensor:
    return torch.ones(())


def rounded(output: Tensor, target: Tensor) -> Tensor:
    return output.detach().sum()


def infinite(output: Tensor, target: Tensor) -> Tensor:
    return output.sum() / 0.0


def rooted(output: Tensor, target: Tensor) -> Tensor:
    return (0.0 * output).sqrt().sum()


CASES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"inputs": [X]}, TypeError, "inputs: expected a tensor"),
    ({"inputs": X.long()}, TypeError, "floating-point tensor, got torch.int64"),
    ({"inputs": torch.tensor(1.0)}, ValueError, "got a scalar"),
    ({"inputs": X * float("nan")}, ValueError, "expected finite numbers"),
    ({"targets": Y[:3]}, ValueError, "expected those of 5 examples, got 3"),
    ({"model": lambda x: x}, TypeError, "expected a torch.nn.Module"),
    ({"loss_fn": None}, TypeError, "loss_fn: expected a callable"),
    (
        {"loss_fn": partial(F.cross_entropy, reduction="none")},
        ValueError,
        r"expected a scalar tensor, got shape \(5,\)",
    ),
    ({"loss_fn": constant}, ValueError, "does not depend on the inputs"),
    ({"loss_fn": rounded}, ValueError, "does not depend on the inputs"),
    ({"loss_fn": infinite}, ValueError, "the loss is -?(inf|nan): model and data are finite"),
    ({"loss_fn": rooted}, ValueError, "holds NaN or infinity though the loss is"),
    ({"eps": -0.1}, ValueError, "eps: expected a finite number >= 0, got -0.1"),
    ({"eps": float("inf")}, ValueError, "eps: expected a finite number"),
    ({"eps": "0.1"}, TypeError, "eps: expected a number, got str"),
    ({"bounds": "image"}, ValueError, 'bounds: expected "data"'),
    ({"bounds": (0.0,)}, TypeError, 'bounds: expected "data"'),
    ({"bounds": (-100.0, "1")}, TypeError, "expected a number or a tensor as high, got str"),
    ({"bounds": (1.0, -1.0)}, ValueError, "low is above high: 1 and -1"),
    ({"bounds": (0.0, 1.0)}, ValueError, "beyond the bounds 0 and 1"),
    ({"bounds": (float("nan"), 1.0)}, ValueError, "low holds NaN"),
    ({"bounds": (torch.zeros(3), 1.0)}, ValueError, r"shape \(3,\) does not broadcast"),
    ({"bounds": (torch.zeros(2, 5, 4), 1.0)}, ValueError, "does not broadcast"),
    ({"reduction": "none"}, ValueError, 'reduction: expected "mean" or "sum"'),
]
ONLY_PGD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"norm": "l1"}, ValueError, 'norm: expected "linf" or "l2"'),
    ({"steps": 0}, ValueError, "steps: expected at least 1"),
    ({"steps": 2.0}, TypeError, "steps: expected an integer"),
    ({"step_size": 0.0}, ValueError, "step_size: expected a number > 0"),
    ({"seed": "a"}, TypeError, "seed: expected an integer or a torch.Generator"),
    ({"seed": -1}, ValueError, "seed: expected an integer in"),
]


def call(attack: Callable[..., Tensor], changes: dict[str, Any]) -> Tensor:
    options: dict[str, Any] = {"model": MODEL, "loss_fn": F.cross_entropy, "inputs": X, "targets": Y, "eps": 0.1}
    return attack(**options | changes)


@pytest.mark.parametrize("attack", [fgsm, l2, pgd], ids=lambda attack: attack.__name__)
@pytest.mark.parametrize(("changes", "error", "text"), CASES, ids=lambda value: "")
def test_refusals(attack: Any, changes: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as caught, unchanged(MODEL):
        call(attack, changes)
    assert str(caught.value).startswith(f"kronfac.adversarial.{attack.__name__}: ")


@pytest.mark.parametrize(("changes", "error", "text"), ONLY_PGD, ids=lambda value: "")
def test_refusals_of_pgd(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text), unchanged(MODEL):
        call(pgd, changes)


def test_culprits_are_named() -> None:
    broken = nn.Linear(4, 3)
    with torch.no_grad():
        broken.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the model holds NaN or infinity in weight"):
        fgsm(broken, F.cross_entropy, X, Y, eps=0.1)
    with pytest.raises(ValueError, match="the targets hold NaN"):
        fgsm(nn.Linear(4, 3), F.mse_loss, X, torch.full((5, 3), float("nan")), eps=0.1)


FGSM = {"FGSM": partial(fgsm, eps=0.1)}


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"attacks": [fgsm]}, TypeError, "attacks: expected callables by name"),
        ({"attacks": {"FGSM": "fgsm"}}, TypeError, "attacks: expected callables by name"),
        ({"attacks": {"odd": lambda *_, bounds: None}}, TypeError, "'odd' returned NoneType"),
        ({"attacks": {"odd": lambda *_, bounds: X[:2]}}, ValueError, r"'odd' returned shape \(2, 4\)"),
        ({"attacks": {"odd": lambda *_, bounds: X / 0}}, ValueError, "'odd' returned NaN or infinity"),
        ({"data": (X.long(), Y)}, TypeError, "data: batch 0: inputs: expected a floating-point tensor"),
        ({"data": ((X, X), Y)}, TypeError, "data: batch 0: inputs: expected a tensor"),
        ({"data": (X, Y.float())}, TypeError, "expected class numbers"),
        ({"data": (X, torch.zeros(5, 3))}, TypeError, r"expected logits \(N, C\) and targets \(N,\)"),
        ({"data": (X[:0], Y[:0])}, ValueError, "at least one example"),
        ({"judge": lambda output, targets: output.sum()}, TypeError, r"judge: expected a bool tensor \(5,\)"),
        ({"bounds": (0.0, 1.0)}, ValueError, "beyond the bounds"),
        (
            {"model": nn.BatchNorm1d(4, track_running_stats=False), "data": [(X, Y), (X, Y)]},
            ValueError,
            "even in eval mode",
        ),
    ],
    ids=lambda value: "",
)
def test_refusals_of_robust_accuracy(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    options: dict[str, Any] = {"model": MODEL, "loss_fn": F.cross_entropy, "data": (X, Y), "attacks": FGSM}
    with pytest.raises(error, match=text), unchanged(MODEL):
        robust_accuracy(**options | changes)
