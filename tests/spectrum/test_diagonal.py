from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kronfac.operators import hessian
from kronfac.spectrum import diagonal
from tests.linalg.matrices import Counted, with_spectrum
from tests.operators.cases import make_case

DECAYING = with_spectrum(1 / np.arange(1, 201) ** 2)
FLAT = with_spectrum(np.linspace(1, 3, 200))


@pytest.mark.parametrize("matrix", [DECAYING, FLAT], ids=["decaying", "flat"])
@pytest.mark.parametrize("method", ["hutchinson", "xdiag"])
def test_every_entry_with_an_honest_standard_error(matrix: torch.Tensor, method: str) -> None:
    results = [diagonal(matrix, method, probes=60, seed=seed) for seed in range(40)]
    errors = torch.stack([result.values for result in results]) - matrix.diagonal()
    errs = torch.stack([result.stderr for result in results])
    # 8000 entries, those of a run not independent; 68 % nominally
    assert 0.6 <= float((errors.abs() <= errs).double().mean()) <= 0.8
    spread = errors.std(0)
    assert bool((errors.mean(0).abs() < 5 * spread / np.sqrt(40)).all())
    if method == "hutchinson":
        variance = matrix.square().sum(1) - matrix.diagonal().square()
        assert float((spread.square() / (variance / 60)).mean()) == pytest.approx(1, rel=0.1)


def test_xdiag_saves_products_where_eigenvalues_decay() -> None:
    def error(method: str, probes: int) -> float:
        values = [diagonal(DECAYING, method, probes=probes, seed=seed).values for seed in range(10)]
        return float((torch.stack(values) - DECAYING.diagonal()).square().mean().sqrt())

    assert error("xdiag", 40) < error("hutchinson", 120) / 3


def test_exact_where_that_costs_no_more() -> None:
    for method in ("hutchinson", "xdiag"):
        operator = Counted(FLAT[:30, :30])
        result = diagonal(operator, method, probes=30)
        assert torch.equal(result.values, FLAT[:30, :30].diagonal())
        assert (float(result.stderr.sum()), result.products, operator.products) == (0.0, 30, 30)


def test_network_in_float32() -> None:
    case = make_case("convnet", torch.float32)
    operator = hessian(case.model, case.loss_fn, (case.inputs, case.targets))
    truth = operator.to_dense().diagonal().double()
    calls: list[tuple[int, int | None]] = []
    result = diagonal(operator, probes=40, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (40, 40)
    assert float((result.values - truth).abs().max()) < 6 * float(result.stderr.max())
    assert result.values.dtype == result.stderr.dtype == torch.float64


def test_same_seed_same_result_and_no_global_stream() -> None:
    state = torch.get_rng_state()
    for method in ("hutchinson", "xdiag"):
        one, two, other = (diagonal(FLAT, method, probes=20, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(one.values, two.values)
        assert not torch.equal(one.values, other.values)
    assert torch.equal(torch.get_rng_state(), state)


def test_refusals() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"method": "xtrace"}, "method: expected one of 'hutchinson', 'xdiag', got 'xtrace'"),
        ({"probes": 1}, "probes: expected at least 2, got 1"),
        ({"method": "xdiag", "probes": 3}, "probes: expected at least 4, got 3"),
    ]
    for options, match in cases:
        with pytest.raises(ValueError, match="kronfac.spectrum.diagonal: " + match):
            diagonal(FLAT, **options)


def test_a_sketch_too_large_for_memory_is_refused_before_it_is_made() -> None:
    class Huge:
        shape = (10**9, 10**9)
        dtype = torch.float32

        def __matmul__(self, vectors: Any) -> Any:
            raise AssertionError("no product should be asked for")

    with pytest.raises(ValueError, match=r"a sketch of 50 vectors of 1000000000 entries takes 558\.8 GiB"):
        diagonal(Huge(), "xdiag")
