"""The fully adaptive mode against algorithm 2 of Martens & Grosse, and what it must not touch, lose or accept."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from sklearn import datasets
from torch import Tensor, nn
from torch.nn import functional

from kronfac.curvature import Categorical
from kronfac.optim import KFAC
from kronfac.optim.adaptive import Adaptation
from tests.optim.martens_grosse import Dense
from tests.optim.models import equal, frozen_state, images, mlp, same_tree, snapshot, vectors
from tests.optim.test_state import through_a_file


def closure_of(model: nn.Module, optimizer: KFAC, x: Tensor, y: Tensor) -> Callable[[], float]:
    def closure() -> float:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss.item()

    return closure


def matrices(model: nn.Module) -> list[Tensor]:
    return [torch.cat([m.weight, m.bias[:, None]], 1).detach() for m in model.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize(
    "options", [{"damping": 3.0}, {"damping": 1e-2, "weight_decay": 0.01, "inverse_every": 5}], ids=str
)
def test_a_trajectory_is_martens_and_grosses(options: dict[str, Any]) -> None:
    model = mlp(3, 5, 4, 3, dtype=torch.float64)
    optimizer = KFAC(model, adaptive=True, fisher="exact", **options)
    dense = Dense(
        [m.clone() for m in matrices(model)],
        options["damping"],
        options.get("weight_decay", 0.0),
        options.get("inverse_every", 10),
    )
    dampings, gammas = [], []
    for _ in range(45):
        x, y = vectors(20, 3, 3, dtype=torch.float64)
        optimizer.step(closure_of(model, optimizer, x, y))
        dense.step(x, y)
        state = optimizer.adaptation
        assert state is not None
        dampings.append(state.damping)
        gammas.append(state.gamma)
        assert (state.damping, state.gamma) == pytest.approx((dense.damping, dense.gamma), rel=1e-12)
        assert (state.alpha, state.mu) == pytest.approx((dense.alpha, dense.mu), rel=1e-6)
        assert state.rho == (None if dense.rho is None else pytest.approx(dense.rho, rel=1e-6))
        for ours, theirs in zip(matrices(model), dense.weights, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    assert len(set(dampings)) > 2
    assert len(set(gammas)) > 1


def trained(steps: int, **options: Any) -> tuple[nn.Sequential, KFAC]:
    torch.manual_seed(4)
    model = mlp(3, 5, 3)
    optimizer = KFAC(model, adaptive=True, seed=1, **options)
    for _ in range(steps):
        optimizer.step(closure_of(model, optimizer, *vectors(8, 3, 3)))
    return model, optimizer


def adaptation(optimizer: KFAC) -> Adaptation:
    assert optimizer.adaptation is not None
    return optimizer.adaptation


def test_on_a_quadratic_the_reduction_ratio_is_one() -> None:
    """Linear model, squared error, full batch: M is the loss. A large γ makes Δ nearly the gradient, so that five
    steps are not enough and there is something left to reduce.
    """
    model = nn.Linear(6, 3, dtype=torch.float64)
    x, y = torch.randn(30, 6, dtype=torch.float64), torch.randn(30, 3, dtype=torch.float64)
    optimizer = KFAC(model, adaptive=True, likelihood="gaussian", fisher="exact", damping=1e-9)
    adaptation(optimizer).gamma = 100.0
    dampings = []
    for _ in range(5):
        optimizer.step(mean_squares(model, optimizer, x, y))
        dampings.append(adaptation(optimizer).damping)
    assert adaptation(optimizer).rho == pytest.approx(1, abs=1e-6)
    assert dampings == [1e-9] * 5  # 1e-8 is where λ stops falling, and it started below
    assert adaptation(optimizer).model_change < -1e-6  # type: ignore[operator]


def mean_squares(model: nn.Module, optimizer: KFAC, x: Tensor, y: Tensor) -> Callable[[], float]:
    def closure() -> float:
        optimizer.zero_grad()
        loss = 0.5 * (model(x) - y).square().sum() / len(x)
        loss.backward()
        return loss.item()

    return closure


@pytest.mark.parametrize("solve", ["inverse", "eigen"])
def test_with_exact_curvature_one_step_lands_at_the_minimum(solve: str) -> None:
    model = nn.Linear(6, 3, dtype=torch.float64)
    x, y = torch.randn(30, 6, dtype=torch.float64), torch.randn(30, 3, dtype=torch.float64)
    optimizer = KFAC(model, adaptive=True, likelihood="gaussian", fisher="exact", damping=1e-12, solve=solve)
    closure = mean_squares(model, optimizer, x, y)
    optimizer.step(closure)
    assert adaptation(optimizer).alpha == pytest.approx(1, abs=1e-4)
    extended = torch.cat([x, torch.ones(30, 1, dtype=torch.float64)], 1)
    best = torch.linalg.lstsq(extended, y).solution
    torch.testing.assert_close(model.weight.detach(), best[:-1].T, rtol=1e-4, atol=1e-4)
    least = 0.5 * float((extended @ best - y).square().sum()) / 30
    assert closure() == pytest.approx(least, rel=1e-8)


@pytest.mark.parametrize("at", [3, 20, 23])
@pytest.mark.parametrize("options", [{}, {"averaging": 0.99, "weight_decay": 0.01, "solve": "eigen"}], ids=str)
def test_training_continues_bit_for_bit(at: int, options: dict[str, Any]) -> None:
    model, optimizer = trained(at, **options)
    saved = through_a_file([model.state_dict(), optimizer.state_dict()])
    twin = mlp(3, 5, 3)
    other = KFAC(twin, adaptive=True, **options)
    twin.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert other.adaptation == optimizer.adaptation
    for _ in range(7):
        x, y = vectors(8, 3, 3)
        optimizer.step(closure_of(model, optimizer, x, y))
        other.step(closure_of(twin, other, x, y))
    assert equal(snapshot(model), snapshot(twin))
    assert same_tree(optimizer.state_dict(), other.state_dict())


def test_a_checkpoint_that_does_not_fit_is_refused_whole() -> None:
    _, optimizer = trained(6)
    saved = frozen_state(optimizer)
    plain = KFAC(mlp(3, 5, 3), 0.1)
    with pytest.raises(ValueError, match="adaptive: the checkpoint was written with adaptive=True"):
        plain.load_state_dict(saved)
    with pytest.raises(ValueError, match="adaptive: the checkpoint was written without adaptive=True"):
        optimizer.load_state_dict(plain.state_dict())
    for name, value in (("gamma", 0.0), ("gamma", None), ("damping", -1.0), ("rho", "1"), ("alpha", math.nan)):
        broken = copy.deepcopy(saved)
        broken["kronfac"]["adaptive"][name] = value
        with pytest.raises(ValueError, match=rf"adaptive\.{name}: expected a"):
            optimizer.load_state_dict(broken)
    broken = copy.deepcopy(saved)
    del broken["kronfac"]["adaptive"]["mu"]
    with pytest.raises(ValueError, match="'mu' is missing"):
        optimizer.load_state_dict(broken)
    assert same_tree(saved, optimizer.state_dict())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_skips_the_step_and_raises_the_damping(bad: float) -> None:
    model, optimizer = trained(6)
    weights, state = snapshot(model), frozen_state(optimizer)
    x, y = vectors(8, 3, 3)
    x[0, 0] = bad
    damping = adaptation(optimizer).damping
    # After tanh an infinite input leaves the loss finite; its gradient is not.
    culprit = "the loss is" if math.isnan(bad) else "the gradients of 0.weight are"
    with pytest.warns(UserWarning, match=f"KFAC: {culprit} not finite; the step was skipped"):
        optimizer.step(closure_of(model, optimizer, x, y))
    assert equal(weights, snapshot(model))
    assert adaptation(optimizer).damping == optimizer.param_groups[0]["damping"] == damping / (19 / 20) ** 5
    state["kronfac"]["counters"]["skipped_steps"] = 1
    state["kronfac"]["adaptive"]["damping"] = state["param_groups"][0]["damping"] = damping / (19 / 20) ** 5
    # The draws of the statistics are spent, as in every step that is skipped.
    state["kronfac"]["generator"] = optimizer.state_dict()["kronfac"]["generator"]
    assert same_tree(state, optimizer.state_dict())
    optimizer.step(closure_of(model, optimizer, *vectors(8, 3, 3)))
    assert not equal(weights, snapshot(model))


def test_a_loss_that_is_not_finite_after_the_step_takes_it_back() -> None:
    model, optimizer = trained(4)
    weights, state = snapshot(model), frozen_state(optimizer)
    closure = closure_of(model, optimizer, *vectors(8, 3, 3))
    losses = iter([None, math.inf])

    def failing() -> float:
        loss = closure()
        return next(losses) or loss

    damping = adaptation(optimizer).damping
    with pytest.warns(UserWarning, match="KFAC: the loss after the step is not finite; the step was skipped"):
        optimizer.step(failing)
    assert equal(weights, snapshot(model))
    state["kronfac"]["counters"]["skipped_steps"] = 1
    state["kronfac"]["adaptive"]["damping"] = state["param_groups"][0]["damping"] = damping / (19 / 20) ** 5
    state["kronfac"]["generator"] = optimizer.state_dict()["kronfac"]["generator"]
    assert same_tree(state, optimizer.state_dict())


def test_a_closure_that_raises_the_second_time_leaves_the_parameters_where_they_were() -> None:
    model, optimizer = trained(4)
    weights = snapshot(model)
    closure, calls = closure_of(model, optimizer, *vectors(8, 3, 3)), []

    def failing() -> float:
        calls.append(0)
        if len(calls) == 2:
            raise KeyError("no more data")
        return closure()

    with pytest.raises(KeyError):
        optimizer.step(failing)
    assert len(calls) == 2
    assert equal(weights, snapshot(model))


def test_only_the_first_evaluation_counts_and_nothing_else_is_touched() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 3))
    optimizer = KFAC(model, adaptive=True)
    x, y = vectors(8, 3, 3)
    seen: list[Any] = []

    def closure() -> float:
        loss = closure_of(model, optimizer, x, y)()
        seen.append((loss, model[1].running_mean.clone(), [p.grad.clone() for p in model.parameters()]))  # type: ignore[union-attr]
        return loss

    for step in range(1, 11):
        seen.clear()
        torch.manual_seed(step)
        loss = optimizer.step(closure)
        stream = torch.get_rng_state()
        assert len(seen) == (2 if step % 5 == 0 else 1)
        assert loss == seen[0][0]
        torch.manual_seed(step)
        functional.dropout(torch.ones(8, 5), 0.3)
        assert torch.equal(torch.get_rng_state(), stream)  # where one forward leaves it
        assert int(model[1].num_batches_tracked) == step  # type: ignore[arg-type]
        assert torch.equal(model[1].running_mean, seen[0][1])  # type: ignore[arg-type]
        assert equal([p.grad for p in model.parameters()], seen[0][2])  # type: ignore[misc]
    layers = optimizer.state_dict()["kronfac"]["layers"]
    assert {entry["updates"] for entry in layers.values()} == {10}
    assert optimizer._replayer.calls == []  # the batch is let go


def test_parameters_without_an_adapter_move_along_the_gradient_inside_the_model() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.scale  # type: ignore[no-any-return]

    model = Scaled().double()
    with pytest.warns(UserWarning, match="scale"):
        optimizer = KFAC(model, adaptive=True)
    before = model.scale.detach().clone()
    optimizer.step(closure_of(model, optimizer, *vectors(8, 3, 3, torch.float64)))
    torch.testing.assert_close(model.scale.detach(), before - adaptation(optimizer).alpha * model.scale.grad)  # type: ignore[operator]


def test_groups_with_and_without_decay_and_a_later_group() -> None:
    model = mlp(3, 5, 3)
    groups = [
        {"params": [model[0].weight], "weight_decay": 0.1},
        {"params": [model[0].bias]},
    ]
    optimizer = KFAC(model, adaptive=True, params=groups, damping=0.5)
    assert adaptation(optimizer).gamma == pytest.approx(math.sqrt(0.6))
    x, y = vectors(8, 3, 3)
    for _ in range(6):
        optimizer.step(closure_of(model, optimizer, x, y))
    optimizer.add_param_group({"params": model[2].parameters()})
    assert optimizer.param_groups[2]["damping"] == adaptation(optimizer).damping != 0.5
    first = closure_of(model, optimizer, x, y)()
    for _ in range(10):
        last = optimizer.step(closure_of(model, optimizer, x, y))
    assert last < first


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.memory = nn.LSTM(8, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.memory(self.block(self.tokens(x)))[0])  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:KFAC.*covered by no layer adapter")
@pytest.mark.parametrize("kind", ["images", "tokens", "bfloat16", "autocast", "eval mode", "empirical"])
def test_models_of_all_kinds_train(kind: str) -> None:
    options: dict[str, Any] = {"fisher": "empirical"} if kind == "empirical" else {}
    model: nn.Module = mlp(3, 8, 3)
    x, y = vectors(24, 3, 3)
    if kind == "images":
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 5)
        )
        x, y = images(24)
    elif kind == "tokens":
        model, x = Tagger(), torch.randint(7, (6, 5))
        y = x % 3
        options["likelihood"] = Categorical(dim=-1)
    elif kind == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    optimizer = KFAC(model, adaptive=True, damping=0.1, **options)
    if kind == "eval mode":
        model.eval()

    def closure() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            out = model(x)
        loss = functional.cross_entropy(out.float().flatten(0, -2), y.flatten())
        loss.backward()
        return loss.item()

    losses = []
    for _ in range(12):
        with optimizer.record_statistics() if kind == "eval mode" else nullcontext():
            losses.append(optimizer.step(closure))
    assert min(losses) < 0.8 * losses[0]
    assert losses[-1] < losses[0]
    assert optimizer.skipped_steps == 0
    assert adaptation(optimizer).rho is not None
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_several_forwards_in_a_closure_are_one_batch() -> None:
    x, y = vectors(9, 3, 3, torch.float64)
    one, many = mlp(3, 5, 3, dtype=torch.float64), mlp(3, 5, 3, dtype=torch.float64)
    many.load_state_dict(one.state_dict())
    whole, parts = (KFAC(model, adaptive=True, fisher="exact") for model in (one, many))

    def accumulated() -> Tensor:
        parts.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for chunk in (slice(0, 2), slice(2, 9)):
            loss = functional.cross_entropy(many(x[chunk]), y[chunk], reduction="sum") / 9
            loss.backward()
            total += loss.detach()
        return total

    for _ in range(6):
        whole.step(closure_of(one, whole, x, y))
        parts.step(accumulated)  # type: ignore[arg-type]
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert adaptation(whole).rho == pytest.approx(adaptation(parts).rho, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": 0.1}, "lr: expected to be unset with adaptive=True"),
        ({"lr": lambda step: 0.1}, "lr: expected to be unset"),
        ({"momentum": 0.5}, "momentum: expected to be left alone"),
        ({"nesterov": True}, "nesterov"),
        ({"kl_clip": 0.1}, "kl_clip"),
        ({"norm_constraint": 0.1}, "norm_constraint"),
        ({"decoupled": True}, "decoupled"),
        ({"damping": lambda step: 0.1}, "damping: expected a number with adaptive=True"),
        ({"reduction": "sum"}, "reduction: expected 'mean'"),
        ({"grad_scaler": torch.amp.GradScaler("cpu", enabled=False)}, "grad_scaler: expected None"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_what_the_adaptive_mode_chooses_is_not_to_be_set(options: dict[str, Any], match: str) -> None:
    model = mlp(3, 2)
    with pytest.raises(ValueError, match=match):
        KFAC(model, adaptive=True, **options)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_unset_lr_is_an_error_without_the_adaptive_mode() -> None:
    with pytest.raises(TypeError, match="lr: expected a number or a callable of the step; adaptive=True does without"):
        KFAC(mlp(3, 2))
    with pytest.raises(ValueError, match=r"params\[0\]: lr: expected to be unset"):
        KFAC(mlp(3, 2), adaptive=True, params=[{"params": mlp(3, 2).parameters(), "lr": 0.1}])
    model = mlp(3, 4, 2)
    groups = [{"params": model[0].parameters(), "damping": 0.1}, {"params": model[2].parameters()}]
    with pytest.raises(ValueError, match="damping: expected the same value in all groups"):
        KFAC(model, adaptive=True, params=groups)
    KFAC(mlp(3, 2), adaptive=True, kl_clip=None)  # off is what it is


def test_what_is_moved_from_outside() -> None:
    model, optimizer = trained(1)
    optimizer.param_groups[0]["damping"] = 0.25
    optimizer.step(closure_of(model, optimizer, *vectors(8, 3, 3)))
    assert adaptation(optimizer).damping == 0.25
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(ValueError, match="adaptive=True chooses the learning rate; take the scheduler away"):
        optimizer.step(closure_of(model, optimizer, *vectors(8, 3, 3)))


def test_closures_that_will_not_do() -> None:
    model, optimizer = trained(1)
    weights = snapshot(model)
    with pytest.raises(ValueError, match="closure: expected one with adaptive=True"):
        optimizer.step()
    with pytest.raises(TypeError, match="closure: expected it to return the loss with adaptive=True, got None"):
        optimizer.step(lambda: closure_of(model, optimizer, *vectors(8, 3, 3))() and None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="the closure did not call the model"):
        optimizer.step(lambda: 1.0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(functional.cross_entropy(model(torch.randn(2, 3)), torch.tensor([0, 1]))).backward()
    with pytest.raises(ValueError, match="closure: expected one"):
        scaler.step(optimizer)
    assert equal(weights, snapshot(model))


def test_damping_stops_before_it_vanishes_and_resumes_from_where_it_is() -> None:
    state, group = Adaptation(gamma=1.0, damping=1.2e-8), {"damping": 1.2e-8}
    for _ in range(3):
        state.trust(1.0, [group])
    assert state.damping == group["damping"] == 1e-8
    state.trust(0.5, [group])
    assert state.damping == 1e-8
    state.trust(0.1, [group])
    assert state.damping == pytest.approx(1e-8 / (19 / 20) ** 5)
    low = Adaptation(gamma=1e-9, damping=1e-12)
    low.trust(1.0, [group])
    assert low.damping == 1e-12
    assert low.candidates(20) == pytest.approx([1e-9, 1e-9, 1e-9 / (19 / 20) ** 10])
    assert len(low.candidates(0)) == len(low.candidates(19)) == 1


def test_an_autoencoder_trains_further_than_tuned_sgd_in_as_many_steps() -> None:
    x = torch.tensor(datasets.load_digits().data[:400] / 16, dtype=torch.float32)

    def final_loss(make: Callable[[nn.Module], torch.optim.Optimizer], steps: int = 30) -> float:
        torch.manual_seed(0)
        model = mlp(64, 32, 6, 32, 64)

        def loss() -> Tensor:
            return functional.binary_cross_entropy_with_logits(model(x), x, reduction="sum") / len(x)

        optimizer = make(model)

        def closure() -> float:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value.item()

        for _ in range(steps):
            optimizer.step(closure)
        return loss().item()

    rates = (0.003, 0.01, 0.03, 0.1, 0.3)
    tuned = min(
        final_loss(lambda m, lr=lr: torch.optim.SGD(m.parameters(), lr, momentum=0.9, nesterov=True))  # type: ignore[misc]
        for lr in rates
    )
    ours = final_loss(lambda m: KFAC(m, adaptive=True, likelihood="bernoulli"))
    start = final_loss(lambda m: torch.optim.SGD(m.parameters(), 0.0), 1)
    assert start - ours > 1.3 * (start - tuned)


def test_gradients_that_are_not_finite_skip_the_step() -> None:
    model = mlp(4, 3)
    optimizer = KFAC(model, adaptive=True, damping=0.5)
    x, y = vectors(16, 4, 3)
    plain = closure_of(model, optimizer, x, y)
    optimizer.step(plain)
    before, factors = snapshot(model), optimizer.factors()

    def spoilt() -> float:
        loss = plain()
        gradient = next(model.parameters()).grad
        assert gradient is not None
        gradient.view(-1)[0] = math.inf
        return loss

    with pytest.warns(UserWarning, match="the gradients of 0.weight are not finite"):
        optimizer.step(spoilt)
    assert equal(snapshot(model), before)
    assert all(torch.equal(optimizer.factors()[name].A, pair.A) for name, pair in factors.items())
    assert (optimizer.steps, optimizer.skipped_steps) == (1, 1)
    assert optimizer.param_groups[0]["damping"] > 0.5


def test_a_batch_of_padding_alone_has_no_quadratic_model() -> None:
    model = mlp(4, 3)
    optimizer = KFAC(model, adaptive=True, damping=0.5, mask=lambda args, kwargs, out: args[0][:, 0] > -100)
    x, y = vectors(16, 4, 3)
    optimizer.step(closure_of(model, optimizer, x, y))
    before = snapshot(model)
    x[:, 0] = -200
    with pytest.warns(UserWarning, match="the quadratic model is not finite"):
        optimizer.step(closure_of(model, optimizer, x, y))
    assert equal(snapshot(model), before)
    assert optimizer.skipped_steps == 1
    assert optimizer.param_groups[0]["damping"] > 0.5


def test_damping_is_moved_in_all_groups_or_in_none() -> None:
    model = mlp(4, 5, 3)
    groups = [{"params": list(layer.parameters())} for layer in model if list(layer.parameters())]
    optimizer = KFAC(model, params=groups, adaptive=True, damping=0.5)
    closure = closure_of(model, optimizer, *vectors(16, 4, 3))
    optimizer.step(closure)
    optimizer.param_groups[0]["damping"] = 2.0
    with pytest.raises(ValueError, match=r"params\[0\]: damping: expected the same value in all groups"):
        optimizer.step(closure)
    for group in optimizer.param_groups:
        group["damping"] = 2.0
    optimizer.step(closure)
    assert optimizer.adaptation is not None
    assert optimizer.adaptation.damping == 2.0


def test_a_gradient_scale_is_refused() -> None:
    model = mlp(4, 3)
    optimizer = KFAC(model, adaptive=True)
    optimizer.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]  # as torch.amp.GradScaler sets it
    with pytest.raises(ValueError, match="expected no GradScaler"):
        optimizer.step(closure_of(model, optimizer, *vectors(16, 4, 3)))
