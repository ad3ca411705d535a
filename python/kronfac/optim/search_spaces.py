"""What to tune of each optimizer, over which ranges, and how the narrower ones lie inside the wider.

SGD ⊂ Momentum ⊂ RMSprop and Adam, SGD ⊂ Nesterov ⊂ NAdam, RMSprop without momentum ⊂ Adam (Choi et al.,
arXiv:1910.05446). Tuning respects that only where eps reaches from about 1e-10 to 1e10, the rate is searched as lr/eps
(torch adds eps outside the root; lr/sqrt(eps) where it is inside), and 1-momentum, 1-beta1, 1-beta2 are searched in
log scale, as here. The optimizers are torch's own, beside `kronfac.KFAC` with its learning rate and damping.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from kronfac.optim import options
from kronfac.optim.kfac import KFAC

_CALLER = "search_spaces"
_ROOT = "lr/sqrt(eps)"


@dataclass(frozen=True)
class Coordinate:
    """A positive number that is searched in log scale.

    Attributes:
        name: "lr/eps", "lr/sqrt(eps)", "1-x" for a parameter x, or a parameter itself.
        low: lower end of the range, > 0.
        high: upper end; at most 1 for "1-x".
    """

    name: str
    low: float
    high: float

    def __post_init__(self) -> None:
        """Check the range."""
        where = f"{_CALLER}: {self.name}"
        options.number(f"{where}: low", self.low, open_low=True)
        above = 1.0 if self.name.startswith("1-") else math.inf
        options.number(f"{where}: high", self.high, low=self.low, high=above, open_high=above == math.inf)

    def points(self, count: int) -> list[float]:
        """Values in equal ratios from `low` to `high`, for one the geometric mean."""
        if count == 1:
            return [math.sqrt(self.low) * math.sqrt(self.high)]
        ratio = math.log(self.high / self.low)
        inner = [self.low * math.exp(ratio * step / (count - 1)) for step in range(1, count - 1)]
        return [self.low, *inner, self.high]


@dataclass(frozen=True)
class SearchSpace:
    """The tuned parameters of an optimizer with their ranges.

    One of your own: ``SearchSpace("Mine", Mine, (Coordinate("lr/eps", 1e-4, 1e7), Coordinate("eps", 1e-10, 1e10)))``.

    Attributes:
        name: for messages, and for `embed`.
        factory: the optimizer: a class, or a callable of the parameters and keyword arguments.
        coordinates: what is searched, each in log scale.
        fixed: keyword arguments that are not tuned.
    """

    name: str
    factory: Callable[..., Optimizer]
    coordinates: tuple[Coordinate, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that the coordinates determine the parameters."""
        where, names = f"{_CALLER}: {self.name}: coordinates", self.parameters
        if not names or len(set(names)) < len(names):
            raise ValueError(f"{where}: expected one for each parameter, got {', '.join(names) or 'none'}")
        if "eps" not in names and any(each.name in ("lr/eps", _ROOT) for each in self.coordinates):
            raise ValueError(f"{where}: expected eps among them, which a rate relative to it needs")

    def at(self, **values: float) -> Point:
        """The point with these parameters, inside the ranges or not: ``SPACES["Momentum"].at(lr=0.1, momentum=0.9)``.

        Raises:
            TypeError: a value that is no number.
            ValueError: a parameter too many or missing, or out of its domain.
        """
        where = f"{_CALLER}: {self.name}"
        wanted = self.parameters
        if set(values) != set(wanted):
            raise ValueError(f"{where}: expected the parameters {', '.join(wanted)}, got {', '.join(values) or 'none'}")
        complements = {each.name[2:] for each in self.coordinates if each.name.startswith("1-")}
        return Point(
            self,
            {
                name: options.number(f"{where}: {name}", values[name], high=1.0)
                if name in complements
                else options.number(f"{where}: {name}", values[name], open_low=True)
                for name in wanted
            },
        )

    @property
    def parameters(self) -> tuple[str, ...]:
        """The tuned parameters, by the coordinates: "lr", "momentum", "beta1", ..."""
        return tuple(
            "lr" if each.name in ("lr/eps", _ROOT) else each.name.removeprefix("1-") for each in self.coordinates
        )

    def point(self, coordinates: Mapping[str, float]) -> Point:
        """The point with these coordinates, inside the ranges or not.

        Args:
            coordinates: a value for every coordinate by its name, as ``{"lr/eps": 1.0, "1-beta1": 0.1, ...}``.

        Raises:
            TypeError: a value that is no number.
            ValueError: a coordinate too many or missing, or out of its domain.
        """
        where = f"{_CALLER}: {self.name}"
        names = [each.name for each in self.coordinates]
        if set(coordinates) != set(names):
            raise ValueError(f"{where}: expected the coordinates {', '.join(names)}, got {', '.join(coordinates)}")
        given = {name: options.number(f"{where}: {name}", coordinates[name], open_low=True) for name in names}
        values = {}
        for name, parameter in zip(names, self.parameters, strict=True):
            factor = {"lr/eps": given.get("eps", 1.0), _ROOT: math.sqrt(given.get("eps", 1.0))}.get(name, 1.0)
            values[parameter] = 1.0 - given[name] if name.startswith("1-") else given[name] * factor
        return self.at(**values)

    def sample(self, rng: np.random.Generator | int) -> Point:
        """Draw a point, uniform in the logarithm of each coordinate.

        Args:
            rng: a numpy generator, or the seed of a new one.

        Raises:
            TypeError: neither.
        """
        if not isinstance(rng, np.random.Generator):
            if isinstance(rng, bool) or not isinstance(rng, int) or rng < 0:
                raise TypeError(
                    f"{_CALLER}: {self.name}: rng: expected a numpy Generator or an integer >= 0, got {rng!r}"
                )
            rng = np.random.default_rng(rng)
        draws = rng.uniform(size=len(self.coordinates)).tolist()
        return self.point(
            {
                each.name: min(each.high, each.low * math.exp(draw * math.log(each.high / each.low)))
                for each, draw in zip(self.coordinates, draws, strict=True)
            }
        )

    def grid(self, count: int = 64) -> list[Point]:
        """A grid of `count` points, log-spaced, ends included.

        Args:
            count: split into factors as equal as possible, the larger for the first coordinates: 64 is 8 x 8 for two
                coordinates and 4 x 4 x 2 x 2 for four. A coordinate with factor 1 stays in the middle of its range.
        """
        counts = [1] * len(self.coordinates)
        for prime in reversed(_prime_factors(options.integer(f"{_CALLER}: {self.name}: count", count))):
            counts[counts.index(min(counts))] *= prime
        axes = [
            each.points(number) for each, number in zip(self.coordinates, sorted(counts, reverse=True), strict=True)
        ]
        names = [each.name for each in self.coordinates]
        return [self.point(dict(zip(names, values, strict=True))) for values in itertools.product(*axes)]

    def narrowed(self, ranges: Mapping[str, tuple[float, float]]) -> SearchSpace:
        """The same with other ranges (low, high) for some coordinates, by their names.

        Raises:
            ValueError: an unknown coordinate, or a range that is none.
        """
        unknown = set(ranges) - {each.name for each in self.coordinates}
        if unknown:
            names = ", ".join(each.name for each in self.coordinates)
            raise ValueError(f"{_CALLER}: {self.name}: expected coordinates among {names}, got {', '.join(unknown)}")
        return replace(
            self,
            coordinates=tuple(
                Coordinate(each.name, *ranges.get(each.name, (each.low, each.high))) for each in self.coordinates
            ),
        )


