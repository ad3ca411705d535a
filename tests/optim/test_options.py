from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kronfac
from kronfac.optim import KFAC
from tests.optim.models import mlp, snapshot, train_step, vectors

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        *[("lr", value, ValueError) for value in (-0.1, NAN, INF)],
        *[("momentum", value, ValueError) for value in (-0.1, 1.0, 1.5, NAN)],
        *[("weight_decay", value, ValueError) for value in (-1e-4, NAN, INF)],
        *[("damping", value, ValueError) for value in (0.0, -1e-3, NAN, INF)],
        *[("kl_clip", value, ValueError) for value in (0.0, -1.0, NAN, INF)],
        *[("norm_constraint", value, ValueError) for value in (0.0, -1.0, NAN, INF)],
        ("norm_constraint", "1", TypeError),
        *[("factor_decay", value, ValueError) for value in (-0.1, 1.1, NAN)],
        *[("factor_every", value, ValueError) for value in (0, -1)],
        *[("inverse_every", value, ValueError) for value in (0, -1)],
        *[("fisher_samples", value, ValueError) for value in (0, -1)],
        *[("max_staleness", value, ValueError) for value in (-1, -7)],
        *[("max_staleness", value, TypeError) for value in (1.5, "1", None, True)],
        *[("factor_every", value, TypeError) for value in (1.5, "1", None, True)],
        *[("lr", value, TypeError) for value in ("0.1", None, True, 1j, torch.tensor(0.1))],
        ("nesterov", 1, TypeError),
        ("decoupled", None, TypeError),
        ("adaptive", 1, TypeError),
        ("seed", 1.5, TypeError),
        ("output", "logits", TypeError),
        ("mask", 3, TypeError),
        ("grad_scaler", object(), TypeError),
        ("fisher", "true", ValueError),
        ("reduction", "none", ValueError),
        ("structure", "shampoo", ValueError),
        ("sharing", "average", ValueError),
        ("solve", "cholesky", ValueError),
        ("likelihood", "poisson", ValueError),
        ("likelihood", 3, TypeError),
        ("params", [], ValueError),
        ("params", torch.zeros(2), TypeError),
        ("params", set(), TypeError),
    ],
)
def test_bad_options_are_refused_by_name_and_leave_no_hooks(option: str, value: Any, error: type[Exception]) -> None:
    model = mlp(3, 2)
    options: dict[str, Any] = {"lr": 0.1, option: value}
    with pytest.raises(error, match=option):
        KFAC(model, **options)
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"structure": "tridiagonal", "solve": "eigen"}, "solve: expected 'inverse' with structure='tridiagonal'"),
        ({"structure": "tridiagonal", "max_staleness": 2}, "max_staleness: expected 0 with structure='tridiagonal'"),
        ({"lr": None, "adaptive": True, "max_staleness": 2}, "max_staleness: expected 0 with adaptive=True"),
    ],
    ids=str,
)
def test_options_that_exclude_each_other(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        KFAC(mlp(3, 2), **{"lr": 0.1, **options})


def test_an_unknown_argument_and_a_missing_lr_are_refused() -> None:
    with pytest.raises(TypeError, match="dampng"):
        KFAC(mlp(3, 2), 0.1, dampng=1e-3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="lr"):
        KFAC(mlp(3, 2))  # type: ignore[call-arg]


def test_a_model_without_parameters_and_something_else_than_a_model() -> None:
    with pytest.raises(ValueError, match="no parameters"):
        KFAC(nn.ReLU(), 0.1)
    with pytest.raises(TypeError, match=re.escape("expected a torch.nn.Module, got generator")):
        KFAC(mlp(3, 2).parameters(), 0.1)  # type: ignore[arg-type]


def test_a_lazy_model_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="run one forward"):
        KFAC(nn.Sequential(nn.LazyLinear(3)), 0.1)


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(ValueError, match=r"nesterov=True needs momentum > 0, got momentum=0\.0"):
        KFAC(mlp(3, 2), 0.1, momentum=0, nesterov=True)


