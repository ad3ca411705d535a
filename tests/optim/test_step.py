from __future__ import annotations

import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from kronfac.optim import KFAC, reading
from tests.optim.models import convnet, equal, frozen_state, images, mlp, same_tree, snapshot, train_step, vectors
from tests.optim.reference import ReferenceKFAC

PLAIN: dict[str, Any] = {"momentum": 0.0, "kl_clip": None}


def weight_matrices(model: nn.Module) -> list[np.ndarray]:
    return [
        torch.cat([m.weight, m.bias[:, None]], 1).detach().double().numpy()
        for m in model.modules()
        if isinstance(m, nn.Linear)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"solve": "eigen"},
        {"kl_clip": None, "lr": 0.01, "damping": 0.1},
        {"kl_clip": None, "lr": 0.01, "damping": 0.1, "solve": "eigen", "inverse_every": 2},
        {"nesterov": True, "weight_decay": 0.05, "factor_every": 2, "inverse_every": 3, "factor_decay": 0.6},
        {"nesterov": True, "weight_decay": 0.05, "decoupled": True, "inverse_every": 2, "solve": "eigen"},
        {"momentum": 0.0, "weight_decay": 0.3, "inverse_every": 1, "kl_clip": 10.0, "lr": 0.02},
        {"factor_every": 3, "inverse_every": 4, "factor_decay": 0.0, "kl_clip": 0.05},
        {"lr": 0.0},
    ],
    ids=str,
)
def test_a_trajectory_is_that_of_an_independent_implementation(options: dict[str, Any]) -> None:
    model = mlp(4, 6, 5, 3, dtype=torch.float64)
    optimizer = KFAC(model, options.get("lr", 0.1), fisher="exact", **{k: v for k, v in options.items() if k != "lr"})
    reference = ReferenceKFAC(weight_matrices(model), **options)
    for step in range(13):
        x, y = vectors(9 + step % 3, 4, 3, dtype=torch.float64)
        loss = train_step(model, optimizer, x, y)
        assert loss == pytest.approx(reference.step(x.numpy(), y.numpy()), rel=1e-8)
        for ours, theirs in zip(weight_matrices(model), reference.weights, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=1e-9)


