"""Likelihoods: closed forms against autograd, sampling against the exact covariance, and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Generator, Tensor
from torch.nn import functional

from kronfac.curvature import Bernoulli, Categorical, Gaussian, Likelihood, resolve_likelihood

CASES: dict[str, tuple[Likelihood, tuple[int, ...], tuple[int, ...]]] = {
    "classes": (Categorical(), (3, 4), (3,)),
    "tokens": (Categorical(dim=-1), (3, 2, 4), (3, 2)),
    "maps": (Categorical(dim=1), (3, 4, 2, 1), (3, 2, 1)),
    "gaussian": (Gaussian(variance=0.4), (3, 5), (3,)),
    "gaussian tokens": (Gaussian(variance=2.0, terms=2), (3, 2, 4), (3, 2)),
    "bernoulli": (Bernoulli(), (3, 4), (3,)),
    "scalar outputs": (Bernoulli(), (3,), (3,)),
}


def covariance(vectors: list[Tensor]) -> Tensor:
    """Sum of outer products, example by example (N, D, D)."""
    stacked = torch.stack([v.reshape(v.shape[0], -1) for v in vectors])
    return torch.einsum("snd,sne->nde", stacked, stacked)


def independent_terms(likelihood: Likelihood, shape: tuple[int, ...]) -> Tensor:
    """Which entries of one example's output covariance belong to one term (D, D)."""
    position = torch.arange(math.prod(shape[1:])).reshape(shape[1:])
    if isinstance(likelihood, Categorical):
        dim = (likelihood.dim if likelihood.dim is not None else 1) % len(shape) - 1
        position = position.select(dim, 0).unsqueeze(dim).expand(shape[1:])
    return position.reshape(-1, 1) == position.reshape(1, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [1, 2])
def test_classes_are_drawn_as_often_as_they_are_likely(dim: int, dtype: torch.dtype) -> None:
    # Impossible classes at either end and between; a likely one; some that are next to impossible.
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 1e-9, 0.24, 0.01, 0.0], dtype=torch.float64)
    logits = p.log().to(dtype).expand(300, 400, 8).movedim(-1, dim)
    gradients = Categorical(dim=dim).sample_gradients(logits, Generator().manual_seed(3), None)
    drawn = gradients.movedim(dim, -1) < -1e-3  # p - 1 at the class that was drawn, p elsewhere
    assert (drawn.sum(-1) == 1).all()
    frequency = drawn.double().mean((0, 1))
    assert (frequency[p == 0] == 0).all()
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / 120000).sqrt() + 1e-5).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_exact_columns_and_draws_agree(case: str, masked: bool) -> None:
    likelihood, shape, mask_shape = CASES[case]
    logits = torch.randn(shape, dtype=torch.float64)
    mask = torch.rand(mask_shape) < 0.6 if masked else None
    exact = covariance(list(likelihood.exact_gradients(logits, mask)))
    draws = 20000
    generator = Generator().manual_seed(1)
    many = logits.repeat(draws, *[1] * (len(shape) - 1))
    many_mask = None if mask is None else mask.repeat(draws, *[1] * (mask.dim() - 1))
    samples = likelihood.sample_gradients(many, generator, many_mask).reshape(draws, shape[0], -1)
    outer = torch.einsum("snd,sne->snde", samples, samples)
    error = outer.std(0) / math.sqrt(draws)
    assert ((outer.mean(0) - exact).abs() <= 5 * error + 1e-12).all()
    # Independent terms never mix in a column.
    assert (exact[:, ~independent_terms(likelihood, shape)] == 0).all()
    if mask is not None:
        example = torch.stack(list(likelihood.exact_gradients(logits, mask))).abs().sum(0)
        expanded = (
            mask.unsqueeze(likelihood._class_dim(logits))
            if isinstance(likelihood, Categorical)
            else mask.reshape(*mask.shape, *[1] * (logits.dim() - mask.dim()))
        )
        assert (example[~expanded.expand_as(example)] == 0).all()


@pytest.mark.parametrize("case", list(CASES))
def test_exact_columns_square_to_the_hessian(case: str) -> None:
    likelihood, shape, _ = CASES[case]
    logits = torch.randn(shape, dtype=torch.float64)

    def nll(z: Tensor) -> Tensor:
        if isinstance(likelihood, Categorical):
            dim = likelihood._class_dim(logits)
            return -z.log_softmax(dim - 1).select(dim - 1, 0).sum()
        if isinstance(likelihood, Gaussian):
            return z.square().sum() / (2 * likelihood.variance)
        return functional.binary_cross_entropy_with_logits(z, torch.zeros_like(z), reduction="sum")

    D = math.prod(shape[1:])
    for z, got in zip(logits, covariance(list(likelihood.exact_gradients(logits, None))), strict=True):
        torch.testing.assert_close(got, torch.func.hessian(nll)(z).reshape(D, D))


