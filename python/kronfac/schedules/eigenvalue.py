"""The top eigenvalue that a schedule is steered by: of the Hessian over a fixed set of examples, with its residual."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from kronfac.operators import ParameterOperator, hessian
from kronfac.operators.program import LossFunction
from kronfac.optim.options import integer, number
from kronfac.schedules.sample import Sample, take
from kronfac.spectrum.eigsh import eigsh

Blocks: TypeAlias = "str | Sequence[str] | Mapping[str, Sequence[str]] | None"

_CALLER = "kronfac.schedules.top_eigenvalue"
_NOT_FINITE = re.compile(r"the loss is -?(nan|inf)\b|not finite|NaN or infinity")
_ONE = "\0"  # where there is one operator; no parameter or module is called so


@dataclass(frozen=True, eq=False)
class TopEigenvalue:
    """A top eigenvalue, or the mean of those of several blocks, in the form of a `kronfac.spectrum.EigenResult`.

    Attributes:
        values: the eigenvalue (1,), float64; NaN where the loss or a product was not finite.
        residuals: ‖Hv - λv‖ (1,); an exact eigenvalue lies within it. Of several blocks the mean, which bounds the
            error of the mean.
        converged: whether every residual met the tolerance, bool (1,).
        products: products with single vectors that were spent.
        examples: that the Hessian was averaged over.
        blocks: eigenvalue of each block by its name; empty without blocks.
    """

    values: Tensor
    residuals: Tensor
    converged: Tensor
    products: int
    examples: int
    blocks: Mapping[str, float] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The eigenvalue."""
        return float(self.values[0])

    @property
    def residual(self) -> float:
        """Its residual."""
        return float(self.residuals[0])


def top_eigenvalue(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Any,
    *,
    examples: int = 512,
    blocks: Blocks = None,
    tolerance: float = 0.1,
    products: int = 50,
    chunk_size: int | None = None,
    seed: int = 0,
) -> Callable[[], TopEigenvalue]:
    """Make the `eigenvalue=` of an `AdaptiveBatch`: a function that computes the top Hessian eigenvalue of a model.

    It is the algebraically largest eigenvalue of the Hessian of the mean loss, by Lanczos (`kronfac.spectrum.eigsh`),
    at the parameters that the model has when the function is called. The examples are chosen once: all calls see the
    same ones, so that differences come from the parameters alone. The model is run in eval mode, and is left as it was,
    `.grad`, buffers and random streams included.

    Args:
        model: the model in training.
        loss_fn: called as loss_fn(output, targets), returns the mean over the examples.
        data: (inputs, targets) of which `examples` are drawn without replacement, or a map-style Dataset likewise (its
            examples are read once; give one that does not augment); or a list of batches or a DataLoader, whose first
            examples are taken. Inputs and targets are tensors, or tuples, lists or dicts of tensors, with the examples
            in their leading dimension.
        examples: how many to average over, several small batches; the eigenvalue of a single one is noisy, and larger
            than that of the whole set.
        blocks: None for the whole matrix. Names of parameters or modules for the diagonal block that they have
            together; "layers" for the mean of the eigenvalues of all layers' blocks; a dict of lists of names for the
            mean over these blocks.
        tolerance: of the residual relative to the eigenvalue. The rule that it serves looks for a fall by half, and the
            error itself is of the order of the residual squared over the gap.
        products: the most products with the Hessian per block and call, >= 2. An eigenvalue that did not meet the
            tolerance then is returned with `converged` False.
        chunk_size: the most examples that are differentiated at once; None for all, whose graph is kept during a call.
        seed: of the choice of examples, and of the start vector.

    Returns:
        A function without arguments. A Ctrl-C while it runs raises KeyboardInterrupt, as anywhere else.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: fewer than `examples` examples, examples that are not finite, an option out of range, names of no
            parameters, or what `kronfac.operators.hessian` refuses. The function itself raises the latter too, but
            where the loss or a product is not finite it returns NaN that did not converge.
    """
    settings = _Settings(
        integer(f"{_CALLER}: examples", examples),
        _check_blocks(blocks),
        number(f"{_CALLER}: tolerance", tolerance, open_low=True),
        integer(f"{_CALLER}: products", products, low=2),
        None if chunk_size is None else integer(f"{_CALLER}: chunk_size", chunk_size),
        integer(f"{_CALLER}: seed", seed, low=0),
    )
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_CALLER}: model: expected a torch.nn.Module, got {type(model).__name__}")
    batch = take(data, settings.examples, settings.seed, _CALLER)
    return _Search(model, loss_fn, batch, settings)


