"""The problem: MNIST, the network, and what is measured of a trained one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.large_batch.settings import Plan
from kronfac import adversarial, datasets
from kronfac.schedules import top_eigenvalue

_PART = 2000
_SAMPLE_SEED = 12345


@dataclass(frozen=True)
class Data:
    """Training and test examples in memory.

    Attributes:
        inputs: (N, 1, 28, 28), standardised.
        targets: (N,).
        test_inputs: likewise.
        test_targets: likewise.
        bounds: black and white in units of the inputs.
    """

    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    bounds: tuple[float, float]

    def eps(self, plan: Plan) -> float:
        """The plan's ε in units of the inputs."""
        return plan.eps * (self.bounds[1] - self.bounds[0])


def load_data(data_dir: Path, plan: Plan) -> Data:
    """Read MNIST.

    Raises:
        DatasetError: files that are missing or broken.
        ValueError: fewer examples than the plan wants.
    """
    data = datasets.load("mnist", data_dir)
    if len(data.train) < plan.examples:
        raise ValueError(f"--examples {plan.examples}: there are {len(data.train)} training examples")
    train = data.train.head(plan.examples)
    # By the reader's own arithmetic, so that no input lies outside by a rounding error.
    pixels = torch.tensor([0.0, 255.0]).sub_(torch.tensor(data.mean[0])).div_(torch.tensor(data.std[0]))
    bounds = (float(pixels[0]), float(pixels[1]))
    return Data(train.inputs, train.targets, data.test.inputs, data.test.targets, bounds)


def make_network(seed: int) -> nn.Sequential:
    """Two convolutions of stride 2, two linear layers; torch's initialisation from a seed of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 7 * 7, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats."""
    return F.cross_entropy(logits, targets)


def attack(plan: Plan, data: Data) -> Any:
    """FGSM as ABSA uses it, in the form that `kronfac.schedules.AdaptiveBatch` takes."""
    return partial(adversarial.fgsm, eps=data.eps(plan), bounds=data.bounds)


def eigenvalue(network: nn.Module, plan: Plan, data: Data) -> Any:
    """What ABS and ABSA are steered by: the top eigenvalue over a fixed sample."""
    return top_eigenvalue(
        network,
        loss_of,
        (data.inputs, data.targets),
        examples=plan.eigen_examples,
        tolerance=plan.eigen_tolerance,
        seed=_SAMPLE_SEED,
    )


def is_finite(network: nn.Module, data: Data) -> bool:
    """Whether the loss of every batch of test examples is a finite number."""
    with torch.no_grad():
        return all(bool(torch.isfinite(loss_of(network(x), y))) for x, y in _test_batches(data))


def measure(network: nn.Module, plan: Plan, data: Data, *, attacked: bool) -> dict[str, Any]:
    """What is reported of a network at the end of its run.

    Args:
        network: the network.
        plan: of the attacks and of the eigenvalue.
        data: examples.
        attacked: whether to attack it; one that diverged has no gradient for that.

    Returns:
        Plain data: accuracies in [0, 1] with binomial standard errors; the top eigenvalue with its residual, None where
        it did not converge.
    """
    eps = data.eps(plan)
    attacks = {"fgsm": partial(adversarial.fgsm, eps=eps)} if attacked else {}
    result = adversarial.robust_accuracy(network, loss_of, _test_batches(data), attacks, bounds=data.bounds)
    found: dict[str, Any] = {"accuracy": result.clean.value, "accuracy_stderr": result.clean.stderr}
    rows = dict(result.attacked)
    if attacked:
        some = (data.test_inputs[: plan.pgd_examples], data.test_targets[: plan.pgd_examples])
        pgd = {"pgd": partial(adversarial.pgd, eps=eps, steps=10)}
        rows |= adversarial.robust_accuracy(network, loss_of, some, pgd, bounds=data.bounds).attacked
    for name in ("fgsm", "pgd"):
        row = rows.get(name)
        found[name] = None if row is None else row.value
        found[f"{name}_stderr"] = None if row is None else row.stderr
        found[f"{name}_unchanged"] = None if row is None else row.unchanged
    search = top_eigenvalue(
        network,
        loss_of,
        (data.inputs, data.targets),
        examples=plan.final_examples,
        tolerance=plan.final_tolerance,
        products=200,
        seed=_SAMPLE_SEED,
    )()
    converged = bool(search.converged[0])
    return found | {
        "eigenvalue": search.value if converged else None,
        "eigenvalue_residual": search.residual if converged else None,
        "eigenvalue_products": search.products,
    }


def _test_batches(data: Data) -> list[tuple[Tensor, Tensor]]:
    return list(zip(torch.split(data.test_inputs, _PART), torch.split(data.test_targets, _PART), strict=True))
