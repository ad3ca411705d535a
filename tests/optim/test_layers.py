"""Which parameters are covered, and what happens to the others."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from kronfac.optim import KFAC
from tests.optim.models import equal, mlp, snapshot, train_step, vectors


class Mixed(nn.Module):
    """Covered layers beside an embedding bag, a recurrent layer, an activation and a parameter of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(7, 4)
        self.first = nn.Linear(4, 6)
        self.activation = nn.PReLU(6)
        self.recurrent = nn.GRUCell(6, 6)
        self.scale = nn.Parameter(torch.ones(6))
        self.last = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.recurrent(self.activation(self.first(self.embedding(tokens))))
        return self.last(hidden * self.scale)  # type: ignore[no-any-return]


def test_one_warning_names_every_uncovered_parameter() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = Mixed()
        optimizer = KFAC(model, 0.1)
        for _ in range(2):
            train_step(model, optimizer, torch.randint(7, (5, 2)), torch.randint(3, (5,)))
    messages = [str(w.message) for w in caught if "KFAC" in str(w.message)]
    assert len(messages) == 1
    for name in (
        "embedding.weight (EmbeddingBag)",
        "activation.weight (PReLU)",
        "recurrent.weight_ih (GRUCell)",
        "recurrent.bias_hh (GRUCell)",
        "scale (Mixed)",
    ):
        assert name in messages[0]
    assert "first" not in messages[0]
    assert optimizer.layers == ("first", "last")


@pytest.mark.filterwarnings("ignore:KFAC")
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_uncovered_parameters_train_as_sgd(nesterov: bool, weight_decay: float) -> None:
    model = Mixed()
    options = {"momentum": 0.8, "nesterov": nesterov, "weight_decay": weight_decay}
    optimizer = KFAC(model, 0.1, **options)  # type: ignore[arg-type]
    names = ["embedding.weight", "activation.weight", "recurrent.weight_hh", "recurrent.bias_ih", "scale"]
    ours = dict(model.named_parameters())
    twins = [ours[name].detach().clone().requires_grad_() for name in names]
    sgd = torch.optim.SGD(twins, lr=0.1, **options)  # type: ignore[arg-type]
    for _ in range(4):
        optimizer.zero_grad()
        functional.cross_entropy(model(torch.randint(7, (5, 2))), torch.randint(3, (5,))).backward()
        for name, twin in zip(names, twins, strict=True):
            twin.grad = ours[name].grad.clone()  # type: ignore[union-attr]
        optimizer.step()
        sgd.step()
        for name, twin in zip(names, twins, strict=True):
            torch.testing.assert_close(ours[name].detach(), twin.detach())


def test_a_model_without_any_covered_layer_still_trains() -> None:
    model = nn.Sequential(nn.PReLU(3))
    with pytest.warns(UserWarning, match=r"0\.weight \(PReLU\)"):
        optimizer = KFAC(model, 0.1)
    before = snapshot(model)
    train_step(model, optimizer, *vectors(5, 3, 2))
    assert not equal(before, snapshot(model))
    assert optimizer.factors() == {}
    assert optimizer.state_dict()["kronfac"]["counters"]["step"] == 1


def test_a_covered_layer_whose_module_is_never_called_trains_as_sgd_after_one_warning() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.bypassed = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(self.used(x), self.bypassed.weight, self.bypassed.bias)

    model = Functional()
    optimizer = KFAC(model, 0.1, momentum=0.0)
    x, y = vectors(5, 3, 2)
    before = model.bypassed.weight.detach().clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            train_step(model, optimizer, x, y)
            assert model.bypassed.weight.grad is not None
            before = before - 0.1 * model.bypassed.weight.grad
    messages = [str(w.message) for w in caught if "bypassed" in str(w.message)]
    assert len(messages) == 1
    assert "'bypassed' have gradients but no statistics" in messages[0]
    torch.testing.assert_close(model.bypassed.weight.detach(), before)


