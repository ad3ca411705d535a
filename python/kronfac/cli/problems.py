"""What there is to train or to look at: a built-in dataset with its network, or the user's own `module:function`."""

from __future__ import annotations

import importlib
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from kronfac import datasets
from kronfac.cli.errors import UsageError, one_line
from kronfac.cli.networks import network_for
from kronfac.cli.user_problem import UserProblem

if TYPE_CHECKING:
    from kronfac.curvature import Likelihood

Loader: TypeAlias = Iterable[tuple[Any, Any]]
LossFunction: TypeAlias = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Problem:
    """A model with its loss and data.

    Attributes:
        name: dataset name or `module:function`.
        model: on the chosen device, in training mode.
        loss_fn: (model output, targets) -> scalar, averaged over the examples of the batch.
        train: batches (inputs, targets); may shuffle.
        test: batches for testing, or None.
        ordered: the training batches in a fixed order, or None where only a loader that may shuffle is known.
        likelihood: what the loss is the negative logarithm of, or None where that is not known.
        batch_size: callable(inputs, targets) giving what a batch counts for; None for its number of examples.
        groups: names of parameters or modules by group, or None for one group per module.
    """

    name: str
    model: nn.Module
    loss_fn: LossFunction
    train: Loader
    test: Loader | None
    ordered: Loader | None
    likelihood: str | Likelihood | None = None
    batch_size: Callable[[Any, Any], float] | None = None
    groups: Mapping[str, Iterable[str]] | None = None

    @property
    def parameters(self) -> int:
        """Number of parameters that require gradients."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def load_problem(
    name: str,
    *,
    data_dir: Path | None = None,
    batch_size: int = 128,
    seed: int = 0,
    device: str = "cpu",
) -> Problem:
    """Build a problem; the initial parameters depend on `seed` alone.

    Args:
        name: "digits", "mnist", "cifar10" or `module:function`.
        data_dir: where the files of "mnist" and "cifar10" are.
        batch_size: for the built-in datasets.
        seed: of the initialisation and of the batch order.
        device: for the model and the batches.

    Raises:
        UsageError: unknown name, bad data, or a function that does not return what it should.
    """
    where = _device(device)
    if ":" in name:
        _seed(seed)
        return _custom(name, where)
    if name not in datasets.NAMES:
        raise UsageError(f"unknown problem {name!r}: expected {', '.join(datasets.NAMES)} or module:function")
    if name != "digits" and data_dir is None:
        raise UsageError(f"{name} is read from its original files: give their directory with --data-dir")
    try:
        data = datasets.load(name, data_dir)
    except datasets.DatasetError as error:
        raise UsageError(str(error)) from None
    _seed(seed)  # after the data: the library that holds the digits draws a number when it is first imported
    return builtin_problem(data, batch_size=batch_size, seed=seed, device=where)


def _seed(seed: int) -> None:
    """All three global streams: the user's function and loaders may draw from any of them."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def builtin_problem(
    data: datasets.Dataset, *, batch_size: int, seed: int, device: torch.device | str = "cpu"
) -> Problem:
    """The problem of a dataset already read; the network is initialised from the global random stream."""
    return Problem(
        name=data.name,
        model=network_for(data.name).to(device),
        loss_fn=nn.functional.cross_entropy,
        train=datasets.Batches(data.train, batch_size, seed=seed, device=device),
        # Without gradients a larger batch costs no memory to speak of.
        test=datasets.Batches(data.test, max(batch_size, 1024), device=device),
        ordered=datasets.Batches(data.train, max(batch_size, 1024), device=device),
        likelihood="categorical",
    )


def fixed_batches(problem: Problem, examples: int | None = None) -> list[tuple[Any, Any]]:
    """The first `examples` training examples (all by default) as a list of batches that stays the same.

    A loader that shuffles is read once, so that every product sees the same data in the same order.

    Raises:
        UsageError: no batches, batches that are no pairs, or that cannot be read or cut.
    """
    return _first(problem, problem.ordered if problem.ordered is not None else problem.train, examples, "training")


def fixed_test_batches(problem: Problem, examples: int | None = None) -> list[tuple[Any, Any]] | None:
    """The same of the test examples, or None where there are none."""
    return None if problem.test is None else _first(problem, problem.test, examples, "test")


def _first(problem: Problem, source: Loader, examples: int | None, role: str) -> list[tuple[Any, Any]]:
    device = next(problem.model.parameters()).device
    kept: list[tuple[Any, Any]] = []
    missing = examples
    for inputs, targets in _pairs(problem.name, source, role):
        inputs, targets = to_device(inputs, device), to_device(targets, device)
        if missing is not None:
            count = count_examples(targets)
            if count > missing:
                if not (isinstance(inputs, Tensor) and isinstance(targets, Tensor)):
                    raise UsageError("--examples: batches that are not plain tensors can only be used whole")
                inputs, targets = inputs[:missing], targets[:missing]
            missing -= min(count, missing)
        kept.append((inputs, targets))
        if missing == 0:
            break
    if not kept:
        raise UsageError(f"{problem.name}: the {role} loader yields no batch")
    return kept


