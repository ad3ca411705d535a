"""Attention is differentiated twice whichever fast kernel torch would take, and whichever parameters are chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from kronfac.operators import ggn, hessian
from tests.operators.cases import relative_error
from tests.operators.state import unchanged


class _Encoder(nn.Module):
    """Two layers, of which torch skips the padded tokens in eval mode where no gradients are wanted."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True, dropout=0.1)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=padding)[:, 0])  # type: ignore[no-any-return]


class _MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        found, _ = self.attention(x, x, x, key_padding_mask=padding, need_weights=False)
        return self.head(found[:, 0])  # type: ignore[no-any-return]


class _Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        query, key, value = self.project(x).unflatten(-1, (3, 2, 2)).transpose(1, 3).unbind(2)
        found = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.head(found.transpose(1, 2).flatten(2)[:, -1])  # type: ignore[no-any-return]


def _gradient(model: nn.Module, inputs: tuple[Tensor, Tensor], targets: Tensor, names: list[str]) -> Tensor:
    chosen = [dict(model.named_parameters())[name] for name in names]
    loss = functional.cross_entropy(model(*inputs), targets)
    return torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, chosen)])


def _difference(
    model: nn.Module, inputs: tuple[Tensor, Tensor], targets: Tensor, names: list[str], vector: Tensor
) -> Tensor:
    """Hv by central differences of gradients, all of them on the kernels that have first derivatives."""
    chosen = [dict(model.named_parameters())[name] for name in names]
    parts = [
        part.view_as(parameter)
        for part, parameter in zip(vector.split([p.numel() for p in chosen]), chosen, strict=True)
    ]
    gradients = []
    with sdpa_kernel(SDPBackend.MATH):
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                for parameter, part in zip(chosen, parts, strict=True):
                    parameter.add_(part, alpha=step)
            gradients.append(_gradient(model, inputs, targets, names))
        with torch.no_grad():
            for parameter, part in zip(chosen, parts, strict=True):
                parameter.add_(part, alpha=1e-5)
    return (gradients[0] - gradients[1]) / 2e-5


CHOICES = {
    "all": None,
    "first layer": ["encoder.layers.0"],
    "second layer": ["encoder.layers.1"],
    "attention": ["attention"],
    "projection": ["project"],
    "head": ["head"],
}


@pytest.mark.parametrize(
    ("model_type", "choice"),
    [
        (_Encoder, "all"),
        (_Encoder, "first layer"),
        (_Encoder, "second layer"),
        (_Encoder, "head"),
        (_MultiHead, "all"),
        (_MultiHead, "attention"),
        (_MultiHead, "head"),
        (_Causal, "all"),
        (_Causal, "projection"),
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_attention(model_type: Any, choice: str, frozen: bool) -> None:
    torch.manual_seed(3)
    model = model_type().double().eval()
    inputs = (torch.randn(3, 5, 4, dtype=torch.float64), torch.zeros(3, 5, dtype=torch.bool))
    inputs[1][0, 3:] = True
    targets = torch.randint(0, 2, (3,))
    if frozen:  # the rest asks for no gradients, and the fast path is taken where torch thinks that it may
        model.requires_grad_(False)
    params = CHOICES[choice] or [name for name, _ in model.named_parameters()]
    size = sum(p.numel() for name, p in model.named_parameters() if any(name.startswith(start) for start in params))
    vector = torch.randn(size, dtype=torch.float64)
    with unchanged(model):
        operator = hessian(model, functional.cross_entropy, (inputs, targets), params)
        product = operator @ vector
        pushed = ggn(model, functional.cross_entropy, (inputs, targets), params) @ vector
    model.requires_grad_(True)
    expected = _difference(model, inputs, targets, list(operator.names), vector)
    assert relative_error(product, expected) < 1e-6
    assert vector @ pushed >= 0
    if choice == "head":  # the loss is convex in the head, and linear in it up to the softmax
        assert relative_error(pushed, product) < 1e-10
