"""A real Ctrl-C halfway: what comes back is what had been computed, marked as such."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from kronfac.operators import ggn
from kronfac.operators.mean_loss import MeanLoss
from kronfac.spectrum import block_densities, block_traces, density, diagonal, eigsh, landscape, trace
from kronfac.spectrum.diagonal import METHODS as DIAGONAL_METHODS
from kronfac.spectrum.eigsh import METHODS
from kronfac.spectrum.trace import METHODS as TRACE_METHODS
from tests.linalg.matrices import Counted, with_spectrum
from tests.operators.cases import make_case

_NETWORK = np.concatenate([[90.0, 40.0, 22.0, 21.0, -3.0], np.random.default_rng(2).exponential(0.2, 295)])


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    """Python's own handler within each test, and the one found after it."""
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, found)


def at(products: int, times: int = 1) -> Callable[[int, int | None], None]:
    """A progress callback that presses Ctrl-C as soon as so many products are done."""
    pressed = [0]

    def press(done: int, total: int | None) -> None:
        while done >= products and pressed[0] < times:
            pressed[0] += 1
            os.kill(os.getpid(), signal.SIGINT)

    return press


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("products", [1, 12, 30])
def test_eigenpairs(method: str, products: int) -> None:
    operator = Counted(with_spectrum(_NETWORK))
    result = eigsh(operator, 5, method=method, tol=1e-8, multiplicity=True, progress=at(products))
    assert result.interrupted
    assert result.ended == "interrupted"
    assert operator.products == result.products <= products + 12  # no more than the call that was under way
    count = len(result.values)
    assert 1 <= count <= 5
    assert result.vectors.shape == (300, count)
    vectors, values = result.vectors, result.values
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(count, dtype=torch.float64), atol=1e-12, rtol=0.0)
    residuals = torch.linalg.vector_norm(operator.matrix @ vectors - vectors * values, dim=0)
    assert (residuals <= result.residuals + 1e-12 * 90).all()
    assert (result.residuals <= residuals + 1e-8 * 90).all()  # bounds that say no less than needed
    assert (residuals[result.converged] <= 1e-8 * 90).all()
    assert result.status == ["converged" if met else "interrupted" for met in result.converged.tolist()]
    assert products > 12 or not result.converged.all()


@pytest.mark.parametrize("method", METHODS)
def test_eigenpairs_that_had_converged_are_marked(method: str) -> None:
    matrix = with_spectrum(np.concatenate([[1000.0, 500.0], np.linspace(0, 1, 298)]))
    result = eigsh(matrix, 12, method=method, tol=1e-9, progress=at(100))
    assert result.interrupted
    assert result.status[:2] == ["converged", "converged"]
    assert "interrupted" in result.status
    np.testing.assert_allclose(result.values[:2].numpy(), [1000.0, 500.0], rtol=1e-12)


@pytest.mark.parametrize("method", TRACE_METHODS)
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("products", [17, 40, 70, 90])
def test_trace(method: str, distribution: str, products: int) -> None:
    operator = Counted(with_spectrum(_NETWORK))
    result = trace(operator, method, probes=99, distribution=distribution, progress=at(products))
    assert result.interrupted
    assert products <= operator.products == result.products < min(99, products + 16)
    assert 2 <= len(result.samples) < products + 16
    assert result.value == pytest.approx(float(result.samples.mean()))
    if result.method != "xtrace":  # whose samples share probes
        assert result.stderr == pytest.approx(float(result.samples.std()) / len(result.samples) ** 0.5)
    assert abs(result.value - _NETWORK.sum()) <= 5 * result.stderr
    # a sketch alone is no estimate, but its test vectors are probes as well
    assert result.method == ("hutchinson" if method == "hutch++" and products < 66 else method)


def test_trace_over_the_probes_done() -> None:
    matrix = with_spectrum(_NETWORK)
    partial = trace(matrix, probes=100, progress=at(24), seed=3)
    assert torch.equal(partial.samples, trace(matrix, probes=24, seed=3).samples)
    partial = trace(matrix, "xtrace", probes=100, progress=at(33), seed=3)
    same = trace(matrix, "xtrace", probes=32, seed=3)
    assert partial.products == 40  # a stride that was under way is lost
    torch.testing.assert_close(partial.samples, same.samples)
    assert partial.stderr == pytest.approx(same.stderr)
    partial = trace(matrix, "xtrace", target_relative=1e-9, progress=at(100), seed=3)
    assert partial.interrupted
    assert 60 <= len(partial.samples) * 2 <= 100


@pytest.mark.parametrize("method", DIAGONAL_METHODS)
def test_diagonal(method: str) -> None:
    operator = Counted(with_spectrum(_NETWORK))
    partial = diagonal(operator, method, probes=200, progress=at(33), seed=3)
    assert partial.interrupted
    assert partial.products == operator.products == 40
    same = diagonal(operator.matrix, method, probes=40 if method == "hutchinson" else 32, seed=3)
    torch.testing.assert_close(partial.values, same.values)
    torch.testing.assert_close(partial.stderr, same.stderr)


