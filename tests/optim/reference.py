"""K-FAC on a fully connected tanh network in plain numpy float64, sharing no code with kronfac.

fisher="exact" for a softmax with mean cross-entropy; every option of the optimizer that changes the trajectory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class ReferenceKFAC:
    """Weights as (out, in + 1) matrices, the bias in the last column."""

    weights: list[Array]
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    decoupled: bool = False
    damping: float = 1e-3
    solve: str = "inverse"
    factor_decay: float = 0.95
    factor_every: int = 1
    inverse_every: int = 10
    kl_clip: float | None = 1e-3
    steps: int = 0
    updates: int = 0
    A: list[Array] = field(default_factory=list)
    G: list[Array] = field(default_factory=list)
    frozen: list[tuple[Array, ...]] = field(default_factory=list)
    buffers: list[Array] | None = None

    def step(self, x: Array, labels: NDArray[np.int64]) -> float:
        inputs, probabilities = self._forward(x)
        count = len(x)
        loss = -np.log(probabilities[np.arange(count), labels]).mean()
        residual = probabilities.copy()
        residual[np.arange(count), labels] -= 1
        gradients = [g.T @ a / count for g, a in zip(self._backward(inputs, residual), inputs, strict=True)]

        if self.steps % self.factor_every == 0:
            self._update_factors(inputs, probabilities)
        eta = 0.0 if self.decoupled else self.weight_decay
        if self.steps % self.inverse_every == 0:
            self.frozen = [self._invert(a, g, self.damping + eta) for a, g in zip(self.A, self.G, strict=True)]

        full = [v + eta * w for v, w in zip(gradients, self.weights, strict=True)]
        natural = [self._apply(f, v, self.damping + eta) for f, v in zip(self.frozen, full, strict=True)]
        if self.kl_clip is not None:
            size = self.lr**2 * sum(float((p * v).sum()) for p, v in zip(natural, full, strict=True))
            scale = min(1.0, np.sqrt(self.kl_clip / size)) if size > 0 else 1.0
            natural = [scale * p for p in natural]
        if self.decoupled:
            self.weights = [w * (1 - self.lr * self.weight_decay) for w in self.weights]
        if self.buffers is None:
            self.buffers = [p.copy() for p in natural]
        else:
            self.buffers = [self.momentum * b + p for b, p in zip(self.buffers, natural, strict=True)]
        moves = self.buffers
        if self.nesterov:
            moves = [p + self.momentum * b for p, b in zip(natural, self.buffers, strict=True)]
        self.weights = [w - self.lr * m for w, m in zip(self.weights, moves, strict=True)]
        self.steps += 1
        return float(loss)

    def _forward(self, x: Array) -> tuple[list[Array], Array]:
        inputs, hidden = [], x
        for index, weight in enumerate(self.weights):
            extended = np.hstack([hidden, np.ones((len(x), 1))])
            inputs.append(extended)
            hidden = extended @ weight.T
            if index < len(self.weights) - 1:
                hidden = np.tanh(hidden)
        shifted = np.exp(hidden - hidden.max(1, keepdims=True))
        return inputs, shifted / shifted.sum(1, keepdims=True)

    def _backward(self, inputs: list[Array], top: Array) -> list[Array]:
        """Gradients with respect to each layer's outputs, per example, for a given gradient at the logits."""
        result = [top]
        for index in range(len(self.weights) - 1, 0, -1):
            activation = inputs[index][:, :-1]
            result.insert(0, (result[0] @ self.weights[index][:, :-1]) * (1 - activation**2))
        return result

    def _update_factors(self, inputs: list[Array], probabilities: Array) -> None:
        count, classes = probabilities.shape
        A = [a.T @ a / count for a in inputs]
        G = [np.zeros((len(w), len(w))) for w in self.weights]
        for label in range(classes):  # the expectation over labels drawn from the model, term by term
            residual = probabilities - np.eye(classes)[label]
            for total, g in zip(G, self._backward(inputs, residual), strict=True):
                total += (g * probabilities[:, label : label + 1]).T @ g / count
        self.updates += 1
        decay = min(1 - 1 / self.updates, self.factor_decay)
        if self.updates == 1:
            self.A, self.G = A, G
        else:
            self.A = [decay * old + (1 - decay) * new for old, new in zip(self.A, A, strict=True)]
            self.G = [decay * old + (1 - decay) * new for old, new in zip(self.G, G, strict=True)]

    def _invert(self, A: Array, G: Array, damping: float) -> tuple[Array, ...]:
        if self.solve == "eigen":
            return A.copy(), G.copy()
        pi = np.sqrt((np.trace(A) / len(A)) / (np.trace(G) / len(G)))
        left = np.linalg.inv(G + np.sqrt(damping) / pi * np.eye(len(G)))
        right = np.linalg.inv(A + pi * np.sqrt(damping) * np.eye(len(A)))
        return left, right

    def _apply(self, frozen: tuple[Array, ...], v: Array, damping: float) -> Array:
        if self.solve == "eigen":
            A, G = frozen
            dense = np.kron(G, A) + damping * np.eye(v.size)  # row-major vec: out index outside
            return np.linalg.solve(dense, v.reshape(-1)).reshape(v.shape)
        left, right = frozen
        return left @ v @ right
