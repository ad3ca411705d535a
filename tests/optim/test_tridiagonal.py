"""structure="tridiagonal" in the optimizer: statistics by brute force, the step against dense matrices, bookkeeping."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from kronfac.curvature import Categorical
from kronfac.linalg.damped import factored_damping
from kronfac.optim import KFAC
from kronfac.optim.structures.tridiagonal import LINKED
from tests.optim.models import equal, frozen_state, mlp, same_tree, snapshot, train_step, vectors
from tests.processes import run_ranks

chained = partial(KFAC, structure="tridiagonal", momentum=0.0, kl_clip=None, damping=0.05)


def per_example(model: nn.Sequential, x: Tensor, y: Tensor | None) -> tuple[list[Tensor], list[list[Tensor]], Tensor]:
    """ā of each Linear, g of each for every class (or for the targets), and the weight of each (class, example)."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    for layer in model:
        if isinstance(layer, nn.Linear):
            inputs.append(torch.cat([x.detach(), x.new_ones(len(x), 1)], 1))
            x = layer(x)
            outputs.append(x)
        else:
            x = layer(x)
    logs = functional.log_softmax(x, 1)
    cases = range(logs.shape[1]) if y is None else [y]
    gradients = [
        list(
            torch.autograd.grad(
                -logs.gather(1, torch.as_tensor(case).expand(len(x)).view(-1, 1)).sum(), outputs, retain_graph=True
            )
        )
        for case in cases
    ]
    weights = logs.exp().mT.detach() if y is None else torch.ones_like(logs[:, :1]).mT
    return inputs, gradients, weights


def second_moments(model: nn.Sequential, x: Tensor, y: Tensor | None = None) -> tuple[Any, Any]:
    """Ā_{i,j} and G_{i,j} of all pairs of layers."""
    inputs, gradients, weights = per_example(model, x, y)
    count = len(inputs)
    A = [[inputs[i].mT @ inputs[j] / len(x) for j in range(count)] for i in range(count)]
    G = [
        [
            sum((g[i] * w[:, None]).mT @ g[j] for g, w in zip(gradients, weights, strict=True)) / len(x)
            for j in range(count)
        ]
        for i in range(count)
    ]
    return A, G


def matrix_gradients(model: nn.Sequential) -> list[Tensor]:
    return [
        torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1).clone()  # type: ignore[list-item, index]
        for layer in model
        if isinstance(layer, nn.Linear)
    ]


