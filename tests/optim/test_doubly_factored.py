"""structure="doubly_factored": its step against dense float64 matrices, and everything else an optimizer has to do."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from kronfac.curvature import InputFactors, adapter_for
from kronfac.linalg.damped import factored_damping
from kronfac.optim import KFAC, structures
from kronfac.optim.structures.doubly_factored import LARGEST_A, LARGEST_A_IF_ASKED, damping_of_three
from tests.optim.models import convnet, equal, frozen_state, images, mlp, same_tree, snapshot, train_step, vectors
from tests.processes import run_ranks

SOLVES = ["inverse", "eigen"]
doubly = partial(KFAC, structure="doubly_factored", momentum=0.0, kl_clip=None, damping=0.05)


@pytest.fixture(autouse=True)
def _small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structures, "LARGEST_A_IF_ASKED", 3)


# ---------------------------------------------------------------- the direction


def test_damping_of_three_is_balanced_and_multiplies_to_the_damping() -> None:
    means = torch.tensor([[3.0, 0.0], [0.2, 0.0], [1e-4, 0.0]], dtype=torch.float64)
    damping = torch.tensor([0.01, 0.3], dtype=torch.float64)
    shares = damping_of_three(means, damping)
    torch.testing.assert_close(shares.prod(0), damping)
    torch.testing.assert_close(shares[:, 0] / means[:, 0], (shares[0, 0] / means[0, 0]).expand(3))
    torch.testing.assert_close(shares[:, 1], damping[1:].pow(1 / 3).expand(3))
    vanishing = damping_of_three(torch.tensor([[1.0], [0.0], [1e-30]]), torch.tensor([1e-3]))
    torch.testing.assert_close(vanishing.prod(0), torch.tensor([1e-3]))
    assert vanishing.min() > 1e-8
    assert vanishing.max() < 1e6


def test_damping_of_three_is_the_rule_of_two_where_the_third_is_one() -> None:
    """The factor 1 with its share taken back leaves π√λ and √λ/π."""
    a, g, damping = torch.tensor([4.0, 0.3]), torch.tensor([0.25, 7.0]), torch.tensor([0.01, 0.3])
    first, second = factored_damping(
        [a[i].expand(2).diag() for i in (0, 1)], [g[i].view(1, 1) for i in (0, 1)], damping
    )
    shares = damping_of_three(torch.stack([a, g, (a * g).sqrt()]), damping.pow(1.5))
    torch.testing.assert_close(shares[0], first)
    torch.testing.assert_close(shares[1], second)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(6, 3), (6,)),
    "Linear tokens, no bias": (lambda: nn.Linear(6, 3, bias=False), (4, 6)),
    "Conv2d": (lambda: nn.Conv2d(2, 3, 2), (2, 3, 3)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 3, 2), (2, 2, 2)),
}


class Headed(nn.Module):
    def __init__(self, layer: nn.Module, features: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(features, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x)).flatten(1))  # type: ignore[no-any-return]


def dense_inverse_times(
    K: Tensor, Psi: Tensor, ratio: Tensor, G: Tensor, V: Tensor, damping: float, solve: str
) -> Tensor:
    """P through Kronecker products written out."""

    def one(matrix: Tensor) -> Tensor:
        return torch.eye(len(matrix), dtype=matrix.dtype)

    size = len(K) * len(Psi)
    Psi = Psi / ratio
    weight, bias = V[:, :size].reshape(-1), V[:, size:]
    if solve == "eigen":
        block = torch.kron(G, torch.kron(K, Psi))
        block, bias_block = block + damping * one(block), ratio * G + damping * one(G)
    else:
        means = [m.trace() / len(m) for m in (K, Psi, G)]
        shares = [(damping / (means[0] * means[1] * means[2])) ** (1 / 3) * mean for mean in means]
        K, Psi, G = (m + share * one(m) for m, share in zip((K, Psi, G), shares, strict=True))
        block, bias_block = torch.kron(G, torch.kron(K, Psi)), (ratio + damping / shares[2]) * G
    P = torch.linalg.solve(block, weight).view(-1, size)
    return torch.cat([P, torch.linalg.solve(bias_block, bias)], 1) if bias.numel() else P


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("solve", SOLVES)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_step_is_the_dense_inverse_times_the_gradient(name: str, sharing: str, solve: str, split: bool) -> None:
    """Also with weight and bias in groups of their own that decay differently."""
    torch.manual_seed(1)
    make, shape = LAYERS[name]
    layer, x, y = make().double(), torch.randn(8, *shape, dtype=torch.float64), torch.randint(3, (8,))
    model = Headed(layer, layer(x).flatten(1).shape[1]).double()
    parameters = list(layer.parameters())
    decays = [0.2, 0.3][: len(parameters)] if split else [0.0] * len(parameters)
    groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(parameters, decays, strict=True)]
    optimizer = doubly(model, 0.3, params=groups, solve=solve, sharing=sharing, fisher="exact")
    before = snapshot(layer)
    functional.cross_entropy(model(x), y).backward()
    gradients = [p.grad + decay * p.detach() for p, decay in zip(parameters, decays, strict=True)]  # type: ignore
    optimizer.step()

    ((_, (A, G)),) = optimizer.factors().items()
    adapter = adapter_for(layer)
    assert adapter is not None
    covered = optimizer._coverage.layers[0].adapter
    assert covered.block == "doubly_factored"
    assert covered.input_shape is not None
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient
    P = dense_inverse_times(*InputFactors.of(A, covered.input_shape), G, adapter.gradient(), 0.05 + decays[0], solve)
    for p, old, part in zip(parameters, before, adapter.split(P), strict=True):
        torch.testing.assert_close((old - p.detach()) / 0.3, part, rtol=1e-8, atol=1e-10)


def test_exact_where_inputs_are_products_of_independent_vectors() -> None:
    """Inputs k ⊗ ψ over a grid of unit vectors: K ⊗ Ψ is A, so the step is that of structure="kfac"."""
    torch.manual_seed(2)
    ks, psis = (functional.normalize(torch.randn(5, size, dtype=torch.float64), dim=1) for size in (2, 3))
    x = torch.einsum("ai,bj->abij", ks, psis).reshape(25, 6)
    y = torch.randint(3, (25,))
    results = []
    for structure in ("kfac", "doubly_factored"):
        torch.manual_seed(3)
        model = mlp(6, 3, dtype=torch.float64, bias=False)
        optimizer = KFAC(model, 0.1, structure=structure, solve="eigen", fisher="exact", damping=0.01)
        for _ in range(3):
            train_step(model, optimizer, x, y)
        results.append(snapshot(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("bias", [False, True])
def test_rows_and_matrix_give_one_direction(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    monkeypatch.setattr("kronfac.curvature.rows._LEAST", 0.0)
    monkeypatch.setattr("kronfac.curvature.rows._GAIN", 100.0)
    x, y = vectors(5, 12, 3, torch.float64)
    results = []
    for rows in (True, False):
        torch.manual_seed(0)
        model = mlp(12, 8, 3, dtype=torch.float64, bias=bias)
        # A KL clip that bites shows ⟨P, V⟩ in the step.
        optimizer = KFAC(model, 0.5, structure="doubly_factored", fisher="exact", kl_clip=1e-4)
        used: list[str] = []
        kind = type(optimizer.structure.by_block["doubly_factored"])
        plain = kind.apply_rows
        with monkeypatch.context() as patch:
            patch.setattr(kind, "apply_rows", lambda *a, plain=plain, used=used: used.append("") or plain(*a))
            for _ in range(3):
                if not rows:
                    optimizer._live_recorder().rows.enabled = False
                train_step(model, optimizer, x, y)
        assert len(used) == (6 if rows else 0)
        results.append(snapshot(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- which layers


def test_the_sizes_above_which_layers_are_doubly_factored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structures, "LARGEST_A_IF_ASKED", LARGEST_A_IF_ASKED)
    prime = 8209
    model = nn.ModuleDict(
        {str(size): nn.Linear(size, 2) for size in (LARGEST_A_IF_ASKED, LARGEST_A_IF_ASKED + 1, LARGEST_A, prime)}
    )
    model["9216"] = nn.Linear(9216, 2)
    large = {"9216"}
    for structure, expected in (
        ("kfac", large),
        ("tridiagonal", large),
        ("doubly_factored", {"1025", "8192", *large}),
        ("diagonal", set()),
    ):
        optimizer = KFAC(model, 0.1, structure=structure)
        chosen = {layer.name for layer in optimizer._coverage.layers if layer.block == "doubly_factored"}
        assert chosen == expected


def test_a_wide_layer_never_forms_its_large_factor() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(9216, 2), nn.Tanh(), nn.Linear(2, 2))
    optimizer = KFAC(model, 0.1)
    train_step(model, optimizer, torch.randn(4, 256, 6, 6), torch.randint(2, (4,)))
    A, G = optimizer.factors()["1"]
    assert A.numel() == 2 * 96**2 + 1
    assert G.shape == (2, 2)
    assert optimizer.factors()["3"].A.shape == (3, 3)
    kept = optimizer.state_dict()["kronfac"]["layers"]["1"]["factorisation"]
    assert sum(tensor.numel() for tensor in kept.values()) == 2 * 96**2 + 4 + 1


# ---------------------------------------------------------------- as an optimizer


@pytest.fixture(params=SOLVES)
def make(request: pytest.FixtureRequest) -> Callable[..., tuple[nn.Module, KFAC]]:
    def build(conv: bool = False, **options: Any) -> tuple[nn.Module, KFAC]:
        torch.manual_seed(0)
        model = convnet() if conv else mlp(8, 12, 6, 3)
        options = {"damping": 0.01, "inverse_every": 3, "structure": "doubly_factored"} | options
        return model, KFAC(model, 0.1, solve=request.param, **options)

    return build


def test_it_trains_and_beats_sgd(make: Callable[..., tuple[nn.Module, KFAC]]) -> None:
    torch.manual_seed(4)
    x = torch.randn(128, 8) * torch.logspace(0, -2, 8)
    y = (x / torch.logspace(0, -2, 8)) @ torch.randn(8, 3)
    target = y.argmax(1)
    model, optimizer = make()
    last = [train_step(model, optimizer, x, target) for _ in range(60)][-1]
    torch.manual_seed(0)
    other = mlp(8, 12, 6, 3)
    sgd = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9)
    assert last < 0.5 * [train_step(other, sgd, x, target) for _ in range(60)][-1]


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("at", [1, 4])
def test_training_continues_bit_for_bit(make: Callable[..., tuple[nn.Module, KFAC]], at: int, conv: bool) -> None:
    options: dict[str, Any] = {"conv": conv, "factor_every": 2, "weight_decay": 0.01, "nesterov": True}
    batches = [images(6) if conv else vectors(6, 8, 3) for _ in range(8)]
    model, optimizer = make(**options)
    for batch in batches[:at]:
        train_step(model, optimizer, *batch)
    buffer = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), buffer)
    buffer.seek(0)
    weights, state = torch.load(buffer, weights_only=True)
    other, resumed = make(**options)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for batch in batches[at:]:
        assert train_step(model, optimizer, *batch) == train_step(other, resumed, *batch)
    assert equal(snapshot(model), snapshot(other))
    assert same_tree(optimizer.state_dict(), resumed.state_dict())


def test_checkpoints_that_do_not_fit_are_refused(make: Callable[..., tuple[nn.Module, KFAC]]) -> None:
    model, optimizer = make()
    train_step(model, optimizer, *vectors(6, 8, 3))
    before = frozen_state(optimizer)
    for path in (("A",), ("factorisation", "bias")):
        broken = frozen_state(optimizer)
        entry = broken["kronfac"]["layers"]["0"]
        for key in path[:-1]:
            entry = entry[key]
        entry[path[-1]] = entry[path[-1]][:0]
        with pytest.raises(
            ValueError, match=rf"layers\.0\.{'.'.join(path)}: expected a floating-point tensor of shape"
        ):
            optimizer.load_state_dict(broken)
    with pytest.raises(ValueError, match="structure: expected"):
        KFAC(mlp(8, 12, 6, 3), 0.1).load_state_dict(optimizer.state_dict())
    assert same_tree(before, optimizer.state_dict())


def test_unused_and_frozen_layers(make: Callable[..., tuple[nn.Module, KFAC]]) -> None:
    model, optimizer = make()
    x, y = vectors(6, 8, 3)
    model[2].requires_grad_(False)  # type: ignore[operator, index]
    frozen = snapshot(model[2])  # type: ignore[index]
    train_step(model, optimizer, x, y)
    assert set(optimizer.factors()) == {"0", "4"}
    assert equal(frozen, snapshot(model[2]))  # type: ignore[index]
    factors = optimizer.factors()["0"]
    optimizer.zero_grad()
    functional.cross_entropy(model[4](torch.randn(6, 6)), y).backward()  # type: ignore[operator, index]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(factors, optimizer.factors()["0"], strict=True))


def test_masked_tokens_leave_no_trace(make: Callable[..., tuple[nn.Module, KFAC]]) -> None:
    from kronfac.curvature import Categorical

    x, y, keep = torch.randn(4, 5, 8), torch.randint(3, (4, 5)), torch.rand(4, 5) < 0.6
    keep[:, 0] = True
    results = []
    for filler in (0.0, 1e3):
        model, optimizer = make(
            likelihood=Categorical(dim=-1), mask=lambda args, kwargs, out: keep, fisher="exact", kl_clip=None
        )
        some = torch.where(keep[..., None], x, torch.full_like(x, filler))
        for _ in range(2):
            optimizer.zero_grad()
            functional.cross_entropy(model(some)[keep], y[keep]).backward()
            optimizer.step()
        results.append(snapshot(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_a_step_that_a_grad_scaler_skips_changes_nothing(make: Callable[..., tuple[nn.Module, KFAC]]) -> None:
    model, optimizer = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for bad in (False, True, False):
        x, y = vectors(6, 8, 3)
        optimizer.zero_grad()
        scaler.scale(functional.cross_entropy(model(x), y)).backward()
        if bad:
            model[0].weight.grad[0, 0] = float("inf")  # type: ignore[index, union-attr]
        weights, state = snapshot(model), frozen_state(optimizer)["kronfac"]["layers"]
        scaler.step(optimizer)
        scaler.update()
        assert equal(weights, snapshot(model)) == bad
        assert same_tree(state, optimizer.state_dict()["kronfac"]["layers"]) == bad
    assert optimizer.skipped_steps == 1


def test_inputs_that_are_not_finite_skip_the_step(make: Callable[..., tuple[nn.Module, KFAC]]) -> None:
    model, optimizer = make()
    train_step(model, optimizer, *vectors(6, 8, 3))
    weights, state = snapshot(model), frozen_state(optimizer)["kronfac"]["layers"]
    x, y = vectors(6, 8, 3)
    x[2, 3] = float("inf")
    with pytest.warns(UserWarning, match="skipped"):
        train_step(model, optimizer, x, y)
    assert equal(weights, snapshot(model))
    assert same_tree(state, optimizer.state_dict()["kronfac"]["layers"])


def test_projections_of_attention_are_rows_too() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))  # type: ignore[no-any-return]

    model = Model()
    optimizer = doubly(model, 0.1)
    before = snapshot(model)
    train_step(model, optimizer, torch.randn(4, 5, 8), torch.randint(3, (4,)))
    assert {layer.block for layer in optimizer._coverage.layers} == {"doubly_factored"}
    assert all(not torch.equal(a, b) for a, b in zip(before, snapshot(model), strict=True))


def ranks(rank: int, folder: Path) -> None:
    structures.LARGEST_A_IF_ASKED = 3
    model, optimizer, batches = distributed_problem()
    for x, y in batches:
        share = slice(0, 5) if rank == 0 else slice(5, None)
        optimizer.zero_grad()
        (functional.cross_entropy(model(x[share]), y[share], reduction="sum") / 8).backward()
        for p in model.parameters():
            assert p.grad is not None
            distributed.all_reduce(p.grad)
        optimizer.step()
    torch.save((snapshot(model), optimizer.factors()), folder / f"{rank}.pt")


def distributed_problem() -> tuple[nn.Module, KFAC, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = mlp(8, 6, 3, dtype=torch.float64)
    return model, doubly(model, 0.1, fisher="exact"), [vectors(8, 8, 3, torch.float64) for _ in range(3)]


@pytest.mark.skipif(not distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_ranks_are_one_large_batch(tmp_path: Path) -> None:
    run_ranks(ranks, tmp_path)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    model, optimizer, batches = distributed_problem()
    for batch in batches:
        train_step(model, optimizer, *batch)
    assert equal(one[0], two[0])
    torch.testing.assert_close(one[0], snapshot(model), rtol=1e-7, atol=1e-9)
    for name, pair in optimizer.factors().items():
        torch.testing.assert_close(tuple(pair), tuple(one[1][name]), rtol=1e-9, atol=1e-12)
