"""Kill -9 at any moment, and resume: the curve continues bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kronfac.cli.checkpoint import read_checkpoint
from tests.cli.test_train import HERE, same

ROOT = Path(__file__).parents[2]
EPOCHS = 40
KFAC = ["--optimizer", "kfac", "--inverse-every", "4", "--momentum", "0.8"]


def command(module: list[str], out: Path) -> list[str]:
    resume = ["--resume"] if (out / "checkpoint.pt").exists() else KFAC
    run = ["train", f"{HERE}:classifier", "--epochs", str(EPOCHS), "--quiet", "--out", str(out), *resume]
    return [sys.executable, "-m", *module, *run]


def start(module: list[str], out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command(module, out), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> int:
    _, errors = process.communicate(timeout=300)
    assert process.returncode in (0, -signal.SIGKILL), errors.decode()
    return process.returncode


def content(out: Path) -> dict[str, Any]:
    saved = read_checkpoint(out / "checkpoint.pt")
    saved["history"].pop("seconds")
    return saved


@pytest.mark.slow
def test_the_curve_of_a_run_that_is_killed_again_and_again_is_that_of_one_that_is_not(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert finish(start(["kronfac.cli"], straight)) == 0

    done = 0
    # Before the first checkpoint is there, then with one to lose.
    for point, count in (("written", 1), ("renamed", 3), ("done", 4)):
        assert finish(start(["tests.cli.killed", point, str(count)], killed)) == -signal.SIGKILL
        reached = content(killed)["epoch"] if (killed / "checkpoint.pt").exists() else 0
        assert reached == done + count - (point != "done")
        done = reached

    draw = random.Random(os.urandom(8))
    interrupted = 0
    for _ in range(3):  # and wherever it happens to be
        before = (killed / "checkpoint.pt").stat().st_mtime_ns
        process = start(["kronfac.cli"], killed)
        while process.poll() is None and (killed / "checkpoint.pt").stat().st_mtime_ns == before:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        interrupted += finish(process) != 0
        assert content(killed)["epoch"] >= done
        done = content(killed)["epoch"]
        if done == EPOCHS:
            break
    assert interrupted > 0

    assert finish(start(["kronfac.cli"], killed)) == 0
    first, second = content(straight), content(killed)
    assert first["epoch"] == EPOCHS
    assert all(same(first[name], second[name]) for name in first)
    curves = [json.loads((out / "history.json").read_text()) for out in (straight, killed)]
    assert curves[0]["train_loss"] == curves[1]["train_loss"]
    assert len(curves[1]["train_loss"]) == EPOCHS
    assert sorted(path.name for path in killed.iterdir()) == ["checkpoint.pt", "history.json"]  # nothing half written


@pytest.mark.slow
def test_a_run_that_is_killed_in_the_middle_of_a_grown_batch_continues_bit_for_bit(tmp_path: Path) -> None:
    schedule = ["--schedule", "adaptive-batch", "--duration", "1", "--batch-size", "8", "--adversarial", "0.1"]
    run = ["train", f"{HERE}:listed", *KFAC, *schedule, "--epochs", "6", "--save-every", "2", "--quiet"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    kronfac = [sys.executable, "-m", "kronfac.cli"]
    assert finish(subprocess.Popen([*kronfac, *run, "--out", str(straight)], cwd=ROOT, stderr=subprocess.PIPE)) == 0
    first = run
    # 12 updates of 8, then 6 of 16 and 3 of 32: a checkpoint after every second one and after each epoch.
    for point, count in (("done", 5), ("renamed", 5), ("written", 4)):
        trap = [sys.executable, "-m", "tests.cli.killed", point, str(count)]
        process = subprocess.Popen([*trap, *first, "--out", str(killed)], cwd=ROOT, stderr=subprocess.PIPE)
        assert finish(process) == -signal.SIGKILL
        assert content(killed)["loop"]["tally"]["updates"] > 0
        first = ["train", "--resume", "--save-every", "2", "--quiet"]
    assert content(killed)["loop"]["schedule"]["batch_size"] > 8
    process = subprocess.Popen([*kronfac, *first, "--out", str(killed)], cwd=ROOT, stderr=subprocess.PIPE)
    assert finish(process) == 0
    left, right = content(straight), content(killed)
    assert left["epoch"] == 6
    assert all(same(left[name], right[name]) for name in left)
