from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from kronfac.operators import CurvatureOperator, ggn, hessian
from tests.operators.cases import CASES, Case, dense_ggn, dense_hessian, difference_hessian, make_case, relative_error
from tests.operators.state import unchanged


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_products_equal_the_dense_hessian(name: str, dtype: torch.dtype) -> None:
    case = make_case(name, dtype)
    operator = hessian(case.model, case.loss_fn, (case.inputs, case.targets))
    columns = torch.randn(operator.shape[0], 3, dtype=dtype)
    product = operator @ columns
    exact = case.to(torch.float64)
    dense = dense_hessian(exact.model, exact.loss_fn, exact.inputs, exact.targets)
    assert operator.shape == tuple(dense.shape)
    assert product.dtype == dtype
    assert relative_error(product, dense @ columns.double()) < (1e-10 if dtype == torch.float64 else 1e-5)


@given(
    name=st.sampled_from(sorted(CASES)),
    kind=st.sampled_from(["hessian", "ggn"]),
    cuts=st.lists(st.integers(0, 6), max_size=3),
    form=st.sampled_from(["list", "loader"]),
    reduction=st.sampled_from(["mean", "sum"]),
    keep_graph=st.sampled_from([None, False, True]),
    chunk_size=st.sampled_from([None, 1, 3]),
    columns=st.integers(0, 3),
    subset=st.booleans(),
)
def test_every_combination_of_options(
    name: str,
    kind: str,
    cuts: list[int],
    form: str,
    reduction: str,
    keep_graph: bool | None,
    chunk_size: int | None,
    columns: int,
    subset: bool,
) -> None:
    case = make_case(name)
    case.model.train()
    edges = [0, *sorted(cuts), len(case.inputs)]
    batches = [(case.inputs[low:high], case.targets[low:high]) for low, high in pairwise(edges)]
    data = batches if form == "list" else DataLoader(batches, batch_size=None)
    names = [name for name, _ in case.model.named_parameters()][::-2] if subset else None
    options: dict[str, Any] = {"reduction": reduction, "keep_graph": keep_graph, "chunk_size": chunk_size}

    def summed(output: Tensor, target: Tensor) -> Tensor:
        return case.loss_fn(output, target) * len(output)

    make, oracle = (hessian, dense_hessian) if kind == "hessian" else (ggn, dense_ggn)
    loss = case.loss_fn if reduction == "mean" else summed
    expected = oracle(case.model, loss, case.inputs, case.targets, names)
    if form == "loader" and keep_graph:
        with pytest.raises(ValueError, match="keep_graph: a loader"):
            make(case.model, loss, data, names, keep_graph=True)
        return
    with unchanged(case.model):
        operator = make(case.model, loss, data, names, **options)
        vectors = torch.randn(operator.shape[0], columns, dtype=torch.float64, generator=torch.Generator())
        product = operator @ vectors
        again = operator @ vectors
    assert product.shape == vectors.shape
    assert torch.equal(product, again)
    if columns:
        assert relative_error(product, expected @ vectors) < 1e-10


@pytest.mark.parametrize("make", [hessian, ggn])
def test_short_last_batch_counts_by_its_size(make: object) -> None:
    case = make_case("mlp")
    dataset = TensorDataset(case.inputs, case.targets)
    loader = DataLoader(dataset, batch_size=4)  # 4, 4, 3
    whole = make(case.model, case.loss_fn, (case.inputs, case.targets)).to_dense()  # type: ignore[operator]
    assert relative_error(make(case.model, case.loss_fn, loader).to_dense(), whole) < 1e-12  # type: ignore[operator]
    parts = [make(case.model, case.loss_fn, batch).to_dense() for batch in loader]  # type: ignore[operator]
    assert relative_error(torch.stack(parts).mean(0), whole) > 1e-3  # what the mean of batch means would give


