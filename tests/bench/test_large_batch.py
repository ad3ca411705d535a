"""The comparison of batch schedules: one run and its interruptions, the driver, the report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.large_batch import driver, problem, summary, train
from bench.large_batch.command import main
from bench.large_batch.settings import TITLES, Plan, Setting, all_settings
from bench.process import ROOT, RunError
from kronfac import schedules
from kronfac.adversarial import fgsm
from tests.datasets.files import write_mnist

PLAN = Plan(
    examples=96,
    epochs=4,
    batches=(16, 64),
    base_batch=8,
    seeds=(0,),
    decay_epochs=(2, 3),
    warmup_epochs=1,
    duration=1,
    share=0.5,
    small_batch=16,
    eigen_examples=16,
    final_examples=32,
    pgd_examples=10,
)
TIMES = {"seconds", "cpu_seconds", "waited_seconds", "eigen_seconds", "measuring_seconds", "segments"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mnist")
    write_mnist(path, compress=False, train=96, test=30)
    return path


@pytest.fixture(scope="module")
def data(folder: Path) -> problem.Data:
    return problem.load_data(folder, PLAN)


def test_data_are_standardised_and_eps_is_in_pixels(data: problem.Data, folder: Path) -> None:
    assert data.inputs.shape == (96, 1, 28, 28)
    low, high = data.bounds
    assert low == float(data.inputs.min())
    # The files hold pixels from 0 to 250.
    assert (float(data.inputs.max()) - low) / (high - low) == pytest.approx(250 / 255, rel=1e-5)
    assert data.eps(PLAN) == pytest.approx(0.1 * (high - low))
    with pytest.raises(ValueError, match="there are 96 training examples"):
        problem.load_data(folder, replace(PLAN, examples=97))


def test_network_depends_on_the_seed_alone() -> None:
    first, again, other = (problem.make_network(seed) for seed in (1, 1, 2))
    torch.rand(3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first[0].weight, other[0].weight)
    assert sum(parameter.numel() for parameter in first.parameters()) == 52_266


@pytest.mark.parametrize("method", TITLES)
def test_interrupted_run_goes_on_bit_for_bit(method: str, data: problem.Data, tmp_path: Path) -> None:
    setting = Setting(method, 64, 0)
    whole = train.run(setting, PLAN, data, tmp_path / "whole.pt")
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked % 3 == 0

    parts, calls = None, 0
    while parts is None:
        parts = train.run(setting, PLAN, data, tmp_path / "parts.pt", stop)
        calls += 1
    assert whole is not None
    assert parts["segments"] == calls >= 3
    assert {name: value for name, value in parts.items() if name not in TIMES} == {
        name: value for name, value in whole.items() if name not in TIMES
    }
    assert whole["status"] == "finished"
    assert len(whole["losses"]) == len(whole["log"]) == 4
    assert method == "fb" or whole["losses"][-1] < whole["losses"][0]
    expected = {"bl": 4 * 2, "fb": 4 * 2, "gg": 2 * 12 + 3 + 2}.get(method)
    if expected is None:  # 8, 16, 32, 64, doubled after every epoch by duration at the latest
        expected = 12 + 6 + 3 + 2
        assert [row["eigenvalue"] is not None for row in whole["log"]] == [True, True, True, False]
        assert 0 < whole["eigen_seconds"] < whole["seconds"]
    else:
        assert whole["eigen_seconds"] == 0
    assert whole["updates"] == expected


def test_absa_trains_on_what_fgsm_makes(data: problem.Data, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    real = schedules.AdaptiveBatch.adversarial

    def watch(self: Any, model: Any, loss_fn: Any, x: Any, y: Any, part: Any) -> torch.Tensor:
        moved = real(self, model, loss_fn, x, y, part)
        seen.append((part.adversarial, x, moved))
        if part.adversarial:
            eps = data.eps(PLAN)
            expected = fgsm(model, loss_fn, x[: part.adversarial], y[: part.adversarial], eps=eps, bounds=data.bounds)
            assert torch.equal(moved[: part.adversarial], expected)
        assert torch.equal(moved[part.adversarial :], x[part.adversarial :])
        return moved

    monkeypatch.setattr(schedules.AdaptiveBatch, "adversarial", watch)
    train.run(Setting("absa", 64, 0), PLAN, data, tmp_path / "absa.pt")
    counts = [count for count, _, _ in seen]
    assert counts[:12] == [4] * 12  # half of 8
    assert counts[12:18] == [4] * 6  # a quarter of 16
    assert not any(counts[18:])  # from half of the epochs on
    assert all((moved - x).abs().max() > 0 for count, x, moved in seen if count)


def test_diverged_run_ends_and_is_measured(data: problem.Data, tmp_path: Path) -> None:
    record = train.run(Setting("bl", 16, 0), replace(PLAN, lr=1e20), data, tmp_path / "run.pt")
    assert record is not None
    assert record["status"] == "diverged"
    assert record["updates"] < 24
    assert record["fgsm"] is None
    assert record["eigenvalue"] is None
    assert 0 <= record["accuracy"] <= 0.2


def test_runs_of_another_plan_are_others() -> None:
    assert Plan.from_json(json.loads(json.dumps(PLAN.to_json()))) == PLAN
    assert replace(PLAN, batches=(8,), seeds=(0, 1)).key == PLAN.key
    assert replace(PLAN, lr=0.5).key != PLAN.key
    settings = all_settings(Plan(), list(TITLES))
    assert len(settings) == len(set(settings)) == 63
    with pytest.raises(ValueError, match="unknown method 'sgd'"):
        all_settings(PLAN, ["sgd"])


def write_record(results: Path, setting: Setting, plan: Plan = PLAN, **changes: Any) -> None:
    content = {
        **setting.to_json(),
        "status": "finished",
        "updates": 100,
        "accuracy": 0.9,
        "fgsm": 0.5,
        "pgd": 0.4,
        "eigenvalue": 10.0,
        "seconds": 50.0,
        "cpu_seconds": 50.0,
        "waited_seconds": 0.0,
        "eigen_seconds": 0.0,
        "threads": 1,
        "log": [],
        "machine": {"cpu": "a processor", "instruction_set": "avx2", "torch": "2.13.0", "kronfac": "0.1.0"},
    } | changes
    driver.record_path(results, plan, setting).write_text(json.dumps(content), encoding="utf-8")


def write_published(results: Path, plan: Plan) -> None:
    """Records of two seeds that show every published direction."""
    for seed, shift in ((0, 0.001), (1, -0.001)):
        write_record(results, Setting("bl", 8, seed), plan, accuracy=0.98 + shift, updates=1000)
        for index, batch in enumerate(plan.batches):
            for method in TITLES:
                accuracy = 0.979 + shift
                if method in ("bl", "fb"):
                    accuracy = {"bl": (0.97, 0.9, 0.8), "fb": (0.975, 0.95, 0.1)}[method][index]
                write_record(
                    results,
                    Setting(method, batch, seed),
                    plan,
                    accuracy=accuracy,
                    updates={"gg": 500, "abs": 300, "absa": 320}.get(method, 600) - 100 * index,
                    eigenvalue={"absa": 5.0}.get(method, 10.0),
                    fgsm={"absa": 0.8}.get(method, 0.5),
                    eigen_seconds={"abs": 5.0, "absa": 4.0 + 2 * seed}.get(method, 0.0),
                )


def test_report_of_runs_that_are_known(tmp_path: Path) -> None:
    plan = replace(PLAN, batches=(16, 32, 64), seeds=(0, 1))
    write_published(tmp_path, plan)
    records = summary.read(tmp_path, plan)
    assert len(records) == 32
    found = summary.findings(records, plan)
    assert [one.seen for one in found] == [True] * 10
    text = summary.markdown(records, plan)
    assert "32 of 32 runs" in text
    assert "BL at 8: 98.00 ± 0.14 % / 1000 ± 0 updates" in text
    assert "| 64 | 80.00 ± 0.00 / 400 | 10.00 ± 0.00 / 400 | 97.90 ± 0.14 / 300 |" in text
    # 3 batches x 2 seeds: 30 s of ABS and 30 s of ABSA, of 32 runs of 50 s each.
    assert "3.8 % of the training time of all runs" in text
    assert "* ABSA: 10.0 % of their time, 12.0 % in the worst run" in text
    assert "disturbed" not in text


def test_report_tells_what_is_not_seen(tmp_path: Path) -> None:
    plan = replace(PLAN, batches=(16, 32, 64), seeds=(0, 1))
    write_published(tmp_path, plan)
    setting = Setting("absa", 32, 0)
    write_record(tmp_path, setting, plan, fgsm=0.1, updates=900, eigenvalue=None, waited_seconds=30.0)
    write_record(tmp_path, Setting("fb", 64, 1), plan, accuracy=0.1, status="diverged", fgsm=None, eigenvalue=None)
    found = {one.text.split(" (")[0]: one.seen for one in summary.findings(summary.read(tmp_path, plan), plan)}
    assert found["ABSA needs fewer updates than GG"] is False
    assert found["ABSA ends at a better FGSM accuracy than ABS"] is False
    assert found["ABSA ends at a smaller top eigenvalue than ABS"] is None
    assert found["ABS needs fewer updates than GG"] is True
    text = summary.markdown(summary.read(tmp_path, plan), plan)
    assert "(1 diverged)" in text
    assert "the times of 1 runs were disturbed" in text
    with pytest.raises(ValueError, match="no finished run"):
        summary.markdown([], plan)


def test_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench.large_batch import figure

    plan = replace(PLAN, batches=(16, 32, 64), seeds=(0, 1))
    write_published(tmp_path, plan)
    paths = figure.draw(summary.read(tmp_path, plan), tmp_path / "out" / "figure.svg")
    assert [path.name for path in paths] == ["figure.svg", "figure-dark.svg"]
    # One line with its error bars per method and panel, of which the legend has each once more.
    for path in paths:
        assert path.read_text(encoding="utf-8").count('id="LineCollection_') >= len(TITLES)
    with pytest.raises(ValueError, match="ends in"):
        figure.draw(summary.read(tmp_path, plan), tmp_path / "figure.pdf")
    with pytest.raises(ValueError, match="no finished run"):
        figure.draw([], tmp_path / "figure.svg")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--results", str(tmp_path / "none")]
    assert main(["run", "--dry-run", "--data-dir", str(tmp_path), *where]) == 0
    assert capsys.readouterr().out.count("missing") == 63
    assert not (tmp_path / "none").exists()
    for wrong, text in (
        (["--methods", "lbfgs"], "unknown method 'lbfgs'"),
        (["--threads", "0"], "--threads: expected a number >= 1"),
        (["--workers", "0"], "--workers: expected a number >= 1"),
        (["--seeds", "0"], "--seeds: expected a number >= 1"),
        (["--batches", "64"], "--batches: expected 128 to 60000"),
        (["--batches", "a"], "--batches: expected numbers"),
        (["--data-dir", str(tmp_path / "absent")], "is not a directory"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["run", "--data-dir", str(tmp_path), *where, *wrong])
        assert text in capsys.readouterr().err
    for command in ("report", "draw"):
        assert main([command, *where]) == 1
        assert "no finished run" in capsys.readouterr().err
    assert main(["run", "--workers", "1000", "--data-dir", str(tmp_path), *where]) == 1
    assert "processors are available" in capsys.readouterr().err


def test_nothing_is_started_that_the_budget_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver._Pool, "_start", lambda *_: pytest.fail("started"))
    options = driver.Options(tmp_path, tmp_path, PLAN, deadline=time.time() + 3)
    assert not driver.run_all([Setting("bl", 16, 0)], options)


DRIVER = """
import sys
from pathlib import Path
from bench.large_batch import driver
from bench.large_batch.settings import Setting
from tests.bench.test_large_batch import LONG

