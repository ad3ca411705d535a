"""What all Newton-type optimizers share, on TRCG: one step is a transaction from one set of random numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.optim.newton import TRCG, NewtonOptimizer
from kronfac.optim.newton.base import COMMON_OPTIONS, NewtonStep
from kronfac.optim.newton.evaluation import Evaluation
from tests.operators.state import snapshot, unchanged
from tests.optim.newton.problems import Classified, point


def differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    return {key for key in before if before[key] != after[key]}


def test_dropout_is_the_same_in_all_evaluations_of_a_step_and_another_in_the_next() -> None:
    problem = Classified(examples=30, extra=nn.Dropout(0.5))
    masks: list[Tensor] = []
    problem.model[2].register_forward_hook(lambda module, args, out: masks.append((out == 0).clone()))
    optimizer = TRCG(problem.model.parameters(), examples=30)
    firsts = []
    for _ in range(2):
        masks.clear()
        optimizer.step(problem)
        assert len(masks) >= 3  # gradient, curvature, trial point
        assert all(torch.equal(mask, masks[0]) for mask in masks)
        firsts.append(masks[0])
    assert not torch.equal(*firsts)


def test_the_global_stream_moves_as_by_one_evaluation() -> None:
    problem = Classified(examples=30, extra=nn.Dropout(0.5))
    torch.manual_seed(3)
    problem(None)
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    TRCG(problem.model.parameters(), examples=30, chunk_size=None).step(problem)
    assert torch.equal(torch.get_rng_state(), expected)


def test_running_statistics_are_those_of_the_gradients_evaluation() -> None:
    problem = Classified(examples=30, extra=nn.BatchNorm1d(6))
    norm = problem.model[2]
    assert isinstance(norm, nn.BatchNorm1d)
    with torch.no_grad():  # what one forward in train mode makes of them
        hidden = problem.model[:2](problem.x)
    mean, variance = 0.1 * hidden.mean(0), 0.9 + 0.1 * hidden.var(0)
    own = norm.running_mean
    optimizer = TRCG(problem.model.parameters(), examples=30, hessian_sample=10)
    optimizer.step(problem)
    assert optimizer.last_step is not None
    assert optimizer.last_step.accepted
    assert norm.running_mean is own
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    assert norm.num_batches_tracked is not None
    assert int(norm.num_batches_tracked) == 1


def test_statistics_move_with_every_chunk_of_the_gradient() -> None:
    problem = Classified(examples=30, extra=nn.BatchNorm1d(6))
    TRCG(problem.model.parameters(), examples=30, chunk_size=10).step(problem)
    assert int(problem.model[2].num_batches_tracked) == 3  # type: ignore[arg-type]


def failing(problem: Classified, when: int, kind: str) -> Any:
    """The problem's closure, which misbehaves at one call."""
    calls: Iterator[int] = iter(range(1000))

    def closure(indices: Tensor | None) -> Any:
        loss, out = problem(indices)
        if next(calls) != when:
            return loss, out
        if kind == "raise":
            raise KeyboardInterrupt
        return loss * math.nan, out

    return closure


@pytest.mark.parametrize("kind", ["raise", "nan"])
@pytest.mark.parametrize("when", [0, 1, 2])  # the gradient, the curvature, the loss on the sample of the ratio
def test_a_step_that_fails_leaves_everything_as_it_was(when: int, kind: str) -> None:
    problem = Classified(examples=30, extra=nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.3)))
    optimizer = TRCG(problem.model.parameters(), examples=30, gradient_sample=20, hessian_sample=5, ratio_sample=10)
    optimizer.step(problem)
    state = optimizer.state_dict()
    error = KeyboardInterrupt if kind == "raise" else ValueError
    with unchanged(problem.model), pytest.raises(error):
        optimizer.step(failing(problem, when, kind))
    assert optimizer.steps == len(optimizer.history) == 1
    after = optimizer.state_dict()
    assert torch.equal(after["kronfac"].pop("generator"), state["kronfac"].pop("generator"))
    assert after == state
    optimizer.step(problem)  # and it goes on


