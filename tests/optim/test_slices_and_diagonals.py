"""structure="diagonal" and "mini_block" against the gradients of single examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

from kronfac.curvature import Categorical, Gaussian, Recorder, find_layers, slices
from kronfac.curvature.slices import SliceMoments, slices_of, split
from kronfac.linalg.damped import damped_inverses
from kronfac.optim import KFAC
from tests.curvature.models import relative
from tests.curvature.per_example import matrices, mean_squares, output_gradients
from tests.curvature.test_layer_oracles import CASES, data, model_of
from tests.optim.models import convnet, images, mlp, train_step, vectors

LAYERS = sorted(name for name in CASES if name != "Embedding")


def moments(each: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Σ M_s M_sᵀ and Σ M_sᵀ M_s of gradients (N, [groups,] out, in)."""
    blocks = each.reshape(*each.shape[:-2], count, -1, each.shape[-1])
    return (blocks @ blocks.mT).sum(0), (blocks.mT @ blocks).sum(0)


@pytest.mark.parametrize(
    ("name", "memory"), [*((name, 4) for name in LAYERS), ("Linear", 0), ("Linear on tokens", 0), ("Conv2d groups", 0)]
)
def test_moments_of_slices(name: str, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "MEMORY", memory)
    net, x = model_of(CASES[name]), data(CASES[name])
    adapter = find_layers(net)["layer"]
    statistic = SliceMoments(adapter)
    assert memory or statistic.slices == 1
    recorder = Recorder(
        net, {"layer": adapter}, fisher="mc", likelihood="gaussian", extra={"layer": {"some": statistic}},
        generator=Generator().manual_seed(3), bare=["layer"],
    )  # fmt: skip
    net(x)
    total, scale = recorder.collect().scaled_sums()["layer"].extra["some"]
    recorder.remove()
    inputs, outputs = adapter.factor_sizes
    got = split(total * scale, outputs // statistic.slices, inputs)
    ((vector, _),) = output_gradients(Gaussian(), net(x), "mc", seed=3)
    for one, other in zip(got, moments(matrices(net, adapter, x, vector), statistic.slices), strict=True):
        assert relative(one, other / len(x)) < 1e-10


@given(outputs=st.integers(1, 300), inputs=st.integers(1, 300))
def test_slices_are_equal_and_bounded(outputs: int, inputs: int) -> None:
    count = slices_of(outputs, inputs)
    assert outputs % count == 0
    assert count * (inputs**2 + (outputs // count) ** 2) <= 4 * (inputs**2 + outputs**2)
    assert count == outputs or inputs > 1  # one column: a slice for each row


def first_step(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> tuple[KFAC, dict[str, tuple[Tensor, Tensor]]]:
    """One step of rate 1 without momentum; V and P of each layer."""
    optimizer = KFAC(model, 1.0, momentum=0.0, kl_clip=None, fisher="exact", **options)
    adapters = {layer.name: layer.adapter for layer in optimizer._coverage.layers}
    before = {name: adapter.weight_matrix().clone() for name, adapter in adapters.items()}
    train_step(model, optimizer, x, y)
    V = {name: adapter.gradient() for name, adapter in adapters.items()}
    return optimizer, {name: (V[name], before[name] - a.weight_matrix()) for name, a in adapters.items()}


@pytest.mark.parametrize("conv", [False, True])
def test_a_diagonal_step(conv: bool) -> None:
    model = convnet(torch.float64) if conv else mlp(4, 5, 3, dtype=torch.float64)
    model = nn.Sequential(*(nn.ReLU() if isinstance(m, nn.ReLU) else m for m in model))
    x, y = images(6, torch.float64) if conv else vectors(6, 4, 3, torch.float64)
    gradients = output_gradients(Categorical(), model(x), "exact")
    adapters = find_layers(model)
    D = {name: mean_squares(model, adapter, x, gradients, len(x)) for name, adapter in adapters.items()}
    optimizer, done = first_step(model, x, y, structure="diagonal", damping=0.02)
    assert optimizer.factors() == {}
    for name, (V, P) in done.items():
        assert relative(optimizer.state_dict()["kronfac"]["layers"][name]["extra"]["D"], D[name]) < 1e-10
        assert relative(P, V / (D[name] + 0.02)) < 1e-10


@pytest.mark.parametrize("solve", ["inverse", "eigen"])
@pytest.mark.parametrize("conv", [False, True])
def test_a_mini_block_step(conv: bool, solve: str) -> None:
    """Against dense solves with U_s ⊗ V_s / tr U_s, slice by slice."""
    model = convnet(torch.float64) if conv else mlp(4, 6, 3, dtype=torch.float64)
    model = nn.Sequential(*(nn.ReLU() if isinstance(m, nn.ReLU) else m for m in model))
    x, y = images(6, torch.float64) if conv else vectors(6, 4, 3, torch.float64)
    gradients = output_gradients(Categorical(), model(x), "exact")
    expected = {}
    for name, adapter in find_layers(model).items():
        count = slices_of(adapter.out_features, adapter.factor_sizes[0])
        parts = [moments(matrices(model, adapter, x, vector), count) for vector, _ in gradients]
        expected[name] = [sum(some) / len(x) for some in zip(*parts, strict=True)]
    optimizer, done = first_step(model, x, y, structure="mini_block", solve=solve, damping=0.02)
    assert optimizer.factors() == {}
    for name, (V, P) in done.items():
        U, W = expected[name]
        for u, w, v, p in zip(U, W, V.view(len(U), -1, V.shape[-1]), P.view(len(U), -1, V.shape[-1]), strict=True):
            if solve == "eigen":
                block = torch.kron(u, w) / u.trace() + 0.02 * torch.eye(v.numel()).double()
                direction = torch.linalg.solve(block, v.flatten()).view_as(v)
            else:
                G, A = u / u.trace().sqrt(), w / u.trace().sqrt()
                pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
                shifts = torch.stack([0.02**0.5 / pi, 0.02**0.5 * pi])
                left, right = damped_inverses([G, A], shifts).values
                assert left is not None
                assert right is not None
                direction = left @ v @ right
            assert relative(p, direction) < 1e-8


@pytest.mark.parametrize("memory", [0, 4, 100])
def test_exact_where_the_block_is_a_kronecker_product(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One linear layer under a Gaussian likelihood: F = I ⊗ E[ā āᵀ] whatever the slices are."""
    monkeypatch.setattr(slices, "MEMORY", memory)
    model = nn.Linear(3, 4).double()
    optimizer = KFAC(
        model, 1.0, momentum=0.0, kl_clip=None, fisher="exact", likelihood="gaussian", structure="mini_block",
        solve="eigen", damping=0.01,
    )  # fmt: skip
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    before = model.weight.detach().clone()
    (0.5 * (model(x) - y).square().sum(1).mean()).backward()
    rows = torch.cat([x, torch.ones(7, 1, dtype=torch.float64)], 1)
    A = rows.mT @ rows / 7 + 0.01 * torch.eye(4).double()
    assert model.weight.grad is not None
    assert model.bias.grad is not None
    V = torch.cat([model.weight.grad, model.bias.grad[:, None]], 1)
    optimizer.step()
    assert relative(before - model.weight.detach(), torch.linalg.solve(A, V.mT).mT[:, :3]) < 1e-10
