"""Hessian-free steps against dense matrices of torch.func, solved problems, and what a step leaves behind."""

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
from torch.nn import functional

from kronfac.linalg.truncated_cg import Iterate
from kronfac.optim.newton.gauss_newton import GaussNewtonCG
from kronfac.optim.newton.hessian_free import best_iterate, next_damping
from tests.optim.models import same_tree
from tests.optim.newton.closures import (
    LargestTensor,
    broken_after,
    classifier,
    cross_entropy,
    dense_ggn,
    dense_hessian,
    flat,
    gradient_of,
    records,
)

EXACT: dict[str, Any] = {"tolerance": 1e-11, "max_iterations": 500, "backtrack": False, "decay": 0.0}


@pytest.mark.parametrize(
    ("curvature", "likelihood", "damping"),
    [("ggn", None, 0.1), ("ggn", None, 1e-3), ("fisher", "categorical", 0.1), ("hessian", None, 3.0)],
)
def test_the_step_is_the_dense_solution(curvature: str, likelihood: str | None, damping: float) -> None:
    model, x, y = classifier(3, 4, 3)
    before, g = flat(model), gradient_of(model, x, y)
    dense = dense_hessian(model, x, y) if curvature == "hessian" else dense_ggn(model, x)
    expected = torch.linalg.solve(dense + damping * torch.eye(len(g), dtype=torch.float64), -g)
    optimizer = GaussNewtonCG(model.parameters(), curvature=curvature, likelihood=likelihood, damping=damping, **EXACT)
    loss = optimizer.step(cross_entropy(model, x, y))
    record = optimizer.last_step
    assert record is not None
    assert (record.status, record.outcome, record.accepted) == ("converged", "accepted", True)
    torch.testing.assert_close(flat(model) - before, expected * record.length, rtol=1e-6, atol=1e-9)
    assert record.step_norm == pytest.approx(float(expected.norm()) * record.length, rel=1e-6)
    assert float(loss) == record.loss
    # ρ by the model without the damping
    with torch.no_grad():
        for p, part in zip(
            model.parameters(), (before + expected).split([p.numel() for p in model.parameters()]), strict=True
        ):
            p.copy_(part.view(p.shape))
    decrease = record.loss - float(functional.cross_entropy(model(x), y).detach())
    promised = -float(g @ expected + 0.5 * expected @ dense @ expected)
    assert record.ratio == pytest.approx(decrease / promised, rel=1e-5)


def test_gaussian_fisher_is_the_gauss_newton_matrix_of_least_squares() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(30, 3, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    twin = copy.deepcopy(model)

    def closure(net: nn.Module) -> Any:
        def evaluate(indices: Tensor | None) -> tuple[Tensor, Tensor]:
            outputs = net(x)
            return functional.mse_loss(outputs, y, reduction="sum") / (2 * len(x)), outputs

        return evaluate

    for net, options in ((model, {"curvature": "ggn"}), (twin, {"curvature": "fisher", "likelihood": "gaussian"})):
        optimizer = GaussNewtonCG(net.parameters(), **options, **EXACT)
        for _ in range(3):
            optimizer.step(closure(net))
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-7, atol=1e-9)


