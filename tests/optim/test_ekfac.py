"""EKFAC against dense matrices made of the gradients of single examples."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.curvature import Categorical
from kronfac.optim import KFAC
from tests.curvature.models import relative
from tests.curvature.per_example import matrices, mean_squares, output_gradients
from tests.optim.models import convnet, images, mlp, same_tree, train_step, vectors


def layers(optimizer: KFAC) -> dict[str, Any]:
    return {layer.name: layer for layer in optimizer._coverage.layers}


def tree(optimizer: KFAC) -> dict[str, Any]:
    result: dict[str, Any] = optimizer.state_dict()["kronfac"]["layers"]
    return result


def dense(Q_G: Tensor, S: Tensor, Q_A: Tensor) -> Tensor:
    basis = torch.kron(Q_G, Q_A)
    return basis @ torch.diag(S.flatten()) @ basis.mT


@pytest.mark.parametrize(("conv", "weight_decay"), [(False, 0.1), (True, 0.0)])
def test_every_step_is_the_dense_one(conv: bool, weight_decay: float) -> None:
    """Averages, basis changes and the step itself; factor_every and inverse_every do not divide each other."""
    torch.manual_seed(0)
    model = convnet(torch.float64) if conv else mlp(4, 5, 3, dtype=torch.float64)
    model = nn.Sequential(*(nn.ReLU() if isinstance(m, nn.ReLU) else m for m in model))
    lr, damping, decay = 0.1, 0.03, 0.6
    optimizer = KFAC(
        model, lr, momentum=0.0, structure="ekfac", fisher="exact", damping=damping, factor_every=2, inverse_every=3,
        factor_decay=decay, kl_clip=None, weight_decay=weight_decay,
    )  # fmt: skip
    expected: dict[str, Tensor] = {}
    old: dict[str, Any] = {}
    updates = 0
    for step in range(7):
        x, y = images(6, torch.float64) if conv else vectors(6, 4, 3, torch.float64)
        x.clamp_(-2, 2)
        own = layers(optimizer)
        if step % 2 == 0:
            updates += 1
            share = min(1 - 1 / updates, decay)
            vectors_ = output_gradients(Categorical(), model(x), "exact")
            for name in old:
                moment = mean_squares(
                    model, own[name].adapter, x, vectors_, len(x), old[name]["left_vectors"], old[name]["right_vectors"]
                )
                expected[name] = share * expected[name] + (1 - share) * moment
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        V = {name: layer.adapter.gradient() for name, layer in own.items()}
        W = {name: layer.adapter.weight_matrix().clone() for name, layer in own.items()}
        optimizer.step()
        for name, saved in tree(optimizer).items():
            now = saved["factorisation"]
            Q_G, Q_A = now["left_vectors"], now["right_vectors"]
            if name not in old:
                expected[name] = torch.outer(now["left_values"], now["right_values"])
                pair = optimizer.factors()[name]
                assert relative(dense(Q_G, expected[name], Q_A), torch.kron(pair.G, pair.A)) < 1e-9
            elif step % 3 == 0:
                before = dense(old[name]["left_vectors"], expected[name], old[name]["right_vectors"])
                basis = torch.kron(Q_G, Q_A)
                expected[name] = (basis.mT @ before @ basis).diagonal().view_as(expected[name])
            else:
                assert torch.equal(Q_A, old[name]["right_vectors"])
            assert relative(saved["extra"]["S"], expected[name]) < 1e-9
            full = V[name] + weight_decay * W[name]
            block = dense(Q_G, expected[name], Q_A) + (damping + weight_decay) * torch.eye(full.numel()).double()
            P = torch.linalg.solve(block, full.flatten()).view_as(full)
            assert relative(own[name].adapter.weight_matrix(), W[name] - lr * P) < 1e-9
            old[name] = {key: value.clone() for key, value in now.items()}


@pytest.mark.parametrize("seed", range(3))
def test_closer_to_the_true_block_than_kfac(seed: int) -> None:
    """George et al., section 3: S is the best diagonal in the basis, in the Frobenius norm."""
    torch.manual_seed(seed)
    model = mlp(3, 4, 3, dtype=torch.float64)
    optimizer = KFAC(model, 0.0, structure="ekfac", fisher="exact", factor_decay=0.0, inverse_every=100)
    x, y = vectors(5, 3, 3, torch.float64)
    for _ in range(2):  # the basis first, then the same statistics in it
        train_step(model, optimizer, x, y)
    gaps = []
    for name, layer in layers(optimizer).items():
        true: Tensor | float = 0.0
        for vector, _ in output_gradients(Categorical(), model(x), "exact"):
            rows = matrices(model, layer.adapter, x, vector).flatten(1)
            true = true + rows.mT @ rows / len(x)
        saved, pair = tree(optimizer)[name], optimizer.factors()[name]
        now = saved["factorisation"]
        ours = dense(now["left_vectors"], saved["extra"]["S"], now["right_vectors"])
        kfac = torch.kron(pair.G, pair.A)
        errors = [float(torch.linalg.matrix_norm(some - true)) for some in (ours, kfac)]
        assert errors[0] <= errors[1] * (1 + 1e-12)
        gaps.append(errors[1] - errors[0])
    assert max(gaps) > 1e-6  # K-FAC is off here


class Encoder(nn.Module):
    """A transformer encoder on tokens, classified by their mean."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.tokens, self.batch_first = nn.Embedding(7, 6), batch_first
        layer = nn.TransformerEncoderLayer(6, 2, 5, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T) to (N, 3)."""
        h = self.tokens(x)
        h = self.encoder(h) if self.batch_first else self.encoder(h.transpose(0, 1)).transpose(0, 1)
        return self.head(h.mean(1))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@pytest.mark.parametrize("batch_first", [True, False])
def test_in_the_course_of_training_a_transformer_the_eigenvalues_are_those_of_single_examples(
    batch_first: bool,
) -> None:
    """In bases that are several steps old, of all projections of the attention and of Linear layers on tokens.

    The trace is that of the layer's block of the Fisher matrix whatever the basis; K-FAC's is another, because it
    counts positions as independent.
    """
    torch.manual_seed(0)
    model = Encoder(batch_first).double()
    optimizer = KFAC(
        model, 0.05, structure="ekfac", fisher="exact", factor_decay=0.0, inverse_every=5, damping=1e-2, kl_clip=1e-3
    )
    for _ in range(8):  # the basis is of the sixth
        x, y = torch.randint(7, (5, 4)), torch.randint(3, (5,))
        vectors_ = output_gradients(Categorical(), model(x), "exact")
        before = tree(optimizer)
        now = copy.deepcopy(model)
        train_step(model, optimizer, x, y)
    after = tree(optimizer)
    own = {layer.name: layer.adapter for layer in KFAC(now, 0.1)._coverage.layers}
    names = [name for name in own if "S" in after[name].get("extra", {})]
    assert len(names) == 2 * 6 + 1
    traces = []
    for name in names:
        basis, S = before[name]["factorisation"], after[name]["extra"]["S"]
        true = mean_squares(now, own[name], x, vectors_, len(x), basis["left_vectors"], basis["right_vectors"])
        assert relative(S, true) < 1e-9
        plain = mean_squares(now, own[name], x, vectors_, len(x))
        assert float(S.sum()) == pytest.approx(float(plain.sum()), rel=1e-9)
        pair = optimizer.factors()[name]
        traces.append(float(pair.A.trace() * pair.G.trace() / S.sum()))
    assert min(traces) < 0.8


def test_solve_makes_no_difference() -> None:
    x, y = images(6)
    states = []
    for solve in ("inverse", "eigen"):
        torch.manual_seed(0)
        model = nn.Sequential(*convnet()[:4], nn.GroupNorm(1, 3), *convnet()[4:])
        optimizer = KFAC(model, 0.1, structure="ekfac", solve=solve, seed=0)
        for _ in range(3):
            train_step(model, optimizer, x, y)
        states.append(optimizer.state_dict())
    assert same_tree(states[0], states[1])
    assert "structure: ekfac," in repr(optimizer)


def test_a_layer_without_pairs_is_kfac_in_its_eigenbasis(monkeypatch: pytest.MonkeyPatch) -> None:
    from kronfac.curvature import LinearAdapter

    monkeypatch.setattr(LinearAdapter, "has_pairs", False)
    x, y = vectors(8, 4, 3)
    results = []
    for options in ({"structure": "ekfac"}, {"solve": "eigen"}):
        torch.manual_seed(0)
        model = mlp(4, 5, 3)
        optimizer = KFAC(model, 0.1, seed=0, **options)
        for _ in range(3):
            train_step(model, optimizer, x, y)
        results.append([p.detach() for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
