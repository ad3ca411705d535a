"""Copies of an optimizer: made anew for the copied model, and continued from the state of the original."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from kronfac.optim.options import EXTRA_KEYS, GROUP_OPTIONS

if TYPE_CHECKING:
    from kronfac.optim.kfac import KFAC


def rebuild(
    kind: type[KFAC],
    model: nn.Module,
    groups: Sequence[Mapping[str, Any]],
    arguments: Mapping[str, Any],
    state: dict[str, Any],
    said: set[str],
) -> KFAC:
    """What `KFAC.__reduce__` names: called by copy and pickle with copies of everything.

    Args:
        kind: the optimizer's class.
        model: that the copy watches.
        groups: param groups, callables of the step in place of their values.
        arguments: of the constructor.
        state: what `state_dict` returned.
        said: what the original has warned of.

    Returns:
        An optimizer that continues as the original would.

    Raises:
        TypeError: the model is not there yet, because the optimizer is copied as a part of it.
    """
    if "_modules" not in vars(model):
        raise TypeError(
            "KFAC: an optimizer that its own model refers to can be neither copied nor pickled; leave that attribute "
            "out of the model, and copy (model, optimizer)"
        )
    known = (*GROUP_OPTIONS, *EXTRA_KEYS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the original has warned
        optimizer = kind(
            model,
            **arguments,
            params=[{key: value for key, value in group.items() if key in known} for group in groups],
        )
        optimizer.load_state_dict(state)
    optimizer._reporter.said.update(said)
    return optimizer
