"""A layer applied once for the whole batch, as position embeddings are: it sees the sum of the examples' gradients."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.curvature import Categorical, Recorder, factors
from kronfac.optim import KFAC
from tests.curvature.models import relative
from tests.curvature.per_example import matrices, output_gradients

EXAMPLES, PLACES = 4, 5


class Positions(nn.Module):
    """Adds an embedding of the positions, looked up once or once per example: the same function.

    Args:
        ids: "each" example has its own, "row" is (1, T) and "bare" (T,).
    """

    def __init__(self, ids: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.places, self.head = nn.Embedding(PLACES, 4), nn.Linear(4, 3)
        self.ids = ids
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, 4) to (N, 3)."""
        ids = torch.arange(PLACES)
        ids = {"each": ids.expand(len(x), PLACES), "row": ids[None], "bare": ids}[self.ids]
        return self.head(torch.tanh(x + self.places(ids)).sum(1))  # type: ignore[no-any-return]


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(EXAMPLES, PLACES, 4, dtype=torch.float64), torch.randint(3, (EXAMPLES,))


def dense(fisher: str) -> Tensor:
    """Mean over the positions of the Fisher matrix of a position's vector, from the gradients of single examples."""
    model = Positions("each")
    x, y = batch()
    adapter = next(layer.adapter for layer in KFAC(model, 0.1)._coverage.layers if layer.name == "places")
    likelihood = Categorical()
    columns = [column for column, _ in output_gradients(likelihood, model(x), "exact")]
    if fisher == "empirical":
        columns = [likelihood.target_gradients(model(x).detach(), y, None)]
    total = torch.zeros(4, 4, dtype=torch.float64)
    for column in columns:
        rows = matrices(model, adapter, x, column)  # (N, 4, T)
        total += torch.einsum("nit,njt->ij", rows, rows) / EXAMPLES / PLACES
    return total


def every_sign(monkeypatch: pytest.MonkeyPatch, columns: int) -> list[Tensor]:
    """Take all signs of the examples in turn in place of random ones; their mean is the expectation."""
    signs = [torch.tensor(some).double()[:, None] for some in itertools.product((-1, 1), repeat=EXAMPLES)]
    turns = iter([some for some in signs for _ in range(columns)])
    monkeypatch.setattr(Recorder, "_signs", lambda self, column: next(turns))
    return signs


@pytest.mark.parametrize("ids", ["row", "bare"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_the_mean_over_the_signs_of_examples_is_the_fisher_of_single_ones(
    ids: str, fisher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    signs = every_sign(monkeypatch, 3 if fisher == "exact" else 1)
    found = factors(Positions(ids), [batch()] * len(signs), likelihood="categorical", fisher=fisher)
    A, G = found["places"]
    expected = dense(fisher)
    assert relative(A[0] * G, expected) < 1e-9
    assert torch.equal(A, A[:1].expand(PLACES))
    head, other = found["head"], factors(Positions("each"), batch(), likelihood="categorical", fisher=fisher)["head"]
    assert relative(head.A, other.A) < 1e-12
    assert relative(head.G, other.G) < 1e-12


@pytest.mark.parametrize(("fisher", "samples"), [("exact", 1), ("mc", 4)])
def test_random_signs_and_drawn_targets_make_the_block_right_in_the_mean(fisher: str, samples: int) -> None:
    """Gradients of independently drawn targets are uncorrelated, too: cross products vanish in the mean."""
    model = Positions("row")
    optimizer = KFAC(model, 0.0, fisher=fisher, fisher_samples=samples, seed=0)
    x, y = batch()
    state = optimizer.state_dict()["kronfac"]["generator"] if fisher == "exact" else None
    with optimizer.record_statistics():
        for _ in range(250):
            out = model(x)
    functional.cross_entropy(out, y).backward()
    optimizer.step()
    A, G = optimizer.factors()["places"]
    assert relative(A[0] * G, dense("exact")) < 0.2
    if state is not None:
        assert not same(state, optimizer.state_dict()["kronfac"]["generator"])


def same(one: object, other: object) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and all(same(one[key], other[key]) for key in one)
    return one == other


def test_exact_statistics_draw_nothing_where_every_layer_has_its_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    every_sign(monkeypatch, 0)  # drawing raises StopIteration
    model = Positions("each")
    optimizer = KFAC(model, 0.1, fisher="exact")
    x, y = batch()
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert len(optimizer.factors()) == 2


def step(model: nn.Module, optimizer: KFAC, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("ids", ["row", "bare"])
def test_the_empirical_fisher_of_such_a_layer_is_reported_once(ids: str) -> None:
    """Its gradients come from the user's own backward, which adds up the examples."""
    model = Positions(ids)
    optimizer = KFAC(model, 0.01, fisher="empirical")
    with pytest.warns(UserWarning, match=r"'places' are applied once for the whole batch .* use fisher='mc'"):
        step(model, optimizer, *batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer, *batch())


class Layouts(nn.Module):
    """The same layer on inputs of every layout whose rows are those of single examples."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(7, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Ids (N, T) to (N, 4)."""
        h = self.layer(self.embed(x).transpose(0, 1))
        h = self.layer(h.flatten(0, 1))
        h = self.layer(h.view(x.shape[1], len(x), 4).transpose(0, 1))
        h = h + self.embed(x.flatten()).view_as(h)
        return self.layer(h.mean(1))  # type: ignore[no-any-return]


def test_other_layouts_are_not_reported() -> None:
    model = Layouts()
    optimizer = KFAC(model, 0.01, fisher="empirical")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for count in (6, 1, 3):
            step(model, optimizer, torch.randint(7, (count, 5)), torch.randint(4, (count,)))
