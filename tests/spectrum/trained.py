"""Networks of about 2,000 parameters trained on digits, in float64, with their curvature written out densely."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.nn import functional

from kronfac.datasets import Batches, load
from kronfac.operators import CurvatureOperator, ggn
from kronfac.operators import hessian as hessian_operator

NAMES = ("mlp", "convnet", "batchnorm convnet")
KINDS = ("hessian", "ggn")

# Of different sizes, so that the mean of the batches' means is not the mean over the examples.
_CUTS = (0, 70, 100)
_CHUNK = 64  # tangents or cotangents at a time


def _make(name: str) -> nn.Sequential:
    if name == "mlp":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 10)
        )
    if name == "convnet":
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, 10),
        )
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


class _Unfolded(nn.Conv2d):
    """A convolution as matrix products: torch's own are slow where each tangent has weights of its own."""

    def forward(self, x: Tensor) -> Tensor:
        pixels = torch.eye(x[0].numel(), dtype=x.dtype).view(-1, *x.shape[1:])
        select = functional.unfold(pixels, self.kernel_size, padding=int(self.padding[0]), stride=self.stride)
        patches = (x.flatten(1) @ select.flatten(1)).view(len(x), *select.shape[1:])
        side = math.isqrt(patches.shape[-1])
        result = (self.weight.flatten(1) @ patches).unflatten(-1, (side, side))
        return result if self.bias is None else result + self.bias[:, None, None]


class Trained:
    """A network, the examples its curvature is taken over, and that curvature as dense matrices.

    Attributes:
        model: in train mode, as after an epoch; the running statistics of its batch normalisation are trained.
        batches: the examples in two batches of different sizes.
    """

    def __init__(self, name: str, steps: int = 120) -> None:
        torch.manual_seed(3)
        self.name = name
        self.model = _make(name).double()
        split = load("digits").train
        optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-3)
        batches, done = Batches(split, 64, seed=0), 0
        while done < steps:
            for inputs, targets in batches:
                optimizer.zero_grad()
                functional.cross_entropy(self.model(inputs.double()), targets).backward()
                optimizer.step()
                done += 1
        optimizer.zero_grad()
        self.inputs, self.targets = split.inputs[: _CUTS[-1]].double(), split.targets[: _CUTS[-1]]
        self.batches = [(self.inputs[low:high], self.targets[low:high]) for low, high in pairwise(_CUTS)]
        self._spectra: dict[str, npt.NDArray[np.float64]] = {}

    def operator(self, kind: str) -> CurvatureOperator:
        """Kronfac's, over both batches, with their graphs kept."""
        make = hessian_operator if kind == "hessian" else ggn
        return make(self.model, functional.cross_entropy, self.batches, keep_graph=True)

    def dense(self, kind: str) -> Tensor:
        """The same by torch.func, over all examples at once."""
        return self.hessian if kind == "hessian" else self.ggn

    def spectrum(self, kind: str) -> npt.NDArray[np.float64]:
        """Eigenvalues by LAPACK, ascending."""
        if kind not in self._spectra:
            self._spectra[kind] = np.linalg.eigvalsh(self.dense(kind).numpy())
        return self._spectra[kind]

    def groups(self) -> dict[str, npt.NDArray[np.int64]]:
        """Where each module's parameters lie in a flat vector."""
        found: dict[str, list[npt.NDArray[np.int64]]] = {}
        first = 0
        for name, parameter in self.model.named_parameters():
            found.setdefault(name.rpartition(".")[0], []).append(np.arange(first, first + parameter.numel()))
            first += parameter.numel()
        return {name: np.concatenate(parts) for name, parts in found.items()}

    @cached_property
    def hessian(self) -> Tensor:
        """(n, n), forward over reverse."""
        run, start = self._flat()
        gradient = grad(lambda vector: functional.cross_entropy(run(vector, self.inputs), self.targets))
        identity = torch.eye(len(start), dtype=start.dtype)
        result: Tensor = vmap(lambda tangent: jvp(gradient, (start,), (tangent,))[1], chunk_size=_CHUNK)(identity)
        return (result + result.mT) / 2

    @cached_property
    def ggn(self) -> Tensor:
        """(n, n), Σ_n J_nᵀ H_n J_n / N with the Jacobians J_n and the losses' Hessians H_n written out."""
        run, start = self._flat()
        logits = run(start, self.inputs)
        jacobian = jacrev(lambda vector: run(vector, self.inputs).reshape(-1), chunk_size=_CHUNK)(start)
        inner = vmap(hessian(functional.cross_entropy))(logits, self.targets)
        jacobian = jacobian.view(*logits.shape, -1)
        result = torch.tensordot(jacobian, inner @ jacobian, dims=([0, 1], [0, 1])) / len(logits)
        return (result + result.mT) / 2

    def _flat(self) -> tuple[Callable[[Tensor, Tensor], Any], Tensor]:
        model = _make(self.name).double().eval()
        for module in model:
            if isinstance(module, nn.Conv2d):
                module.__class__ = _Unfolded
        model.load_state_dict(self.model.state_dict())
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

        def run(vector: Tensor, inputs: Tensor) -> Any:
            parts = vector.split([shape.numel() for shape in shapes.values()])
            values = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
            return functional_call(model, values, (inputs,))

        return run, torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
