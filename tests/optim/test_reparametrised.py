"""Weights that are computed, adapted, replaced, moved or complex: they train like the plain loop, or are refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune

from kronfac.optim import KFAC
from tests.optim.models import equal, mlp, same_tree, snapshot, train_step, vectors


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


COMPUTED: dict[str, Callable[[nn.Module], object]] = {
    "parametrize": lambda layer: parametrize.register_parametrization(layer, "weight", Double()),
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": torch.nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old spectral_norm": torch.nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", COMPUTED)
def test_a_computed_weight_trains_as_sgd_and_the_others_as_they_would_alone(how: str) -> None:
    """Against torch.optim.SGD on the computed layer and K-FAC on the other, both told of no more than their own."""
    models = []
    for _ in range(2):  # no deepcopy: torch cannot copy what the old functions and pruning make
        torch.manual_seed(7)
        models.append(mlp(4, 5, 3, dtype=torch.float64))
        COMPUTED[how](models[-1][0])
    model, twin = models
    options: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.01}
    with pytest.warns(UserWarning, match=r"train as SGD .* 0\.") as caught:
        optimizer = KFAC(model, 0.1, fisher="exact", **options)
    assert len(caught) == 1
    assert optimizer.layers == ("2",)
    plain = torch.optim.SGD(twin[0].parameters(), 0.1, **options)
    rest = KFAC(twin, 0.1, params=list(twin[2].parameters()), fisher="exact", **options)
    for _ in range(4):
        x, y = vectors(6, 4, 3, torch.float64)
        torch.manual_seed(1)
        train_step(model, optimizer, x, y)
        torch.manual_seed(1)
        plain.zero_grad()
        rest.zero_grad()
        functional.cross_entropy(twin(x), y).backward()
        plain.step()
        rest.step()
    for a, b in zip(snapshot(model), snapshot(twin), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("how", ["parametrize", "pruning", "spectral_norm"])
def test_a_weight_that_is_computed_later_goes_on_as_sgd_after_a_warning(how: str) -> None:
    """Here the optimizer's parameter stays the model's; it is only no longer the weight itself."""
    model = mlp(4, 5, 3)
    optimizer = KFAC(model, 0.1, momentum=0.0, kl_clip=None)
    x, y = vectors(6, 4, 3)
    train_step(model, optimizer, x, y)
    COMPUTED[how](model[0])
    with pytest.warns(UserWarning, match=r"train as SGD .*0\."):
        train_step(model, optimizer, x, y)
    assert optimizer.layers == ("2",)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_step(model, optimizer, x, y)
    for name, p in model[0].named_parameters(prefix="0"):
        assert p.grad is not None
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * p.grad)


REPLACED: dict[str, Callable[[nn.Sequential], object]] = {
    "weight_norm": lambda model: parametrizations.weight_norm(model[0]),
    "to meta": lambda model: model.to("meta"),
    "to_empty": lambda model: [p.data.normal_() for p in model.to("meta").to_empty(device="cpu").parameters()],
    "assignment": lambda model: setattr(model[0], "weight", nn.Parameter(torch.randn(5, 4))),
}


@pytest.mark.parametrize("how", REPLACED)
def test_replaced_parameters_are_refused_instead_of_never_trained(how: str) -> None:
    model = mlp(4, 5, 3)
    optimizer = KFAC(model, 0.1)
    x, y = vectors(6, 4, 3)
    train_step(model, optimizer, x, y)
    REPLACED[how](model)
    if how != "to meta":
        functional.cross_entropy(model(x), y).backward()
    before = snapshot(model) if how != "to meta" else []
    with pytest.raises(RuntimeError, match=r"parameters of layers '0'.* no longer the model's.* Make a new optimizer"):
        optimizer.step()
    assert how == "to meta" or equal(before, snapshot(model))


def test_a_layer_that_was_exchanged_is_noticed() -> None:
    """Torch's optimizers would go on in silence; here the old layer no longer reports statistics."""
    model = mlp(4, 5, 3)
    optimizer = KFAC(model, 0.1)
    x, y = vectors(6, 4, 3)
    train_step(model, optimizer, x, y)
    model[2] = nn.Linear(5, 3)
    with pytest.warns(UserWarning, match=r"layers '2' are no longer part of the model.*add_param_group"):
        train_step(model, optimizer, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_step(model, optimizer, x, y)


class Adapted(nn.Module):
    """LoRA by hand: a frozen layer beside the product of two small ones."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(rank, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both ways."""
        return self.base(x) + self.up(self.down(x))  # type: ignore[no-any-return]


def test_adapters_beside_frozen_layers_are_preconditioned() -> None:
    """Exactly: the path through the adapter is a two-layer network whose other inputs are constants."""
    model = nn.Sequential(Adapted(nn.Linear(4, 5), 2), nn.Tanh(), Adapted(nn.Linear(5, 3), 2)).double()
    nn.init.zeros_(model[0].up.weight)  # as LoRA starts
    frozen = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = KFAC(model, 0.5, fisher="exact", solve="eigen", damping=1e-2, momentum=0.0, kl_clip=None)
        x, y = vectors(8, 4, 3, torch.float64)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert optimizer.layers == ("0.down", "0.up", "2.down", "2.up")
        for name, (A, G) in optimizer.factors().items():
            weight = model.get_submodule(name).weight
            fisher = torch.kron(G, A) + 1e-2 * torch.eye(weight.numel(), dtype=torch.float64)
            direction = torch.linalg.solve(fisher, weight.grad.flatten()).view_as(weight)
            torch.testing.assert_close(weight.detach(), start[f"{name}.weight"] - 0.5 * direction)
        optimizer.param_groups[0]["kl_clip"] = 1e-3
        losses = [train_step(model, optimizer, x, y) for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]
    assert equal(frozen, [p for p in model.parameters() if not p.requires_grad])


def test_a_layer_with_a_forward_of_its_own_is_left_to_sgd() -> None:
    """A LoRA class derived from nn.Linear computes something else than nn.Linear: its factors would be wrong."""

    class LoRALinear(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.zeros(3, 2))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x @ self.down.mT @ self.up.mT

    with pytest.warns(UserWarning, match=r"4 of the model's parameters .*down \(LoRALinear\)"):
        optimizer = KFAC(LoRALinear(), 0.1)
    assert optimizer.layers == ()


def test_lazy_modules_work_after_their_first_forward() -> None:
    model = nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.Linear(5, 3))
    with pytest.raises(ValueError, match="run one forward before making KFAC"):
        KFAC(model, 0.1)
    x, y = vectors(6, 4, 3)
    model(x)
    optimizer = KFAC(model, 0.1)
    assert optimizer.layers == ("0", "1", "2")
    losses = [train_step(model, optimizer, x, y) for _ in range(5)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("solve", ["inverse", "eigen"])
def test_a_model_moved_to_another_type_goes_on_as_if_made_there(solve: str) -> None:
    """Against an optimizer of the wide model that was given the state of the narrow one."""
    model = mlp(4, 5, 3)
    optimizer = KFAC(model, 0.1, solve=solve, seed=1)
    for _ in range(3):
        train_step(model, optimizer, *vectors(6, 4, 3))
    twin = mlp(4, 5, 3, dtype=torch.float64)
    twin.load_state_dict(model.state_dict())
    other = KFAC(twin, 0.1, solve=solve)
    other.load_state_dict(optimizer.state_dict())
    model.to(torch.float64)
    for _ in range(4):  # without new inverses, then with
        x, y = vectors(6, 4, 3, torch.float64)
        train_step(model, optimizer, x, y)
        train_step(twin, other, x, y)
    assert equal(snapshot(model), snapshot(twin))
    assert same_tree(optimizer.state_dict(), other.state_dict())
    assert all(buffer["momentum_buffer"].dtype == torch.float64 for buffer in optimizer.state.values())


@pytest.mark.parametrize(
    ("first", "then"),
    [(torch.float64, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float64)],
)
def test_any_type_after_any_other(first: torch.dtype, then: torch.dtype) -> None:
    model = mlp(4, 5, 3, dtype=first)
    optimizer = KFAC(model, 0.1)
    x, y = vectors(32, 4, 3, first)
    for _ in range(2):
        train_step(model, optimizer, x, y)
    model.to(then)
    losses = [train_step(model, optimizer, x.to(then), y) for _ in range(25)]
    assert losses[-1] < 0.9 * losses[0]
    assert optimizer.skipped_steps == 0
    wide = torch.float64 if then == torch.float64 else torch.float32
    assert {factor.dtype for pair in optimizer.factors().values() for factor in pair} == {wide}
    assert {kept["momentum_buffer"].dtype for kept in optimizer.state.values()} == {then}


def test_a_model_without_data_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'0\.weight' is on the meta device .*to_empty"):
        KFAC(mlp(4, 3).to("meta"), 0.1)
    model = mlp(4, 3)
    optimizer = KFAC(model, 0.1)
    with pytest.raises(ValueError, match="on the meta device"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.empty(3, device="meta"))]})
    assert len(optimizer.param_groups) == len(optimizer.clip_scales) == 1


