"""Sums, multiples, shifts, products and blocks of operators against the same arithmetic on dense matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.linalg import cg, minres
from kronfac.operators import ParameterOperator, fisher, ggn, hessian, identity
from kronfac.spectrum import block_traces, density, eigsh, trace
from tests.operators.cases import dense_ggn, dense_hessian, make_case, relative_error
from tests.operators.state import unchanged


class Pair:
    """A Hessian and a Gauss-Newton matrix of one model, as operators and dense."""

    def __init__(self) -> None:
        case = make_case("mlp")
        self.case, self.batch = case, (case.inputs, case.targets)
        self.H = hessian(case.model, case.loss_fn, self.batch)
        self.G = ggn(case.model, case.loss_fn, self.batch)
        self.dense_H = dense_hessian(case.model, case.loss_fn, *self.batch)
        self.dense_G = dense_ggn(case.model, case.loss_fn, *self.batch)
        self.eye = torch.eye(len(self.dense_H), dtype=torch.float64)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


def vectors(size: int, columns: int = 3) -> Tensor:
    return torch.randn(size, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


# Each is applied to operators and to dense matrices.
FORMULAS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "2 H": lambda H, G, E: 2.0 * H,
    "H / 3": lambda H, G, E: H / 3,
    "-H": lambda H, G, E: -H,
    "numpy's number": lambda H, G, E: np.float64(0.5) * H,
    "H + G": lambda H, G, E: H + G,
    "difference": lambda H, G, E: 0.5 * (H - G) - G / 4,
    "sum of a list": lambda H, G, E: sum([H, G, H]),
    "with the identity": lambda H, G, E: H + 1e-2 * E,
    "one operator twice": lambda H, G, E: H + H - 3 * H,
    "nothing left": lambda H, G, E: H - H,
    "H G": lambda H, G, E: H @ G,
    "G H G": lambda H, G, E: G @ H @ G,
    "numbers in front": lambda H, G, E: (2 * G) @ (H - 0.5 * G) @ (-G / 3),
    "square": lambda H, G, E: H @ H,
    "by the identity": lambda H, G, E: E @ H @ (3 * E),
    "sum of products": lambda H, G, E: H @ G + G @ H - 2 * E,
}


@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS.keys())
def test_formulas(pair: Pair, formula: Callable[[Any, Any, Any], Any]) -> None:
    operator = formula(pair.H, pair.G, identity(pair.H))
    expected = formula(pair.dense_H, pair.dense_G, pair.eye)
    assert isinstance(operator, ParameterOperator)
    assert (operator.names, operator.shape, operator.dtype) == (pair.H.names, pair.H.shape, torch.float64)
    V = vectors(len(expected))
    with unchanged(pair.case.model):
        product = operator @ V
    scale = 1e-12 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(product, expected @ V, rtol=1e-10, atol=scale)
    torch.testing.assert_close(operator @ V[:, 0], expected @ V[:, 0], rtol=1e-10, atol=scale)
    parts = [
        part.reshape(shape) for part, shape in zip(V[:, 0].split([30, 6, 18, 3]), operator._layout.shapes, strict=True)
    ]
    torch.testing.assert_close(torch.cat([p.reshape(-1) for p in operator @ parts]), product[:, 0])
    torch.testing.assert_close(operator.mT @ V, expected.mT @ V, rtol=1e-10, atol=scale)
    wrapped = operator.to_scipy()
    np.testing.assert_allclose(wrapped @ V.numpy(), product.numpy(), rtol=1e-12, atol=scale)
    np.testing.assert_allclose(wrapped.rmatvec(V[:, 0].numpy()), (expected.mT @ V)[:, 0], rtol=1e-9, atol=scale)
    assert operator.symmetric == (float((expected - expected.mT).abs().max()) < 1e-12)
    assert (operator.mT is operator) == operator.symmetric


def test_shift_is_the_sum_with_the_identity_and_shifts_add_up(pair: Pair) -> None:
    operator = pair.H.shift(0.25).shift(-0.5)
    torch.testing.assert_close(operator.to_dense(), pair.dense_H - 0.25 * pair.eye, rtol=1e-10, atol=1e-12)
    assert repr(operator) == "<(hessian - 0.25 * identity) operator 57 x 57, torch.float64, cpu>"
    assert repr(pair.H @ (2 * pair.G)) == "<(2 * (hessian @ ggn)) operator 57 x 57, torch.float64, cpu>"


@pytest.mark.parametrize(
    "formula",
    [lambda H, G: H - 2 * G, lambda H, G: H @ G, lambda H, G: (H @ G).shift(1.0)],
    ids=["sum", "product", "both"],
)
def test_blocks(pair: Pair, formula: Callable[[Any, Any], Any]) -> None:
    operator = formula(pair.H, pair.G)
    dense = operator.to_dense()
    groups = {"ends": ["2.bias", "0.weight"], "middle": ["0.bias"]}
    for block in (operator.blocks()["2"], *operator.blocks(groups).values()):
        entries = operator.entries_of(block)
        expected = dense[entries][:, entries]
        torch.testing.assert_close(block.to_dense(), expected)
        torch.testing.assert_close(block.mT.to_dense(), expected.mT)
        inner = block.blocks({"inner": block.names[-1:]})["inner"]
        entries = operator.entries_of(inner)
        torch.testing.assert_close(inner.to_dense(), dense[entries][:, entries])
    with pytest.raises(ValueError, match="expected one of this operator's blocks"):
        operator.entries_of(formula(pair.H, pair.G).blocks()["2"])


def test_methods_take_them(pair: Pair) -> None:
    operator = 0.5 * (pair.H + pair.G).shift(2.0)
    dense = 0.5 * (pair.dense_H + pair.dense_G + 2 * pair.eye)
    values = torch.linalg.eigvalsh(dense).flip(0)
    top = eigsh(operator, 3, "largest", tol=1e-8)
    torch.testing.assert_close(top.values, values[:3], rtol=1e-8, atol=1e-10)
    sandwich = eigsh(pair.G @ pair.H @ pair.G, 2)
    expected = torch.linalg.eigvalsh(pair.dense_G @ pair.dense_H @ pair.dense_G)
    torch.testing.assert_close(
        sandwich.values, expected[expected.abs().argsort(descending=True)][:2], rtol=1e-6, atol=0
    )
    found = trace(operator, "xtrace", probes=40)
    assert abs(found.value - float(dense.trace())) <= 5 * found.stderr + 1e-9
    assert density(operator, probes=2, steps=10).products == 20
    per_layer = block_traces(operator, probes=200)["2"]
    assert abs(per_layer.trace - float(dense.diagonal()[-21:].sum())) <= 5 * per_layer.trace_stderr
    b = vectors(len(dense), 1)[:, 0]
    for solve in (cg, minres):
        torch.testing.assert_close(solve(operator, b, tolerance=1e-10).x, torch.linalg.solve(dense, b))


def test_what_needs_symmetry_refuses_a_product(pair: Pair) -> None:
    product, b = pair.H @ pair.G, vectors(57, 1)[:, 0]
    for call in (lambda: eigsh(product), lambda: trace(product), lambda: cg(product, b), lambda: minres(product, b)):
        with pytest.raises(ValueError, match=r"op: expected a symmetric operator, got <\(hessian @ ggn\) operator"):
            call()
    symmetric_part = (product + product.mT) / 2
    assert symmetric_part.symmetric
    expected = pair.dense_H @ pair.dense_G
    largest = eigsh(symmetric_part, 1, "largest", tol=1e-8).values
    torch.testing.assert_close(largest[0], torch.linalg.eigvalsh((expected + expected.mT) / 2)[-1], rtol=1e-8, atol=0)


def test_sums_over_data_of_different_operators(pair: Pair) -> None:
    """The Hessian of all examples is the weighted mean of those of two halves."""
    x, y = pair.batch
    model, loss = pair.case.model, pair.case.loss_fn
    halves = [hessian(model, loss, (x[part], y[part])) for part in (slice(0, 4), slice(4, 11))]
    mixed = (4 * halves[0] + 7 * halves[1]) / 11
    assert relative_error(mixed.to_dense(), pair.dense_H) < 1e-12
    exact = fisher(model, "categorical", pair.batch, kind="exact")
    assert relative_error((pair.H - pair.G + exact).to_dense(), pair.dense_H) < 1e-11


def test_operands_that_do_not_fit(pair: Pair) -> None:
    case, H = pair.case, pair.H
    model, loss = case.model, case.loss_fn
    part = hessian(model, loss, pair.batch, params=["0"])
    swapped = hessian(model, loss, pair.batch, params=["2", "0"])
    single = make_case("mlp", torch.float32)
    narrow = hessian(single.model, single.loss_fn, (single.inputs, single.targets))
    wide = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    other = hessian(wide, functional.cross_entropy, pair.batch)
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: H + part, ValueError, r"over the same parameters, but only the first has 2\.bias, 2\.weight"),
        (lambda: part - H, ValueError, r"hessian - hessian: .*only the second has 2\.bias"),
        (lambda: H @ swapped, ValueError, "they are in another order"),
        (lambda: H + other, ValueError, "parameters of the same shapes"),
        (lambda: H + narrow, TypeError, "operators of one type, got torch.float64 and torch.float32"),
        (lambda: H + 3, TypeError, r"got 3; op\.shift\(c\) adds c times the identity"),
        (lambda: 3 - H, TypeError, "unsupported operand"),
        (lambda: H + pair.dense_H, TypeError, r"got Tensor; add dense matrices to op\.to_dense\(\)"),
        (lambda: H + "G", TypeError, "expected an operator of kronfac.operators, got str"),
        (lambda: H * pair.G, TypeError, "use @ for a product"),
        (lambda: H * torch.tensor(2.0), TypeError, r"factor: expected a number, got Tensor; use \.item\(\)"),
        (lambda: H * True, TypeError, "factor: expected a number, got bool"),
        (lambda: H * float("nan"), ValueError, "factor: expected a finite number"),
        (lambda: H / 0, ValueError, "divisor: expected a number other than 0"),
        (lambda: H.shift("1"), TypeError, "shift: amount: expected a number, got str"),
        (lambda: H.shift(float("inf")), ValueError, "shift: amount: expected a finite number"),
        (lambda: (H + pair.G) @ torch.ones(3), TypeError, r"\(hessian \+ ggn\) @ v: v: expected torch.float64"),
        (lambda: identity(pair.dense_H), TypeError, "identity: like: expected an operator"),
    ]
    for call, error, match in cases:
        with pytest.raises(error, match=match):
            call()


def test_release_reaches_every_operand(pair: Pair) -> None:
    model, loss = pair.case.model, pair.case.loss_fn
    operands = [hessian(model, loss, pair.batch, keep_graph=True) for _ in range(3)]
    operator = operands[0] + (operands[1] @ operands[2]).blocks({"all": pair.H.names})["all"]
    operator @ vectors(57)
    assert all(operand._engine._kept for operand in operands)
    operator.release()
    assert not any(operand._engine._kept for operand in operands)
