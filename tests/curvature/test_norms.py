"""Norm layers: their block of the Fisher matrix is exact, from whole examples."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.func import functional_call, jacrev

from kronfac.curvature import Gaussian, NormAdapter, Recorder, factors, find_layers
from kronfac.curvature import norm as norm_module
from tests.curvature.models import relative
from tests.curvature.oracle import OneLayer
from tests.curvature.test_layer_oracles import Exhaustive

VARIANCE, TERMS, N = 0.7, 3, 5

NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LayerNorm": (lambda: nn.LayerNorm(4), (4,)),
    "LayerNorm on tokens": (lambda: nn.LayerNorm(4), (3, 4)),
    "LayerNorm over two dimensions": (lambda: nn.LayerNorm((2, 3), bias=False), (3, 2, 3)),
    "RMSNorm": (lambda: nn.RMSNorm(4), (3, 4)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (4, 3, 2)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (4,)),
    "BatchNorm1d on sequences": (lambda: nn.BatchNorm1d(4), (4, 3)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), (3, 2, 3)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(2, track_running_stats=False), (2, 2, 1, 2)),
}


def exact_block(model: OneLayer, x: Tensor, S: Callable[[int], Tensor]) -> Tensor:
    """Σ_n Jᵀ S J of single examples, J = d logits / d (γ, β)."""
    parameters = {name: p.detach() for name, p in model.layer.named_parameters()}
    total = torch.zeros(())
    for index in range(len(x)):

        def logits(some: dict[str, Tensor], index: int = index) -> Tensor:
            return model.after(functional_call(model.layer, some, (x[index : index + 1],)))[0]

        J = torch.cat([part.flatten(1) for part in jacrev(logits)(parameters).values()], 1)
        total = total + J.T @ S(index) @ J
    return total


def make(name: str) -> tuple[OneLayer, Tensor]:
    torch.manual_seed(2)
    layer, shape = NORMS[name][0]().double(), NORMS[name][1]
    x = 2 * torch.randn(N, *shape, dtype=torch.float64) + 1
    for p in layer.parameters():
        nn.init.normal_(p)
    if getattr(layer, "track_running_stats", False):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return OneLayer(layer, x[0].numel()).double(), x


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_blocks_equal_the_dense_ones(name: str, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """fisher="exact", "mc" in expectation and "empirical"; the whole block, or its 2x2 blocks unit by unit."""
    monkeypatch.setattr(norm_module, "WHOLE_BLOCK", 128 if whole else 1)
    model, x = make(name)
    y = torch.randn(N, 3, dtype=torch.float64)
    if (
        getattr(model.layer, "track_running_stats", True) is False
    ):  # the batch's own moments, which single examples lack
        oracle, seen = nn.BatchNorm3d(2).double(), x.transpose(0, 1).flatten(1)
        oracle.load_state_dict(model.layer.state_dict(), strict=False)
        oracle.running_mean, oracle.running_var = seen.mean(1), seen.var(1, unbiased=False)
        twin = OneLayer(oracle, 1).double()
        twin.head = model.head
    else:
        twin = model
    twin.eval()

    def check(got: Tensor, dense: Tensor) -> None:
        dense = dense / (N * TERMS)
        units = model.layer.weight.numel()  # type: ignore[union-attr]
        if not whole:
            order = torch.arange(len(dense)).view(-1, units).T
            dense = torch.stack([dense[unit][:, unit] for unit in order])
        assert got.shape == dense.shape
        assert relative(got, dense) < 1e-10

    gaussian = Gaussian(VARIANCE, TERMS)
    identity = torch.eye(3, dtype=x.dtype) / VARIANCE
    exact = exact_block(twin, x, lambda index: identity)
    for sharing in ("expand", "reduce"):
        got = factors(model, x, likelihood=gaussian, fisher="exact", sharing=sharing)["layer"]
        check(got.G, exact)
        assert torch.equal(got.A, torch.ones_like(got.A))
    draws = factors(model, x, likelihood=Exhaustive(VARIANCE, TERMS), fisher="mc", fisher_samples=3)
    check(draws["layer"].G, exact)
    residual = (model.eval()(x) - y).detach() / VARIANCE
    empirical = exact_block(twin, x, lambda index: torch.outer(residual[index], residual[index]))
    check(factors(model, (x, y), likelihood=gaussian, fisher="empirical")["layer"].G, empirical)

    recorder = Recorder(model, find_layers(model), likelihood=gaussian, fisher="empirical")
    with recorder.record():
        loss = (model(x) - y).square().sum() / (2 * VARIANCE * N * TERMS)
    loss.backward()
    check(recorder.collect().factors()["layer"].G, empirical)


def test_batch_norm_in_training_uses_the_moments_of_the_batch() -> None:
    model, x = make("BatchNorm2d")
    assert isinstance(model.layer, nn.BatchNorm2d)
    recorder = Recorder(model, find_layers(model), likelihood="gaussian", fisher="exact")
    running = model.layer.running_mean.clone()  # type: ignore[union-attr]
    model(x)
    after = model.layer.running_mean.clone()  # type: ignore[union-attr]
    assert not torch.equal(running, after)
    got = recorder.collect().factors()["layer"].G
    recorder.remove()
    seen = x.transpose(0, 1).flatten(1)
    model.layer.running_mean, model.layer.running_var = seen.mean(1), seen.var(1, unbiased=False)
    expected = exact_block(model.eval(), x, lambda index: torch.eye(3, dtype=x.dtype)) / N  # type: ignore[arg-type]
    assert relative(got, expected) < 1e-10


@pytest.mark.parametrize("whole", [True, False])
def test_a_token_mask_leaves_tokens_out_of_a_layer_norm(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_module, "WHOLE_BLOCK", 128 if whole else 1)
    keep = torch.rand(N, 3, generator=Generator().manual_seed(1)) < 0.6
    keep[0], keep[1] = True, False

    class Tokens(nn.Module):
        """Every token of its own: a masked one could as well not be there."""

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.layer(x)))

    model = Tokens().double()
    x = torch.randn(N, 3, 4, dtype=torch.float64)
    got = factors(model, x, likelihood=Gaussian(terms=3), fisher="exact", mask=lambda args, kwargs, out: keep)[
        "layer"
    ].G
    total = torch.zeros_like(got)
    for example, kept in zip(x, keep, strict=True):
        if kept.any():
            alone = factors(model, example[kept].unsqueeze(0), likelihood=Gaussian(), fisher="exact")["layer"].G
            total += alone
    assert relative(got, total / keep.sum()) < 1e-10


def test_what_blocks_a_norm_has() -> None:
    small, large = find_layers(nn.LayerNorm(64))[""], find_layers(nn.LayerNorm(65))[""]
    assert isinstance(small, NormAdapter)
    assert small.factor_shapes == ((1, 1), (128, 128))
    assert large.factor_shapes == ((65, 1, 1), (65, 2, 2))
    assert find_layers(nn.LayerNorm(65, bias=False))[""].factor_shapes == ((1, 1), (65, 65))
    assert find_layers(nn.LayerNorm(5, elementwise_affine=False)) == {}
    assert find_layers(nn.BatchNorm2d(5, affine=False)) == {}
    assert find_layers(nn.InstanceNorm2d(5, affine=True)) == {}
    for adapter in (small, large):
        for p in adapter.module.parameters():
            p.grad = torch.randn_like(p)
        V = adapter.gradient()
        assert tuple(V.shape) == adapter.matrix_shape
        for part, p in zip(adapter.split(V), adapter.module.parameters(), strict=True):
            assert torch.equal(part, p.grad)


class Sequence(nn.Module):
    """Tokens by attention between norms, (N, T, 4) or (T, N, 4) inside."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.norm, self.linear, self.head = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 3)."""
        h = self.norm(x if self.batch_first else x.transpose(0, 1))
        return self.head(torch.tanh(self.linear(h)).mean(1 if self.batch_first else 0))  # type: ignore[no-any-return]


