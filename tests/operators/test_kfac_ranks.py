"""K-FAC and EKFAC of data that several processes share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kronfac.operators import ekfac, kfac
from tests.processes import run_ranks


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(40, 4, dtype=torch.float64, generator=generator), torch.randint(3, (40,), generator=generator)


def _work(rank: int, folder: Path) -> None:
    x, y = data()
    own = (x[:25], y[:25]) if rank == 0 else (x[25:], y[25:])
    saved = {
        make.__name__: make(model(), "categorical", own, kind="exact", reduction=reduction).to_dense()
        for make, reduction in ((kfac, "sum"), (ekfac, "mean"))
    }
    saved["alone"] = kfac(model(), "categorical", own, kind="exact", distributed=False).to_dense()
    drawn = kfac(model(), "categorical", (x, y), samples=50)
    saved["drawn"] = drawn.to_dense()
    torch.save(saved, folder / f"{rank}.pt")
    broken = (own[0] * float("nan"), own[1]) if rank else own
    with pytest.raises(ValueError, match="factors of layer '0' are not finite"):
        kfac(model(), "categorical", broken)
    with pytest.raises(
        (RuntimeError, TypeError), match="another rank of the process group failed" if rank else "data:"
    ):
        kfac(model(), "categorical", own if rank else 3)
    other = model()
    if rank:
        with torch.no_grad():
            other[0].weight.add_(1.0)  # type: ignore[index]
    with pytest.raises(ValueError, match="model: not the same on all ranks"):
        ekfac(other, "categorical", own)


def test_ranks_find_the_factors_of_all_data_together(tmp_path: Path) -> None:
    run_ranks(_work, tmp_path)
    x, y = data()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    whole = {
        "kfac": kfac(model(), "categorical", (x, y), kind="exact", reduction="sum"),
        "ekfac": ekfac(model(), "categorical", (x, y), kind="exact"),
    }
    for name, operator in whole.items():
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=0)
        torch.testing.assert_close(found[0][name], operator.to_dense(), rtol=1e-8, atol=1e-10)
    for own, part in zip(found, (slice(25), slice(25, 40)), strict=True):
        alone = kfac(model(), "categorical", (x[part], y[part]), kind="exact")
        torch.testing.assert_close(own["alone"], alone.to_dense())
    # both ranks drew targets for the same inputs: with the same draws it would be the matrix of one of them
    one = kfac(model(), "categorical", (x, y), samples=50).to_dense()
    assert float((found[0]["drawn"] - one).norm()) > 1e-3 * float(one.norm())
