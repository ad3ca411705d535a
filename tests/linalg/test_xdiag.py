"""XDiag and its standard errors, against estimates that are made anew without a probe or two."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kronfac.linalg import check_operator, draw_probes, make_generator
from kronfac.linalg.trace import Sketch, xdiag
from tests.linalg.matrices import with_spectrum

_K = np.arange(1, 31)
SPECTRA = {
    "almost the identity": 1 + 0.0003 * _K,
    "both signs": np.linspace(-1, 1, 30),
    "1/k": 1 / _K,
    "exponential": np.exp(-_K / 4),
    "few large ones": np.concatenate([[30.0, 20.0, -15.0], np.linspace(-1, 1, 27)]),
}


def _probes(n: int, m: int, generator: torch.Generator) -> Tensor:
    return draw_probes(n, m, "rademacher", generator, dtype=torch.float64, device=torch.device("cpu"))


@pytest.mark.parametrize("spectrum", list(SPECTRA))
@pytest.mark.parametrize("m", [2, 3, 6])
def test_leaving_out_probes_one_by_one(spectrum: str, m: int) -> None:
    matrix = with_spectrum(SPECTRA[spectrum], 1)
    n = len(matrix)
    omega = _probes(n, m, make_generator(0, "test"))

    def alone(probe: int, *missing: int) -> Tensor:
        """The estimate of one probe, from a basis made without some."""
        kept = [index for index in range(m) if index not in (probe, *missing)]
        Q = torch.linalg.qr(matrix @ omega[:, kept])[0]
        found = Q @ (Q.mT @ matrix)
        estimate: Tensor = found.diagonal() + omega[:, probe] * ((matrix - found) @ omega[:, probe])
        return estimate

    samples = torch.stack([alone(probe) for probe in range(m)])
    shared = torch.zeros(n, dtype=torch.float64)
    for i in range(m):
        for j in range(m):
            if i != j:
                shared += (samples[i] - alone(i, j)) * (samples[j] - alone(j, i))
    sketch = Sketch(check_operator(matrix, "test"))
    sketch.extend(omega)
    values, errors = xdiag(sketch)
    torch.testing.assert_close(values, samples.mean(0), rtol=1e-10, atol=1e-12)
    expected = samples.var(0) / m + (shared / (m * (m - 1))).clamp(min=0.0)
    torch.testing.assert_close(errors.square(), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("spectrum", list(SPECTRA))
def test_standard_errors_cover_what_they_should(spectrum: str) -> None:
    """Over 1000 seeds. A fixed multiple of the spread covered 58 % of the first spectrum and 76 % of the second."""
    matrix = with_spectrum(SPECTRA[spectrum], 1)
    generator = make_generator(7, "test")
    inside = torch.zeros(2, dtype=torch.float64)
    for _ in range(1000):
        sketch = Sketch(check_operator(matrix, "test"))
        sketch.extend(_probes(len(matrix), 8, generator))
        values, errors = xdiag(sketch)
        error = (values - matrix.diagonal()).abs()
        inside += torch.stack([(error <= reach * errors).double().mean() for reach in (1, 2)])
    one, two = (inside / 1000).tolist()
    # Student's t of 7 degrees of freedom has 65 % and 91 % there, the normal distribution 68 % and 95 %.
    assert 0.63 < one < 0.73
    assert 0.89 < two < 0.97


def test_a_rank_below_the_number_of_probes_is_found_exactly() -> None:
    matrix = with_spectrum([3.0, -2.0, 1.0] + [0.0] * 27)
    sketch = Sketch(check_operator(matrix, "test"))
    sketch.extend(_probes(30, 6, make_generator(0, "test")))
    values, errors = xdiag(sketch)
    torch.testing.assert_close(values, matrix.diagonal(), rtol=0.0, atol=1e-10)
    assert float(errors.max()) < 1e-8
