"""Bad input gets an error that names the argument, and leaves the model alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from kronfac.operators import ggn, hessian
from tests.operators.cases import make_case
from tests.operators.state import unchanged

MAKERS = [hessian, ggn]


@pytest.fixture
def dataset() -> TensorDataset:
    return TensorDataset(torch.randn(6, 3), torch.randint(0, 2, (6,)))


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.fixture
def batch(dataset: TensorDataset) -> tuple[Tensor, Tensor]:
    return dataset.tensors[0], dataset.tensors[1]


def _refused(
    make: Any, error: type[Exception], match: str, model: Any, loss_fn: Any, data: Any, **options: Any
) -> None:
    watched = model if isinstance(model, nn.Module) else nn.Linear(1, 1)
    with unchanged(watched), pytest.raises(error, match=match) as caught:
        make(model, loss_fn, data, **options)
    assert str(caught.value).startswith(f"kronfac.operators.{make.__name__}: ")


@pytest.mark.parametrize("make", MAKERS)
def test_shuffling_loaders(make: Any, dataset: TensorDataset, model: nn.Module) -> None:
    loaders = [
        DataLoader(dataset, batch_size=2, shuffle=True),
        DataLoader(dataset, batch_size=2, sampler=SubsetRandomSampler(range(6))),
        DataLoader(dataset, batch_size=2, sampler=WeightedRandomSampler([1.0] * 6, 6)),
        DataLoader(dataset, batch_sampler=BatchSampler(RandomSampler(dataset), 2, drop_last=False)),
    ]
    for loader in loaders:
        _refused(make, ValueError, "DataLoader shuffles.*shuffle=False", model, functional.cross_entropy, loader)
    ordered = DataLoader(dataset, batch_sampler=BatchSampler(SequentialSampler(dataset), 4, drop_last=False))
    assert make(model, functional.cross_entropy, ordered).shape == (26, 26)


def test_data_that_change_between_products(model: nn.Module) -> None:
    class Drifting:
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            generator = torch.Generator().manual_seed(0 if self.passes < 4 else 1)
            yield torch.randn(4, 3, generator=generator), torch.zeros(4, dtype=torch.int64)

    operator = hessian(model, functional.cross_entropy, Drifting())
    vector = torch.ones(operator.shape[0])
    operator @ vector
    with unchanged(model), pytest.raises(ValueError, match="batch 0 differs from the first pass"):
        operator @ vector


@pytest.mark.parametrize("change", ["longer", "shorter"])
def test_data_of_another_length(model: nn.Module, change: str) -> None:
    batches = [(torch.randn(2, 3), torch.zeros(2, dtype=torch.int64)) for _ in range(3)]

    class Source:
        def __init__(self) -> None:
            self.used = batches[:2]

        def __iter__(self) -> Any:
            return iter(self.used)

    source = Source()
    operator = hessian(model, functional.cross_entropy, source)
    source.used = batches if change == "longer" else batches[:1]
    with pytest.raises(ValueError, match="differs from the first pass"):
        operator @ torch.ones(operator.shape[0])


@pytest.mark.parametrize("keep_graph", [True, False])
def test_batch_modified_in_place(model: nn.Module, batch: tuple[Tensor, Tensor], keep_graph: bool) -> None:
    operator = hessian(model, functional.cross_entropy, batch, keep_graph=keep_graph)
    batch[0][0] += 1
    with pytest.raises(ValueError, match="batch 0 was modified"):
        operator @ torch.ones(operator.shape[0])


@pytest.mark.parametrize("make", MAKERS)
def test_forms_of_data(make: Any, dataset: TensorDataset, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    empty = (x[:0], y[:0])
    cases: list[tuple[Any, type[Exception], str]] = [
        (dataset, TypeError, "a Dataset yields single examples"),
        (iter([batch]), TypeError, "can be read only once"),
        (x, TypeError, r"expected \(inputs, targets\)"),
        ({"x": x}, TypeError, r"expected \(inputs, targets\)"),
        (3, TypeError, r"expected \(inputs, targets\)"),
        ((x, y, y), ValueError, "a tuple is one batch"),
        ([(x, y, y)], TypeError, r"batch 0: expected a pair \(inputs, targets\), got tuple of 3"),
        ([(x, y), (x, y), x], TypeError, "batch 2: expected a pair"),
        ([], ValueError, "at least one example"),
        ([empty], ValueError, "at least one example"),
        ((torch.tensor(1.0), y), ValueError, "cannot tell the number of examples"),
    ]
    for data, error, match in cases:
        _refused(make, error, match, model, functional.cross_entropy, data)
    whole = make(model, functional.cross_entropy, [(x, y), empty]).to_dense()
    torch.testing.assert_close(whole, make(model, functional.cross_entropy, batch).to_dense())


@pytest.mark.parametrize("make", MAKERS)
def test_losses(make: Any, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda o, t: functional.cross_entropy(o, t, reduction="none"), ValueError, r"scalar tensor, got shape \(6,\)"),
        (lambda o, t: o.sum().item(), ValueError, "scalar tensor, got float"),
        (lambda o, t: o.sum() * float("nan"), ValueError, "the loss is nan"),
        (lambda o, t: o.sum() / 0.0, ValueError, "the loss is -?inf"),
        (lambda o, t: (o > 0).sum(), TypeError, "real floating-point loss, got torch.int64"),
        (lambda o, t: functional.cross_entropy(o.detach(), t), ValueError, "depends on none of the chosen parameters"),
        (lambda o, t: functional.cross_entropy(functional.dropout(o), t), ValueError, "random numbers were drawn"),
        ("cross_entropy", TypeError, "loss_fn: expected a callable"),
    ]
    for loss_fn, error, match in cases:
        _refused(make, error, match, model, loss_fn, batch)


@pytest.mark.parametrize("make", MAKERS)
def test_penalty_from_references_of_its_own(make: Any, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    parameters = list(model.parameters())

    def captured(output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output, target) + sum(p.square().sum() for p in parameters)

    _refused(make, ValueError, "through references of its own", model, captured, batch)


def test_ggn_of_a_penalised_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    def penalised(output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output, target) + sum(p.square().sum() for p in model.parameters())

    _refused(ggn, ValueError, "other than through the model's output", model, penalised, batch)


def test_ggn_of_an_opaque_output(batch: tuple[Tensor, Tensor]) -> None:
    class Opaque(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            holder = nn.Module()
            holder.logits = super().forward(x)
            return holder

    _refused(ggn, TypeError, "model: expected a tensor or a tuple", Opaque(3, 2), lambda o, t: o.logits.sum(), batch)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]


def test_losses_that_cannot_be_differentiated_twice(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    for make in MAKERS:
        _refused(
            make,
            RuntimeError,
            "cannot be differentiated twice",
            model,
            lambda output, target: _Once.apply(output).mean(),
            batch,
        )


@pytest.mark.parametrize("make", MAKERS)
def test_models(make: Any, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    class Random(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return functional.dropout(super().forward(x), 0.5, training=True)

    class Frozen(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    loss = functional.cross_entropy
    _refused(make, TypeError, "model: expected a torch.nn.Module, got function", lambda x: x, loss, batch)
    _refused(make, ValueError, "random numbers were drawn", Random(3, 2), loss, batch)
    _refused(make, ValueError, "depends on none of the chosen parameters", Frozen(3, 2), loss, batch)
    _refused(make, TypeError, "pass model.module", nn.DataParallel(model), loss, batch)
    _refused(make, ValueError, "no parameter requires grad", nn.Tanh(), loss, batch)
    lazy = nn.LazyLinear(2)
    with pytest.raises(ValueError, match="has no shape yet"):
        make(lazy, loss, batch)


@pytest.mark.parametrize("make", MAKERS)
def test_batch_statistics(make: Any) -> None:
    case = make_case("batchnorm")
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(27, 2)
    ).double()
    batches = [(case.inputs[:4], case.targets[:4]), (case.inputs[4:], case.targets[4:])]
    _refused(make, ValueError, "1 normalises with the statistics of the batch", model, case.loss_fn, batches)
    with unchanged(model):  # one batch is a well-defined function
        dense = make(model, case.loss_fn, (case.inputs, case.targets)).to_dense()
    torch.testing.assert_close(dense, dense.mT)


@pytest.mark.parametrize("make", MAKERS)
def test_parameters(make: Any, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    weight = next(model.parameters())
    cases: list[tuple[Any, type[Exception], str]] = [
        (["0.wieght"], ValueError, "no parameter or module '0.wieght'; close: 0.weight"),
        ([torch.zeros(4, 3)], ValueError, "is not a parameter of the model"),
        (["0.weight", weight], ValueError, "chosen more than once: 0.weight"),
        (["0", "0.bias"], ValueError, "chosen more than once: 0.bias"),
        ([], ValueError, "at least one parameter"),
        (["1"], ValueError, "no parameter or module '1'"),
        ("0.weight", TypeError, "wrap a single one in a list"),
        (weight, TypeError, "wrap a single one in a list"),
        ([0], TypeError, "expected names or tensors, got int"),
    ]
    for params, error, match in cases:
        _refused(make, error, match, model, functional.cross_entropy, batch, params=params)


@pytest.mark.parametrize("make", MAKERS)
def test_options(make: Any, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    loss = functional.cross_entropy
    _refused(make, ValueError, 'reduction: expected "mean" or "sum"', model, loss, batch, reduction="none")
    _refused(make, ValueError, "batch_size: expected a finite number", model, loss, batch, batch_size=lambda x, y: -1)


def test_vectors(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    operator = hessian(model, functional.cross_entropy, batch)
    n = operator.shape[0]
    cases: list[tuple[Any, type[Exception], str]] = [
        (torch.ones(n, dtype=torch.float64), TypeError, r"expected torch.float32, got torch.float64; convert with"),
        (torch.ones(n, dtype=torch.int64), TypeError, "expected torch.float32, got torch.int64"),
        (torch.ones(n + 1), ValueError, rf"expected shape \({n},\) or \({n}, k\), got \({n + 1},\)"),
        (torch.ones(n, 1, 1), ValueError, "expected shape"),
        (torch.ones(2, n), ValueError, "expected shape"),
        (torch.ones(n, device="meta"), ValueError, "expected a tensor on cpu, got meta"),
        (torch.ones(n).numpy(), TypeError, r"got ndarray; use op.to_scipy\(\)"),
        ([torch.ones(n)], ValueError, "expected tensors of the parameters' shapes"),
        ([1.0], ValueError, "got .*float"),
    ]
    for vector, error, match in cases:
        with unchanged(model), pytest.raises(error, match=match):
            operator @ vector


@pytest.mark.parametrize("make", MAKERS)
def test_sparse_gradients(make: Any) -> None:
    torch.manual_seed(0)
    data = torch.randint(0, 5, (6, 3)), torch.randint(0, 2, (6,))
    words = nn.Embedding(5, 2, sparse=True)
    model = nn.Sequential(words, nn.Flatten(), nn.Linear(6, 2))
    with pytest.raises(
        ValueError, match=r"model: 0 is an Embedding\(sparse=True\), .* set its attribute sparse = False"
    ):
        make(model, functional.cross_entropy, data)
    without = make(model, functional.cross_entropy, data, ["2"])
    words.sparse = False
    whole = make(model, functional.cross_entropy, data)
    torch.testing.assert_close(whole.blocks()["2"].to_dense(), without.to_dense())
    assert whole.shape[0] == 10 + without.shape[0]
