"""Whole networks under every structure, and a thousand steps without a leak."""

from __future__ import annotations

import gc
import re
import warnings
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.optim import KFAC
from tests.optim.available import IDS, STRUCTURES
from tests.optim.models import mlp, train_step, vectors

pytestmark = pytest.mark.slow


def test_there_are_structures() -> None:
    assert ("kfac", "inverse") in STRUCTURES
    assert ("kfac", "eigen") in STRUCTURES


class Encoder(nn.Module):
    """Four layers of torch's transformer encoder on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(16, 16), nn.Embedding(8, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T) to (N, classes)."""
        places = torch.arange(x.shape[1]).expand_as(x)
        return self.head(self.encoder(self.tokens(x) + self.places(places)).mean(1))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """Residual."""
        h = self.bn2(self.conv2(functional.relu_(self.bn1(self.conv1(x)))))
        around = functional.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return functional.relu_(h.add_(around))


def resnet20(width: int = 8) -> nn.Sequential:
    widths = [width, *[width] * 3, *[2 * width] * 3, *[4 * width] * 3]
    blocks = [Block(a, b, 1 if a == b else 2) for a, b in pairwise(widths)]
    stem = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 4))


def tokens(count: int) -> tuple[Tensor, Tensor]:
    x = torch.randint(16, (count, 8))
    return x, x[:, 0] % 4


def pictures(count: int) -> tuple[Tensor, Tensor]:
    y = torch.randint(4, (count,))
    return torch.randn(count, 3, 16, 16) + y[:, None, None, None] - 1.5, y


@pytest.mark.parametrize("name", ["transformer encoder", "ResNet-20"])
@pytest.mark.parametrize(("structure", "solve"), STRUCTURES, ids=IDS)
def test_networks_train_under_every_structure_without_a_warning(structure: str, solve: str, name: str) -> None:
    torch.manual_seed(0)
    model, data, steps = (Encoder(), tokens, 150) if name == "transformer encoder" else (resnet20(), pictures, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Batches are small: at the default clip the noise throws exact damping of this λ back (docs/kfac.md).
        options = {"damping": 1e-2, "kl_clip": 1e-4, "inverse_every": 5}
        optimizer = KFAC(model, 0.05, structure=structure, solve=solve, **options)
        covered = {p for layer in optimizer._coverage.layers for p in layer.parameters}
        assert covered == set(model.parameters())
        losses = [train_step(model, optimizer, *data(32)) for _ in range(steps)]
    assert optimizer.skipped_steps == optimizer.inverse_failures == 0
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def resident() -> int:
    """Bytes of memory that this process occupies."""
    text = Path("/proc/self/smaps_rollup").read_text()
    found = re.search(r"^Rss:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


@pytest.mark.parametrize(
    ("structure", "solve", "fisher"),
    [*((*pair, "mc") for pair in STRUCTURES), ("kfac", "inverse", "empirical")],
    ids=[*IDS, "empirical"],
)
def test_a_thousand_steps_leak_nothing(structure: str, solve: str, fisher: str) -> None:
    """The memory of the process stays within one percent, and no hook is left when the optimizer goes."""
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.LayerNorm(64))
    model = nn.Sequential(conv, mlp(64, 400, 5))  # wide enough for gradients to be taken by their rows
    optimizer = KFAC(model, 0.01, structure=structure, solve=solve, fisher=fisher, factor_every=2, inverse_every=50)

    def run(optimizer: KFAC, steps: int) -> None:
        for _ in range(steps):
            train_step(model, optimizer, torch.randn(16, 2, 6, 6), torch.randint(5, (16,)))

    run(optimizer, 200)
    gc.collect()
    before, objects = resident(), len(gc.get_objects())
    run(optimizer, 1000)
    gc.collect()
    assert len(gc.get_objects()) < 1.01 * objects
    assert resident() < 1.01 * before
    watched = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert watched() is None
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


def test_optimizers_that_come_and_go_leave_nothing() -> None:
    """A sweep in one process, over one model."""
    model = mlp(32, 64, 5)
    batch = vectors(16, 32, 5)

    def run(count: int) -> None:
        for _ in range(count):
            train_step(model, KFAC(model, 0.01), *batch)

    run(50)
    gc.collect()
    before, objects = resident(), len(gc.get_objects())
    run(300)
    gc.collect()
    assert len(gc.get_objects()) < 1.01 * objects
    assert resident() < 1.01 * before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
