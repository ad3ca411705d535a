"""Checkpoints: bit for bit, plain types, and nothing half-loaded."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from kronfac.optim import KFAC
from tests.optim.models import convnet, equal, frozen_state, images, mlp, same_tree, snapshot, train_step, vectors


def through_a_file(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@given(
    solve=st.sampled_from(["inverse", "eigen"]),
    fisher=st.sampled_from(["mc", "exact", "empirical"]),
    at=st.integers(0, 5),
    nesterov=st.booleans(),
    weight_decay=st.sampled_from([0.0, 1e-2]),
    conv=st.booleans(),
)
@settings(max_examples=16)
def test_training_continues_bit_for_bit(
    solve: str, fisher: str, at: int, nesterov: bool, weight_decay: float, conv: bool
) -> None:
    def make() -> tuple[nn.Module, KFAC, Any]:
        model = convnet() if conv else mlp(4, 5, 3)
        optimizer = KFAC(
            model,
            0.1,
            solve=solve,
            fisher=fisher,
            nesterov=nesterov,
            weight_decay=weight_decay,
            damping=lambda step: 1e-2 / (step + 1),
            factor_every=2,
            inverse_every=3,
            fisher_samples=2,
        )
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)

    batches = [images(6) if conv else vectors(6, 4, 3) for _ in range(9)]
    model, optimizer, scheduler = make()
    for batch in batches[:at]:
        train_step(model, optimizer, *batch)
        scheduler.step()
    saved = through_a_file([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()])
    twin, other, other_scheduler = make()
    twin.load_state_dict(saved[0])
    other_scheduler.load_state_dict(saved[2])
    other.load_state_dict(saved[1])
    for batch in batches[at:]:
        train_step(model, optimizer, *batch)
        scheduler.step()
        train_step(twin, other, *batch)
        other_scheduler.step()
    assert equal(snapshot(model), snapshot(twin))
    assert same_tree(optimizer.state_dict(), other.state_dict())


def trained(**options: Any) -> tuple[nn.Module, KFAC]:
    model = mlp(4, 5, 3)
    optimizer = KFAC(model, 0.1, **options)
    for _ in range(3):
        train_step(model, optimizer, *vectors(6, 4, 3))
    return model, optimizer


def test_a_checkpoint_holds_tensors_and_plain_types_only() -> None:
    _, optimizer = trained(damping=lambda step: 0.1)

    def check(value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                assert isinstance(key, (str, int))
                check(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                check(item)
        else:
            assert value is None or type(value) in (int, float, str, bool, Tensor), type(value)

    check(optimizer.state_dict())


def test_a_loaded_optimizer_shares_no_memory_with_the_checkpoint() -> None:
    model, optimizer = trained()
    saved = frozen_state(optimizer)
    kept = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    for _ in range(2):
        train_step(model, optimizer, *vectors(6, 4, 3))
    assert same_tree(saved, kept)


def test_what_a_step_does_not_change_in_a_checkpoint_taken_before() -> None:
    """K-FAC's own part is replaced, never written into: a checkpoint in memory stays what it was."""
    model, optimizer = trained(inverse_every=1)
    own = optimizer.state_dict()["kronfac"]
    kept = copy.deepcopy(own)
    train_step(model, optimizer, *vectors(6, 4, 3))
    assert same_tree(own, kept)


def test_float64_and_bfloat16_models_keep_their_dtypes() -> None:
    for dtype, factor in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        model = mlp(4, 3, dtype=dtype)
        optimizer = KFAC(model, 0.1)
        train_step(model, optimizer, *vectors(6, 4, 3, dtype))
        other = KFAC(model, 0.1)
        other.load_state_dict(through_a_file(optimizer.state_dict()))
        state = other.state_dict()
        assert state["state"][0]["momentum_buffer"].dtype == dtype
        assert state["kronfac"]["layers"]["0"]["A"].dtype == factor
        assert state["kronfac"]["layers"]["0"]["factorisation"]["left"].dtype == factor


def test_a_checkpoint_from_another_kind_of_device_reseeds_the_sampler() -> None:
    _, optimizer = trained(seed=5)
    saved = frozen_state(optimizer)
    saved["kronfac"]["generator"] = {"device": "cuda", "seed": 5, "state": torch.zeros(16, dtype=torch.uint8)}
    states = []
    for _ in range(2):
        other = KFAC(mlp(4, 5, 3), 0.1)
        other.load_state_dict(saved)
        states.append(other.state_dict()["kronfac"]["generator"])
    assert states[0]["seed"] == 5 + 3
    assert torch.equal(states[0]["state"], states[1]["state"])