def test_a_convex_quadratic_is_solved() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((20, 20)))[0]
    matrix = torch.from_numpy(basis @ np.diag(np.logspace(-2, 2, 20)) @ basis.T)
    b = torch.from_numpy(rng.standard_normal(20))
    theta = nn.Parameter(torch.zeros(20, dtype=torch.float64))
    optimizer = GaussNewtonCG([theta], curvature="hessian")
    for _ in range(30):
        optimizer.step(lambda _: 0.5 * theta @ matrix @ theta - b @ theta)
    exact = torch.linalg.solve(matrix, b)
    torch.testing.assert_close(theta.detach(), exact, rtol=1e-5, atol=1e-5)
    assert optimizer.last_step.damping < 0.1  # the model is exact, so that damping only falls
    ratios = records(optimizer.history, "ratio")[:8]  # later ones are quotients of small differences
    assert ratios == pytest.approx([1.0] * 8, abs=1e-6)


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_logistic_regression_ends_where_scipy_does(curvature: str) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    torch.manual_seed(0)
    x = torch.randn(80, 5, dtype=torch.float64)
    y = (x[:, 0] + 0.5 * torch.randn(80, dtype=torch.float64) > 0).double()
    theta = nn.Parameter(torch.zeros(5, dtype=torch.float64))

    def closure(indices: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = x @ theta
        return functional.binary_cross_entropy_with_logits(logits, y), logits

    def reference(vector: Any) -> tuple[float, Any]:
        v = torch.tensor(vector, requires_grad=True)
        loss = functional.binary_cross_entropy_with_logits(x @ v, y)
        loss.backward()
        return loss.item(), v.grad.numpy()

    optimizer = GaussNewtonCG([theta], curvature=curvature)
    for _ in range(40):
        optimizer.step(closure)
    best = optimize.minimize(reference, np.zeros(5), jac=True, method="BFGS", options={"gtol": 1e-10})
    np.testing.assert_allclose(theta.detach().numpy(), best.x, rtol=1e-6, atol=1e-7)
    assert optimizer.last_step.gradient_norm < 1e-8


@pytest.mark.parametrize(
    ("ratio", "factor"),
    [(-math.inf, 1.5), (0.249, 1.5), (0.25, 1.0), (0.5, 1.0), (0.75, 1.0), (0.751, 1 / 1.5), (2.0, 1 / 1.5)],
)
def test_damping_rule_of_martens(ratio: float, factor: float) -> None:
    bounds = {"min_damping": 1e-3, "max_damping": 1e3}
    assert next_damping(0.3, ratio, bounds) == pytest.approx(0.3 * factor)
    assert next_damping(1e3, ratio, bounds) <= 1e3
    assert next_damping(1e-3, ratio, bounds) >= 1e-3


def test_damping_follows_the_ratio() -> None:
    model, x, y = classifier(4, 6, 3)
    optimizer = GaussNewtonCG(
        model.parameters(), examples=40, hessian_sample=5, damping=1e-4, min_damping=1e-5, max_iterations=20
    )
    used = 1e-4
    seen = set()
    for _ in range(15):
        optimizer.step(cross_entropy(model, x, y))
        record = optimizer.last_step
        assert record.used_damping == used
        factor = 1.0
        if record.outcome != "unresolved":
            factor = 1.5 if record.ratio < 0.25 else 1 / 1.5 if record.ratio > 0.75 else 1.0
        seen.add(factor)
        used = max(used * factor, 1e-5)
        assert record.damping == pytest.approx(used)
        used = record.damping
    assert len(seen) >= 2


@pytest.mark.parametrize("options", [{}, {"curvature": "hessian"}, {"backtrack": False}, {"decay": 0.0}], ids=str)
def test_the_loss_never_rises_and_ends_near_zero(options: dict[str, Any]) -> None:
    model, x, y = classifier(4, 8, 3)
    closure = cross_entropy(model, x, y)
    optimizer = GaussNewtonCG(model.parameters(), max_iterations=30, **options)
    losses = [float(optimizer.step(closure)) for _ in range(20)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < 0.1 * losses[0]
    for record, following in zip(list(optimizer.history), losses[1:], strict=False):
        assert record.loss_after == pytest.approx(following, rel=1e-12)
    assert any(record.warm for record in optimizer.history) == (options.get("decay") != 0.0)


class Losses:
    """Stands for an evaluation: the loss of a step is looked up by its first entry."""

    def __init__(self, losses: dict[int, float]) -> None:
        self.losses = losses

    def loss(self, sample: Any, step: Tensor) -> float:
        return self.losses[int(step[0])]


@pytest.mark.parametrize(
    ("losses", "chosen", "evaluated"),
    [
        ([5.0, 4.0, 1.0, 2.0, 3.0], 2, 4),  # down to the first that is worse
        ([1.0, 2.0, 3.0, 4.0, 0.5], 4, 2),
        ([1.0, 2.0, math.nan, math.inf, math.nan], 0, 5),  # past all that are not finite
        ([1.0, math.nan, 3.0, 4.0, 5.0], 2, 4),
        ([math.inf] * 5, 0, 5),
        ([3.0], 0, 1),
    ],
)
def test_backtracking_goes_back_as_long_as_the_loss_falls(losses: list[float], chosen: int, evaluated: int) -> None:
    iterates = [Iterate(torch.tensor([float(place)]), place, -1.0, 1.0) for place in range(len(losses))]
    trial = best_iterate(Losses(dict(enumerate(losses))), None, iterates)  # type: ignore[arg-type]
    assert trial.iterate is iterates[chosen]
    assert (trial.length, trial.losses) == (1.0, evaluated)
    assert trial.loss == losses[chosen]


def test_an_earlier_iterate_is_taken_where_the_last_fits_its_sample_too_well() -> None:
    taken = 0
    for seed in range(4):
        model, x, y = classifier(4, 6, 3, examples=60, seed=seed)
        before = flat(model)
        optimizer = GaussNewtonCG(model.parameters(), examples=60, hessian_sample=4, damping=1e-2, max_iterations=30)
        optimizer.step(cross_entropy(model, x, y))
        record = optimizer.last_step
        taken += record.iterate < record.iterations
        assert record.accepted
        assert float(functional.cross_entropy(model(x), y).detach()) == pytest.approx(record.loss_after, rel=1e-12)
        assert float((flat(model) - before).norm()) == pytest.approx(record.step_norm, rel=1e-9)
    assert taken


def test_a_step_that_is_too_long_is_shortened() -> None:
    """F = log cosh: Newton's step from 2 overshoots far, where the damping is small."""
    theta = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))

    def closure(indices: Tensor | None) -> Tensor:
        return torch.log(torch.cosh(theta)).sum()

    optimizer = GaussNewtonCG([theta], curvature="hessian", damping=1e-6)
    start = float(closure(None).detach())
    optimizer.step(closure)
    record = optimizer.last_step
    assert record.outcome == "accepted"
    assert 0 < record.length < 1
    assert record.length == pytest.approx(0.8 ** (record.losses - 1))
    newton = math.sinh(2) * math.cosh(2)
    assert float(theta.detach()) == pytest.approx(2 - record.length * newton, rel=1e-4)
    slope = -newton * math.tanh(2)
    assert float(closure(None).detach()) <= start + 1e-2 * record.length * slope
    longer = abs(2 - record.length / 0.8 * newton)
    assert math.log(math.cosh(longer)) > start + 1e-2 * record.length / 0.8 * slope  # the longer one did not pass
    assert record.damping == pytest.approx(1.5e-6)

    refused = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = GaussNewtonCG([refused], curvature="hessian", damping=1e-6, max_shortenings=1)
    optimizer.step(lambda _: torch.log(torch.cosh(refused)).sum())
    assert (optimizer.last_step.outcome, optimizer.last_step.accepted) == ("rejected", False)
    assert float(refused.detach()) == 2.0


