"""The quadratic model: its Fisher products against dense matrices, and its minimum."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from kronfac.curvature import Bernoulli, Categorical, Gaussian, Likelihood, Recorder
from kronfac.optim.quadratic import QuadraticModel, minimise
from kronfac.optim.replay import Replayer
from tests.optim.models import convnet, images, mlp, vectors


@given(st.integers(0, 10**6), st.sampled_from([1e-6, 1.0, 1e6]), st.booleans())
def test_the_minimum_is_that_of_a_dense_solver(seed: int, scale: float, large: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(2, 2, dtype=torch.float64, generator=generator) * torch.tensor([[1.0, scale]])
    Q = root.T @ root * (1e12 if large else 1.0)
    b = torch.randn(2, dtype=torch.float64, generator=generator)
    fit = minimise((float(Q[0, 0]), float(Q[0, 1]), float(Q[1, 1])), (float(b[0]), float(b[1])))
    c = torch.linalg.solve(Q, -b)
    assert [fit.alpha, fit.mu] == pytest.approx(c.tolist(), rel=1e-5)
    assert fit.change == pytest.approx(float(0.5 * b @ c), rel=1e-5)
    assert fit.finite


def test_degenerate_planes() -> None:
    assert minimise((4.0, 0.0, 0.0), (2.0, 0.0)).alpha == -0.5  # no δ₀
    parallel = minimise((4.0, 8.0, 16.0), (2.0, 4.0))
    assert (parallel.alpha, parallel.mu, parallel.change) == (-0.5, 0.0, -0.5)
    still = minimise((0.0, 0.0, 4.0), (0.0, 2.0))  # no gradient, but momentum
    assert (still.alpha, still.mu) == (0.0, -0.5)
    assert minimise((0.0, 0.0, 0.0), (0.0, 0.0)).change == 0.0
    assert not minimise((math.inf, 0.0, 1.0), (1.0, 1.0)).finite
    assert not minimise((1.0, 0.0, 1.0), (math.nan, 1.0)).finite


def dense_fisher(model: nn.Module, batches: list[Tensor], likelihood: Likelihood, masks: list[Tensor | None]) -> Tensor:
    """Σ over batches and columns of a square root of the output Fisher matrix, divided by the terms."""
    names = list(dict(model.named_parameters()))
    values = tuple(p.detach() for p in model.parameters())
    total, terms = torch.zeros(()), 0.0
    for x, mask in zip(batches, masks, strict=True):
        of = lambda *v: functional_call(model, dict(zip(names, v, strict=True)), x)  # noqa: B023, E731
        jacobians = torch.func.jacrev(of, argnums=tuple(range(len(values))))(*values)
        logits = of(*values)
        J = torch.cat([j.reshape(len(x), logits[0].numel(), -1) for j in jacobians], 2)
        for column in likelihood.exact_gradients(logits, mask):
            g = torch.einsum("nc,ncp->np", column.flatten(1), J)
            total = total + g.T @ g
        terms += likelihood.terms(logits, mask)
    return total / terms


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("name", "likelihood"),
    [
        ("mlp", Categorical()),
        ("mlp", Gaussian(variance=0.4)),
        ("mlp", Bernoulli()),
        ("tokens", Categorical(dim=-1)),
        ("convnet", Categorical()),
    ],
    ids=str,
)
def test_the_model_is_the_dense_one(name: str, likelihood: Likelihood, masked: bool) -> None:
    """Two forwards of different size, weighted by terms; every parameter takes part."""
    model = convnet(torch.float64) if name == "convnet" else mlp(3, 4, 3, dtype=torch.float64)
    if name == "convnet":
        batches = [images(count, torch.float64)[0] for count in (3, 2)]
    else:
        batches = [torch.randn(count, *(2,) * (name == "tokens"), 3, dtype=torch.float64) for count in (5, 2)]
    terms = lambda x: x[:, 0, 0, 0] > 0 if name == "convnet" else x[..., 0] > 0  # noqa: E731
    masks = [terms(x) if masked else None for x in batches]
    replayer = Replayer(model, None, (lambda args, kwargs, out: terms(args[0])) if masked else None)
    with replayer.listening(Recorder(model, {})):
        for x in batches:
            model(x)
    parameters = list(model.parameters())
    gradient, delta, previous = ([torch.randn_like(p) for p in parameters] for _ in range(3))
    ridge = [0.1 + 0.01 * index for index in range(len(parameters))]
    quadratic = QuadraticModel(replayer, likelihood, parameters, gradient, previous, ridge)  # type: ignore[arg-type]
    fit = quadratic.fit(delta)
    F = dense_fisher(model, batches, likelihood, masks)
    F = F + torch.cat([torch.full((p.numel(),), r) for p, r in zip(parameters, ridge, strict=True)]).double().diag()
    basis = torch.stack([torch.cat([t.flatten() for t in side]) for side in (delta, previous)], 1)
    g = torch.cat([t.flatten() for t in gradient])
    c = torch.linalg.solve(basis.T @ F @ basis, -(basis.T @ g))
    assert [fit.alpha, fit.mu] == pytest.approx(c.tolist(), rel=1e-6)
    step = basis @ c
    assert fit.change == pytest.approx(float(g @ step + 0.5 * step @ F @ step), rel=1e-6)
    assert quadratic.terms == sum(likelihood.terms(model(x), m) for x, m in zip(batches, masks, strict=True))


def test_the_change_is_the_best_of_all_steps_in_the_plane() -> None:
    model = mlp(3, 4, 3, dtype=torch.float64)
    x, y = vectors(8, 3, 3, torch.float64)
    replayer = Replayer(model)
    with replayer.listening(Recorder(model, {})):
        functional.cross_entropy(model(x), y).backward()
    parameters: list[Any] = list(model.parameters())
    gradient = [p.grad for p in parameters]
    nothing = [None] * len(parameters)
    fit = QuadraticModel(replayer, Categorical(), parameters, gradient, nothing, [0.1] * len(parameters)).fit(
        [-g for g in gradient]
    )
    assert fit.alpha > 0
    assert fit.mu == 0
    assert fit.change == pytest.approx(-0.5 * fit.alpha * sum(float((g * g).sum()) for g in gradient))
