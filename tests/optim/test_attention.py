"""Attention under KFAC: packed projections are preconditioned as the four layers that they are."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.curvature import Categorical
from kronfac.optim import KFAC
from tests.curvature.test_attention import NAMES, N, T, inputs, pair
from tests.optim.models import equal, same_tree, snapshot


def step(model: nn.Module, optimizer: KFAC, y: Tensor) -> None:
    x, memory = inputs()
    optimizer.zero_grad()
    functional.cross_entropy(model(x, memory).flatten(0, 1), y.flatten()).backward()
    optimizer.step()


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("how", ["self", "memory", "three", "kdim"])
def test_training_equals_that_of_linear_layers(how: str, fisher: str) -> None:
    """Also the output projection, which is never called as a module, and decay, momentum and the KL clip."""
    options: dict[str, Any] = {"weight_decay": 0.01, "likelihood": Categorical(dim=-1), "inverse_every": 2, "seed": 0}
    y = torch.randint(4, (N, T))
    models = pair(how)
    for model in models:
        if how == "self":
            model.memory.requires_grad_(False)
        if how != "three":
            model.values.requires_grad_(False)
        if how == "kdim":
            model.memory.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer = KFAC(model, 0.1, fisher=fisher, **options)
            assert {f"attention.{name}" for name in NAMES} <= set(optimizer.layers)
            for _ in range(4):
                step(model, optimizer, y)
    packed, written = models
    torch.testing.assert_close(packed.attention.out_proj.weight, written.attention.out_proj.weight)
    torch.testing.assert_close(packed(*inputs()), written(*inputs()))


def test_weight_and_bias_in_groups_of_their_own() -> None:
    y = torch.randint(4, (N, T))
    models = pair("self")
    for model in models:
        biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
        weights = [p for name, p in model.named_parameters() if not name.endswith("bias")]
        groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": 0.05}]
        optimizer = KFAC(model, 0.1, params=groups, likelihood=Categorical(dim=-1), fisher="exact")
        for _ in range(3):
            step(model, optimizer, y)
    torch.testing.assert_close(models[0](*inputs()), models[1](*inputs()))


def test_a_checkpoint_continues_bit_for_bit() -> None:
    y = torch.randint(4, (N, T))
    model, _ = pair("self")
    optimizer = KFAC(model, 0.1, likelihood=Categorical(dim=-1))
    for _ in range(2):
        step(model, optimizer, y)
    twin, _ = pair("self")
    twin.load_state_dict(model.state_dict())
    other = KFAC(twin, 0.1, likelihood=Categorical(dim=-1))
    other.load_state_dict(optimizer.state_dict())
    for one in ((model, optimizer), (twin, other)):
        for _ in range(2):
            step(*one, y)
    assert equal(snapshot(model), snapshot(twin))
    assert same_tree(optimizer.state_dict(), other.state_dict())


def test_what_attention_leaves_to_sgd() -> None:
    with pytest.warns(UserWarning, match=r"bias_k \(MultiheadAttention\), bias_v \(MultiheadAttention\)") as caught:
        optimizer = KFAC(nn.MultiheadAttention(4, 2, add_bias_kv=True), 0.1)
    assert "in_proj" not in str(caught[0].message)
    assert set(optimizer.layers) == set(NAMES)


def test_rows_without_statistics_move_as_sgd() -> None:
    """Keys and values that depend on nothing trainable, and do not reach the output."""

    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0][:, 0]  # type: ignore[no-any-return]

    model = Partial()
    optimizer = KFAC(model, 0.1, momentum=0.0, weight_decay=0.3)
    layers = {layer.name: layer for layer in optimizer._coverage.layers}
    x = torch.randn(5, 3, 4)
    model.eval()
    with optimizer.record_statistics():
        functional.cross_entropy(model(x), torch.randint(4, (5,))).backward()
    optimizer._live_recorder()._pending.layers.pop("attention.k_proj")
    weight = model.attention.in_proj_weight
    assert weight is not None
    assert weight.grad is not None
    start = weight.detach().clone()
    with pytest.warns(UserWarning, match="'attention.k_proj' have gradients but no statistics"):
        optimizer.step()
    sgd = start - 0.1 * (weight.grad + 0.3 * start)
    torch.testing.assert_close(weight.detach()[4:8], sgd[4:8])
    assert not torch.allclose(weight.detach()[:4], sgd[:4])
    assert layers["attention.k_proj"].factors is None


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_transformer_encoder_trains_without_a_warning(batch_first: bool, fisher: str) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(13, 8)
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(8, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            h = self.embedding(tokens)
            h = self.encoder(h if batch_first else h.transpose(0, 1))
            return self.head(h.mean(1 if batch_first else 0))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Encoder()
        optimizer = KFAC(model, 0.1, fisher=fisher, damping=1e-2)
        x = torch.randint(13, (24, 6))
        y = x[:, 0] % 3
        losses = []
        for _ in range(50):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert not optimizer._coverage.uncovered
    assert optimizer.skipped_steps == optimizer.inverse_failures == 0
    assert losses[-1] < 0.5 * losses[0]
