"""Whole training steps: what an optimizer costs beside SGD, in the same process, step by step by turns."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

import kronfac
from kronfac.cli.bench.measure import MIN_ROUNDS, Clock, threads
from kronfac.cli.bench.networks import NETWORKS
from kronfac.cli.errors import RunError

SGD = "sgd"
LEARNING_RATE = 1e-4  # training is not the point: nothing may overflow, because a skipped step is a cheap one


@dataclass(frozen=True)
class Workload:
    """A network, a loss and one batch.

    Attributes:
        name: a key of `networks.NETWORKS`.
        batch: examples.
        loss: (output, target) -> scalar, averaged over examples (and tokens).
        likelihood: what the loss is the negative logarithm of.
        data: batch -> (input, target).
    """

    name: str
    batch: int
    loss: Callable[[Tensor, Tensor], Tensor]
    likelihood: str | kronfac.curvature.Likelihood
    data: Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Schedule:
    """How often statistics are taken and inverses renewed; the first is a divisor of the second."""

    factor_every: int
    inverse_every: int

    def __post_init__(self) -> None:
        if self.factor_every < 1 or self.inverse_every % self.factor_every:
            raise ValueError(
                f"Schedule: expected inverse_every to be a multiple of factor_every >= 1, got {self.factor_every} and "
                f"{self.inverse_every}"
            )

    def kind(self, step: int) -> str:
        """What step number `step` (from 0) has to do: "inverse" (statistics as well), "factor" or "plain"."""
        if step % self.inverse_every == 0:
            return "inverse"
        return "factor" if step % self.factor_every == 0 else "plain"

    def shares(self) -> dict[str, float]:
        """Which part of the steps is of which kind."""
        kinds = [self.kind(step) for step in range(self.inverse_every)]
        return {kind: kinds.count(kind) / len(kinds) for kind in dict.fromkeys(kinds)}

    def __str__(self) -> str:
        return f"{self.factor_every}/{self.inverse_every}"


SCHEDULES = (Schedule(10, 100), Schedule(1, 10))


def _images(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))


def _pixels(batch: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(batch, 784)
    return x, x


def _vectors(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 784), torch.randint(10, (batch,))


def _tokens(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randint(1000, (batch, 64)), torch.randint(1000, (batch, 64))


def _pixel_loss(output: Tensor, target: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(output, target, reduction="sum") / len(output)


def _token_loss(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output.flatten(0, 1), target.flatten())


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("resnet20", 128, functional.cross_entropy, "categorical", _images),
        Workload("autoencoder", 500, _pixel_loss, "bernoulli", _pixels),
        Workload("mlp", 128, functional.cross_entropy, "categorical", _vectors),
        Workload("transformer", 32, _token_loss, kronfac.Categorical(dim=-1), _tokens),
    )
}

Phases = dict[str, float]


class Trainer(Protocol):
    """One side of the comparison: owns a model and trains it."""

    def step(self) -> Phases:
        """Train one step and return seconds by phase."""

    def check(self) -> None:
        """Raise RunError where the steps that were timed did not do their work."""


class OptimizerTrainer:
    """Anything that is used as torch's optimizers are.

    Args:
        model, optimizer, workload, batch: what to train, on what.
        before_step: called between backward and `optimizer.step()`: preconditioners that stand beside an optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        workload: Workload,
        batch: tuple[Tensor, Tensor],
        before_step: Callable[[], object] | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.model, self.optimizer, self.workload = model, optimizer, workload
        self.input, self.target = batch
        self.before_step, self.clock = before_step, clock

    def step(self) -> Phases:
        """Forward, backward, optimizer, each timed."""
        start = self.clock()
        self.optimizer.zero_grad()
        loss = self.workload.loss(self.model(self.input), self.target)
        forward = self.clock()
        loss.backward()  # type: ignore[no-untyped-call]
        backward = self.clock()
        if self.before_step is not None:
            self.before_step()
        self.optimizer.step()
        end = self.clock()
        return {"forward": forward - start, "backward": backward - forward, "step": end - backward}

    def check(self) -> None:
        """Parameters are finite, and no step was skipped."""
        check_finite(self.model)
        skipped = getattr(self.optimizer, "skipped_steps", 0)
        if skipped:
            raise RunError(
                f"{self.workload.name}: {skipped} steps were skipped for non-finite values; no times to report"
            )


