"""Traps 9, 11 and 12 of the list in test_traps.py: layers and configurations that crash or mislead K-FAC."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.optim import KFAC


class Everything(nn.Module):
    """Tokens through an embedding, convolutions of all kinds, norms, attention and a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8, padding_idx=0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer_norm = nn.LayerNorm(8)
        self.tokens, self.frozen, self.unused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(3, 3)
        self.frozen.requires_grad_(False)
        self.same = nn.Conv1d(8, 8, 4, padding="same", dilation=2, groups=4)
        self.depthwise = nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular", groups=8)
        self.up, self.group_norm = nn.Conv1d(8, 80, 1), nn.GroupNorm(2, 80)
        self.transposed = nn.ConvTranspose1d(80, 6, 3, stride=2, groups=2, padding=1)
        self.batch_norm = nn.BatchNorm1d(6)
        self.plane, self.space = nn.Conv2d(1, 2, (3, 2), stride=(2, 1)), nn.Conv3d(1, 2, (1, 2, 2))
        self.head = nn.Linear(14, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (N, 3)."""
        h = self.embedding(tokens)
        h = self.layer_norm(h + self.attention(h, h, h, need_weights=False)[0])
        h = torch.tanh(self.frozen(torch.tanh(self.tokens(torch.tanh(self.tokens(h))))))
        maps = self.depthwise(torch.relu_(self.same(h.mT)))
        sequence = self.batch_norm(self.transposed(self.group_norm(self.up(maps)))).mean(-1)
        pictures = self.plane(h.unsqueeze(1)).mean((2, 3)), self.space(h[:, None, None]).flatten(2).mean(-1)
        shapes = (h.mean(1)[:, :4], *pictures)
        return self.head(torch.cat([sequence, *shapes], 1))  # type: ignore[no-any-return]


def batch(count: int) -> tuple[Tensor, Tensor]:
    x = torch.randint(11, (count, 7))
    return x, x[:, 0] % 3


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("solve", ["inverse", "eigen"])
@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_trap_9_layers_of_all_kinds(fisher: str, solve: str, sharing: str) -> None:
    torch.manual_seed(0)
    model = Everything()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = KFAC(model, 0.05, fisher=fisher, solve=solve, sharing=sharing, damping=1e-2)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        x, y = batch(16)
        losses = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    still = {f"{name}.{part}" for name in ("frozen", "unused") for part in ("weight", "bias")}
    assert moved == set(before) - still
    assert torch.equal(model.embedding.weight[0], before["embedding.weight"][0])  # padding has no gradient
    assert optimizer.skipped_steps == optimizer.inverse_failures == 0
    assert set(optimizer.factors()) == set(optimizer.layers) - {"unused"}
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_trap_9_empty_batches(sharing: str) -> None:
    """An empty micro-batch adds nothing to the statistics of the others."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.GroupNorm(2, 4),
        nn.ConvTranspose2d(4, 2, 2),
        nn.Flatten(2),
        nn.LayerNorm(25),
        nn.Linear(25, 3),
        nn.Flatten(),
        nn.Linear(6, 3),
    ).double()
    x, y = torch.randn(5, 2, 6, 6, dtype=torch.float64), torch.randint(3, (5,))
    found = []
    for sizes in ([5], [2, 0, 3]):
        optimizer = KFAC(model, 0.0, fisher="exact", sharing=sharing)
        for some, labels in zip(x.split(sizes), y.split(sizes), strict=True):
            functional.cross_entropy(model(some), labels, reduction="sum").backward()
        optimizer.step()
        found.append(optimizer.factors())
    for name, (A, G) in found[0].items():
        torch.testing.assert_close(found[1][name].A, A)
        torch.testing.assert_close(found[1][name].G, G)


@pytest.mark.parametrize("how", ["bfloat16 model", "autocast"])
def test_trap_11_factors_are_float32_in_half_precision(how: str) -> None:
    torch.manual_seed(0)
    model = Everything()
    model = model.bfloat16() if how == "bfloat16 model" else model
    optimizer = KFAC(model, 0.05, fisher="exact")
    x, y = batch(8)
    with torch.autocast("cpu", torch.bfloat16) if how == "autocast" else nullcontext():
        out = model(x)
    functional.cross_entropy(out.float(), y).backward()
    optimizer.step()
    assert optimizer.skipped_steps == 0
    factors = optimizer.factors()
    assert all(factor.dtype == torch.float32 for pair in factors.values() for factor in pair)
    assert len(factors) == len(optimizer.layers) - 1


def test_trap_12_layers_without_an_adapter_train_as_sgd_after_one_warning() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.lstm = nn.Embedding(11, 4), nn.LSTM(4, 5, batch_first=True)
            self.gru, self.head = nn.GRU(5, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.gru(self.lstm(self.embedding(tokens))[0])[0][:, -1])  # type: ignore[no-any-return]

    model = Recurrent()
    with pytest.warns(UserWarning, match=r"8 of the model's parameters .*lstm\.weight_ih_l0 \(LSTM\)") as caught:
        optimizer = KFAC(model, 0.1, momentum=0.0)
    assert len(caught) == 1
    assert optimizer.layers == ("embedding", "head")
    for _ in range(2):
        optimizer.zero_grad()
        functional.cross_entropy(model(batch(6)[0]), torch.randint(3, (6,))).backward()
        start = model.lstm.weight_hh_l0.detach().clone()
        optimizer.step()
        assert model.lstm.weight_hh_l0.grad is not None
        torch.testing.assert_close(model.lstm.weight_hh_l0.detach(), start - 0.1 * model.lstm.weight_hh_l0.grad)