def test_trial_points_leave_no_trace() -> None:
    problem = Classified(examples=30)
    optimizer = TRCG(problem.model.parameters(), examples=30, radius=20.0, max_rejections=0, eta2=0.24)
    for _ in range(20):
        before = snapshot(problem.model)
        optimizer.step(problem)
        assert optimizer.last_step is not None
        if not optimizer.last_step.accepted:
            break
    else:
        pytest.fail("no step was rejected")
    assert not differing(before, snapshot(problem.model))


def test_grad_is_left_alone() -> None:
    problem = Classified(examples=30)
    TRCG(problem.model.parameters(), examples=30).step(problem)
    assert all(p.grad is None for p in problem.model.parameters())


def test_frozen_parameters_stay() -> None:
    problem = Classified(examples=30)
    frozen = problem.model[0].weight
    frozen.requires_grad_(False)
    before = frozen.clone()
    optimizer = TRCG(problem.model.parameters(), examples=30)
    start = float(optimizer.step(problem))
    assert float(optimizer.step(problem)) < start
    assert torch.equal(frozen, before)


def test_only_none_is_passed_where_examples_is_not_given() -> None:
    problem = Classified(examples=30)
    optimizer = TRCG(problem.model.parameters())
    optimizer.step(problem)
    assert set(problem.asked) == {None}
    record = optimizer.last_step
    assert record is not None
    assert record.propagations == 1 + record.ratio_examples + 2 * record.iterations  # in passes over the data


def test_a_share_is_rounded_and_all_is_none() -> None:
    problem = Classified(examples=30)
    for size, expected in ((0.51, 15), (1e-6, 1), (1, 1), (29, 29), (1.0, None), (30, None), (None, None)):
        problem.asked.clear()
        optimizer = TRCG(problem.model.parameters(), examples=30, gradient_sample=size)
        optimizer.step(problem)
        asked = problem.asked[0]
        assert (None if asked is None else len(asked)) == expected


