"""No public function changes anything of the model or of the random streams, whether it succeeds or fails."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

import kronfac
from kronfac.operators import ggn, hessian
from kronfac.spectrum import block_densities, block_traces, density, diagonal, eigsh, trace
from tests.operators.cases import Case, dense_hessian, make_case, relative_error
from tests.operators.state import snapshot, unchanged


def _training_case() -> Case:
    """As after a training step: train mode, momenta in the buffers, gradients there, one layer kept in eval mode."""
    case = make_case("batchnorm")
    case.model.train()
    case.model[1].momentum = 0.3  # type: ignore[index,union-attr,assignment]
    case.loss_fn(case.model(case.inputs), case.targets).backward()
    case.model[1].eval()  # type: ignore[index,union-attr,operator]
    case.model[5].bias.register_hook(lambda grad: 100 * grad)  # type: ignore[index,union-attr,operator]
    case.model[0].register_forward_hook(lambda module, args, output: None)  # type: ignore[index,union-attr,operator]
    return case


USES: dict[str, Callable[[Any], Any]] = {
    "vector": lambda op: op @ torch.ones(op.shape[0], dtype=op.dtype),
    "columns": lambda op: op @ torch.ones(op.shape[0], 3, dtype=op.dtype),
    "blocks": lambda op: [block.to_dense() for block in op.blocks().values()],
    "to_dense": lambda op: op.to_dense(),
    "to_scipy": lambda op: op.to_scipy() @ np.ones(op.shape[0]),
    "release": lambda op: op.release(),
    "eigsh": lambda op: eigsh(op, 2),
    "trace": lambda op: trace(op, probes=4),
    "xtrace": lambda op: trace(op, "xtrace", probes=4),
    "hutch++": lambda op: trace(op, "hutch++", probes=6),
    "diagonal": lambda op: diagonal(op, "xdiag", probes=4),
    "block_traces": lambda op: block_traces(op, probes=2),
    "block_traces restricted": lambda op: block_traces(op, probes=2, restricted=True),
    "density": lambda op: density(op, probes=2, steps=5),
    "density log": lambda op: density(op, axis="log", probes=2, steps=5, checks=2),
    "block_densities": lambda op: block_densities(op, probes=2, steps=3),
}


@pytest.mark.parametrize("make", [hessian, ggn])
@pytest.mark.parametrize("form", ["batch", "list", "loader", "workers"])
@pytest.mark.parametrize("use", USES)
def test_nothing_changes(make: Any, form: str, use: str) -> None:
    if form == "workers" and use not in ("vector", "eigsh"):
        return  # processes are slow to start, and read the data no differently for the other uses
    case = _training_case()
    dataset = TensorDataset(case.inputs, case.targets)
    generator = torch.Generator().manual_seed(3)
    data: Any = {
        "batch": (case.inputs, case.targets),
        "list": [(case.inputs[:4], case.targets[:4]), (case.inputs[4:], case.targets[4:])],
        "loader": DataLoader(dataset, batch_size=4, generator=generator),
        "workers": DataLoader(dataset, batch_size=4, num_workers=1),
    }[form]
    with unchanged(case.model, generator):
        operator = make(case.model, case.loss_fn, data)
    with unchanged(case.model, generator):
        USES[use](operator)


def test_hooks_on_parameters_do_not_enter() -> None:
    case = _training_case()
    dense = hessian(case.model, case.loss_fn, (case.inputs, case.targets)).to_dense()
    assert relative_error(dense, dense_hessian(case.model, case.loss_fn, case.inputs, case.targets)) < 1e-10


class _Counting(nn.Module):
    """Writes to its buffers in every forward, in place and by replacing them."""

    calls: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return torch.tanh(self.linear(x))


@pytest.mark.parametrize("make", [hessian, ggn])
def test_buffers_written_in_the_forward(make: Any) -> None:
    model = _Counting()
    batch = (torch.randn(4, 3), torch.randn(4, 2))
    with unchanged(model):
        make(model, functional.mse_loss, batch).to_dense()


@pytest.mark.parametrize("make", [hessian, ggn])
def test_nothing_changes_when_it_fails(make: Any) -> None:
    case = _training_case()

    def fails(output: Tensor, target: Tensor) -> Tensor:
        torch.rand(1), random.random(), np.random.rand()
        raise ArithmeticError("on purpose")

    with unchanged(case.model), pytest.raises(ArithmeticError, match="on purpose"):
        make(case.model, fails, (case.inputs, case.targets))


def test_the_helper_notices() -> None:
    def step(model: nn.Module) -> None:
        model[1].running_mean.add_(1)  # type: ignore[index,union-attr,operator]

    changes: list[Callable[[nn.Module], object]] = [
        lambda model: model.eval(),
        lambda model: model.zero_grad(),
        lambda model: torch.rand(1),
        lambda model: np.random.rand(),
        lambda model: random.random(),
        lambda model: model.register_forward_hook(print),
        lambda model: model.requires_grad_(False),
        step,
    ]
    for change in changes:
        model = _training_case().model
        before = snapshot(model)
        change(model)
        assert snapshot(model) != before


class _Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Adds noise from all three global streams to each example."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __len__(self) -> int:
        return len(self.case.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(self.case.inputs.shape[1:], dtype=torch.float64) + random.random() + np.random.rand()
        return self.case.inputs[index] + noise, self.case.targets[index]


@pytest.mark.parametrize("make", [hessian, ggn])
def test_augmentation_from_global_streams_is_frozen(make: Any) -> None:
    case = make_case("mlp")
    loader = DataLoader(_Augmented(case), batch_size=4)
    with unchanged(case.model):
        operator = make(case.model, case.loss_fn, loader)
        dense = operator.to_dense()
    torch.rand(3), random.random(), np.random.rand()  # the streams move on between products
    with unchanged(case.model):
        again = operator.to_dense()
    assert torch.equal(dense, again)
    assert relative_error(dense, dense.mT) < 1e-12


class _Shuffling(Sampler[int]):
    """Another order in every pass, from the loader's own generator or one that nobody can know of."""

    def __init__(self, size: int, generator: torch.Generator | None) -> None:
        self.size = size
        self.generator = generator
        self.hidden = torch.Generator().manual_seed(1)

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.size, generator=self.generator or self.hidden).tolist())

    def __len__(self) -> int:
        return self.size


