"""Diagnostics against dense matrices, and their way to a bar, a writer or a function."""

from __future__ import annotations

import gc
import itertools
import json
import math
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.curvature import clock as clocks
from kronfac.optim import KFAC, Monitor
from kronfac.optim.diagnostics import flatten
from kronfac.optim.structures import STRUCTURES
from tests.optim.models import equal, frozen_state, mlp, same_tree, snapshot, train_step, vectors


class Everything(nn.Module):
    """An embedding, a grouped convolution, a norm of either kind of block and a linear layer."""

    def __init__(self, wide: bool = False) -> None:
        super().__init__()
        width = 80 if wide else 4
        self.embedding = nn.Embedding(7, 4, dtype=torch.float64)
        self.conv = nn.Conv1d(4, width, 3, padding=1, groups=2, dtype=torch.float64)
        self.norm = nn.BatchNorm1d(width, dtype=torch.float64)
        self.head = nn.Linear(width, 3, dtype=torch.float64)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.conv(self.embedding(tokens).mT)))
        return self.head(x.mean(-1))  # type: ignore[no-any-return]


def tokens(count: int) -> tuple[Tensor, Tensor]:
    return torch.randint(7, (count, 5)), torch.randint(3, (count,))


def dense_numbers(A: Tensor, G: Tensor, damping: float, solve: str, block: str) -> tuple[float | None, float]:
    """π and the condition number of one layer, from matrices written out."""
    conditions, pis = [], []
    groups = zip(A, G, strict=True) if G.dim() == 3 else [(A, G)]
    for a, g in groups:
        a = torch.diag(a) if block == "diagonal_input" else a
        eye_a, eye_g = torch.eye(len(a), dtype=a.dtype), torch.eye(len(g), dtype=g.dtype)
        pi = float(((a.trace() / len(a)) / (g.trace() / len(g))).sqrt())
        pis.append(math.log(pi))
        if solve == "inverse" and block != "dense":
            dense = torch.kron(a + pi * damping**0.5 * eye_a, g + damping**0.5 / pi * eye_g)
        else:
            dense = torch.kron(a, g) + damping * torch.kron(eye_a, eye_g)
        conditions.append(float(torch.linalg.cond(dense, 2)))
    return None if block == "dense" else math.exp(sum(pis) / len(pis)), max(conditions)


@pytest.mark.parametrize(("solve", "wide"), list(itertools.product(["inverse", "eigen"], [False, True])))
def test_pi_and_condition_are_those_of_the_dense_blocks(solve: str, wide: bool) -> None:
    model = Everything(wide)
    optimizer = KFAC(model, 0.01, solve=solve, damping=0.05, weight_decay=0.01, inverse_every=1, fisher="exact")
    for _ in range(3):
        train_step(model, optimizer, *tokens(40))
    report = optimizer.diagnostics()["layers"]
    assert set(report) == {"embedding", "conv", "norm", "head"}
    for layer in optimizer._coverage.layers:
        A, G = optimizer.factors()[layer.name]
        pi, condition = dense_numbers(A, G, 0.06, solve, layer.block)
        entry = report[layer.name]
        assert entry["damping"] == pytest.approx(0.06)
        assert entry["pi"] == (None if pi is None else pytest.approx(pi, rel=1e-9))
        # The power method approaches from below; eigenvalues that are stored are exact.
        low = 0.9 if solve == "inverse" else 1 - 1e-6
        assert low * condition <= entry["condition"] <= condition * (1 + 1e-6)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_is_diagnosed(structure: str) -> None:
    model = Everything(wide=False)
    optimizer = KFAC(model, 0.01, structure=structure, damping=0.05, inverse_every=1)
    for _ in range(3):
        train_step(model, optimizer, *tokens(6))
    for layer in optimizer.diagnostics()["layers"].values():
        assert layer["pi"] is None or layer["pi"] > 0
        assert layer["condition"] is None or layer["condition"] >= 1
        assert layer["updates"] == 3


