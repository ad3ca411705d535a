"""The network, its data, and a product with its Hessian that no side of the comparison computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kronfac.datasets import load

Float64Array = npt.NDArray[np.float64]

TRAINING_STEPS = 300


def _lenet() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(512, 526), nn.ReLU(), nn.Linear(526, 10)),
    )


def _conv() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(512, 360), nn.ReLU(), nn.Linear(360, 10)),
    )


def _tiny() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(16, 10))


NETWORKS: dict[str, Callable[[], nn.Sequential]] = {"lenet": _lenet, "conv": _conv, "tiny": _tiny}


@dataclass(frozen=True)
class Problem:
    """A trained network and the batch whose mean cross entropy is analysed.

    Attributes:
        name: of the network.
        model: in eval mode, float32.
        inputs: (N, 1, 8, 8), float32.
        targets: (N,), int64.
    """

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor

    @classmethod
    def trained(cls, name: str, examples: int, seed: int = 0) -> Problem:
        """Train the network of that name on digits; the same weights for the same seed and number of threads."""
        data = load("digits").train
        inputs, targets = data.inputs, data.targets
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = NETWORKS[name]()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(TRAINING_STEPS):
            batch = torch.randint(len(inputs), (64,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[batch]), targets[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        model.zero_grad()
        return cls(name, model.eval(), inputs[:examples].clone(), targets[:examples].clone())

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def fresh_model(self) -> nn.Module:
        """A copy for a side that leaves its gradients in the model."""
        return copy.deepcopy(self.model)

    def in_precision(self, precision: str) -> Problem:
        """The same in "float32", or with a copy of model and inputs in "float64"."""
        if precision == "float32":
            return self
        return Problem(self.name, copy.deepcopy(self.model).double(), self.inputs.double(), self.targets)

    @cached_property
    def reference(self) -> Callable[[Tensor], Tensor]:
        """The Hessian's product with a vector (n,) in float64, by differentiating the gradient's inner product."""
        model = copy.deepcopy(self.model).double()
        parameters = list(model.parameters())
        loss = F.cross_entropy(model(self.inputs.double()), self.targets)
        gradient = torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, parameters, create_graph=True)])

        def product(vector: Tensor) -> Tensor:
            parts = torch.autograd.grad(gradient, parameters, vector.double(), retain_graph=True)
            return torch.cat([part.reshape(-1) for part in parts])

        return product

    def exact_eigenvalues(self, k: int) -> Float64Array:
        """The k eigenvalues of largest magnitude, descending in magnitude, by scipy's ARPACK in float64."""
        from scipy.sparse.linalg import LinearOperator, eigsh

        operator = LinearOperator(
            (self.size, self.size),
            matvec=lambda vector: self.reference(torch.from_numpy(np.array(vector).reshape(-1))).numpy(),
            dtype=np.float64,
        )
        start = np.random.default_rng(0).standard_normal(self.size)
        values: Float64Array = eigsh(operator, k=k, which="LM", tol=1e-9, v0=start, return_eigenvectors=False)
        return values[np.argsort(-np.abs(values), kind="stable")]

    def gauss_newton_trace(self) -> float:
        """The exact trace of the Gauss-Newton matrix: mean over examples of Σ_c p_c ‖Jᵀ(e_c - p)‖², in float64."""
        model = copy.deepcopy(self.model).double()
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

        def logits(values: dict[str, Tensor], x: Tensor) -> Tensor:
            output: Tensor = torch.func.functional_call(model, values, (x[None],))
            return output[0]

        def one(x: Tensor) -> Tensor:
            output, pull = torch.func.vjp(lambda values: logits(values, x), parameters)
            p = output.softmax(0)
            directions = torch.eye(len(p), dtype=p.dtype) - p  # rows e_c - p
            (gradients,) = torch.func.vmap(pull)(directions)
            squares = sum(part.flatten(1).square().sum(1) for part in gradients.values())
            return (p * squares).sum()

        return float(np.mean([float(one(x)) for x in self.inputs.double()]))


@dataclass(frozen=True)
class Certificate:
    """What the pairs of one run are worth, relative to |λ₁|.

    Attributes:
        residual: largest ‖Hv - λv‖; None where it was not measured, because the error is too large already.
        error: largest difference to the exact eigenvalue of the same rank.
    """

    residual: float | None
    error: float

    def holds(self, tolerance: float) -> bool:
        """Whether every pair meets the tolerance and none is missing or there twice."""
        return self.residual is not None and max(self.residual, self.error) <= tolerance


def certify(
    problem: Problem, exact: Float64Array, values: Tensor, vectors: Tensor, limit: float = float("inf")
) -> Certificate:
    """Measure eigenpairs with the independent product.

    Args:
        problem: whose Hessian.
        exact: eigenvalues by magnitude.
        values: (k,), in any order.
        vectors: columns (n, k), of any length.
        limit: error beyond which the residuals need not be measured.
    """
    scale = float(np.abs(exact).max())
    ranked = values[values.abs().argsort(descending=True)].double().numpy()
    error = float(np.abs(ranked - exact[: len(ranked)]).max()) / scale
    if not error <= limit:
        return Certificate(None, error)
    columns = vectors.double() / vectors.double().norm(dim=0)
    values = values.double()
    residuals = [
        float((problem.reference(column) - value * column).norm()) if column.isfinite().all() else float("inf")
        for value, column in zip(values, columns.mT.contiguous(), strict=True)
    ]
    return Certificate(max(residuals) / scale, error)
