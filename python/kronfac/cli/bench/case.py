"""What is measured: a case names an operator and its inputs, a contest is the case with everything allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

OURS = "kronfac"


@dataclass(frozen=True)
class Contest:
    """Callables that do the same work on the same inputs; each returns its result.

    Attributes:
        sides: by name, first ours (`OURS`), second the rival that ratios are taken against. In-place operators work on
            buffers of their own, such that the result of a second call is as good as that of the first.
        error: of a side's result against float64, relative.
        tolerance: largest error of ours that passes; None judges by the errors of the others.
        not_torch: sides whose threads torch does not govern.
    """

    sides: Mapping[str, Callable[[], Any]]
    error: Callable[[Any], float]
    tolerance: float | None = None
    not_torch: frozenset[str] = frozenset({"numpy", "scipy"})


@dataclass(frozen=True)
class Case:
    """One operator at one size.

    Attributes:
        op: name in `kronfac.ops`.
        name: the size, unique within the operator.
        prepare: allocates inputs (from the global random stream) and returns the contest.
        work: nominal floating-point operations, or bytes that must cross the memory bus, of one call.
        unit: of `work`.
        quick: small enough for a check of the harness itself.
    """

    op: str
    name: str
    prepare: Callable[[], Contest] = field(repr=False, compare=False)
    work: float
    unit: Literal["FLOP", "byte"] = "FLOP"
    quick: bool = False

    @property
    def key(self) -> str:
        """Unique name among all cases."""
        return f"{self.op}[{self.name}]"


# A side may be this many times less accurate than the worst of the others before it counts as wrong. Rounding errors of
# two correct algorithms differ by small factors; a wrong result is off by orders of magnitude.
ERROR_FACTOR = 20.0


def verdict(errors: Mapping[str, float], tolerance: float | None = None) -> bool:
    """Whether our error is that of a correct implementation: not NaN, and like the rivals' or like rounding."""
    if tolerance is not None:
        return errors[OURS] <= tolerance
    epsilon = float(torch.finfo(torch.float32).eps)
    rivals = [error for name, error in errors.items() if name != OURS and error == error]
    return errors[OURS] <= ERROR_FACTOR * max([epsilon, *rivals])


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth, in float64."""
    scale = float(torch.linalg.norm(truth))
    difference = float(torch.linalg.norm(result.double() - truth))
    return difference / scale if scale > 0 else difference


def worst(errors: list[float]) -> float:
    """The largest; NaN where any is NaN, which `max` would lose."""
    return float(torch.tensor(errors, dtype=torch.float64).max())


def spd_factor(n: int, decay: float = 1.0, reflections: int = 4) -> Tensor:
    """A factor as training makes it: eigenvalues that fall off as 1/j^decay in a dense random basis, float32.

    The basis is a product of Householder reflections, which costs n^2 operations where a random orthogonal matrix would
    cost n^3: the largest factors of ResNet-50 have order 4608.
    """
    factor = torch.diag(torch.arange(1, n + 1, dtype=torch.float64).pow(-decay))
    for _ in range(reflections):
        u = torch.randn(n, dtype=torch.float64)
        u /= torch.linalg.norm(u)
        # (I - 2uu^T) F (I - 2uu^T) = F - u p^T - p u^T with p = 2Fu - 2(u^T F u) u
        product = factor @ u
        p = 2 * product - 2 * torch.dot(u, product) * u
        factor -= torch.outer(u, p) + torch.outer(p, u)
    return factor.float()