def test_infinite_losses_shorten_the_step_too() -> None:
    theta = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = GaussNewtonCG([theta], curvature="hessian", damping=1e-8)
    for _ in range(30):  # -log θ + θ²: Newton's step from large θ may leave the domain
        optimizer.step(lambda _: (theta**2 - 10 * torch.log(theta)).sum())
    assert float(theta.detach()) == pytest.approx(math.sqrt(5), rel=1e-6)

    theta = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    optimizer = GaussNewtonCG([theta], curvature="hessian", damping=1e-8)
    optimizer.step(lambda _: (-torch.log(4 - theta) * 0.01 + theta).sum() if theta > -5 else (theta * math.inf).sum())
    assert optimizer.last_step.ratio == -math.inf
    assert optimizer.last_step.accepted
    assert -5 < float(theta.detach()) < 3


def test_no_positive_curvature_at_all_raises_the_damping_beyond_it() -> None:
    theta = nn.Parameter(torch.tensor([0.3, 0.1], dtype=torch.float64))

    def closure(indices: Tensor | None) -> Tensor:
        return -2 * theta[0] ** 2 - 3 * theta[1] ** 2 + (theta**4).sum()

    optimizer = GaussNewtonCG([theta], curvature="hessian", damping=1e-3)
    losses = [float(optimizer.step(closure)) for _ in range(40)]
    first = optimizer.history[0]
    assert first.accepted
    assert first.used_damping > 2 * 2  # at least twice a Rayleigh quotient between -6 and -2
    assert all(later <= earlier for earlier, later in itertools.pairwise(losses))
    np.testing.assert_allclose(theta.detach().numpy(), [1.0, math.sqrt(1.5)], rtol=1e-6)


def test_a_stationary_point_is_left_alone() -> None:
    theta = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = GaussNewtonCG([theta], curvature="hessian")
    optimizer.step(lambda _: (theta**2).sum())
    record = optimizer.last_step
    assert (record.outcome, record.ratio, record.iterate, record.losses) == ("no_decrease", None, None, 0)
    assert not record.accepted
    assert record.damping == 1.0


# ------------------------------------------------------------------ samples, preconditioner, cost


