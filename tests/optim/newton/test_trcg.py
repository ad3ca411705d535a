from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kronfac
from kronfac import datasets
from kronfac.linalg import trust_region_cg
from kronfac.optim.newton import TRCG, TrustRegionStep
from tests.optim.newton.problems import Classified, beale, point, rosenbrock, saddle

RULES = ("xu", "classical")


def last(optimizer: TRCG) -> TrustRegionStep:
    assert isinstance(optimizer.last_step, TrustRegionStep)
    return optimizer.last_step


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("function", "start", "solution"),
    [(rosenbrock, (-1.2, 1.0), (1.0, 1.0)), (beale, (1.0, 1.0), (3.0, 0.5)), (beale, (0.0, 0.0), (3.0, 0.5))],
)
def test_classical_functions_are_minimised(
    rule: str, function: Callable[[Tensor], Tensor], start: tuple[float, ...], solution: tuple[float, ...]
) -> None:
    w = point(*start)
    optimizer = TRCG([w], radius=1.0, radius_rule=rule, tolerance=1e-9)
    losses = [float(optimizer.step(lambda _: function(w))) for _ in range(40)]
    torch.testing.assert_close(w.detach(), torch.tensor(solution, dtype=torch.float64), rtol=0, atol=1e-6)
    assert all(after <= before for before, after in pairwise(losses))


@pytest.mark.parametrize("rule", RULES)
def test_a_saddle_is_left_along_negative_curvature(rule: str) -> None:
    # The stationary point itself: nothing to go by, and nothing breaks.
    w = point(0.0, 0.0, 0.0)
    optimizer = TRCG([w], radius_rule=rule)
    optimizer.step(lambda _: saddle(w))
    assert not last(optimizer).accepted
    assert last(optimizer).attempts[0].outcome == "no_decrease"
    assert not w.detach().any()
    with torch.no_grad():
        w.add_(1e-6 * torch.randn(3, dtype=torch.float64))
    for _ in range(60):
        optimizer.step(lambda _: saddle(w))
    assert any(attempt.status == "negative_curvature" for record in optimizer.history for attempt in record.attempts)
    assert float(saddle(w.detach())) == pytest.approx(-0.5, abs=1e-9)


def test_one_step_is_that_of_the_solver_on_the_dense_hessian() -> None:
    w = point(-1.2, 1.0)
    gradient = torch.autograd.functional.jacobian(rosenbrock, w.detach())
    hessian = torch.autograd.functional.hessian(rosenbrock, w.detach())
    expected = trust_region_cg(hessian, gradient, 0.25)
    start = w.detach().clone()
    optimizer = TRCG([w], radius=0.25)
    loss = optimizer.step(lambda _: rosenbrock(w))
    torch.testing.assert_close(w.detach() - start, expected.step)
    record = last(optimizer)
    before, after = float(rosenbrock(start)), float(rosenbrock(w.detach()))
    assert float(loss) == record.loss == before
    assert record.loss_after == pytest.approx(after)
    assert record.ratio == pytest.approx((before - after) / expected.model_decrease)
    assert record.status == expected.status
    assert record.step_norm == pytest.approx(float(expected.step.norm()))
    assert record.gradient_norm == pytest.approx(float(gradient.norm()))


def quartic(scale: float) -> Callable[[Tensor], Tensor]:
    """A convex function whose curvature where |w| is large is not that at 0."""
    return lambda w: (0.5 * w.square() * torch.tensor([1.0, 10.0]).double() + w).sum() + scale * w.pow(4).sum()


@pytest.mark.parametrize("rule", RULES)
def test_the_radius_follows_the_published_rule(rule: str) -> None:
    seen = set()
    for scale in (0.0, 0.02, 0.3, 1.0, 30.0):
        for radius in (0.05, 0.4, 1.5, 4.0):
            w = point(0.0, 0.0)
            optimizer = TRCG([w], radius=radius, max_radius=5.0, radius_rule=rule, eta2=0.1)
            function = quartic(scale)
            optimizer.step(lambda _, w=w, function=function: function(w))
            record = last(optimizer)
            *rejected, final = record.attempts
            assert record.accepted
            assert final.outcome == "accepted"
            assert all(attempt.ratio is not None and attempt.ratio < 0.1 for attempt in rejected)
            factor = 2.0 if rule == "xu" else 4.0
            for first, second in pairwise(record.attempts):
                # Published: divide and solve again. A region that still holds the step gives the same step again.
                expected = first.radius / factor
                while expected >= first.norm:
                    expected /= factor
                assert second.radius == expected
            ratio = final.ratio
            assert ratio is not None
            assert ratio >= 0.1
            boundary = final.status in ("boundary", "negative_curvature")
            if rule == "xu":
                wanted = final.radius * (2.0 if ratio >= 0.8 else 1.2)
            elif ratio < 0.25:
                wanted = final.radius / 4
            else:
                wanted = final.radius * (2.0 if ratio > 0.75 and boundary else 1.0)
            assert record.radius == min(5.0, wanted)
            seen.add((bool(rejected), ratio >= 0.8, boundary, ratio < 0.25))
    assert len(seen) >= 5, seen


