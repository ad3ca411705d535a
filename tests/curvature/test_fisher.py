"""Monte-Carlo factors tend to the exact ones, empirical ones equal per-example gradients of torch.func."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from kronfac.curvature import Categorical, Gaussian, KroneckerFactors, Likelihood, Recorder, factors, find_layers
from tests.curvature.models import Tokens, convnet, mlp, relative

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (5,)),
    "convnet": (convnet, (2, 7, 6)),
    "tokens": (Tokens, (5, 3)),
}


def recorded(model: nn.Module, x: Tensor, **options: Any) -> dict[str, KroneckerFactors]:
    options.setdefault("likelihood", Categorical(dim=-1))
    recorder = Recorder(model, find_layers(model), **options)
    model(x)
    result = recorder.collect().factors()
    recorder.remove()
    return result


@pytest.mark.parametrize("likelihood", [Categorical(dim=-1), Gaussian(variance=0.3)])
@pytest.mark.parametrize("name", MODELS)
def test_mc_tends_to_exact(name: str, likelihood: Likelihood) -> None:
    make, shape = MODELS[name]
    model, x = make().double(), torch.randn(4, *shape, dtype=torch.float64)
    exact = recorded(model, x, fisher="exact", likelihood=likelihood)
    runs = [
        recorded(
            model, x, fisher="mc", likelihood=likelihood, generator=Generator().manual_seed(seed), fisher_samples=40
        )
        for seed in range(12)
    ]
    for layer, (A, G) in exact.items():
        several = torch.stack([run[layer].G for run in runs])
        error = several.std(0) / math.sqrt(len(runs))
        # 12 runs give a t distribution; 6 standard errors over some hundred entries.
        assert ((several.mean(0) - G).abs() <= 6 * error + 1e-12).all()
        assert relative(several.mean(0), G) < 0.25
        torch.testing.assert_close(runs[0][layer].A, A)


def test_draws_are_averaged_not_scaled() -> None:
    model, x = mlp().double(), torch.randn(400, 5, dtype=torch.float64)
    one, many = (recorded(model, x, fisher="mc", fisher_samples=n) for n in (1, 25))
    for layer in one:
        assert 0.7 < float(many[layer].G.trace() / one[layer].G.trace()) < 1.4


def test_sampling_is_reproducible_and_leaves_the_global_stream_alone() -> None:
    model, x = mlp(), torch.randn(8, 5)
    before = torch.get_rng_state()
    one, two, other = (recorded(model, x, generator=Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[layer].G, two[layer].G) for layer in one)
    assert any(not torch.equal(one[layer].G, other[layer].G) for layer in one)


# ---------------------------------------------------------------------- empirical


def per_example(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, tuple[Tensor, int]]:
    """Σ g gᵀ and how many g, with torch.func over one example at a time; g from a shift of the layer's output."""
    result: dict[str, tuple[Tensor, int]] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        shapes: list[torch.Size] = []
        handle = layer.register_forward_hook(lambda m, a, out, shapes=shapes: shapes.append(out.shape[1:]))
        with torch.no_grad():
            model(x[:1])
        handle.remove()

        def loss(delta: Tensor, example: Tensor, target: Tensor, layer: nn.Module = layer) -> Tensor:
            handle = layer.register_forward_hook(lambda m, a, out: out + delta)
            try:
                logits = model(example.unsqueeze(0)).flatten(0, -2)
            finally:
                handle.remove()
            return functional.cross_entropy(logits, target.reshape(-1), reduction="sum")

        zeros = torch.zeros(len(x), *shapes[0], dtype=x.dtype)
        g = torch.func.vmap(torch.func.grad(loss))(zeros, x, y)
        g = (g.movedim(1, -1) if isinstance(layer, nn.Conv2d) else g).reshape(-1, layer.weight.shape[0])
        result[name] = g.T @ g, len(g)
    return result


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", MODELS)
def test_empirical_equals_per_example_gradients(name: str, reduction: str) -> None:
    make, shape = MODELS[name]
    model, x = make().double(), torch.randn(6, *shape, dtype=torch.float64)
    y = torch.randint(4, (6, 5) if name == "tokens" else (6,))
    for module in model.modules():  # functional transforms cannot have in-place activations on shifted outputs
        if isinstance(module, nn.ReLU):
            module.inplace = False
    expected = per_example(model, x, y)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True

    recorder = Recorder(
        model, find_layers(model), likelihood=Categorical(dim=-1), fisher="empirical", reduction=reduction
    )
    terms = y.numel()
    for scale in (1.0, 1024.0):
        for micro in (1, 3):
            for part, target in zip(x.chunk(micro), y.chunk(micro), strict=True):
                total = functional.cross_entropy(model(part).flatten(0, -2), target.flatten(), reduction="sum")
                (scale * (total / terms if reduction == "mean" else total)).backward()
            pending = recorder.collect(loss_scale=scale)
            assert pending.terms == terms
            assert pending.examples == 6
            got = pending.factors()
            assert set(got) == set(expected)
            for layer, (G_sum, positions) in expected.items():
                assert relative(got[layer].G, G_sum / positions) < 1e-6
    recorder.remove()
    # The same in closed form, from targets instead of a backward.
    for layer, (_, G) in factors(model, (x, y), likelihood=Categorical(dim=-1), fisher="empirical").items():
        assert relative(G, expected[layer][0] / expected[layer][1]) < 1e-6


