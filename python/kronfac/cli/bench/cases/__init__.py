"""All cases of all operators. Tensors are on torch's default device; other libraries are rivals on the CPU only."""

from __future__ import annotations

from collections.abc import Sequence

from kronfac.cli.bench.case import Case
from kronfac.cli.bench.cases import covariance, factorizations, preconditioning, vectors

CASES: tuple[Case, ...] = (*covariance.cases(), *factorizations.cases(), *preconditioning.cases(), *vectors.cases())
OPERATORS: tuple[str, ...] = tuple(dict.fromkeys(case.op for case in CASES))


def select(operators: Sequence[str] = (), *, quick: bool = False) -> list[Case]:
    """The cases of the named operators (none named: of all), or only the quick ones among them.

    Raises:
        ValueError: an operator that has no cases.
    """
    for name in operators:
        if name not in OPERATORS:
            raise ValueError(f"unknown operator {name!r}; expected one of {', '.join(OPERATORS)}")
    return [case for case in CASES if (not operators or case.op in operators) and (case.quick or not quick)]