def check_finite(model: nn.Module) -> None:
    """Raise RunError where a parameter is not finite: whatever was timed, it was not training."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise RunError(f"parameter {name} is not finite after the timed steps; the times are void")


MakeTrainer = Callable[[nn.Module, Workload, tuple[Tensor, Tensor], Schedule], Trainer]


def sgd(model: nn.Module, workload: Workload, batch: tuple[Tensor, Tensor], schedule: Schedule) -> Trainer:
    """What every ratio is taken against."""
    return OptimizerTrainer(model, torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9), workload, batch)


def kfac(model: nn.Module, workload: Workload, batch: tuple[Tensor, Tensor], schedule: Schedule) -> Trainer:
    """`kronfac.KFAC` with its defaults."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # norms and embeddings train as SGD, here as for any user
        optimizer = kronfac.KFAC(
            model,
            lr=LEARNING_RATE,
            likelihood=workload.likelihood,
            factor_every=schedule.factor_every,
            inverse_every=schedule.inverse_every,
            seed=0,
        )
    return OptimizerTrainer(model, optimizer, workload, batch)


def run_steps(
    workload: Workload,
    schedule: Schedule,
    thread_count: int,
    *,
    makers: Mapping[str, MakeTrainer] | None = None,
    periods: int = MIN_ROUNDS,
    batch: int | None = None,
    profile: bool = False,
) -> dict[str, Any]:
    """Train copies of one network side by side and return what a step costs.

    Step 0 (first touches, first statistics and inverses) is not counted; the steps after it are whole periods of
    `schedule.inverse_every` steps, taken by turns: one of each side.

    Args:
        workload: what is trained.
        schedule: of the curvature.
        thread_count: for torch.
        makers: sides by name; `sgd` is put first. None: `kfac` alone.
        periods: whole periods, and so samples of the rarest kind of step.
        batch: examples, instead of the workload's own number.
        profile: add torch.profiler's operators over one more period.

    Returns:
        One entry of a report: per side the median time of each kind of step, its phases, the amortised mean per step
        (medians weighted by how often each kind occurs), the plain mean over all whole periods, `ratio`, the amortised
        mean over SGD's median step, and `cycle_ratio`: the time of a whole period over that of SGD's steps beside it,
        median over the periods. No kind of step hides behind another in that one.
    """
    chosen: dict[str, MakeTrainer] = {SGD: sgd, **({"kronfac": kfac} if makers is None else makers)}
    with threads(thread_count):
        torch.manual_seed(0)
        network = NETWORKS[workload.name]()
        data = workload.data(batch or workload.batch)
        trainers = {name: make(copy.deepcopy(network), workload, data, schedule) for name, make in chosen.items()}
        recorded: dict[str, list[tuple[str, Phases]]] = {name: [] for name in trainers}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for step in range(periods * schedule.inverse_every + 1):
                for name, trainer in trainers.items():
                    phases = trainer.step()
                    if step > 0:
                        recorded[name].append((schedule.kind(step), phases))
            for trainer in trainers.values():
                trainer.check()
            profiles = {
                name: operator_times(trainer.step, schedule.inverse_every)
                for name, trainer in trainers.items()
                if profile
            }
    # SGD knows no kinds: all its steps are alike.
    recorded[SGD] = [("plain", phases) for _, phases in recorded[SGD]]
    base = statistics.median(sum(phases.values()) for _, phases in recorded[SGD])
    sides = {
        name: summarise(records, {"plain": 1.0} if name == SGD else schedule.shares(), base)
        for name, records in recorded.items()
    }
    cycles = {name: cycle_times(records, schedule.inverse_every) for name, records in recorded.items()}
    for name, times in cycles.items():
        sides[name]["cycle_ratio"] = statistics.median(a / b for a, b in zip(times, cycles[SGD], strict=True))
    for name, operators in profiles.items():
        sides[name]["operators"] = operators
    return {
        "network": workload.name,
        "batch": batch or workload.batch,
        "schedule": str(schedule),
        "threads": thread_count,
        "periods": periods,
        "sgd_median": base,
        "sides": sides,
    }