@dataclass(frozen=True)
class Point:
    """A configuration of an optimizer; `SearchSpace.at` and `SearchSpace.point` make and check it.

    Attributes:
        space: where it lies.
        values: the tuned parameters by name; beta1 and beta2 apart.
    """

    space: SearchSpace
    values: Mapping[str, float]

    @property
    def coordinates(self) -> dict[str, float]:
        """Its coordinates: what `SearchSpace.point` takes."""
        eps = self.values.get("eps", 1.0)
        divisor = {"lr/eps": eps, _ROOT: math.sqrt(eps)}
        return {
            each.name: 1.0 - self.values[name]
            if each.name.startswith("1-")
            else self.values[name] / divisor.get(each.name, 1.0)
            for each, name in zip(self.space.coordinates, self.space.parameters, strict=True)
        }

    @property
    def keywords(self) -> dict[str, Any]:
        """Keyword arguments for the optimizer."""
        found: dict[str, Any] = {**self.values, **self.space.fixed}
        if "beta1" in found:
            found["betas"] = (found.pop("beta1"), found.pop("beta2"))
        if found.get("nesterov") and not found["momentum"]:
            found["nesterov"] = False  # torch refuses it; without momentum it is SGD either way
        return found

    def make(self, params: Iterable[Any] | nn.Module, **others: Any) -> Optimizer:
        """Make the optimizer.

        Args:
            params: parameters or param groups; for "KFAC" the model.
            others: further keyword arguments, for example `weight_decay`.

        Raises:
            ValueError: a keyword argument that the point decides.
        """
        keywords = self.keywords
        if twice := sorted(set(others) & set(keywords)):
            raise ValueError(
                f"{_CALLER}: {self.space.name}: {', '.join(twice)}: decided by the point; make another point"
            )
        return self.space.factory(params, **keywords, **others)