folder = Path(sys.argv[1])
options = driver.Options(folder / "results", Path(sys.argv[2]), LONG, checkpoint_every=0.05)
assert driver.run_all([Setting("absa", 64, 0)], options)
"""
LONG = replace(PLAN, epochs=60, decay_epochs=(30,), duration=20)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the worker follows its driver only there")
def test_killed_driver_leaves_nothing_that_counts_and_the_next_goes_on(folder: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    setting = Setting("absa", 64, 0)
    checkpoint = driver.checkpoint_path(results, LONG, setting)
    command = [sys.executable, "-c", DRIVER, str(tmp_path), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    end = time.monotonic() + 120
    while not checkpoint.exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert summary.read(results, LONG) == []
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    killed = json.loads(driver.record_path(results, LONG, setting).read_text())
    assert killed["segments"] == 2
    assert not checkpoint.exists()
    whole = train.run(setting, LONG, problem.load_data(folder, LONG), tmp_path / "whole.pt")
    assert whole is not None
    assert killed["losses"] == whole["losses"]
    assert killed["accuracy"] == whole["accuracy"]


def test_failed_run_ends_the_series_with_the_reason(tmp_path: Path) -> None:
    options = driver.Options(tmp_path / "results", tmp_path, PLAN)
    with pytest.raises(RunError, match=r"bl-16-seed0 ended with status 1: DatasetError: mnist: .* not found"):
        driver.run_all([Setting("bl", 16, 0)], options)
