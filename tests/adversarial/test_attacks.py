"""Attacks against closed forms of linear models, and the sets they keep to."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from kronfac.adversarial import fgsm, l2, pgd

ATTACKS: dict[str, Callable[..., Tensor]] = {
    "fgsm": fgsm,
    "l2": l2,
    "pgd linf": partial(pgd, steps=4),
    "pgd l2": partial(pgd, norm="l2", steps=4),
}


def logistic(dtype: torch.dtype = torch.float64, size: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    """Logistic regression: one logit, targets 0 and 1."""
    model = nn.Sequential(nn.Linear(size, 1), nn.Flatten(0)).to(dtype)
    return model, torch.randn(9, size, dtype=dtype), (torch.arange(9) % 2).to(dtype)


def per_example(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(x), y, reduction="none").detach()


def worst(model: Any, x: Tensor, y: Tensor, eps: float, dual: float) -> Tensor:
    """The largest log(1 + exp(-margin)) over the ball: the margin falls by ε times the dual norm of the weights."""
    sign = 2 * y - 1
    margin = sign * model(x).detach() - eps * torch.linalg.vector_norm(model[0].weight.detach(), ord=dual)
    return F.softplus(-margin)


def test_fgsm_is_the_worst_case_of_a_linear_model() -> None:
    model, x, y = logistic()
    moved = fgsm(model, F.binary_cross_entropy_with_logits, x, y, eps=0.3, bounds=None)
    torch.testing.assert_close(per_example(model, moved, y), worst(model, x, y, 0.3, 1.0))
    # With log(1 + exp(-m)) the gradient is -σ(-m) y w: its sign is known in closed form.
    weight = model[0].weight.detach()  # type: ignore[index]
    torch.testing.assert_close(moved, x - 0.3 * (2 * y - 1)[:, None] * weight.sign())


def test_l2_is_the_worst_case_of_a_linear_model() -> None:
    model, x, y = logistic()
    moved = l2(model, F.binary_cross_entropy_with_logits, x, y, eps=0.3, bounds=None)
    torch.testing.assert_close(per_example(model, moved, y), worst(model, x, y, 0.3, 2.0))
    weight = model[0].weight.detach()  # type: ignore[index]
    torch.testing.assert_close(moved, x - 0.3 * (2 * y - 1)[:, None] * weight / weight.norm())


@pytest.mark.parametrize(("norm", "dual", "single"), [("linf", 1.0, fgsm), ("l2", 2.0, l2)])
def test_pgd_reaches_the_worst_case_of_a_linear_model(norm: str, dual: float, single: Callable[..., Tensor]) -> None:
    model, x, y = logistic()
    loss = F.binary_cross_entropy_with_logits
    moved = pgd(model, loss, x, y, eps=0.3, norm=norm, steps=40, step_size=0.3, bounds=None)
    once = single(model, loss, x, y, eps=0.3, bounds=None)
    assert (per_example(model, moved, y) >= per_example(model, once, y) - 1e-6).all()
    torch.testing.assert_close(per_example(model, moved, y), worst(model, x, y, 0.3, dual), rtol=1e-3, atol=1e-5)


def test_no_corner_of_the_box_is_worse_for_a_linear_model() -> None:
    model, x, y = logistic(size=4)
    eps, low, high = 0.4, -1.0, 0.8
    x = x.clamp(low, high)
    moved = fgsm(model, F.binary_cross_entropy_with_logits, x, y, eps=eps, bounds=(low, high))
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=x.dtype)] * 4)
    losses = torch.stack([per_example(model, (x + eps * corner).clamp(low, high), y) for corner in corners])
    torch.testing.assert_close(per_example(model, moved, y), losses.amax(dim=0))


def test_pgd_is_several_projected_steps() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(7, 5, dtype=torch.float64), torch.randint(0, 3, (7,))
    found = pgd(model, F.cross_entropy, x, y, eps=0.5, steps=3, step_size=0.3, random_start=False, bounds=None)
    point = x
    for _ in range(3):
        leaf = point.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)
        point = x + (point + 0.3 * gradient.sign() - x).clamp(-0.5, 0.5)
    torch.testing.assert_close(found, point)


@pytest.mark.parametrize("name", ATTACKS)
def test_number_of_examples_does_not_scale_the_gradient(name: str) -> None:
    """In float32 the gradient of this mean over 4000 examples underflows to 0; an example's own does not."""

    def summed(output: Tensor, target: Tensor) -> Tensor:
        return (1e-42 * output).sum()

    def mean(output: Tensor, target: Tensor) -> Tensor:
        return (1e-42 * output).sum(dim=1).mean()

    x = torch.tensor([[1.6, 0.1, -0.1]]).repeat(4000, 1)
    options: dict[str, Any] = {"eps": 0.2, "bounds": None}
    if name.startswith("pgd"):
        options["random_start"] = False  # it differs from example to example
    alone = ATTACKS[name](nn.Identity(), mean, x[:1], None, **options)
    assert (alone > x[:1]).all()
    assert torch.equal(ATTACKS[name](nn.Identity(), mean, x, None, **options), alone.expand_as(x))
    assert torch.equal(ATTACKS[name](nn.Identity(), summed, x, None, reduction="sum", **options), alone.expand_as(x))


