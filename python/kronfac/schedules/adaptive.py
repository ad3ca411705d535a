"""Batch sizes by the Hessian's top eigenvalue: ABS, and ABSA with adversarial examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from kronfac.optim.options import integer, number
from kronfac.schedules import state
from kronfac.schedules.attack import Attack, LossFunction, perturbed
from kronfac.schedules.base import BatchSchedule, Row
from kronfac.schedules.fixed import check_largest
from kronfac.schedules.parts import Part
from kronfac.schedules.readings import read


class AdaptiveBatch(BatchSchedule):
    """Adaptive batch size (ABS; Yao, Gholami, Keutzer & Mahoney, arXiv:1810.01021): grow when curvature has fallen.

    At the end of an epoch, as long as the batch is smaller than `max_batch_size`, the top Hessian eigenvalue λ is
    computed. The first one is the reference. When λ has fallen to reference / `threshold` it becomes the new reference
    and the batch grows by the factor `growth`; it also grows when it did not for `duration` epochs, and the λ of that
    moment, which is computed whatever `every` says, becomes the reference. The learning rates grow with the batch, and
    decay by `decay` before each of the decay epochs.

    A λ that is not finite, not positive, or not converged is recorded and decides nothing. If the batch then grows by
    duration, the reference is open until the next λ that is good.

    With `adversarial` (ABSA) the schedule asks for floor(ωb) perturbed examples in each small batch of b, where
    ω > 1/b. ω starts at `adversarial_share`, is divided by `growth` whenever the batch grows, and is 0 at the largest
    batch and from half of the epochs on.

    Momentum is not corrected for the changes of the learning rate.

    Args:
        optimizer: as in `FixedBatch`.
        examples: of an epoch, >= 1.
        batch_size: of the first epoch.
        max_batch_size: the largest batch, `batch_size` to `examples`.
        epochs: in all, >= 1.
        eigenvalue: called without arguments; returns the top eigenvalue as a number, or a result with `values` and
            `residuals` (and `converged`), of which the first pair counts, such as those of `kronfac.spectrum.eigsh`.
            `kronfac.schedules.top_eigenvalue` makes one.
        decay_epochs: as in `FixedBatch`.
        decay: as in `FixedBatch`.
        small_batch: b, the most examples of a forward and backward; None for `batch_size`.
        growth: factor of the batch, an integer >= 2.
        threshold: > 1, the factor that λ must have fallen by.
        duration: epochs after which the batch grows anyway, >= 1.
        every: epochs between computations of λ, >= 1.
        adversarial: attack(model, loss_fn, x, y) -> perturbed x; None for ABS.
        adversarial_share: first ω, in (0, 1].
        seed: of the order of the examples.

    Attributes:
        reference: eigenvalue that a fall is measured against, None while there is none.
        timer: epochs since the batch grew.

    Raises:
        TypeError, ValueError: as in `FixedBatch`.
    """

    name = "AdaptiveBatch"

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        examples: int,
        batch_size: int = 128,
        max_batch_size: int,
        epochs: int,
        eigenvalue: Callable[[], Any],
        decay_epochs: Sequence[int] = (),
        decay: float = 0.2,
        small_batch: int | None = None,
        growth: int = 2,
        threshold: float = 2.0,
        duration: int = 10,
        every: int = 1,
        adversarial: Attack | None = None,
        adversarial_share: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__(
            optimizer,
            examples=examples,
            batch_size=batch_size,
            epochs=epochs,
            decay_epochs=decay_epochs,
            decay=decay,
            small_batch=small_batch,
            seed=seed,
            reference=batch_size,
        )
        where = f"{self.name}:"
        self.max_batch_size = check_largest(self.name, max_batch_size, self.batch_size, self.examples)
        for option, value in (("eigenvalue", eigenvalue), ("adversarial", adversarial)):
            if not callable(value) and not (option == "adversarial" and value is None):
                raise TypeError(f"{where} {option}: expected a callable, got {type(value).__name__}")
        self.growth = integer(f"{where} growth", growth, low=2)
        self.threshold = number(f"{where} threshold", threshold, low=1.0, open_low=True)
        self.duration = integer(f"{where} duration", duration)
        self.every = integer(f"{where} every", every)
        share = number(f"{where} adversarial_share", adversarial_share, high=1.0, open_low=True, open_high=False)
        self._eigenvalue, self._attack = eigenvalue, adversarial
        self._share = 0.0 if adversarial is None else share
        self._omega = self._share
        self.reference: float | None = None
        self.timer = 0
        self._rates.scale(self._scale())

    @property
    def omega(self) -> float:
        """ω, the share of each small batch that is perturbed in this epoch."""
        return self._omega

    def adversarial(self, model: nn.Module, loss_fn: LossFunction, x: Tensor, y: Tensor, part: Part) -> Tensor:
        """The inputs of a part with its leading `part.adversarial` examples perturbed; `x` itself where there are none.

        During the attack the model is in eval mode, so that running statistics stay those of clean examples (and KFAC
        records nothing); afterwards modes and gradients are as before.

        Args:
            model: in the mode it trains in.
            loss_fn: called as loss_fn(output, targets).
            x: inputs of the part's examples (n, ...).
            y: their targets (n, ...).
            part: of this schedule.

        Raises:
            TypeError, ValueError: x or y is no tensor of the examples, or the attack returns no tensor like x.
            RuntimeError: perturbed examples are asked for, and this schedule has no attack.
        """
        if part.adversarial == 0 or self._attack is None:
            return super().adversarial(model, loss_fn, x, y, part)
        return perturbed(self._attack, model, loss_fn, x, y, part.adversarial, f"{self.name}.adversarial")

    def _batch_at(self, epoch: int) -> int:
        return self.batch_size

    def _decide(self, epoch: int) -> tuple[int, Row, list[str]]:
        reasons: list[str] = []
        columns: Row = {}
        batch_size, reference, timer, omega = self.batch_size, self.reference, self.timer, self._omega
        if epoch >= self.epochs:
            pass  # no epoch left to decide for
        elif batch_size >= self.max_batch_size:
            reasons.append("largest batch")
        else:
            timer += 1
            value = None
            if timer >= self.duration or epoch % self.every == 0:
                reading = read(self._eigenvalue(), self.name)
                columns = reading.columns()
                value = reading.value if reading.problem is None else None
                if reading.problem is not None:
                    reasons.append(reading.problem)
            fallen = value is not None and reference is not None and value <= reference / self.threshold
            if fallen:
                reasons.append("eigenvalue")
            elif timer >= self.duration:
                reasons.append("duration")
            elif value is not None and reference is None:
                reasons.append("reference")
                reference = value
            if fallen or timer >= self.duration:
                reference, timer = value, 0
                batch_size = min(batch_size * self.growth, self.max_batch_size)
                omega = 0.0 if batch_size == self.max_batch_size else omega / self.growth
        if epoch in self.decay_epochs:
            reasons.append("decay")
        if omega and 2 * epoch >= self.epochs:
            omega = 0.0
            if epoch < self.epochs:
                reasons.append("half of the epochs")
        # Only here, so that an eigenvalue computation that fails leaves everything as it was.
        self.reference, self.timer, self._omega = reference, timer, omega
        return batch_size, {**columns, "reference": reference, "timer": timer}, reasons

    def _options(self) -> dict[str, Any]:
        return {
            **super()._options(),
            "max_batch_size": self.max_batch_size,
            "growth": self.growth,
            "threshold": self.threshold,
            "duration": self.duration,
            "every": self.every,
            "adversarial_share": self._share,
        }

    def _own_state(self) -> dict[str, Any]:
        return {"reference": self.reference, "timer": self.timer, "omega": self._omega}

    def _check_own_state(self, loaded: state.Loaded) -> Callable[[], None]:
        where = f"{self.name}.load_state_dict:"
        own = state.mapping(f"{where} own", loaded.own, ("reference", "timer", "omega"))
        state.count(f"{where} batch_size", loaded.batch_size, least=self._first_batch, most=self.max_batch_size)
        timer = state.count(f"{where} own.timer", own["timer"], most=self.duration)
        omega = state.finite(f"{where} own.omega", own["omega"], high=self._share)
        reference = own["reference"]
        if reference is not None:
            reference = state.finite(f"{where} own.reference", reference)

        def restore() -> None:
            self.reference, self.timer, self._omega = reference, timer, omega

        return restore
