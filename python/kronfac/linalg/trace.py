"""Estimators of trace and diagonal that spend half of their products on finding the range of the operator.

Where eigenvalues decay, Hutchinson's estimator wastes its products: its variance is that of the large eigenvalues,
which a sketch of the range finds exactly. Hutch++ (Meyer, Musco, Musco, Woodruff, arXiv:2010.09649) splits the operator
into its part on a sketched subspace, whose trace is computed, and the rest, whose trace is estimated. XTrace and XDiag
(Epperly, Tropp, Webber, arXiv:2301.07825) use every probe for both by leaving each out in turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from kronfac.linalg.probes import draw_probes, standard_error
from kronfac.linalg.symmetric import CheckedOperator

# 1 - cos² below which two directions that the basis loses are one: of what is left the sine is round-off.
_PARALLEL = 1e-8

_COLUMNS = 16
"""Vectors per call of op @ V: they share a pass over the data, and an operator may hold one graph per vector."""


class StoppedError(Exception):
    """Raised by a `Tick` to leave the work where it is."""


Tick = Callable[[int], None]
"""Called with the number of products after each call of op @ V."""


@dataclass(frozen=True)
class Estimate:
    """A trace.

    Attributes:
        value: the estimate.
        stderr: its standard error.
        samples: the single estimates whose mean is `value`.
        products: products with single vectors.
        plain: whether it is Hutchinson's, made of what an interrupted method left.
    """

    value: float
    stderr: float
    samples: list[float]
    products: int
    plain: bool = False


@dataclass
class Sketch:
    """Test vectors Ω, an orthonormal basis Q of AΩ = QR, and Z = AQ; grows by more test vectors.

    Attributes:
        op: the operator A (n, n).
        omega: (n, m).
        Q: (n, m).
        R: (m, m), upper triangular, float64.
        Z: (n, m).
        products: spent so far, two per test vector.
    """

    op: CheckedOperator
    omega: Tensor = field(init=False)
    Q: Tensor = field(init=False)
    R: Tensor = field(init=False)
    Z: Tensor = field(init=False)
    products: int = 0

    def __post_init__(self) -> None:
        empty = torch.empty(self.op.size, 0, dtype=self.op.dtype, device=self.op.device)
        self.omega, self.Q, self.Z = empty, empty, empty
        self.R = torch.empty(0, 0, dtype=torch.float64)

    def extend(self, omega: Tensor, images: Tensor | None = None, tick: Tick | None = None) -> None:
        """Take more test vectors (n, k) in, or none if `tick` raises.

        Args:
            omega: the test vectors.
            images: A omega, where that has been computed.
            tick: called after each call of op @ V.
        """
        Y = multiply(self.op, omega, tick) if images is None else images
        over = torch.zeros(self.Q.shape[1], omega.shape[1], dtype=torch.float64)
        for _ in range(2):  # once leaves of the order of the round-off times the condition number
            part = self.Q.mT @ Y
            Y = Y - self.Q @ part
            over += part.to("cpu", torch.float64)
        basis, corner = torch.linalg.qr(Y)
        old = self.R.shape[0]
        R = torch.zeros(old + omega.shape[1], old + omega.shape[1], dtype=torch.float64)
        R[:old, :old], R[:old, old:], R[old:, old:] = self.R, over, corner.to("cpu", torch.float64)
        if old:  # where Y had nothing new, what is left of it is round-off and may point back into Q
            basis, near_one = torch.linalg.qr(basis - self.Q @ (self.Q.mT @ basis))
            basis = basis * torch.sign(near_one.diagonal())
        Z = multiply(self.op, basis, tick)
        self.omega, self.R = torch.cat([self.omega, omega], 1), R
        self.Q, self.Z = torch.cat([self.Q, basis], 1), torch.cat([self.Z, Z], 1)
        self.products += 2 * omega.shape[1]

    def left_out(self) -> Tensor:
        """S (m, m), float64: Q s_i spans what the basis loses when test vector i is left out; unit columns."""
        R = self.R.clone()
        size = float(R.abs().max())
        # A rank below m makes R singular. Any direction will do there: what is left out was not needed.
        floor = size * torch.finfo(self.op.dtype).eps if size else 1.0
        diagonal = R.diagonal()
        diagonal[diagonal.abs() < floor] = floor
        identity = torch.eye(len(R), dtype=R.dtype)
        S = torch.linalg.solve_triangular(R.mT, identity, upper=False)
        unit: Tensor = S / torch.linalg.vector_norm(S, dim=0)
        return unit


def multiply(op: CheckedOperator, vectors: Tensor, tick: Tick | None = None) -> Tensor:
    """A V for many columns, a few at a time."""
    return torch.cat(list(images_of(op, vectors, tick)), dim=1)


def images_of(op: CheckedOperator, vectors: Tensor, tick: Tick | None = None) -> Iterator[Tensor]:
    """A V for many columns, a few at a time as they come."""
    for part in torch.split_with_sizes(vectors, _sizes(vectors.shape[1]), 1):
        image = op.matmat(part.contiguous())
        yield image
        if tick is not None:
            tick(part.shape[1])


def spherical(op: CheckedOperator, count: int, generator: Generator) -> Tensor:
    """Probes (n, count), uniform on the sphere of radius √n."""
    drawn = draw_probes(op.size, count, "gaussian", generator, dtype=op.dtype, device=op.device)
    lengths: Tensor = torch.linalg.vector_norm(drawn, dim=0)
    return drawn * (math.sqrt(op.size) / lengths)


def exact_diagonal(op: CheckedOperator, tick: Tick | None = None) -> Tensor:
    """The diagonal (n,) by n products with unit vectors, float64."""
    parts = []
    first = 0
    for count in _sizes(op.size):
        units = torch.zeros(op.size, count, dtype=op.dtype, device=op.device)
        units[range(first, first + count), range(count)] = 1.0
        parts.append(op.matmat(units)[range(first, first + count), range(count)])
        first += count
        if tick is not None:
            tick(count)
    return torch.cat(parts).to("cpu", torch.float64)


def hutch_pp(
    op: CheckedOperator, budget: int, generator: Generator, distribution: str, tick: Tick | None = None
) -> Estimate | None:
    """Hutch++ with `budget` products: a third for the sketch, a third for its trace, a third for the rest.

    Args:
        op: A.
        budget: at least 6, less than 3n.
        generator: of the probes.
        distribution: of the probes.
        tick: called after each call of op @ V. Where it raises `StoppedError`, the estimate is that of the probes done;
            before there are two of them, Hutchinson's by the sketch's test vectors; None before there are two of those.
    """
    third = budget // 3
    omega = draw_probes(op.size, third, "gaussian", generator, dtype=op.dtype, device=op.device)
    images: list[Tensor] = []
    rest_images: list[Tensor] = []
    head, rest = 0.0, omega
    try:
        for image in images_of(op, omega, tick):
            images.append(image)
        sketch = Sketch(op)
        sketch.extend(omega, torch.cat(images, 1), tick)
        head = float((sketch.Q * sketch.Z).sum(dtype=torch.float64))
        rest = draw_probes(op.size, budget - 2 * third, distribution, generator, dtype=op.dtype, device=op.device)
        rest = rest - sketch.Q @ (sketch.Q.mT @ rest)
        for image in images_of(op, rest, tick):
            rest_images.append(image)
    except StoppedError:
        pass
    plain = sum(image.shape[1] for image in rest_images) < 2
    if plain:
        head, rest, rest_images = 0.0, omega, images
    if sum(image.shape[1] for image in rest_images) < 2:
        return None
    products = torch.cat(rest_images, 1)
    samples = (head + (rest[:, : products.shape[1]] * products).sum(0, dtype=torch.float64)).tolist()
    return Estimate(sum(samples) / len(samples), standard_error(samples), samples, budget, plain)


def xtrace(sketch: Sketch) -> Estimate:
    """XTrace from a sketch by spherical probes: the mean over the probes of the estimates that each gives alone.

    With probe i left out of the sketch, its projector is P_i = Q (I - s_i s_iᵀ) Qᵀ, and the estimate is
    tr(P_i A P_i) + c ((I - P_i) ω_i)ᵀ A ((I - P_i) ω_i), where c makes the projected probe as long as its space asks.
    """
    op, m = sketch.op, sketch.Q.shape[1]
    S, R = sketch.left_out(), sketch.R
    H = (sketch.Q.mT @ sketch.Z).to("cpu", torch.float64)
    W = (sketch.Q.mT @ sketch.omega).to("cpu", torch.float64)
    T = (sketch.Z.mT @ sketch.omega).to("cpu", torch.float64)
    inner = (S * W).sum(0)
    X = W - S * inner
    rest = (W * R).sum(0) - 2 * (T * X).sum(0) + (X * (H @ X)).sum(0)
    # ‖(I - P_i) ω_i‖², which round-off may leave at 0 where the probes span almost everything
    length = (op.size - W.square().sum(0) + inner.square()).clamp(min=1e-9 * op.size)
    samples = H.trace() - (S * (H @ S)).sum(0) + (op.size - m + 1) / length * rest
    variance = samples.var() / m + _shared_variance(op.size, samples, S, R, H, W, T).clamp(min=0.0)
    return Estimate(float(samples.mean()), math.sqrt(variance), samples.tolist(), sketch.products)


def _shared_variance(n: int, samples: Tensor, S: Tensor, R: Tensor, H: Tensor, W: Tensor, T: Tensor) -> Tensor:
    """The covariance of two of XTrace's estimates t_i and t_j, without bias.

    They share all probes but one, so that the variance of their mean is their own over m plus this. Let t_ij be the
    estimate of probe i from a sketch without probe j too. Given all probes but i, both t_i - t_ij and t_ij have a mean
    that does not depend on the other probes; hence t_ij and t_ji are uncorrelated, and so is each with the other's
    difference: cov(t_i, t_j) = E[(t_i - t_ij)(t_j - t_ji)], which is averaged over all pairs. A sketch without i and j
    loses the span of s_i and s_j, and all of its products are those of m x m matrices.
    """
    m = len(samples)
    H = (H + H.mT) / 2
    HS, HW = H @ S, H @ W
    # [i, j]: of probe i where j is left out too
    cosine, energy = S.mT @ S, S.mT @ HS
    lost = (1 - cosine.square()).clamp(min=_PARALLEL)
    own = (S * W).sum(0)[:, None]  # s_iᵀw_i
    other = W.mT @ S  # s_jᵀw_i
    first, second = (own - cosine * other) / lost, (other - cosine * own) / lost  # w_i's part in the span of s_i, s_j
    diagonal = energy.diagonal()
    head = H.trace() - (diagonal[:, None] + diagonal - 2 * cosine * energy) / lost
    through = (W * T).sum(0)[:, None] - first * (S * T).sum(0)[:, None] - second * (T.mT @ S)
    twice = (
        (W * HW).sum(0)[:, None]
        - 2 * first * (S * HW).sum(0)[:, None]
        - 2 * second * (HW.mT @ S)
        + first.square() * diagonal[:, None]
        + 2 * first * second * energy
        + second.square() * diagonal
    )
    rest = (W * R).sum(0)[:, None] - 2 * through + twice
    length = (n - W.square().sum(0)[:, None] + first * own + second * other).clamp(min=1e-9 * n)
    change = samples[:, None] - head - (n - m + 2) / length * rest
    change = change.masked_fill((1 - cosine.square()) < _PARALLEL, 0.0)  # the diagonal too
    return (change * change.mT).sum() / (m * (m - 1))


def xdiag(sketch: Sketch) -> tuple[Tensor, Tensor]:
    """XDiag from a sketch by Rademacher probes.

    Returns:
        The diagonal (n,) and its standard errors (n,), float64.
    """
    S = sketch.left_out()
    QS, ZS = (part @ S.to(part) for part in (sketch.Q, sketch.Z))
    head = (sketch.Q * sketch.Z).sum(1, keepdim=True, dtype=torch.float64)
    gains = (S * sketch.R).sum(0).to(QS)
    left, right, own = (part.to(torch.float64) for part in (QS, ZS, gains * sketch.omega))
    samples = head - left * right + left * own
    shared = _shared_variances(S.to(head), left, right, right - own).clamp(min=0.0)
    return samples.mean(1).cpu(), (samples.var(1) / samples.shape[1] + shared).sqrt().cpu()


def _shared_variances(S: Tensor, q: Tensor, z: Tensor, y: Tensor) -> Tensor:
    """The covariances of two of XDiag's estimates d_i and d_j, entry by entry, without bias.

    For the reason given in `_shared_variance`, cov(d_i, d_j) = E[(d_i - d_ij)(d_j - d_ji)], d_ij from probe i and the
    sketch without probe j too. With c = s_iᵀs_j, q = Q S, z = Z S and y = z - (what probe i finds in q_i) ω_i,
    d_i - d_ij = (c² q_i y_i + q_j z_j - c q_i z_j - c q_j y_i) / (1 - c²). Multiplied out, the sum over all pairs is
    one of products of columns with powers of c, which are products of (n, m) matrices with (m, m) ones.
    """
    m = q.shape[1]
    cosine = S.mT @ S
    lost = 1 - cosine.square()
    lost.fill_diagonal_(0.0)
    # Where two probes lose the same direction there is no telling what each would find without the other.
    K0 = torch.where(lost > _PARALLEL, lost.clamp(min=_PARALLEL).reciprocal().square(), 0.0)
    K1, K2, K3, K4 = (K0 * cosine**power for power in (1, 2, 3, 4))
    a, p = q * y, q * z
    total = (
        a * (a @ (K4 + K2))
        + p * (p @ (K0 + K2))
        + 2 * (y * z * (q.square() @ K2) + a * p * K2.sum(0))
        - 2 * (a * z * (q @ K3) + a * q * (y @ K3))
        - 2 * (z * ((p * q) @ K1) + q * ((p * y) @ K1))
    )
    return total.sum(1) / (m * (m - 1))


def _sizes(count: int) -> list[int]:
    """How many vectors each call of op @ V takes."""
    return [min(_COLUMNS, count - first) for first in range(0, count, _COLUMNS)]
