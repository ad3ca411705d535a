"""The structures that this version has: tests over all of them include later ones by themselves."""

from __future__ import annotations

from torch import nn

from kronfac.optim import KFAC

_DESIGNED = ("kfac", "ekfac", "diagonal", "mini_block", "doubly_factored", "tridiagonal")
_SOLVES = ("inverse", "eigen")


def _structures() -> list[tuple[str, str]]:
    found = []
    for structure in _DESIGNED:
        for solve in _SOLVES:
            try:
                KFAC(nn.Linear(2, 2), 0.1, structure=structure, solve=solve)
            except ValueError:  # not in this version, or not with this way of inverting
                continue
            found.append((structure, solve))
    return found


STRUCTURES = _structures()
"""Pairs of the options `structure` and `solve`."""
IDS = ["/".join(pair) for pair in STRUCTURES]
