"""Activation checkpointing: the first forward counts, or a refusal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from kronfac.curvature import KroneckerFactors
from tests.curvature.models import relative
from tests.curvature.recording import same, watch


class Checkpointed(nn.Module):
    """A model whose middle is recomputed in backward."""

    def __init__(self, inner: nn.Sequential, reentrant: bool) -> None:
        super().__init__()
        self.inner = inner
        self.reentrant = reentrant
        self.calls = 0
        inner[2].register_forward_hook(lambda m, args, out: self._count())

    def _count(self) -> None:
        self.calls += 1

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        h = self.inner[:2](x)
        return self.inner[4:](checkpoint(self.inner[2:4], h, use_reentrant=self.reentrant))


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
def test_non_reentrant_checkpointing_counts_the_first_forward_only(
    model: nn.Sequential, x: Tensor, expected: dict[str, KroneckerFactors], fisher: str
) -> None:
    root = Checkpointed(model, reentrant=False)
    recorder = watch(root, fisher=fisher)
    functional.cross_entropy(root(x), torch.tensor([0, 1, 2, 3, 0, 1])).backward()
    assert root.calls > 1  # it was recomputed
    pending = recorder.collect()
    assert {layer.positions for layer in pending.layers.values()} == {6}
    got = {name.removeprefix("inner."): pair for name, pair in pending.factors().items()}
    if fisher == "exact":
        assert same(got, expected)
    assert all(relative(got[name].A, expected[name].A) < 1e-12 for name in expected)
    gradient = model[2].weight.grad
    assert gradient is not None
    assert gradient.isfinite().all()


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_whole_model_under_non_reentrant_checkpointing(
    model: nn.Sequential, x: Tensor, expected: dict[str, KroneckerFactors], fisher: str
) -> None:
    recorder = watch(model, fisher=fisher)
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    functional.cross_entropy(checkpoint(model, x, use_reentrant=False), y).backward()
    got = [p.grad.clone() for p in model.parameters()]
    pending = recorder.collect()
    assert pending.terms == 6
    if fisher == "exact":
        assert same(pending.factors(), expected)
    recorder.remove()
    model.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    for p, g in zip(model.parameters(), got, strict=True):
        torch.testing.assert_close(p.grad, g)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused(model: nn.Sequential, x: Tensor) -> None:
    root = Checkpointed(model, reentrant=True)
    recorder = watch(root)
    with pytest.raises(RuntimeError, match=r"layers 'inner.2' ran under reentrant checkpointing.*use_reentrant=False"):
        root(x)
    assert not recorder.is_open
    assert recorder.collect().layers == {}


def test_whole_model_under_reentrant_checkpointing_is_explained(model: nn.Sequential, x: Tensor) -> None:
    recorder = watch(model)
    checkpoint(model, x.requires_grad_(), use_reentrant=True).sum().backward()
    assert not recorder.ever_recorded
    text = recorder.explain_missing()
    assert "inside a backward pass" in text
    assert "torch.no_grad" in text
    assert "use_reentrant=False" in text
