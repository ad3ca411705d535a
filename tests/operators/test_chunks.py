"""Batches cut into chunks give the operator of the whole, within the memory that was allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from kronfac.operators import fisher, ggn, hessian
from kronfac.operators.memory import measure
from kronfac.spectrum import eigsh
from tests.operators.cases import Case, dense_ggn, dense_hessian, make_case, relative_error
from tests.operators.state import unchanged

ORACLES: dict[str, tuple[Any, Any]] = {"hessian": (hessian, dense_hessian), "ggn": (ggn, dense_ggn)}


def _built(monkeypatch: pytest.MonkeyPatch, make: Any, *args: Any, **options: Any) -> tuple[Any, list[int]]:
    """An operator, and the list that the number of examples of each graph built from now on is added to."""
    operator = make(*args, **options)
    sizes: list[int] = []
    build = type(operator._engine).build

    def counting(self: Any, batch: Any, chosen: Any) -> Any:
        sizes.append(int(batch.size))
        return build(self, batch, chosen)

    monkeypatch.setattr(type(operator._engine), "build", counting)
    return operator, sizes


@pytest.mark.parametrize("kind", ORACLES)
@pytest.mark.parametrize("name", ["mlp", "convnet", "batchnorm", "attention"])
@pytest.mark.parametrize("form", ["batch", "list", "loader"])
def test_chunks_equal_the_whole(monkeypatch: pytest.MonkeyPatch, kind: str, name: str, form: str) -> None:
    reduction = "sum" if form == "batch" else "mean"
    case = make_case(name)
    make, oracle = ORACLES[kind]

    def summed(output: Tensor, target: Tensor) -> Tensor:
        return case.loss_fn(output, target) * len(output)

    loss = case.loss_fn if reduction == "mean" else summed
    data: Any = {
        "batch": (case.inputs, case.targets),
        "list": [(case.inputs[:1], case.targets[:1]), (case.inputs[1:], case.targets[1:])],
        "loader": DataLoader(TensorDataset(case.inputs, case.targets), batch_size=5),
    }[form]
    with unchanged(case.model):
        operator, sizes = _built(monkeypatch, make, case.model, loss, data, reduction=reduction, chunk_size=2)
        columns = torch.randn(operator.shape[0], 2, dtype=torch.float64, generator=torch.Generator())
        product = operator @ columns
    assert max(sizes) == 2
    assert sum(sizes) == len(case.inputs)
    assert relative_error(product, oracle(case.model, loss, case.inputs, case.targets) @ columns) < 1e-12


def test_chunks_of_a_batch_are_of_nearly_equal_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("mlp")
    operator, sizes = _built(monkeypatch, hessian, case.model, case.loss_fn, (case.inputs, case.targets), chunk_size=5)
    operator @ torch.ones(operator.shape[0], dtype=torch.float64)
    assert sizes == [3, 4, 4]


@pytest.mark.parametrize("kind", ["exact", "empirical", "mc"])
def test_chunks_of_the_fisher_matrix(kind: str) -> None:
    case = make_case("mlp")
    batch = (case.inputs, case.targets)
    cut = fisher(case.model, "categorical", batch, kind=kind, chunk_size=4, samples=50 if kind == "mc" else 1)
    whole = fisher(case.model, "categorical", batch, kind="exact" if kind == "mc" else kind)
    columns = torch.randn(cut.shape[0], 2, dtype=torch.float64, generator=torch.Generator())
    product = cut @ columns
    assert torch.equal(product, cut @ columns)
    assert relative_error(product, whole @ columns) < (0.5 if kind == "mc" else 1e-12)


def test_each_chunk_has_draws_of_its_own() -> None:
    case = make_case("mlp")
    one = (case.inputs[:1].expand(8, -1), case.targets[:1].expand(8))  # the same example eight times
    matrix = fisher(case.model, "categorical", one, chunk_size=1, params=["2.bias"]).to_dense()
    draw = fisher(case.model, "categorical", (one[0][:1], one[1][:1]), params=["2.bias"]).to_dense()
    assert relative_error(draw, matrix) > 1e-3


class _Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)

    def forward(self, tokens: Tensor, scale: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)) * scale)  # type: ignore[no-any-return]


def _token_loss(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=-100)


def _token_case() -> Case:
    torch.manual_seed(0)
    tokens, targets = torch.randint(0, 7, (9, 5)), torch.randint(0, 7, (9, 5))
    targets[2:, 2:] = -100
    targets[6] = -100  # an example without any token that counts
    return Case("tokens", _Tokens().double(), _token_loss, tokens, targets)


def _tokens_of(inputs: Any, targets: Tensor) -> int:
    return int((targets != -100).sum())


@pytest.mark.parametrize("kind", ORACLES)
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_padded_tokens_are_weighed_by_batch_size(kind: str, chunk_size: int) -> None:
    case = _token_case()
    scale = torch.linspace(0.5, 2.0, 4, dtype=torch.float64)  # no example: handed to every chunk whole
    batch = ({"tokens": case.inputs, "scale": scale}, case.targets)

    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = case.model

        def forward(self, tokens: Tensor) -> Tensor:
            return self.inner(tokens, scale)  # type: ignore[no-any-return]

    make, oracle = ORACLES[kind]
    expected = oracle(Bound(), case.loss_fn, case.inputs, case.targets)
    operator = make(case.model, case.loss_fn, batch, batch_size=_tokens_of, chunk_size=chunk_size)
    assert relative_error(operator.to_dense(), expected) < 1e-12


def test_weighted_examples() -> None:
    case = make_case("mlp")
    weights = torch.rand(len(case.inputs), dtype=torch.float64)

    def loss(output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        classes, weight = target
        return (functional.cross_entropy(output, classes, reduction="none") * weight).sum() / weight.sum()

    def oracle_loss(output: Tensor, target: Tensor) -> Tensor:
        return loss(output, (target, weights))

    expected = dense_hessian(case.model, oracle_loss, case.inputs, case.targets)
    batch = (case.inputs, (case.targets, weights))
    options: dict[str, Any] = {"batch_size": lambda inputs, target: float(target[1].sum()), "chunk_size": 3}
    assert relative_error(hessian(case.model, loss, batch, **options).to_dense(), expected) < 1e-12


class _Contrastive(nn.Module):
    """Compares every example with every other."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = functional.normalize(self.encode(x), dim=1)
        return found @ found.detach().mean(0)  # type: ignore[no-any-return]