def test_target_gradients_are_those_of_torch_losses() -> None:
    z = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    for likelihood, targets, loss in (
        (Categorical(dim=1), torch.randint(3, (4, 2)), functional.cross_entropy),
        (Categorical(dim=1), torch.rand(4, 3, 2, dtype=torch.float64), functional.cross_entropy),
        (Bernoulli(), torch.rand(4, 3, 2, dtype=torch.float64), functional.binary_cross_entropy_with_logits),
        (Gaussian(0.5), torch.randn(4, 3, 2, dtype=torch.float64), functional.mse_loss),
    ):
        (expected,) = torch.autograd.grad(loss(z, targets, reduction="sum"), z)
        torch.testing.assert_close(likelihood.target_gradients(z.detach(), targets, None), expected)
    ignored = torch.tensor([[0, -100], [1, 2], [-100, -100], [2, 2]])
    (expected,) = torch.autograd.grad(functional.cross_entropy(z, ignored, reduction="sum"), z)
    torch.testing.assert_close(Categorical(dim=1).target_gradients(z.detach(), ignored, ignored >= 0), expected)
    with pytest.raises(ValueError, match="targets: expected classes from 0 to 2"):
        Categorical(dim=1).target_gradients(z.detach(), ignored, None)
    with pytest.raises(ValueError, match=r"targets: expected shape \(4, 3, 2\)"):
        Bernoulli().target_gradients(z.detach(), torch.zeros(4), None)


@pytest.mark.parametrize(
    ("likelihood", "shape", "mask", "terms"),
    [
        (Categorical(), (5, 3), None, 5),
        (Categorical(dim=-1), (5, 2, 3), None, 10),
        (Categorical(dim=1), (5, 3, 2, 4), None, 40),
        (Categorical(dim=-1), (2, 2, 3), [[True, False], [True, True]], 3),
        (Gaussian(), (5, 2, 3), None, 5),
        (Gaussian(terms=2), (5, 2, 3), None, 10),
        (Gaussian(), (2, 2, 3), [[True, False], [False, False]], 1),
        (Gaussian(terms=2), (2, 2, 3), [[True, False], [True, True]], 3),
        (Bernoulli(), (5,), None, 5),
        (Bernoulli(terms=3), (5, 3), None, 15),
        (Categorical(), (0, 3), None, 0),
    ],
)
def test_terms(likelihood: Likelihood, shape: tuple[int, ...], mask: list[list[bool]] | None, terms: int) -> None:
    assert likelihood.terms(torch.zeros(shape), None if mask is None else torch.tensor(mask)) == terms


def test_the_global_stream_is_never_touched() -> None:
    before = torch.get_rng_state()
    for likelihood in (Categorical(), Gaussian(), Bernoulli()):
        one, two, other = (
            likelihood.sample_gradients(torch.randn(6, 4, generator=Generator().manual_seed(0)), generator, None)
            for generator in (Generator().manual_seed(5), Generator().manual_seed(5), Generator().manual_seed(6))
        )
        assert torch.equal(one, two)
        assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(), Bernoulli()])
def test_non_finite_outputs_show_and_do_not_raise(likelihood: Likelihood) -> None:
    logits = torch.randn(3, 4)
    logits[1, 2] = math.nan
    generator = Generator().manual_seed(0)
    assert likelihood.sample_gradients(logits, generator, None)[1].isnan().any()
    assert likelihood.sample_gradients(logits, generator, None)[[0, 2]].isfinite().all()
    mask = torch.tensor([True, False, True])
    assert likelihood.sample_gradients(logits, generator, mask).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(), Bernoulli()])
