"""How many examples a model gets right, as they are and after an attack."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.adversarial._gradient import IsolatedModel
from kronfac.adversarial._options import check_inputs
from kronfac.adversarial._sets import Bounds
from kronfac.operators.base import generators_of
from kronfac.operators.data import Batch, DataSource, to_device
from kronfac.operators.isolation import (
    RandomStreams,
    accelerator_devices,
    preserved_streams,
    refuse_batch_statistics,
)
from kronfac.operators.program import LossFunction

_CALLER = "kronfac.adversarial.robust_accuracy"

Attack = Callable[..., Tensor]
"""Called as attack(model, loss_fn, inputs, targets, bounds=...); returns the perturbed inputs."""

Judge = Callable[[Any, Any], Tensor]
"""Called as judge(output, targets); returns a bool tensor (N,)."""


@dataclass(frozen=True)
class Accuracy:
    """A share of examples.

    Attributes:
        correct: examples the model gets right.
        examples: in all.
        unchanged: examples that the attack left exactly as they were, for want of a gradient or of room. Many of them
            under an attack by gradients mean that it found no way, not that there is none.
    """

    correct: int
    examples: int
    unchanged: int = 0

    @property
    def value(self) -> float:
        """The share, in [0, 1]."""
        return self.correct / self.examples

    @property
    def stderr(self) -> float:
        """Its binomial standard error √(p(1 - p)/N), of examples drawn at random; 0 where all or none are right."""
        return math.sqrt(self.value * (1.0 - self.value) / self.examples)


@dataclass(frozen=True)
class RobustAccuracyResult:
    """Accuracies of one model on one set of examples.

    Attributes:
        clean: on the examples as they are.
        attacked: after each attack, by its name.
        worst: examples that are right as they are and after every attack.
    """

    clean: Accuracy
    attacked: dict[str, Accuracy]
    worst: Accuracy


def robust_accuracy(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Any,
    attacks: Mapping[str, Attack],
    *,
    bounds: Bounds = "data",
    judge: Judge | None = None,
) -> RobustAccuracyResult:
    """Accuracy on examples as they are and after attacks, in eval mode, with standard errors.

    Nothing of the model, of optimizers that watch it, or of the random streams is changed.

    Args:
        model: called as model(inputs); returns logits (N, C), unless `judge` is given.
        loss_fn: what the attacks raise, called as loss_fn(output, targets).
        data: a batch (inputs, targets), a list of batches or a DataLoader without shuffling. Inputs are floating-point
            tensors (N, ...).
        attacks: by name, `functools.partial(kronfac.adversarial.fgsm, eps=0.1)` or any callable that is called as
            attack(model, loss_fn, inputs, targets, bounds=...) and returns inputs of the same shape.
        bounds: what every attack is given as its range: "data", the least and the largest entry of all the data, a pair
            (low, high), or None.
        judge: called as judge(output, targets), says which examples are right, a bool tensor (N,) (default: the largest
            of C logits has the number of the target).

    Returns:
        Accuracies. With a random start, that of an attack depends on how the data are cut into batches.

    Raises:
        TypeError: data, attacks, outputs or results of an attack of another form.
        ValueError: as `fgsm` and `kronfac.operators.hessian`; an attack that returns another shape, NaN or infinity.
    """
    isolated = IsolatedModel(model, loss_fn, "mean", _CALLER)
    if not isinstance(attacks, Mapping) or not all(callable(attack) for attack in attacks.values()):
        raise TypeError(
            f"{_CALLER}: attacks: expected callables by name, such as "
            '{"FGSM": functools.partial(kronfac.adversarial.fgsm, eps=0.1)}, got ' + type(attacks).__name__
        )
    generators = {id(found): found for found in generators_of(data)}
    streams = RandomStreams(accelerator_devices(isolated.model), tuple(generators.values()))
    tally = _Tally(tuple(attacks))
    with preserved_streams(streams):
        source = DataSource(data, None, _CALLER)
        if not source.single:
            refuse_batch_statistics(isolated.model, _CALLER)
        given = _range_of(source) if isinstance(bounds, str) and bounds == "data" else bounds
        for _, batch in source.batches():
            x = _inputs(batch)
            target = to_device(batch.targets, x.device)
            right = _right(isolated, x, target, judge)
            kept = right
            tally.clean += int(right.sum())
            tally.examples += len(x)
            for name, attack in attacks.items():
                moved = _check_moved(attack(model, loss_fn, x, target, bounds=given), x, name)
                right = _right(isolated, moved, target, judge)
                kept = kept & right
                tally.add(name, right, (moved == x).flatten(1).all(dim=1) if x.ndim > 1 else moved == x)
            tally.worst += int(kept.sum())
    return tally.result()


class _Tally:
    """Counts over the batches."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.clean = self.worst = self.examples = 0
        self._correct = dict.fromkeys(names, 0)
        self._unchanged = dict.fromkeys(names, 0)

    def add(self, name: str, right: Tensor, unchanged: Tensor) -> None:
        self._correct[name] += int(right.sum())
        self._unchanged[name] += int(unchanged.sum())

    def result(self) -> RobustAccuracyResult:
        return RobustAccuracyResult(
            Accuracy(self.clean, self.examples),
            {name: Accuracy(self._correct[name], self.examples, self._unchanged[name]) for name in self._correct},
            Accuracy(self.worst, self.examples),
        )


def _inputs(batch: Batch) -> Tensor:
    return check_inputs(batch.inputs, batch.targets, f"{_CALLER}: data: batch {batch.number}")


def _range_of(source: DataSource) -> tuple[float, float]:
    ends = [end for _, batch in source.batches() if (x := _inputs(batch)).numel() for end in torch.aminmax(x)]
    return (float(min(ends)), float(max(ends))) if ends else (-math.inf, math.inf)


def _check_moved(moved: object, inputs: Tensor, name: str) -> Tensor:
    if not isinstance(moved, Tensor):
        raise TypeError(f"{_CALLER}: attacks: {name!r} returned {type(moved).__name__}, expected a tensor")
    if moved.shape != inputs.shape or not torch.isfinite(moved).all():
        got = f"shape {tuple(moved.shape)}" if moved.shape != inputs.shape else "NaN or infinity"
        raise ValueError(f"{_CALLER}: attacks: {name!r} returned {got}, expected finite {tuple(inputs.shape)}")
    return moved.detach().to(inputs.device)


def _right(isolated: IsolatedModel, inputs: Tensor, targets: Any, judge: Judge | None) -> Tensor:
    with isolated.running():
        output = isolated.output(inputs)
        right = _largest(output, targets) if judge is None else judge(output, targets)
    if not isinstance(right, Tensor) or right.dtype != torch.bool or right.shape != (len(inputs),):
        got = f"{right.dtype} {tuple(right.shape)}" if isinstance(right, Tensor) else type(right).__name__
        raise TypeError(f"{_CALLER}: judge: expected a bool tensor ({len(inputs)},), got {got}")
    return right.to(inputs.device)


def _largest(output: Any, targets: Any) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim != 2 or not isinstance(targets, Tensor) or targets.ndim != 1:
        shapes = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in (output, targets)]
        raise TypeError(
            f"{_CALLER}: expected logits (N, C) and targets (N,), got {shapes[0]} and {shapes[1]}; say with "
            "judge=callable(output, targets) which examples are right"
        )
    if targets.is_floating_point():
        raise TypeError(f"{_CALLER}: targets: expected class numbers, got {targets.dtype}; pass judge=")
    # What is not finite is no answer.
    return torch.isfinite(output).all(dim=1) & (output.argmax(dim=1) == targets.to(output.device))
