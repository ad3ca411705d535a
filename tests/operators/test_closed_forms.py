"""Curvature of models whose second derivatives are known in closed form, entry by entry and in the layout promised."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kronfac
from kronfac.operators import fisher, ggn, hessian
from tests.operators.cases import relative_error


def _data(examples: int, features: int) -> Tensor:
    return torch.randn(examples, features, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _linear(features: int, outputs: int) -> nn.Linear:
    return nn.Linear(features, outputs).double()


def _layout(features: int, outputs: int) -> Tensor:
    """Where a flat vector of nn.Linear, weight row by row and then bias, holds the entries of [W b], row by row."""
    weight = torch.arange(outputs * features).view(outputs, features)
    bias = outputs * features + torch.arange(outputs)
    return torch.cat([weight, bias[:, None]], 1).reshape(-1)


def _in_layout(by_rows: Tensor, features: int, outputs: int) -> Tensor:
    """A matrix over [W b], row by row, as one over nn.Linear's parameters."""
    place = _layout(features, outputs)
    result = torch.empty_like(by_rows)
    result[place[:, None], place] = by_rows
    return result


def _extended(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)


def _both(model: nn.Module, loss: object, batches: object, expected: Tensor) -> None:
    for make in (hessian, ggn):
        assert relative_error(make(model, loss, batches).to_dense(), expected) < 1e-13  # type: ignore[arg-type]


@pytest.mark.parametrize("outputs", [1, 3])
def test_least_squares(outputs: int) -> None:
    """½‖XW - Y‖²/n: XᵀX/n for every output, whatever W and Y are; the exact Fisher matrix of a unit Gaussian too."""
    x, y = _data(15, 4), _data(15, outputs)
    model = _linear(4, outputs)
    gram = _extended(x).mT @ _extended(x) / 15
    expected = _in_layout(torch.kron(torch.eye(outputs, dtype=gram.dtype), gram), 4, outputs)

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (output - targets).square().sum() / len(output)

    _both(model, loss, [(x[:4], y[:4]), (x[4:], y[4:])], expected)
    exact = fisher(model, kronfac.Gaussian(variance=1.0), (x, y), kind="exact").to_dense()
    assert relative_error(exact, expected) < 1e-13
    # Each W's row alone, and the biases alone, are blocks of it.
    operator = hessian(model, loss, (x, y))
    weight = operator.blocks({"weight": ["weight"]})["weight"].to_dense()
    assert relative_error(weight, torch.kron(torch.eye(outputs, dtype=x.dtype), x.mT @ x / 15)) < 1e-13
    residual = model(x).detach() - y
    # The empirical one is made of the examples' gradients (residual ⊗ x).
    scores = torch.einsum("no,ni->noi", residual, _extended(x)).flatten(1)
    found = fisher(model, kronfac.Gaussian(variance=1.0), (x, y), kind="empirical").to_dense()
    assert relative_error(found, _in_layout(scores.mT @ scores / 15, 4, outputs)) < 1e-13


def test_ridge_regression() -> None:
    x, y = _data(9, 4), _data(9, 1)
    model = nn.Linear(4, 1, bias=False).double()

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        penalty = sum(parameter.square().sum() for parameter in model.parameters())
        return functional.mse_loss(output, targets) + 0.3 * penalty

    expected = 2 * x.mT @ x / 9 + 0.6 * torch.eye(4, dtype=x.dtype)
    assert relative_error(hessian(model, loss, (x, y)).to_dense(), expected) < 1e-13


def test_logistic_regression() -> None:
    """Xᵀ D X/n, D the variances p(1 - p)."""
    x = _data(20, 5)
    y = (x[:, :1] > 0).double()
    model = _linear(5, 1)
    p = torch.sigmoid(model(x)).detach()[:, 0]
    expected = (_extended(x).mT * (p * (1 - p))) @ _extended(x) / 20
    _both(model, functional.binary_cross_entropy_with_logits, [(x[:13], y[:13]), (x[13:], y[13:])], expected)
    assert relative_error(fisher(model, "bernoulli", (x, y), kind="exact").to_dense(), expected) < 1e-13
    scores = (p - y[:, 0])[:, None] * _extended(x)
    found = fisher(model, "bernoulli", (x, y), kind="empirical").to_dense()
    assert relative_error(found, scores.mT @ scores / 20) < 1e-13