@pytest.mark.parametrize("option", [{"chunk_size": 4}, {"memory_limit": 3_000}])
def test_losses_that_do_not_add_up_are_refused(option: dict[str, int]) -> None:
    case = make_case("mlp")
    batch = (case.inputs, case.targets)

    def hardest(output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output, target, reduction="none").max()

    def summed(output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output, target, reduction="sum")

    def weighted(output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output, target, torch.tensor([1.0, 9.0, 0.1], dtype=output.dtype))

    for loss in (hardest, summed, weighted):
        for make in (hessian, ggn):
            with unchanged(case.model), pytest.raises(ValueError, match="the loss is no mean over examples"):
                make(case.model, loss, batch, **option)
    with pytest.raises(ValueError, match="the loss is no sum over examples"):
        hessian(case.model, case.loss_fn, batch, reduction="sum", **option)
    tokens = _token_case()
    with pytest.raises(ValueError, match="give batch_size="):
        hessian(tokens.model, tokens.loss_fn, ((tokens.inputs, torch.ones(())), tokens.targets), chunk_size=4)
    with pytest.raises(ValueError, match="must be a sum over its examples"):
        hessian(case.model, case.loss_fn, batch, batch_size=lambda inputs, targets: 1.0, **option)


def test_models_that_couple_examples_are_refused() -> None:
    case = make_case("mlp")
    model = _Contrastive().double()
    with pytest.raises(ValueError, match="lets them interact"):
        fisher(model, "bernoulli", (case.inputs, (case.targets > 1).double()), chunk_size=4)
    statistics = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3, track_running_stats=False)).double()
    batch = (case.inputs, case.targets)
    with pytest.raises(ValueError, match="normalises with the statistics of the batch"):
        hessian(statistics, functional.cross_entropy, batch, chunk_size=4)
    hessian(statistics, functional.cross_entropy, batch, chunk_size=11)  # one chunk: nothing is cut


def test_what_cannot_be_cut() -> None:
    class Opaque:
        pass

    model = nn.Linear(3, 2)
    x, y = torch.randn(6, 3), torch.randint(0, 2, (6,))

    def loss(output: Tensor, target: Any) -> Tensor:
        return functional.cross_entropy(output, target[0])

    with pytest.raises(ValueError, match="holds a Opaque, which cannot be cut"):
        hessian(model, loss, (x, (y, Opaque())), chunk_size=2)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"chunk_size": 0}, ValueError, "chunk_size: expected at least 1, got 0"),
        ({"chunk_size": 2.5}, TypeError, "chunk_size: expected an integer or None, got 2.5"),
        ({"memory_limit": True}, TypeError, "memory_limit: expected an integer or None, got True"),
        ({"memory_limit": 20}, ValueError, "memory_limit: one example of batch 0 takes .* expected at most 20"),
        ({"batch_size": 4}, TypeError, "batch_size: expected a callable .* chunk_size= cuts"),
    ]
    for options, error, match in cases:
        with unchanged(model), pytest.raises(error, match=match):
            hessian(model, functional.cross_entropy, (x, y), **options)


def _limited() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 64, 3)).double()
    return model, (torch.randn(64, 1, 8, 8, dtype=torch.float64), torch.randint(0, 3, (64,)))