def test_batch_size_weighs_tokens() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)).double()
    tokens = torch.randint(0, 7, (6, 5))
    targets = torch.randint(0, 7, (6, 5))
    targets[2:, 2:] = -100

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=-100)

    batches = [(tokens[:2], targets[:2]), (tokens[2:], targets[2:])]
    operator = hessian(model, loss, batches, batch_size=lambda _, target: int((target != -100).sum()))
    assert relative_error(operator.to_dense(), dense_hessian(model, loss, tokens, targets)) < 1e-12
    assert relative_error(hessian(model, loss, batches).to_dense(), operator.to_dense()) > 1e-3


def test_linear_regression_in_closed_form() -> None:
    inputs, targets = torch.randn(12, 3, dtype=torch.float64), torch.randn(12, 2, dtype=torch.float64)
    model = nn.Linear(3, 2).double()
    extended = torch.cat([inputs, torch.ones(12, 1, dtype=torch.float64)], dim=1)
    # mse_loss averages over examples and outputs: (2 / (N C)) XᵀX per output, weights in row-major order, then biases.
    gram = extended.mT @ extended * 2 / 24
    expected = torch.zeros(8, 8, dtype=torch.float64)
    for output in range(2):
        place = [3 * output, 3 * output + 1, 3 * output + 2, 6 + output]
        expected[torch.tensor(place)[:, None], torch.tensor(place)] = gram
    for make in (hessian, ggn):
        assert relative_error(make(model, functional.mse_loss, (inputs, targets)).to_dense(), expected) < 1e-12


def test_softmax_regression_in_closed_form() -> None:
    inputs, targets = torch.randn(10, 4, dtype=torch.float64), torch.randint(0, 3, (10,))
    model = nn.Linear(4, 3, bias=False).double()
    probabilities = model(inputs).softmax(1).detach()
    expected = torch.zeros(12, 12, dtype=torch.float64)
    for example, p in zip(inputs, probabilities, strict=True):
        expected += torch.kron(torch.diag(p) - torch.outer(p, p), torch.outer(example, example)) / 10
    for make in (hessian, ggn):
        assert relative_error(make(model, functional.cross_entropy, (inputs, targets)).to_dense(), expected) < 1e-12


def test_equals_curvlinops() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    case = make_case("convnet")
    batches = [(case.inputs[:5], case.targets[:5]), (case.inputs[5:], case.targets[5:])]
    parameters = list(case.model.parameters())
    vector = torch.randn(sum(parameter.numel() for parameter in parameters), dtype=torch.float64)
    for make, peer in ((hessian, curvlinops.HessianLinearOperator), (ggn, curvlinops.GGNLinearOperator)):
        theirs = peer(case.model.eval(), nn.CrossEntropyLoss(), parameters, batches)
        assert relative_error(make(case.model, case.loss_fn, batches) @ vector, theirs @ vector) < 1e-10


@pytest.mark.parametrize("select", ["names", "tensors", "module", "mixed"])
def test_chosen_parameters(select: str) -> None:
    case = make_case("mlp")
    order = ["2.weight", "2.bias"] if select == "module" else ["2.bias", "0.weight"]
    parameters = dict(case.model.named_parameters())
    chosen = {
        "names": order,
        "tensors": [parameters[name] for name in order],
        "module": ["2"],
        "mixed": ["2.bias", parameters["0.weight"]],
    }[select]
    operator = hessian(case.model, case.loss_fn, (case.inputs, case.targets), chosen)
    assert operator.names == tuple(order)
    expected = dense_hessian(case.model, case.loss_fn, case.inputs, case.targets, order)
    assert relative_error(operator.to_dense(), expected) < 1e-12


