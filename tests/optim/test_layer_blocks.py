"""How blocks of every kind are inverted and applied: groups, diagonal input factors, whole blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.curvature import adapter_for
from kronfac.optim import KFAC
from tests.optim.models import equal, same_tree, snapshot

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(4, 3), (2, 4)),
    "Conv1d groups": (lambda: nn.Conv1d(4, 6, 2, groups=2), (4, 5)),
    "Conv2d depthwise": (lambda: nn.Conv2d(3, 3, 2, groups=3), (3, 3, 3)),
    "ConvTranspose2d groups": (lambda: nn.ConvTranspose2d(4, 2, 2, groups=2), (4, 2, 2)),
    "Embedding": (lambda: nn.Embedding(7, 3), (4,)),
    "LayerNorm": (lambda: nn.LayerNorm(5), (2, 5)),
    "LayerNorm unit by unit": (lambda: nn.LayerNorm(70), (70,)),
    "GroupNorm without bias": (lambda: nn.RMSNorm(5), (5,)),
}


class Headed(nn.Module):
    """A layer and a frozen head."""

    def __init__(self, layer: nn.Module, features: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(features, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x)).flatten(1))  # type: ignore[no-any-return]


def problem(name: str, dtype: torch.dtype = torch.float64) -> tuple[Headed, Tensor, Tensor]:
    torch.manual_seed(3)
    layer, shape = LAYERS[name][0]().to(dtype), LAYERS[name][1]
    x = torch.randint(7, (6, *shape)) if name == "Embedding" else torch.randn(6, *shape, dtype=dtype)
    return Headed(layer, layer(x).flatten(1).shape[1]).to(dtype), x, torch.randint(3, (6,))


def expected_direction(A: Tensor, G: Tensor, V: Tensor, damping: float, solve: str, dense: bool) -> Tensor:
    """P of one block through dense matrices."""
    A = A.diag() if A.dim() == 1 else A
    one = torch.eye(V.numel(), dtype=V.dtype)
    if solve == "eigen" or dense:
        return torch.linalg.solve(torch.kron(G, A) + damping * one, V.reshape(-1)).view_as(V)
    pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
    left = G + damping**0.5 / pi * torch.eye(len(G), dtype=V.dtype)
    right = A + pi * damping**0.5 * torch.eye(len(A), dtype=V.dtype)
    return torch.linalg.solve(left, torch.linalg.solve(right, V.mT).mT)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("solve", ["inverse", "eigen"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_step_is_the_damped_inverse_times_the_gradient(name: str, solve: str, split: bool) -> None:
    """Also with weight and bias in groups of their own that decay differently."""
    model, x, y = problem(name)
    parameters = list(model.layer.parameters())
    decays = [0.2, 0.3][: len(parameters)] if split else [0.0] * len(parameters)
    groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(parameters, decays, strict=True)]
    damping, lr = 0.05, 0.3
    optimizer = KFAC(model, lr, params=groups, damping=damping, solve=solve, momentum=0.0, kl_clip=None, fisher="exact")
    before = [p.detach().clone() for p in parameters]
    functional.cross_entropy(model(x), y).backward()
    adapter = adapter_for(model.layer)
    assert adapter is not None
    gradients = [p.grad + decay * p.detach() for p, decay in zip(parameters, decays, strict=True)]  # type: ignore
    optimizer.step()
    ((_, (A, G)),) = optimizer.factors().items()

    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient
    V = adapter.gradient()
    options = (damping + decays[0], solve, adapter.block == "dense")
    if V.dim() == 3:
        P = torch.stack([expected_direction(*block, *options) for block in zip(A, G, V, strict=True)])
    else:
        P = expected_direction(A, G, V, *options)
    for p, old, part in zip(parameters, before, adapter.split(P), strict=True):
        torch.testing.assert_close(p.detach(), old - lr * part, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("solve", ["inverse", "eigen"])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints_continue_bit_for_bit(name: str, solve: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"solve": solve, "inverse_every": 2, "seed": 5}
    model, x, y = problem(name, dtype)
    optimizer = KFAC(model, 0.1, **options)

    def train(model: nn.Module, optimizer: KFAC, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            functional.cross_entropy(model(x).float(), y).backward()
            optimizer.step()

    train(model, optimizer, 3)
    weights, saved = {k: v.clone() for k, v in model.state_dict().items()}, optimizer.state_dict()
    twin, _, _ = problem(name, dtype)
    twin.load_state_dict(weights)
    other = KFAC(twin, 0.1, **options)
    other.load_state_dict(saved)
    train(model, optimizer, 3)
    train(twin, other, 3)
    assert optimizer.skipped_steps == 0
    assert equal(snapshot(model), snapshot(twin))
    assert same_tree(optimizer.state_dict(), other.state_dict())
    broken = optimizer.state_dict()
    entry = broken["kronfac"]["layers"]["layer"]
    entry["G"] = entry["G"].unsqueeze(0)
    with pytest.raises(ValueError, match=r"layers\.layer\.G: expected a floating-point tensor of shape"):
        other.load_state_dict(broken)


@pytest.mark.parametrize("name", ["Conv1d groups", "LayerNorm unit by unit"])
def test_a_group_that_cannot_be_inverted_keeps_the_whole_layers_inverse(name: str) -> None:
    model, x, y = problem(name, torch.float32)
    optimizer = KFAC(model, 0.1, inverse_every=1, momentum=0.0)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    step()
    layer = optimizer._coverage.layers[0]
    kept = layer.factorisation
    assert layer.factors is not None
    layer.factors.G[0].fill_(-1e30)
    with pytest.warns(UserWarning, match="could not be inverted"):
        step()
    assert optimizer.inverse_failures == 1
    assert layer.factorisation is kept


def test_an_embedding_never_forms_a_square_of_its_vocabulary() -> None:
    model = nn.Sequential(nn.Embedding(200_000, 4), nn.Flatten(), nn.Linear(12, 2))
    optimizer = KFAC(model, 0.1)
    x = torch.randint(200_000, (5, 3))
    for _ in range(2):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), torch.randint(2, (5,))).backward()
        optimizer.step()
    assert optimizer.factors()["0"].A.shape == (200_000,)
    assert optimizer.skipped_steps == 0


def test_what_an_embedding_leaves_to_sgd() -> None:
    options: list[dict[str, Any]] = [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}]
    for option in options:
        with pytest.warns(UserWarning, match=r"0\.weight \(Embedding\)"):
            assert KFAC(nn.Sequential(nn.Embedding(5, 3, **option), nn.Linear(3, 2)), 0.1).layers == ("1",)


def test_sharing_differs_by_group() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    groups = [{"params": model[0].parameters(), "sharing": "reduce"}, {"params": model[2].parameters()}]
    optimizer = KFAC(model, 0.1, params=groups, likelihood="gaussian", fisher="exact")
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    hidden = torch.tanh(model[0](x)).detach()
    model(x).sum().backward()
    optimizer.step()
    factors = optimizer.factors()

    def second_moment(rows: Tensor) -> Tensor:
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
        return rows.T @ rows

    torch.testing.assert_close(factors["0"].A, second_moment(x.mean(1)) / 5)
    torch.testing.assert_close(factors["2"].A, second_moment(hidden.flatten(0, 1)) / 5)
    # A checkpoint brings its sharing along.
    other = KFAC(model, 0.1, params=[{"params": model[i].parameters()} for i in (0, 2)], likelihood="gaussian")
    other.load_state_dict(optimizer.state_dict())
    assert [layer.adapter.sharing for layer in other._coverage.layers] == ["reduce", "expand"]


def test_weight_and_bias_cannot_differ_in_sharing() -> None:
    layer = nn.Linear(3, 2)
    groups = [{"params": [layer.weight], "sharing": "reduce"}, {"params": [layer.bias]}]
    with pytest.raises(ValueError, match="sharing: expected the same value in the groups of its weight and bias"):
        KFAC(layer, 0.1, params=groups)


def test_a_layer_used_twice_is_reduced_call_by_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))[:, 0]  # type: ignore[no-any-return]

    model = Twice().double()
    optimizer = KFAC(model, 0.1, sharing="reduce", likelihood="gaussian", fisher="exact")
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    inner = torch.tanh(model.layer(x)).detach()
    model(x).sum().backward()
    optimizer.step()
    ones = x.new_ones(10, 1)
    rows = torch.cat([torch.cat([x.mean(1), inner.mean(1)]), ones], 1)
    torch.testing.assert_close(optimizer.factors()["layer"].A, rows.T @ rows / 10)
