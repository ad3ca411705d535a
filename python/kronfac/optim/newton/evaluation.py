"""All that a Newton-type optimizer evaluates within one step: a transaction that sees the same random numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from kronfac.curvature import Likelihood
from kronfac.operators.closure import ClosureOperator
from kronfac.operators.closure_program import Closure, ClosureProgram

SampleSize = float | int | None
"""None for all examples, a float in (0, 1] for a share of them, an int for a number."""


@dataclass(frozen=True, eq=False)
class Sample:
    """A set of examples.

    Attributes:
        indices: int64 on the CPU, ascending; None for all.
        size: how many; 1 stands for all where their number is unknown.
    """

    indices: Tensor | None
    size: int


class Evaluation:
    """The closure of one step: losses, gradient and curvature on samples, from the same random numbers.

    A context manager. While it is open nothing outside changes: parameters are displaced only inside `loss`, buffers
    that the closure writes are copies, random streams are put back. When it is left without an exception, the step
    given to `move` is taken, buffers become what the gradient's evaluation made them, and the global random streams
    move as if that had been the only evaluation. After an exception all is as before, the generator of samples too.

    Args:
        closure: as given to `step`.
        parameters: of the optimizer.
        examples: how many there are, or None.
        chunk_size: the most examples handed to the closure at once, or None.
        generator: of samples.
        caller: what error messages begin with.

    Attributes:
        layout: of flat vectors over the parameters.
    """

    def __init__(
        self,
        closure: Closure,
        parameters: Sequence[Tensor],
        *,
        examples: int | None,
        chunk_size: int | None,
        generator: torch.Generator,
        caller: str,
    ) -> None:
        self._program = ClosureProgram(closure, parameters, examples=examples, chunk_size=chunk_size, caller=caller)
        self._parameters = self._program.parameters
        self.layout = self._program.layout
        self._examples, self._caller = examples, caller
        self._generator, self._generator_state = generator, generator.get_state()
        self._operators: list[ClosureOperator] = []
        self._passes = 0
        self._step: Tensor | None = None

    def __enter__(self) -> Evaluation:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the step, or none of it."""
        for operator in self._operators:
            operator.release()
        if kind is not None:
            self._generator.set_state(self._generator_state)
            return
        if self._step is not None:
            with torch.no_grad():
                for parameter, moved in self._displaced(self._step):
                    parameter.copy_(moved)
        self._program.finish()

    @property
    def propagations(self) -> int:
        """Example-propagations spent so far: n for a gradient or a loss over n examples, 2n for a product."""
        return self._passes + sum(operator.propagations for operator in self._operators)

    @property
    def moved(self) -> bool:
        """Whether a step was given to `move`."""
        return self._step is not None

    def sample(self, size: SampleSize) -> Sample:
        """Draw examples without replacement; all of them for None or a size that reaches their number."""
        total = self._examples
        if size is None or total is None:
            return Sample(None, total or 1)
        count = max(1, round(size * total)) if isinstance(size, float) else size
        if count >= total:
            return Sample(None, total)
        return Sample(torch.randperm(total, generator=self._generator)[:count].sort().values, count)

    def gradient(self, sample: Sample) -> tuple[float, Tensor]:
        """The mean loss and its gradient (n,); call it once and first: buffers and streams move on by it alone.

        Raises:
            TypeError, ValueError: what the closure returned is no finite loss that depends on the parameters.
        """
        self._passes += sample.size
        return self._program.gradient(sample.indices, keep=True)

    def loss(self, sample: Sample, step: Tensor | None = None) -> float:
        """The mean loss at the parameters, or a step (n,) away; it may be infinite or NaN."""
        self._passes += sample.size
        if step is None:
            return self._program.value(sample.indices)
        with self._at(step):
            return self._program.value(sample.indices)

    def starting_loss(self, sample: Sample, purpose: str) -> float:
        """The mean loss at the parameters.

        Raises:
            ValueError: it is not finite; names the purpose of the sample.
        """
        loss = self.loss(sample)
        if not math.isfinite(loss):
            raise ValueError(f"{self._caller}: closure: expected a finite loss on the sample of {purpose}, got {loss}")
        return loss

    def round_off(self, loss: float) -> float:
        """What two losses of this size may differ by although they are the same."""
        return 10 * torch.finfo(self.layout.dtype).eps * abs(loss)

    def operator(
        self, sample: Sample, curvature: str = "hessian", likelihood: str | Likelihood | None = None
    ) -> ClosureOperator:
        """The curvature at the parameters on a sample; its products are counted, its graph is freed with the step."""
        operator = ClosureOperator(
            self._program,
            indices=sample.indices,
            curvature=curvature,
            likelihood=likelihood if curvature == "fisher" else None,
        )
        self._operators.append(operator)
        return operator

    def move(self, step: Tensor) -> None:
        """Take a step (n,) when the evaluation ends without an exception.

        Raises:
            ValueError: it would make parameters that are not finite.
        """
        if not all(bool(torch.isfinite(moved).all()) for _, moved in self._displaced(step)):
            raise ValueError(f"{self._caller}: the step leads to parameters that are not finite")
        self._step = step

    def _displaced(self, step: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Parameters that may move, and what they are a step away."""
        offsets = self.layout.offsets
        for parameter, first, last in zip(self._parameters, offsets[:-1], offsets[1:], strict=True):
            if parameter.requires_grad:
                part = step[first:last].view(parameter.shape).to(parameter.device)
                yield parameter, (parameter.detach() + part).to(parameter.dtype)

    @contextmanager
    def _at(self, step: Tensor) -> Iterator[None]:
        saved = [parameter.detach().clone() for parameter in self._parameters]
        try:
            # Through `.data`, which counts no version: kept graphs hold the parameters and stay valid.
            for parameter, moved in self._displaced(step):
                parameter.data.copy_(moved)
            yield
        finally:
            for parameter, value in zip(self._parameters, saved, strict=True):
                parameter.data.copy_(value)


def check_sample(where: str, value: Any) -> SampleSize:
    """Check a sample size: None, a float in (0, 1] or an int >= 1.

    Raises:
        TypeError, ValueError: anything else.
    """
    if value is None:
        return None
    wanted = "None (all examples), a float in (0, 1] (a share of them) or an integer >= 1 (a number of them)"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{where}: expected {wanted}, got {value!r}")
    if not (0 < value <= 1 if isinstance(value, float) else value >= 1):
        raise ValueError(f"{where}: expected {wanted}, got {value!r}")
    return value


def check_ratio_sample(where: str, value: Any) -> SampleSize | str:
    """Check the sample of the ratio: a sample size, or "gradient" for the gradient's own sample."""
    if isinstance(value, str):
        if value != "gradient":
            raise ValueError(f'{where}: expected "gradient" or a sample size, got {value!r}')
        return value
    return check_sample(where, value)