def test_tied_weights_are_left_to_sgd() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.middle, self.decoder = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
            self.decoder.weight = self.encoder.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.decoder(torch.tanh(self.middle(self.encoder(tokens))))  # type: ignore[no-any-return]

    model = Tied()
    with pytest.warns(UserWarning, match=r"encoder\.weight \(shared by 'encoder' and 'decoder'\)"):
        optimizer = KFAC(model, 0.1)
    assert optimizer.layers == ("middle",)
    before = snapshot(model)
    train_step(model, optimizer, torch.randint(5, (6,)), torch.randint(5, (6,)))
    assert not any(torch.equal(a, b) for a, b in zip(before, snapshot(model), strict=True))


def test_a_layer_used_twice_in_a_step_is_one_layer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(4, 4, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(torch.tanh(self.shared(x)))  # type: ignore[no-any-return]

    model = Twice()
    optimizer = KFAC(model, 0.1, fisher="exact")
    x, y = vectors(6, 4, 4, torch.float64)
    inner = torch.tanh(model.shared(x)).detach()
    train_step(model, optimizer, x, y)
    ones = x.new_ones(6, 1)
    rows = torch.cat([torch.cat([x, ones], 1), torch.cat([inner, ones], 1)])
    torch.testing.assert_close(optimizer.factors()["shared"].A, rows.T @ rows / 6)  # sums over its R = 12 positions


def test_a_layer_unused_in_a_step_keeps_weights_and_statistics() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)
            self.use_left = True

        def forward(self, x: Tensor) -> Tensor:
            return (self.left if self.use_left else self.right)(x)  # type: ignore[no-any-return]

    model = Branching()
    optimizer = KFAC(model, 0.1)
    x, y = vectors(5, 3, 2)
    train_step(model, optimizer, x, y)
    assert set(optimizer.factors()) == {"left"}
    before, factors = model.left.weight.detach().clone(), optimizer.factors()["left"]
    model.use_left = False
    train_step(model, optimizer, x, y)
    assert torch.equal(model.left.weight, before)
    assert torch.equal(optimizer.factors()["left"].A, factors.A)
    assert set(optimizer.factors()) == {"left", "right"}


def test_frozen_layers_are_left_alone_and_picked_up_when_they_thaw() -> None:
    model = mlp(3, 4, 2)
    model[0].requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = KFAC(model, 0.1)
    x, y = vectors(8, 3, 2)
    before = snapshot(model[0])
    for _ in range(2):
        train_step(model, optimizer, x, y)
    assert equal(before, snapshot(model[0]))
    assert optimizer.layers == ("2",)
    model[0].requires_grad_(True)
    with pytest.warns(UserWarning, match="'0' have gradients but no statistics"):
        train_step(model, optimizer, x, y)
    assert optimizer.layers == ("0", "2")
    layers = optimizer.state_dict()["kronfac"]["layers"]
    assert {name: layer["updates"] for name, layer in layers.items()} == {"2": 3}  # that step's statistics count
    train_step(model, optimizer, x, y)
    assert set(optimizer.factors()) == {"0", "2"}


def test_freezing_a_bias_or_a_layer_during_training() -> None:
    model = mlp(3, 4, 2)
    optimizer = KFAC(model, 0.1)
    x, y = vectors(8, 3, 2)
    train_step(model, optimizer, x, y)
    model[0].bias.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            train_step(model, optimizer, x, y)
    assert optimizer.factors()["0"].A.shape == (3, 3)
    model[2].requires_grad_(False)
    frozen = snapshot(model[2])
    for _ in range(2):
        train_step(model, optimizer, x, y)
    assert equal(frozen, snapshot(model[2]))
    assert optimizer.layers == ("0",)


def test_a_bias_that_was_frozen_from_the_start() -> None:
    model = mlp(3, 4, 2)
    model[0].bias.requires_grad_(False)
    optimizer = KFAC(model, 0.1)
    before = model[0].bias.detach().clone()
    train_step(model, optimizer, *vectors(8, 3, 2))
    assert torch.equal(model[0].bias, before)
    assert optimizer.factors()["0"].A.shape == (3, 3)


