"""Which forwards and layers count, and how several add up."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kronfac.curvature import KroneckerFactors, find_layers
from tests.curvature.models import relative
from tests.curvature.recording import same, watch


def test_pending_survives_zero_grad(model: nn.Module, x: Tensor, expected: dict[str, KroneckerFactors]) -> None:
    recorder = watch(model)
    loss = model(x).sum()
    model.zero_grad()
    loss.backward()
    assert same(recorder.collect().factors(), expected)


def test_forwards_accumulate_by_examples(model: nn.Module, x: Tensor, expected: dict[str, KroneckerFactors]) -> None:
    recorder = watch(model)
    for part in (x[:1], x[1:4], x[4:]):
        model(part).sum().backward()
    pending = recorder.collect()
    assert (pending.terms, pending.examples) == (6, 6)
    assert same(pending.factors(), expected)
    assert recorder.collect().layers == {}


def test_clear(model: nn.Module, x: Tensor) -> None:
    recorder = watch(model)
    model(x)
    recorder.clear()
    assert recorder.collect().layers == {}
    assert recorder.ever_recorded


def test_empty_batches(model: nn.Module, x: Tensor, expected: dict[str, KroneckerFactors]) -> None:
    for fisher in ("mc", "exact", "empirical"):
        recorder = watch(model, fisher=fisher)
        model(x[:0]).sum().backward()
        pending = recorder.collect()
        assert pending.terms == 0
        assert pending.factors() == {}
        assert pending.finite()
        recorder.remove()
    recorder = watch(model)
    model(x[:0])
    model(x)
    assert same(recorder.collect().factors(), expected)


def test_layers_unused_in_a_step_are_absent() -> None:
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 3), nn.Linear(5, 3)
            self.first = True

        def forward(self, x: Tensor) -> Tensor:
            return (self.one if self.first else self.two)(x)

    model, x = Switch(), torch.randn(6, 5)
    recorder = watch(model)
    model(x)
    assert set(recorder.collect().layers) == {"one"}
    model(x)
    model.first = False
    model(x[:2])
    pending = recorder.collect()
    # M counts the loss terms of all forwards, R the positions that each layer saw.
    assert pending.terms == 8
    assert {name: layer.positions for name, layer in pending.layers.items()} == {"one": 6, "two": 2}


def test_frozen_layers(model: nn.Module, x: Tensor, expected: dict[str, KroneckerFactors]) -> None:
    for p in model[0].parameters():
        p.requires_grad_(False)
    assert set(find_layers(model)) == {"2", "4"}
    recorder = watch(model)
    model(x)
    assert same(recorder.collect().factors(), {name: expected[name] for name in ("2", "4")})
    # frozen after the recorder was made
    model[2].weight.requires_grad_(False)
    model(x)
    assert set(recorder.collect().layers) == {"4"}


def test_a_middle_layer_frozen_later(model: nn.Module, x: Tensor) -> None:
    """Its output still carries a gradient, to the layers before it."""
    recorder = watch(model)
    model[2].weight.requires_grad_(False)
    model(x)
    assert set(recorder.collect().layers) == {"0", "4"}


def test_a_layer_that_sees_nothing() -> None:
    """Experts to which no example of the batch was sent."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.one(x[:0]), self.two(x)])

    model = Experts()
    recorder = watch(model)
    model(torch.randn(6, 5))
    assert set(recorder.collect().factors()) == {"two"}


class Forces(nn.Module):
    """Differentiates inside its own forward, through a block that is recomputed there."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = nn.Sequential(nn.Linear(5, 6), nn.Tanh()), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of features that hold a gradient."""
        x = x.detach().requires_grad_()
        h = checkpoint(self.block, x, use_reentrant=False)
        (slope,) = torch.autograd.grad(h.square().sum(), x, retain_graph=True)
        return self.head(h + slope.mean())


def test_layers_recomputed_inside_the_forward_count_once(x: Tensor) -> None:
    model = Forces().double()
    calls: list[int] = []
    model.block[0].register_forward_hook(lambda m, args, out: calls.append(1))
    recorder = watch(model, fisher="mc")
    model(x)
    assert len(calls) > 1
    assert {layer.positions for layer in recorder.collect().layers.values()} == {6}


def test_frozen_bias(model: nn.Module, x: Tensor, expected: dict[str, KroneckerFactors]) -> None:
    model[0].bias.requires_grad_(False)
    recorder = watch(model)
    model(x)
    got = recorder.collect().factors()["0"]
    assert relative(got.A, expected["0"].A[:-1, :-1]) < 1e-12
    assert relative(got.G, expected["0"].G) < 1e-12


def test_a_branch_without_grad_is_left_out(model: nn.Module, x: Tensor, expected: dict[str, KroneckerFactors]) -> None:
    """A teacher or target branch runs the same layers under no_grad."""

    class Distil(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = model

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.student(2 * x)
            return self.student(x)

    root = Distil()
    recorder = watch(root)
    root(x)
    assert same({k.removeprefix("student."): v for k, v in recorder.collect().factors().items()}, expected)