def test_numbers_of_other_libraries_are_numbers() -> None:
    optimizer = KFAC(mlp(3, 2), np.float32(0.5), damping=np.float64(1e-2), inverse_every=np.int64(3))  # type: ignore[arg-type]
    group = optimizer.param_groups[0]
    assert type(group["lr"]) is float
    assert type(group["inverse_every"]) is int
    assert group["inverse_every"] == 3


def test_groups_inherit_defaults_and_override_them() -> None:
    model = mlp(3, 4, 2)
    optimizer = KFAC(
        model,
        0.1,
        params=[
            {"params": model[0].parameters(), "damping": 0.5, "kl_clip": None, "name": "first"},
            {"params": model[2].parameters(), "lr": 0.2, "momentum": 0.5, "inverse_every": 3},
        ],
        damping=0.01,
    )
    first, second = optimizer.param_groups
    assert (first["lr"], first["damping"], first["kl_clip"], first["name"]) == (0.1, 0.5, None, "first")
    assert (second["lr"], second["damping"], second["momentum"], second["inverse_every"]) == (0.2, 0.01, 0.5, 3)


@pytest.mark.parametrize(
    ("extra", "error", "match"),
    [
        ({"dampng": 1.0}, ValueError, r"params\[0\]: dampng: not an option"),
        ({"fisher": "exact"}, ValueError, "fisher: not an option of a param group"),
        ({"damping": -1.0}, ValueError, r"params\[0\]: damping"),
        ({"sharing": "average"}, ValueError, "expected one of 'expand', 'reduce'"),
    ],
)
def test_bad_groups_are_refused(extra: dict[str, Any], error: type[Exception], match: str) -> None:
    model = mlp(3, 2)
    group = {"params": list(model.parameters()), **extra}
    before = dict(group)
    with pytest.raises(error, match=match):
        KFAC(model, 0.1, params=[group])
    assert group == before


def test_named_parameters_are_accepted() -> None:
    model = mlp(3, 2)
    optimizer = KFAC(model, 0.1, params=model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias"]
    train_step(model, optimizer, *vectors(4, 3, 2))


def test_a_failing_add_param_group_changes_nothing() -> None:
    model = mlp(3, 4, 2)
    optimizer = KFAC(model, 0.1, params=list(model[0].parameters()))
    for bad in ({"params": [model[2].weight]}, {"params": model[2].parameters(), "lr": -1}, {"lr": 0.1}, 3):
        with pytest.raises((TypeError, ValueError)):
            optimizer.add_param_group(bad)  # type: ignore[arg-type]
        assert len(optimizer.param_groups) == 1
        assert optimizer.layers == ("0",)
    train_step(model, optimizer, *vectors(4, 3, 2))


def test_a_layer_needs_all_its_parameters() -> None:
    model = mlp(3, 2)
    with pytest.raises(ValueError, match=r"layer '0'.*0\.bias is missing"):
        KFAC(model, 0.1, params=[model[0].weight])
    model[0].bias.requires_grad_(False)
    assert KFAC(model, 0.1, params=[model[0].weight]).layers == ("0",)


def test_weight_and_bias_may_differ_in_decay_but_not_in_damping() -> None:
    model = mlp(3, 2)
    weight, bias = {"params": [model[0].weight], "weight_decay": 0.1}, {"params": [model[0].bias]}
    optimizer = KFAC(model, 0.1, params=[weight, bias])
    train_step(model, optimizer, *vectors(4, 3, 2))
    optimizer.param_groups[0]["damping"] = 0.5
    with pytest.raises(ValueError, match=r"layer '0': damping: expected the same value"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"layer '0': kl_clip: expected the same value"):
        KFAC(model, 0.1, params=[weight, {**bias, "kl_clip": None}])


@given(
    name=st.sampled_from(["lr", "damping", "kl_clip", "norm_constraint", "factor_every", "inverse_every"]),
    values=st.lists(st.integers(1, 4), min_size=4),
)
def test_callables_are_evaluated_at_every_step_and_never_stored(name: str, values: list[int]) -> None:
    model = mlp(2, 2)
    options: dict[str, Any] = {"lr": 0.1, name: lambda step: values[min(step, 3)]}
    optimizer = KFAC(model, **options)
    x, y = vectors(3, 2, 2)
    for step in range(3):
        train_step(model, optimizer, x, y)
        assert optimizer.param_groups[0][name] == values[step]
    saved = optimizer.state_dict()
    assert saved["param_groups"][0][name] == values[2]
    assert not any(callable(value) for value in saved["param_groups"][0].values())


def test_a_callable_that_leaves_the_range_stops_the_step_before_anything_changes() -> None:
    model = mlp(3, 2)
    optimizer = KFAC(model, 0.1, damping=lambda step: 1e-3 if step < 1 else math.nan)
    x, y = vectors(4, 3, 2)
    train_step(model, optimizer, x, y)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"damping\(step=1\): expected a number > 0, finite, got nan"):
        train_step(model, optimizer, x, y)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model), strict=True))
    with pytest.raises(ValueError, match=r"lr\(step=0\)"):
        KFAC(mlp(3, 2), lambda step: -1.0)