def _pairs(name: str, source: Loader, role: str) -> Iterator[tuple[Any, Any]]:
    try:
        for number, batch in enumerate(source):
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                got = f"{len(batch)} values" if isinstance(batch, tuple | list) else type(batch).__name__
                raise UsageError(f"{name}: batch {number} of the {role} data: expected (inputs, targets), got {got}")
            yield batch[0], batch[1]
    except (UsageError, GeneratorExit):
        raise
    except Exception as error:
        raise UsageError(blame(f"{name}: reading the {role} data failed", error)) from None


def known_likelihood(problem: Problem) -> str | Likelihood:
    """What the problem's loss is the negative logarithm of.

    Raises:
        UsageError: nobody has said so, and a guess would give the Fisher matrix of another distribution.
    """
    if problem.likelihood is None:
        raise UsageError(
            f"--operator fisher: of what is {problem.name}'s loss the negative logarithm? Say so with --likelihood"
        )
    return problem.likelihood


def set_epoch(loader: Loader, epoch: int) -> None:
    """Tell a loader or its sampler which epoch comes, where it wants to know (the convention of DistributedSampler)."""
    for holder in (loader, getattr(loader, "sampler", None)):
        tell = getattr(holder, "set_epoch", None)
        if callable(tell):
            tell(epoch)


def to_device(value: Any, device: torch.device) -> Any:
    """Move tensors, also inside lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(item, device) for item in value)
    return value


def count_examples(targets: Any) -> int:
    """Number of examples in a batch, by the length of its targets."""
    if isinstance(targets, Tensor):
        return targets.shape[0] if targets.ndim else 1
    if isinstance(targets, dict):
        return count_examples(next(iter(targets.values())))
    if isinstance(targets, list | tuple) and targets and isinstance(targets[0], Tensor):
        return count_examples(targets[0])
    if isinstance(targets, Sized):
        return len(targets)
    raise UsageError(f"cannot tell how many examples a batch has: its targets are {type(targets).__name__}")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {one_line(error).split('. ')[0]}") from None
    return device


def _custom(name: str, device: torch.device) -> Problem:
    module_name, _, function_name = name.partition(":")
    if not module_name or not all(part.isidentifier() for part in [*module_name.split("."), function_name]):
        raise UsageError(f"{name!r}: expected module:function, such as my_project.problems:build")
    # An installed command does not look into the working directory; `python -m` does, and users expect it.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise UsageError(f"{name}: there is no module {error.name!r} here or among the installed ones") from None
        raise UsageError(blame(f"{name}: importing {module_name} failed", error)) from None
    except Exception as error:
        raise UsageError(blame(f"{name}: importing {module_name} failed", error)) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UsageError(f"{name}: {module_name} has no function {function_name!r}")
    try:
        result = function()
    except Exception as error:
        raise UsageError(blame(f"{name} failed", error)) from None
    return checked(name, result, device)


def checked(name: str, result: Any, device: torch.device) -> Problem:
    """The problem that a user's function has returned.

    Raises:
        UsageError: it is none.
    """
    expected = "expected (model, loss_fn, loaders)"
    if isinstance(result, UserProblem):
        given = result
    elif isinstance(result, tuple | list) and len(result) == 3:
        model, loss_fn, loaders = result
        # A tuple is (train, test); anything else iterable, a list of batches for one, is the training data alone.
        pair = isinstance(loaders, tuple) and len(loaders) == 2 and not _is_batch(loaders)
        train, test = loaders if pair else (loaders, None)
        given = UserProblem(model, loss_fn, train, test)
    else:
        got = f"{len(result)} values" if isinstance(result, tuple | list) else type(result).__name__
        raise UsageError(f"{name}: {expected}, got {got}")
    model, loss_fn = given.model, given.loss_fn
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name}: {expected}, got {type(model).__name__} for the model (a torch.nn.Module)")
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError(f"{name}: the model has no parameter that requires gradients")
    if not callable(loss_fn):
        raise UsageError(f"{name}: {expected}, got {type(loss_fn).__name__} for the loss function")
    return Problem(
        name,
        model.to(device).train(),
        loss_fn,
        _loader(name, "training", given.data),
        None if given.test is None else _loader(name, "test", given.test),
        ordered=None,
        likelihood=given.likelihood,
        batch_size=given.batch_size,
        groups=given.groups,
    )


def _loader(name: str, role: str, data: Any) -> Loader:
    if isinstance(data, tuple) and len(data) == 2 and _is_batch(data):
        return [(data[0], data[1])]
    if not isinstance(data, Iterable) or isinstance(data, Tensor | Mapping | str):
        raise UsageError(f"{name}: the {role} loader is not iterable over batches ({type(data).__name__})")
    if isinstance(data, Iterator):
        raise UsageError(f"{name}: the {role} loader is an iterator and ends after one epoch; return a DataLoader")
    return data


def _is_batch(pair: tuple[Any, Any]) -> bool:
    """Whether this is (inputs, targets), and no two loaders: these are neither tensors nor dictionaries."""
    return any(isinstance(part, Tensor | Mapping) for part in pair)


def blame(what: str, error: Exception) -> str:
    """One line about an error in somebody else's code: what failed, how, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{what}: {type(error).__name__}: {one_line(error)}{place}"