def test_a_rejected_step_is_solved_again_without_products() -> None:
    n = 30
    eigenvalues = torch.logspace(-2, 1, n, dtype=torch.float64)

    def function(w: Tensor) -> Tensor:
        return 0.5 * (eigenvalues * w.square()).sum() + w.sum() + 0.5 * w.pow(4).sum()

    outcomes = {}
    for keep in (0, 30):
        w = point(*[0.0] * n)
        optimizer = TRCG([w], radius=20.0, keep_iterates=keep, tolerance=1e-8)
        for _ in range(3):
            optimizer.step(lambda _, w=w: function(w))
        outcomes[keep] = (w.detach().clone(), list(optimizer.history))
    first, again = outcomes[30][1][0], outcomes[0][1][0]
    assert first.rejections >= 2
    assert [attempt.products for attempt in first.attempts[1:]] == [0] * first.rejections
    assert all(attempt.products > 0 for attempt in again.attempts)
    assert [attempt.outcome for attempt in first.attempts] == [attempt.outcome for attempt in again.attempts]
    torch.testing.assert_close(outcomes[0][0], outcomes[30][0], rtol=1e-9, atol=1e-12)
    assert first.propagations < again.propagations


def test_after_the_last_rejection_nothing_has_moved() -> None:
    w = point(0.0, 0.0)
    optimizer = TRCG([w], radius=4.0, max_rejections=2)
    optimizer.step(lambda _: quartic(1e6)(w))
    record = last(optimizer)
    assert record.rejections == len(record.attempts) == 3
    assert not record.accepted
    assert record.step_norm == 0
    assert record.loss_after == record.loss
    assert not w.detach().any()
    assert record.radius < record.attempts[-1].radius < 4.0
    while not record.accepted:  # and goes on from there
        optimizer.step(lambda _: quartic(1e6)(w))
        record = last(optimizer)


def test_a_trial_point_without_a_finite_loss_is_rejected() -> None:
    w = point(1.0)
    optimizer = TRCG([w], radius=16.0, max_radius=16.0)
    # A linear loss with a wall: NaN for w < 0, so that every step beyond 1 fails.
    optimizer.step(lambda _: w.sqrt().pow(2).sum() + 0 * w.sum())
    record = last(optimizer)
    assert record.rejections >= 4
    assert all(attempt.ratio == -math.inf for attempt in record.attempts[:-1])
    assert record.accepted
    assert 0 <= float(w) < 1


def test_below_the_round_off_of_the_loss_the_radius_stays() -> None:
    w = point(1e-6, 0.0)
    optimizer = TRCG([w], radius=1.0)
    optimizer.step(lambda _: 1e6 + 0.5 * w.square().sum())
    record = last(optimizer)
    assert [attempt.outcome for attempt in record.attempts] == ["unresolved"]
    assert record.radius == 1.0


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    train = datasets.load("digits").train
    return train.inputs.flatten(1), train.targets


def digits_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


@pytest.mark.parametrize("rule", RULES)
def test_digits_are_learnt_within_60_iterations(digits: tuple[Tensor, Tensor], rule: str) -> None:
    x, y = digits
    model = digits_network()
    optimizer = TRCG(model.parameters(), radius_rule=rule)

    def closure(_: Tensor | None) -> Tensor:
        return functional.cross_entropy(model(x), y)

    losses = [float(optimizer.step(closure))]
    while losses[-1] > 1e-3:
        assert len(losses) < 60
        losses.append(float(optimizer.step(closure)))
        record = last(optimizer)
        if record.accepted:
            assert record.loss_after <= record.loss
    assert losses == sorted(losses, reverse=True)
    assert optimizer.propagations == sum(record.propagations for record in optimizer.history)


