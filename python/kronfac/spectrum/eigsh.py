"""Extreme eigenvalues of a symmetric operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kronfac.linalg.block_lanczos import BlockKrylovSubspace
from kronfac.linalg.lanczos import KrylovSubspace
from kronfac.linalg.probes import make_generator
from kronfac.linalg.subspace import Subspace
from kronfac.linalg.symmetric import CheckedOperator, SymmetricOperator, check_operator
from kronfac.spectrum._budget import Budget
from kronfac.spectrum._guard import guarded
from kronfac.spectrum._interrupt import interruptible
from kronfac.spectrum._lanczos import LanczosSearch, checks_of
from kronfac.spectrum._lobpcg import LobpcgSearch
from kronfac.spectrum._options import BASIS_BYTES, SKETCH_BYTES, Progress, check_choice, check_count, check_positive
from kronfac.spectrum._power import PowerSearch
from kronfac.spectrum._preconditioner import as_function
from kronfac.spectrum._progress import shown
from kronfac.spectrum._wanted import ORDERS, Wanted
from kronfac.spectrum.results import EigenResult

METHODS = ("lanczos", "block_lanczos", "lobpcg", "power")
RESIDUALS = ("recurrence", "explicit")

_CALLER = "kronfac.spectrum.eigsh"
_BLOCK = 4  # start vectors of block Lanczos


def eigsh(
    op: SymmetricOperator,
    k: int = 1,
    which: str = "magnitude",
    *,
    method: str = "lanczos",
    tol: float = 1e-5,
    max_products: int | None = None,
    basis_size: int | None = None,
    block_size: int | None = None,
    preconditioner: SymmetricOperator | Callable[[Tensor], Tensor] | None = None,
    multiplicity: bool | None = None,
    residuals: str = "recurrence",
    seed: int = 0,
    progress: Progress | bool | None = None,
) -> EigenResult:
    """Find k extreme eigenpairs of a symmetric operator, each with the residual that certifies it.

    "lanczos" has two-pass full reorthogonalisation, hence no spurious copies, and thick restart when storage is full
    (Wu & Simon 2000). A single Krylov sequence sees one copy only of a repeated eigenvalue, and further ones as far as
    round-off brings them in: without `multiplicity` some may be left out, and what comes next stands in their place.
    With it the search goes on from fresh random directions orthogonal to what was found, until none is likely to be
    missing (bound of Kuczyński & Woźniakowski 1992).

    "block_lanczos" grows from several start vectors (Golub & Underwood 1977): their products share a pass over the
    data, and as many copies of an eigenvalue are found as there are start vectors. It takes more products in fewer
    passes.

    "lobpcg" (Knyazev 2001, on an orthonormal basis as in Hetmaniuk & Lehoucq 2006) improves a block of vectors by their
    residuals and last steps. It is the one that a preconditioner speeds up, stores the least of those that find several
    pairs, and needs more products than Lanczos without one. "power" is power iteration with deflation, the method of
    other tools, for comparison: three vectors beside the pairs found, and by far the most products.

    Args:
        op: a symmetric operator with `shape` and `@` (`kronfac.operators`, a torch matrix); n is its size.
        k: number of eigenpairs, 1 to n.
        which: "magnitude" (largest |λ|), "largest" or "smallest" (algebraically), or "both": half of them from each
            end, of an odd k one more from the upper.
        method: "lanczos", "block_lanczos", "lobpcg" or "power", which finds the largest magnitudes only.
        tol: a pair has converged when ‖Av - λv‖ <= tol ‖A‖₂, with ‖A‖₂ the largest |Ritz value| seen (of "lobpcg" the
            longest image of a unit vector). Then an exact eigenvalue lies within tol ‖A‖₂ of λ; the usual error is of
            the order of the residual squared over the gap. Below about 1e-6 it asks for more than float32 products can
            give.
        max_products: the most products to spend, at least 2k, and a little more where blocks ask for it (default
            max(1000, 20k)); the last ones certify the residuals.
        basis_size: vectors that the Lanczos methods store before a restart, at least min(n, k + 3), of blocks
            min(n, k + 2 block_size + 2). Default: up to max(200, 4k) as long as they take less than 1 GiB, but never
            fewer than max(2k, k + 20), of blocks k + 5 block_size.
        block_size: start vectors of "block_lanczos" (default 4), or of "lobpcg", at least k (default k + k/4, at least
            k + 3: those beyond k speed up the last pairs). At most n.
        preconditioner: for "lobpcg" at one algebraic end, an operator (n, n) or a function of columns (n, j). For
            "smallest" it stands for the inverse of A, for example that of K-FAC; for "largest" for the inverse of
            σI - A with a σ above the spectrum.
        multiplicity: of the Lanczos methods: search for all copies of repeated eigenvalues, for some tens of products
            more. False is sure of one copy of each only, of blocks `block_size` copies. Default: for "smallest" and
            "both", since singular matrices have many zeros there; not for "magnitude" and "largest", where Hessians of
            networks have none in general (but symmetric models and equal blocks do). The other methods find them
            anyway.
        residuals: of the Lanczos methods: "recurrence" bounds each residual by what Lanczos knows of it, |β s| with s
            the last coordinate of the Ritz vector, plus a bound on the round-off in that: three products with random
            combinations of the k vectors measure it, and a larger one than the bound has a probability below 1 %. Where
            these bounds do not meet the tolerance k - 3 further products measure the residuals. "explicit" always
            multiplies each vector once more, as happens anyway for k <= 4, after a search for further copies and in the
            other methods.
        seed: of the start vectors; equal seeds give equal results.
        progress: called as progress(products, None) after each call of op @ V; True for a progress bar.

    Returns:
        The pairs in descending order of |λ| for "magnitude", descending for "largest" and "both", ascending for
        "smallest". Pairs that did not meet the tolerance within `max_products` are returned with `converged` False;
        pairs that "power" did not come to are not returned. After a KeyboardInterrupt those found so far, at once; a
        second one raises.

    Raises:
        KeyboardInterrupt: before the first product was done.
        TypeError: `op` is no operator, or an option has the wrong type.
        ValueError: `op` is not square or not symmetric, its product is not finite, k > n, or an option is out of range.
    """
    operator = check_operator(op, _CALLER)
    k = check_count(k, "k", _CALLER, least=1)
    if k > operator.size:
        raise ValueError(f"{_CALLER}: k: expected at most n = {operator.size} eigenpairs, got {k}")
    wanted = Wanted(k, check_choice(which, "which", _CALLER, ORDERS))
    method = check_choice(method, "method", _CALLER, METHODS)
    tol = check_positive(tol, "tol", _CALLER)
    generator = make_generator(seed, _CALLER)
    explicit = check_choice(residuals, "residuals", _CALLER, RESIDUALS) == "explicit"
    block = _check_block(block_size, method, operator, k)
    _check_combination(method, which, basis_size, preconditioner)
    # The residuals take k products, and the first k vectors as many, or whole blocks.
    least = k + max(k, -(-k // block) * block)
    limit = max(1000, 20 * k) if max_products is None else max_products
    limit = check_count(limit, "max_products", _CALLER, least=least)
    with interruptible() as stop, shown(progress, _CALLER) as report:
        copies = which in ("smallest", "both") if multiplicity is None else multiplicity
        reserved = k if explicit or copies or method not in ("lanczos", "block_lanczos") else checks_of(k)
        budget, operator = Budget(limit, reserved, stop, report), guarded(operator, stop)
        if method == "power":
            return PowerSearch(operator, wanted, tol, budget, generator).run()
        if method == "lobpcg":
            inverse = None if preconditioner is None else as_function(preconditioner, operator)
            return LobpcgSearch(operator, wanted, tol, budget, generator, block=block, preconditioner=inverse).run()
        capacity = _check_basis(basis_size, operator, k, block)
        subspace: Subspace
        if method == "lanczos":
            subspace = KrylovSubspace(operator, capacity, generator)
        else:
            subspace = BlockKrylovSubspace(operator, capacity, block, generator)
        search = LanczosSearch(subspace, wanted, tol, budget, starts=block, explicit=explicit)
        return search.run(multiplicity=copies)


def _check_block(block_size: int | None, method: str, operator: CheckedOperator, k: int) -> int:
    """How many vectors grow together."""
    if method in ("lanczos", "power"):
        if block_size is not None:
            raise ValueError(f"{_CALLER}: block_size: expected None with method={method!r}, got {block_size!r}")
        return 1
    if method == "lobpcg":
        default, least = min(operator.size, k + max(3, k // 4)), k
    else:
        default, least = min(operator.size, _BLOCK), 1
    block = check_count(
        default if block_size is None else block_size, "block_size", _CALLER, least=least, most=operator.size
    )
    # X, its residuals and steps, with their images, and those that take their place
    needed = 10 * block * operator.size * torch.finfo(operator.dtype).bits // 8
    if method == "lobpcg" and needed > SKETCH_BYTES:
        raise ValueError(
            f"{_CALLER}: method: 'lobpcg' with {block} vectors of {operator.size} entries takes {needed / 2**30:.1f} "
            f"GiB, expected at most {SKETCH_BYTES / 2**30:.0f}; use 'lanczos' with a basis_size that fits"
        )
    return block


def _check_combination(method: str, which: str, basis_size: object, preconditioner: object) -> None:
    """Refuse options that do not go together."""
    if basis_size is not None and method in ("lobpcg", "power"):
        raise ValueError(f"{_CALLER}: basis_size: expected None with method={method!r}, got {basis_size!r}")
    if method == "power" and which != "magnitude":
        raise ValueError(
            f"{_CALLER}: which: power iteration finds the largest magnitudes only, got {which!r}; use another method"
        )
    if preconditioner is not None and (method != "lobpcg" or which not in ("largest", "smallest")):
        raise ValueError(
            f"{_CALLER}: preconditioner: is for method='lobpcg' with which='largest' or 'smallest', each of which asks "
            f"for another, got method={method!r} and which={which!r}"
        )


def _check_basis(basis_size: int | None, operator: CheckedOperator, k: int, block: int) -> int:
    """How many vectors are stored: the k wanted, neighbours from both ends, and room to grow."""
    least = min(operator.size, k + 3 if block == 1 else k + 2 * block + 2)
    if basis_size is None:
        affordable = BASIS_BYTES // (operator.size * torch.finfo(operator.dtype).bits // 8)
        basis_size = max(2 * k, k + max(20, 5 * block), min(affordable, max(200, 4 * k)))
    return check_count(basis_size, "basis_size", _CALLER, least=least)
