from __future__ import annotations

import copy
import dataclasses
import functools
import io
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kronfac.datasets.digits import load_digits
from kronfac.optim.newton.line_search import armijo
from kronfac.optim.newton.newton_minres import NewtonMINRES
from tests.linalg.matrices import with_spectrum


def parameter(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def mlp(seed: int = 0, width: int = 8) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)).double()


def data(size: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=generator, dtype=torch.float64)
    return x, (x[:, :3] + 0.3 * x[:, 3:] ** 2).argmax(1)


class Classification:
    """The mean loss of a model over sets of examples, with a count of those it was asked for."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, outputs: bool = False) -> None:
        self.model, self.x, self.y, self.outputs = model, x, y, outputs
        self.calls: list[int] = []

    def __call__(self, indices: Tensor | None) -> Any:
        x, y = (self.x, self.y) if indices is None else (self.x[indices], self.y[indices])
        self.calls.append(len(x))
        outputs = self.model(x)
        loss = F.cross_entropy(outputs, y)
        return (loss, outputs) if self.outputs else loss


# ---------------------------------------------------------------------- line search


def search(function: Callable[[float], float], slope: float, forward: bool, **options: Any) -> tuple[Any, list[float]]:
    lengths: list[float] = []

    def evaluate(length: float) -> float:
        lengths.append(length)
        return function(length)

    settings = {"decrease": 1e-4, "shrink": 0.5, "max_evaluations": 50} | options
    return armijo(evaluate, function(0.0), slope, forward=forward, **settings), lengths


def test_line_search_goes_back_until_the_decrease_suffices() -> None:
    result, lengths = search(lambda a: -a + 10 * a * a, -1.0, forward=False)
    assert lengths == [1.0, 0.5, 0.25, 0.125, 0.0625]
    assert (result.length, result.evaluations) == (0.0625, 5)
    assert result.loss == -0.0625 + 10 * 0.0625**2
    # a share of ½ of the slope asks for a <= 0.05
    assert search(lambda a: -a + 10 * a * a, -1.0, forward=False, decrease=0.5)[0].length == 0.03125
    assert search(lambda a: -a + 0.1 * a * a, -1.0, forward=False)[1] == [1.0]
    thirds = search(lambda a: -a + 10 * a * a, -1.0, forward=False, shrink=1 / 3)[0]
    assert thirds.length == pytest.approx(1 / 27)


def test_line_search_goes_forward_along_nonpositive_curvature() -> None:
    # F falls until 33, and the condition holds below 66.7
    result, lengths = search(lambda a: -a + 0.015 * a * a, -1.0, forward=True)
    assert lengths == [2.0**k for k in range(8)]
    assert (result.length, result.evaluations) == (32.0, 8)
    assert result.loss == -32 + 0.015 * 32**2
    assert search(lambda a: -a + 10 * a * a, -1.0, forward=True)[0].length == 0.0625
    bottomless, lengths = search(lambda a: -a, -1.0, forward=True, max_evaluations=7)
    assert (bottomless.length, len(lengths)) == (64.0, 7)
    wall = search(lambda a: -a if a < 10 else -math.inf, -1.0, forward=True)[0]
    assert (wall.length, wall.loss) == (8.0, -8.0)


def _only_at_zero(elsewhere: float, length: float) -> float:
    return elsewhere if length else 3.0


def test_line_search_without_an_answer() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        result, lengths = search(functools.partial(_only_at_zero, bad), -1.0, forward=False, max_evaluations=9)
        assert (result.length, result.loss, len(lengths)) == (0.0, 3.0, 9)
    assert search(lambda a: -a if a < 0.3 else math.nan, -1.0, forward=True)[0].length == 0.25
    for slope in (0.0, 1.0, math.nan):
        assert search(lambda a: -a, slope, forward=True)[1] == []


def test_line_search_does_not_compare_rounding_errors() -> None:
    rising = search(lambda a: 1.0 + (1e-16 if a else 0.0) * 3, -1e-17, forward=False, noise=1e-15)
    assert (rising[0].length, rising[1]) == (0.0, [1.0])
    level = search(lambda a: 1.0, -1e-17, forward=False, noise=1e-15)
    assert (level[0].length, level[1]) == (1.0, [1.0])
    # forward the first lengths say nothing, the later ones do
    forward = search(lambda a: 1.0 - 1e-17 * a, -1e-17, forward=True, noise=1e-15, max_evaluations=40)
    assert forward[0].length == 2.0**39


# ---------------------------------------------------------------------- functions


def test_a_convex_quadratic_in_one_step() -> None:
    H, b = with_spectrum(np.geomspace(0.1, 10, 12)), torch.linspace(-1, 1, 12, dtype=torch.float64)
    first, second = parameter(*([0.3] * 4)), parameter(*([-0.2] * 8))

    def closure(indices: Tensor | None) -> Tensor:
        assert indices is None
        w = torch.cat([first, second])
        return 0.5 * w @ H @ w - b @ w

    optimizer = NewtonMINRES([first, second], tolerance=1e-11)
    start = float(closure(None).detach())
    assert float(optimizer.step(closure)) == start
    torch.testing.assert_close(torch.cat([first, second]).detach(), torch.linalg.solve(H, b), rtol=1e-8, atol=1e-8)
    step = optimizer.last_step
    assert step is not None
    assert (step.kind, step.status, step.step_size, step.accepted) == ("solution", "converged", 1.0, True)
    assert step.loss == start
    assert step.loss_after == pytest.approx(float(closure(None).detach()), rel=1e-14)
    assert step.propagations == optimizer.propagations == 2 + 2 * step.iterations


def rosenbrock(w: Tensor) -> Tensor:
    x, y = w
    value: Tensor = (1 - x) ** 2 + 100 * (y - x**2) ** 2
    return value


def beale(w: Tensor) -> Tensor:
    x, y = w
    value: Tensor = (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2
    return value


@pytest.mark.parametrize(
    ("function", "start", "minimum"),
    [
        (rosenbrock, (-1.2, 1.0), (1.0, 1.0)),
        (rosenbrock, (0.0, 3.0), (1.0, 1.0)),
        (beale, (1.0, 1.0), (3.0, 0.5)),
        (beale, (2.0, -0.5), (3.0, 0.5)),
    ],
)
def test_test_functions(function: Callable[[Tensor], Tensor], start: Any, minimum: Any) -> None:
    w = parameter(*start)
    optimizer = NewtonMINRES([w])
    losses = [float(optimizer.step(lambda _: function(w))) for _ in range(60)]
    assert all(after <= before for before, after in pairwise(losses))
    torch.testing.assert_close(w.detach(), torch.tensor(minimum, dtype=torch.float64), rtol=0, atol=1e-6)
    assert losses[-1] < 1e-12


@pytest.mark.parametrize("scale", [1e-3, 1e-7])
def test_a_saddle_from_its_stationary_point_with_noise(scale: float) -> None:
    values = torch.tensor([-0.5, 0.2, 1.0, 3.0, -0.1, 0.7], dtype=torch.float64)
    # every local minimum of ½ wᵀΛw + ¼‖w‖⁴ is a global one, -λ²/4 with λ the least eigenvalue
    w = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).mul_(scale).requires_grad_()

    def closure(indices: Tensor | None) -> Tensor:
        return 1.0 + 0.5 * values @ w.square() + 0.25 * w.square().sum() ** 2

    optimizer = NewtonMINRES([w])
    for _ in range(40):
        optimizer.step(closure)
    kinds = [step.kind for step in optimizer.history]
    assert "nonpositive" in kinds
    assert max(step.step_size for step in optimizer.history if step.kind == "nonpositive") > 1
    assert kinds[-1] == "solution"
    assert float(closure(None).detach()) == pytest.approx(1 - 0.25**2, abs=1e-9)
    assert abs(float(w[0].detach())) == pytest.approx(math.sqrt(0.5), abs=1e-5)


def test_nothing_moves_at_a_stationary_point() -> None:
    w = parameter(0.0, 0.0)
    optimizer = NewtonMINRES([w])
    assert float(optimizer.step(lambda _: 2 + w[0] ** 2 - w[1] ** 2)) == 2.0
    step = optimizer.last_step
    assert step is not None
    assert (step.accepted, step.step_size, step.line_search_evaluations, step.propagations) == (False, 0.0, 0, 1)
    assert w.detach().tolist() == [0.0, 0.0]


# ---------------------------------------------------------------------- networks


def test_full_sample_training_of_the_digits_falls_in_every_step() -> None:
    digits = load_digits()
    x, y = digits.train.inputs.flatten(1).double(), digits.train.targets
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)).double()
    optimizer = NewtonMINRES(model.parameters(), examples=len(x))
    closure = Classification(model, x, y)
    losses = [float(optimizer.step(closure)) for _ in range(25)]
    assert all(step.accepted for step in optimizer.history)
    assert all(step.loss_after < step.loss for step in optimizer.history)
    assert losses[1:] == pytest.approx([step.loss_after for step in optimizer.history][:-1], rel=1e-9)
    assert losses[0] > 2
    assert losses[-1] < 2e-3
    assert {step.kind for step in optimizer.history} == {"solution", "nonpositive"}


@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
def test_gauss_newton_and_fisher_steps(curvature: str) -> None:
    model = mlp()
    likelihood = "categorical" if curvature == "fisher" else None
    optimizer = NewtonMINRES(model.parameters(), examples=60, curvature=curvature, likelihood=likelihood)
    closure = Classification(model, *data(), outputs=True)
    losses = [float(optimizer.step(closure)) for _ in range(10)]
    assert all(after < before for before, after in pairwise(losses))
    assert losses[-1] < 0.3 * losses[0]


def test_propagations_are_those_of_the_closure() -> None:
    model = mlp()
    closure = Classification(model, *data())
    optimizer = NewtonMINRES(
        model.parameters(), examples=60, gradient_sample=0.5, hessian_sample=12, line_search_sample=20, chunk_size=12
    )
    total = 0
    for _ in range(4):
        closure.calls.clear()
        optimizer.step(closure)
        step = optimizer.last_step
        assert step is not None
        assert (step.gradient_examples, step.hessian_examples, step.ratio_examples) == (30, 12, 20)
        assert max(closure.calls) == 12
        # one evaluation builds the graph that all products are taken from
        assert sum(closure.calls) == 30 + 12 + 20 * (1 + step.line_search_evaluations)
        assert step.propagations == 30 + 2 * 12 * step.iterations + 20 * (1 + step.line_search_evaluations)
        total += step.propagations
    assert optimizer.propagations == total
    paired = NewtonMINRES(model.parameters(), examples=60, gradient_sample=30)
    closure.calls.clear()
    paired.step(closure)
    assert paired.last_step is not None
    assert closure.calls == [30, 60] + [30] * paired.last_step.line_search_evaluations


def test_chunks_change_nothing() -> None:
    found = []
    for size in (None, 17):
        model = mlp()
        optimizer = NewtonMINRES(model.parameters(), examples=60, chunk_size=size)
        for _ in range(3):
            optimizer.step(Classification(model, *data()))
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-8)


def stochastic(model: nn.Module) -> NewtonMINRES:
    return NewtonMINRES(
        model.parameters(), examples=60, gradient_sample=0.6, hessian_sample=0.3, line_search_sample=0.5, seed=4
    )


def test_resuming_is_bit_for_bit() -> None:
    model = mlp()
    optimizer = stochastic(model)
    for _ in range(3):
        optimizer.step(Classification(model, *data()))
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other = mlp(seed=9)
    other.load_state_dict(weights)
    resumed = NewtonMINRES(other.parameters(), examples=60, tolerance=0.7)
    resumed.load_state_dict(state)
    for _ in range(4):
        optimizer.step(Classification(model, *data()))
        resumed.step(Classification(other, *data()))
        assert dataclasses.asdict(optimizer.last_step) == dataclasses.asdict(resumed.last_step)  # type: ignore[arg-type]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert resumed.propagations == optimizer.propagations
    assert resumed.steps == 7


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    model = mlp()
    optimizer = stochastic(model)
    closure = Classification(model, *data())
    optimizer.step(closure)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    record = optimizer.last_step
    # of the gradient, in the graph of the products, at the start of the line search
    for healthy in (0, 1, 2):
        left = [healthy]

        def failing(indices: Tensor | None, left: list[int] = left) -> Any:
            left[0] -= 1
            loss = closure(indices)
            return loss if left[0] >= 0 else loss * math.nan

        with pytest.raises(ValueError, match=r"NewtonMINRES.step: closure: expected a finite loss"):
            optimizer.step(failing)
        for name, value in model.state_dict().items():
            assert torch.equal(value, weights[name])
        after = optimizer.state_dict()
        assert torch.equal(after["kronfac"].pop("generator"), state["kronfac"]["generator"])
        assert after["kronfac"] == {k: v for k, v in state["kronfac"].items() if k != "generator"}
        assert optimizer.last_step is record


def test_a_line_search_that_finds_nothing_is_recorded() -> None:
    w = parameter(1.0, 2.0)
    calls = [0]

    def closure(indices: Tensor | None) -> Tensor:
        calls[0] += 1
        loss = w.square().sum()
        return loss if calls[0] <= 2 else loss * math.inf

    optimizer = NewtonMINRES([w], max_evaluations=5)
    optimizer.step(closure)
    step = optimizer.last_step
    assert step is not None
    assert (step.accepted, step.step_size, step.step_norm, step.line_search_evaluations) == (False, 0.0, 0.0, 5)
    assert step.loss_after == step.loss == 5.0
    assert w.detach().tolist() == [1.0, 2.0]


def test_refusals() -> None:
    w = parameter(1.0)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"tolerance": 0.0}, ValueError, "NewtonMINRES: tolerance: expected a number > 0"),
        ({"decrease": 1.0}, ValueError, "decrease: expected a number > 0 and < 1"),
        ({"shrink": 0}, ValueError, "shrink: expected a number > 0 and < 1"),
        ({"max_iterations": 0}, ValueError, "max_iterations: expected an integer >= 1"),
        ({"max_evaluations": 1.5}, TypeError, "max_evaluations: expected an integer"),
        ({"line_search_sample": 0.5}, ValueError, "line_search_sample: expected None without examples="),
        ({"line_search_sample": 11, "examples": 10}, ValueError, "line_search_sample: expected at most examples=10"),
        ({"line_search_sample": "hessian"}, ValueError, 'line_search_sample: expected "gradient" or a sample size'),
        ({"hessian_sample": 0.5}, ValueError, "hessian_sample: expected None without examples="),
        ({"curvature": "newton"}, ValueError, "curvature: expected"),
    ]
    for options, error, match in cases:
        with pytest.raises(error, match=match):
            NewtonMINRES([w], **options)
    with pytest.raises(ValueError, match="ratio_sample: not an option"):
        NewtonMINRES([{"params": [w], "ratio_sample": None}])
    with pytest.raises(TypeError, match="closure: expected a callable"):
        NewtonMINRES([w]).step()
