"""The rules under "How statistics are taken", as a user of the optimizer meets them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from kronfac.curvature import Categorical, Gaussian
from kronfac.optim import KFAC
from tests.optim.models import convnet, equal, images, mlp, snapshot, train_step, vectors


def updates(optimizer: KFAC) -> dict[str, int]:
    return {name: layer["updates"] for name, layer in optimizer.state_dict()["kronfac"]["layers"].items()}


def test_an_in_place_activation_does_not_change_the_factors() -> None:
    x, y = images(6, torch.float64)
    with_inplace, without = convnet(torch.float64), convnet(torch.float64)
    without.load_state_dict(with_inplace.state_dict())
    without[1] = nn.ReLU()
    factors = []
    for model in (with_inplace, without):
        optimizer = KFAC(model, 0.1, fisher="exact")
        train_step(model, optimizer, x, y)
        factors.append(optimizer.factors())
    for name in factors[0]:
        torch.testing.assert_close(factors[0][name].G, factors[1][name].G)
        torch.testing.assert_close(factors[0][name].A, factors[1][name].A)


@pytest.mark.parametrize("order", ["zero first", "zero between forward and backward"])
def test_zero_grad_does_not_drop_pending_statistics(order: str) -> None:
    model = mlp(3, 2)
    optimizer = KFAC(model, 0.1)
    x, y = vectors(5, 3, 2)
    if order == "zero first":
        optimizer.zero_grad()
    loss = functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert updates(optimizer) == {"0": 1}


def test_a_step_without_any_statistics_raises_and_names_the_causes() -> None:
    model = mlp(3, 2)
    optimizer = KFAC(model, 0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = snapshot(model)
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    for cause in ("forward was never called", "compiled", "eval mode"):
        assert cause in str(caught.value)
    assert equal(before, snapshot(model))
    assert optimizer.state_dict()["kronfac"]["counters"]["step"] == 0


@pytest.mark.parametrize(
    "forward",
    [
        lambda model, x: model.forward(x),
        lambda model, x: model.eval()(x),
    ],
    ids=["model.forward", "eval mode"],
)
def test_forwards_that_do_not_count(forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = mlp(3, 2)
    optimizer = KFAC(model, 0.1)
    x, y = vectors(5, 3, 2)
    functional.cross_entropy(forward(model, x), y).backward()
    with pytest.raises(RuntimeError, match="no curvature statistics were ever recorded"):
        optimizer.step()


def test_analyses_leave_the_statistics_alone() -> None:
    """no_grad, inference_mode, eval, functorch: none of them records."""
    model, twin = mlp(3, 4, 2), mlp(3, 4, 2)
    twin.load_state_dict(model.state_dict())
    one, other = KFAC(model, 0.1, seed=0), KFAC(twin, 0.1, seed=0)
    x, y = vectors(5, 3, 2)
    for _ in range(3):
        with torch.no_grad():
            model(100 * x)
        with torch.inference_mode():
            model(100 * x)
        model.eval()
        model(100 * x)
        model.train()
        parameters = dict(model.named_parameters())
        torch.func.grad(lambda p: torch.func.functional_call(model, p, (100 * x,)).sum())(parameters)
        torch.func.jvp(model, (x,), (x,))
        train_step(model, one, x, y)
        train_step(twin, other, x, y)
    assert equal(snapshot(model), snapshot(twin))


def test_a_compiled_model_says_so_and_takes_statistics_on_demand() -> None:
    """The eager backend traces as any other does, and the hooks must not be part of what it traces."""
    model = mlp(3, 4, 2)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    optimizer = KFAC(model, 0.1, fisher="exact")
    x, y = vectors(5, 3, 2)
    functional.cross_entropy(compiled(x), y).backward()
    with pytest.raises(RuntimeError, match="compiled"):
        optimizer.step()
    with optimizer.record_statistics(update_only=True):
        model(x)
    before = snapshot(model)
    optimizer.step()
    assert updates(optimizer) == {"0": 1, "2": 1}
    assert not equal(before, snapshot(model))
    extended = torch.cat([x, x.new_ones(5, 1)], 1)
    torch.testing.assert_close(optimizer.factors()["0"].A, extended.T @ extended / 5)


def test_export_and_tracing_leave_the_statistics_alone() -> None:
    model = mlp(3, 4, 2)
    optimizer = KFAC(model, 0.1)
    x, y = vectors(5, 3, 2)
    train_step(model, optimizer, x, y)
    state = optimizer.state_dict()["kronfac"]["generator"]["state"]
    torch.export.export(model, (x,))
    make_fx(model)(x)
    optimizer.zero_grad()
    optimizer.step()
    assert updates(optimizer) == {"0": 1, "2": 1}
    assert torch.equal(state, optimizer.state_dict()["kronfac"]["generator"]["state"])


def test_the_roots_mode_decides_not_the_layers() -> None:
    model = mlp(3, 4, 2)
    optimizer = KFAC(model, 0.1)
    model[0].eval()
    train_step(model, optimizer, *vectors(5, 3, 2))
    assert updates(optimizer) == {"0": 1, "2": 1}


def test_record_statistics_forces_recording_in_eval_mode() -> None:
    model = mlp(3, 2).eval()
    optimizer = KFAC(model, 0.1)
    x, y = vectors(5, 3, 2)
    with optimizer.record_statistics():
        functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert updates(optimizer) == {"0": 1}


def test_statistics_may_come_from_another_minibatch() -> None:
    model = mlp(3, 2, dtype=torch.float64)
    optimizer = KFAC(model, 0.1, fisher="exact")
    x, y = vectors(5, 3, 2, torch.float64)
    other, _ = vectors(7, 3, 2, torch.float64)
    with optimizer.record_statistics(update_only=True):
        model(other)
    loss = functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    extended = torch.cat([other, other.new_ones(7, 1)], 1)
    torch.testing.assert_close(optimizer.factors()["0"].A, extended.T @ extended / 7)
    # The next step takes its statistics from training forwards again.
    train_step(model, optimizer, x, y)
    assert updates(optimizer) == {"0": 2}


def test_update_only_is_refused_for_the_empirical_fisher() -> None:
    optimizer = KFAC(mlp(3, 2), 0.1, fisher="empirical")
    with pytest.raises(ValueError, match="update_only"):
        optimizer.record_statistics(update_only=True)


def test_statistics_on_demand_are_committed_at_steps_that_are_not_due() -> None:
    model = mlp(3, 2)
    optimizer = KFAC(model, 0.1, factor_every=4)
    x, y = vectors(5, 3, 2)
    train_step(model, optimizer, x, y)
    train_step(model, optimizer, x, y)
    assert updates(optimizer) == {"0": 1}
    with optimizer.record_statistics():
        train_step(model, optimizer, x, y)
    assert updates(optimizer) == {"0": 2}


def test_frequencies_by_group() -> None:
    model = mlp(3, 4, 2)
    optimizer = KFAC(
        model,
        0.1,
        params=[
            {"params": model[0].parameters(), "factor_every": 2},
            {"params": model[2].parameters(), "factor_every": 3},
        ],
    )
    for _ in range(7):
        train_step(model, optimizer, *vectors(5, 3, 2))
    assert updates(optimizer) == {"0": 4, "2": 3}  # steps 0 2 4 6 and 0 3 6


def test_hooks_rest_between_due_steps() -> None:
    """No extra backward at a step that takes no statistics: the sampler does not advance."""
    model = mlp(3, 2)
    optimizer = KFAC(model, 0.1, factor_every=3)
    states = []
    for _ in range(4):
        train_step(model, optimizer, *vectors(5, 3, 2))
        states.append(optimizer.state_dict()["kronfac"]["generator"]["state"])
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[1], states[2])
    assert not torch.equal(states[2], states[3])


def test_only_the_first_evaluation_of_a_closure_enters_even_when_it_is_repeated_outside() -> None:
    model = mlp(3, 2, dtype=torch.float64)
    optimizer = KFAC(model, 0.1, fisher="exact")
    x, y = vectors(5, 3, 2, torch.float64)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    assert updates(optimizer) == {"0": 1}
    extended = torch.cat([x, x.new_ones(5, 1)], 1)
    torch.testing.assert_close(optimizer.factors()["0"].A, extended.T @ extended / 5)


def test_non_reentrant_checkpointing_counts_once_and_reentrant_is_refused() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module, reentrant: bool) -> None:
            super().__init__()
            self.inner, self.reentrant = inner, reentrant

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]

    x, y = vectors(5, 3, 2, torch.float64)
    plain = mlp(3, 4, 2, dtype=torch.float64)
    inner = mlp(3, 4, 2, dtype=torch.float64)
    inner.load_state_dict(plain.state_dict())
    checked = Checkpointed(inner, False)
    one, other = KFAC(plain, 0.1, fisher="exact"), KFAC(checked, 0.1, fisher="exact")
    train_step(plain, one, x, y)
    train_step(checked, other, x, y)
    assert set(updates(other).values()) == {1}
    for name, pair in one.factors().items():
        torch.testing.assert_close(pair.A, other.factors()[f"inner.{name}"].A)
        torch.testing.assert_close(pair.G, other.factors()[f"inner.{name}"].G)

    class HalfCheckpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            return checkpoint(self.second, hidden, use_reentrant=True)  # type: ignore[no-any-return]

    reentrant = HalfCheckpointed()
    optimizer = KFAC(reentrant, 0.1)
    with pytest.raises(RuntimeError, match="reentrant"):
        reentrant(x.float())
    assert optimizer.factors() == {}


def test_token_models_outputs_and_masks() -> None:
    """`output=` and `mask=`: padding changes neither factors nor the step."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 6, dtype=torch.float64)
            self.second = nn.Linear(6, 3, dtype=torch.float64)

        def forward(self, x: Tensor, *, real: Tensor | None = None) -> dict[str, Any]:
            return {"logits": self.second(torch.tanh(self.first(x))), "extra": 0}

    lengths = [5, 2, 3]
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    y = torch.randint(3, (3, 5))
    real = torch.arange(5)[None] < torch.tensor(lengths)[:, None]
    padded = Tagger()
    optimizer = KFAC(
        padded,
        0.1,
        likelihood=Categorical(dim=-1),
        output=lambda out: out["logits"],
        mask=lambda args, kwargs, out: kwargs["real"],
        fisher="exact",
    )
    functional.cross_entropy(padded(x, real=real)["logits"][real], y[real]).backward()
    before = {name: p.detach().clone() for name, p in padded.named_parameters()}
    optimizer.step()

    flat = Tagger()
    flat.load_state_dict(before)
    reference = KFAC(flat, 0.1, output=lambda out: out["logits"], fisher="exact")
    functional.cross_entropy(flat(x[real])["logits"], y[real]).backward()
    reference.step()
    for name in ("first", "second"):
        torch.testing.assert_close(optimizer.factors()[name].A, reference.factors()[name].A)
        torch.testing.assert_close(optimizer.factors()[name].G, reference.factors()[name].G)
    for a, b in zip(padded.parameters(), flat.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_likelihood_that_does_not_fit_the_output_is_refused_at_the_forward() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = KFAC(model, 0.1)
    with pytest.raises(ValueError, match=r"Categorical\(dim=\.\.\.\)"):
        model(torch.randn(2, 5, 4))
    assert optimizer.factors() == {}


def test_regression_with_the_documented_variance() -> None:
    """mse_loss averaged over C outputs is Gaussian(variance=C/2): one undamped exact step solves linear regression."""
    model = nn.Linear(4, 3, dtype=torch.float64)
    x, target = torch.randn(40, 4, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    optimizer = KFAC(
        model,
        1.0,
        likelihood=Gaussian(variance=1.5),
        fisher="exact",
        solve="eigen",
        damping=1e-14,
        momentum=0.0,
        kl_clip=None,
    )
    functional.mse_loss(model(x), target).backward()
    optimizer.step()
    extended = torch.cat([x, x.new_ones(40, 1)], 1)
    solution = torch.linalg.lstsq(extended, target).solution.T
    torch.testing.assert_close(model.weight.detach(), solution[:, :-1], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(model.bias.detach(), solution[:, -1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_named_likelihoods_train(likelihood: str) -> None:
    model = mlp(4, 5, 2)
    optimizer = KFAC(model, 0.1, likelihood=likelihood)
    x, target = torch.randn(32, 4), torch.rand(32, 2).round()
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        out = model(x)
        if likelihood == "gaussian":
            loss = 0.5 * functional.mse_loss(out, target, reduction="sum") / 32
        else:
            loss = functional.binary_cross_entropy_with_logits(out, target, reduction="sum") / 32
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_an_empty_batch_changes_nothing_but_the_momentum() -> None:
    model = mlp(3, 2)
    optimizer = KFAC(model, 0.1)
    train_step(model, optimizer, *vectors(5, 3, 2))
    before = optimizer.factors()
    optimizer.zero_grad()
    functional.cross_entropy(model(torch.zeros(0, 3)), torch.zeros(0, dtype=torch.long), reduction="sum").backward()
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert updates(optimizer) == {"0": 1}
    assert torch.equal(optimizer.factors()["0"].A, before["0"].A)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