@pytest.mark.parametrize("restricted", [False, True])
def test_block_traces(restricted: bool) -> None:
    case = make_case("mlp", torch.float64)
    operator = ggn(case.model, case.loss_fn, (case.inputs, case.targets))
    found = block_traces(operator, probes=50, restricted=restricted, progress=at(60 if restricted else 17), seed=3)
    names = list(operator.blocks())
    assert len(names) > 1
    if restricted:  # one block, and a part of the next
        assert list(found) == names[:2]
        assert [block.products for block in found.values()] == [50, 16]
        first = block_traces(operator, probes=50, restricted=True, seed=3)[names[0]]
        assert found[names[0]].trace == pytest.approx(first.trace)
    else:
        same = block_traces(operator, probes=24, seed=3)
        assert list(found) == names
        assert [block.trace for block in found.values()] == pytest.approx([block.trace for block in same.values()])
        assert [block.trace_stderr for block in found.values()] == pytest.approx(
            [block.trace_stderr for block in same.values()]
        )
    assert all(block.interrupted for block in found.values())


@pytest.mark.parametrize(
    "use",
    [
        lambda operator: eigsh(operator, 9),
        lambda operator: eigsh(operator, 9, method="block_lanczos"),
        lambda operator: eigsh(operator, 9, method="lobpcg"),
        lambda operator: eigsh(operator, 9, method="power"),
        lambda operator: trace(operator),
        lambda operator: trace(operator, "xtrace", probes=40),
        lambda operator: trace(operator, "hutch++", probes=60),
        lambda operator: diagonal(operator, probes=40),
        lambda operator: diagonal(operator, "xdiag", probes=40),
    ],
)
def test_the_first_signal_within_a_product_does_not_break_it(use: Callable[[Any], Any]) -> None:
    class Pressing(Counted):
        def __matmul__(self, vectors: torch.Tensor) -> torch.Tensor:
            product = super().__matmul__(vectors)
            if self.products >= 24 > self.products - vectors[0].numel():
                signal.raise_signal(signal.SIGINT)
            return product

    operator = Pressing(with_spectrum(_NETWORK))
    result = use(operator)
    assert result.interrupted
    assert operator.products == result.products


@pytest.mark.parametrize("products", [30, 46])
@pytest.mark.parametrize(
    "use",
    [
        *(lambda operator, m=method: eigsh(operator, 9, method=m, multiplicity=True) for method in METHODS),  # type: ignore[misc]
        *(lambda operator, m=method: trace(operator, m, probes=60) for method in TRACE_METHODS),  # type: ignore[misc]
        *(lambda operator, m=method: diagonal(operator, m, probes=60) for method in DIAGONAL_METHODS),  # type: ignore[misc]
    ],
)
def test_a_product_that_it_breaks_is_left_out(use: Callable[[Any], Any], products: int) -> None:
    """As where it reaches the persistent workers of a loader, too."""

    class Breaking(Counted):
        def __matmul__(self, vectors: torch.Tensor) -> torch.Tensor:
            if self.products >= products:
                signal.raise_signal(signal.SIGINT)
                raise RuntimeError("DataLoader worker exited unexpectedly")
            return super().__matmul__(vectors)

    operator = Breaking(with_spectrum(_NETWORK))
    result = use(operator)
    assert result.interrupted
    assert result.products == operator.products
    with pytest.raises(KeyboardInterrupt):  # the next run's first product
        use(operator)


def test_a_block_trace_that_it_breaks() -> None:
    case = make_case("mlp", torch.float64)
    operator = ggn(case.model, case.loss_fn, (case.inputs, case.targets))
    engine, multiply, calls = operator._engine, operator._engine.multiply, [0]

    def breaking(*args: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] > allowed:
            signal.raise_signal(signal.SIGINT)
            raise RuntimeError("DataLoader worker exited unexpectedly")
        return multiply(*args)

    engine.multiply = breaking  # type: ignore[method-assign]
    allowed = 2
    found = block_traces(operator, probes=30)
    assert all(block.interrupted for block in found.values())
    assert {block.products for block in found.values()} == {16}
    with pytest.raises(KeyboardInterrupt):
        block_traces(operator, probes=30)


