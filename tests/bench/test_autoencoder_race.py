"""The driver of the autoencoder race: what a kill leaves, what is repeated, what goes into the final runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.autoencoder import race, worker
from bench.autoencoder.command import main
from bench.autoencoder.settings import GRID, Setting, grid
from bench.autoencoder.summary import read
from bench.process import ROOT
from tests.bench.records import write_record
from tests.datasets.files import write_mnist

FIRST = Setting("adam", 16, {"lr": 0.001})
SECOND = Setting("kfac", 32, {"lr": 0.3, "damping": 1.0, "kl_clip": 0.1, "factor_every": 5, "inverse_every": 5})

DRIVER = """
import sys
from pathlib import Path
from bench.autoencoder import race
from tests.bench.test_autoencoder_race import FIRST, SECOND

folder = Path(sys.argv[1])
options = race.Options(
    folder / "results",
    folder / "data",
    minutes=0.04,
    threads=1,
    deadline=float("inf"),
    retries=0,
    checkpoint_every=0.01,
    widths=(784, 20, 8, 20, 784),
)
assert race.run_all("grid", [FIRST, SECOND], options)
"""


def wait_for(what: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    end = time.monotonic() + 120
    while not what():
        assert process is None or process.poll() is None, f"the driver ended with {process and process.returncode}"
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the worker follows its driver only there")
def test_killed_driver_leaves_nothing_that_counts_and_the_next_goes_on(tmp_path: Path) -> None:
    write_mnist(tmp_path / "data", compress=False, train=64)
    results = tmp_path / "results"
    results.mkdir()
    write_record(results, FIRST, [(0, 0.0, 9.0)], minutes=0.04)
    finished, killed = (results / f"grid-0.04min-{setting.key}.json" for setting in (FIRST, SECOND))
    checkpoint = results / "state" / f"grid-0.04min-{SECOND.key}.pt"
    before = finished.read_bytes()
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

    driver = subprocess.Popen(command, cwd=ROOT, env=environment)
    wait_for(checkpoint.exists, driver)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    # The kernel kills the worker along with its driver.
    wait_for(lambda: not any(str(killed).encode() in line for line in command_lines()))
    assert not killed.exists(), "the run was over before the kill"
    assert [record.setting for record in read(results, "grid", 0.04)] == [FIRST]

    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    assert finished.read_bytes() == before, "a finished run is not run again"
    again = json.loads(killed.read_text())
    assert again["segments"] == 2
    assert again["status"] == "finished"
    assert again["threads"] == 1
    assert again["machine"]["cpu"]
    assert again["machine"]["environment"]["OMP_NUM_THREADS"] == "1"
    assert [record.setting for record in read(results, "grid", 0.04)] == [FIRST, SECOND]
    assert not checkpoint.exists()


def command_lines() -> list[bytes]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes())
        except OSError:
            continue  # it has ended meanwhile
    return found


def options(folder: Path, **changes: Any) -> race.Options:
    return race.Options(
        **{"results": folder, "data_dir": folder, "minutes": 4, "threads": 2, "deadline": 1e18} | changes
    )


def test_disturbed_run_is_set_aside_and_repeated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def run_one(stage: str, setting: Setting, how: race.Options) -> tuple[int, str]:
        made.append(setting)
        write_record(how.results, setting, [(0, 0.0, 9.0)], seconds=230.0, waited=30.0)
        return worker.DONE, ""

    monkeypatch.setattr(race, "_run_one", run_one)
    assert race.run_all("grid", [FIRST], options(tmp_path))
    assert made == [FIRST, FIRST]
    kept = read(tmp_path, "grid", 4)
    assert [record.setting for record in kept] == [FIRST]
    assert "waited 30.0 s" in (kept[0].disturbed or "")
    # A driver that was killed before it looked at the record does not make it a good one: more retries find it.
    assert race.run_all("grid", [FIRST], options(tmp_path, retries=2))
    assert made == [FIRST] * 3
    assert race.run_all("grid", [FIRST], options(tmp_path, retries=2))
    assert made == [FIRST] * 3


def test_refused_method_is_reported_and_the_rest_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []

    def run_one(stage: str, setting: Setting, how: race.Options) -> tuple[int, str]:
        made.append(setting.method)
        if setting.method == "ekfac":
            return worker.UNAVAILABLE, "KFAC: structure: 'ekfac' is not available yet; use 'kfac'"
        write_record(how.results, setting, [(0, 0.0, 9.0)])
        return worker.DONE, ""

    monkeypatch.setattr(race, "_run_one", run_one)
    assert race.run_all("grid", [*grid(["ekfac"]), FIRST], options(tmp_path))
    assert made == ["ekfac", "adam"]
    assert "not available in this build: KFAC: structure: 'ekfac'" in capsys.readouterr().out
    assert race.finals(tmp_path, ["ekfac"], 4) == []


def test_failed_run_ends_the_race_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "_run_one", lambda *_: (worker.BROKEN, "DatasetError: no such file"))
    with pytest.raises(race.RaceError, match="status 1: DatasetError: no such file"):
        race.run_all("grid", [FIRST], options(tmp_path))


def test_nothing_is_started_that_the_budget_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "_run_one", lambda *_: pytest.fail("started"))
    assert not race.run_all("grid", [FIRST], options(tmp_path, deadline=time.time() + 5))


def test_two_drivers_do_not_disturb_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_one(*_: object) -> tuple[int, str]:
        with pytest.raises(race.RaceError, match="another driver is at work"):
            race.run_all("grid", [FIRST], options(tmp_path))
        return worker.STOPPED, "stopped"

    monkeypatch.setattr(race, "_run_one", run_one)
    assert not race.run_all("grid", [FIRST], options(tmp_path))


def test_final_runs_are_the_best_two_of_a_complete_grid(tmp_path: Path) -> None:
    settings = GRID["sgd"]
    for index, setting in enumerate(settings[:-1]):
        write_record(tmp_path, setting, [(1, 1.0, 10.0 + abs(index - 3))])
    with pytest.raises(race.RaceError, match=f"sgd: 1 of {len(settings)} tuning runs are missing"):
        race.finals(tmp_path, ["sgd"], 4)
    write_record(tmp_path, settings[-1], [(1, 1.0, 10.5)])
    assert race.finals(tmp_path, ["sgd"], 4) == [settings[3], settings[-1]]
    assert race.finals(tmp_path, ["sgd"], 2) == []


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--results", str(tmp_path / "none"), "--data-dir", str(tmp_path)]
    assert main(["grid", "--methods", "adam", "--dry-run", *where]) == 0
    out = capsys.readouterr().out
    assert out.count("missing") == len(GRID["adam"])
    assert not (tmp_path / "none").exists()
    for wrong, text in (
        (["--methods", "lbfgs"], "unknown method 'lbfgs'"),
        (["--minutes", "0"], "expected a number > 0"),
        (["--threads", "0"], "expected a number >= 1"),
        (["--data-dir", str(tmp_path / "absent")], "is not a directory"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["grid", *where, *wrong])
        assert text in capsys.readouterr().err
    assert main(["draw", "--results", str(tmp_path)]) == 1
    assert "no finished final run" in capsys.readouterr().err