@given(
    solve=st.sampled_from(["inverse", "eigen"]),
    momentum=st.sampled_from([0.0, 0.9]),
    nesterov=st.booleans(),
    weight_decay=st.sampled_from([0.0, 0.1]),
    decoupled=st.booleans(),
    damping=st.sampled_from([1e-4, 1e-2, 1.0]),
    factor_decay=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    factor_every=st.integers(1, 3),
    inverse_every=st.integers(1, 4),
    kl_clip=st.sampled_from([None, 1e-3, 0.1]),
)
@settings(max_examples=15)
def test_any_combination_of_options_follows_the_independent_implementation(**options: Any) -> None:
    options["nesterov"] = options["nesterov"] and options["momentum"] > 0
    model = mlp(3, 4, 2, dtype=torch.float64)
    optimizer = KFAC(model, 0.05, fisher="exact", **options)
    reference = ReferenceKFAC(weight_matrices(model), lr=0.05, **options)
    for _ in range(6):
        x, y = vectors(8, 3, 2, dtype=torch.float64)
        train_step(model, optimizer, x, y)
        reference.step(x.numpy(), y.numpy())
    for ours, theirs in zip(weight_matrices(model), reference.weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def gradient_matrix(module: nn.Module) -> Tensor:
    weight = module.weight.grad.flatten(1)
    return weight if module.bias is None else torch.cat([weight, module.bias.grad[:, None]], 1)


def parameter_matrix(module: nn.Module) -> Tensor:
    weight = module.weight.detach().flatten(1)
    return weight.clone() if module.bias is None else torch.cat([weight, module.bias.detach()[:, None]], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solve", ["eigen", "inverse"])
@pytest.mark.parametrize("make", [lambda dtype: mlp(5, 7, 3, dtype=dtype), convnet], ids=["mlp", "convnet"])
def test_the_preconditioned_gradient_is_the_dense_inverse_times_the_gradient(
    make: Any, solve: str, dtype: torch.dtype
) -> None:
    """solve="eigen": (A ⊗ G + λI)⁻¹; solve="inverse": the inverse of its own damped product."""
    damping, lr = 1e-2, 0.5
    model = make(dtype)
    x, y = images(16, dtype) if isinstance(model[0], nn.Conv2d) else vectors(16, 5, 3, dtype)
    optimizer = KFAC(model, lr, damping=damping, solve=solve, fisher="exact", **PLAIN)
    functional.cross_entropy(model(x), y).backward()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    before = {name: parameter_matrix(module) for name, module in layers.items()}
    optimizer.step()
    assert set(optimizer.factors()) == set(layers)
    for name, module in layers.items():
        V = gradient_matrix(module).double()
        A, G = (factor.double() for factor in (optimizer.factors()[name].A, optimizer.factors()[name].G))
        assert A.shape == (V.shape[1], V.shape[1])
        assert G.shape == (V.shape[0], V.shape[0])
        if solve == "inverse":
            pi = math.sqrt(float(A.trace() / len(A)) / float(G.trace() / len(G)))
            A = A + pi * math.sqrt(damping) * torch.eye(len(A))
            G = G + math.sqrt(damping) / pi * torch.eye(len(G))
        dense = torch.kron(G, A) + (damping if solve == "eigen" else 0.0) * torch.eye(V.numel())
        expected = torch.linalg.solve(dense, V.flatten()).view_as(V)
        got = (before[name] - parameter_matrix(module)).double() / lr
        error = float((got - expected).norm() / expected.norm())
        assert error < 1e-4, (name, error)


def test_several_forwards_accumulate_to_the_large_batch() -> None:
    x, y = images(12, torch.float64)
    one, many = convnet(torch.float64), convnet(torch.float64)
    many.load_state_dict(one.state_dict())
    whole, parts = (KFAC(model, 0.1, fisher="exact", damping=0.01) for model in (one, many))
    for _ in range(3):
        train_step(one, whole, x, y)
        parts.zero_grad()
        for chunk in (slice(0, 3), slice(3, 4), slice(4, 12)):
            size = chunk.stop - chunk.start
            (functional.cross_entropy(many(x[chunk]), y[chunk]) * size / len(x)).backward()
        parts.step()
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    for name, pair in whole.factors().items():
        torch.testing.assert_close(pair.A, parts.factors()[name].A, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(pair.G, parts.factors()[name].G, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("fisher", ["empirical", "exact", "mc"])
def test_the_factors_do_not_depend_on_the_reduction_of_the_loss(fisher: str) -> None:
    x, y = vectors(10, 4, 3, torch.float64)
    mean, total = mlp(4, 5, 3, dtype=torch.float64), mlp(4, 5, 3, dtype=torch.float64)
    total.load_state_dict(mean.state_dict())
    one = KFAC(mean, 0.0, fisher=fisher, reduction="mean", seed=3)
    other = KFAC(total, 0.0, fisher=fisher, reduction="sum", seed=3)
    functional.cross_entropy(mean(x), y).backward()
    functional.cross_entropy(total(x), y, reduction="sum").backward()
    one.step()
    other.step()
    for name, pair in one.factors().items():
        torch.testing.assert_close(pair.A, other.factors()[name].A, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(pair.G, other.factors()[name].G, rtol=1e-8, atol=1e-14)


def test_empirical_factors_are_those_of_per_example_gradients_whatever_the_batch() -> None:
    model = mlp(4, 3, dtype=torch.float64)
    x, y = vectors(6, 4, 3, torch.float64)
    optimizer = KFAC(model, 0.0, fisher="empirical")
    optimizer.zero_grad()
    for chunk in (slice(0, 2), slice(2, 6)):
        (functional.cross_entropy(model(x[chunk]), y[chunk]) * (chunk.stop - chunk.start) / 6).backward()
    optimizer.step()
    g = (model(x).softmax(1) - functional.one_hot(y, 3)).detach()
    torch.testing.assert_close(optimizer.factors()["0"].G, g.T @ g / 6)


def test_mc_with_many_samples_tends_to_exact_and_the_number_of_samples_does_not_scale_it() -> None:
    model = mlp(4, 3, dtype=torch.float64)
    x, y = vectors(32, 4, 3, torch.float64)
    results = {}
    for fisher, samples in (("exact", 1), ("mc", 1), ("mc", 400)):
        optimizer = KFAC(model, 0.0, fisher=fisher, fisher_samples=samples, seed=1)
        train_step(model, optimizer, x, y)
        results[fisher, samples] = optimizer.factors()["0"].G
    exact = results["exact", 1]
    assert float((results["mc", 400] - exact).norm() / exact.norm()) < 0.05
    assert 0.5 < float(results["mc", 1].trace() / exact.trace()) < 2


def test_the_running_average_has_no_bias_from_its_start() -> None:
    model = mlp(2, 2, dtype=torch.float64)
    optimizer = KFAC(model, 0.0, factor_decay=0.75)
    means = []
    for step in range(8):
        x = torch.full((4, 2), float(step + 1), dtype=torch.float64)
        train_step(model, optimizer, x, torch.zeros(4, dtype=torch.long))
        means.append(float(optimizer.factors()["0"].A[0, 0]))
    average = 0.0
    for k in range(1, 9):
        decay = min(1 - 1 / k, 0.75)
        average = decay * average + (1 - decay) * k**2
        assert means[k - 1] == pytest.approx(average)
    assert means[0] == pytest.approx(1.0)
    assert means[1] == pytest.approx((1 + 4) / 2)  # the plain mean, as long as 1 - 1/k is the smaller decay


def test_the_frequencies_count_steps_and_statistics_count_themselves() -> None:
    model = mlp(2, 3, 2)
    optimizer = KFAC(model, 0.01, factor_every=3, inverse_every=4)
    averages, inverses = [], []
    for _ in range(9):
        train_step(model, optimizer, *vectors(5, 2, 2))
        layer = optimizer.state_dict()["kronfac"]["layers"]["0"]
        averages.append(layer["updates"])
        inverses.append(layer["factorisation"]["left"].clone())
    assert averages == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    changed = [k for k in range(1, 9) if not torch.equal(inverses[k], inverses[k - 1])]
    assert changed == [4, 8]


def test_lr_is_without_effect_while_the_clip_is_active_and_the_factor_is_shown() -> None:
    x, y = vectors(16, 4, 3)
    moves, scales = [], []
    for lr in (1.0, 10.0):
        torch.manual_seed(1)
        model = mlp(4, 3)
        before = snapshot(model)
        optimizer = KFAC(model, lr, momentum=0.0, fisher="exact")
        train_step(model, optimizer, x, y)
        moves.append([b - a for a, b in zip(before, snapshot(model), strict=True)])
        (scale,) = optimizer.clip_scales
        assert scale is not None
        scales.append(float(scale))
    for a, b in zip(*moves, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert scales[0] < 1
    assert scales[1] == pytest.approx(scales[0] / 10, rel=1e-4)


def test_the_clip_spans_all_groups() -> None:
    """ν = √(κ / Σ_l lr_l² ⟨P_l, V_l⟩) with the lr of each layer's own group."""
    model = mlp(4, 5, 3, dtype=torch.float64)
    x, y = vectors(16, 4, 3, torch.float64)
    groups = [{"params": model[0].parameters(), "lr": 1.0}, {"params": model[2].parameters(), "lr": 3.0}]
    optimizer = KFAC(model, 0.1, params=groups, momentum=0.0, fisher="exact")
    functional.cross_entropy(model(x), y).backward()
    before = {i: parameter_matrix(model[i]) for i in (0, 2)}
    optimizer.step()
    one, two = optimizer.clip_scales
    assert one is not None
    assert two is not None
    assert float(one) == pytest.approx(float(two))
    size = 0.0
    for index, lr in ((0, 1.0), (2, 3.0)):
        P = (before[index] - parameter_matrix(model[index])) / (lr * float(one))
        size += lr**2 * float((P * gradient_matrix(model[index])).sum())
    assert float(one) == pytest.approx(math.sqrt(1e-3 / size), rel=1e-6)


class CountReads(TorchDispatchMode):
    """Counts how often Python asks for the value of a tensor, which on an accelerator waits for it.

    Inside nothing counts as at hand, so that the CPU goes an accelerator's ways.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self._elsewhere = mock.patch.object(reading, "at_hand", return_value=False)

    def __enter__(self) -> CountReads:
        self._elsewhere.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._elsewhere.stop()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_plain_step_never_waits_for_the_device() -> None:
    """More of this is in tests/optim/test_waits.py."""
    model = mlp(4, 5, 5, 5, 3)
    optimizer = KFAC(model, 0.1, weight_decay=0.01, inverse_every=100)
    x, y = vectors(8, 4, 3)
    train_step(model, optimizer, x, y)
    functional.cross_entropy(model(x), y).backward()
    with CountReads() as counter:
        optimizer.step()
    assert counter.reads == 0


def test_with_exact_damping_a_change_of_lambda_acts_at_once() -> None:
    """λ enters when the eigenbasis is applied, so a schedule need not wait for inverse_every."""
    x, y = vectors(16, 4, 3, torch.float64)
    moves = {}
    for late in (0.01, 10.0):
        torch.manual_seed(5)
        model = mlp(4, 3, dtype=torch.float64)
        damping = lambda step: 0.01 if step == 0 else late  # noqa: B023, E731
        optimizer = KFAC(model, 1.0, solve="eigen", damping=damping, fisher="exact", factor_every=100, **PLAIN)
        train_step(model, optimizer, x, y)
        before = parameter_matrix(model[0])
        train_step(model, optimizer, x, y)
        moves[late] = before - parameter_matrix(model[0])
    A, G = optimizer.factors()["0"]
    V = gradient_matrix(model[0])
    expected = torch.linalg.solve(torch.kron(G, A) + 10.0 * torch.eye(V.numel()), V.flatten()).view_as(V)
    torch.testing.assert_close(moves[10.0], expected)
    assert float(moves[0.01].norm()) > 5 * float(moves[10.0].norm())


def test_without_clip_there_is_no_factor() -> None:
    model = mlp(4, 3)
    optimizer = KFAC(model, 0.1, kl_clip=None)
    train_step(model, optimizer, *vectors(8, 4, 3))
    assert optimizer.clip_scales == [None]


@pytest.mark.parametrize("damping", [1e-30, 1e-12, 1e6, 1e38])
@pytest.mark.parametrize("solve", ["inverse", "eigen"])
def test_extreme_damping_neither_raises_nor_spoils_the_weights(solve: str, damping: float) -> None:
    model = mlp(12, 8, 3)
    optimizer = KFAC(model, 0.1, damping=damping, solve=solve, inverse_every=2)
    x, y = vectors(4, 12, 3)  # fewer examples than features: both factors are singular
    for _ in range(5):
        train_step(model, optimizer, x, y)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("solve", ["inverse", "eigen"])
def test_a_dead_layer_stays_in_range(solve: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    optimizer = KFAC(model, 0.1, solve=solve)
    for _ in range(3):
        train_step(model, optimizer, *vectors(6, 3, 2))
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert optimizer.skipped_steps == optimizer.inverse_failures == 0


@pytest.mark.parametrize("where", ["gradient", "statistics", "both"])
@pytest.mark.parametrize("step", [1, 2], ids=["plain step", "inverse step"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_with_values_that_are_not_finite_is_skipped_whole(where: str, step: int, bad: float) -> None:
    model = mlp(3, 4, 2)
    optimizer = KFAC(model, 0.1, inverse_every=2, fisher="exact")
    x, y = vectors(6, 3, 2)
    for _ in range(step):
        train_step(model, optimizer, x, y)
    weights, state = snapshot(model), frozen_state(optimizer)
    optimizer.zero_grad()
    poisoned = x.clone()
    if where != "gradient":
        poisoned[0, 0] = bad
    functional.cross_entropy(model(poisoned), y).backward()
    for p in model.parameters():
        assert p.grad is not None
        p.grad.nan_to_num_(0.0, 0.0, 0.0)
    if where != "statistics":
        model[2].bias.grad[1] = bad
    with pytest.warns(UserWarning, match="not finite; the step was skipped"):
        optimizer.step()
    assert optimizer.skipped_steps == 1
    assert equal(weights, snapshot(model))
    state["kronfac"]["counters"]["skipped_steps"] = 1
    assert same_tree(state, optimizer.state_dict())
    train_step(model, optimizer, x, y)  # and on it goes
    assert not equal(weights, snapshot(model))
    assert optimizer.skipped_steps == 1


def test_a_skipped_step_is_reported_once_by_name_and_counted_always(recwarn: pytest.WarningsRecorder) -> None:
    model = mlp(3, 2)
    optimizer = KFAC(model, 0.1)
    for _ in range(3):
        functional.cross_entropy(model(torch.randn(4, 3)), torch.zeros(4, dtype=torch.long)).backward()
        model[0].bias.grad.fill_(math.nan)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.skipped_steps == 3
    assert [str(w.message) for w in recwarn if "not finite" in str(w.message)] == [
        "KFAC: the gradients of 0.bias are not finite; the step was skipped, parameters and statistics are unchanged "
        "(optimizer.skipped_steps counts such steps; this is said once)"
    ]
    assert optimizer.factors() == {}


def test_a_factor_that_resists_keeps_its_last_good_inverse_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp(3, 4, 2)
    optimizer = KFAC(model, 0.1, inverse_every=1)
    x, y = vectors(6, 3, 2)
    train_step(model, optimizer, x, y)
    good = frozen_state(optimizer)["kronfac"]["layers"]
    from kronfac.linalg import damped

    real = damped.ops.damped_inverse
    monkeypatch.setattr(
        damped.ops, "damped_inverse", lambda f, d: (real(f, d)[0], torch.ones(len(f), dtype=torch.int32))
    )
    with pytest.warns(UserWarning, match="their last good inverse is kept"):
        train_step(model, optimizer, x, y)
    assert optimizer.inverse_failures == 2
    assert optimizer.inverse_retries == 4
    after = optimizer.state_dict()["kronfac"]["layers"]
    for name in good:
        assert same_tree(good[name]["factorisation"], after[name]["factorisation"])
        assert after[name]["updates"] == 2
    monkeypatch.undo()
    train_step(model, optimizer, x, y)
    assert optimizer.inverse_failures == 2


def test_a_layer_that_was_never_inverted_trains_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    from kronfac.linalg import damped

    real = damped.ops.damped_inverse
    monkeypatch.setattr(
        damped.ops, "damped_inverse", lambda f, d: (real(f, d)[0], torch.ones(len(f), dtype=torch.int32))
    )
    model = mlp(3, 2)
    optimizer = KFAC(model, 0.1, momentum=0.0)
    before = snapshot(model)
    with pytest.warns(UserWarning, match="could not be inverted"):
        train_step(model, optimizer, *vectors(6, 3, 2))
    for a, p in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), a - 0.1 * p.grad)


def test_a_closure_is_called_once_under_grad_mode_and_its_loss_returned() -> None:
    model, twin = mlp(3, 4, 2), mlp(3, 4, 2)
    twin.load_state_dict(model.state_dict())
    one, other = KFAC(model, 0.1, seed=0), KFAC(twin, 0.1, seed=0)
    x, y = vectors(6, 3, 2)
    calls = []

    def closure() -> float:
        assert torch.is_grad_enabled()
        one.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        calls.append(loss.item())
        return loss.item()

    for _ in range(3):
        with torch.no_grad():
            loss = one.step(closure)
        assert loss == calls[-1]
        train_step(twin, other, x, y)
    assert len(calls) == 3
    assert equal(snapshot(model), snapshot(twin))


def test_a_sparse_gradient_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    with pytest.warns(UserWarning, match=r"0\.weight \(Embedding\)"):
        optimizer = KFAC(model, 0.1)
    before = snapshot(model)
    functional.cross_entropy(model(torch.tensor([1, 2, 3])), torch.tensor([0, 1, 1])).backward()
    with pytest.raises(
        ValueError, match=r"params\[0\]\[0\].*expected a dense gradient.*make the layer with sparse=False"
    ):
        optimizer.step()
    assert equal(before, snapshot(model))


def test_gradients_are_not_changed_by_the_step() -> None:
    model = mlp(3, 4, 2)
    optimizer = KFAC(model, 0.1, weight_decay=0.1)
    functional.cross_entropy(model(torch.randn(5, 3)), torch.zeros(5, dtype=torch.long)).backward()
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert equal(before, [p.grad for p in model.parameters()])


def test_the_global_random_stream_is_not_touched() -> None:
    model = mlp(3, 4, 2)
    x, y = vectors(5, 3, 2)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    optimizer = KFAC(model, 0.1, seed=3, fisher_samples=4)
    for _ in range(3):
        train_step(model, optimizer, x, y)
    assert torch.equal(torch.rand(3), expected)


def test_the_seed_decides_the_draws() -> None:
    model = mlp(3, 3)
    x, y = vectors(20, 3, 3)
    G = []
    for seed in (1, 1, 2):
        optimizer = KFAC(model, 0.0, seed=seed)
        train_step(model, optimizer, x, y)
        G.append(optimizer.factors()["0"].G)
    assert torch.equal(G[0], G[1])
    assert not torch.equal(G[0], G[2])


def test_factors_are_copies() -> None:
    model = mlp(3, 2)
    optimizer = KFAC(model, 0.1)
    train_step(model, optimizer, *vectors(5, 3, 2))
    kept = optimizer.factors()["0"].A
    expected = kept.clone()
    train_step(model, optimizer, *vectors(5, 3, 2))
    assert torch.equal(kept, expected)
    kept.zero_()
    assert not torch.equal(optimizer.factors()["0"].A, kept)
