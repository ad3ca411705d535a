"""Adaptive cubic regularisation: dense conditions of its steps, textbook functions, samples and checkpoints."""

from __future__ import annotations

import copy
import io
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kronfac.optim.newton.cubic import CubicNewton
from tests.optim.models import same_tree
from tests.optim.newton.closures import (
    BEALE,
    ROSENBROCK,
    LargestTensor,
    broken_after,
    classifier,
    cross_entropy,
    dense_ggn,
    dense_hessian,
    flat,
    function_closure,
    gradient_of,
)


@pytest.mark.parametrize(("curvature", "likelihood"), [("hessian", None), ("ggn", None), ("fisher", "categorical")])
def test_the_step_is_the_global_minimiser_of_the_cubic_model(curvature: str, likelihood: str | None) -> None:
    """(H + μI)s = -g with μ = σ‖s‖ and H + μI positive semi-definite: necessary and sufficient (Nesterov & Polyak)."""
    model, x, y = classifier(3, 4, 3)
    before, g = flat(model), gradient_of(model, x, y)
    H = dense_hessian(model, x, y) if curvature == "hessian" else dense_ggn(model, x)
    optimizer = CubicNewton(
        model.parameters(), curvature=curvature, likelihood=likelihood, tolerance=1e-10, max_iterations=500, sigma=2.0
    )
    optimizer.step(cross_entropy(model, x, y))
    record = optimizer.last_step
    assert record is not None
    assert record.accepted
    s, sigma = flat(model) - before, record.attempts[-1].sigma
    shift = sigma * float(s.norm())
    torch.testing.assert_close(H @ s + shift * s, -g, rtol=1e-6, atol=1e-8)
    assert float(torch.linalg.eigvalsh(H)[0]) + shift > -1e-8
    promised = -float(g @ s + 0.5 * s @ H @ s + sigma / 3 * s.norm() ** 3)
    assert record.attempts[-1].model_decrease == pytest.approx(promised, rel=1e-6)
    assert record.ratio == pytest.approx((record.loss - record.loss_after) / promised, rel=1e-6)
    assert record.step_norm == pytest.approx(float(s.norm()), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "start", "minimum"), [(ROSENBROCK, (-1.2, 1.0), (1.0, 1.0)), (BEALE, (1.0, 1.0), (3.0, 0.5))]
)
def test_textbook_functions_are_minimised(name: str, start: tuple[float, float], minimum: tuple[float, float]) -> None:
    theta = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = CubicNewton([theta], tolerance=1e-6)
    losses = [float(optimizer.step(function_closure(name, theta))) for _ in range(60)]
    np.testing.assert_allclose(theta.detach().numpy(), minimum, atol=1e-6)
    assert all(later <= earlier for earlier, later in itertools.pairwise(losses))


def saddle(theta: Tensor) -> Tensor:
    """Stationary at 0 with curvatures 2 and -2; minima -¼ at (0, ±1/√2)."""
    return theta[0] ** 2 - theta[1] ** 2 + theta[1] ** 4