def test_frozen_parameters_are_left_out_or_named() -> None:
    case = make_case("mlp")
    case.model[0].weight.requires_grad_(False)  # type: ignore[index,union-attr,operator]
    with unchanged(case.model):
        free = hessian(case.model, case.loss_fn, (case.inputs, case.targets))
        named = hessian(case.model, case.loss_fn, (case.inputs, case.targets), ["0.weight"])
        dense = named.to_dense()
    assert free.names == ("0.bias", "2.weight", "2.bias")
    expected = dense_hessian(case.model, case.loss_fn, case.inputs, case.targets, ["0.weight"])
    assert relative_error(dense, expected) < 1e-12


class _Partly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(3, 2)
        self.unused = nn.Linear(3, 4)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.used(x)) * self.scale


@pytest.mark.parametrize("make", [hessian, ggn])
def test_unused_parameters_have_no_curvature(make: object) -> None:
    model = _Partly().double()
    inputs, targets = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    oracle = dense_hessian if make is hessian else dense_ggn
    operator = make(model, functional.mse_loss, (inputs, targets))  # type: ignore[operator]
    assert relative_error(operator.to_dense(), oracle(model, functional.mse_loss, inputs, targets)) < 1e-12
    blocks = operator.blocks()
    assert sorted(blocks) == ["", "unused", "used"]
    assert blocks["unused"].to_dense().count_nonzero() == 0
    rebuilt = make(model, functional.mse_loss, (inputs, targets), keep_graph=False)  # type: ignore[operator]
    assert rebuilt.blocks()["unused"].to_dense().count_nonzero() == 0


@pytest.mark.parametrize("make", [hessian, ggn])
@pytest.mark.parametrize("keep_graph", [True, False])
def test_blocks_are_the_diagonal_blocks(make: object, keep_graph: bool) -> None:
    case = make_case("convnet")
    data = [(case.inputs[:3], case.targets[:3]), (case.inputs[3:], case.targets[3:])]
    operator = make(case.model, case.loss_fn, data, keep_graph=keep_graph)  # type: ignore[operator]
    dense = operator.to_dense()
    first = 0
    for module, block in operator.blocks().items():
        last = first + block.shape[0]
        assert all(name.startswith(module + ".") for name in block.names)
        assert relative_error(block.to_dense(), dense[first:last, first:last]) < 1e-12
        first = last
    assert first == operator.shape[0]
    inner = operator.blocks()["0"].blocks()["0"]
    assert torch.equal(inner.to_dense(), operator.blocks()["0"].to_dense())


def test_vectors_in_all_forms() -> None:
    case = make_case("mlp")
    operator = hessian(case.model, case.loss_fn, (case.inputs, case.targets))
    flat = torch.randn(operator.shape[0], dtype=torch.float64)
    product = operator @ flat
    parts = list(flat.split([parameter.numel() for parameter in case.model.parameters()]))
    shaped = [part.view_as(parameter) for part, parameter in zip(parts, case.model.parameters(), strict=True)]
    result = operator @ shaped
    assert [part.shape for part in result] == [parameter.shape for parameter in case.model.parameters()]
    assert torch.equal(torch.cat([part.reshape(-1) for part in result]), product)
    assert torch.equal((operator @ flat[:, None])[:, 0], product)
    strided = torch.stack([flat, flat], dim=1)[:, 0]
    assert torch.equal(operator @ strided, product)
    assert not product.requires_grad
    assert not (operator @ flat.clone().requires_grad_()).requires_grad


def test_to_scipy() -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    case = make_case("mlp")
    operator = hessian(case.model, case.loss_fn, (case.inputs, case.targets))
    wrapped = operator.to_scipy()
    dense = operator.to_dense().numpy()
    assert wrapped.dtype == np.float64
    vector = np.random.default_rng(0).standard_normal(operator.shape[0])
    for result in (
        wrapped @ vector,
        wrapped.T @ vector,
        wrapped.matmat(vector[:, None])[:, 0],
        wrapped.rmatvec(vector),
    ):
        np.testing.assert_allclose(result, dense @ vector, atol=1e-12)
    values = linalg.eigsh(wrapped, 3, v0=vector, return_eigenvectors=False)
    largest = np.linalg.eigvalsh(dense)
    np.testing.assert_allclose(
        sorted(np.abs(values)), sorted(np.abs(largest[np.argsort(-np.abs(largest))[:3]])), atol=1e-10
    )


