"""The running average of the iterates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kronfac.optim import KFAC
from tests.optim.models import equal, mlp, same_tree, snapshot, train_step, vectors
from tests.optim.test_state import through_a_file
from tests.optim.test_step import CountReads


def trained(steps: int = 5, **options: Any) -> tuple[nn.Sequential, KFAC, list[list[Tensor]]]:
    torch.manual_seed(2)
    model = mlp(4, 5, 3, dtype=options.pop("dtype", torch.float64))
    optimizer = KFAC(model, 0.1, **{"averaging": 0.6, **options})
    iterates = []
    for _ in range(steps):
        train_step(model, optimizer, *vectors(6, 4, 3, model[0].weight.dtype))
        iterates.append(snapshot(model))
    return model, optimizer, iterates


def expected(iterates: list[list[Tensor]], weight: float) -> list[Tensor]:
    average = iterates[0]
    for k, iterate in enumerate(iterates[1:], start=2):
        d = min(1 - 1 / k, weight)
        average = [d * a + (1 - d) * p for a, p in zip(average, iterate, strict=True)]
    return average


def test_inside_are_the_averages_and_afterwards_the_iterates() -> None:
    model, optimizer, iterates = trained()
    before = snapshot(model)
    with optimizer.averaged_parameters():
        for ours, theirs in zip(model.parameters(), expected(iterates, 0.6), strict=True):
            torch.testing.assert_close(ours.detach(), theirs)
        assert not equal(snapshot(model), before)
    assert equal(snapshot(model), before)


def test_the_first_iterates_count_equally_and_the_start_does_not() -> None:
    model, optimizer, iterates = trained(4, averaging=0.99)
    means = [torch.stack(parts).mean(0) for parts in zip(*iterates, strict=True)]
    with optimizer.averaged_parameters():
        for ours, theirs in zip(model.parameters(), means, strict=True):
            torch.testing.assert_close(ours.detach(), theirs)


def test_an_exception_and_what_was_written_inside_leave_nothing_behind() -> None:
    model, optimizer, _ = trained()
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())

    def inside() -> None:
        with optimizer.averaged_parameters():
            with torch.no_grad():
                model[0].weight.fill_(torch.nan)
            raise KeyError("evaluation failed")

    with pytest.raises(KeyError):
        inside()
    assert equal(snapshot(model), before)
    assert same_tree(state, optimizer.state_dict())
    with optimizer.averaged_parameters(), pytest.raises(RuntimeError, match=r"step: inside averaged_parameters\(\)"):
        optimizer.step()
    with optimizer.averaged_parameters(), pytest.raises(RuntimeError, match="nested"), optimizer.averaged_parameters():
        pass
    assert equal(snapshot(model), before)


def test_a_skipped_step_is_not_averaged() -> None:
    model, optimizer, iterates = trained()
    model[0].weight.grad.fill_(torch.nan)  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="skipped"):
        optimizer.step()
    with optimizer.averaged_parameters():
        torch.testing.assert_close(model[0].weight.detach(), expected(iterates, 0.6)[0])


def test_resuming_continues_bit_for_bit() -> None:
    model, optimizer, _ = trained()
    saved = through_a_file([model.state_dict(), optimizer.state_dict()])
    twin = mlp(4, 5, 3, dtype=torch.float64)
    other = KFAC(twin, 0.1, averaging=0.6)
    twin.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for _ in range(3):
        batch = vectors(6, 4, 3, torch.float64)
        train_step(model, optimizer, *batch)
        train_step(twin, other, *batch)
    with optimizer.averaged_parameters(), other.averaged_parameters():
        assert equal(snapshot(model), snapshot(twin))
    assert same_tree(optimizer.state_dict(), other.state_dict())


def test_bfloat16_parameters_have_wide_averages() -> None:
    """In bfloat16 itself the average would stand still: 1 % of a step is below its rounding error."""
    model, optimizer, iterates = trained(200, dtype=torch.bfloat16, averaging=0.99)
    wide = expected([[p.float() for p in iterate] for iterate in iterates], 0.99)
    with optimizer.averaged_parameters():
        for ours, theirs in zip(model.parameters(), wide, strict=True):
            torch.testing.assert_close(ours.detach(), theirs.bfloat16())


def test_it_costs_no_wait_for_the_device() -> None:
    model, optimizer, _ = trained()
    with CountReads() as counter:
        optimizer._averaging.update(list(model.parameters()))  # type: ignore[union-attr]
    assert counter.reads == 0


def test_parameters_of_a_later_group_join_with_their_first_step() -> None:
    model = mlp(4, 5, 3)
    optimizer = KFAC(model, 0.1, params=list(model[0].parameters()), averaging=0.9)
    train_step(model, optimizer, *vectors(6, 4, 3))
    optimizer.add_param_group({"params": list(model[2].parameters())})
    train_step(model, optimizer, *vectors(6, 4, 3))
    before = snapshot(model)
    with optimizer.averaged_parameters():
        assert torch.equal(model[2].weight, before[2])
        assert not torch.equal(model[0].weight, before[0])


def test_refusals() -> None:
    with pytest.raises(RuntimeError, match=r"make the optimizer with averaging=0\.99"):
        KFAC(mlp(3, 2), 0.1).averaged_parameters()
    with (
        pytest.raises(RuntimeError, match="no average before the first step"),
        KFAC(mlp(3, 2), 0.1, averaging=0.9).averaged_parameters(),
    ):
        pass
    for value, error in ((1.0, ValueError), (-0.1, ValueError), ("0.9", TypeError), (True, TypeError)):
        with pytest.raises(error, match="averaging"):
            KFAC(mlp(3, 2), 0.1, averaging=value)  # type: ignore[arg-type]


def test_a_checkpoint_that_does_not_fit_is_refused() -> None:
    _, optimizer, _ = trained()
    saved = optimizer.state_dict()
    plain = KFAC(mlp(4, 5, 3, dtype=torch.float64), 0.1)
    with pytest.raises(ValueError, match=r"averages: the checkpoint has some; make the optimizer with"):
        plain.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"averages: the checkpoint has none; make the optimizer without"):
        optimizer.load_state_dict(plain.state_dict())
    bad: list[tuple[Any, str]] = [
        ({9: {"count": 1, "value": torch.zeros(3)}}, "expected indices below 4, got 9"),
        (
            {0: {"count": 1, "value": torch.zeros(3)}},
            r"averages\[0\]\.value: expected a floating-point tensor of shape",
        ),
        ({0: {"count": -1, "value": torch.zeros(5, 4)}}, r"averages\[0\]\.count"),
        ({0: {"value": torch.zeros(5, 4)}}, "'count' is missing"),
        ({0: {"count": 1, "value": torch.full((5, 4), torch.nan)}}, "expected finite values"),
    ]
    before = copy.deepcopy(optimizer.state_dict())
    for value, match in bad:
        broken = copy.deepcopy(saved)
        broken["kronfac"]["averages"] = value
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(broken)
    assert same_tree(before, optimizer.state_dict())