def test_the_condition_of_measured_eigenvalues() -> None:
    for structure, name in (("ekfac", "S"), ("diagonal", "D")):
        model = mlp(4, 5, 3)
        optimizer = KFAC(model, 0.01, structure=structure, damping=0.05, inverse_every=1)
        for _ in range(3):
            train_step(model, optimizer, *vectors(6, 4, 3))
        values = optimizer.state_dict()["kronfac"]["layers"]["0"]["extra"][name] + 0.05
        found = optimizer.diagnostics()["layers"]["0"]["condition"]
        assert found == pytest.approx(float(values.max() / values.min()))


def test_the_condition_of_ekfac_is_that_of_its_measured_eigenvalues() -> None:
    model = mlp(4, 5, 3, dtype=torch.float64)
    optimizer = KFAC(model, 0.01, structure="ekfac", damping=0.05, inverse_every=2, fisher="exact")
    for _ in range(3):
        train_step(model, optimizer, *vectors(9, 4, 3, torch.float64))
    report = optimizer.diagnostics()["layers"]
    for layer in optimizer._coverage.layers:
        assert layer.factors is not None
        assert layer.factorisation is not None
        vectors_A, vectors_G = layer.factorisation["right_vectors"], layer.factorisation["left_vectors"]
        basis = torch.kron(vectors_A, vectors_G)
        dense = basis @ torch.diag(layer.factors.extra["S"].mT.flatten()) @ basis.mT
        dense = dense + 0.05 * torch.eye(len(dense), dtype=dense.dtype)
        assert report[layer.name]["condition"] == pytest.approx(float(torch.linalg.cond(dense, 2)), rel=1e-6)


def test_counts_ages_and_options() -> None:
    model = mlp(4, 5, 3)
    optimizer = KFAC(model, 0.1, inverse_every=3, max_staleness=1, damping=lambda step: 0.1 / (1 + step))
    empty = optimizer.diagnostics()
    assert empty["layers"]["0"] == {
        "damping": 0.1, "pi": None, "condition": None, "updates": 0, "inverse_age": None, "bytes": 0
    }  # fmt: skip
    ages = []
    for _ in range(6):
        train_step(model, optimizer, *vectors(6, 4, 3))
        report = optimizer.diagnostics()
        ages.append(report["layers"]["0"]["inverse_age"])
        assert report["pending"] == ([3] if report["step"] == 4 else [])
    assert ages == [0, 1, 2, 3, 1, 2]
    assert report["step"] == optimizer.steps == 6
    assert (report["skipped_steps"], report["inverse_failures"], report["inverse_retries"]) == (0, 0, 0)
    assert report["max_staleness"] == 1
    assert report["layers"]["2"]["updates"] == 6
    (scale,) = optimizer.clip_scales
    assert scale is not None
    expected = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "kl_clip": 1e-3, "clip_scale": float(scale)}
    assert report["groups"] == [{**expected, "damping": 0.1 / 6}]
    assert report["bytes"] == optimizer.memory().total
    assert report["seconds"] is None
    assert report["rho"] is None
    json.dumps(report, allow_nan=False)  # plain types only


def test_ages_survive_a_checkpoint() -> None:
    model = mlp(4, 5, 3)
    optimizer = KFAC(model, 0.1, inverse_every=4)
    for _ in range(3):
        train_step(model, optimizer, *vectors(6, 4, 3))
    other = KFAC(model, 0.1, inverse_every=4)
    other.load_state_dict(frozen_state(optimizer))
    assert other.diagnostics()["layers"]["0"]["inverse_age"] == 2


def test_looking_changes_nothing() -> None:
    data = [vectors(6, 4, 3) for _ in range(5)]
    results = []
    for look in (False, True):
        torch.manual_seed(3)
        model = mlp(4, 5, 3)
        optimizer = KFAC(model, 0.1, seed=0, inverse_every=2, max_staleness=1)
        if look:
            optimizer.time_phases()
        for batch in data:
            train_step(model, optimizer, *batch)
            if look:
                optimizer.diagnostics()
        results.append((snapshot(model), frozen_state(optimizer), torch.get_rng_state()))
    assert equal(results[0][0], results[1][0])
    assert same_tree(results[0][1], results[1][1])
    assert torch.equal(results[0][2], results[1][2])


