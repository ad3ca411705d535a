"""Preconditioning by rows: taken when `.grad` is their product, and only then, with the same result."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from kronfac.curvature import GradientRows
from kronfac.curvature import rows as rows_module
from kronfac.curvature.rows import RowKeeper
from kronfac.optim import KFAC
from kronfac.optim.structures import Factorisation
from kronfac.optim.structures.kronecker import KroneckerInverse
from tests.optim.models import equal, frozen_state, mlp, same_tree, snapshot, train_step, vectors
from tests.optim.reference import ReferenceKFAC
from tests.optim.test_step import weight_matrices


@pytest.fixture(autouse=True)
def _small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_LEAST", 0)


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of rows of every layer that was preconditioned by its rows."""
    seen: list[int] = []
    apply_rows = KroneckerInverse.apply_rows

    def spy(self: KroneckerInverse, rows: GradientRows, factorisation: Factorisation) -> tuple[Tensor, Tensor]:
        seen.append(len(rows.x))
        return apply_rows(self, rows, factorisation)

    monkeypatch.setattr(KroneckerInverse, "apply_rows", spy)
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": True, "weight_decay": 0.05, "decoupled": True, "inverse_every": 2},
        {"factor_every": 3, "inverse_every": 4, "kl_clip": 0.05},
        {"kl_clip": None, "lr": 0.01, "damping": 0.1, "momentum": 0.0},
    ],
    ids=str,
)
def test_a_trajectory_by_rows_is_that_of_an_independent_implementation(
    options: dict[str, Any], applied: list[int]
) -> None:
    model = mlp(64, 48, 40, 3, dtype=torch.float64)
    optimizer = KFAC(model, options.get("lr", 0.1), fisher="exact", **{k: v for k, v in options.items() if k != "lr"})
    reference = ReferenceKFAC(weight_matrices(model), **options)
    for step in range(7):
        x, y = vectors(7 + step % 3, 64, 3, dtype=torch.float64)
        loss = train_step(model, optimizer, x, y)
        assert loss == pytest.approx(reference.step(x.numpy(), y.numpy()), rel=1e-8)
        for ours, theirs in zip(weight_matrices(model), reference.weights, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=1e-9)
    # The first two layers, at every step; the last one has too few outputs.
    assert applied == [7 + step % 3 for step in range(7) for _ in range(2)]


