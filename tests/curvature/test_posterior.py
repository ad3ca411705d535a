"""The Gaussian of the factors against dense matrices, float64, and against samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.curvature import KroneckerFactors, KroneckerPosterior, factors, find_layers, to_parameters
from kronfac.optim import KFAC
from tests.optim.models import mlp, train_step, vectors

DOUBLE = torch.float64


def spd(*shape: int) -> Tensor:
    x = torch.randn(*shape[:-1], 2 * shape[-1], dtype=DOUBLE)
    return x @ x.mT / (2 * shape[-1])


def examples() -> dict[str, KroneckerFactors]:
    return {
        "linear": KroneckerFactors(spd(4, 4), spd(3, 3)),
        "singular": KroneckerFactors(torch.ones(3, 3, dtype=DOUBLE), spd(2, 2)),
        "grouped": KroneckerFactors(spd(2, 3, 3), spd(2, 2, 2)),
        "embedding": KroneckerFactors(torch.tensor([0.5, 0.0, 0.5, 1.0], dtype=DOUBLE), spd(3, 3)),
        "norm": KroneckerFactors(torch.ones(1, 1, dtype=DOUBLE), spd(5, 5)),
        "units": KroneckerFactors(torch.ones(3, 1, 1, dtype=DOUBLE), spd(3, 2, 2)),
    }


def dense(pair: KroneckerFactors, n: float, prior: float, damping: str) -> Tensor:
    """The precision of one layer over vec(V) taken column by column, group after group."""
    A, G = pair
    groups = zip(A, G, strict=True) if G.dim() == 3 else [(A, G)]
    blocks = []
    for a, g in groups:
        a = torch.diag(a) if a.dim() == 1 else a
        eye_a, eye_g = torch.eye(len(a), dtype=DOUBLE), torch.eye(len(g), dtype=DOUBLE)
        if damping == "factored" and len(a) > 1:
            pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
            root = (prior / n) ** 0.5
            blocks.append(n * torch.kron(a + pi * root * eye_a, g + root / pi * eye_g))
        else:
            blocks.append(n * torch.kron(a, g) + prior * torch.kron(eye_a, eye_g))
    return torch.block_diag(*blocks)


def vec(matrix: Tensor, dims: int) -> Tensor:
    """(..., [groups,] out, in) -> (..., entries), columns stacked."""
    return matrix.mT.reshape(*matrix.shape[: matrix.dim() - dims], -1)


@pytest.mark.parametrize("damping", ["exact", "factored"])
@pytest.mark.parametrize("name", examples())
def test_everything_is_that_of_the_dense_matrix(name: str, damping: str) -> None:
    pair = examples()[name]
    n, prior = 50.0, 0.3
    posterior = KroneckerPosterior({name: pair}, n=n, prior_precision=prior, damping=damping)
    precision = dense(pair, n, prior, damping)
    size = posterior.shapes[name]
    dims = len(size)
    close: Any = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(posterior.logdet(), torch.linalg.slogdet(precision).logabsdet, **close)
    v = torch.randn(2, 3, *size, dtype=DOUBLE)
    flat = vec(v, dims)
    torch.testing.assert_close(vec(posterior.apply({name: v})[name], dims), flat @ precision, **close)
    torch.testing.assert_close(
        vec(posterior.solve({name: v})[name], dims), torch.linalg.solve(precision, flat.mT).mT, **close
    )
    expected = torch.einsum("abi,ij,abj->ab", flat, precision, flat)
    torch.testing.assert_close(posterior.quadratic({name: v}), expected, **close)
    expected = torch.einsum("abi,ij,abj->ab", flat, torch.linalg.inv(precision), flat)
    torch.testing.assert_close(posterior.quadratic({name: v}, inverse=True), expected, **close)
    # The map from noise to samples, column by column: L Lᵀ is the covariance to the last digits.
    units = torch.eye(len(precision), dtype=DOUBLE).reshape(-1, *size)
    L = vec(posterior.transform({name: units})[name], dims).mT
    torch.testing.assert_close(L @ L.mT, torch.linalg.inv(precision), **close)


def test_layers_add_up_and_priors_may_differ_by_layer() -> None:
    some = examples()
    priors = {name: 0.1 * (index + 1) for index, name in enumerate(some)}
    posterior = KroneckerPosterior(some, n=7, prior_precision=priors)
    matrices = [dense(pair, 7, priors[name], "exact") for name, pair in some.items()]
    whole = torch.block_diag(*matrices)
    torch.testing.assert_close(posterior.logdet(), torch.linalg.slogdet(whole).logabsdet, rtol=1e-10, atol=1e-10)
    v = {name: torch.randn(size, dtype=DOUBLE) for name, size in posterior.shapes.items()}
    flat = torch.cat([vec(value, value.dim()) for value in v.values()])
    torch.testing.assert_close(posterior.quadratic(v), flat @ whole @ flat, rtol=1e-10, atol=1e-10)
    assert sum(posterior.logdets().values()) == pytest.approx(float(posterior.logdet()))


def test_samples_have_the_covariance_that_was_asked_for() -> None:
    pair = examples()["linear"]
    posterior = KroneckerPosterior({"l": pair}, n=20, prior_precision=0.5)
    count = 40_000
    draws = posterior.sample((count,), generator=torch.Generator().manual_seed(1))["l"]
    flat = vec(draws, 2)
    expected = torch.linalg.inv(dense(pair, 20, 0.5, "exact"))
    # Each entry of the sample covariance has the standard deviation √((Σ_ii Σ_jj + Σ_ij²) / count).
    diagonal = expected.diagonal()
    error = ((torch.outer(diagonal, diagonal) + expected**2) / count).sqrt()
    assert float((((flat.mT @ flat) / count - expected) / error).abs().max()) < 4.5
    assert float((flat.mean(0) / (diagonal / count).sqrt()).abs().max()) < 4.5
    again = posterior.sample((count,), generator=torch.Generator().manual_seed(1))["l"]
    assert torch.equal(draws, again)
    assert posterior.sample()["l"].shape == (3, 4)


def test_one_linear_layer_has_the_laplace_posterior_of_linear_regression() -> None:
    """With a Gaussian likelihood F is exact: Σ = (XᵀX/σ² + δ)⁻¹ for each output, from the textbook."""
    model = nn.Linear(3, 2, dtype=DOUBLE)
    x, y = torch.randn(30, 3, dtype=DOUBLE), torch.randn(30, 2, dtype=DOUBLE)
    found = factors(model, [(x, y)], likelihood="gaussian", fisher="exact")
    posterior = KroneckerPosterior(found, n=30, prior_precision=0.7)
    design = torch.cat([x, torch.ones(30, 1, dtype=DOUBLE)], 1)
    covariance = torch.linalg.inv(design.mT @ design + 0.7 * torch.eye(4, dtype=DOUBLE))
    at = torch.cat([torch.randn(3, dtype=DOUBLE), torch.ones(1, dtype=DOUBLE)])
    v = torch.zeros(2, 4, dtype=DOUBLE)
    v[0] = at
    (name,) = found
    torch.testing.assert_close(posterior.quadratic({name: v}, inverse=True), at @ covariance @ at, rtol=1e-10, atol=0)


def test_the_damped_curvature_of_an_optimizer_is_what_it_inverts() -> None:
    for solve, damping in (("eigen", "exact"), ("inverse", "factored")):
        model = mlp(4, 5, 3, dtype=DOUBLE)
        optimizer = KFAC(model, 1.0, solve=solve, damping=0.05, kl_clip=None, momentum=0.0, inverse_every=1)
        before = [p.detach().clone() for p in model.parameters()]
        x, y = vectors(6, 4, 3, DOUBLE)
        train_step(model, optimizer, x, y)
        posterior = KroneckerPosterior(optimizer.factors(), prior_precision=0.05, damping=damping)
        gradients = {name: adapter.gradient() for name, adapter in find_layers(model).items()}
        moved = to_parameters(model, posterior.solve(gradients))
        for (name, p), old in zip(model.named_parameters(), before, strict=True):
            torch.testing.assert_close(old - p.detach(), moved[name], rtol=1e-9, atol=1e-12)


def test_parameters_get_their_shapes_back() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 6, 3, groups=2)
            self.norm = nn.LayerNorm(6)
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    model = Net()
    layers = find_layers(model)
    matrices = {name: adapter.weight_matrix() for name, adapter in layers.items()}
    back = to_parameters(model, matrices)
    assert set(back) == {name for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        assert torch.equal(back[name], p)
    stacked = to_parameters(model, {name: torch.stack([m, 2 * m]) for name, m in matrices.items()})
    for name, p in model.named_parameters():
        assert torch.equal(stacked[name], torch.stack([p, 2 * p]))
    part = to_parameters(model, {"attention.k_proj": matrices["attention.k_proj"]})["attention.in_proj_weight"]
    assert torch.equal(part[6:12], model.attention.in_proj_weight[6:12])
    assert not part[:6].any()
    with pytest.raises(ValueError, match="got 'other'"):
        to_parameters(model, {"other": torch.zeros(1)})


def test_bad_arguments() -> None:
    pair = examples()["linear"]
    with pytest.raises(TypeError, match="expected a mapping"):
        KroneckerPosterior([pair])  # type: ignore[arg-type]
    options: dict[str, Any]
    for options, match in (
        ({"n": 0}, "n: expected a finite number > 0, got 0"),
        ({"prior_precision": -1.0}, "prior_precision of 'l'"),
        ({"prior_precision": {"m": 1.0}}, "expected a value for layer 'l'"),
        ({"prior_precision": {"l": float("nan")}}, "prior_precision of 'l'"),
        ({"damping": "none"}, "'exact' or 'factored'"),
    ):
        with pytest.raises(ValueError, match=match):
            KroneckerPosterior({"l": pair}, **options)
    bad = torch.full((3, 3), float("nan"), dtype=DOUBLE)
    with pytest.raises(ValueError, match="G of layer 'l'"):
        KroneckerPosterior({"l": KroneckerFactors(spd(2, 2), bad)})
    with pytest.raises(ValueError, match="A of layer 'l'"):
        KroneckerPosterior({"l": KroneckerFactors(bad[0], spd(2, 2))})
    posterior = KroneckerPosterior({"l": pair})
    with pytest.raises(ValueError, match=r"expected shape \(..., 3, 4\), got \(4, 3\)"):
        posterior.solve({"l": torch.zeros(4, 3, dtype=DOUBLE)})
    with pytest.raises(ValueError, match="got 'x'"):
        posterior.solve({"x": torch.zeros(3, 4, dtype=DOUBLE)})
    with pytest.raises(ValueError, match="at least one layer"):
        posterior.quadratic({})


def test_float32_factors_of_a_trained_model() -> None:
    model = mlp(4, 5, 3)
    x, y = vectors(20, 4, 3)
    functional.cross_entropy(model(x), y).backward()
    found = factors(model, (x, y), likelihood="categorical", fisher="exact")
    posterior = KroneckerPosterior(found, n=20)
    draws = to_parameters(model, posterior.sample((3,)))
    assert {name: tuple(t.shape) for name, t in draws.items()} == {
        name: (3, *p.shape) for name, p in model.named_parameters()
    }
    assert all(t.dtype == torch.float32 and bool(t.isfinite().all()) for t in draws.values())
    # An unchanged model with a sampled deviation runs: what a user does with it.
    weights = {name: p + draws[name][0] for name, p in model.named_parameters()}
    assert torch.func.functional_call(model, weights, (x,)).shape == (20, 3)