def dense_approximation(A: Any, G: Any, damping: list[float]) -> Tensor:
    """F̂⁻¹ = Ξᵀ Λ Ξ of damped diagonal blocks and undamped blocks beside them."""
    count = len(A)
    shares = factored_damping(
        [A[i][i] for i in range(count)], [G[i][i] for i in range(count)], torch.tensor(damping, dtype=torch.float64)
    )
    blocks = []
    for i, (a, g) in enumerate(zip(*shares, strict=True)):
        blocks.append(torch.kron(G[i][i] + g * torch.eye(len(G[i][i])), A[i][i] + a * torch.eye(len(A[i][i]))))
    starts = [0]
    for own in blocks:
        starts.append(starts[-1] + len(own))
    Xi = torch.eye(starts[-1], dtype=torch.float64)
    Lambda = torch.zeros_like(Xi)
    for i, own in enumerate(blocks):
        here = slice(starts[i], starts[i + 1])
        if i + 1 < count:
            psi = torch.linalg.solve(blocks[i + 1], torch.kron(G[i][i + 1], A[i][i + 1]).mT).mT
            Xi[here, starts[i + 1] : starts[i + 2]] = -psi
            own = own - psi @ blocks[i + 1] @ psi.mT
        Lambda[here, here] = torch.linalg.inv(own)
    return Xi.mT @ Lambda @ Xi


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_step_is_the_dense_inverse_times_the_gradient(fisher: str, decay: float) -> None:
    """Layers with a damping and a weight decay of their own."""
    torch.manual_seed(0)
    model = mlp(4, 5, 3, 3, dtype=torch.float64)
    x, y = vectors(20, 4, 3, torch.float64)
    groups = [
        {"params": list(model[0].parameters()), "damping": 0.2, "weight_decay": decay},
        {"params": [*model[2].parameters(), *model[4].parameters()]},
    ]
    optimizer = chained(model, 0.3, params=groups, fisher=fisher)
    A, G = second_moments(model, x, y if fisher == "empirical" else None)
    before = snapshot(model)
    functional.cross_entropy(model(x), y).backward()
    V = matrix_gradients(model)
    V[0] += decay * torch.cat([before[0], before[1][:, None]], 1)
    optimizer.step()

    layers = optimizer._coverage.layers
    assert [layer.following for layer in layers] == ["2", "4", None]
    for i, layer in enumerate(layers[:-1]):
        assert layer.factors is not None
        torch.testing.assert_close(layer.factors.extra["next_A"], A[i][i + 1], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(layer.factors.extra["next_G"], G[i][i + 1], rtol=1e-6, atol=1e-9)
    P = dense_approximation(A, G, [0.2 + decay, 0.05, 0.05]) @ torch.cat([v.reshape(-1) for v in V])
    moved = [(old - new) / 0.3 for old, new in zip(before, snapshot(model), strict=True)]
    ours = [torch.cat([moved[2 * i], moved[2 * i + 1][:, None]], 1).reshape(-1) for i in range(3)]
    torch.testing.assert_close(torch.cat(ours), P, rtol=1e-6, atol=1e-8)


def test_samples_are_not_mixed() -> None:
    """Cross factors of fisher="mc" with several draws have the mean of fisher="exact"."""
    torch.manual_seed(0)
    model, (x, y) = mlp(3, 4, 3, dtype=torch.float64), vectors(400, 3, 3, torch.float64)
    exact = second_moments(model, x)[1][0][1]
    optimizer = chained(model, 0.1, fisher="mc", fisher_samples=50, seed=1)
    train_step(model, optimizer, x, y)
    factors = optimizer._coverage.layers[0].factors
    assert factors is not None
    assert (factors.extra["next_G"] - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("kind", ["linear", "tanh"])
def test_it_is_nearer_to_the_inverse_of_the_fisher_matrix_than_blocks_are(kind: str) -> None:
    """As the paper's figures show: in norm, and by far in what the inverses make of F, tr(P F) - log det(P F) - n.

    F carries the same damping, block by block, as its two approximations.
    """
    torch.manual_seed(0)
    model = mlp(4, 4, 4, 4, 3, dtype=torch.float64)
    if kind == "linear":
        model = nn.Sequential(*(layer for layer in model if isinstance(layer, nn.Linear)))
    x = torch.randn(300, 4, dtype=torch.float64)
    inputs, gradients, weights = per_example(model, x, None)
    rows = [
        torch.cat([(g[:, :, None] * a[:, None]).flatten(1) for g, a in zip(case, inputs, strict=True)], 1)
        for case in gradients
    ]
    F = sum((row * w[:, None]).mT @ row for row, w in zip(rows, weights, strict=True)) / len(x)
    A, G = second_moments(model, x)
    damping = [1e-2] * len(A)
    tridiagonal = dense_approximation(A, G, damping)
    diagonal = [torch.kron(G[i][i], A[i][i]) for i in range(len(A))]
    for i in range(len(A)):
        G[i] = [G[i][j] if i == j else torch.zeros_like(G[i][j]) for j in range(len(A))]
    blocks = dense_approximation(A, G, damping)
    F = F + torch.linalg.inv(blocks) - torch.block_diag(*diagonal)
    wanted = torch.linalg.inv(F)
    norms = [float((P - wanted).norm()) for P in (tridiagonal, blocks)]
    losses = [float((P @ F).trace() - torch.linalg.slogdet(P @ F)[1]) - len(F) for P in (tridiagonal, blocks)]
    assert norms[0] < 0.85 * norms[1]
    assert losses[0] < 0.4 * losses[1]


@pytest.mark.parametrize("lrs", [(0.5, 0.5), (0.5, 0.2)])
def test_the_kl_clip_sees_the_whole_chain(lrs: tuple[float, float]) -> None:
    torch.manual_seed(0)
    model = mlp(4, 5, 3, dtype=torch.float64)
    groups = [{"params": list(model[i].parameters()), "lr": lr} for i, lr in zip((0, 2), lrs, strict=True)]
    x, y = vectors(20, 4, 3, torch.float64)
    optimizer = chained(model, 0.5, params=groups, fisher="exact", kl_clip=1e-4)
    A, G = second_moments(model, x)
    before = snapshot(model)
    functional.cross_entropy(model(x), y).backward()
    V = [v.reshape(-1) for v in matrix_gradients(model)]
    optimizer.step()
    P = (dense_approximation(A, G, [0.05, 0.05]) @ torch.cat(V)).split([len(v) for v in V])  # type: ignore[no-untyped-call]
    total = sum(lr**2 * float(p @ v) for lr, p, v in zip(lrs, P, V, strict=True))
    scale = min(1.0, (1e-4 / total) ** 0.5)
    assert scale < 0.5
    for clip in optimizer.clip_scales:
        torch.testing.assert_close(clip, torch.tensor(scale, dtype=torch.float64))
    torch.testing.assert_close(before[0] - model[0].weight.detach(), lrs[0] * scale * P[0].view(5, 5)[:, :-1])


# ---------------------------------------------------------------- what forms a chain


class Free(nn.Module):
    """Layers whose use in the forward is a test's."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))
        self.norm = nn.LayerNorm(4, dtype=torch.float64)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("forward", "joined"),
    [
        (lambda m, x: m.c(torch.tanh(m.b(torch.tanh(m.a(x))))), {"a", "b"}),
        (lambda m, x: m.c(m.norm(m.b(m.a(x)))), {"a"}),
        (lambda m, x: m.c(m.a(m.b(x))), set()),
        (lambda m, x: m.c(m.b(m.b(m.a(x)))), set()),
        (lambda m, x: m.b(m.a(x)) + m.c(x), {"a", "b"}),
        (lambda m, x: m.c(m.b(m.a(x)).view(-1, 2, 4)).mean(1), {"a"}),
        (lambda m, x: m.c(m.b(m.a(x.view(-1, 2, 4)))).mean(1), {"a", "b"}),
    ],
    ids=["in order", "a norm between", "another order", "called twice", "side by side", "other rows", "tokens"],
)
def test_which_calls_are_joined(forward: Any, joined: set[str]) -> None:
    torch.manual_seed(0)
    model = Free(forward)
    optimizer = chained(model, 0.1, fisher="exact")
    before = snapshot(model)
    x = torch.randn(6, 4, dtype=torch.float64)
    out = model(x)
    train_step(model, optimizer, x, torch.randint(4, (len(out),)))
    assert all(p.isfinite().all() for p in model.parameters())
    assert not equal(before[:2], snapshot(model)[:2])
    extras = {layer.name: layer.factors.extra for layer in optimizer._coverage.layers if layer.factors is not None}
    assert {name for name, extra in extras.items() if extra and extra["next_G"].any()} == joined
    assert {name for name, extra in extras.items() if extra and extra["next_A"].any()} == joined


def test_nothing_joined_is_ordinary_kfac() -> None:
    results = []
    for structure in ("kfac", "tridiagonal"):
        torch.manual_seed(0)
        model = Free(lambda m, x: m.c(m.a(m.b(x))))
        x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(4, (6,))
        optimizer = KFAC(model, 0.1, structure=structure, fisher="exact", damping=0.1)
        with torch.no_grad():
            for _ in range(2):
                with torch.enable_grad():
                    train_step(model, optimizer, x, y)
        results.append(snapshot(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


def test_convolutions_and_the_classifier_train() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = KFAC(model, 0.1, structure="tridiagonal", damping=0.01)
    x, y = torch.randn(64, 1, 6, 6), torch.randint(3, (64,))
    losses = [train_step(model, optimizer, x, y) for _ in range(40)]
    assert losses[-1] < 0.3 * losses[0]
    assert [layer.following for layer in optimizer._coverage.layers] == [None, "5", None]
    assert optimizer.inverse_failures == optimizer.inverse_retries == 0


def test_it_trains_in_fewer_steps_than_sgd() -> None:
    torch.manual_seed(4)
    x = torch.randn(128, 8) * torch.logspace(0, -2, 8)
    y = ((x / torch.logspace(0, -2, 8)) @ torch.randn(8, 3)).argmax(1)
    last = {}
    for name in ("tridiagonal", "sgd"):
        torch.manual_seed(0)
        model = mlp(8, 12, 12, 3)
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        if name != "sgd":
            optimizer = KFAC(model, 0.1, structure="tridiagonal", damping=0.01)
        last[name] = [train_step(model, optimizer, x, y) for _ in range(60)][-1]
    assert last["tridiagonal"] < 0.5 * last["sgd"]


# ---------------------------------------------------------------- as an optimizer


def make(**options: Any) -> tuple[nn.Sequential, KFAC]:
    torch.manual_seed(0)
    model = mlp(6, 5, 4, 3)
    return model, KFAC(model, 0.1, **({"structure": "tridiagonal", "damping": 0.01, "inverse_every": 3} | options))


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("at", [1, 4])
def test_training_continues_bit_for_bit(at: int, fisher: str) -> None:
    options: dict[str, Any] = {"factor_every": 2, "weight_decay": 0.01, "nesterov": True, "fisher": fisher}
    batches = [vectors(8, 6, 3) for _ in range(8)]
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


def test_checkpoints_that_do_not_fit_are_refused() -> None:
    model, optimizer = make()
    train_step(model, optimizer, *vectors(8, 6, 3))
    before = frozen_state(optimizer)
    for path in (("extra", "next_A"), ("factorisation", "psi_G"), ("factorisation", "eigenvalues")):
        broken = frozen_state(optimizer)
        broken["kronfac"]["layers"]["0"][path[0]][path[1]] = torch.zeros(1)
        with pytest.raises(ValueError, match=rf"layers\.0\.{path[0]}\.{path[1]}: expected a floating-point tensor"):
            optimizer.load_state_dict(broken)
    broken = frozen_state(optimizer)
    del broken["kronfac"]["layers"]["0"]["factorisation"]["psi_A"]
    with pytest.raises(ValueError, match="psi_A' is missing"):
        optimizer.load_state_dict(broken)
    with pytest.raises(ValueError, match="structure: expected"):
        KFAC(mlp(6, 5, 4, 3), 0.1).load_state_dict(optimizer.state_dict())
    assert same_tree(before, optimizer.state_dict())


def test_a_layer_that_is_frozen_leaves_its_chain_and_comes_back() -> None:
    model, optimizer = make(factor_decay=0.5)
    batches = [vectors(8, 6, 3) for _ in range(7)]
    train_step(model, optimizer, *batches[0])
    model[2].requires_grad_(False)
    frozen = snapshot(model[2])
    for batch in batches[1:3]:
        train_step(model, optimizer, *batch)
    layers = {layer.name: layer for layer in optimizer._coverage.layers}
    assert layers["0"].following == "4"
    assert layers["0"].factors is not None
    assert layers["0"].factors.extra["next_A"].shape == (7, 5)
    assert equal(frozen, snapshot(model[2]))
    optimizer.load_state_dict(frozen_state(optimizer))
    model[2].requires_grad_(True)
    with pytest.warns(UserWarning, match="no statistics so far"):
        train_step(model, optimizer, *batches[3])
    again = optimizer._coverage.layers[0].factors
    assert again is not None
    assert not again.extra["next_G"].any()  # what it shared with its old successor is gone
    for batch in batches[4:]:  # the inverses of step 6 are the first with statistics of both
        train_step(model, optimizer, *batch)
    layers = {layer.name: layer for layer in optimizer._coverage.layers}
    assert [layer.following for layer in layers.values()] == ["2", "4", None]
    assert not equal(frozen, snapshot(model[2]))
    assert layers["0"].factorisation is not None
    assert set(LINKED) <= set(layers["0"].factorisation)
    assert optimizer.inverse_retries == 0


def test_a_layer_without_gradient_breaks_the_chain_for_the_step() -> None:
    """The directions are then those of the remaining layers with the blocks as they are."""
    torch.manual_seed(0)
    model = mlp(4, 4, 3, 3, dtype=torch.float64)
    optimizer = chained(model, 0.1, fisher="exact", inverse_every=10)
    x, y = vectors(8, 4, 3, torch.float64)
    train_step(model, optimizer, x, y)
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    V = matrix_gradients(model)[1]
    for p in model[4].parameters():
        p.grad = None
    before, last = snapshot(model[2]), snapshot(model[4])
    f = optimizer._coverage.layers[1].factorisation
    first = optimizer._coverage.layers[0].factorisation
    assert f is not None
    assert first is not None
    U = matrix_gradients(nn.Sequential(model[0]))[0] - first["psi_G"] @ V @ first["psi_A"].mT
    middle = (first["left_vectors"].mT @ U @ first["right_vectors"]) / (1 + first["eigenvalues"])
    W = first["left_vectors"] @ middle @ first["right_vectors"].mT
    optimizer.step()
    P = f["left"] @ V @ f["right"] - first["psi_G"].mT @ W @ first["psi_A"]
    moved = torch.cat([(before[0] - model[2].weight.detach()), (before[1] - model[2].bias.detach())[:, None]], 1) / 0.1
    torch.testing.assert_close(moved, P, rtol=1e-8, atol=1e-10)
    assert equal(last, snapshot(model[4]))


def test_averages_of_layers_that_are_used_unequally_stay_possible() -> None:
    """[[A_i, C], [Cᵀ, A_j]] has no negative eigenvalue whichever of the two a step sees."""
    torch.manual_seed(0)
    model = Free(None)
    both, first, second = (
        lambda m, x: m.b(m.a(x)),
        lambda m, x: m.a(x),
        lambda m, x: m.b(x),
    )
    optimizer = chained(model, 0.1, params=[*model.a.parameters(), *model.b.parameters()], factor_decay=0.7)
    for forward in (first, first, both, second, second, both, first, both, second):
        model.run = forward
        x = torch.randn(3, 4, dtype=torch.float64)
        for p in model.parameters():
            p.grad = None
        functional.cross_entropy(model(x), torch.randint(4, (3,))).backward()
        optimizer.step()
        a, b = (layer.factors for layer in optimizer._coverage.layers)
        if a is None or b is None:
            continue
        for key, one, other in (("next_A", a.A, b.A), ("next_G", a.G, b.G)):
            cross = a.extra[key]
            joint = torch.cat([torch.cat([one, cross], 1), torch.cat([cross.mT, other], 1)])
            assert torch.linalg.eigvalsh(joint)[0] > -1e-12
    assert a is not None
    assert a.extra["next_A"].any()
    assert optimizer.inverse_retries == 0


def test_masked_tokens_leave_no_trace() -> None:
    x, y, keep = torch.randn(4, 5, 6), torch.randint(3, (4, 5)), torch.rand(4, 5) < 0.6
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
        factors = optimizer._coverage.layers[0].factors
        assert factors is not None
        assert factors.extra["next_G"].any()
        results.append(snapshot(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_cross_factors_are_scaled_as_the_factors_are(sharing: str) -> None:
    """Two equal layers on equal inputs: Ā_{i,j} is Ā_{i,i} and G_{i,j} is G_{i,i}."""

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3, dtype=torch.float64), nn.Linear(4, 3, dtype=torch.float64)
            self.b.load_state_dict(self.a.state_dict())

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.a(x) + self.b(x)).sum(1)  # type: ignore[no-any-return]

    for fisher in ("exact", "mc", "empirical"):
        model = Twins()
        optimizer = chained(model, 0.1, sharing=sharing, fisher=fisher, fisher_samples=2)
        train_step(model, optimizer, torch.randn(5, 2, 4, dtype=torch.float64), torch.randint(3, (5,)))
        factors = optimizer._coverage.layers[0].factors
        assert factors is not None
        torch.testing.assert_close(factors.extra["next_A"], factors.A)
        torch.testing.assert_close(factors.extra["next_G"], factors.G)


def test_a_step_that_a_grad_scaler_skips_changes_nothing() -> None:
    model, optimizer = make(fisher="empirical")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    reference, plain = make(fisher="empirical")
    for bad in (False, True, False):
        x, y = vectors(8, 6, 3)
        optimizer.zero_grad()
        scaler.scale(functional.cross_entropy(model(x), y)).backward()
        if bad:
            model[0].weight.grad[0, 0] = float("inf")  # type: ignore[index]
        else:
            train_step(reference, plain, x, y)
        weights, state = snapshot(model), frozen_state(optimizer)["kronfac"]["layers"]
        scaler.step(optimizer)
        scaler.update(2.0**4)
        assert equal(weights, snapshot(model)) == bad
        assert same_tree(state, optimizer.state_dict()["kronfac"]["layers"]) == bad
    torch.testing.assert_close(snapshot(model), snapshot(reference), rtol=1e-4, atol=1e-6)


def test_several_forwards_before_a_step_add_up() -> None:
    results = []
    x, y = vectors(8, 6, 3)
    for parts in (1, 2):
        model, optimizer = make(fisher="exact")
        for one, other in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (functional.cross_entropy(model(one), other) / parts).backward()
        optimizer.step()
        results.append([f.extra for layer in optimizer._coverage.layers if (f := layer.factors) is not None])
    torch.testing.assert_close(results[0], results[1])


def test_links_that_cannot_be_right_are_left_out_and_counted() -> None:
    model, optimizer = make(inverse_every=1, factor_every=5)
    train_step(model, optimizer, *vectors(8, 6, 3))
    factors = optimizer._coverage.layers[0].factors
    assert factors is not None
    factors.extra["next_A"].mul_(20)
    train_step(model, optimizer, *vectors(8, 6, 3))
    assert optimizer.inverse_retries == 1
    assert optimizer.inverse_failures == 0
    assert set(optimizer._coverage.layers[0].factorisation or ()) == {"left", "right"}
    assert all(p.isfinite().all() for p in model.parameters())


def test_exact_damping_is_refused() -> None:
    with pytest.raises(ValueError, match=r"KFAC: solve: expected 'inverse' with structure='tridiagonal', got 'eigen'"):
        KFAC(mlp(3, 2), 0.1, structure="tridiagonal", solve="eigen")


def ranks(rank: int, folder: Path) -> None:
    model, optimizer, batches = distributed_problem()
    for x, y in batches:
        share = slice(0, 5) if rank == 0 else slice(5, None)
        optimizer.zero_grad()
        (functional.cross_entropy(model(x[share]), y[share], reduction="sum") / 8).backward()
        for p in model.parameters():
            assert p.grad is not None
            distributed.all_reduce(p.grad)
        optimizer.step()
    extras = [layer.factors.extra for layer in optimizer._coverage.layers if layer.factors is not None]
    torch.save((snapshot(model), extras), folder / f"{rank}.pt")


def distributed_problem() -> tuple[nn.Module, KFAC, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = mlp(6, 5, 3, dtype=torch.float64)
    return model, chained(model, 0.1, fisher="exact"), [vectors(8, 6, 3, torch.float64) for _ in range(3)]


@pytest.mark.skipif(not distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_ranks_are_one_large_batch(tmp_path: Path) -> None:
    run_ranks(ranks, tmp_path)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    model, optimizer, batches = distributed_problem()
    for batch in batches:
        train_step(model, optimizer, *batch)
    assert equal(one[0], two[0])
    torch.testing.assert_close(one[0], snapshot(model), rtol=1e-7, atol=1e-9)
    extras = [layer.factors.extra for layer in optimizer._coverage.layers if layer.factors is not None]
    torch.testing.assert_close(one[1], extras, rtol=1e-9, atol=1e-12)