@pytest.mark.parametrize("masked", [False, True])
def test_a_layer_norm_on_sequences_first(masked: bool) -> None:
    one, two = Sequence(True).double(), Sequence(False).double()
    two.load_state_dict(one.state_dict())
    x = torch.randn(N, 3, 4, dtype=torch.float64)
    keep = torch.tensor([True, True, False, True, True])
    mask = (lambda args, kwargs, out: keep) if masked else None
    got = [factors(m, x, likelihood="categorical", fisher="exact", mask=mask) for m in (one, two)]
    assert relative(got[1]["norm"].G, got[0]["norm"].G) < 1e-12
    if not masked:
        assert relative(got[1]["norm"].A, got[0]["norm"].A) == 0
    with pytest.raises(RuntimeError, match=r"layer 'linear': sharing='reduce' expects the examples in the first"):
        factors(two, x, likelihood="categorical", fisher="exact", sharing="reduce")


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_keeps_its_digits_where_means_are_large(training: bool) -> None:
    """Sums of x g and of g, whose difference counts, against x̂ in float64; maps of either memory format."""
    torch.manual_seed(3)
    layer = nn.BatchNorm2d(6, dtype=torch.float32).train(training)
    adapter = find_layers(layer)[""]
    assert isinstance(adapter, norm_module.BatchNormAdapter)
    offsets = torch.tensor([0.0, 1.0, -10.0, 10.0, 100.0, -100.0]).view(1, 6, 1, 1)
    x, g = torch.randn(16, 6, 20, 24) + offsets, torch.randn(16, 6, 20, 24)
    layer.running_mean, layer.running_var = x.mean((0, 2, 3)) + 0.5, x.var((0, 2, 3)) * 1.5
    exact = x.double()
    mean, variance = exact.mean((0, 2, 3)), exact.var((0, 2, 3), correction=0)
    if not training:
        mean, variance = layer.running_mean.double(), layer.running_var.double()
    normalised = (exact - mean.view(1, 6, 1, 1)) / (variance + layer.eps).sqrt().view(1, 6, 1, 1)
    expected = (normalised * g).sum((2, 3)), g.double().sum((2, 3))
    scale = expected[0].square().mean(0).sqrt()
    for layout in (torch.contiguous_format, torch.channels_last):
        scaled, shifted = adapter.example_sums(g.to(memory_format=layout), x.to(memory_format=layout))
        assert scaled.dtype == shifted.dtype == torch.float32
        errors = (scaled - expected[0]).abs().amax(0) / scale
        assert bool((errors <= 5e-6 * (1 + offsets.flatten().abs())).all()), errors
        torch.testing.assert_close(shifted.double(), expected[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_moments_that_a_batch_norm_kept_are_those_of_the_batch(dtype: torch.dtype) -> None:
    """Its forward leaves mean and deviation in the graph; under hooks on saved tensors they are computed again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 16, 4)).to(dtype)
    x = (3 + torch.randn(5, 2, 6, 6)).to(dtype)
    found = []
    for hooks in (nullcontext(), save_on_cpu()):
        recorder = Recorder(model, find_layers(model), generator=torch.Generator().manual_seed(1))
        with hooks:
            model(x)
        found.append(recorder.collect().factors()["1"].G)
        recorder.remove()
    norm = find_layers(model)["1"]
    out = model[1](model[0](x))
    kept = norm.kept_by(out)
    assert (kept is None) == (dtype == torch.bfloat16)  # rounded to that, they are not worth having
    if kept is not None:
        torch.testing.assert_close(kept[0], model[0](x).detach().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)
    model.eval()
    assert norm.kept_by(model[1](model[0](x))) is None