class _TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"logits": torch.tanh(self.first(a)) * self.second(b), "shape": torch.tensor(b.shape)}


@pytest.mark.parametrize("make", [hessian, ggn])
def test_inputs_as_tuple_list_or_dict(make: object) -> None:
    model = _TwoInputs().double()
    a, b = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    targets = torch.randint(0, 3, (5,))

    def loss(output: dict[str, Tensor], target: Tensor) -> Tensor:
        return functional.cross_entropy(output["logits"], target)

    forms = [((a, b), targets), [[a, b], targets], ({"a": a, "b": b}, targets), [((a, b), targets)]]
    results = [make(model, loss, form).to_dense() for form in forms]  # type: ignore[operator]
    assert all(torch.equal(results[0], result) for result in results[1:])
    assert relative_error(results[0], results[0].mT) < 1e-12
    assert results[0].abs().max() > 1e-3


def test_penalty_taken_from_the_model_counts() -> None:
    case = make_case("mlp")

    def penalised(output: Tensor, target: Tensor) -> Tensor:
        return case.loss_fn(output, target) + 0.1 * sum(p.square().sum() for p in case.model.parameters())

    plain = dense_hessian(case.model, case.loss_fn, case.inputs, case.targets)
    operator = hessian(case.model, penalised, (case.inputs, case.targets))
    assert relative_error(operator.to_dense(), plain + 0.2 * torch.eye(len(plain), dtype=torch.float64)) < 1e-12


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3, bias=False)
        self.decoder = nn.Linear(3, 3, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.encoder(x)))


class _Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
        self.on = True

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False) if self.on else self.body(x)  # type: ignore[no-any-return]


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x[:, None, :].expand(-1, 4, -1))[0].sum(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [hessian, ggn])
@pytest.mark.parametrize("kind", ["tied", "checkpointed", "recurrent", "multihead", "compiled"])
def test_models_with_a_twist(make: object, kind: str) -> None:
    torch.manual_seed(5)
    inputs = torch.randn(6, 3, dtype=torch.float64)
    model: nn.Module
    if kind == "tied":
        model = _Tied()
    elif kind == "checkpointed":
        model = _Checkpointed()
    elif kind == "recurrent":
        model = _Recurrent()
    elif kind == "multihead":
        layer = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True)
        model = nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Linear(1, 4), layer, nn.Flatten())
    else:
        model = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    model = model.double()
    targets = torch.randn_like(model.eval()(inputs))
    model.train()
    if isinstance(model, _Checkpointed):
        model.on = False
    oracle = difference_hessian if make is hessian else dense_ggn
    expected = oracle(model, functional.mse_loss, inputs, targets)
    if isinstance(model, _Checkpointed):
        model.on = True
    subject = torch.compile(model) if kind == "compiled" else model
    with unchanged(model):
        operator = make(subject, functional.mse_loss, (inputs, targets))  # type: ignore[operator]
        dense = operator.to_dense()
    assert relative_error(dense, expected) < (1e-8 if make is hessian else 1e-10)
    assert relative_error(dense, dense.mT) < 1e-12


def test_weight_norm_is_right_or_refused() -> None:
    torch.manual_seed(5)
    model = nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3)).double()
    inputs, targets = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    expected = dense_ggn(model, functional.mse_loss, inputs, targets)
    assert relative_error(ggn(model, functional.mse_loss, (inputs, targets)).to_dense(), expected) < 1e-10

    def outcome() -> Tensor | str:
        try:
            return hessian(model, functional.mse_loss, (inputs, targets)).to_dense()
        except ValueError as error:
            return str(error)

    dense = outcome()
    if isinstance(dense, str):  # torch 2.13 gets the double backward of the fused operator wrong
        assert "the second derivative is not symmetric" in dense
    else:
        assert relative_error(dense, difference_hessian(model, functional.mse_loss, inputs, targets)) < 1e-8