def test_pending_statistics_are_dropped_on_load() -> None:
    model, optimizer = trained(fisher="exact")
    saved = frozen_state(optimizer)
    model(1e3 * torch.randn(6, 4))
    optimizer.load_state_dict(saved)
    x, y = vectors(6, 4, 3)
    train_step(model, optimizer, x, y)
    A = optimizer.factors()["0"].A
    assert float(A.diagonal().max()) < 100


def test_the_next_forward_is_recorded_when_the_checkpoint_says_so() -> None:
    model, optimizer = trained(factor_every=3)  # three steps taken: the next one takes statistics
    other = KFAC(model, 0.1, factor_every=3)
    train_step(model, other, *vectors(6, 4, 3))  # this one is not due at its next step
    other.load_state_dict(frozen_state(optimizer))
    train_step(model, other, *vectors(6, 4, 3))
    assert other.state_dict()["kronfac"]["layers"]["0"]["updates"] == 2


def set_in(path: str, value: Any) -> Callable[[Any], Any]:
    def change(state: Any) -> None:
        *parents, last = [
            int(part) if part.isdigit() and part_is_index else part for part, part_is_index in split(path)
        ]
        for key in parents:
            state = state[key]
        if value is DELETE:
            del state[last]
        else:
            state[last] = value

    return change


def split(path: str) -> list[tuple[str, bool]]:
    parts = path.split("/")
    # layer names are strings of digits too: only state/<n> and param_groups/<n> are indices
    return [(part, index == 1 and parts[0] in ("state", "param_groups")) for index, part in enumerate(parts)]


