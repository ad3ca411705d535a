"""Options together: the adaptive mode with every structure, and every two options that do not exclude each other."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.optim import KFAC
from tests.optim.available import IDS, STRUCTURES
from tests.optim.models import convnet, equal, images, mlp, same_tree, snapshot, train_step, vectors
from tests.optim.test_structures import Everything, through_a_file, tokens


@pytest.fixture(autouse=True)
def _small_layers_are_doubly_factored_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kronfac.optim.structures.LARGEST_A_IF_ASKED", 3)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "mlp": (lambda: mlp(4, 8, 6, 3), lambda: vectors(24, 4, 3)),
    "convnet": (convnet, lambda: images(24)),
    "tokens": (Everything, lambda: tokens(16)),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("structure", "solve"), STRUCTURES, ids=IDS)
def test_the_adaptive_mode_trains_and_resumes_with_every_structure(structure: str, solve: str, network: str) -> None:
    """Past step 20, at which γ is chosen among three, each of them with its own factorisations."""
    torch.manual_seed(0)
    make, draw = NETWORKS[network]
    x, y = draw()

    def build() -> tuple[nn.Module, KFAC]:
        model = make()
        return model, KFAC(model, adaptive=True, structure=structure, solve=solve, damping=0.1, inverse_every=4, seed=0)

    def step(model: nn.Module, optimizer: KFAC) -> float:
        def closure() -> float:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            return loss.item()

        return float(optimizer.step(closure))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, optimizer = build()
        losses = [step(model, optimizer) for _ in range(18)]
        saved = through_a_file([model.state_dict(), optimizer.state_dict()])
        twin, other = build()
        twin.load_state_dict(saved[0])
        other.load_state_dict(saved[1])
        for _ in range(4):
            losses.append(step(model, optimizer))
            assert step(twin, other) == losses[-1]
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.skipped_steps == optimizer.inverse_failures == 0
    assert optimizer.adaptation == other.adaptation
    assert optimizer.adaptation is not None
    assert optimizer.adaptation.rho is not None
    assert equal(snapshot(model), snapshot(twin))
    assert same_tree(optimizer.state_dict(), other.state_dict())


CHOICES: dict[str, list[Any]] = {
    "structure and solve": STRUCTURES,
    "fisher": ["mc", "exact", "empirical"],
    "sharing": ["expand", "reduce"],
    "averaging": [None, 0.9],
    "norm_constraint": [None, 0.1],
    "momentum": [0.9, 0.0],
    "weight_decay": [0.0, 1e-2],
    "decoupled": [False, True],
    "kl_clip": [1e-3, None],
    "max_staleness": [0, 2],
    "groups": [False, True],
}


def refused(row: dict[str, int]) -> bool:
    """Whether a row of indices into the choices holds the one pair that is; tests/optim/test_options.py has it."""
    structure, _ = CHOICES["structure and solve"][row["structure and solve"]]
    return structure == "tridiagonal" and bool(CHOICES["max_staleness"][row["max_staleness"]])


def every_pair() -> list[dict[str, Any]]:
    """Rows of choices in which each two values of two options meet at least once, by greedy search."""
    sizes = {name: len(values) for name, values in CHOICES.items()}
    missing = {((a, i), (b, j)) for a, b in combinations(CHOICES, 2) for i in range(sizes[a]) for j in range(sizes[b])}
    tridiagonal = next(i for i, (structure, _) in enumerate(STRUCTURES) if structure == "tridiagonal")
    missing.remove((("structure and solve", tridiagonal), ("max_staleness", 1)))
    source, rows = random.Random(0), []
    while missing:
        wanted = min(missing)
        candidates = [{name: source.randrange(size) for name, size in sizes.items()} | dict(wanted) for _ in range(30)]
        best = max(
            [row for row in candidates if not refused(row)],
            key=lambda row: len(missing & {*combinations(row.items(), 2)}),
        )
        missing -= {*combinations(best.items(), 2)}
        rows.append({name: CHOICES[name][index] for name, index in best.items()})
    return rows


def test_every_two_options_that_are_not_refused_train_together() -> None:
    """Three steps on a network with convolutions and on one with tokens."""
    rows = every_pair()
    assert len(rows) < 100
    for row in rows:
        options = dict(row)
        options["structure"], options["solve"] = options.pop("structure and solve")
        grouped = options.pop("groups")
        for make, draw in (NETWORKS["convnet"], NETWORKS["tokens"]):
            torch.manual_seed(0)
            model = make()
            first, *others = model.parameters()
            if grouped:
                options["params"] = [{"params": [first], "lr": 0.05}, {"params": others}]
                if make is convnet:  # a layer's weight and bias
                    options["params"] = [{"params": [first, others[0]], "damping": 0.1}, {"params": others[1:]}]
            optimizer = KFAC(model, 0.01, damping=0.05, inverse_every=2, seed=0, **options)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                losses = [train_step(model, optimizer, *draw()) for _ in range(3)]
            assert all(bool(p.isfinite().all()) for p in model.parameters()), row
            assert losses == [loss for loss in losses if abs(loss) < 100], row
            assert optimizer.skipped_steps == optimizer.inverse_failures == 0, row
            if options["averaging"]:
                with optimizer.averaged_parameters():
                    assert all(bool(p.isfinite().all()) for p in model.parameters()), row
