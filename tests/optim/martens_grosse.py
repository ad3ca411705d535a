"""Algorithm 2 of Martens & Grosse (arXiv:1503.05671) with every matrix written out, sharing no code with kronfac.

A fully connected tanh network with a softmax and mean cross-entropy, Kronecker factors by the expectation over labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Dense:
    """Weights as (out, in + 1) matrices, the bias in the last column; parameters are all of them in one vector."""

    weights: list[Tensor]
    damping: float
    decay: float = 0.0
    inverse_every: int = 10
    factor_decay: float = 0.95
    steps: int = 0
    A: list[Tensor] = field(default_factory=list)
    G: list[Tensor] = field(default_factory=list)
    gamma: float = 0.0
    rho: float | None = None
    alpha: float = 0.0
    mu: float = 0.0
    previous: Tensor | None = None
    inverse: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gamma = math.sqrt(self.damping + self.decay)

    @property
    def theta(self) -> Tensor:
        return torch.cat([w.reshape(-1) for w in self.weights])

    def split(self, theta: Tensor) -> list[Tensor]:
        parts = torch.split(theta, [w.numel() for w in self.weights])
        return [part.view_as(w) for part, w in zip(parts, self.weights, strict=True)]

    def outputs(self, theta: Tensor, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs with their 1, and outputs, of every layer."""
        inputs, results = [], []
        for index, w in enumerate(self.split(theta)):
            hidden = x if index == 0 else torch.tanh(results[-1])
            inputs.append(torch.cat([hidden, torch.ones(len(x), 1, dtype=x.dtype)], 1))
            results.append(inputs[-1] @ w.T)
        return inputs, results

    def objective(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        logits = self.outputs(theta, x)[1][-1]
        return torch.nn.functional.cross_entropy(logits, y) + 0.5 * self.decay * theta @ theta

    def step(self, x: Tensor, y: Tensor) -> None:
        theta = self.theta
        self._statistics(x)
        gradient = torch.func.grad(self.objective)(theta, x, y)
        fisher = self._fisher(theta, x) + (self.damping + self.decay) * torch.eye(len(theta), dtype=theta.dtype)

        choosing = self.steps > 0 and self.steps % 20 == 0
        w2 = (19 / 20) ** 10
        best = None
        for gamma in [self.gamma, self.gamma * w2, self.gamma / w2] if choosing else [self.gamma]:
            inverse = self.inverse
            if choosing or self.steps % self.inverse_every == 0:
                inverse = [self._block(a, g, gamma) for a, g in zip(self.A, self.G, strict=True)]
            parts = [b @ v.reshape(-1) for b, v in zip(inverse, self.split(gradient), strict=True)]
            plane = [-torch.cat(parts)] + ([] if self.previous is None else [self.previous])
            basis = torch.stack(plane, 1)
            c = torch.linalg.solve(basis.T @ fisher @ basis, -(basis.T @ gradient))
            delta = basis @ c
            change = float(gradient @ delta + 0.5 * delta @ fisher @ delta)
            if best is None or change < best[0]:
                best = change, gamma, inverse, delta, c
        assert best is not None
        change, self.gamma, self.inverse, delta, c = best
        self.alpha, self.mu = float(c[0]), float(c[1]) if len(c) > 1 else 0.0
        if (self.steps + 1) % 5 == 0:
            self.rho = float(self.objective(theta + delta, x, y) - self.objective(theta, x, y)) / change
            if self.rho > 0.75:
                self.damping *= (19 / 20) ** 5
            if self.rho < 0.25:
                self.damping /= (19 / 20) ** 5
        self.weights = [part.clone() for part in self.split(theta + delta)]
        self.previous = delta
        self.steps += 1

    def _statistics(self, x: Tensor) -> None:
        inputs, outputs = self.outputs(self.theta, x)
        probabilities = outputs[-1].softmax(1)
        new_a = [a.T @ a / len(x) for a in inputs]
        new_g = [torch.zeros(len(w), len(w), dtype=x.dtype) for w in self.weights]
        for label in range(probabilities.shape[1]):
            g = probabilities - torch.nn.functional.one_hot(torch.tensor(label), probabilities.shape[1])
            for index in reversed(range(len(self.weights))):
                new_g[index] += (g * probabilities[:, label : label + 1]).T @ g / len(x)
                g = (g @ self.weights[index][:, :-1]) * (1 - inputs[index][:, :-1] ** 2)
        decay = min(1 - 1 / (self.steps + 1), self.factor_decay)
        if not self.A:
            self.A, self.G = new_a, new_g
        self.A = [decay * old + (1 - decay) * new for old, new in zip(self.A, new_a, strict=True)]
        self.G = [decay * old + (1 - decay) * new for old, new in zip(self.G, new_g, strict=True)]

    def _block(self, a: Tensor, g: Tensor, gamma: float) -> Tensor:
        """The inverse of (G + γ/π I) ⊗ (A + πγ I), row-major."""
        pi = math.sqrt(float(a.trace() / len(a)) / float(g.trace() / len(g)))
        eye_a, eye_g = torch.eye(len(a), dtype=a.dtype), torch.eye(len(g), dtype=g.dtype)
        return torch.linalg.inv(torch.kron(g + gamma / pi * eye_g, a + pi * gamma * eye_a))

    def _fisher(self, theta: Tensor, x: Tensor) -> Tensor:
        logits = lambda t: self.outputs(t, x)[1][-1]  # noqa: E731
        jacobian = torch.func.jacrev(logits)(theta)
        p = logits(theta).softmax(1)
        curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        return torch.einsum("ncp,ncd,ndq->pq", jacobian, curvature, jacobian) / len(x)