def test_samples_are_drawn_anew_and_as_large_as_asked() -> None:
    problem = Classified(examples=40)
    optimizer = TRCG(
        problem.model.parameters(), examples=40, gradient_sample=0.5, hessian_sample=7, ratio_sample=0.25, seed=3
    )
    draws = []
    for _ in range(3):
        problem.asked.clear()
        optimizer.step(problem)
        gradient, curvature, ratio = problem.asked[0], problem.asked[1], problem.asked[2]
        assert gradient is not None
        assert curvature is not None
        assert ratio is not None
        assert [len(gradient), len(curvature), len(ratio)] == [20, 7, 10]
        for indices in problem.asked:
            assert indices is not None
            assert indices.dtype == torch.int64
            assert len(set(indices.tolist())) == len(indices)
            assert 0 <= int(indices.min()) <= int(indices.max()) < 40
        assert all(torch.equal(indices, ratio) for indices in problem.asked[2:])  # both losses on one sample
        record = last(optimizer)
        assert (record.gradient_examples, record.hessian_examples, record.ratio_examples) == (20, 7, 10)
        draws += [gradient.tolist()]
    assert draws[0] != draws[1] != draws[2]


def test_a_paired_ratio_uses_the_gradients_own_examples() -> None:
    problem = Classified(examples=40)
    optimizer = TRCG(problem.model.parameters(), examples=40, gradient_sample=8, ratio_sample="gradient")
    optimizer.step(problem)
    gradient, curvature, *trials = problem.asked
    assert gradient is not None
    assert curvature is None  # all
    assert trials
    assert all(indices is not None and torch.equal(indices, gradient) for indices in trials)
    assert last(optimizer).ratio_examples == 8


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
@pytest.mark.parametrize("chunk_size", [None, 7])
def test_propagations_are_what_the_closure_was_asked_for(curvature: str, chunk_size: int | None) -> None:
    problem = Classified(examples=40)
    optimizer = TRCG(
        problem.model.parameters(),
        examples=40,
        curvature=curvature,
        likelihood="categorical" if curvature == "fisher" else None,
        gradient_sample=30,
        hessian_sample=0.25,
        chunk_size=chunk_size,
        radius=20.0,
    )
    for _ in range(4):
        problem.asked.clear()
        optimizer.step(problem)
        record = last(optimizer)
        evaluated = sum(40 if indices is None else len(indices) for indices in problem.asked)
        assert all(indices is None or len(indices) <= (chunk_size or 40) for indices in problem.asked)
        losses = 1 + len(record.attempts)  # on all examples, at the start and at each trial point
        # A product on a kept graph calls nothing; without one each rebuilds it.
        builds = 1 if chunk_size is None else record.iterations
        assert evaluated == 30 + 40 * losses + 10 * builds
        assert record.propagations == 30 + 40 * losses + 2 * 10 * record.iterations
    assert optimizer.propagations == sum(record.propagations for record in optimizer.history)


def test_stochastic_steps_learn() -> None:
    problem = Classified(examples=200)
    optimizer = TRCG(
        problem.model.parameters(),
        examples=200,
        curvature="ggn",
        gradient_sample=100,
        hessian_sample=0.2,
        ratio_sample="gradient",
        radius=1.0,
    )
    start = float(problem(None)[0])
    for _ in range(25):
        optimizer.step(problem)
    assert float(problem(None)[0]) < 0.2 * start


