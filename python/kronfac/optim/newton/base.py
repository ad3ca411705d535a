"""What all Newton-type optimizers share: arguments, samples, the transaction of a step, checkpoints.

How a method is written: a frozen dataclass derived from `NewtonStep` for what it adds to the record, and a class with

* OPTIONS, every option with its check, `COMMON_OPTIONS` included, and an entry for each in the `options` that its
  constructor hands on;
* VALUES, what it carries from step to step (a radius, a damping, a flat vector with the check `vector`), each with its
  check, and what it starts with in the `values` of the constructor;
* `_iterate(run, options, values)`, which evaluates by `run`, takes a step by `run.move(s)` and returns the record and
  the values for the next step. It changes nothing of the optimizer, and raises freely: the step then never happened.

docs/newton.md has a whole one, `kronfac.optim.newton.trcg` another.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from kronfac.curvature import Likelihood, resolve_likelihood
from kronfac.operators.closure import CURVATURES
from kronfac.operators.closure_program import Closure, layout_of
from kronfac.operators.options import check_counts
from kronfac.operators.parameters import ParameterLayout
from kronfac.optim.newton.evaluation import Evaluation, Sample, check_ratio_sample, check_sample
from kronfac.optim.newton.state import check_state, pack_state
from kronfac.optim.options import choice, integer, number

Check: TypeAlias = "Callable[[str, Any], Any]"
"""Called as check(where, value); returns the value or raises an error that begins with `where`."""


def positive(where: str, value: object) -> float:
    """A finite number > 0."""
    return number(where, value, open_low=True)


def chunk_size(where: str, value: object) -> int | None:
    """None or an integer >= 1."""
    return None if value is None else integer(where, value)


COMMON_OPTIONS: Mapping[str, Check] = {
    "curvature": lambda where, value: choice(where, value, CURVATURES),
    "gradient_sample": check_sample,
    "hessian_sample": check_sample,
    "ratio_sample": check_ratio_sample,
    "chunk_size": chunk_size,
}
"""Options of every method, each with its check."""

_EXTRA_KEYS = ("params", "param_names", "name")

# Hooks and the like, which torch makes anew for a copy.
_TORCHS_OWN = ("_optimizer_", "_zero_grad_profile", "_warned", "_patched")


@dataclass(frozen=True, kw_only=True)
class NewtonStep:
    """What one step did.

    Attributes:
        step: its number, from 0.
        loss: on the gradient's sample, before the step.
        loss_after: estimate of the loss after it, on the sample of the ratio; the loss before it where nothing moved.
        ratio: decrease of the loss divided by that of the model, None where it was not taken.
        accepted: whether the parameters moved.
        status: of the last inner solve.
        iterations: of all inner solves.
        step_norm: ‖s‖₂ of the step taken, 0 where nothing moved.
        gradient_norm: ‖g‖₂.
        gradient_examples: size of the gradient's sample; 1 where the number of examples is unknown.
        hessian_examples: of the curvature's.
        ratio_examples: of the ratio's.
        propagations: spent in this step, in example-propagations: a gradient or a loss over n examples costs n, a
            product with the curvature 2n.
    """

    step: int
    loss: float
    loss_after: float
    ratio: float | None
    accepted: bool
    status: str
    iterations: int
    step_norm: float
    gradient_norm: float
    gradient_examples: int
    hessian_examples: int
    ratio_examples: int
    propagations: int


def decrease_ratio(before: float, after: float, promised: float) -> float:
    """ρ, the decrease of the loss over that of the model; -inf where the loss after the step is not finite."""
    return (before - after) / promised if math.isfinite(after) else -math.inf


class NewtonOptimizer(Optimizer):
    """Base class of the Newton-type optimizers: samples, transaction and checkpoints.

    A method defines `OPTIONS`, `VALUES` and `_iterate`; the page "Newton-type optimizers" shows a whole one.

    Args:
        params: parameters or param groups. The options of a group may not differ from those of another: the
            parameters are one vector.
        options: by name, unchecked; one for each of `OPTIONS`.
        values: what the method starts with, unchecked; one for each of `VALUES`.
        examples: how many examples the closure knows, positions 0 to examples - 1; None where it is only ever asked
            for all of them.
        likelihood: of the outputs, for curvature="fisher".
        seed: of the samples.
        history: how many records `history` holds.

    Attributes:
        last_step: the record of the last step, None before the first.
        history: the records of the last steps, oldest first.
        steps: how many steps were made.
        propagations: example-propagations spent so far; where `examples` is None, in passes over all of them.
        likelihood: of the outputs.
    """

    OPTIONS: ClassVar[Mapping[str, Check]] = COMMON_OPTIONS
    VALUES: ClassVar[Mapping[str, Check]] = {}

    def __init__(
        self,
        params: Iterable[Any],
        options: Mapping[str, Any],
        values: Mapping[str, Any],
        *,
        examples: int | None = None,
        likelihood: str | Likelihood | None = None,
        seed: int = 0,
        history: int = 1000,
    ) -> None:
        name = self.method
        check_counts(name, examples=examples)
        self.examples = examples
        self.likelihood = None if likelihood is None else resolve_likelihood(likelihood)
        self._layout: ParameterLayout | None = None
        self._values = self._check_values(name, values)
        self._generator = torch.Generator().manual_seed(integer(f"{name}: seed", seed, low=0))
        self.steps = self.propagations = 0
        self.last_step: NewtonStep | None = None
        self.history: deque[NewtonStep] = deque(maxlen=integer(f"{name}: history", history, low=0))
        self._check_options(name, options)
        super().__init__(params, dict(options))
        self._layout = layout_of(self._all_parameters(), None, name)

    @property
    def method(self) -> str:
        """Name of the method: what error messages begin with and checkpoints are recognised by."""
        return type(self).__name__

    # ------------------------------------------------------------------ what a method defines

    @abstractmethod
    def _iterate(
        self, run: Evaluation, options: Mapping[str, Any], values: Mapping[str, Any]
    ) -> tuple[NewtonStep, Mapping[str, Any]]:
        """One iteration.

        Args:
            run: evaluates the closure; `run.move(s)` takes a step.
            options: checked.
            values: what the last step returned, or the constructor was given.

        Returns:
            The record, and the values for the next step. Vectors among them are flat (n,), of `run.layout`.
        """

    def _check_further(self, where: str, options: Mapping[str, Any]) -> None:
        """Refuse options that do not go together; overridden by methods that have such."""

    # ------------------------------------------------------------------ torch's interface

    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """Make one iteration.

        Args:
            closure: called as closure(indices) with positions of examples (int64, on the CPU), or with None for all;
                returns their mean loss, built by autograd without backward(), or a pair (loss, outputs) with the
                outputs that the loss was computed from. It is called several times, and has to return the same for
                the same parameters and indices.

        Returns:
            The loss on the gradient's sample before the step, detached.

        Raises:
            TypeError: no closure, or one that returns something else.
            ValueError: a loss or derivative that is not finite. Parameters, buffers, random streams and the optimizer
                are then as before.
        """
        if closure is None:
            raise TypeError(
                f"{self.method}.step: closure: expected a callable, got None; a step evaluates the loss several times"
            )
        options = self._resolve()
        run = Evaluation(
            closure,
            self._all_parameters(),
            examples=self.examples,
            chunk_size=options["chunk_size"],
            generator=self._generator,
            caller=f"{self.method}.step",
        )
        with run:
            self._layout = run.layout  # the model may have been moved or converted
            carried = self._check_values(f"{self.method}.step", self._values)
            record, values = self._iterate(run, options, carried)
            checked = self._check_values(f"{self.method}.step", values)
        self._values = checked
        self.last_step = record
        self.history.append(record)
        self.steps += 1
        self.propagations += record.propagations
        return torch.tensor(record.loss, dtype=run.layout.dtype, device=run.layout.device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Part of the construction; refused afterwards.

        Raises:
            RuntimeError: after construction: what is carried from step to step is about the parameters there were.
            TypeError, ValueError: an unknown option, or one that differs from the other groups'.
        """
        if self._layout is not None:
            raise RuntimeError(
                f"{self.method}: add_param_group: expected all parameters when the optimizer is made: they are one "
                "vector of which it carries state; make a new optimizer"
            )
        where = f"{self.method}: params[{len(self.param_groups)}]"
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"{where}: expected a dict with the key 'params', got {param_group!r:.80}")
        unknown = [key for key in param_group if key not in self.OPTIONS and key not in _EXTRA_KEYS]
        if unknown:
            raise ValueError(f"{where}: {unknown[0]}: not an option; expected some of {', '.join(self.OPTIONS)}")
        super().add_param_group({**self.defaults, **param_group})
        try:
            self._resolve()
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """Torch's form, with the optimizer's own part under "kronfac": numbers, strings and tensors only."""
        return {**super().state_dict(), **pack_state(self, self._values, self._generator)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint; its options replace those of the constructor, as in torch.

        Raises:
            ValueError: it does not fit this optimizer; nothing was changed then.
        """
        loaded = check_state(self, state_dict, self._check_group, self._check_values)
        super().load_state_dict({"state": {}, "param_groups": loaded.groups})
        self._values, self.steps, self.propagations = loaded.values, loaded.steps, loaded.propagations
        self._generator.set_state(loaded.generator)
        self.last_step = None
        self.history.clear()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which continue where this optimizer is."""
        kept = {name: value for name, value in vars(self).items() if not name.startswith(_TORCHS_OWN)}
        return {**kept, "_generator": self._generator.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy; torch also calls it with what it loaded."""
        if "_generator" in state:
            generator = torch.Generator()
            generator.set_state(state["_generator"])
            state = {**state, "_generator": generator}
        super().__setstate__(state)

    # ------------------------------------------------------------------ for methods

    def _ratio_sample(self, run: Evaluation, options: Mapping[str, Any], gradient: Sample) -> Sample:
        """The sample that the ratio is taken on: the gradient's own where both are all examples or it was asked for."""
        wanted = options["ratio_sample"]
        if wanted == "gradient":
            return gradient
        sample = run.sample(wanted)
        return gradient if sample.indices is None and gradient.indices is None else sample

    # ------------------------------------------------------------------ checks

    def _all_parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _resolve(self) -> dict[str, Any]:
        """The options as they now stand, which all groups share."""
        found: dict[str, Any] = {}
        for index, group in enumerate(self.param_groups):
            checked = self._check_group(f"{self.method}: params[{index}]", group)
            for name, value in checked.items():
                if index and found[name] != value:
                    raise ValueError(
                        f"{self.method}: params[{index}]: {name}: expected {found[name]!r} as in the first group, got "
                        f"{value!r}; the parameters are one vector, whose options hold for all groups"
                    )
            found = checked
        return found

    def _check_group(self, where: str, group: Mapping[str, Any]) -> dict[str, Any]:
        return self._check_options(where, {name: group[name] for name in self.OPTIONS})

    def _check_options(self, where: str, options: Mapping[str, Any]) -> dict[str, Any]:
        checked = {name: check(f"{where}: {name}", options[name]) for name, check in self.OPTIONS.items()}
        for name in (*(option for option in checked if option.endswith("_sample")), "chunk_size"):
            value = checked[name]
            if value is None or value == "gradient":
                continue
            if self.examples is None:
                raise ValueError(
                    f"{where}: {name}: expected None without examples=, got {value!r}; pass the number of examples "
                    "that the closure knows"
                )
            if isinstance(value, int) and value > self.examples and name != "chunk_size":
                raise ValueError(f"{where}: {name}: expected at most examples={self.examples}, got {value}")
        if (self.likelihood is None) == (checked["curvature"] == "fisher"):
            wanted = "a likelihood with" if self.likelihood is None else "None without"
            raise ValueError(f'{where}: likelihood: expected {wanted} curvature="fisher", got {self.likelihood!r}')
        self._check_further(where, checked)
        return checked

    def _check_values(self, where: str, values: Mapping[str, Any]) -> dict[str, Any]:
        checked = {name: check(f"{where}: {name}", values[name]) for name, check in self.VALUES.items()}
        layout = self._layout
        for name, value in checked.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{where}: {name}: expected a finite number, got {value}")
            if isinstance(value, Tensor) and layout is not None:
                if tuple(value.shape) != (layout.size,) or not bool(torch.isfinite(value).all()):
                    raise ValueError(
                        f"{where}: {name}: expected a finite vector ({layout.size},), got shape {tuple(value.shape)}"
                    )
                checked[name] = value.detach().to(layout.device, layout.dtype)
        return checked


def vector(where: str, value: object) -> Tensor | None:
    """Check of a flat vector among `VALUES`: a tensor or None; the base class checks size and entries."""
    if value is not None and not isinstance(value, Tensor):
        raise TypeError(f"{where}: expected a tensor or None, got {type(value).__name__}")
    return value
