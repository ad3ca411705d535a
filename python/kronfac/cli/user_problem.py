"""What a user's own `module:function` may return where a tuple of three does not say enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from kronfac.curvature import Likelihood


@dataclass(frozen=True)
class UserProblem:
    """A model with its loss and data, for `kronfac spectrum module:function` and `kronfac train module:function`.

    Attributes:
        model: with at least one parameter that requires gradients; only these are looked at.
        loss_fn: called as loss_fn(model output, targets); returns a scalar, averaged over the examples of the batch.
        data: training data: a batch (inputs, targets), a list of batches, or a DataLoader. `kronfac spectrum` reads a
            loader that shuffles once and keeps what it yields. `kronfac train` needs an iterable of batches.
        test: test data of the same forms, or None.
        likelihood: what the loss is the negative logarithm of, as in `kronfac.KFAC`; `--operator fisher` needs to know
            it. None: the command line's `--likelihood`.
        batch_size: callable(inputs, targets) giving what a batch counts for in the average over batches, as in
            `kronfac.operators.hessian`; None: the leading dimension of its first input.
        groups: names of parameters or modules by the name of a group, for `--layers`, as in `op.blocks(groups)`; None:
            one group for each module that owns parameters.
    """

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    data: Any
    test: Any = None
    likelihood: str | Likelihood | None = None
    batch_size: Callable[[Any, Any], float] | None = None
    groups: Mapping[str, Iterable[str]] | None = None
