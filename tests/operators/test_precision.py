"""The type in which a model is run apart from the one in which it is stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.operators import fisher, ggn, hessian
from kronfac.spectrum import eigsh
from tests.operators.cases import Case, dense_ggn, dense_hessian, make_case, relative_error
from tests.operators.state import unchanged

ORACLES: list[tuple[Any, Any]] = [(hessian, dense_hessian), (ggn, dense_ggn)]


def _wide(case: Case) -> Case:
    """The case in float64 with the numbers that it has in its own type."""
    return make_case(case.name).to(case.inputs.dtype).to(torch.float64)


@pytest.mark.parametrize(("make", "oracle"), ORACLES)
@pytest.mark.parametrize("name", ["mlp", "regression", "batchnorm", "attention"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_run_in_float32(make: Any, oracle: Any, name: str, dtype: torch.dtype) -> None:
    case = make_case(name, dtype)
    with unchanged(case.model):
        operator = make(case.model, case.loss_fn, (case.inputs, case.targets))
        vector = torch.ones(operator.shape[0])
        product = operator @ vector
    assert operator.dtype == product.dtype == torch.float32
    exact = _wide(case)
    expected = oracle(exact.model, exact.loss_fn, exact.inputs, exact.targets) @ vector.double()
    assert relative_error(product, expected) < 1e-4
    own = make(case.model, case.loss_fn, (case.inputs, case.targets), dtype="model")
    assert own.dtype == torch.float32
    assert 1e-4 < relative_error(own @ vector, expected) < 0.3


@pytest.mark.parametrize(("make", "oracle"), ORACLES)
@pytest.mark.parametrize("name", ["mlp", "regression", "batchnorm"])
def test_float64_certifies_what_float32_found(make: Any, oracle: Any, name: str) -> None:
    case = make_case(name, torch.float32)
    with unchanged(case.model):
        operator = make(case.model, case.loss_fn, (case.inputs, case.targets), dtype=torch.float64)
        dense = operator.to_dense()
    assert operator.dtype == dense.dtype == torch.float64
    exact = _wide(case)
    assert relative_error(dense, oracle(exact.model, exact.loss_fn, exact.inputs, exact.targets)) < 1e-12
    result = eigsh(operator, 2, tol=1e-12)
    assert result.converged.all()
    assert result.vectors.dtype == torch.float64


def test_a_narrower_type_where_it_is_asked_for() -> None:
    case = make_case("mlp")
    operator = hessian(case.model, case.loss_fn, (case.inputs, case.targets), dtype=torch.bfloat16)
    vector = torch.ones(operator.shape[0])
    assert (operator @ vector).dtype == torch.float32
    expected = dense_hessian(case.model, case.loss_fn, case.inputs, case.targets) @ vector.double()
    assert 1e-4 < relative_error(operator @ vector, expected) < 0.3


def test_sums_over_batches_are_not_in_half_precision() -> None:
    """Six hundred batches of one kind: a sum in bfloat16 would stop growing at a quarter of the result."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).bfloat16()
    batch = (torch.randn(2, 3).bfloat16(), torch.tensor([0, 1]))
    one, many = (
        hessian(model, functional.cross_entropy, data, dtype="model", reduction="sum")
        for data in (batch, [batch] * 600)
    )
    vector = torch.randn(8)
    assert relative_error(many @ vector, 600 * (one @ vector).double()) < 1e-5


def test_buffers_of_the_loss_are_converted_too() -> None:
    case = make_case("mlp", torch.bfloat16)
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16))
    exact, wide_loss = _wide(case), nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    operator = hessian(case.model, loss, (case.inputs, case.targets))
    assert (
        relative_error(operator.to_dense(), dense_hessian(exact.model, wide_loss, exact.inputs, exact.targets)) < 1e-4
    )


def test_follows_a_half_precision_model() -> None:
    case = make_case("mlp", torch.bfloat16)
    operator = hessian(case.model, case.loss_fn, (case.inputs, case.targets))
    before = operator.to_dense()
    with torch.no_grad():
        case.model[0].weight.mul_(2)  # type: ignore[index,union-attr,operator]
    fresh = hessian(case.model, case.loss_fn, (case.inputs, case.targets)).to_dense()
    assert torch.equal(operator.to_dense(), fresh)
    assert not torch.equal(before, fresh)


def test_vectors_in_parts_keep_their_types() -> None:
    case = make_case("mlp", torch.bfloat16)
    operator = hessian(case.model, case.loss_fn, (case.inputs, case.targets))
    parts = [torch.ones(p.shape) for p in case.model.parameters()]
    product = operator @ parts
    assert all(part.dtype == torch.float32 for part in product)
    flat = operator @ torch.ones(operator.shape[0])
    assert torch.equal(torch.cat([part.reshape(-1) for part in product]), flat)


def test_fisher_in_another_type() -> None:
    case = make_case("mlp", torch.float32)
    exact = _wide(case)
    wide = fisher(case.model, "categorical", (case.inputs, case.targets), kind="exact", dtype=torch.float64).to_dense()
    expected = dense_ggn(exact.model, functional.cross_entropy, exact.inputs, exact.targets)
    assert relative_error(wide, expected) < 1e-12


class _Stubborn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.to(torch.bfloat16)).float()  # type: ignore[no-any-return]


def test_a_model_that_converts_by_itself() -> None:
    model = _Stubborn().bfloat16()
    batch = (torch.randn(4, 3), torch.randint(0, 2, (4,)))
    with unchanged(model), pytest.raises(RuntimeError, match=r'run in torch\.float32 .* pass dtype="model"'):
        hessian(model, functional.cross_entropy, batch)
    assert hessian(model, functional.cross_entropy, batch, dtype="model").shape == (8, 8)


def test_other_types_are_refused() -> None:
    model = nn.Linear(3, 2)
    batch = (torch.randn(4, 3), torch.randint(0, 2, (4,)))
    cases: list[tuple[Any, type[Exception], str]] = [
        (torch.int64, ValueError, "dtype: expected torch.float64, float32, bfloat16 or float16, got torch.int64"),
        (torch.float8_e4m3fn, ValueError, "dtype: expected torch.float64"),
        ("float64", TypeError, "dtype: expected a torch.dtype"),
        (float, TypeError, "dtype: expected a torch.dtype"),
    ]
    for dtype, error, match in cases:
        with pytest.raises(error, match=match):
            hessian(model, functional.cross_entropy, batch, dtype=dtype)