def test_costs_are_counted() -> None:
    model, x, y = classifier(4, 6, 3, examples=40)
    optimizer = GaussNewtonCG(
        model.parameters(), examples=40, gradient_sample=0.5, hessian_sample=10, ratio_sample=30, chunk_size=7
    )
    total = 0
    for _ in range(3):
        optimizer.step(cross_entropy(model, x, y))
        record = optimizer.last_step
        assert (record.gradient_examples, record.hessian_examples, record.ratio_examples) == (20, 10, 30)
        # the warm start costs a product, whether it is used or not; the loss before is taken on the ratio's sample
        products = record.iterations + (record.step > 0) + (record.status == "nonpositive_curvature")
        assert record.propagations == 20 + 2 * 10 * products + 30 * (1 + record.losses)
        total += record.propagations
    assert optimizer.propagations == total


def test_chunks_change_nothing_but_the_last_digits() -> None:
    ends = []
    for chunk in (None, 7):
        model, x, y = classifier(4, 6, 3, examples=40)
        optimizer = GaussNewtonCG(model.parameters(), examples=40, hessian_sample=0.5, chunk_size=chunk)
        for _ in range(4):
            optimizer.step(cross_entropy(model, x, y))
        ends.append(flat(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-8)


def test_a_preconditioner_saves_iterations_and_changes_no_solution() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    scales = torch.logspace(-2, 2, 30, dtype=torch.float64)
    matrix = torch.diag(scales) + 1e-3 * torch.from_numpy(basis @ basis.T)
    b = torch.from_numpy(rng.standard_normal(30))
    results = []
    for preconditioner in (None, torch.diag(1 / (scales + 1e-3)), lambda: torch.diag(1 / (scales + 1e-3))):
        theta = nn.Parameter(torch.zeros(30, dtype=torch.float64))
        optimizer = GaussNewtonCG([theta], curvature="hessian", damping=1e-3, preconditioner=preconditioner, **EXACT)
        optimizer.step(lambda _, theta=theta: 0.5 * theta @ matrix @ theta - b @ theta)
        results.append((optimizer.last_step.iterations, theta.detach()))
    for iterations, solution in results[1:]:
        assert iterations < results[0][0] / 3
        torch.testing.assert_close(solution, results[0][1], rtol=1e-5, atol=1e-7)


def test_a_preconditioner_is_made_every_so_many_steps() -> None:
    model, x, y = classifier(3, 4, 3)
    size = len(flat(model))
    made = []

    def source() -> Tensor:
        made.append(len(made))
        return torch.eye(size, dtype=torch.float64)

    optimizer = GaussNewtonCG(model.parameters(), preconditioner=source, preconditioner_every=3)
    for _ in range(7):
        optimizer.step(cross_entropy(model, x, y))
    assert len(made) == 3
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step(cross_entropy(model, x, y))
    assert len(made) == 4


def test_vectors_only() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 3))
    x, y = torch.randn(8, 30), torch.randint(3, (8,))
    size = sum(p.numel() for p in model.parameters())
    optimizer = GaussNewtonCG(model.parameters(), max_iterations=20)
    with LargestTensor() as largest:
        for _ in range(2):
            optimizer.step(cross_entropy(model, x, y))
    assert size <= largest.entries <= 2 * size
    assert sum(t.numel() for t in optimizer.state_dict()["kronfac"]["values"].values() if isinstance(t, Tensor)) == size


# ------------------------------------------------------------------ transactions and checkpoints


def everything(model: nn.Module, optimizer: GaussNewtonCG) -> Any:
    return copy.deepcopy([model.state_dict(), optimizer.state_dict(), torch.get_rng_state()])


@pytest.mark.parametrize("calls", [0, 1])
def test_a_broken_closure_changes_nothing(calls: int) -> None:
    model, x, y = classifier(4, 6, 3, examples=40)
    optimizer = GaussNewtonCG(model.parameters(), examples=40, hessian_sample=0.3, ratio_sample=0.5)
    closure = cross_entropy(model, x, y)
    optimizer.step(closure)
    before, record = everything(model, optimizer), optimizer.last_step
    with pytest.raises(ValueError, match="finite loss"):
        optimizer.step(broken_after(calls, closure))
    assert same_tree(before, everything(model, optimizer))
    assert optimizer.last_step is record
    optimizer.step(closure)
    assert optimizer.steps == 2


def test_losses_that_are_nan_after_every_step_reject_it() -> None:
    model, x, y = classifier(4, 6, 3)
    optimizer = GaussNewtonCG(model.parameters(), max_shortenings=2)
    before = flat(model)
    closure = cross_entropy(model, x, y)
    optimizer.step(broken_after(2, closure))  # the gradient and the curvature are fine
    record = optimizer.last_step
    assert (record.outcome, record.accepted, record.ratio) == ("rejected", False, -math.inf)
    assert torch.equal(flat(model), before)
    assert record.damping == 1.5


