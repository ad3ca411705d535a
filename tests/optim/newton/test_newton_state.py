from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kronfac.optim.newton import TRCG
from tests.optim.newton.problems import Classified, point

OPTIONS: dict[str, Any] = {
    "examples": 40,
    "gradient_sample": 0.5,
    "hessian_sample": 7,
    "ratio_sample": "gradient",
    "radius": 2.0,
}


def weights(problem: Classified) -> Tensor:
    return torch.cat([p.detach().flatten() for p in problem.model.parameters()])


def through_file(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_a_run_resumes_bit_for_bit() -> None:
    problem = Classified(examples=40, extra=nn.Dropout(0.2))
    optimizer = TRCG(problem.model.parameters(), **OPTIONS, seed=3)
    for _ in range(3):
        optimizer.step(problem)
    saved = through_file([problem.model.state_dict(), optimizer.state_dict(), torch.get_rng_state()])
    for _ in range(4):
        optimizer.step(problem)

    other = Classified(examples=40, extra=nn.Dropout(0.2))
    resumed = TRCG(other.model.parameters(), examples=40, seed=99)  # the checkpoint's options count
    other.model.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    torch.set_rng_state(saved[2])
    for _ in range(4):
        resumed.step(other)
    assert torch.equal(weights(other), weights(problem))
    assert resumed.last_step == optimizer.last_step
    assert resumed.steps == optimizer.steps == 7
    assert resumed.propagations == optimizer.propagations


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_continue_where_the_original_is(how: str) -> None:
    problem = Classified(examples=40)
    optimizer = TRCG(problem.model.parameters(), **OPTIONS)
    optimizer.step(problem)
    pair = (problem, optimizer)
    other, copied = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert copied.param_groups[0]["params"][0] is next(iter(other.model.parameters()))
    for _ in range(3):
        optimizer.step(problem)
        copied.step(other)
    assert torch.equal(weights(other), weights(problem))
    assert copied.last_step == optimizer.last_step
    assert list(copied.history) == list(optimizer.history)


def test_a_preconditioner_is_made_anew_after_loading() -> None:
    problem = Classified(examples=40)
    made: list[int] = []

    def identity() -> Tensor:
        made.append(1)
        return torch.eye(len(weights(problem)), dtype=torch.float64)

    optimizer = TRCG(problem.model.parameters(), examples=40, preconditioner=identity, preconditioner_every=10)
    optimizer.step(problem)
    optimizer.step(problem)
    assert len(made) == 1
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step(problem)
    assert len(made) == 2


def changed(path: str, value: Any) -> Any:
    """A state_dict of an optimizer like the test's with one entry replaced, or removed for the value `del`."""
    optimizer = TRCG(Classified(examples=40).model.parameters(), **OPTIONS)
    state = copy.deepcopy(optimizer.state_dict())
    *parents, last = path.split(".")
    place: Any = state
    for key in parents:
        place = place[int(key) if key.isdigit() else key]
    if value == "del":
        del place[last]
    else:
        place[last] = value
    return state


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("kronfac", "del", "state_dict: kronfac: missing; was it written by the same optimizer"),
        ("kronfac.values", "del", "kronfac: values: missing"),
        ("kronfac.format", 7, "kronfac.format: expected 1, got 7"),
        ("kronfac.method", "CubicNewton", "kronfac.method: expected 'TRCG', got 'CubicNewton'"),
        ("kronfac.examples", 50, "kronfac.examples: expected 40, got 50"),
        ("kronfac.steps", -1, "kronfac.steps: expected an integer >= 0, got -1"),
        ("kronfac.propagations", 1.5, "kronfac.propagations: expected an integer >= 0, got 1.5"),
        ("kronfac.generator", torch.zeros(3), "kronfac.generator: expected the state of a CPU generator"),
        ("kronfac.values", {}, "kronfac.values: radius: missing"),
        ("kronfac.values.radius", -1.0, "kronfac.values: radius: expected a number > 0"),
        ("kronfac.values.radius", float("nan"), "kronfac.values: radius: expected a number > 0"),
        ("kronfac.values.radius", "5", "kronfac.values: radius: expected a number > 0"),
        ("param_groups", [], "param_groups: expected 1 groups, got 0 groups"),
        ("param_groups.0.params", [0], r"param_groups\[0\].params: expected the indices of 4 parameters"),
        ("param_groups.0.eta2", "del", r"param_groups\[0\]: eta2: missing"),
        ("param_groups.0.eta2", 0.5, r"param_groups\[0\]: eta2: expected a number"),
        ("param_groups.0.gradient_sample", 41, r"param_groups\[0\]: gradient_sample: expected at most examples=40"),
        ("param_groups.0.radius_rule", 3, r"param_groups\[0\]: radius_rule: expected one of"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(path: str, value: Any, message: str) -> None:
    optimizer = TRCG(Classified(examples=40).model.parameters(), **OPTIONS)
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=f"^TRCG.load_state_dict: {message}"):
        optimizer.load_state_dict(changed(path, value))
    after = optimizer.state_dict()
    assert torch.equal(after["kronfac"].pop("generator"), before["kronfac"].pop("generator"))
    assert after == before


def test_what_is_no_checkpoint_at_all() -> None:
    with pytest.raises(ValueError, match=r"^TRCG.load_state_dict: state_dict: expected a dict, got list"):
        TRCG([point(1.0)]).load_state_dict([])  # type: ignore[arg-type]


def test_the_model_may_be_converted() -> None:
    problem = Classified(examples=40)
    optimizer = TRCG(problem.model.parameters(), **OPTIONS)
    optimizer.step(problem)
    problem.model.float()
    problem.x = problem.x.float()
    assert optimizer.step(problem).dtype == torch.float32