@pytest.mark.parametrize("explore", [False, True])
def test_a_saddle_is_left(explore: bool) -> None:
    """With noise always, from the very point only by exploring."""
    noise = 1e-6 * torch.randn(2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theta = nn.Parameter(noise if not explore else torch.zeros(2, dtype=torch.float64))
    optimizer = CubicNewton([theta], explore=explore)
    for _ in range(25):
        optimizer.step(lambda _: saddle(theta))
    np.testing.assert_allclose(theta.detach().abs().numpy(), [0.0, math.sqrt(0.5)], atol=1e-5)

    stuck = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = CubicNewton([stuck])
    optimizer.step(lambda _: saddle(stuck))
    assert optimizer.last_step.attempts[-1].outcome == "no_decrease"
    assert not optimizer.last_step.accepted


def test_sigma_follows_the_ratio() -> None:
    model, x, y = classifier(4, 8, 3)
    optimizer = CubicNewton(model.parameters(), sigma=1e-3, min_sigma=1e-5, max_rejections=30)
    sigma, seen = 1e-3, set()
    for _ in range(15):
        optimizer.step(cross_entropy(model, x, y))
        for attempt in optimizer.last_step.attempts:
            assert attempt.sigma == pytest.approx(sigma) or (attempt.sigma / sigma) % 2 == 0  # doubled, maybe on
            sigma = attempt.sigma
            seen.add(attempt.outcome)
            if attempt.outcome == "rejected":
                assert attempt.ratio < 1e-4
                sigma *= 2
            elif attempt.outcome == "accepted":
                assert attempt.ratio >= 1e-4
                sigma = max(sigma / (2 if attempt.ratio >= 0.8 else 1.2), 1e-5)
        assert optimizer.last_step.sigma == pytest.approx(sigma)
        sigma = optimizer.last_step.sigma
    assert {"accepted", "rejected"} <= seen


def test_rejections_cost_losses_only() -> None:
    """From far outside: the first steps are much too long, the Lanczos space stays the same."""
    theta = nn.Parameter(torch.tensor([-1.2, 1.0, 0.5], dtype=torch.float64))

    def closure(indices: Tensor | None) -> Tensor:
        return (100 * (theta[1:] - theta[:-1] ** 2) ** 2 + (1 - theta[:-1]) ** 2).sum()

    optimizer = CubicNewton([theta], sigma=1e-3, tolerance=1e-8)
    rejections = 0
    for _ in range(15):
        optimizer.step(closure)
        record = optimizer.last_step
        rejections += record.rejections
        assert record.attempts[0].products > 0
        assert all(attempt.products == 0 for attempt in record.attempts[1:])
        norms = [attempt.norm for attempt in record.attempts]
        assert all(later <= 0.9 * earlier for earlier, later in itertools.pairwise(norms))
        assert record.propagations == 1 + 2 * record.iterations + len(record.attempts)
    assert rejections > 2


def test_too_many_rejections_leave_everything_in_place() -> None:
    model, x, y = classifier(3, 4, 3)
    before = flat(model)
    optimizer = CubicNewton(model.parameters(), max_rejections=2)
    optimizer.step(broken_after(2, cross_entropy(model, x, y)))  # the gradient and the curvature are fine
    record = optimizer.last_step
    assert not record.accepted
    assert [attempt.outcome for attempt in record.attempts] == ["rejected"] * 3
    assert record.ratio == -math.inf
    assert record.loss_after == record.loss
    assert torch.equal(flat(model), before)
    assert record.sigma == 2 * record.attempts[-1].sigma
    closure = cross_entropy(model, x, y)
    for _ in range(5):
        optimizer.step(closure)
    assert optimizer.last_step.accepted


def test_samples_and_chunks() -> None:
    ends = []
    for chunk in (None, 7):
        model, x, y = classifier(4, 6, 3, examples=40)
        optimizer = CubicNewton(
            model.parameters(), examples=40, gradient_sample=0.5, hessian_sample=10, ratio_sample=30, chunk_size=chunk
        )
        for _ in range(4):
            optimizer.step(cross_entropy(model, x, y))
            record = optimizer.last_step
            assert (record.gradient_examples, record.hessian_examples, record.ratio_examples) == (20, 10, 30)
            assert record.propagations == 20 + 2 * 10 * record.iterations + 30 * (1 + len(record.attempts))
        ends.append(flat(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-8)


def test_no_more_than_the_lanczos_vectors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 3))
    x, y = torch.randn(8, 30), torch.randint(3, (8,))
    size = sum(p.numel() for p in model.parameters())
    optimizer = CubicNewton(model.parameters(), max_iterations=12, tolerance=1e-6)
    with LargestTensor() as largest:
        for _ in range(2):
            optimizer.step(cross_entropy(model, x, y))
    assert optimizer.last_step.attempts[-1].iterations == 12
    assert size <= largest.entries <= 32 * size  # the basis doubles its rows as it grows


