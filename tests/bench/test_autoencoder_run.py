"""One run of the autoencoder race: the problem, the schedules, and going on after an interruption bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.autoencoder import methods, problem, train
from bench.autoencoder.settings import GRID, TITLES, Setting
from tests.datasets.files import write_mnist

WIDTHS = (784, 24, 8, 24, 784)
KFAC = {"lr": 0.3, "damping": 1.0, "kl_clip": 0.1, "momentum": 0.9, "factor_every": 2, "inverse_every": 4}
SETTINGS = [
    Setting("sgd", 16, {"lr": 0.01, "max_momentum": 0.99}),
    Setting("adam", 16, {"lr": 0.003}),
    Setting("kfac", 32, KFAC),
]


def images() -> Tensor:
    return torch.rand(80, 784, generator=torch.Generator().manual_seed(3))


def job(setting: Setting, steps: int | None = 20, seconds: float = 60.0) -> train.Job:
    return train.Job(setting, seconds, evaluations=4, widths=WIDTHS, steps=steps)


def test_images_are_the_raw_bytes_over_255(tmp_path: Path) -> None:
    write_mnist(tmp_path, compress=True)
    found = problem.load_images(tmp_path)
    raw = np.random.RandomState(7).randint(0, 60, (40, 28, 28))
    raw[np.arange(40), np.arange(40) % 10] = 250
    torch.testing.assert_close(found, torch.from_numpy(raw).flatten(1).float() / 255, rtol=0, atol=0)


def test_network_is_the_one_of_the_literature() -> None:
    network = problem.make_network(0)
    linear = [layer for layer in network if isinstance(layer, nn.Linear)]
    assert [layer.in_features for layer in linear] + [linear[-1].out_features] == list(problem.WIDTHS)
    for layer in linear:
        assert not layer.bias.any()
        assert (layer.weight != 0).sum(dim=1).tolist() == [15] * layer.out_features
    kept = torch.cat([layer.weight[layer.weight != 0] for layer in linear])
    assert abs(kept.std().item() - 1) < 0.01
    kinds = [type(layer) for layer in network]
    code = kinds.index(nn.Linear, 6)
    assert linear[3] is network[code]
    assert kinds[code + 1] is nn.Linear, "the code layer is linear"
    assert kinds[-1] is nn.Linear, "logits come out"
    assert kinds.count(nn.Sigmoid) == 6


def test_error_and_loss_are_sums_over_pixels_and_means_over_images() -> None:
    data, network = images(), problem.make_network(0, WIDTHS)
    logits = network(data)
    assert problem.error_of(network, data) == pytest.approx(
        (logits.sigmoid() - data).square().sum(1).mean().item(), rel=1e-5
    )
    loss = F.binary_cross_entropy(logits.double().sigmoid(), data.double(), reduction="none").sum(1).mean()
    assert problem.loss_of(logits, data).item() == pytest.approx(loss.item(), rel=1e-5)


def test_order_is_a_function_of_seed_and_step() -> None:
    order = problem.Order(10, 3, seed=5)
    batches = [order.at(step) for step in range(6)]
    for epoch in (batches[:3], batches[3:]):
        assert len(set(torch.cat(epoch).tolist())) == 9
    assert not torch.equal(torch.cat(batches[:3]), torch.cat(batches[3:]))
    again = problem.Order(10, 3, seed=5)
    assert all(torch.equal(again.at(step), batches[step]) for step in (4, 0, 5))
    assert not torch.equal(problem.Order(10, 3, seed=6).at(0), batches[0])


def test_schedules() -> None:
    assert [methods.rate_factor(step, 100) for step in (0, 49, 50, 75, 99, 100)] == [1, 1, 1, 0.5, 0.02, 0]
    # Sutskever et al. 2013: 1 - 2^(-1 - log2(floor(t / 250) + 1)).
    found = [methods.momentum_at(step, 0.99) for step in (0, 249, 250, 500, 10**6)]
    assert found == pytest.approx([0.5, 0.5, 0.75, 1 - 1 / 6, 0.99])


def test_schedules_reach_the_optimizer() -> None:
    setting = SETTINGS[2]
    optimizer = methods.make(setting, problem.make_network(0, WIDTHS), seed=0)
    stepper = methods.Stepper(setting, optimizer, steps=8)
    network, data = optimizer.model, images()[:32]  # type: ignore[attr-defined]
    for number in range(7):
        stepper.step(number, lambda: problem.loss_of(network(data), data))
    group = optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(0.3 * 0.5)
    assert group["kl_clip"] == pytest.approx(0.1 * 0.25)
    assert group["weight_decay"] == problem.L2


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.method)
def test_interrupted_run_goes_on_bit_for_bit(setting: Setting, tmp_path: Path) -> None:
    whole = train.run(job(setting), images(), tmp_path / "whole.pt")
    parts, path = None, tmp_path / "parts.pt"
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked % 9 == 0

    calls = 0
    while parts is None:
        parts = train.run(job(setting), images(), path, stop)
        calls += 1
    assert whole is not None
    assert calls >= 3
    assert parts["segments"] == calls
    assert parts["steps"] == whole["steps"] == 20
    assert [point["step"] for point in whole["curve"]] == [0, 5, 10, 15, 20]

    def errors(record: dict[str, Any]) -> list[tuple[float, float]]:
        return [(point["raw"], point["averaged"]) for point in record["curve"]]

    assert errors(parts) == errors(whole)
    assert errors(whole)[-1][0] < errors(whole)[0][0]
    assert errors(whole)[-1][0] != errors(whole)[-1][1]
    assert parts["last_loss"] == whole["last_loss"]


def test_plan_fills_the_time_and_is_kept_when_going_on(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    work = job(SETTINGS[0], steps=None, seconds=0.5)
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 10

    assert train.run(work, images(), path, stop) is None
    planned = torch.load(path, weights_only=True)["plan"]
    record = train.run(work, images(), path)
    assert record is not None
    assert record["planned_steps"] == planned["steps"] == int(0.95 * 0.5 / planned["step_seconds"])
    assert record["cut_short"] == (record["steps"] < planned["steps"])
    # Whatever the machine does meanwhile, a run ends with the step during which its time ends.
    assert record["seconds"] < 0.5 + 100 * planned["step_seconds"] + 1.0


def test_run_ends_with_its_time(tmp_path: Path) -> None:
    record = train.run(job(SETTINGS[1], steps=10**9, seconds=0.3), images(), tmp_path / "run.pt")
    assert record is not None
    assert record["cut_short"]
    assert record["status"] == "finished"
    assert record["curve"][-1]["step"] == record["steps"]
    assert record["seconds"] >= 0.3


def test_diverged_run_is_a_result(tmp_path: Path) -> None:
    setting = Setting("sgd", 16, {"lr": 1e30, "max_momentum": 0.9})
    record = train.run(job(setting), images(), tmp_path / "run.pt")
    assert record is not None
    assert record["status"] == "diverged"
    assert record["steps"] < 20
    assert not record["cut_short"]


def test_batch_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch 81 is more than the 80 images"):
        train.run(job(Setting("adam", 81, {"lr": 0.1})), images(), tmp_path / "run.pt")


def test_what_kronfac_refuses_as_not_there_yet_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def refuse(model: nn.Module, **arguments: Any) -> None:
        asked.update(arguments)
        raise ValueError("KFAC: structure: 'ekfac' is not available yet; use 'kfac'")

    monkeypatch.setattr("kronfac.KFAC", refuse)
    network = problem.make_network(0, WIDTHS)
    with pytest.raises(methods.UnavailableError, match="'ekfac' is not available yet"):
        methods.make(Setting("ekfac", 32, KFAC), network, 0)
    assert asked["structure"] == "ekfac"
    with pytest.raises(methods.UnavailableError):
        methods.make(GRID["kfac-adaptive"][0], network, 0)
    assert asked["adaptive"] is True
    monkeypatch.undo()
    with pytest.raises(ValueError, match="KFAC: damping: expected"):
        methods.make(Setting("kfac", 32, KFAC | {"damping": -1.0}), network, 0)


def test_grid_is_fair() -> None:
    assert set(GRID) == set(TITLES)
    first_order = [GRID[method] for method in ("sgd", "adam")]
    assert all(len({setting.options["lr"] for setting in settings}) >= 8 for settings in first_order)
    for method in ("kfac", "kfac-adaptive", "ekfac"):
        assert 1 <= len(GRID[method]) <= min(map(len, first_order))
    keys = [setting.key for settings in GRID.values() for setting in settings]
    assert len(set(keys)) == len(keys)
    assert all(Setting.from_json(s.to_json()) == s for settings in GRID.values() for s in settings)
