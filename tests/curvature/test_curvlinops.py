"""Exact factors against the type-2 K-FAC of curvlinops, as dense matrices A ⊗ G."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kronfac.curvature import Categorical, Gaussian, KroneckerFactors, Likelihood, factors
from tests.curvature.models import mlp, relative

curvlinops = pytest.importorskip("curvlinops")


def tokens() -> nn.Module:
    """Position by position: curvlinops mixes the positions of one example where they influence each other."""
    return nn.Sequential(
        nn.Linear(3, 6), nn.ReLU(inplace=True), nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 4)
    )


def plain_convnet() -> nn.Module:
    """Convolutions whose options curvlinops has."""
    return nn.Sequential(
        nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, padding="same", dilation=(1, 2), bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(80, 4),
    )


def dense(model: nn.Module, got: dict[str, KroneckerFactors]) -> Tensor:
    """The block-diagonal curvature in the order of ``model.parameters()``."""
    blocks = []
    for name, (A, G) in got.items():
        layer = model.get_submodule(name)
        block = torch.kron(G, A)  # over V (out, in[+1]), row by row
        if layer.bias is not None:
            index = torch.arange(len(block)).view(len(G), len(A))
            order = torch.cat([index[:, :-1].reshape(-1), index[:, -1]])
            block = block[order][:, order]
        blocks.append(block)
    return torch.block_diag(*blocks)


def theirs(
    model: nn.Module, loss: nn.Module, data: list[tuple[Tensor, Tensor]], approximation: str = "EXPAND"
) -> Tensor:
    parameters = list(model.parameters())
    operator = curvlinops.KFACLinearOperator(
        model,
        loss,
        parameters,
        data,
        fisher_type=curvlinops.FisherType.TYPE2,
        kfac_approx=curvlinops.KFACType[approximation],
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    return operator @ torch.eye(sum(p.numel() for p in parameters), dtype=torch.float64)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("kind", ["mlp", "mlp-mse", "convnet", "tokens"])
@pytest.mark.filterwarnings("ignore")
def test_product_equals_curvlinops(kind: str, batches: int, reduction: str) -> None:
    torch.manual_seed(3)
    make: Callable[[], nn.Module] = {"mlp": mlp, "mlp-mse": mlp, "convnet": plain_convnet, "tokens": tokens}[kind]
    shape = {"convnet": (2, 7, 6), "tokens": (5, 3)}.get(kind, (5,))
    model, n = make().double(), 9
    # curvlinops cannot have in-place activations
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    x = torch.randn(n, *shape, dtype=torch.float64)
    loss: nn.Module
    likelihood: Likelihood
    if kind == "mlp-mse":
        y, loss = torch.randn(n, 4, dtype=torch.float64), nn.MSELoss(reduction=reduction)
        # Averaged over N·C elements, or summed over them.
        likelihood, terms = (Gaussian(variance=2.0), n) if reduction == "mean" else (Gaussian(variance=0.5), n)
    else:
        terms = n * 5 if kind == "tokens" else n
        y, loss = torch.randint(4, (n, 5) if kind == "tokens" else (n,)), nn.CrossEntropyLoss(reduction=reduction)
        likelihood = Categorical(dim=-1)
    data = list(zip(x.split(4 if batches == 3 else n), y.split(4 if batches == 3 else n), strict=True))
    assert len(data) == batches

    reference = model
    if kind == "tokens":  # their cross entropy wants the classes in dimension 1
        reference = nn.Sequential(model, ClassesFirst())
    expected = theirs(reference, loss, data)
    got = dense(model, factors(model, data, likelihood=likelihood, fisher="exact"))
    scale = terms if reduction == "sum" else 1  # the curvature of a sum is M times that of the mean
    assert relative(scale * got, expected) < 1e-5


@pytest.mark.parametrize("kind", ["convnet", "pooled tokens"])
@pytest.mark.filterwarnings("ignore")
def test_reduced_product_equals_curvlinops(kind: str) -> None:
    torch.manual_seed(3)
    if kind == "convnet":
        model, shape = plain_convnet().double(), (2, 7, 6)
    else:
        model, shape = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Flatten(), nn.Linear(30, 4)).double(), (5, 3)
    x, y = torch.randn(9, *shape, dtype=torch.float64), torch.randint(4, (9,))
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    got = dense(model, factors(model, data, likelihood="categorical", fisher="exact", sharing="reduce"))
    assert relative(got, theirs(model, nn.CrossEntropyLoss(), data, "REDUCE")) < 1e-5


class ClassesFirst(nn.Module):
    """(N, T, C) to (N, C, T)."""

    def forward(self, x: Tensor) -> Tensor:
        """Transpose."""
        return x.mT
