"""deepcopy and pickle: of a watched model, and of the optimizer together with its model."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kronfac.optim import KFAC
from tests.optim.models import convnet, equal, images, mlp, same_tree, snapshot, train_step, vectors

WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "torch.save": lambda pair: _saved(pair),
}


def _saved(pair: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(pair, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def halve(step: int) -> float:
    return 0.1 * 0.5**step


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("how", WAYS)
def test_a_copied_pair_continues_bit_for_bit_and_apart(how: str, fisher: str) -> None:
    """The copied optimizer watches the copied model, and neither pair sees the other's forwards."""
    model = convnet()
    groups = [
        {"params": model[0].parameters(), "damping": halve, "name": "first"},
        {"params": [*model[2].parameters(), *model[5].parameters()], "momentum": 0.5},
    ]
    optimizer = KFAC(model, halve, params=groups, fisher=fisher, inverse_every=3, seed=3)
    for _ in range(4):
        train_step(model, optimizer, *images(6))
    twin, own = WAYS[how]((model, optimizer))
    assert own.model is twin
    assert own.param_groups[0]["params"][0] is twin[0].weight
    assert own.param_groups[0]["name"] == "first"
    assert same_tree(own.state_dict(), optimizer.state_dict())
    before = snapshot(model)
    for _ in range(4):  # alone first: a shared hook or generator would show below
        twin(images(6)[0])
    WAYS[how]((model, optimizer))
    twin, own = WAYS[how]((model, optimizer))
    assert equal(before, snapshot(model))
    for _ in range(5):
        batch = images(6)
        train_step(model, optimizer, *batch)
        train_step(twin, own, *batch)
    assert equal(snapshot(model), snapshot(twin))
    assert same_tree(own.state_dict(), optimizer.state_dict())


def test_a_copied_optimizer_has_a_copied_model() -> None:
    model = mlp(3, 4, 2)
    optimizer = KFAC(model, 0.1)
    train_step(model, optimizer, *vectors(5, 3, 2))
    own = copy.deepcopy(optimizer)
    assert own.model is not model
    before = snapshot(model)
    train_step(own.model, own, *vectors(5, 3, 2))
    assert equal(before, snapshot(model))
    watched = weakref.ref(own)
    del own
    gc.collect()
    assert watched() is None


def test_a_scaler_is_copied_along() -> None:
    model, scaler = mlp(3, 4, 2), torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = KFAC(model, 0.1, fisher="empirical", grad_scaler=scaler)
    twin, own, other = copy.deepcopy((model, optimizer, scaler))
    x, y = vectors(5, 3, 2)
    for net, some, scale in ((model, optimizer, scaler), (twin, own, other)):
        scale.scale(torch.ones(()))  # makes the scale
        scale.update(new_scale=2.0 ** (5 if net is twin else 6))
        scale.scale(torch.nn.functional.cross_entropy(net(x), y)).backward()
        scale.unscale_(some)
        scale.step(some)
        scale.update()
    assert equal(snapshot(model), snapshot(twin))  # each with the scale of its own


def test_the_copy_does_not_warn_again() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="train as SGD"):
        optimizer = KFAC(model, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin, own = copy.deepcopy((model, optimizer))
        train_step(twin, own, *vectors(5, 3, 2))


def test_what_cannot_be_copied_is_refused() -> None:
    model = mlp(3, 2)
    optimizer = KFAC(model, 0.1)
    with pytest.raises(TypeError, match="a shallow copy would be a second optimizer"):
        copy.copy(optimizer)
    model.optimizer = optimizer
    with pytest.raises(TypeError, match="that its own model refers to"):
        copy.deepcopy(model)
    del model.optimizer
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(KFAC(mlp(3, 2), lambda step: 0.1))


@pytest.mark.parametrize("how", WAYS)
def test_trap_14_a_copied_model_is_not_watched(how: str) -> None:
    """It can be used, moved to other types, quantised and given an optimizer of its own."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2))
    forward: Callable[[nn.Module, Tensor], Tensor] = lambda m, x: m[2](m[1](*[m[0](x)] * 3)[0].mean(1))  # noqa: E731

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            return forward(self.parts, x)

    root = Root() if how == "deepcopy" else nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 2))
    optimizer = KFAC(root, 0.1, fisher="exact")
    x, y = torch.randint(5, (6, 3)), torch.randint(2, (6,))
    train_step(root, optimizer, x, y)
    state = optimizer.state_dict()["kronfac"]["layers"]
    twin = WAYS[how](root)
    twin(x).sum().backward()
    assert all(p.grad is not None for p in twin.parameters())
    twin.double()(x)
    optimizer.zero_grad()
    optimizer.step()  # nothing that the copy did is pending here
    assert same_tree(optimizer.state_dict()["kronfac"]["layers"], state)
    own = KFAC(twin, 0.1)
    train_step(twin, own, x, y)
    assert set(own.factors()) == set(optimizer.factors())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_hooks_of_a_copy_bear_other_arguments() -> None:
    """torch.ao.quantization moves hooks to modules of another type and forgets that they want keyword arguments."""
    model = mlp(3, 4, 2)
    optimizer = KFAC(model, 0.1)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert quantised(torch.randn(5, 3)).shape == (5, 2)
    train_step(model, optimizer, *vectors(5, 3, 2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_watched_model_cannot_be_scripted_and_says_why() -> None:
    model = mlp(3, 4, 2)
    optimizer = KFAC(model, 0.1)
    with pytest.raises(AttributeError, match=r"torch\.jit\.script cannot translate the hooks"):
        torch.jit.script(model)
    del optimizer
    gc.collect()
    assert torch.jit.script(model)(torch.randn(5, 3)).shape == (5, 2)