def test_computed_weights_are_left_to_sgd() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="original0"):
        optimizer = KFAC(model, 0.1)
    assert optimizer.layers == ("1",)
    before = snapshot(model)
    train_step(model, optimizer, *vectors(8, 3, 2))
    assert not any(torch.equal(a, b) for a, b in zip(before, snapshot(model), strict=True))


def test_params_may_be_a_part_of_the_model_and_more_than_the_model() -> None:
    model = mlp(3, 4, 2)
    temperature = nn.Parameter(torch.ones(()))
    with pytest.warns(UserWarning, match=r"params\[1\]\[0\] \(outside the model\)"):
        optimizer = KFAC(model, 0.1, params=[{"params": model[2].parameters()}, {"params": [temperature]}])
    x, y = vectors(8, 3, 2)
    first = snapshot(model[0])
    functional.cross_entropy(model(x) * temperature, y).backward()
    optimizer.step()
    assert equal(first, snapshot(model[0]))
    assert temperature.item() != 1.0
    assert optimizer.layers == ("2",)


def test_a_group_added_later_is_covered_and_the_rest_keeps_its_state() -> None:
    model = mlp(3, 4, 2)
    optimizer = KFAC(model, 0.1, params=list(model[2].parameters()))
    x, y = vectors(8, 3, 2)
    train_step(model, optimizer, x, y)
    kept = optimizer.factors()["2"].A
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.5})
    assert torch.equal(optimizer.factors()["2"].A, kept)
    train_step(model, optimizer, x, y)
    assert optimizer.layers == ("0", "2")
    assert optimizer.state_dict()["kronfac"]["layers"]["2"]["updates"] == 2
    assert len(optimizer.clip_scales) == 2


def test_a_layer_added_later_does_not_wait_for_the_next_due_step() -> None:
    model = mlp(3, 4, 2)
    optimizer = KFAC(model, 0.1, params=list(model[2].parameters()), factor_every=100)
    x, y = vectors(8, 3, 2)
    for _ in range(2):
        train_step(model, optimizer, x, y)
    optimizer.add_param_group({"params": model[0].parameters()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            train_step(model, optimizer, x, y)
    layers = optimizer.state_dict()["kronfac"]["layers"]
    assert {name: layer["updates"] for name, layer in layers.items()} == {"0": 1, "2": 2}


def test_warnings_point_at_the_users_line() -> None:
    with pytest.warns(UserWarning, match="trains? as SGD") as caught:
        KFAC(nn.Sequential(nn.PReLU(3)), 0.1)
    assert caught[0].filename == __file__


def test_a_single_layer_is_a_model() -> None:
    model = nn.Linear(3, 2)
    optimizer = KFAC(model, 0.1)
    before = snapshot(model)
    train_step(model, optimizer, *vectors(8, 3, 2))
    assert not equal(before, snapshot(model))
    assert optimizer.layers == ("",)


@pytest.mark.parametrize("padding", ["same", "valid", 2])
def test_convolutions_of_all_kinds_train(padding: str | int) -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 3, (3, 1), padding=padding, dilation=2, bias=False), nn.Flatten(), nn.LazyLinear(2)
    )
    x = torch.randn(4, 2, 7, 6)
    model(x)
    optimizer = KFAC(model, 0.1)
    before = snapshot(model)
    train_step(model, optimizer, x, torch.randint(2, (4,)))
    assert not any(torch.equal(a, b) for a, b in zip(before, snapshot(model), strict=True))


def test_channels_last_gives_the_same_step() -> None:
    torch.manual_seed(1)
    x, y = torch.randn(4, 2, 5, 5, dtype=torch.float64), torch.randint(3, (4,))
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 3)).double()
        model = model.to(memory_format=memory_format)
        optimizer = KFAC(model, 0.1, fisher="exact")
        for _ in range(3):
            train_step(model, optimizer, x.to(memory_format=memory_format), y)
        results.append(snapshot(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