def summarise(records: Sequence[tuple[str, Phases]], shares: Mapping[str, float], base: float) -> dict[str, Any]:
    """Medians per kind of step and their mean over a period.

    Args:
        records: (kind of step, seconds by phase), whole periods.
        shares: the part of all steps that each kind makes up.
        base: seconds that ratios are taken against.
    """
    kinds: dict[str, Any] = {}
    for kind in shares:
        steps = [phases for label, phases in records if label == kind]
        kinds[kind] = {
            "median": statistics.median(sum(phases.values()) for phases in steps),
            "count": len(steps),
            "phases": {name: statistics.median(phases[name] for phases in steps) for name in steps[0]},
        }
    amortised = sum(share * kinds[kind]["median"] for kind, share in shares.items())
    return {
        "amortised": amortised,
        "mean": statistics.fmean(sum(phases.values()) for _, phases in records),
        "ratio": amortised / base,
        "kinds": kinds,
    }


def cycle_times(records: Sequence[tuple[str, Phases]], period: int) -> list[float]:
    """Seconds per step of each whole period.

    Args:
        records: (kind of step, seconds by phase), whole periods one after another.
        period: steps in one.
    """
    times = [sum(phases.values()) for _, phases in records]
    return [statistics.fmean(times[start : start + period]) for start in range(0, len(times), period)]


def operator_times(step: Callable[[], object], count: int, limit: int = 15) -> list[dict[str, Any]]:
    """The operators that most time was spent in itself, over `count` steps; the last entry is all others together."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(count):
            step()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events) or 1.0
    rows = [
        {
            "operator": event.key,
            "seconds_per_step": event.self_cpu_time_total * 1e-6 / count,
            "share": event.self_cpu_time_total / total,
            "calls_per_step": event.count / count,
        }
        for event in events
    ]
    rest = rows[limit:]
    if rest:
        everything = {name: sum(row[name] for row in rest) for name in ("seconds_per_step", "share", "calls_per_step")}
        rows = [*rows[:limit], {"operator": f"{len(rest)} others", **everything}]
    return rows


def step_lines(entry: Mapping[str, Any]) -> list[str]:
    """What `run_steps` found, for reading; times in ms."""
    lines = [
        f"{entry['network']}, batch {entry['batch']}, factors/inverses every {entry['schedule']}, "
        f"{entry['threads']} thread(s), {entry['periods']} period(s)"
    ]
    for name, side in entry["sides"].items():
        kinds = ", ".join(f"{kind} {_kind_text(found)}" for kind, found in side["kinds"].items())
        lines.append(
            f"  {name:<14} {side['amortised'] * 1e3:8.2f} ms/step  {side['ratio']:6.2f}x  cycle "
            f"{side['cycle_ratio']:6.2f}x   {kinds}"
        )
        for row in side.get("operators", ()):
            lines.append(
                f"      {row['share']:6.1%}  {row['seconds_per_step'] * 1e3:9.3f} ms  "
                f"{row['calls_per_step']:8.1f} calls  {row['operator']}"
            )
    return lines


def _kind_text(found: Mapping[str, Any]) -> str:
    phases = " + ".join(f"{phase} {seconds * 1e3:.2f}" for phase, seconds in found["phases"].items())
    return f"{found['median'] * 1e3:.2f} ({phases})"
