"""What is timed, and the bars: cases of `kronfac bench`, and those of sizes that only a GPU is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from kronfac.cli.bench.case import Case
from kronfac.cli.bench.cases import CASES, covariance, factorizations

Unit = Literal["bf16", "tf32", "float32", "memory"]


@dataclass(frozen=True)
class GpuCase:
    """One operator at one size, in one arithmetic.

    Attributes:
        case: inputs, sides, nominal work.
        unit: of `Peaks`, what bounds the time.
        bar: least ratio of torch's time to ours.
    """

    case: Case
    unit: Unit
    bar: float | None = None

    @property
    def name(self) -> str:
        """That of the case, with the arithmetic where it is not that of the type."""
        return f"{self.case.name} TF32" if self.unit == "tf32" else self.case.name


LONG = (65536, 4096)
LISTS = ("resnet50", "resnet20", "autoencoder", "transformer")
CONV_BAR, EIGH_BAR, INVERSE_BAR, KRON_BAR = 8.0, 5.0, 3.0, 2.0
BF16_BAR, TF32_BAR = 1 / 0.85, 1.0


def cases(group: str) -> list[GpuCase]:
    """The cases of an operator."""
    known = [case for case in CASES if case.op == group]
    if group == "covariance":
        return [
            GpuCase(_long(torch.bfloat16), "bf16", BF16_BAR),
            GpuCase(_long(torch.float32), "tf32", TF32_BAR),
            GpuCase(_long(torch.float32), "float32"),
            *(GpuCase(case, "bf16" if "bfloat16" in case.name else "float32") for case in known),
        ]
    if group == "conv_covariance":
        large = [case for case in known if not case.quick]
        return [GpuCase(case, "float32", CONV_BAR) for case in large] + [
            GpuCase(case, "tf32", CONV_BAR) for case in large
        ]
    if group == "damped_inverse":
        return [GpuCase(case, "float32", INVERSE_BAR if case.name == "resnet50" else None) for case in known]
    if group == "damped_eigh":
        return [_eigh(n, EIGH_BAR) for n in (64, 128, 256, 512)] + [_eigh(n, None) for n in (16, 32)]
    if group in ("kron_precondition", "eigen_precondition"):
        lists = [case for case in known if case.name in LISTS]
        bar = KRON_BAR if group == "kron_precondition" else None
        return [GpuCase(case, "float32", bar if case.name == "resnet50" else None) for case in lists] + [
            GpuCase(case, "tf32", bar) for case in lists if case.name == "resnet50"
        ]
    return [GpuCase(case, "memory" if case.unit == "byte" else "float32") for case in known if not case.quick]


def _long(dtype: torch.dtype) -> Case:
    m, d = LONG
    return Case(
        op="covariance",
        name=f"{m}x{d}" + (" bfloat16" if dtype == torch.bfloat16 else ""),
        prepare=partial(covariance._covariance, m, d, dtype),
        work=float(m) * d * (d + 1),
    )


def _eigh(n: int, bar: float | None) -> GpuCase:
    case = Case(
        op="damped_eigh",
        name=f"64 of n={n}",
        prepare=partial(factorizations._eigh, [n] * 64),
        work=factorizations.EIGH_WORK * 64 * n**3,
    )
    return GpuCase(case, "float32", bar)