def watched(**options: Any) -> tuple[nn.Module, Recorder]:
    model = mlp().double()
    options.setdefault("fisher", "empirical")
    return model, Recorder(model, find_layers(model), **options)


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 5, dtype=torch.float64), torch.randint(4, (n,))


def same(one: dict[str, KroneckerFactors], other: dict[str, KroneckerFactors]) -> bool:
    return one.keys() == other.keys() and all(
        relative(one[layer].A, other[layer].A) < 1e-12 and relative(one[layer].G, other[layer].G) < 1e-12
        for layer in one
    )


def test_empirical_forward_without_backward_contributes_nothing() -> None:
    model, recorder = watched()
    x, y = batch()
    functional.cross_entropy(model(x), y).backward()
    expected = recorder.collect().factors()

    kept = model(batch(9)[0])  # its graph stays alive, its backward never comes
    model(batch(3)[0])
    assert recorder.collect().factors() == {}
    functional.cross_entropy(model(x), y).backward()
    pending = recorder.collect()
    assert pending.terms == 6
    assert same(pending.factors(), expected)

    # Its backward comes after all, and belongs to the step in which it comes.
    kept.sum().backward()
    assert recorder.collect().terms == 9


def test_empirical_statistics_of_a_vanished_graph_are_freed() -> None:
    model, recorder = watched()
    remembered: list[weakref.ref[Any]] = []
    model[0].register_forward_hook(lambda m, args, out: remembered.append(weakref.ref(recorder._forward)))
    logits = model(batch()[0])
    assert remembered[0]() is not None
    del logits
    assert remembered[0]() is None
    assert recorder.collect().layers == {}


def test_empirical_order_of_zero_grad_does_not_matter() -> None:
    model, recorder = watched()
    x, y = batch()
    loss = functional.cross_entropy(model(x), y)
    model.zero_grad()
    loss.backward()
    expected = recorder.collect().factors()
    model.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    model.zero_grad()
    assert same(recorder.collect().factors(), expected)


def test_empirical_refuses_two_backward_passes_through_one_forward() -> None:
    model, recorder = watched()
    x, y = batch()
    loss = functional.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match="two backward passes went through one recorded forward"):
        recorder.collect()
    # The refusal leaves nothing behind.
    functional.cross_entropy(model(x), y).backward()
    assert recorder.collect().terms == 6


def test_empirical_backward_again_in_a_later_step_is_not_counted_again() -> None:
    model, recorder = watched()
    x, y = batch()
    loss = functional.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    assert recorder.collect().terms == 6
    loss.backward()
    assert recorder.collect().layers == {}


def test_empirical_ignores_gradients_that_do_not_reach_the_parameters() -> None:
    """An adversarial example or a penalty sends other gradients through the same nodes."""
    model, recorder = watched()
    x, y = batch()
    loss = functional.cross_entropy(model(x), y)
    loss.backward()
    expected = recorder.collect().factors()

    x.requires_grad_(True)
    loss = functional.cross_entropy(model(x), y)
    torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward(inputs=[x], retain_graph=True)
    assert recorder.collect().layers == {}
    torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward()
    assert same(recorder.collect().factors(), expected)


def test_empirical_gradient_penalty() -> None:
    """Backward of a loss that holds a gradient of the same forward."""
    model, recorder = watched(reduction="sum")
    x, y = batch()
    x.requires_grad_(True)
    logits = model(x)
    loss = functional.cross_entropy(logits, y, reduction="sum")
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + 0.0 * slope.square().sum()).backward()
    got = recorder.collect().factors()
    functional.cross_entropy(model(x), y, reduction="sum").backward()
    assert same(got, recorder.collect().factors())


def test_empirical_layers_that_the_loss_does_not_reach_are_absent() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.one, self.two = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.body(x)
            return self.one(h), self.two(h)

    model = TwoHeads()
    for fisher in ("empirical", "mc", "exact"):
        recorder = Recorder(model, find_layers(model), fisher=fisher, output=lambda out: out[0])
        one, _ = model(torch.randn(7, 5))
        functional.cross_entropy(one, torch.zeros(7, dtype=torch.long)).backward()
        pending = recorder.collect()
        recorder.remove()
        assert set(pending.layers) == {"body", "one"}
        assert pending.terms == 7


def test_removed_recorder_ignores_a_backward_under_way() -> None:
    model, recorder = watched()
    x, y = batch()
    loss = functional.cross_entropy(model(x), y)
    recorder.remove()
    loss.backward()
    assert not recorder.ever_recorded
    assert recorder.collect().layers == {}