def test_an_error_without_one_is_an_error() -> None:
    class Failing(Counted):
        def __matmul__(self, vectors: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("on purpose")

    operator = Failing(with_spectrum(_NETWORK))
    for use in (lambda: eigsh(operator, 3), lambda: trace(operator), lambda: diagonal(operator)):
        with pytest.raises(RuntimeError, match="on purpose"):
            use()


def test_with_nothing_done_it_is_raised() -> None:
    """A signal in the first call, which for a single probe is no estimate yet; an exact trace has no part of use."""
    tiny = with_spectrum([3.0, 2.0, 1.0])
    for use in (
        lambda: trace(tiny, "xtrace", probes=20, progress=at(1)),
        lambda: diagonal(tiny, probes=20, progress=at(1)),
        lambda: trace(with_spectrum(_NETWORK), "xtrace", probes=20, progress=at(1)),
        lambda: diagonal(with_spectrum(_NETWORK), "xdiag", probes=20, progress=at(1)),
    ):
        with pytest.raises(KeyboardInterrupt):
            use()


def test_a_second_one_raises() -> None:
    with pytest.raises(KeyboardInterrupt):
        eigsh(with_spectrum(_NETWORK), 5, progress=at(10, times=2))


def test_uninterrupted_work_says_so() -> None:
    matrix = with_spectrum(_NETWORK)
    assert not eigsh(matrix, 2).interrupted
    assert not diagonal(matrix, probes=4).interrupted
    assert not any(trace(matrix, method, probes=8).interrupted for method in TRACE_METHODS)


def _breaking(matrix: torch.Tensor, products: int) -> Counted:
    """A matrix whose product is broken by a Ctrl-C once so many were done."""

    class Breaking(Counted):
        def __matmul__(self, vectors: torch.Tensor) -> torch.Tensor:
            if self.products >= products:
                signal.raise_signal(signal.SIGINT)
                raise RuntimeError("DataLoader worker exited unexpectedly")
            return super().__matmul__(vectors)

    return Breaking(matrix)


def test_a_density_that_it_breaks() -> None:
    matrix = with_spectrum(_NETWORK)
    result = density(_breaking(matrix, 24), probes=3, steps=20)
    assert result.interrupted
    assert result.products == 24
    same = density(matrix, probes=3, steps=8)
    assert torch.equal(result.nodes, same.nodes)
    assert torch.equal(result.weights, same.weights)
    assert result.trace == same.trace
    # in the products of the checks: those done before are left
    result = density(_breaking(matrix, 3 * 8 + 8), probes=3, steps=8, checks=20)
    assert result.interrupted
    assert result.products == 32
    assert torch.equal(result.nodes, same.nodes)
    assert result.checks is not None
    assert result.checks.products == 8
    assert density(_breaking(matrix, 3 * 8), probes=3, steps=8, checks=20).checks is None
    with pytest.raises(KeyboardInterrupt):
        density(_breaking(matrix, 0), probes=3, steps=8)


@pytest.mark.parametrize("calls", [0, 6, 9])
def test_densities_of_blocks_that_it_breaks(calls: int) -> None:
    case = make_case("mlp", torch.float64)
    operator = ggn(case.model, case.loss_fn, (case.inputs, case.targets))
    engine, multiply, done = operator._engine, operator._engine.multiply, [0]

    def breaking(*args: Any) -> torch.Tensor:
        if done[0] == calls:
            signal.raise_signal(signal.SIGINT)
            raise RuntimeError("DataLoader worker exited unexpectedly")
        done[0] += 1
        return multiply(*args)

    engine.multiply = breaking  # type: ignore[method-assign]
    if calls == 0:
        with pytest.raises(KeyboardInterrupt):
            block_densities(operator, probes=2, steps=6)
        return
    result = block_densities(operator, probes=2, steps=6)
    assert result.interrupted
    assert result.products == 2 * calls
    assert [result[name].interrupted for name in result] == ([False] if calls == 6 else [False, True])


@pytest.mark.parametrize("calls", [0, 1, 4])
def test_a_landscape_that_it_breaks(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("mlp", torch.float64)
    data, row = (case.inputs, case.targets), torch.ones(sum(p.numel() for p in case.model.parameters()))
    whole = landscape(case.model, case.loss_fn, data, row.double(), points=7, curvature=False)
    value, done = MeanLoss.value, [0]

    def breaking(self: MeanLoss, offset: torch.Tensor | None = None) -> float:
        if done[0] == calls:
            signal.raise_signal(signal.SIGINT)
            raise RuntimeError("DataLoader worker exited unexpectedly")
        done[0] += 1
        return value(self, offset)

    monkeypatch.setattr(MeanLoss, "value", breaking)
    if calls == 0:
        with pytest.raises(KeyboardInterrupt):
            landscape(case.model, case.loss_fn, data, row.double(), points=7, curvature=False)
        return
    part = landscape(case.model, case.loss_fn, data, row.double(), points=7, curvature=False)
    assert part.interrupted
    assert int(part.evaluated.sum()) == part.evaluations == calls
    torch.testing.assert_close(part.losses["loss"][part.evaluated], whole.losses["loss"][part.evaluated])