def test_tiny_gradients_have_a_direction() -> None:
    """Squares of gradients below 1e-23 are 0 in float32."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return 1e-30 * output.sum()

    moved = l2(nn.Identity(), loss, torch.zeros(2, 4), torch.zeros(2), eps=1.0, bounds=None, reduction="sum")
    torch.testing.assert_close(moved, torch.full((2, 4), 0.5))


@pytest.mark.parametrize("name", ATTACKS)
def test_eps_0_changes_nothing(name: str) -> None:
    model, x, y = logistic()
    moved = ATTACKS[name](model, F.binary_cross_entropy_with_logits, x, y, eps=0)
    assert torch.equal(moved, x)
    assert moved.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("name", ATTACKS)
def test_example_without_a_gradient_stays(name: str) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output * target[:, None]).sum()

    x = torch.randn(3, 4)
    options = {"random_start": False} if name.startswith("pgd") else {}
    moved = ATTACKS[name](
        nn.Identity(), loss, x, torch.tensor([1.0, 0.0, 1.0]), eps=0.1, bounds=None, reduction="sum", **options
    )
    assert torch.equal(moved[1], x[1])
    assert (moved[0] != x[0]).all()


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@given(
    seed=st.integers(0, 10**6),
    eps=st.floats(1e-4, 3.0),
    scale=st.sampled_from([0.01, 1.0, 300.0]),
    shape=st.sampled_from([(1,), (5,), (4, 3), (2, 3, 4), (3, 1, 5, 2)]),
    bounds=st.sampled_from(["data", "none", "pair", "tensor"]),
)
def test_sets_are_kept_exactly(
    name: str, dtype: torch.dtype, seed: int, eps: float, scale: float, shape: tuple[int, ...], bounds: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (scale * torch.randn(shape, generator=generator)).to(dtype)
    low, high = x.amin(), x.amax()
    given: Any = {"data": "data", "none": None, "pair": (float(low) - eps / 3, float(high))}.get(
        bounds, (torch.full(shape[1:], float(low), dtype=dtype), high)
    )
    slope = torch.randn(shape, generator=generator).to(dtype)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output.float() * slope.float()).sum()

    moved = ATTACKS[name](nn.Identity(), loss, x, None, eps=eps, bounds=given, reduction="sum")
    assert moved.dtype == dtype
    offset = moved.double() - x.double()
    if name.endswith("l2"):
        assert (torch.linalg.vector_norm(offset.reshape(len(x), -1), dim=1) <= eps).all()
    else:
        assert (offset.abs() <= eps).all()
    if given is not None:
        least = torch.as_tensor(float(low) - eps / 3, dtype=dtype) if bounds == "pair" else low
        assert (moved <= high).all()
        assert (moved >= least).all()


def test_nothing_is_wasted_of_the_ball() -> None:
    """The bound is met from below by the last number of the type, not by a safety margin."""
    x = torch.randn(1000)
    moved = fgsm(nn.Identity(), lambda output, target: output.sum(), x, None, eps=0.125, bounds=None, reduction="sum")
    further = torch.nextafter(moved, torch.tensor(math.inf))
    assert (further.double() - x.double() > 0.125).all()


def test_random_start_is_uniform_in_the_ball_and_its_own() -> None:
    def flat(output: Tensor, target: Tensor) -> Tensor:
        return 0.0 * output.sum()

    x = torch.zeros(20_000, 3, dtype=torch.float64)
    start = partial(pgd, nn.Identity(), flat, x, None, eps=2.0, steps=1, bounds=None, reduction="sum")
    cube = start(norm="linf").flatten()
    assert abs(cube.mean().item()) < 0.03
    assert cube.square().mean().item() == pytest.approx(4 / 3, rel=0.03)  # of the uniform distribution on [-2, 2]
    radius = torch.linalg.vector_norm(start(norm="l2"), dim=1)
    assert (radius / 2).pow(3).mean().item() == pytest.approx(0.5, rel=0.03)  # the share of the volume within it
    assert torch.equal(start(seed=5), start(seed=5))
    assert not torch.equal(start(seed=5), start(seed=6))
    generator = torch.Generator().manual_seed(5)
    first, second = start(seed=generator), start(seed=generator)
    assert torch.equal(first, start(seed=5))
    assert not torch.equal(first, second)


def test_examples_of_a_network_are_independent_and_worse() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)).double()
    x, y = torch.randn(6, 1, 4, 4, dtype=torch.float64), torch.randint(0, 4, (6,))
    for _ in range(3):
        model(x)  # running statistics that are not those of this batch
    for attack in ATTACKS.values():
        options = {"random_start": False} if isinstance(attack, partial) else {}
        moved = attack(model, F.cross_entropy, x, y, eps=0.01, **options)
        parts = [
            attack(model, F.cross_entropy, x[i : i + 1], y[i : i + 1], eps=0.01, bounds=(x.amin(), x.amax()), **options)
            for i in range(6)
        ]
        torch.testing.assert_close(moved, torch.cat(parts))
        model.eval()
        before, after = (F.cross_entropy(model(z), y, reduction="none") for z in (x, moved))
        assert (after > before).all()
        model.train()


def test_empty_batch() -> None:
    model, x, y = logistic()
    assert fgsm(model, F.binary_cross_entropy_with_logits, x[:0], y[:0], eps=0.1).shape == (0, 6)