def test_chunks_make_the_same_step() -> None:
    results = []
    for chunk_size in (None, 7):
        problem = Classified(examples=40)
        optimizer = TRCG(problem.model.parameters(), examples=40, curvature="ggn", chunk_size=chunk_size)
        for _ in range(4):
            optimizer.step(problem)
        results.append(torch.cat([p.detach().flatten() for p in problem.model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)


def test_the_region_is_that_of_the_preconditioners_norm() -> None:
    problem = Classified(examples=40)
    parameters = list(problem.model.parameters())
    n = sum(p.numel() for p in parameters)
    root = torch.randn(n, n, dtype=torch.float64)
    inverse = root @ root.mT / n + torch.eye(n, dtype=torch.float64)
    start = torch.cat([p.detach().flatten() for p in parameters])
    optimizer = TRCG(parameters, examples=40, radius=0.1, preconditioner=inverse)
    optimizer.step(problem)
    record = last(optimizer)
    assert record.status == "boundary"
    step = torch.cat([p.detach().flatten() for p in parameters]) - start
    assert float(step @ torch.linalg.solve(inverse, step)) ** 0.5 == pytest.approx(record.attempts[-1].radius)
    assert record.step_norm == pytest.approx(float(step.norm()))


def test_kfac_saves_iterations_of_conjugate_gradients() -> None:
    # Linear regression on badly scaled inputs, where K-FAC's matrix is the Gauss-Newton matrix.
    x = torch.randn(200, 60, dtype=torch.float64) * torch.logspace(-1, 1, 60, dtype=torch.float64)
    y = x @ torch.randn(60, 3, dtype=torch.float64)
    iterations = []
    for preconditioned in (False, True):
        torch.manual_seed(1)
        model = nn.Linear(60, 3, dtype=torch.float64)
        made: list[int] = []

        def inverse(model: nn.Module = model, made: list[int] = made) -> Any:
            made.append(len(made))
            return kronfac.operators.kfac(model, "gaussian", (x, y), kind="exact").inverse(1e-8)

        def closure(_: Tensor | None, model: nn.Module = model) -> tuple[Tensor, Tensor]:
            out = model(x)
            return 0.5 * (out - y).square().sum(1).mean(), out

        optimizer = TRCG(
            model.parameters(),
            curvature="ggn",
            radius=1e3,
            max_radius=1e3,
            tolerance=1e-6,
            max_iterations=500,
            preconditioner=inverse if preconditioned else None,
            preconditioner_every=2,
        )
        for _ in range(3 if preconditioned else 1):
            optimizer.step(closure)
        assert len(made) == (2 if preconditioned else 0)
        iterations.append(optimizer.history[0].iterations)
        assert optimizer.history[0].status == "interior"
    assert iterations[1] <= 3 < 20 < iterations[0]


@pytest.mark.parametrize(
    ("preconditioner", "error", "message"),
    [
        (lambda: torch.eye(3), ValueError, r"preconditioner: expected an operator \(2, 2\), got shape \(3, 3\)"),
        (lambda: 3, TypeError, "preconditioner: expected an operator with `@`, got int"),
        (-torch.eye(2).double(), ValueError, "preconditioner: expected a positive definite one"),
        (
            kronfac.operators.kfac(nn.Linear(1, 1).double(), "gaussian", (torch.ones(2, 1).double(),) * 2).inverse(1.0),
            ValueError,
            "expected an operator over the optimizer's parameters in their order, got one over weight, bias",
        ),
    ],
)
def test_preconditioners_that_do_not_fit(preconditioner: Any, error: type[Exception], message: str) -> None:
    w = point(1.0, 1.0)
    optimizer = TRCG([w], preconditioner=preconditioner)
    with pytest.raises(error, match=message):
        optimizer.step(lambda _: w.square().sum())
    assert w.tolist() == [1.0, 1.0]
    assert optimizer.steps == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"radius": 0.0}, ValueError, "radius: expected a number > 0"),
        ({"radius": 30.0}, ValueError, "radius: expected at most max_radius=20.0, got 30.0"),
        ({"radius": "5"}, TypeError, "radius: expected a number"),
        ({"radius_rule": "best"}, ValueError, "radius_rule: expected one of 'xu', 'classical', got 'best'"),
        ({"radius_rule": "classical", "gamma1": 2.0}, ValueError, "gamma1: expected None with radius_rule='classical'"),
        ({"eta1": 1e-5}, ValueError, "eta1: expected at least eta2=0.0001, got 1e-05"),
        ({"gamma2": 3.0}, ValueError, "gamma1: expected at least gamma2=3.0, got 2.0"),
        ({"eta2": 0.25}, ValueError, "eta2: expected a number >= 0 and < 0.25"),
        ({"tolerance": 0.0}, ValueError, "tolerance: expected a number > 0"),
        ({"max_iterations": 0}, ValueError, "max_iterations: expected an integer >= 1, got 0"),
        ({"max_rejections": -1}, ValueError, "max_rejections: expected an integer >= 0"),
        ({"keep_iterates": 1.5}, TypeError, "keep_iterates: expected an integer"),
        ({"preconditioner": 3}, TypeError, "preconditioner: expected an operator with `@`"),
        ({"preconditioner_every": 0}, ValueError, "preconditioner_every: expected an integer >= 1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^TRCG: {message}"):
        TRCG([point(1.0)], **options)
