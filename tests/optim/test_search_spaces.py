"""The inclusion hierarchy of torch's optimizers, trajectory by trajectory in float64, and the spaces themselves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kronfac.optim import KFAC
from kronfac.optim.search_spaces import SPACES, Coordinate, Point, SearchSpace, embed

STEPS = 60
POINTS = {
    "SGD": SPACES["SGD"].at(lr=0.05),
    "Momentum": SPACES["Momentum"].at(lr=0.03, momentum=0.9),
    "Nesterov": SPACES["Nesterov"].at(lr=0.03, momentum=0.9),
    "RMSprop": SPACES["RMSprop"].at(lr=0.01, momentum=0.0, alpha=0.9, eps=1e-6),
}


def loss(theta: Tensor) -> Tensor:
    """Not quadratic, curved differently in each direction, with gradients around 1."""
    scales = torch.tensor([0.3, 1.0, 3.0, 0.7], dtype=torch.float64)
    return (scales * theta**2).sum() / 2 + torch.sin(theta).sum() + (theta[0] * theta[1]).cos()


Make = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def trajectory(make: Make, steps: int = STEPS) -> Tensor:
    """All iterates (steps, 4), without the start."""
    theta = nn.Parameter(torch.tensor([1.0, -0.8, 0.6, 1.5], dtype=torch.float64))
    optimizer = make([theta])
    return torch.stack([one_step(theta, optimizer) for _ in range(steps)])


def one_step(theta: nn.Parameter, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss(theta).backward()
    optimizer.step()
    return theta.detach().clone()


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize(
    ("narrow", "wide", "tolerance"),
    [
        ("SGD", "Momentum", 0.0),
        ("SGD", "Nesterov", 0.0),
        ("RMSprop", "Adam", 1e-12),
        ("SGD", "RMSprop", 1e-9),
        ("Momentum", "RMSprop", 1e-9),
        ("SGD", "Adam", 1e-9),
        ("Momentum", "Adam", 1e-9),
        ("SGD", "NAdam", 1e-9),
        ("Nesterov", "NAdam", 1e-9),
    ],
)
def test_the_wider_optimizer_takes_the_same_steps(narrow: str, wide: str, tolerance: float) -> None:
    source = POINTS[narrow]
    embedding = embed(source, into=wide)
    assert embedding.point.space.name == wide
    assert embedding.exact == (tolerance < 1e-9)
    ours, theirs = trajectory(embedding.make), trajectory(source.make)
    assert difference(theirs[1:], theirs[:-1]) > 1e-3  # they do move
    assert difference(ours, theirs) <= tolerance


@pytest.mark.parametrize(("narrow", "wide"), [("Momentum", "RMSprop"), ("Momentum", "Adam"), ("Nesterov", "NAdam")])
def test_the_error_falls_with_eps_as_one_over_it(narrow: str, wide: str) -> None:
    source = POINTS[narrow]
    theirs = trajectory(source.make)
    errors = [difference(trajectory(embed(source, into=wide, eps=eps).make), theirs) for eps in (1e3, 1e5, 1e7)]
    assert errors[0] > 1e-5  # there is something to see
    for large, small in itertools.pairwise(errors):
        assert 50 < large / small < 200


def test_rmsprop_with_momentum_is_adam_for_large_eps_only() -> None:
    space = SPACES["RMSprop"]
    errors = {}
    for eps in (1e-3, 1e10):
        source = space.at(lr=0.01 * max(1.0, eps), momentum=0.8, alpha=0.95, eps=eps)
        embedding = embed(source, into="Adam")
        assert not embedding.exact
        errors[eps] = difference(trajectory(embedding.make), trajectory(source.make))
    assert errors[1e10] < 1e-9 < 1e-3 < errors[1e-3]


def test_correction_of_adam_is_the_published_one() -> None:
    eta, gamma, eps = 0.03, 0.9, 1e10
    embedding = embed(SPACES["Momentum"].at(lr=eta, momentum=gamma), into="Adam", eps=eps)
    for step in (1, 2, 7, 1000):
        expected = eta * eps * (1 - gamma**step) / (1 - gamma)
        assert embedding.settings(step) == pytest.approx({"lr": expected, "eps": eps}, rel=1e-12)

    def by_hand(params: Iterable[Tensor]) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(params, lr=1.0, betas=(gamma, 0.999), eps=eps)
        rates = iter([eta * eps * (1 - gamma**t) / (1 - gamma) for t in range(1, STEPS + 1)])
        optimizer.register_step_pre_hook(lambda *_: optimizer.param_groups[0].update(lr=next(rates)))
        return optimizer

    assert difference(trajectory(by_hand), trajectory(embedding.make)) < 1e-13


def test_no_rate_alone_makes_adam_momentum() -> None:
    """Without the correction of the first steps, and with eps too small: the tests above can fail."""
    source = POINTS["Momentum"]
    theirs = trajectory(source.make)
    assert difference(trajectory(embed(source, into="Adam").point.make), theirs) > 1e-2
    assert difference(trajectory(embed(source, into="Adam", eps=1e-3).make), theirs) > 1e-2


def test_nadam_as_torch_has_it_by_default_is_not_nesterov() -> None:
    embedding = embed(POINTS["Nesterov"], into="NAdam")

    def default_decay(params: Iterable[Tensor]) -> torch.optim.Optimizer:
        optimizer = embedding.make(params)
        optimizer.param_groups[0]["momentum_decay"] = 4e-3
        return optimizer

    assert difference(trajectory(default_decay), trajectory(POINTS["Nesterov"].make)) > 1e-3


class RootRMSprop(torch.optim.Optimizer):
    """RMSprop with eps inside the root, as in TensorFlow: for the other scale of the rate."""

    def __init__(self, params: Any, lr: float, momentum: float, eps: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("v", torch.zeros_like(p)).mul_(0.99).addcmul_(p.grad, p.grad, value=0.01)
                buffer = state.setdefault("m", torch.zeros_like(p)).mul_(group["momentum"])
                buffer.addcdiv_(p.grad, (state["v"] + group["eps"]).sqrt())
                p.sub_(buffer, alpha=group["lr"])


def test_rate_over_the_root_of_eps_is_the_scale_where_eps_is_inside() -> None:
    space = SearchSpace(
        "mine",
        RootRMSprop,
        (Coordinate("lr/sqrt(eps)", 1e-4, 10), Coordinate("1-momentum", 1e-3, 1), Coordinate("eps", 1e-10, 1e10)),
    )
    point = space.point({"lr/sqrt(eps)": 0.03, "1-momentum": 0.1, "eps": 1e10})
    assert point.values == pytest.approx({"lr": 0.03 * 1e5, "momentum": 0.9, "eps": 1e10})
    assert point.coordinates == pytest.approx({"lr/sqrt(eps)": 0.03, "1-momentum": 0.1, "eps": 1e10})
    assert difference(trajectory(point.make), trajectory(POINTS["Momentum"].make)) < 1e-9


@pytest.mark.parametrize("wide", ["Adam", "NAdam"])
def test_an_embedded_optimizer_resumes(wide: str) -> None:
    source = POINTS["Momentum" if wide == "Adam" else "Nesterov"]
    embedding = embed(source, into=wide)
    whole = trajectory(embedding.make, 20)
    theta = nn.Parameter(torch.tensor([1.0, -0.8, 0.6, 1.5], dtype=torch.float64))
    first = embedding.make([theta])
    for _ in range(7):
        one_step(theta, first)
    second = embedding.make([theta])
    second.load_state_dict(first.state_dict())
    rest = torch.stack([one_step(theta, second) for _ in range(13)])
    assert torch.equal(rest, whole[7:])


# ------------------------------------------------------------------ the spaces


CLASSES = {
    "SGD": torch.optim.SGD,
    "Momentum": torch.optim.SGD,
    "Nesterov": torch.optim.SGD,
    "RMSprop": torch.optim.RMSprop,
    "Adam": torch.optim.Adam,
    "NAdam": torch.optim.NAdam,
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("seed", [0, 1])
def test_samples_are_in_range_and_accepted_by_torch(name: str, seed: int) -> None:
    space = SPACES[name]
    point = space.sample(seed)
    assert point == space.sample(seed) == space.sample(np.random.default_rng(seed))
    for each in space.coordinates:
        # 1-momentum comes back through the rounding of momentum
        assert each.low * (1 - 1e-9) <= point.coordinates[each.name] <= each.high * (1 + 1e-9)
    optimizer = point.make([nn.Parameter(torch.ones(2))], weight_decay=0.1)
    assert type(optimizer) is CLASSES[name]
    group = optimizer.param_groups[0]
    assert group["weight_decay"] == 0.1
    assert group["lr"] == point.values["lr"]
    if "beta1" in point.values:
        assert group["betas"] == (point.values["beta1"], point.values["beta2"])


def test_samples_are_uniform_in_the_logarithm() -> None:
    rng = np.random.default_rng(3)
    points = [SPACES["Adam"].sample(rng) for _ in range(2000)]
    for each in SPACES["Adam"].coordinates:
        logs = np.log([point.coordinates[each.name] / each.low for point in points]) / math.log(each.high / each.low)
        shares = np.histogram(logs, bins=4, range=(-1e-9, 1 + 1e-9))[0] / len(points)
        assert np.abs(shares - 0.25).max() < 0.05  # five standard deviations


@given(name=st.sampled_from(sorted(SPACES)), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_coordinates_and_points_are_the_same_thing(name: str, seed: int) -> None:
    space = SPACES[name]
    point = space.sample(seed)
    again = space.point(point.coordinates)
    assert again.values == pytest.approx(dict(point.values), rel=1e-12, abs=1e-15)
    assert space.at(**point.values) == point


@pytest.mark.parametrize(
    ("name", "count", "sizes"),
    [
        ("SGD", 64, [64]),
        ("Momentum", 64, [8, 8]),
        ("KFAC", 64, [8, 8]),
        ("Adam", 64, [4, 4, 2, 2]),
        ("Adam", 6, [3, 2, 1, 1]),
    ],
)
def test_grids_are_log_spaced_with_both_ends(name: str, count: int, sizes: list[int]) -> None:
    space = SPACES[name]
    points = space.grid(count)
    assert len(points) == count
    assert len({tuple(point.values.values()) for point in points}) == count
    for each, size in zip(space.coordinates, sizes, strict=True):
        values = np.unique(np.round(np.log([point.coordinates[each.name] for point in points]), 9))
        expected = (
            np.linspace(math.log(each.low), math.log(each.high), size)
            if size > 1
            else np.log([each.low, each.high]).mean()
        )
        np.testing.assert_allclose(values, expected, atol=1e-8)


def test_grid_of_kfac_makes_optimizers_of_a_model() -> None:
    model = nn.Linear(3, 2)
    point = SPACES["KFAC"].grid()[37]
    optimizer = point.make(model, kl_clip=None)
    assert isinstance(optimizer, KFAC)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["damping"]) == (point.values["lr"], point.values["damping"])


def test_nesterov_without_momentum_is_sgd() -> None:
    point = SPACES["Nesterov"].at(lr=0.05, momentum=0.0)
    assert torch.equal(trajectory(point.make), trajectory(POINTS["SGD"].make))


def test_the_ranges_are_wide_enough_for_the_inclusions() -> None:
    for name in ("RMSprop", "Adam", "NAdam"):
        ranges = {each.name: each for each in SPACES[name].coordinates}
        assert (ranges["eps"].low, ranges["eps"].high) == (1e-10, 1e10)
        assert "lr/eps" in ranges
        assert "lr" not in ranges
    for name in ("Momentum", "Nesterov"):
        for point in SPACES[name].grid(9):
            if point.values["momentum"] < 1 - 1e-3:
                continue
            wider = embed(point, into={"Momentum": "Adam", "Nesterov": "NAdam"}[name]).point
            for each in wider.space.coordinates:
                assert each.low * (1 - 1e-9) <= wider.coordinates[each.name] <= each.high * (1 + 1e-9)


def test_narrowed_spaces_embed_too() -> None:
    space = SPACES["Momentum"].narrowed({"lr": (0.01, 0.1)})
    assert [each.low for each in space.coordinates] == [0.01, 1e-3]
    assert SPACES["Momentum"].coordinates[0].low == 1e-4
    assert embed(space.sample(0), into="Adam").point.space is SPACES["Adam"]


REFUSALS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: SPACES["Momentum"].at(lr=0.1), ValueError, "Momentum: expected the parameters lr, momentum, got lr"),
    (lambda: SPACES["Momentum"].at(lr=0.1, momentum=1.0), ValueError, "momentum: expected a number >= 0 and < 1"),
    (lambda: SPACES["SGD"].at(lr=math.nan), ValueError, "lr: expected a number > 0"),
    (lambda: SPACES["SGD"].at(lr="fast"), TypeError, "lr: expected a number"),  # type: ignore[arg-type]
    (lambda: SPACES["SGD"].point({"rate": 1.0}), ValueError, "expected the coordinates lr, got rate"),
    (lambda: SPACES["SGD"].sample("x"), TypeError, "rng"),  # type: ignore[arg-type]
    (lambda: SPACES["SGD"].grid(0), ValueError, "count: expected an integer >= 1"),
    (lambda: SPACES["SGD"].narrowed({"eps": (1, 2)}), ValueError, "expected coordinates among lr, got eps"),
    (lambda: SPACES["SGD"].narrowed({"lr": (2, 1)}), ValueError, "lr: high: expected a number >= 2"),
    (lambda: Coordinate("1-beta1", 0.1, 1.5), ValueError, "1-beta1: high"),
    (lambda: Coordinate("lr", 0.0, 1.5), ValueError, "lr: low: expected a number > 0"),
    (lambda: SearchSpace("mine", torch.optim.Adam, (Coordinate("lr/eps", 1, 2),)), ValueError, "eps among them"),
    (lambda: SearchSpace("mine", torch.optim.Adam, (Coordinate("lr", 1, 2),) * 2), ValueError, "one for each"),
    (lambda: POINTS["SGD"].make([], lr=1.0), ValueError, "lr: decided by the point"),
    (
        lambda: embed(POINTS["Momentum"], into="NAdam"),
        ValueError,
        r"from Momentum\): expected one of 'Momentum', 'RMSprop'",
    ),
    (lambda: embed(POINTS["Momentum"], into="SGD"), ValueError, "from Momentum"),
    (lambda: embed({"lr": 1.0}, into="Adam"), TypeError, "expected a Point"),  # type: ignore[arg-type]
    (lambda: embed(POINTS["SGD"], into="Adam", eps=0.0), ValueError, "eps: expected a number > 0"),
    (
        lambda: embed(Point(SearchSpace("x", torch.optim.SGD, (Coordinate("lr", 1, 2),)), {"lr": 1.0}), into="Adam"),
        ValueError,
        "got one of x",
    ),
    (lambda: embed(POINTS["SGD"], into="Momentum").settings(0), ValueError, "step: expected an integer >= 1"),
]


@pytest.mark.parametrize("index", range(len(REFUSALS)))
def test_refusals_say_what_and_why(index: int) -> None:
    call, kind, message = REFUSALS[index]
    with pytest.raises(kind, match=message):
        call()