@dataclass(frozen=True)
class _Settings:
    examples: int
    blocks: Blocks
    tolerance: float
    products: int
    chunk_size: int | None
    seed: int


class _Search:
    """What `top_eigenvalue` returns."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction, batch: Sample, settings: _Settings) -> None:
        self._model, self._loss_fn, self._batch, self._settings = model, loss_fn, batch, settings
        try:
            self._operators()  # names that do not exist, a loss that cannot be differentiated: now, not after an epoch
        except ValueError as error:
            if not _not_finite(error):
                raise

    def __call__(self) -> TopEigenvalue:
        settings = self._settings
        values: dict[str, float] = {}
        residuals: list[float] = []
        converged, spent = True, 0
        try:
            for name, operator in self._operators().items():
                result = eigsh(
                    operator,
                    1,
                    "largest",
                    tol=settings.tolerance,
                    max_products=settings.products,
                    multiplicity=False,
                    seed=settings.seed,
                )
                if result.interrupted:
                    raise KeyboardInterrupt
                spent += result.products
                values[name] = float(result.values[0])
                residuals.append(float(result.residuals[0]))
                # The search measures residuals against the norm, which a large negative end may set.
                met = residuals[-1] <= settings.tolerance * abs(values[name])
                converged = converged and met and bool(result.converged[0])
        except ValueError as error:
            if not _not_finite(error):
                raise
            return self._result(float("nan"), float("inf"), False, spent, {})
        mean, residual = sum(values.values()) / len(values), sum(residuals) / len(residuals)
        return self._result(mean, residual, converged, spent, {} if _ONE in values else values)

    def _result(
        self, value: float, residual: float, converged: bool, spent: int, blocks: Mapping[str, float]
    ) -> TopEigenvalue:
        return TopEigenvalue(
            torch.tensor([value], dtype=torch.float64),
            torch.tensor([residual], dtype=torch.float64),
            torch.tensor([converged]),
            spent,
            self._settings.examples,
            blocks,
        )

    def _operators(self) -> Mapping[str, ParameterOperator]:
        """The operators whose eigenvalues are averaged; made anew, so that graphs live no longer than a call."""
        blocks = self._settings.blocks
        groups = blocks if isinstance(blocks, Mapping) else None
        names = None if blocks is None or isinstance(blocks, (str, Mapping)) else list(blocks)
        whole = hessian(self._model, self._loss_fn, self._batch, names, chunk_size=self._settings.chunk_size)
        if blocks is None or names is not None:
            return {_ONE: whole}
        return whole.blocks(groups)


def _not_finite(error: ValueError) -> bool:
    """Whether a run has diverged; it is the training loop that should end for it, not the look at its curvature."""
    return _NOT_FINITE.search(str(error)) is not None


def _check_blocks(blocks: object) -> Any:
    if blocks is None or blocks == "layers" or (isinstance(blocks, Mapping) and blocks):
        return blocks
    if isinstance(blocks, Sequence) and not isinstance(blocks, str) and blocks:
        return list(blocks)
    raise ValueError(
        f'{_CALLER}: blocks: expected None, "layers", a list of names or a dict of such lists, got {blocks!r}'
    )