@pytest.mark.parametrize("make", [hessian, ggn])
@pytest.mark.parametrize("limit", [1_200_000, 400_000, 250_000])
def test_a_memory_limit_holds(make: Any, limit: int) -> None:
    model, batch = _limited()
    whole = make(model, functional.cross_entropy, batch, keep_graph=False)
    vector = torch.randn(whole.shape[0], dtype=torch.float64)
    expected = whole @ vector
    assert measure(lambda: whole @ vector).peak > 1_300_000
    with unchanged(model):
        operator = make(model, functional.cross_entropy, batch, memory_limit=limit)
    products: list[Tensor] = []
    used = measure(lambda: products.append(operator @ vector)).peak
    assert limit / 2 < used <= limit + vector.nbytes  # and the result, one vector
    assert relative_error(products[0], expected) < 1e-12


def test_graphs_are_kept_as_far_as_the_limit_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = _limited()
    batches = [(x[first : first + 8], y[first : first + 8]) for first in range(0, 64, 8)]
    kept: list[int] = []
    for limit in (10_000_000, 1_000_000, 300_000):
        with monkeypatch.context() as patch:
            operator, sizes = _built(patch, hessian, model, functional.cross_entropy, batches, memory_limit=limit)
            vector = torch.randn(operator.shape[0], dtype=torch.float64)
            first = operator @ vector
            sizes.clear()
            assert torch.equal(operator @ vector, first)
            kept.append(64 - sum(sizes))
            used = measure(lambda: operator @ vector).peak  # noqa: B023 - run at once
            held = sum(
                kept for key, (_, kept) in operator._engine._chunker._expected.items() if key in operator._engine._kept
            )
            assert used + held <= limit + vector.nbytes
        if limit < 10_000_000:
            with pytest.raises(ValueError, match=r"keep_graph: the graphs of only . of .* chunks fit"):
                hessian(model, functional.cross_entropy, batches, memory_limit=limit, keep_graph=True)
    assert kept[0] == 64
    assert 0 < kept[1] < 64
    assert kept[2] <= 8


def test_a_limit_above_the_need_changes_nothing() -> None:
    case = make_case("attention")
    batch = (case.inputs, case.targets)
    plain, limited = (hessian(case.model, case.loss_fn, batch, memory_limit=limit) for limit in (None, 10**9))
    assert torch.equal(plain.to_dense(), limited.to_dense())
    assert len(limited._engine._kept) == 1
    limited.release()
    assert not limited._engine._kept


def test_sequences_of_different_lengths_are_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("attention")
    long = torch.randn(6, 40, 4, dtype=torch.float64)
    batches = [(case.inputs, case.targets), (long, case.targets)]
    operator, sizes = _built(monkeypatch, hessian, case.model, case.loss_fn, batches, memory_limit=600_000)
    vector = torch.randn(operator.shape[0], dtype=torch.float64)
    parts = [dense_hessian(case.model, case.loss_fn, x, y) for x, y in batches]
    assert relative_error(operator @ vector, (parts[0] + parts[1]) @ vector / 2) < 1e-12
    assert sum(sizes) + 6 in (6, 12)
    assert max(sizes) < 6  # the long ones do not fit at once


@pytest.mark.parametrize("make", [hessian, ggn])
def test_a_checkpointed_model_is_measured_with_what_it_computes_again(make: Any) -> None:
    torch.manual_seed(1)
    body = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()).double()
    head = nn.Linear(64, 3).double()

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body, head

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.body, x, use_reentrant=False))  # type: ignore[no-any-return]

    model = Checkpointed()
    batch = (torch.randn(200, 8, dtype=torch.float64), torch.randint(0, 3, (200,)))
    whole = make(nn.Sequential(body, head), functional.cross_entropy, batch)
    vector = torch.randn(whole.shape[0], dtype=torch.float64)
    limit = 700_000
    operator = make(model, functional.cross_entropy, batch, memory_limit=limit)
    products: list[Tensor] = []
    assert measure(lambda: products.append(operator @ vector)).peak <= limit + vector.nbytes
    assert relative_error(products[0], whole @ vector) < 1e-12


def test_eigenvalues_of_chunks() -> None:
    case = make_case("convnet")
    operator = hessian(case.model, case.loss_fn, (case.inputs, case.targets), chunk_size=3)
    expected = torch.linalg.eigvalsh(dense_hessian(case.model, case.loss_fn, case.inputs, case.targets))
    values = eigsh(operator, 3, "largest", tol=1e-10).values
    assert relative_error(values, expected.flip(0)[:3]) < 1e-9


def test_measured_bytes_are_those_of_the_tensors_alive() -> None:
    def run() -> Tensor:
        first = torch.ones(1000, dtype=torch.float64)
        second = first.view(10, 100) + 1  # a view is no new memory
        second.add_(first.view(10, 100))
        del first
        third = second.sum(0)
        del second
        return third

    usage = measure(run)
    assert usage.peak == 16_000
    assert usage.kept == 800