DELETE = object()
NAN = float("nan")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (set_in("kronfac", DELETE), r"'kronfac' is missing; was it written by kronfac\.KFAC\?"),
        (set_in("kronfac", 3), "kronfac: expected a dict, got int 3"),
        (set_in("state", DELETE), "'state' is missing"),
        (set_in("param_groups", []), "param_groups: expected 1 groups, got 0 groups"),
        (set_in("param_groups/0", "x"), r"param_groups\[0\]: expected a dict"),
        (set_in("param_groups/0/lr", DELETE), r"param_groups\[0\]: .*'lr' is missing"),
        (set_in("param_groups/0/lr", NAN), r"param_groups\[0\]: lr: expected a number >= 0"),
        (set_in("param_groups/0/lr", "fast"), r"param_groups\[0\]: lr: expected a number"),
        (set_in("param_groups/0/damping", -1.0), r"param_groups\[0\]: damping"),
        (set_in("param_groups/0/params", [0, 1, 2]), "expected the indices 0 to 3"),
        (set_in("param_groups/0/params", [3, 2, 1, 0]), "expected the indices 0 to 3"),
        (set_in("state/7", {"momentum_buffer": torch.zeros(1)}), "state: expected indices below 4, got 7"),
        (set_in("state/0", {"exp_avg": torch.zeros(5, 4)}), "written by another optimizer"),
        (set_in("state/0/momentum_buffer", torch.zeros(4, 5)), r"expected a floating-point tensor of shape \(5, 4\)"),
        (set_in("state/0/momentum_buffer", torch.zeros(5, 4, dtype=torch.long)), "expected a floating-point tensor"),
        (set_in("state/0/momentum_buffer", torch.full((5, 4), NAN)), "expected finite values"),
        (set_in("kronfac/format", 3), "load it with the kronfac release that wrote it"),
        (set_in("kronfac/format", 1), "load it with the kronfac release that wrote it"),
        (set_in("kronfac/eager", 1), r"kronfac\.eager: expected a bool, got int 1"),
        (set_in("kronfac/format", "1"), "kronfac.format: expected an integer"),
        (set_in("kronfac/structure", "kfac/eigen"), "expected 'kfac/inverse', got 'kfac/eigen'"),
        (set_in("kronfac/counters/step", -1), r"kronfac\.counters\.step: expected an integer >= 0"),
        (set_in("kronfac/counters/step", DELETE), "'step' is missing"),
        (set_in("kronfac/generator/state", torch.zeros(3, dtype=torch.uint8)), "not a state of a torch.Generator"),
        (set_in("kronfac/generator/state", torch.zeros(3)), "expected a uint8 tensor"),
        (
            set_in("kronfac/layers/conv1", {}),
            "expected layers among .*, got 'conv1'; the checkpoint belongs to another model",
        ),
        (
            set_in("kronfac/layers/0/A", torch.eye(4)),
            r"layers\.0\.A: expected a floating-point tensor of shape \(5, 5\)",
        ),
        (set_in("kronfac/layers/0/G", torch.full((5, 5), NAN)), r"layers\.0\.G: expected finite values"),
        (set_in("kronfac/layers/2/updates", 1.5), r"layers\.2\.updates: expected an integer"),
        (set_in("kronfac/layers/2/factorisation", {}), "'left' is missing"),
        (set_in("kronfac/layers/2/factorisation/right", torch.eye(2)), r"factorisation\.right: expected .* \(6, 6\)"),
        (set_in("kronfac/layers/2/A", "garbage"), r"layers\.2\.A: expected a floating-point tensor .*, got str"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_is_half_loaded(
    change: Callable[[Any], None], match: str
) -> None:
    _, source = trained()
    bad = frozen_state(source)
    change(bad)
    target_model, target = trained(momentum=0.5)
    before, weights = frozen_state(target), snapshot(target_model)
    with pytest.raises(ValueError, match=match) as caught:
        target.load_state_dict(bad)
    assert str(caught.value).startswith("KFAC.load_state_dict: ")
    assert same_tree(before, target.state_dict())
    train_step(target_model, target, *vectors(6, 4, 3))
    assert not equal(weights, snapshot(target_model))


@pytest.mark.parametrize("foreign", [None, [], {}, "checkpoint", {"state": {}, "param_groups": []}])
def test_things_that_are_no_checkpoint(foreign: Any) -> None:
    _, optimizer = trained()
    with pytest.raises(ValueError, match=r"KFAC\.load_state_dict"):
        optimizer.load_state_dict(foreign)


def test_an_sgd_checkpoint_and_one_of_another_architecture_are_refused() -> None:
    model, optimizer = trained()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sgd.step()
    with pytest.raises(ValueError, match="was it written by kronfac"):
        optimizer.load_state_dict(sgd.state_dict())
    wide = mlp(4, 6, 3)
    other = KFAC(wide, 0.1)
    train_step(wide, other, *vectors(6, 4, 3))
    before = frozen_state(optimizer)
    with pytest.raises(ValueError, match=r"expected a floating-point tensor of shape"):
        optimizer.load_state_dict(other.state_dict())
    assert same_tree(before, optimizer.state_dict())


def test_a_checkpoint_from_before_the_first_step() -> None:
    fresh = KFAC(mlp(4, 3), 0.3, seed=1)
    saved = through_a_file(fresh.state_dict())
    model = mlp(4, 3)
    other = KFAC(model, 0.1, seed=2)
    train_step(model, other, *vectors(6, 4, 3))
    other.load_state_dict(saved)
    assert other.factors() == {}
    assert other.param_groups[0]["lr"] == 0.3
    assert same_tree(fresh.state_dict(), other.state_dict())


def test_counters_survive() -> None:
    model, optimizer = trained()
    functional.cross_entropy(model(torch.randn(6, 4)), torch.zeros(6, dtype=torch.long)).backward()
    model[0].weight.grad.fill_(NAN)
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    other = KFAC(model, 0.1)
    other.load_state_dict(optimizer.state_dict())
    assert other.skipped_steps == 1


def test_state_dict_hooks_of_torch_still_work() -> None:
    _, optimizer = trained()
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("saving"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["saving", "loaded"]


def test_a_hook_before_loading_may_make_a_checkpoint_fit() -> None:
    model = mlp(4, 3)
    optimizer = KFAC(model, 0.1)
    train_step(model, optimizer, *vectors(8, 4, 3))
    saved = copy.deepcopy(optimizer.state_dict())
    renamed = {**saved, "kronfac": {**saved["kronfac"], "layers": {}}}
    renamed["kronfac"]["layers"] = {f"old.{name}": entry for name, entry in saved["kronfac"]["layers"].items()}
    other = KFAC(copy.deepcopy(model), 0.1)
    with pytest.raises(ValueError, match=r"kronfac\.layers: expected layers among"):
        other.load_state_dict(renamed)
    calls = []

    def rename(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append(1)
        layers = {name.removeprefix("old."): entry for name, entry in state_dict["kronfac"]["layers"].items()}
        return {**state_dict, "kronfac": {**state_dict["kronfac"], "layers": layers}}

    other.register_load_state_dict_pre_hook(rename)
    other.load_state_dict(renamed)
    assert calls == [1]
    assert same_tree(frozen_state(other), frozen_state(optimizer))
    other.load_state_dict(renamed)  # the hook is still there
    assert calls == [1, 1]
