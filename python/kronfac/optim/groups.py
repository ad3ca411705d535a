"""Param groups whose options are checked, and may be callables of the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from kronfac.optim.options import EXTRA_KEYS, GROUP_OPTIONS, SCHEDULABLE, Schedule, check_group, evaluate

Groups: TypeAlias = "Sequence[Mapping[str, Any]]"
"""Checked param groups, for reading."""


class GroupedOptimizer(Optimizer):
    """A torch optimizer that knows what its param groups may contain.

    Group dicts hold plain values only, so that schedulers and checkpoints see what they expect; callables live beside
    them.
    """

    def __init__(self, params: list[Any], defaults: dict[str, Any]) -> None:
        self._schedules: list[dict[str, Schedule]] = []
        self._checked: list[dict[str, Any]] = []
        _evaluated("KFAC", defaults, 0)  # a bad default is reported even where every group overrides it
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check and add a param group; the caller's dict is left alone.

        Raises:
            TypeError, ValueError: unknown key or bad value; the optimizer is then as it was.
        """
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"KFAC: param_group: expected a dict with the key 'params', got {param_group!r:.80}")
        where = f"KFAC: params[{len(self.param_groups)}]"
        unknown = [key for key in param_group if key not in GROUP_OPTIONS and key not in EXTRA_KEYS]
        if unknown:
            raise ValueError(
                f"{where}: {unknown[0]}: not an option of a param group; expected some of {', '.join(GROUP_OPTIONS)}"
            )
        group = {**self.defaults, **param_group}
        schedules = {name: group[name] for name in SCHEDULABLE if callable(group[name])}
        group.update(_evaluated(where, group, 0))
        super().add_param_group(group)
        for parameter in group["params"]:
            if torch.nn.parameter.is_lazy(parameter):
                self.param_groups.pop()
                raise ValueError(
                    f"{where}: expected initialised parameters, got one of a lazy module; "
                    "run one forward before making KFAC"
                )
        self._schedules.append(schedules)

    def _remove_last_group(self) -> None:
        self.param_groups.pop()
        self._schedules.pop()

    def _resolve(self, step: int) -> None:
        """Evaluate the callables for this step and check every option as it now stands."""
        if self._unchanged():
            return
        resolved = []
        for index, (group, schedules) in enumerate(zip(self.param_groups, self._schedules, strict=True)):
            where = f"KFAC: params[{index}]"
            if "lr" in schedules and "initial_lr" in group:
                raise ValueError(f"{where}: lr: expected a callable or a scheduler, got both; pass lr as a number")
            if "momentum" in schedules and ("max_momentum" in group or "base_momentum" in group):
                raise ValueError(
                    f"{where}: momentum: expected a callable or a scheduler that cycles momentum, got both; pass "
                    "momentum as a number"
                )
            resolved.append(_evaluated(where, {**group, **schedules}, step))
        for group, values in zip(self.param_groups, resolved, strict=True):
            group.update(values)
        self._checked = resolved

    def _unchanged(self) -> bool:
        """Whether every option is the very object that was checked last: these cannot change in place."""
        return (
            not any(self._schedules)
            and len(self._checked) == len(self.param_groups)
            and all(
                group.get(name) is value
                for group, values in zip(self.param_groups, self._checked, strict=True)
                for name, value in values.items()
            )
        )

    def _upcoming(self, name: str, step: int) -> list[Any]:
        """One option of every group as it will be at a step."""
        return [
            evaluate(f"KFAC: params[{index}]", name, schedules[name], step) if name in schedules else group[name]
            for index, (group, schedules) in enumerate(zip(self.param_groups, self._schedules, strict=True))
        ]

    def _refuse_sparse(self) -> None:
        for index, group in enumerate(self.param_groups):
            for position, parameter in enumerate(group["params"]):
                grad: Tensor | None = parameter.grad
                if grad is not None and grad.layout != torch.strided:
                    raise ValueError(
                        f"KFAC.step: params[{index}][{position}] of shape {tuple(parameter.shape)}: expected a dense "
                        f"gradient, got layout {grad.layout}; make the layer with sparse=False"
                    )


def all_parameters(groups: Groups) -> list[Tensor]:
    """In the order of the groups, which is torch's numbering in a checkpoint."""
    return [p for group in groups for p in group["params"]]


def home_of(groups: Groups) -> torch.device:
    """Where verdicts and sums over all parameters are made: the first one's device."""
    return next((p.device for group in groups for p in group["params"]), torch.device("cpu"))


def l2(group: Mapping[str, Any]) -> float:
    """η of a param group as far as it is part of the loss."""
    return 0.0 if group["decoupled"] else float(group["weight_decay"])


def _evaluated(where: str, group: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Checked values of a group's options, callables evaluated at `step`."""
    values = {name: evaluate(where, name, group[name], step) for name in SCHEDULABLE if callable(group[name])}
    return check_group(where, {**group, **values})