def test_momentum_may_be_a_callable_and_a_clip_may_come_and_go() -> None:
    model = mlp(3, 2)
    clip = lambda step: None if step % 2 else 0.1  # noqa: E731
    optimizer = KFAC(model, 0.1, momentum=lambda step: 0.1 * step, kl_clip=clip, norm_constraint=clip)
    for step in range(3):
        train_step(model, optimizer, *vectors(4, 3, 2))
        group = optimizer.param_groups[0]
        assert (group["momentum"], group["kl_clip"], group["norm_constraint"]) == (0.1 * step, clip(step), clip(step))
        assert (optimizer.clip_scales == [None]) == (optimizer.norm_scales == [None]) == (step % 2 == 1)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.4, total_steps=8)
    with pytest.raises(ValueError, match="momentum: expected a callable or a scheduler that cycles momentum, got both"):
        train_step(model, optimizer, *vectors(4, 3, 2))


def test_a_value_that_a_scheduler_moves_out_of_range_is_noticed() -> None:
    model = mlp(3, 2)
    optimizer = KFAC(model, 0.1)
    optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match=r"params\[0\]: lr: expected a number >= 0, finite, got nan"):
        train_step(model, optimizer, *vectors(4, 3, 2))


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.4, total_steps=8),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=2), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
            milestones=[2],
        ),
    ],
    ids=["StepLR", "OneCycleLR", "CosineAnnealingLR", "SequentialLR"],
)
def test_schedulers_drive_it_like_sgd(scheduler: Any) -> None:
    model = mlp(3, 2)
    twin = torch.optim.SGD(mlp(3, 2).parameters(), lr=0.1, momentum=0.9)
    optimizer = KFAC(model, 0.1)
    ours, theirs = scheduler(optimizer), scheduler(twin)
    x, y = vectors(4, 3, 2)
    for _ in range(5):
        train_step(model, optimizer, x, y)
        twin.step()
        ours.step()
        theirs.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(twin.param_groups[0]["lr"])
        assert optimizer.param_groups[0]["momentum"] == pytest.approx(twin.param_groups[0]["momentum"])


def test_a_callable_lr_under_a_scheduler_is_a_conflict() -> None:
    model = mlp(3, 2)
    optimizer = KFAC(model, lambda step: 0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(ValueError, match="expected a callable or a scheduler, got both"):
        train_step(model, optimizer, *vectors(4, 3, 2))


def test_repr_shows_what_matters() -> None:
    optimizer = KFAC(mlp(3, 4, 2), 0.1, solve="eigen", fisher="exact", damping=lambda step: 0.25)
    text = repr(optimizer)
    for part in (
        "KFAC (",
        "kfac/eigen",
        "exact",
        "Categorical",
        "layers: 2",
        "Parameter Group 0",
        "damping: 0.25",
        "lr: 0.1",
    ):
        assert part in text


def test_it_is_exported_at_the_top() -> None:
    assert kronfac.KFAC is KFAC