# ------------------------------------------------------------------ transactions and checkpoints


@pytest.mark.parametrize("calls", [0, 1])
def test_a_broken_closure_changes_nothing(calls: int) -> None:
    model, x, y = classifier(4, 6, 3, examples=40)
    optimizer = CubicNewton(model.parameters(), examples=40, hessian_sample=0.3, ratio_sample=0.5)
    closure = cross_entropy(model, x, y)
    optimizer.step(closure)
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict(), torch.get_rng_state()])
    with pytest.raises(ValueError, match="finite loss"):
        optimizer.step(broken_after(calls, closure))
    assert same_tree(before, [model.state_dict(), optimizer.state_dict(), torch.get_rng_state()])


def test_resumes_bit_for_bit() -> None:
    def start() -> tuple[nn.Module, Any, CubicNewton]:
        model, x, y = classifier(4, 6, 3, examples=40)
        optimizer = CubicNewton(model.parameters(), examples=40, hessian_sample=0.3, explore=True, seed=4)
        return model, cross_entropy(model, x, y), optimizer

    model, closure, optimizer = start()
    for _ in range(8):
        optimizer.step(closure)
    other, again, first = start()
    for _ in range(3):
        first.step(again)
    file = io.BytesIO()
    torch.save([other.state_dict(), first.state_dict()], file)
    file.seek(0)
    resumed_model, resumed_closure, resumed = start()
    weights, state = torch.load(file, weights_only=True)
    resumed_model.load_state_dict(weights)
    resumed.load_state_dict(state)
    for _ in range(5):
        resumed.step(resumed_closure)
    assert torch.equal(flat(model), flat(resumed_model))
    assert same_tree(optimizer.state_dict(), resumed.state_dict())
    assert list(resumed.history) == list(optimizer.history)[3:]


def test_a_foreign_checkpoint_is_refused() -> None:
    theta = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    optimizer = CubicNewton([theta])
    optimizer.step(function_closure(ROSENBROCK, theta))
    bad = copy.deepcopy(optimizer.state_dict())
    bad["kronfac"]["values"]["sigma"] = -1.0
    sigma = optimizer.last_step.sigma
    with pytest.raises(ValueError, match="sigma: expected a number > 0"):
        optimizer.load_state_dict(bad)
    assert optimizer.state_dict()["kronfac"]["values"] == {"sigma": sigma}
    bad["kronfac"]["method"] = "TRCG"
    with pytest.raises(ValueError, match="method: expected 'CubicNewton', got 'TRCG'"):
        optimizer.load_state_dict(bad)


def test_refusals() -> None:
    theta = [nn.Parameter(torch.ones(2))]
    for options, message in (
        ({"sigma": 0.0}, "sigma: expected a number > 0"),
        ({"sigma": 1e-9}, "sigma: expected at least min_sigma"),
        ({"min_sigma": 2.0, "max_sigma": 1.0}, "min_sigma: expected at most max_sigma"),
        ({"eta1": 0.1, "eta2": 0.2}, "eta2: expected at most eta1"),
        ({"max_iterations": 0}, "max_iterations: expected an integer >= 1"),
        ({"hessian_sample": 0.5}, "hessian_sample: expected None without examples="),
    ):
        with pytest.raises(ValueError, match=message):
            CubicNewton(theta, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="explore: expected True or False"):
        CubicNewton(theta, explore=1)  # type: ignore[arg-type]


def test_digits_are_fitted() -> None:
    pytest.importorskip("sklearn")
    from kronfac.datasets import load_digits

    data = load_digits()
    x, y = data.train.inputs.flatten(1)[:300], data.train.targets[:300]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(x.shape[1], 20), nn.Tanh(), nn.Linear(20, 10))
    optimizer = CubicNewton(model.parameters(), examples=len(x), max_iterations=30)
    losses = [float(optimizer.step(cross_entropy(model, x, y))) for _ in range(25)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < 0.05
