"""Accelerate: the documented loop, against the same without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from kronfac.optim import KFAC
from tests.frameworks.replay import same_parameters, twins
from tests.optim.models import mlp, same_tree

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]
accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Accelerate keeps its state in class attributes."""
    accelerate.state.AcceleratorState._reset_state(True)
    yield
    accelerate.state.AcceleratorState._reset_state(True)


def data() -> TensorDataset:
    torch.manual_seed(5)
    return TensorDataset(torch.randn(48, 6), torch.randint(3, (48,)))


def model() -> nn.Module:
    return mlp(6, 8, 3)


def made(net: nn.Module, fisher: str) -> tuple[KFAC, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = KFAC(net, 0.1, fisher=fisher, inverse_every=3, seed=0)
    return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 6)


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_documented_loop_is_the_plain_loop(accumulate: int, fisher: str) -> None:
    """With accumulation, clipping and a scheduler, all three prepared."""
    one, other = twins(model)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    inner, schedule = made(one, fisher)
    net, optimizer, loader, scheduler = accelerator.prepare(one, inner, DataLoader(data(), 8), schedule)
    for x, y in loader:
        with accelerator.accumulate(net):
            loss = functional.cross_entropy(net(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    own, plain = made(other, fisher)
    for index, (x, y) in enumerate(DataLoader(data(), 8)):
        (functional.cross_entropy(other(x), y) / accumulate).backward()
        if (index + 1) % accumulate == 0:
            nn.utils.clip_grad_norm_(other.parameters(), 0.5)
            own.step()
            plain.step()
            own.zero_grad()
    assert inner.state_dict()["kronfac"]["counters"]["step"] == 6 // accumulate
    assert same_parameters(one, other)
    assert same_tree(inner.state_dict(), own.state_dict())


def test_its_checkpoints_continue_bit_for_bit(tmp_path: Path) -> None:
    def run(net: nn.Module, steps: int, load: bool, save: bool) -> KFAC:
        accelerate.state.AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(cpu=True)
        inner, _ = made(net, "mc")
        prepared, optimizer = accelerator.prepare(net, inner)
        if load:
            accelerator.load_state(str(tmp_path / "state"))
        batches = list(DataLoader(data(), 8))
        for x, y in batches[3:] if load else batches[:steps]:
            optimizer.zero_grad()
            accelerator.backward(functional.cross_entropy(prepared(x), y))
            optimizer.step()
        if save:
            accelerator.save_state(str(tmp_path / "state"))
        return inner

    straight, halves = twins(model)
    first = run(straight, 6, False, False)
    run(halves, 3, False, True)
    resumed = model()
    second = run(resumed, 3, True, False)
    assert same_parameters(straight, resumed)
    assert same_tree(first.state_dict(), second.state_dict())


def test_bf16_and_a_model_unwrapped() -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    net = model()
    inner, _ = made(net, "mc")
    prepared, optimizer, loader = accelerator.prepare(net, inner, DataLoader(data(), 8))
    losses = []
    for _ in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            loss = functional.cross_entropy(prepared(x), y)
            accelerator.backward(loss)
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert accelerator.unwrap_model(prepared) is net
    assert len(inner.factors()) == 2
