from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kronfac.linalg import SymmetricOperator, check_operator
from tests.linalg.matrices import Counted


def test_what_is_accepted() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0]))
    operators: list[tuple[Any, torch.dtype]] = [
        (matrix, torch.float32),
        (matrix.double(), torch.float64),
        (matrix.bfloat16(), torch.float32),
        (matrix.numpy(), torch.float32),
        (Counted(matrix.double()), torch.float64),
    ]
    for operator, dtype in operators:
        checked = check_operator(operator, "caller")
        assert (checked.size, checked.dtype) == (2, dtype)
        vector = torch.ones(2, dtype=dtype)
        torch.testing.assert_close(checked.matvec(vector), torch.tensor([1.0, 2.0], dtype=dtype))
    assert isinstance(matrix, SymmetricOperator)


def test_an_operator_that_returns_its_argument() -> None:
    class Identity:
        shape = (3, 3)

        def __matmul__(self, vectors: torch.Tensor) -> torch.Tensor:
            return vectors

    vector = torch.ones(3)
    check_operator(Identity(), "caller").matvec(vector).zero_()
    assert vector.tolist() == [1.0, 1.0, 1.0]


def test_what_is_refused() -> None:
    class Numpy:
        shape = (2, 2)
        dtype = np.dtype("float64")

        def __matmul__(self, vectors: Any) -> Any:
            return vectors

    cases: list[tuple[Any, type[Exception], str]] = [
        (3, TypeError, "expected an operator with `shape` and `@`"),
        (torch.ones(2, 3), ValueError, r"expected a square operator \(n, n\) with n >= 1, got shape \(2, 3\)"),
        (torch.ones(0, 0), ValueError, "n >= 1"),
        (torch.ones(2), ValueError, "square"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), ValueError, "is not symmetric"),
        (torch.full((2, 2), float("nan")), ValueError, "NaN or infinity"),
        (torch.ones(2, 2, dtype=torch.int64), TypeError, "real floating-point type, got torch.int64"),
        (torch.ones(2, 2, dtype=torch.complex64), TypeError, "real floating-point type"),
        (Numpy(), TypeError, "not a torch dtype"),
    ]
    for operator, error, match in cases:
        with pytest.raises(error, match=match) as caught:
            check_operator(operator, "caller")
        assert str(caught.value).startswith("caller: ")


def test_products_are_checked() -> None:
    class Wrong:
        shape = (2, 2)

        def __init__(self, answer: Any) -> None:
            self.answer = answer

        def __matmul__(self, vectors: torch.Tensor) -> Any:
            return self.answer

    for answer, match in (
        (torch.ones(3), r"expected a tensor of shape \(2,\), got \(3,\)"),
        (None, "got NoneType"),
        (torch.tensor([1.0, float("inf")]), "not finite"),
    ):
        with pytest.raises(ValueError, match=match):
            check_operator(Wrong(answer), "caller").matvec(torch.ones(2))
