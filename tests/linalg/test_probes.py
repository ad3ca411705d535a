from __future__ import annotations

import pytest
import torch

from kronfac.linalg import draw_probes, make_generator
from kronfac.linalg.probes import standard_error


def _draw(size: int, count: int, distribution: str, generator: torch.Generator) -> torch.Tensor:
    return draw_probes(size, count, distribution, generator, dtype=torch.float64, device=torch.device("cpu"))


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_covariance_is_the_identity(distribution: str) -> None:
    probes = _draw(4, 20_000, distribution, make_generator(0, "test"))
    assert probes.shape == (4, 20_000)
    torch.testing.assert_close(probes @ probes.mT / 20_000, torch.eye(4, dtype=torch.float64), atol=0.05, rtol=0.0)
    if distribution == "rademacher":
        assert set(probes.unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("size", [1, 7, 40])
def test_grouping_does_not_matter(distribution: str, size: int) -> None:
    one, other = make_generator(3, "test"), make_generator(3, "test")
    together = _draw(size, 8, distribution, one)
    apart = torch.cat([_draw(size, 3, distribution, other), _draw(size, 5, distribution, other)], dim=1)
    assert torch.equal(together, apart)


def test_seeds() -> None:
    for seed, error in ((-1, ValueError), (2**63, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="caller: seed: expected an integer"):
            make_generator(seed, "caller")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="distribution: expected one of"):
        _draw(3, 1, "uniform", make_generator(0, "test"))


def test_standard_error() -> None:
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0)
