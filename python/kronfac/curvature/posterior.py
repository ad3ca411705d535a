"""The Gaussian that Kronecker factors describe: log-determinant, quadratic forms, solves and samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from kronfac.curvature.registry import find_layers
from kronfac.curvature.statistics import KroneckerFactors
from kronfac.linalg.damped import eigenbases, pi_from_means


@dataclass(frozen=True)
class _Block:
    """One pair of factors in its eigenbasis.

    Attributes:
        left: eigenvectors of G (out, out).
        right: eigenvectors of A (in, in); None where A is diagonal.
        spectrum: eigenvalues of the precision in that basis (out, in).
    """

    left: Tensor
    right: Tensor | None
    spectrum: Tensor

    def scale(self, matrix: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Multiply a matrix (..., out, in) in the eigenbasis by a function of the precision's eigenvalues."""
        inside = self.left.mT @ (matrix if self.right is None else matrix @ self.right)
        out = self.left @ (inside * function(self.spectrum))
        return out if self.right is None else out @ self.right.mT


class KroneckerPosterior:
    """A zero-mean Gaussian over the covered weights whose precision is block-diagonal and Kronecker-factored.

    Layer by layer the precision is P = n (A ⊗ G) + δ I: n examples of which F ≈ A ⊗ G is the mean curvature, and a
    prior of precision δ. This is the Laplace approximation around trained weights (Ritter, Botev & Barber 2018; "kron"
    of laplace-torch, where n stands inside the factors of its summed loss and δ is ``prior_precision``). For a loss
    that is the *mean* over n examples and has a weight decay η, δ = n·η. With n = 1 and δ = λ it is the damped
    curvature A ⊗ G + λI that an optimizer inverts.

        factors = kronfac.curvature.factors(model, loader, likelihood="categorical", fisher="exact")
        posterior = KroneckerPosterior(factors, n=len(dataset), prior_precision=1.0)

    Vectors are given and returned as one matrix (out, in[+1]) per layer, shaped as its gradient matrix V, the bias in
    the last column: (A ⊗ G) vec(V) = vec(G V A). Matrices may have more dimensions in front, for several vectors at
    once; ``to_parameters`` turns them into tensors shaped like the parameters. Factors of all kinds are understood:
    plain, in groups (groups, ·, ·), diagonal A of embeddings, whole blocks of norms.

    Args:
        factors: by layer name, as `kronfac.curvature.factors` and `KFAC.factors` return them.
        n: how many examples, > 0.
        prior_precision: δ > 0, one for all layers or by layer name.
        damping: "exact" adds δ as said. "factored" is what K-FAC's solve="inverse" inverts: n (A + π√λ I) ⊗
            (G + √λ/π I) with λ = δ/n, which exceeds the exact one by n(π√λ I ⊗ G + A ⊗ √λ/π I); where A is a single
            number the damping is exact, as it is in KFAC for norms.

    Raises:
        TypeError: `factors` is no mapping.
        ValueError: an argument outside its range, a layer without a prior precision, or a factor that is not finite.
    """

    def __init__(
        self,
        factors: Mapping[str, KroneckerFactors],
        *,
        n: float = 1.0,
        prior_precision: float | Mapping[str, float] = 1.0,
        damping: str = "exact",
    ) -> None:
        if not isinstance(factors, Mapping):
            raise TypeError(f"KroneckerPosterior: factors: expected a mapping by layer name, got {type(factors)}")
        if damping not in ("exact", "factored"):
            raise ValueError(f"KroneckerPosterior: damping: expected 'exact' or 'factored', got {damping!r}")
        self.n = _positive("n", n)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._blocks: dict[str, list[_Block]] = {}
        for name, pair in factors.items():
            prior = prior_precision.get(name) if isinstance(prior_precision, Mapping) else prior_precision
            if prior is None:
                raise ValueError(f"KroneckerPosterior: prior_precision: expected a value for layer {name!r}, got none")
            delta = _positive(f"prior_precision of {name!r}", prior)
            A, G = pair
            grouped = G.dim() == 3
            pairs = list(zip(A.unbind(), G.unbind(), strict=True)) if grouped else [(A, G)]
            self._shapes[name] = (*G.shape[:-1], A.shape[-1])
            self._blocks[name] = [_block(name, a, g, self.n, delta, damping) for a, g in pairs]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each layer's matrix: (out, in[+1]), or (groups, out, in[+1])."""
        return dict(self._shapes)

    def logdet(self) -> Tensor:
        """Log det P, the sum over all layers, shape ()."""
        return torch.stack([part.to("cpu", torch.float64) for part in self.logdets().values()]).sum()

    def logdets(self) -> dict[str, Tensor]:
        """Log det P by layer, each of shape ()."""
        return {
            name: torch.stack([block.spectrum.log().sum() for block in blocks]).sum()
            for name, blocks in self._blocks.items()
        }

    def apply(self, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """P v for the layers given."""
        return self._scaled(matrices, lambda spectrum: spectrum)

    def solve(self, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """P⁻¹ v, the covariance times a vector, for the layers given."""
        return self._scaled(matrices, torch.reciprocal)

    def quadratic(self, matrices: Mapping[str, Tensor], *, inverse: bool = False) -> Tensor:
        """vᵀ P v, the sum over the layers given; with `inverse` vᵀ P⁻¹ v, the variance of ⟨v, θ⟩.

        Args:
            matrices: v by layer name, all with the same dimensions in front.
            inverse: of the covariance instead of the precision.

        Returns:
            One value for each vector, shaped like the dimensions in front.
        """
        done = self.solve(matrices) if inverse else self.apply(matrices)
        parts = [(done[name] * matrices[name]).flatten(-len(self._shapes[name])).sum(-1) for name in matrices]
        if not parts:
            raise ValueError("KroneckerPosterior.quadratic: matrices: expected at least one layer, got none")
        home = parts[0]
        return torch.stack([part.to(home) for part in parts]).sum(0)

    def transform(self, noise: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """L z with L Lᵀ = P⁻¹: turns standard normal numbers into samples.

        Args:
            noise: z by layer name.
        """
        return self._scaled(noise, torch.rsqrt)

    def sample(self, shape: tuple[int, ...] = (), *, generator: Generator | None = None) -> dict[str, Tensor]:
        """Draw from N(0, P⁻¹): deviations from the trained weights.

        Args:
            shape: dimensions in front, (5,) for five samples.
            generator: source of the draws; torch's own when None.

        Returns:
            By layer name, (*shape, *matrix shape).
        """
        noise = {}
        for name, size in self._shapes.items():
            like = self._blocks[name][0].spectrum
            home = like.device if generator is None else generator.device
            noise[name] = torch.randn(*shape, *size, dtype=like.dtype, device=home, generator=generator).to(like.device)
        return self.transform(noise)

    def _scaled(self, matrices: Mapping[str, Tensor], function: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        result = {}
        for name, matrix in matrices.items():
            if name not in self._blocks:
                raise ValueError(
                    f"KroneckerPosterior: matrices: expected layers among {sorted(self._blocks)}, got {name!r}"
                )
            size, blocks = self._shapes[name], self._blocks[name]
            if tuple(matrix.shape[matrix.dim() - len(size) :]) != size:
                raise ValueError(
                    f"KroneckerPosterior: matrices[{name!r}]: expected shape (..., {', '.join(map(str, size))}), "
                    f"got {tuple(matrix.shape)}"
                )
            if len(size) == 2:
                result[name] = blocks[0].scale(matrix, function)
            else:
                parts = zip(blocks, matrix.unbind(-3), strict=True)
                result[name] = torch.stack([block.scale(part, function) for block, part in parts], -3)
        return result


def to_parameters(model: nn.Module, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn one matrix per layer into tensors shaped like the model's parameters.

    Args:
        model: whose layers the matrices belong to.
        matrices: (*front, out, in[+1]) by layer name, such as `KroneckerPosterior.sample` returns; all with the same
            dimensions in front.

    Returns:
        By parameter name, as in ``model.named_parameters()``, (*front, *parameter shape). Rows of a parameter that
        belong to layers not given are 0 (the projections of nn.MultiheadAttention share one).

    Raises:
        ValueError: a name that is no layer of the model, or a matrix of another shape.
    """
    layers, names = find_layers(model), {id(p): name for name, p in model.named_parameters()}
    result: dict[str, Tensor] = {}
    for layer, matrix in matrices.items():
        if layer not in layers:
            raise ValueError(f"to_parameters: matrices: expected layers among {sorted(layers)}, got {layer!r}")
        adapter = layers[layer]
        front = matrix.shape[: matrix.dim() - len(adapter.matrix_shape)]
        rows = [adapter.split(one) for one in matrix.reshape(-1, *matrix.shape[len(front) :]).unbind()]
        for index, parameter in enumerate(adapter.parameters()):
            value = torch.stack([parts[index] for parts in rows])
            value = value.reshape(*front, *value.shape[1:])
            name = names[id(parameter)]
            if adapter.slices is None:
                result[name] = value
                continue
            whole = result.setdefault(name, value.new_zeros(*front, *parameter.shape))
            whole[(slice(None),) * len(front) + (adapter.slices[index],)] = value
    return result


def _block(name: str, A: Tensor, G: Tensor, n: float, prior: float, damping: str) -> _Block:
    left, values_G = _eigen(name, "G", G)
    right, values_A = (None, A.clamp(min=0)) if A.dim() == 1 else _eigen(name, "A", A)
    if not bool(values_A.isfinite().all()):
        raise ValueError(
            f"KroneckerPosterior: factors: A of layer {name!r}: expected finite values, got NaN or infinity"
        )
    if damping == "factored" and values_A.numel() > 1:
        pi = pi_from_means(values_A.mean(), values_G.mean())
        root = math.sqrt(prior / n)
        spectrum = n * torch.outer(values_G + root / pi, values_A + root * pi)
    else:
        spectrum = n * torch.outer(values_G, values_A) + prior
    return _Block(left, right, spectrum)


def _eigen(name: str, which: str, factor: Tensor) -> tuple[Tensor, Tensor]:
    (basis,) = eigenbases([factor]).values
    if basis is None:
        raise ValueError(
            f"KroneckerPosterior: factors: {which} of layer {name!r}: expected a finite symmetric matrix, got one that "
            "could not be diagonalised"
        )
    return basis[1], basis[0]


def _positive(what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"KroneckerPosterior: {what}: expected a finite number > 0, got {value!r}")
    return float(value)