def test_softmax_regression() -> None:
    """The mean of (diag p - ppᵀ) ⊗ xxᵀ over [W b] row by row."""
    x = _data(20, 4)
    y = torch.arange(20) % 3
    model = _linear(4, 3)
    p = model(x).detach().softmax(1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    by_rows = torch.einsum("nop,ni,nj->oipj", inner, _extended(x), _extended(x)).reshape(15, 15) / 20
    expected = _in_layout(by_rows, 4, 3)
    _both(model, functional.cross_entropy, [(x[:7], y[:7]), (x[7:], y[7:])], expected)
    assert relative_error(fisher(model, "categorical", (x, y), kind="exact").to_dense(), expected) < 1e-13
    scores = torch.einsum("no,ni->noi", p - functional.one_hot(y, 3), _extended(x)).flatten(1)
    found = fisher(model, "categorical", (x, y), kind="empirical").to_dense()
    assert relative_error(found, _in_layout(scores.mT @ scores / 20, 4, 3)) < 1e-13
    # Adding the same to all rows of [W b] changes nothing: five directions without curvature.
    values = torch.linalg.eigvalsh(hessian(model, functional.cross_entropy, (x, y)).to_dense())
    assert int((values.abs() < 1e-14).sum()) == 5


def test_poisson_regression() -> None:
    x = _data(12, 3)
    y = torch.arange(12.0, dtype=torch.float64)[:, None]
    model = _linear(3, 1)
    rate = model(x).detach().exp()[:, 0]
    expected = (_extended(x).mT * rate) @ _extended(x) / 12
    _both(model, functional.poisson_nll_loss, (x, y), expected)


def test_convolution_as_least_squares() -> None:
    """The Gram matrix of the patches, features in the order of the kernel's memory: channel, then offset."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 2, 5, 5, dtype=torch.float64, generator=generator)
    y = torch.randn(6, 3, 3, 3, dtype=torch.float64, generator=generator)
    model = nn.Conv2d(2, 3, 3, stride=2, padding=1).double()
    patches = functional.unfold(x, 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 18)
    gram = _extended(patches).mT @ _extended(patches) / 6
    expected = _in_layout(torch.kron(torch.eye(3, dtype=x.dtype), gram), 18, 3)

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (output - targets).square().sum() / len(output)

    _both(model, loss, (x, y), expected)


def test_deep_linear_network() -> None:
    """½‖W₂W₁x - y‖²: the Gauss-Newton matrix from J = [W₂ ⊗ xᵀ, I ⊗ (W₁x)ᵀ], the Hessian with the residuals besides."""
    x, y = _data(11, 4), _data(11, 2)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)).double()
    first, second = (parameter.detach() for parameter in model.parameters())
    identity = torch.eye(2, dtype=x.dtype)
    jacobian = torch.stack(
        [
            torch.cat([torch.kron(second, example[None]), torch.kron(identity, (first @ example)[None])], 1)
            for example in x
        ]
    )
    expected = torch.einsum("noi,noj->ij", jacobian, jacobian) / 11

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (output - targets).square().sum() / len(output)

    assert relative_error(ggn(model, loss, (x, y)).to_dense(), expected) < 1e-13
    # ∂²(W₂W₁x)_o / ∂W₁[h, i] ∂W₂[o, h] = x_i, weighted by the residual r_o.
    mixed = torch.zeros(3, 4, 2, 3, dtype=x.dtype)
    residuals = (x @ first.mT @ second.mT - y).mT @ x / 11  # (o, i)
    for hidden in range(3):
        mixed[hidden, :, :, hidden] = residuals.mT
    expected[:12, 12:] += mixed.view(12, 6)
    expected[12:, :12] += mixed.view(12, 6).mT
    assert relative_error(hessian(model, loss, (x, y)).to_dense(), expected) < 1e-13