def test_complex_weights_train_as_sgd_between_layers_that_are_preconditioned() -> None:
    class Wave(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 5), nn.Linear(3, 3)
            self.wave = nn.Linear(5, 3, dtype=torch.complex64)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.wave(self.first(x).to(torch.complex64)).abs())  # type: ignore[no-any-return]

    model = Wave()
    with pytest.warns(UserWarning, match=r"2 of the model's parameters .*wave\.weight \(Linear\)"):
        optimizer = KFAC(model, 0.05)
    plain = torch.optim.SGD(copy.deepcopy(model).wave.parameters(), 0.05, momentum=0.9)
    x, y = vectors(6, 4, 3)
    losses = []
    for _ in range(10):
        losses.append(train_step(model, optimizer, x, y))
        for own, other in zip(model.wave.parameters(), plain.param_groups[0]["params"], strict=True):
            other.grad = own.grad
        plain.step()
    assert equal(snapshot(model.wave), plain.param_groups[0]["params"])
    assert optimizer.layers == ("first", "last")
    assert losses[-1] < losses[0]


def test_complex_outputs_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Identity())
    model[1].forward = lambda x: torch.complex(x, x)  # type: ignore[method-assign]
    optimizer = KFAC(model, 0.1)
    with pytest.raises(ValueError, match=r"expected floating-point numbers, got torch\.complex64"):
        model(torch.randn(2, 4))
    assert optimizer.factors() == {}
