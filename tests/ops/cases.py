"""What the operator tests share: tensors in awkward layouts, and how errors are measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "transposed", "strided", "offset", "expanded_first", "expanded_last")


def arrange(values: Tensor, layout: str) -> Tensor:
    """A tensor of the shape and type of `values` in another layout, with equal entries unless the layout repeats them.

    Memory that does not belong to the tensor is NaN.
    """
    if values.dim() == 0 or layout == "contiguous":
        return values.contiguous()
    if layout == "transposed":
        return values.mT.contiguous().mT if values.dim() > 1 else values
    if layout == "expanded_first":
        return values[:1].expand_as(values)
    if layout == "expanded_last":
        return values[..., :1].expand_as(values)
    if layout == "offset":
        memory = values.new_full([n + 2 for n in values.shape], float("nan"))
        view = memory[tuple(slice(1, 1 + n) for n in values.shape)]
    else:
        assert layout == "strided"
        memory = values.new_full([2 * n + 1 for n in values.shape], float("nan"))
        view = memory[tuple(slice(1, 1 + 2 * n, 2) for n in values.shape)]
    view.copy_(values)
    return view


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    """A result tensor full of NaN."""
    return arrange(torch.full(shape, float("nan"), dtype=dtype), layout)


def covariance_error(actual: Tensor, expected: Tensor) -> float:
    """The largest |err_ij| / sqrt(a_ii a_jj); entries whose rows are zero must be exactly right."""
    expected = expected.double()
    norms = expected.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    bound = norms.unsqueeze(-1) * norms.unsqueeze(-2)
    error = (actual.double() - expected).abs()
    assert not error.isnan().any()
    assert (error[bound == 0] == 0).all()
    return (error / bound.masked_fill(bound == 0, 1)).max().item() if error.numel() else 0.0


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