def _prime_factors(count: int) -> list[int]:
    """Ascending, none for 1."""
    factors, divisor = [], 2
    while count > 1:
        while count % divisor == 0:
            factors.append(divisor)
            count //= divisor
        divisor += 1
    return factors


_RATE = Coordinate("lr", 1e-4, 10.0)
_SCALED_RATE = Coordinate("lr/eps", 1e-4, 1e7)
_EPS = Coordinate("eps", 1e-10, 1e10)


def _complement(name: str) -> Coordinate:
    return Coordinate(f"1-{name}", 1e-3, 1.0)


def _adam(name: str, factory: Callable[..., Optimizer], **fixed: Any) -> SearchSpace:
    return SearchSpace(name, factory, (_SCALED_RATE, _complement("beta1"), _complement("beta2"), _EPS), fixed)


SPACES: Mapping[str, SearchSpace] = {
    space.name: space
    for space in (
        SearchSpace("SGD", torch.optim.SGD, (_RATE,)),
        SearchSpace("Momentum", torch.optim.SGD, (_RATE, _complement("momentum"))),
        SearchSpace("Nesterov", torch.optim.SGD, (_RATE, _complement("momentum")), {"nesterov": True}),
        SearchSpace(
            "RMSprop", torch.optim.RMSprop, (_SCALED_RATE, _complement("momentum"), _complement("alpha"), _EPS)
        ),
        _adam("Adam", torch.optim.Adam),
        # Dozat's warm-up of the momentum is over at once: with torch's default 4e-3 it would last for thousands of
        # steps, in which NAdam contains no Nesterov.
        _adam("NAdam", torch.optim.NAdam, momentum_decay=1e4),
        SearchSpace("KFAC", KFAC, (Coordinate("lr", 1e-3, 10.0), Coordinate("damping", 1e-4, 10.0))),
    )
}
"""The search spaces by name. Their ranges are wide: a first search shows where to narrow them."""


@dataclass(frozen=True)
class Embedding:
    """A point of a wider space that does what a point of a narrower one does.

    Attributes:
        source: the narrower optimizer's point.
        point: the wider one's: lr and eps as they are after many steps.
        exact: whether the two agree up to round-off. Otherwise they differ by about √v/eps relative to the step, with
            √v the root mean square of the gradients' entries.
    """

    source: Point
    point: Point
    exact: bool

    @property
    def _scheduled(self) -> bool:
        return self.point.space.name in ("Adam", "NAdam") and self.source.space.name != self.point.space.name

    def settings(self, step: int) -> dict[str, float]:
        """Options of the param groups in a step.

        Args:
            step: from 1.

        Returns:
            lr, and eps where the optimizer has one. They differ from the point's in the first steps, because Adam and
            NAdam correct the bias of their averages and momentum does not.
        """
        options.integer(f"{_CALLER}: settings: step", step)
        values, name = self.point.values, self.point.space.name
        found = {key: values[key] for key in ("lr", "eps") if key in values}
        if not self._scheduled:
            return found
        if name == "Adam":
            found["lr"] *= 1.0 - values["beta1"] ** step
            if self.source.space.name == "RMSprop":  # which corrects no bias: √v̂ + ε is (√v + √c ε) / √c
                correction = math.sqrt(1.0 - values["beta2"] ** step)
                found = {key: value / correction for key, value in found.items()}
        elif step == 1:  # torch's update, for a momentum γ that it keeps the product of in its own type
            gamma = values["beta1"]
            wide = torch.get_default_dtype() == torch.float64
            product = torch.tensor(gamma, dtype=torch.float64 if wide else torch.float32).item()
            found["lr"] *= (1.0 + gamma) / (1.0 / (1.0 - product) + gamma / (1.0 - gamma * product))
        return found

    def make(self, params: Iterable[Any], **others: Any) -> Optimizer:
        """Make the wider optimizer; Adam and NAdam then set lr and eps of their groups in every step: no scheduler can.

        Every parameter must have a gradient in every step, since steps are counted for all of them together. The count
        is the optimizer's own, so that a `state_dict` continues where it was.

        torch's NAdam corrects the bias of the gradient by 1/(1 - γᵗ) and that of the average by 1/(1 - γᵗ⁺¹): no
        learning rate makes that Nesterov's rule. Its product of momenta is therefore set to 0 after each step, where
        it would be after a long run, and both corrections are 1.

        Args:
            params: parameters or param groups without options of their own.
            others: further keyword arguments, for example `weight_decay`.

        Raises:
            ValueError: a keyword argument that the point decides.
        """
        optimizer = self.point.make(params, **others)

        def before(optimizer: Optimizer, *_: Any) -> None:
            steps = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
            settings = self.settings(max(steps, default=0) + 1)
            for group in optimizer.param_groups:
                group.update(settings)

        def after(optimizer: Optimizer, *_: Any) -> None:
            for state in optimizer.state.values():
                state["mu_product"].zero_()

        if self._scheduled:
            optimizer.register_step_pre_hook(before)
            if self.point.space.name == "NAdam":
                optimizer.register_step_post_hook(after)
        return optimizer