class _HalfDetached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)  # type: ignore[attr-defined]
        return a * b

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad * b.detach(), grad * a


class _Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return _HalfDetached.apply(self.a(x), self.b(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrong_double_backward_is_refused(dtype: torch.dtype) -> None:
    inputs, targets = torch.randn(6, 3, dtype=dtype), torch.randn(6, 2, dtype=dtype)
    with pytest.raises(ValueError, match="second derivative is not symmetric"):
        hessian(_Product().to(dtype), functional.mse_loss, (inputs, targets))


@pytest.mark.parametrize("make", [hessian, ggn])
def test_follows_the_model(make: object) -> None:
    case = make_case("batchnorm")
    case.model.train()
    operator = make(case.model, case.loss_fn, (case.inputs, case.targets))  # type: ignore[operator]
    oracle = dense_hessian if make is hessian else dense_ggn

    def check() -> None:
        expected = oracle(case.model, case.loss_fn, case.inputs, case.targets)
        assert relative_error(operator.to_dense(), expected) < 1e-10

    check()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.5)
    case.loss_fn(case.model(case.inputs), case.targets).backward()
    optimizer.step()
    check()  # parameters stepped, running statistics updated
    case.model[0].weight.data.mul_(1.5)  # type: ignore[index,union-attr,operator]
    check()  # written past the version counter
    case.model(case.inputs)
    check()  # running statistics alone
    operator.release()
    check()


def test_half_precision_parameters_have_float32_vectors() -> None:
    case = make_case("mlp", torch.bfloat16)
    operator = hessian(case.model, case.loss_fn, (case.inputs, case.targets))
    assert operator.dtype == torch.float32
    vector = torch.randn(operator.shape[0])
    expected = dense_hessian(case.model.double(), case.loss_fn, case.inputs.double(), case.targets) @ vector.double()
    coarse = hessian(case.model.bfloat16(), case.loss_fn, (case.inputs, case.targets)) @ vector
    assert coarse.dtype == torch.float32
    assert relative_error(coarse, expected) < 0.1


def test_works_where_gradients_are_off() -> None:
    case = make_case("mlp")
    expected = dense_hessian(case.model, case.loss_fn, case.inputs, case.targets)
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context, unchanged(case.model):
            inputs = case.inputs.clone()  # an inference tensor in inference mode
            dense = hessian(case.model, case.loss_fn, (inputs, case.targets)).to_dense()
        assert relative_error(dense, expected) < 1e-12


def test_repr_names_kind_and_size() -> None:
    case = make_case("mlp")
    operator: CurvatureOperator = ggn(case.model, case.loss_fn, (case.inputs, case.targets))
    assert repr(operator) == "<ggn operator 57 x 57, torch.float64, cpu>"


def test_infinite_second_derivative_is_named() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(model.weight)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output.abs().sum() + 0.0 * target.sum()).pow(1.5)

    case = Case("root", model, loss, torch.ones(3, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    operator = hessian(case.model, case.loss_fn, (case.inputs, case.targets))
    with pytest.raises(ValueError, match="second derivative is infinite"):
        operator @ torch.ones(2, dtype=torch.float64)


@pytest.mark.parametrize("magnitude", [10, 30, 60, 100])
def test_round_off_is_not_taken_for_a_wrong_derivative(magnitude: int) -> None:
    """A saturated softmax in float32: the products are noisy, down to underflow, which is no fault of the model's."""
    model = nn.Linear(100, 10)
    with torch.no_grad():
        model.weight.mul_(magnitude)
    inputs = 10 * torch.randn(16, 100)
    operator = hessian(model, functional.cross_entropy, (inputs, model(inputs).argmax(1)))
    assert torch.isfinite(operator @ torch.randn(operator.shape[0])).all()
