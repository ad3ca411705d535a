"""Kronecker-factored curvature and Hessian spectra for PyTorch, with a compiled core.

    optimizer = kronfac.KFAC(model, lr=0.1)  # was: torch.optim.SGD(model.parameters(), lr=0.1)

`kronfac.KFAC` is the optimizer, `kronfac.operators` and `kronfac.spectrum` look at a trained network's Hessian,
`kronfac.schedules` sets batch size and learning rate, `kronfac.curvature` takes the factors alone, and `kronfac.ops`
holds the compiled operators.
"""

from __future__ import annotations

from importlib.metadata import version as _version

from kronfac import _library as _library  # first: registers torch.ops.kronfac
from kronfac import adversarial, curvature, linalg, operators, ops, optim, schedules, spectrum
from kronfac.curvature import Bernoulli, Categorical, Gaussian
from kronfac.optim import KFAC

__all__ = [
    "KFAC",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "adversarial",
    "curvature",
    "linalg",
    "operators",
    "ops",
    "optim",
    "schedules",
    "spectrum",
]
__version__ = _version("kronfac")