def test_what_the_adaptive_mode_measures_is_shown() -> None:
    model = mlp(4, 3)
    optimizer = KFAC(model, adaptive=True, damping=0.25)
    x, y = vectors(16, 4, 3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    report = optimizer.diagnostics()
    assert report["rho"] is None
    assert report["adaptation"]["gamma"] == 0.5
    assert flatten(report)["adaptation/damping"] == 0.25
    assert "adaptation/rho" not in flatten(report)
    for _ in range(5):  # the reduction ratio is measured at every fifth step
        optimizer.step(closure)
    assert optimizer.adaptation is not None
    report = optimizer.diagnostics()
    assert report["rho"] == optimizer.adaptation.rho
    assert math.isfinite(report["rho"])
    assert report["adaptation"]["model_change"] < 0
    assert KFAC(mlp(4, 3), 0.1).diagnostics()["adaptation"] is None


def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes in whole seconds, one at every look at the clock."""
    ticks = itertools.count()
    monkeypatch.setattr(clocks, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_phases_are_counted_where_they_happen(fisher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ticking(monkeypatch)
    model = mlp(4, 5, 3)
    optimizer = KFAC(model, 0.1, inverse_every=2, fisher=fisher)
    optimizer.time_phases()
    data = [vectors(6, 4, 3) for _ in range(3)]
    train_step(model, optimizer, *data[0])
    # Two layers and the root in the forward or two layers and their edges in the backward; two functions in the step.
    statistics = 5.0 if fisher == "mc" else 7.0
    assert optimizer.diagnostics()["seconds"] == {
        "statistics": statistics, "factorise": 1.0, "precondition": 1.0, "update": 2.0
    }  # fmt: skip
    train_step(model, optimizer, *data[1])
    assert set(optimizer.diagnostics()["seconds"]) == {"statistics", "precondition", "update"}
    optimizer.time_phases(False)
    train_step(model, optimizer, *data[2])
    assert optimizer.diagnostics()["seconds"] is None


def test_phases_inside_phases_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ticking(monkeypatch)
    clock = clocks.Clock(torch.device("cpu"))
    with clock.phase("outer"):
        with clock.phase("inner"):
            pass
        with clock.phase("inner"):
            pass
    clock.finish()
    assert clock.seconds == {"inner": 2.0, "outer": 3.0}


def test_nobody_looks_at_the_time_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> float:
        raise AssertionError("the clock was read")

    monkeypatch.setattr(clocks, "time", SimpleNamespace(perf_counter=never))
    model = mlp(4, 5, 3)
    optimizer = KFAC(model, 0.1)
    train_step(model, optimizer, *vectors(6, 4, 3))


def test_waiting_and_the_thread_have_phases_of_their_own() -> None:
    model = mlp(4, 5, 3)
    optimizer = KFAC(model, 0.1, inverse_every=1, max_staleness=1)
    optimizer.time_phases()
    for _ in range(3):
        train_step(model, optimizer, *vectors(6, 4, 3))
    seconds = optimizer.diagnostics()["seconds"]
    assert {"wait", "background"} <= set(seconds)
    assert seconds["background"] > 0
    assert "factorise" not in seconds


# ------------------------------------------------------------------ monitors


class Bar:
    def __init__(self) -> None:
        self.shown: list[dict[str, Any]] = []

    def set_postfix(self, ordered_dict: Any = None, refresh: bool = True, **kwargs: Any) -> None:
        self.shown.append(dict(ordered_dict))


class Writer:
    def __init__(self) -> None:
        self.written: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.written.append((tag, scalar_value, global_step))


def train(optimizer: KFAC, steps: int) -> None:
    for _ in range(steps):
        train_step(optimizer.model, optimizer, *vectors(6, 4, 3))


def test_a_callable_gets_the_diagnostics_every_so_many_steps() -> None:
    optimizer = KFAC(mlp(4, 5, 3), 0.1)
    seen: list[dict[str, Any]] = []
    Monitor(optimizer, seen.append, every=2)
    train(optimizer, 5)
    assert [report["step"] for report in seen] == [2, 4]
    assert set(seen[0]["layers"]) == {"0", "2"}


def test_a_bar_shows_a_few_numbers_and_a_writer_all_of_them() -> None:
    optimizer = KFAC(mlp(4, 5, 3), 0.1, damping=0.5)
    bar, writer, some = Bar(), Writer(), Writer()
    Monitor(optimizer, bar, every=1)
    Monitor(optimizer, writer, every=3, time_phases=True)
    Monitor(optimizer, some, every=3, fields=["bytes", "layers/2/"], prefix="")
    train(optimizer, 3)
    assert len(bar.shown) == 3
    assert set(bar.shown[0]) == {"damping", "clip_scale", "skipped_steps"}
    assert bar.shown[0]["damping"] == 0.5
    tags = {tag for tag, _, _ in writer.written}
    assert {"kfac/groups/0/lr", "kfac/layers/0/pi", "kfac/layers/2/condition", "kfac/seconds/update"} <= tags
    assert all(step == 3 and type(value) is float for _, value, step in writer.written)
    assert {tag for tag, _, _ in some.written} == {
        "bytes", *(f"layers/2/{name}" for name in ("damping", "pi", "condition", "updates", "inverse_age", "bytes"))
    }  # fmt: skip


def test_tqdm_itself() -> None:
    tqdm = pytest.importorskip("tqdm")
    optimizer = KFAC(mlp(4, 5, 3), 0.1, damping=0.25)
    with tqdm.tqdm(total=2, disable=False, file=open("/dev/null", "w")) as bar:
        Monitor(optimizer, bar, every=1)
        train(optimizer, 2)
        assert "damping=0.25" in str(bar)


@pytest.mark.filterwarnings("ignore:KFAC. the gradients")
def test_skipped_steps_are_not_shown_and_a_closed_monitor_is_silent() -> None:
    optimizer = KFAC(mlp(4, 5, 3), 0.1)
    seen: list[Any] = []
    with Monitor(optimizer, seen.append, every=1):
        train(optimizer, 1)
        functional.cross_entropy(optimizer.model(torch.randn(2, 4)), torch.zeros(2, dtype=torch.long)).backward()
        next(optimizer.model.parameters()).grad.fill_(math.nan)  # type: ignore[union-attr]
        optimizer.step()
        assert len(seen) == 1
    optimizer.zero_grad()
    train(optimizer, 1)
    assert len(seen) == 1


def test_a_monitor_does_not_keep_the_optimizer() -> None:
    optimizer = KFAC(mlp(4, 5, 3), 0.1)
    monitor = Monitor(optimizer, Bar())
    watched = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert watched() is None
    monitor.show()  # nothing left to show
    monitor.close()


def test_bad_arguments_of_a_monitor() -> None:
    optimizer = KFAC(mlp(4, 3), 0.1)
    for arguments, match in (
        ({"optimizer": torch.optim.SGD(mlp(4, 3).parameters()), "sink": print}, "expected a kronfac.KFAC, got a SGD"),
        ({"optimizer": optimizer, "sink": 3}, "sink: expected a progress bar, .* got a int"),
        ({"optimizer": optimizer, "sink": print, "fields": "bytes"}, "fields: expected a sequence"),
        ({"optimizer": optimizer, "sink": print, "every": 1.5}, "every: expected an integer"),
        ({"optimizer": optimizer, "sink": print, "time_phases": 1}, "time_phases: expected True or False"),
    ):
        with pytest.raises(TypeError, match=match):
            Monitor(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every"):
        Monitor(optimizer, print, every=0)