class Tokens(nn.Module):
    """Three-dimensional inputs, an activation in place, a layer without bias and one with a frozen bias."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(96, 80, bias=False), nn.Linear(80, 64), nn.Linear(64, 5)
        self.two.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.one(x), inplace=True)
        return self.three(functional.relu(self.two(hidden), inplace=True).mean(1))


def both(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, run: Callable[[nn.Module, KFAC], None], **options: Any
) -> None:
    """Run with rows and without: the parameters must agree up to rounding."""
    other = copy.deepcopy(model)
    run(model, KFAC(model, 0.1, seed=1, **options))
    with monkeypatch.context() as patch:
        patch.setattr(RowKeeper, "keep", lambda *_: None)
        run(other, KFAC(other, 0.1, seed=1, **options))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_tokens_in_place_activations_and_layers_without_bias(
    fisher: str, applied: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = torch.randn(4, 5, 96), torch.randint(5, (4,))

    def run(model: nn.Module, optimizer: KFAC) -> None:
        for _ in range(4):
            train_step(model, optimizer, x, y)

    both(Tokens(), monkeypatch, run, inverse_every=2, fisher=fisher)
    assert applied == [20] * 8


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = mlp(64, 48, 40), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = checkpoint(self.body, x, use_reentrant=False)
        return self.head(hidden)


def test_layers_that_are_recomputed_in_the_backward_count_once(
    applied: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = vectors(8, 64, 3)

    def run(model: nn.Module, optimizer: KFAC) -> None:
        for _ in range(3):
            train_step(model, optimizer, x, y)

    both(Checkpointed(), monkeypatch, run, factor_every=2)
    assert applied == [8] * 6


def _clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-2)


def _clip_behind_autograds_back(model: nn.Module) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad.data.clamp_(-1e-3, 1e-3)


def _scale_slightly(model: nn.Module) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad = p.grad * 1.001


def _change_one_entry(model: nn.Module) -> None:
    for layer in (model[0], model[2]):  # type: ignore[index]
        layer.weight.grad[3, 5] += 0.01 * layer.weight.grad.abs().max()


def _change_the_bias(model: nn.Module) -> None:
    for layer in (model[0], model[2]):  # type: ignore[index]
        layer.bias.grad.mul_(2)


@pytest.mark.parametrize(
    "change", [_clip, _clip_behind_autograds_back, _scale_slightly, _change_one_entry, _change_the_bias]
)
def test_a_gradient_that_was_changed_is_taken_as_it_is(
    change: Callable[[nn.Module], None], applied: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = vectors(8, 64, 3)

    def run(model: nn.Module, optimizer: KFAC) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            change(model)
            optimizer.step()

    both(mlp(64, 48, 40, 3), monkeypatch, run)
    assert not applied


def _accumulated(model: nn.Module, x: Tensor, y: Tensor) -> None:
    for half in (slice(0, 4), slice(4, 8)):
        functional.cross_entropy(model(x[half]), y[half]).backward()


def _two_losses(model: nn.Module, x: Tensor, y: Tensor) -> None:
    out = model(x)
    functional.cross_entropy(out, y).backward(retain_graph=True)
    out.square().mean().backward()


def _left_over(model: nn.Module, x: Tensor, y: Tensor) -> None:
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3)
    functional.cross_entropy(model(x), y).backward()


def _input_overwritten(model: nn.Module, x: Tensor, y: Tensor) -> None:
    x = x.clone()
    functional.cross_entropy(model(x), y).backward()
    x.zero_()


@pytest.mark.parametrize(
    ("pass_", "by_rows"), [(_accumulated, 0), (_two_losses, 0), (_left_over, 0), (_input_overwritten, 1)]
)
def test_a_gradient_of_more_than_one_product_is_taken_as_it_is(
    pass_: Callable[[nn.Module, Tensor, Tensor], None],
    by_rows: int,
    applied: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y = vectors(8, 64, 3)

    def run(model: nn.Module, optimizer: KFAC) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            pass_(model, x, y)
            optimizer.step()

    both(mlp(64, 48, 40, 3), monkeypatch, run)
    # An overwritten input is that of the first layer only; the second keeps its rows.
    assert len(applied) == 3 * by_rows


def test_a_backward_for_the_input_alone_is_not_the_training_backward(
    applied: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = vectors(8, 64, 3)
    x.requires_grad_()

    def run(model: nn.Module, optimizer: KFAC) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            torch.autograd.grad(loss, x, retain_graph=True)
            loss.backward(inputs=list(model.parameters()))
            optimizer.step()

    both(mlp(64, 48, 40, 3), monkeypatch, run)
    assert applied == [8] * 6


@pytest.mark.parametrize(
    "options", [{"weight_decay": 0.01}, {"solve": "eigen"}], ids=["decay joins the gradient", "no way by rows"]
)
def test_where_rows_are_of_no_use_none_are_kept(options: dict[str, Any], applied: list[int]) -> None:
    model = mlp(64, 48, 40, 3)
    optimizer = KFAC(model, 0.1, **options)
    x, y = vectors(8, 64, 3)
    train_step(model, optimizer, x, y)
    functional.cross_entropy(model(x), y).backward()
    assert optimizer._recorder is not None
    assert not optimizer._recorder.rows.take()
    optimizer.step()
    assert not applied


def test_many_rows_and_narrow_layers_go_through_the_matrix(applied: list[int]) -> None:
    model = mlp(64, 48, 40, 3)
    optimizer = KFAC(model, 0.1)
    for count in (64, 8):
        train_step(model, optimizer, *vectors(count, 64, 3))
    assert applied == [8, 8]


def test_small_layers_go_through_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = mlp(64, 48, 256, 256, 3)
    optimizer = KFAC(model, 0.1)
    assert optimizer._recorder is not None
    assert list(optimizer._recorder.rows.limits) == ["4"]


def test_bfloat16_goes_through_the_matrix(applied: list[int]) -> None:
    model = mlp(64, 48, 40, 3, dtype=torch.bfloat16)
    x, y = vectors(8, 64, 3, torch.bfloat16)
    train_step(model, KFAC(model, 0.1), x, y)
    assert not applied


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_whose_rows_are_not_finite_is_skipped(bad: float, applied: list[int]) -> None:
    model = mlp(64, 48, 40, 3)
    optimizer = KFAC(model, 0.1, factor_every=100, inverse_every=100)
    x, y = vectors(8, 64, 3)
    train_step(model, optimizer, x, y)
    before = snapshot(model)
    x[2, 7] = bad
    with pytest.warns(UserWarning, match="not finite"):
        train_step(model, optimizer, x, y)
    assert optimizer.skipped_steps == 1
    assert equal(before, snapshot(model))
    assert applied[:2] == [8, 8]


def test_a_checkpoint_continues_bit_for_bit(applied: list[int]) -> None:
    x, y = vectors(8, 64, 3)
    model = mlp(64, 48, 40, 3)
    optimizer = KFAC(model, 0.1, inverse_every=3)
    for _ in range(2):
        train_step(model, optimizer, x, y)
    other = copy.deepcopy(model)
    continued = KFAC(other, 0.1, inverse_every=3)
    continued.load_state_dict(frozen_state(optimizer))
    for _ in range(3):
        train_step(model, optimizer, x, y)
        train_step(other, continued, x, y)
    assert equal(snapshot(model), snapshot(other))
    assert same_tree(optimizer.state_dict(), continued.state_dict())
    assert applied


def test_nothing_is_kept_beyond_the_step_or_without_the_optimizer() -> None:
    model = mlp(64, 48, 40, 3)
    optimizer = KFAC(model, 0.1)
    keeper = optimizer._recorder.rows  # type: ignore[union-attr]
    x, y = vectors(8, 64, 3)
    train_step(model, optimizer, x, y)
    assert not keeper.take()
    model(x)
    del optimizer
    assert not keeper.take()


@pytest.mark.parametrize("solve", ["inverse", "eigen"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0, 0), (0, 47, 63), (2, 11, 30), (4, 2, 39)])
def test_one_bad_entry_of_a_gradient_anywhere_skips_the_step(
    solve: str, bad: float, place: tuple[int, int, int]
) -> None:
    model = mlp(64, 48, 40, 3)
    optimizer = KFAC(model, 0.1, solve=solve, factor_every=100, inverse_every=100)
    x, y = vectors(8, 64, 3)
    train_step(model, optimizer, x, y)
    before = snapshot(model)
    functional.cross_entropy(model(x), y).backward()
    index, row, column = place
    model[index].weight.grad[row, column] = bad  # type: ignore[index, union-attr]
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    assert equal(before, snapshot(model))


@pytest.mark.filterwarnings("ignore:.*covered by no layer adapter:UserWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [7, 5000])
def test_one_bad_entry_outside_the_layers_skips_the_step(bad: float, size: int) -> None:
    model = nn.Sequential(nn.PReLU(size), nn.Linear(size, 3))
    optimizer = KFAC(model, 0.1, factor_every=100, inverse_every=100)
    x, y = vectors(8, size, 3)
    train_step(model, optimizer, x, y)
    before = snapshot(model)
    functional.cross_entropy(model(x), y).backward()
    model[0].weight.grad[size - 2] = bad  # type: ignore[index, union-attr]
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    assert equal(before, snapshot(model))
    # Large values alone are no reason: their squares would overflow.
    functional.cross_entropy(model(x), y).backward()
    model[0].weight.grad[size - 2] = 1e30  # type: ignore[index, union-attr]
    optimizer.step()
    assert optimizer.skipped_steps == 1


class Shifted(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(4, 3), nn.Parameter(torch.zeros(3, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        shift = self.shift.abs() if self.shift.is_complex() else self.shift
        return self.layer(x) + shift.float()


@pytest.mark.filterwarnings("ignore:.*covered by no layer adapter:UserWarning")
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float16, torch.bfloat16, torch.float64])
def test_gradients_of_any_type_are_checked(dtype: torch.dtype) -> None:
    model = Shifted(dtype)
    nn.init.ones_(model.shift)
    optimizer = KFAC(model, 0.1)
    x, y = vectors(8, 4, 3)
    train_step(model, optimizer, x, y)
    assert optimizer.skipped_steps == 0
    functional.cross_entropy(model(x), y).backward()
    assert model.shift.grad is not None
    model.shift.grad[1] = math.nan
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    assert optimizer.skipped_steps == 1
