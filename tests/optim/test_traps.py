"""Traps that K-FAC implementations were seen to fall into, by number; those of layers are in test_traps_of_layers.py.

 1  a mean-reduced loss makes per-example gradients, and so G, too small
 2  dividing the loss by the number of sampled targets makes G shrink with it
 3  seeding the sampler touches the global random stream
 4  λ added to both factors instead of √λ split by π
 5  a KL clip that waits for the device per layer, that cannot be switched off, and that hides the learning rate
 6  running averages that start from zero or from the identity
 7  forwards under no_grad or in eval mode, and recomputed ones, that enter the statistics
 8  in-place activations after a layer
 9  layers and shapes that crash or mislead
10  non-finite values that enter the running averages; skipped steps that do not skip everything
11  factors in half precision
12  layers that are not supported: an exception, or silently frozen
13  checkpoints that need pickle, or do not continue bit for bit
14  memory held by retained graphs, hooks left behind, copies of a hooked model
"""

from __future__ import annotations

import copy
import gc
import io
import re
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kronfac
from kronfac.curvature import factors
from kronfac.optim import KFAC
from tests.optim.models import convnet, equal, frozen_state, images, mlp, same_tree, snapshot, train_step, vectors


def test_every_trap_has_a_test_named_after_it() -> None:
    listed = {int(number) for number in re.findall(r"^ ?(\d+)  ", __doc__, re.MULTILINE)}
    named: set[int] = set()
    for path in Path(__file__).parents[1].rglob("test_*.py"):
        named.update(int(number) for number in re.findall(r"^def test_trap_(\d+)_", path.read_text(), re.MULTILINE))
    assert listed == named == set(range(1, 15))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_trap_1_the_factors_are_those_of_single_examples_whatever_the_loss_averages(
    fisher: str, reduction: str
) -> None:
    """For a linear layer A ⊗ G is the mean of products of single examples; for a convolution both have their sums."""
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)).double()
    x, y = torch.randn(6, 2, 3, 3, dtype=torch.float64), torch.randint(4, (6,))
    optimizer = KFAC(model, 0.0, fisher=fisher, reduction=reduction)
    functional.cross_entropy(model(x), y, reduction=reduction).backward()
    optimizer.step()

    outputs = {"0": model[0](x), "3": model(x)}  # the layers' own outputs, with a path to perturb them
    shifts = {name: torch.zeros_like(out) for name, out in outputs.items()}

    def loss(shift: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        hidden = model[0](image) + shift["0"]
        logits = model[3](torch.tanh(hidden).flatten()) + shift["3"]
        return functional.cross_entropy(logits[None], label[None])

    def second_moment(labels: Tensor) -> dict[str, Tensor]:
        rows = vmap(grad(loss))(shifts, x, labels)
        return {"0": rows["0"].flatten(2).transpose(1, 2), "3": rows["3"].unsqueeze(1)}

    probabilities = model(x).softmax(1).detach()
    cases = [(y, torch.ones(6, dtype=torch.float64))]
    if fisher == "exact":
        cases = [(torch.full((6,), label), probabilities[:, label]) for label in range(4)]
    patches = functional.unfold(x, 2).transpose(1, 2)
    inputs = {"0": patches, "3": torch.tanh(model[0](x)).flatten(1).unsqueeze(1).detach()}
    for name, a in inputs.items():
        rows = torch.cat([a, torch.ones_like(a[..., :1])], -1)
        A = torch.einsum("nti,ntj->ij", rows, rows) / 6
        G = sum(torch.einsum("n,nto,ntp->op", w, g, g) for labels, w in cases for g in [second_moment(labels)[name]])
        found = optimizer.factors()[name]
        torch.testing.assert_close(found.A, A, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found.G, G / (6 * a.shape[1]), rtol=1e-6, atol=1e-9)


def test_trap_2_more_samples_do_not_shrink_the_factors() -> None:
    model = mlp(3, 4, 3, dtype=torch.float64)
    x, y = vectors(64, 3, 3, torch.float64)
    found = {}
    for key, options in {"exact": {"fisher": "exact"}, "mc": {"fisher": "mc", "fisher_samples": 200}}.items():
        optimizer = KFAC(model, 0.0, **options)
        train_step(model, optimizer, x, y)
        found[key] = optimizer.factors()
    for name, (_, G) in found["exact"].items():
        assert float((found["mc"][name].G - G).norm()) < 0.05 * float(G.norm())


def test_trap_3_the_sampler_has_its_own_stream_on_the_models_device() -> None:
    model = mlp(3, 4, 3)
    batch = vectors(8, 3, 3)
    before = torch.get_rng_state()
    drawn = []
    for seed in (1, 1, 2):
        twin = copy.deepcopy(model)
        optimizer = KFAC(twin, 0.1, fisher="mc", seed=seed)
        train_step(twin, optimizer, *batch)
        drawn.append(optimizer.factors()["2"].G)
        assert optimizer.state_dict()["kronfac"]["generator"]["device"] == model[0].weight.device.type
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("damping", [1e-3, 0.5])
@pytest.mark.parametrize("solve", ["inverse", "eigen"])
def test_trap_4_the_effective_damping_is_lambda_whatever_the_way_of_inverting(solve: str, damping: float) -> None:
    """Where the curvature vanishes beside λ the direction is V/λ; with λ on both factors it would be V/λ²."""
    model = nn.Linear(3, 2, bias=False).double()
    x, y = 1e-4 * torch.randn(16, 3, dtype=torch.float64), torch.randn(16, 2, dtype=torch.float64)
    optimizer = KFAC(
        model, 1.0, momentum=0.0, kl_clip=None, damping=damping, solve=solve, likelihood=kronfac.Gaussian(variance=1e6)
    )
    start = model.weight.detach().clone()
    ((model(x) - y) ** 2).sum().backward()
    optimizer.step()
    gradient = model.weight.grad
    assert gradient is not None
    torch.testing.assert_close((start - model.weight.detach()) * damping, gradient, rtol=1e-3, atol=0.0)


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: reading a value from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def test_trap_5_the_kl_clip_waits_for_no_device_and_shows_what_it_does() -> None:
    waits = []
    for depth in (2, 7):
        model = mlp(*([4] * depth))
        optimizer = KFAC(model, 0.1, kl_clip=1e-6)
        batch = vectors(8, 4, 4)
        train_step(model, optimizer, *batch)
        functional.cross_entropy(model(batch[0]), batch[1]).backward()
        with Waits() as mode:
            optimizer.step()  # without new inverses
        waits.append(mode.count)
        assert optimizer.clip_scales[0] is not None
    assert waits == [1, 1]  # to learn that everything is finite

    moves: dict[tuple[float, float | None], Tensor] = {}
    for lr in (0.1, 0.2):
        for clip in (1e-6, None):
            torch.manual_seed(0)
            model = mlp(4, 5, 4)
            start = model[0].weight.detach().clone()
            optimizer = KFAC(model, lr, kl_clip=clip, fisher="exact")
            train_step(model, optimizer, *vectors(8, 4, 4))
            moves[lr, clip] = model[0].weight.detach() - start
            scale = optimizer.clip_scales[0]
            assert (scale is None) == (clip is None)
            assert scale is None or float(scale) < 1
    torch.testing.assert_close(moves[0.1, 1e-6], moves[0.2, 1e-6], rtol=1e-4, atol=1e-9)  # lr has no effect
    torch.testing.assert_close(moves[0.2, None], 2 * moves[0.1, None])


def test_trap_6_running_averages_hold_nothing_but_statistics() -> None:
    model = mlp(3, 4, 2, dtype=torch.float64)
    optimizer = KFAC(model, 0.0, fisher="exact")
    seen = []
    for _ in range(3):
        x, y = vectors(6, 3, 2, torch.float64)
        seen.append(factors(model, x, likelihood="categorical", fisher="exact"))
        train_step(model, optimizer, x, y)
        for name, found in optimizer.factors().items():
            for index, factor in enumerate(found):
                mean = sum(pairs[name][index] for pairs in seen) / len(seen)  # decay 1 - 1/k: a plain mean at first
                torch.testing.assert_close(factor, mean)


def _eval(model: nn.Module, x: Tensor) -> None:
    model.eval()(x)
    model.train()


def _under(mode: Callable[[], Any]) -> Callable[[nn.Module, Tensor], None]:
    def run(model: nn.Module, x: Tensor) -> None:
        with mode():
            model(x)

    return run


@pytest.mark.parametrize(
    "aside", [_under(torch.no_grad), _under(torch.inference_mode), _eval], ids=["no_grad", "inference_mode", "eval"]
)
def test_trap_7_only_training_forwards_enter_the_statistics(aside: Callable[[nn.Module, Tensor], None]) -> None:
    model, twin = mlp(3, 4, 2), mlp(3, 4, 2)
    twin.load_state_dict(model.state_dict())
    one, other = KFAC(model, 0.1, seed=0), KFAC(twin, 0.1, seed=0)
    for _ in range(3):
        x, y = vectors(6, 3, 2)
        aside(model, 100 * x)
        train_step(model, one, x, y)
        train_step(twin, other, x, y)
    assert equal(snapshot(model), snapshot(twin))
    assert same_tree(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_trap_7_a_recomputed_forward_counts_once(fisher: str) -> None:
    class Recomputed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[no-any-return]

    model = mlp(3, 4, 2)
    twin = Recomputed(*copy.deepcopy(model))
    one, other = KFAC(model, 0.1, fisher=fisher, seed=0), KFAC(twin, 0.1, fisher=fisher, seed=0)
    for _ in range(3):
        x, y = vectors(6, 3, 2)
        train_step(model, one, x, y)
        train_step(twin, other, x, y)
    assert equal(snapshot(model), snapshot(twin))
    assert same_tree(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_trap_8_in_place_activations_change_nothing(fisher: str) -> None:
    def network(inplace: bool) -> nn.Sequential:
        torch.manual_seed(0)
        relu = nn.ReLU(inplace=inplace)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3), relu, nn.Conv2d(4, 3, 2), relu, nn.Flatten(2), nn.Linear(9, 4), relu, Head()
        )

    model, twin = network(True), network(False)
    one, other = KFAC(model, 0.1, fisher=fisher, seed=0), KFAC(twin, 0.1, fisher=fisher, seed=0)
    for _ in range(3):
        x, y = torch.randn(6, 2, 6, 6), torch.randint(4, (6,))
        train_step(model, one, x, y)
        train_step(twin, other, x, y)
    assert equal(snapshot(model), snapshot(twin))
    assert same_tree(one.state_dict(), other.state_dict())


class Head(nn.Module):
    """The mean over positions."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) to (N, C)."""
        return x.mean(1)


@pytest.mark.parametrize("where", ["input", "gradient", "scaled"])
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_trap_10_a_step_that_is_not_finite_changes_nothing(fisher: str, where: str) -> None:
    """Parameters, statistics, momentum and counters of steps alike; with a GradScaler too."""
    model = mlp(3, 4, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = KFAC(model, 0.1, fisher=fisher, grad_scaler=scaler if where == "scaled" else None)
    x, y = vectors(6, 3, 2)
    train_step(model, optimizer, x, y) if where != "scaled" else _scaled(model, optimizer, scaler, x, y)
    before, state = snapshot(model), frozen_state(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if where == "input":
            train_step(model, optimizer, x.index_fill(0, torch.tensor([2]), float("nan")), y)
        elif where == "gradient":
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            model[0].bias.grad[1] = float("inf")
            optimizer.step()
        else:
            _scaled(model, optimizer, scaler, x * 1e38, y)
    assert equal(before, snapshot(model))
    after = optimizer.state_dict()
    assert after["kronfac"]["counters"].pop("skipped_steps") == 1
    assert state["kronfac"]["counters"].pop("skipped_steps") == 0
    for tree in (state, after):
        tree["kronfac"].pop("generator")  # the draws of the skipped forward are used up
    assert same_tree(after, state)
    losses = [train_step(model, optimizer, x, y) for _ in range(3)]
    assert losses[-1] < losses[0]


def _scaled(model: nn.Module, optimizer: KFAC, scaler: Any, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    scaler.scale(functional.cross_entropy(model(x), y)).backward()
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("solve", ["inverse", "eigen"])
def test_trap_13_checkpoints_hold_tensors_only_and_continue_bit_for_bit(solve: str) -> None:
    model = convnet()
    optimizer = KFAC(model, 0.1, solve=solve, inverse_every=3)
    for _ in range(4):
        train_step(model, optimizer, *images(6))
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    content = torch.load(buffer, weights_only=True, map_location="cpu")
    twin = convnet()
    twin.load_state_dict(content["model"])
    other = KFAC(twin, 0.5, solve=solve, seed=99)
    other.load_state_dict(content["optimizer"])
    for _ in range(5):
        batch = images(6)
        train_step(model, optimizer, *batch)
        train_step(twin, other, *batch)
    assert equal(snapshot(model), snapshot(twin))
    assert same_tree(optimizer.state_dict(), other.state_dict())


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_trap_14_neither_graphs_nor_hooks_are_left_behind(fisher: str) -> None:
    """What backward does not need any more is freed by it although statistics ran through the same graph before."""
    model = mlp(3, 4, 2)
    optimizer = KFAC(model, 0.1, fisher=fisher)
    hidden: list[weakref.ref[Tensor]] = []
    handle = model[1].register_forward_hook(lambda m, a, out: hidden.append(weakref.ref(out)))
    loss = functional.cross_entropy(model(torch.randn(5, 3)), torch.zeros(5, dtype=torch.long))
    assert hidden[0]() is not None
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()  # nothing has kept the graph
    del loss
    gc.collect()
    optimizer.step()
    assert hidden[0]() is None
    handle.remove()
    watched = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert watched() is None
    assert not any(
        hooks for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)
    )
    with torch.no_grad():
        functional_call(model, dict(model.named_parameters()), torch.randn(5, 3))