def test_resumes_bit_for_bit() -> None:
    def start() -> tuple[nn.Module, Any, GaussNewtonCG]:
        model, x, y = classifier(4, 6, 3, examples=40)
        optimizer = GaussNewtonCG(
            model.parameters(), examples=40, gradient_sample=0.8, hessian_sample=0.3, ratio_sample="gradient", seed=4
        )
        return model, cross_entropy(model, x, y), optimizer

    model, closure, optimizer = start()
    for _ in range(9):
        optimizer.step(closure)
    other, again, first = start()
    for _ in range(4):
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
    assert list(resumed.history) == list(optimizer.history)[4:]


def test_a_copy_goes_on_alike_and_a_converted_model_goes_on() -> None:
    model, x, y = classifier(4, 6, 3, examples=40)
    optimizer = GaussNewtonCG(
        model.parameters(),
        examples=40,
        hessian_sample=0.3,
        preconditioner=torch.eye(len(flat(model)), dtype=torch.float64),
    )
    for _ in range(3):
        optimizer.step(cross_entropy(model, x, y))
    twin, other = copy.deepcopy((model, optimizer))
    for _ in range(2):
        optimizer.step(cross_entropy(model, x, y))
        other.step(cross_entropy(twin, x, y))
    assert torch.equal(flat(model), flat(twin))
    assert optimizer.last_step == other.last_step
    twin.float()
    before = float(functional.cross_entropy(twin(x.float()), y).detach())
    narrow = GaussNewtonCG(twin.parameters(), examples=40)
    narrow.step(cross_entropy(twin, x.float(), y))
    twin.double()
    narrow.step(cross_entropy(twin, x, y))
    assert narrow.last_step.warm or narrow.last_step.accepted
    assert narrow.last_step.loss_after < before


def test_a_foreign_checkpoint_is_refused() -> None:
    model, x, y = classifier(4, 6, 3)
    optimizer = GaussNewtonCG(model.parameters())
    optimizer.step(cross_entropy(model, x, y))
    good = optimizer.state_dict()
    for change, message in (
        ({"damping": -1.0}, "damping: expected a number > 0"),
        ({"solution": torch.zeros(3)}, r"solution: expected a finite vector"),
        ({"solution": good["kronfac"]["values"]["solution"] * math.nan}, "solution: expected a finite vector"),
        ({"solution": "none"}, "solution: expected a tensor or None"),
    ):
        bad = copy.deepcopy(good)
        bad["kronfac"]["values"].update(change)
        before = everything(model, optimizer)
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(bad)
        assert same_tree(before, everything(model, optimizer))


def test_refusals() -> None:
    theta = [nn.Parameter(torch.ones(2))]
    for options, message in (
        ({"damping": 0.0}, "damping: expected a number > 0"),
        ({"damping": 1e-12}, "damping: expected at least min_damping"),
        ({"min_damping": 2.0, "max_damping": 1.0}, "min_damping: expected at most max_damping"),
        ({"decay": 1.1}, "decay: expected a number >= 0 and <= 1"),
        ({"curvature": "fisher"}, "likelihood"),
        ({"curvature": "kfac"}, "curvature: expected one of"),
        ({"hessian_sample": 0.5}, "hessian_sample: expected None without examples="),
        ({"max_iterations": 0}, "max_iterations: expected an integer >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            GaussNewtonCG(theta, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="preconditioner: expected an operator"):
        GaussNewtonCG(theta, preconditioner=3)
    with pytest.raises(TypeError, match="backtrack: expected True or False"):
        GaussNewtonCG(theta, backtrack=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the outputs"):
        GaussNewtonCG(theta).step(lambda _: (theta[0] ** 2).sum())
    wrong = GaussNewtonCG(theta, curvature="hessian", preconditioner=torch.eye(3))
    with pytest.raises(ValueError, match=r"preconditioner: expected an operator \(2, 2\)"):
        wrong.step(lambda _: (theta[0] ** 2).sum())


def test_digits_are_fitted() -> None:
    pytest.importorskip("sklearn")
    from kronfac.datasets import load_digits

    data = load_digits()
    x, y = data.train.inputs.flatten(1)[:300], data.train.targets[:300]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(x.shape[1], 20), nn.Tanh(), nn.Linear(20, 10))
    optimizer = GaussNewtonCG(model.parameters(), examples=len(x), max_iterations=30)
    losses = [float(optimizer.step(cross_entropy(model, x, y))) for _ in range(12)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < 0.1
    assert all(records(optimizer.history, "accepted"))