def embed(point: Point, into: str, *, eps: float = 1e10) -> Embedding:
    """Find the point of a wider optimizer that reproduces a narrower one (Choi et al., arXiv:1910.05446).

    From SGD into "Momentum" and "Nesterov", from Momentum into "RMSprop" and "Adam", from RMSprop into "Adam", from
    Nesterov into "NAdam", and along several of these. RMSprop with momentum is Adam only for an eps far above the
    gradients: RMSprop normalises and then averages, Adam averages and then normalises.

    Args:
        point: of one of `SPACES`.
        into: name of the wider one.
        eps: of the wider one where the narrower has none: agreement is the better, the larger it is.

    Raises:
        TypeError: `point` is no point.
        ValueError: `into` does not contain the point's optimizer.
    """
    if not isinstance(point, Point):
        raise TypeError(f"{_CALLER}: embed: point: expected a Point, as SPACES[...].at() makes, got {point!r}")
    large = options.number(f"{_CALLER}: embed: eps", eps, open_low=True)
    space = point.space
    known = SPACES.get(space.name)
    if known is None or (known.factory, known.fixed) != (space.factory, space.fixed):
        raise ValueError(f"{_CALLER}: embed: point: expected one of {', '.join(SPACES)}, got one of {space.name}")
    routes: dict[str, tuple[str, ...]] = {space.name: ()}
    queue = [space.name]
    for name in queue:  # breadth first, so that the shortest way is taken
        for wider in _WIDER.get(name, ()):
            if wider not in routes:
                routes[wider] = (*routes[name], wider)
                queue.append(wider)
    options.choice(f"{_CALLER}: embed: into (from {space.name})", into, tuple(routes))
    here, exact = point, True
    for name in routes[into]:
        here, same = _step(here, SPACES[name], large)
        exact = exact and same
    return Embedding(point, here, exact)


_WIDER = {
    "SGD": ("Momentum", "Nesterov"),
    "Momentum": ("RMSprop", "Adam"),
    "RMSprop": ("Adam",),
    "Nesterov": ("NAdam",),
}


def _step(source: Point, space: SearchSpace, eps: float) -> tuple[Point, bool]:
    """The point in the next wider space, and whether it is exact."""
    lr, gamma = source.values["lr"], source.values.get("momentum", 0.0)
    if space.name in ("Momentum", "Nesterov"):
        return space.at(lr=lr, momentum=gamma), True
    if space.name == "RMSprop":
        return space.at(lr=lr * eps, momentum=gamma, alpha=0.99, eps=eps), False
    if source.space.name == "RMSprop":
        kept = {"beta1": gamma, "beta2": source.values["alpha"], "eps": source.values["eps"]}
        return space.at(lr=lr / (1.0 - gamma), **kept), gamma == 0
    return space.at(lr=lr * eps / (1.0 - gamma), beta1=gamma, beta2=0.999, eps=eps), False
