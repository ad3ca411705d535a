"""How the factors of a layer are inverted and applied; `structure_for` chooses."""

from __future__ import annotations

from kronfac.optim.structures.base import Factorisation as Factorisation
from kronfac.optim.structures.base import Factorised as Factorised
from kronfac.optim.structures.base import Structure as Structure
from kronfac.optim.structures.kronecker import KroneckerEigen, KroneckerInverse

_STRUCTURES: dict[tuple[str, str], type[Structure]] = {
    ("kfac", "inverse"): KroneckerInverse,
    ("kfac", "eigen"): KroneckerEigen,
}


def structure_for(structure: str, solve: str) -> Structure:
    """The structure that KFAC's options `structure` and `solve` name (both checked by the caller)."""
    return _STRUCTURES[structure, solve]()