def test_param_groups_are_one_vector() -> None:
    whole, parted = Classified(examples=30), Classified(examples=30)
    layers = list(parted.model.children())
    first = TRCG(whole.model.parameters(), examples=30)
    second = TRCG(
        [{"params": layers[0].parameters(), "name": "first"}, {"params": layers[2].parameters()}], examples=30
    )
    for _ in range(3):
        first.step(whole)
        second.step(parted)
    for a, b in zip(whole.model.parameters(), parted.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ([{"lr": 0.1}], ValueError, r"params\[0\]: lr: not an option; expected some of curvature"),
        ([{}, {"eta2": 0.1}], ValueError, r"params\[1\]: eta2: expected 0.0001 as in the first group, got 0.1"),
        ([{"eta2": 3}], ValueError, r"params\[0\]: eta2: expected a number >= 0 and < 0.25"),
        ([{"gradient_sample": 0.5}], ValueError, r"params\[0\]: gradient_sample: expected None without examples="),
    ],
)
def test_groups_that_do_not_fit(groups: list[dict[str, Any]], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^TRCG: {message}"):
        TRCG([{"params": [point(1.0)], **group} for group in groups])


def test_a_group_cannot_be_added_later() -> None:
    optimizer = TRCG([point(1.0)])
    with pytest.raises(
        RuntimeError, match=r"^TRCG: add_param_group: expected all parameters when the optimizer is made"
    ):
        optimizer.add_param_group({"params": [point(2.0)]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"examples": 0}, ValueError, "examples: expected at least 1, got 0"),
        ({"examples": 2.5}, TypeError, "examples: expected an integer or None"),
        ({"gradient_sample": 0.5}, ValueError, "gradient_sample: expected None without examples="),
        ({"chunk_size": 4}, ValueError, "chunk_size: expected None without examples="),
        ({"examples": 5, "hessian_sample": 6}, ValueError, "hessian_sample: expected at most examples=5, got 6"),
        ({"examples": 5, "hessian_sample": 0.0}, ValueError, "hessian_sample: expected None .all examples., a float"),
        ({"examples": 5, "hessian_sample": 1.5}, ValueError, "hessian_sample: expected None"),
        ({"examples": 5, "hessian_sample": True}, TypeError, "hessian_sample: expected None"),
        ({"examples": 5, "ratio_sample": "all"}, ValueError, 'ratio_sample: expected "gradient" or a sample size'),
        ({"examples": 5, "chunk_size": 0}, ValueError, "chunk_size: expected an integer >= 1"),
        ({"curvature": "fisher"}, ValueError, 'likelihood: expected a likelihood with curvature="fisher"'),
        ({"likelihood": "gaussian"}, ValueError, 'likelihood: expected None without curvature="fisher"'),
        ({"curvature": "empirical"}, ValueError, "curvature: expected one of 'hessian', 'ggn', 'fisher'"),
        ({"seed": -1}, ValueError, "seed: expected an integer >= 0"),
        ({"history": -1}, ValueError, "history: expected an integer >= 0"),
    ],
)
def test_common_options_are_checked(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^TRCG: {message}"):
        TRCG([point(1.0)], **options)


def test_a_step_needs_a_closure() -> None:
    with pytest.raises(TypeError, match=r"^TRCG.step: closure: expected a callable, got None"):
        TRCG([point(1.0)]).step()
    with pytest.raises(TypeError, match=r"^TRCG.step: closure: expected a callable of indices, got int"):
        TRCG([point(1.0)]).step(3)  # type: ignore[arg-type]


class Scaled(NewtonOptimizer):
    """A method of a few lines, as the base's docstring promises: gradient steps of a carried length."""

    OPTIONS = COMMON_OPTIONS
    VALUES: ClassVar = {"last": lambda where, value: value}

    def __init__(self, params: Any, length: float = 0.1) -> None:
        options = dict.fromkeys(COMMON_OPTIONS) | {"curvature": "hessian"}
        super().__init__(params, options, {"last": None})
        self.length = length

    def _iterate(
        self, run: Evaluation, options: Mapping[str, Any], values: Mapping[str, Any]
    ) -> tuple[NewtonStep, Mapping[str, Any]]:
        sample = run.sample(options["gradient_sample"])
        loss, gradient = run.gradient(sample)
        step = gradient * -self.length
        run.move(step)
        record = NewtonStep(
            step=self.steps,
            loss=loss,
            loss_after=run.loss(sample, step),
            ratio=None,
            accepted=run.moved,
            status="gradient",
            iterations=0,
            step_norm=float(step.norm()),
            gradient_norm=float(gradient.norm()),
            gradient_examples=1,
            hessian_examples=1,
            ratio_examples=1,
            propagations=run.propagations,
        )
        return record, {"last": step}


def test_a_method_of_ones_own_carries_vectors() -> None:
    w = point(1.0, -2.0)
    optimizer = Scaled([w], 0.25)
    optimizer.step(lambda _: w.square().sum())
    assert w.tolist() == [0.5, -1.0]
    state = optimizer.state_dict()
    assert state["kronfac"]["values"]["last"].tolist() == [-0.5, 1.0]
    again = Scaled([w])
    again.load_state_dict(state)
    state["kronfac"]["values"]["last"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"values: last: expected a finite vector \(2,\), got shape \(3,\)"):
        again.load_state_dict(state)


def test_a_step_that_overflows_is_refused() -> None:
    w = point(1.0)
    with pytest.raises(ValueError, match=r"^Scaled.step: the step leads to parameters that are not finite"):
        Scaled([w], 1e308).step(lambda _: 1e10 * w.square().sum())
    assert w.tolist() == [1.0]


def test_half_precision_parameters() -> None:
    problem = Classified(examples=30)
    model = problem.model.bfloat16()
    x = problem.x.bfloat16()

    def closure(_: Tensor | None) -> Tensor:
        return functional.cross_entropy(model(x).float(), problem.y)

    optimizer = TRCG(model.parameters())
    start = float(optimizer.step(closure))
    for _ in range(5):
        loss = optimizer.step(closure)
    assert loss.dtype == torch.float32
    assert float(loss) < 0.7 * start
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_schedulers_hooks_and_zero_grad_of_torch_find_what_they_expect() -> None:
    problem = Classified(examples=30)
    optimizer = TRCG(problem.model.parameters(), examples=30)
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    optimizer.zero_grad()
    optimizer.step(problem)
    assert called == ["before", "after"]
    assert "TRCG" in repr(optimizer)
