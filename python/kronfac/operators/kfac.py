"""K-FAC and EKFAC of a model as linear operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from kronfac.curvature import Likelihood
from kronfac.operators.kronecker import KroneckerOperator
from kronfac.operators.layer_statistics import FactorStatistics


def kfac(
    model: nn.Module,
    likelihood: str | Likelihood,
    data: Any,
    params: Iterable[str | Tensor] | None = None,
    *,
    kind: str = "mc",
    samples: int = 1,
    seed: int = 0,
    output: Callable[[Any], Tensor] | None = None,
    mask: Callable[[Any, Any], Tensor] | None = None,
    sharing: str = "expand",
    reduction: str = "mean",
    distributed: bool = True,
) -> KroneckerOperator:
    """K-FAC's approximation of the Fisher matrix over all the data (Martens & Grosse, arXiv:1503.05671).

    The block of a layer is A ⊗ G with A the second moment of its inputs and G that of the gradients at its outputs;
    blocks between layers are zero. It approximates `kronfac.operators.fisher` of the same kind in its scale and its
    order of parameters. Embeddings have a diagonal A, norm layers a dense block of their own, layers in groups a
    product for each group. The factors are taken once, now: the operator does not follow the model, and products cost
    no pass over the data. The model is run and left as by `kronfac.operators.hessian`.

    Args:
        model: the model.
        likelihood: as in `kronfac.KFAC`: what the loss is the negative logarithm of.
        data: as in `kronfac.operators.hessian`; only "empirical" and `mask` look at the targets. Read twice.
        params: as in `kronfac.operators.hessian`. Every chosen parameter must belong to a layer that an adapter covers,
            and a bias is chosen together with its weight. A weight chosen alone is that of a layer without bias.
        kind: "mc" draws targets from the model's distribution, "exact" takes their expectation, "empirical" takes the
            targets of the data.
        samples: draws per example of "mc", >= 1, averaged.
        seed: of the draws of "mc".
        output: callable(model output) -> logits, for models that return more than logits.
        mask: callable(inputs, targets) -> bool tensor that is False on padding.
        sharing: "expand" or "reduce": how the positions of a shared layer enter, as in `kronfac.KFAC`.
        reduction: "mean", over the terms of the loss, or "sum".
        distributed: under a process group every rank calls this with its own data, and the factors are those of all of
            them; False for this rank's alone.

    Returns:
        The operator, with `inverse(damping)`, `trace()`, `logdet(damping)`, `diagonal()` and `factors()`. The block of
        a layer that the output does not depend on is zero.

    Raises:
        TypeError: an argument or the model's output of the wrong type, an iterator that can be read only once.
        ValueError: unknown, foreign or uncovered parameters; no data; a loader that shuffles; a batch normalisation
            without running statistics over several batches; an unknown option; factors that are not finite; a forward
            that draws random numbers.
    """
    statistics = FactorStatistics(
        "kronfac.operators.kfac",
        model,
        likelihood,
        data,
        params,
        kind=kind,
        samples=samples,
        seed=seed,
        output=output,
        mask=mask,
        sharing=sharing,
        reduction=reduction,
        distributed=distributed,
    )
    return statistics.operator("kfac", statistics.products())


def ekfac(
    model: nn.Module,
    likelihood: str | Likelihood,
    data: Any,
    params: Iterable[str | Tensor] | None = None,
    *,
    kind: str = "mc",
    samples: int = 1,
    seed: int = 0,
    output: Callable[[Any], Tensor] | None = None,
    mask: Callable[[Any, Any], Tensor] | None = None,
    sharing: str = "expand",
    reduction: str = "mean",
    distributed: bool = True,
) -> KroneckerOperator:
    """EKFAC's approximation of the Fisher matrix over all the data (George et al., arXiv:1806.03884).

    In the eigenbasis of K-FAC's factors, Q_A of A and Q_G of G, the block of a layer is diagonal with the entries
    S = E[(Q_Gᵀ (gradient of an example) Q_A)²]: of all matrices that are diagonal there, the nearest to the layer's
    Fisher block in the Frobenius norm. A second pass over the data takes S. Embeddings, norm layers and layers whose
    adapter does not yield inputs and gradients in pairs have K-FAC's block.

    Args:
        model: as in `kfac`.
        likelihood: as in `kfac`.
        data: as in `kfac`; read three times.
        params: as in `kfac`.
        kind: as in `kfac`.
        samples: as in `kfac`.
        seed: as in `kfac`.
        output: as in `kfac`.
        mask: as in `kfac`.
        sharing: as in `kfac`; S is always that of whole examples.
        reduction: as in `kfac`.
        distributed: as in `kfac`.

    Returns:
        The operator, as of `kfac`.

    Raises:
        TypeError: as `kfac`.
        ValueError: as `kfac`, and for a factor that could not be diagonalised.
    """
    statistics = FactorStatistics(
        "kronfac.operators.ekfac",
        model,
        likelihood,
        data,
        params,
        kind=kind,
        samples=samples,
        seed=seed,
        output=output,
        mask=mask,
        sharing=sharing,
        reduction=reduction,
        distributed=distributed,
    )
    return statistics.operator("ekfac", statistics.rescaled(statistics.products()))