def test_gradients_are_at_least_float32(likelihood: Likelihood, dtype: torch.dtype) -> None:
    logits = torch.randn(3, 4).to(dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert likelihood.sample_gradients(logits, Generator(), None).dtype == expected
    assert {c.dtype for c in likelihood.exact_gradients(logits, None)} == {expected}


def test_confident_bernoulli_keeps_its_curvature() -> None:
    (column,) = Bernoulli().exact_gradients(torch.tensor([30.0]), None)
    torch.testing.assert_close(column, torch.tensor([-30.0]).exp().sqrt(), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(
    ("likelihood", "logits", "message"),
    [
        (Categorical(), torch.zeros(2, 3, 4), "pass likelihood=Categorical"),
        (Categorical(), torch.zeros(2), "pass likelihood=Categorical"),
        (Categorical(dim=3), torch.zeros(2, 3), "class dimension dim=3"),
        (Categorical(dim=0), torch.zeros(2, 3), "class dimension dim=0"),
        (Categorical(), torch.zeros(2, 0), "at least one class"),
        (Categorical(), torch.zeros(2, 3, dtype=torch.long), "floating-point"),
        (Gaussian(), torch.zeros(()), "got a scalar"),
        (Bernoulli(), torch.zeros(2, dtype=torch.bool), "floating-point"),
    ],
)
def test_outputs_that_do_not_fit(likelihood: Likelihood, logits: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        likelihood.check(logits)


def test_masks_that_do_not_fit() -> None:
    logits = torch.zeros(2, 3, 4)
    with pytest.raises(TypeError, match=r"mask: expected a bool tensor.*torch.float32"):
        Gaussian().check_mask(logits, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"mask: expected the leading dimensions of the output \(2, 3, 4\)"):
        Gaussian().check_mask(logits, torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask: expected shape \(2, 3\)"):
        Categorical(dim=-1).check_mask(logits, torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeError, match="got a list"):
        Categorical(dim=-1).check_mask(logits, [True])  # type: ignore[arg-type]


def test_arguments() -> None:
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="Gaussian: variance"):
            Gaussian(variance=bad)
    with pytest.raises(TypeError, match="Gaussian: variance"):
        Gaussian(variance="1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Bernoulli: terms"):
        Bernoulli(terms=0)
    with pytest.raises(TypeError, match="Gaussian: terms"):
        Gaussian(terms=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Categorical: dim"):
        Categorical(dim=1.0)  # type: ignore[arg-type]


def test_resolve() -> None:
    assert isinstance(resolve_likelihood("categorical"), Categorical)
    assert isinstance(resolve_likelihood("gaussian"), Gaussian)
    assert isinstance(resolve_likelihood("bernoulli"), Bernoulli)
    own = Gaussian(2.0)
    assert resolve_likelihood(own) is own
    with pytest.raises(ValueError, match="'categorical', 'gaussian', 'bernoulli'"):
        resolve_likelihood("poisson")
    with pytest.raises(TypeError, match=r"call it: Categorical\(\)"):
        resolve_likelihood(Categorical)  # type: ignore[arg-type]


def test_a_likelihood_of_ones_own_says_what_it_lacks() -> None:
    class Poisson(Likelihood):
        def terms(self, logits: Tensor, mask: Tensor | None) -> float:
            return logits.shape[0]

        def sample_gradients(self, logits: Tensor, generator: Generator | None, mask: Tensor | None) -> Tensor:
            rate = logits.exp()
            return rate - torch.poisson(rate, generator)

    with pytest.raises(ValueError, match='use fisher="mc"'):
        Poisson().exact_gradients(torch.zeros(1, 1), None)
    with pytest.raises(ValueError, match="has no target_gradients"):
        Poisson().target_gradients(torch.zeros(1, 1), torch.zeros(1, 1), None)


@pytest.mark.parametrize(
    ("likelihood", "shape", "mask_shape"),
    [
        (Categorical(), (4, 3), (4,)),
        (Categorical(dim=1), (2, 3, 4), (2, 4)),
        (Categorical(dim=-1), (2, 4, 3), (2, 4)),
        (Gaussian(variance=0.3), (4, 3), (4,)),
        (Bernoulli(), (3, 2, 2), (3, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_the_fisher_product_is_the_sum_over_the_exact_columns(
    likelihood: Likelihood, shape: tuple[int, ...], mask_shape: tuple[int, ...], masked: bool
) -> None:
    logits, vector = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    mask = torch.rand(mask_shape) < 0.5 if masked else None
    expected = Likelihood.fisher_product(likelihood, logits, vector, mask)
    assert float(expected.abs().sum()) > 0
    torch.testing.assert_close(likelihood.fisher_product(logits, vector, mask), expected)
    if not masked and isinstance(likelihood, Categorical) and len(shape) == 2:
        loss = lambda z: torch.nn.functional.cross_entropy(z, torch.zeros(4, dtype=torch.long), reduction="sum")  # noqa: E731
        _, hessian_product = torch.autograd.functional.hvp(loss, logits, vector)
        torch.testing.assert_close(expected, hessian_product)


def test_a_likelihood_without_columns_has_no_fisher_product() -> None:
    class Bare(Likelihood):
        def terms(self, logits: Tensor, mask: Tensor | None) -> float:
            return len(logits)

        def sample_gradients(self, logits: Tensor, generator: Generator | None, mask: Tensor | None) -> Tensor:
            return logits

    with pytest.raises(ValueError, match="has neither fisher_product nor exact_gradients"):
        Bare().fisher_product(torch.randn(2, 2), torch.randn(2, 2), None)