def test_order_from_a_known_generator_is_frozen() -> None:
    case = make_case("mlp")
    sampler = _Shuffling(len(case.inputs), torch.Generator().manual_seed(4))
    loader = DataLoader(TensorDataset(case.inputs, case.targets), batch_size=4, sampler=sampler, drop_last=True)
    assert sampler.generator is not None
    with unchanged(case.model, sampler.generator):
        dense = hessian(case.model, case.loss_fn, loader).to_dense()
    assert relative_error(dense, dense.mT) < 1e-12


@pytest.mark.parametrize("make", [hessian, ggn])
def test_hidden_shuffling_is_refused(make: Any) -> None:
    case = make_case("mlp")
    sampler = _Shuffling(len(case.inputs), None)
    loader = DataLoader(TensorDataset(case.inputs, case.targets), batch_size=4, sampler=sampler)
    with unchanged(case.model), pytest.raises(ValueError, match="differs from the first pass"):
        make(case.model, case.loss_fn, loader)


def test_kfac_does_not_notice_an_analysis() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    inputs, targets = torch.randn(8, 4), torch.randint(0, 3, (8,))
    expected = hessian(model, functional.cross_entropy, (inputs, targets)).to_dense()
    optimizer = kronfac.KFAC(model, lr=0.0, inverse_every=1, seed=0)
    for forced in (nullcontext(), optimizer.record_statistics()):
        with forced:
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), targets).backward()
            with unchanged(model):
                for make in (hessian, ggn):
                    operator = make(model, functional.cross_entropy, (inputs, targets))
                    dense = operator.to_dense()
                    assert make is ggn or relative_error(dense, expected) < 1e-6
        optimizer.step()
    alone = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    alone.load_state_dict(model.state_dict())
    other = kronfac.KFAC(alone, lr=0.0, inverse_every=1, seed=0)
    for _ in range(2):
        other.zero_grad()
        functional.cross_entropy(alone(inputs), targets).backward()
        other.step()
    ours, theirs = optimizer.factors(), other.factors()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name].A, theirs[name].A)
        assert torch.equal(ours[name].G, theirs[name].G)
