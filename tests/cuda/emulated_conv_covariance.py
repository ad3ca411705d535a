"""`kronfac.ops.conv_covariance_` by the GPU's kernels, run on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.cuda.emulation import TYPES, integers, library, pointer

SOURCE = "emulate_conv_covariance.cpp"
FORMS = {"direct": 0, "shift": 1}
"""As `ConvForm` of csrc/cuda/conv_covariance_plan.h."""


class Plan(NamedTuple):
    """What a call was cut into."""

    form: str
    boxes: int
    parts: int


def _arguments(
    shape: Sequence[int],
    strides: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Any, Any]:
    """Sizes and strides of three spatial axes."""
    absent = 5 - len(shape)
    ones, zeros = [1] * absent, [0] * absent
    low, high = (padding[::2], padding[1::2]) if len(padding) == 2 * len(stride) else (padding, padding)
    sizes = integers(
        shape[0], shape[1] // groups, groups, *ones, *shape[2:], *ones, *kernel_size, *ones, *stride, *ones,
        *dilation, *zeros, *low, *zeros, *high,
    )  # fmt: skip
    return sizes, integers(*strides[:2], *ones, *strides[2:])


def _tensor(x: Tensor, tf32: bool) -> ctypes.c_bool:
    """Whether tensor cores form the products."""
    return ctypes.c_bool(x.dtype in (torch.bfloat16, torch.float16) or (x.dtype == torch.float32 and tf32))


def _plan(chosen: Any) -> Plan:
    names = {number: name for name, number in FORMS.items()}
    return Plan(names[chosen[0]], chosen[1], chosen[2])


def plan(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    *,
    tf32: bool = False,
) -> Plan:
    """What operations decide."""
    chosen = integers(0, 0, 0)
    sizes, strides = _arguments(x.shape, x.stride(), kernel_size, stride, padding, dilation, groups)
    library(SOURCE).plan_conv_covariance(
        TYPES[x.dtype], _tensor(x, tf32), sizes, strides, ctypes.c_bool(True), -1, chosen
    )
    return _plan(chosen)


def conv_covariance_(
    out: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    bias: bool = False,
    decay: float = 0.0,
    scale: float = 1.0,
    form: str | None = None,
    tf32: bool = False,
) -> Plan:
    """Update `out`; `form` is taken where it is possible, else what operations decide."""
    chosen = integers(0, 0, 0)
    sizes, strides = _arguments(x.shape, x.stride(), kernel_size, stride, padding, dilation, groups)
    out_strides = integers(*([0] if groups == 1 else []), *out.stride())
    library(SOURCE).emulate_conv_covariance(
        TYPES[x.dtype], _tensor(x, tf32), pointer(x), sizes, strides, ctypes.c_bool(bias),
        -1 if form is None else FORMS[form], chosen, pointer(out), out_strides,
        ctypes.c_double(decay), ctypes.c_double(scale),
    )  # fmt: skip
    return _plan(chosen)
