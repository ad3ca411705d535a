"""The report's arithmetic on curves whose crossings are known, and the figure."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bench.autoencoder.settings import Setting
from bench.autoencoder.summary import best, markdown, read, summarise
from bench.clock import Clock, disturbance
from tests.bench.records import write_record

SGD = Setting("sgd", 200, {"lr": 0.01, "max_momentum": 0.99})
ADAM = Setting("adam", 200, {"lr": 0.001})
KFAC = Setting("kfac", 1000, {"lr": 0.3, "kl_clip": None})
OTHER = Setting("kfac", 1000, {"lr": 0.1, "kl_clip": None})


def write_race(folder: Path) -> None:
    write_record(folder, SGD, [(0, 0, 270), (500, 5, 50), (1000, 10, 3.0)], stage="final", minutes=10)
    # Its lowest error is not its last: the final error is the last one, and what counts is when it was first reached.
    write_record(
        folder, ADAM, [(0, 0, 270), (600, 300, 2.0), (900, 450, 1.5), (1200, 600, 2.0)], stage="final", minutes=10
    )
    write_record(folder, KFAC, [(0, 0, 270), (60, 90, 2.1), (80, 120, 2.0), (400, 600, 0.8)], stage="final", minutes=10)
    write_record(folder, OTHER, [(0, 0, 270), (70, 80, 1.9), (410, 600, 0.9)], stage="final", minutes=10)
    write_record(folder, KFAC, [(0, 0, 270), (50, 75, 1.7), (160, 240, 1.0)])
    write_record(folder, OTHER, [(0, 0, 270)], status="diverged")


def test_crossings_and_ratios(tmp_path: Path) -> None:
    write_race(tmp_path)
    tuning, final = read(tmp_path, "grid", 4), read(tmp_path, "final", 10)
    assert len(tuning) == 2
    assert len(final) == 4
    summary = summarise(tuning, final)
    assert summary.champion is not None
    assert summary.champion.setting == ADAM
    assert summary.mark is not None
    assert (summary.mark.step, summary.mark.seconds, summary.mark.error) == (600, 300, 2.0)
    assert [line.method for line in summary.lines] == ["sgd", "adam", "kfac"]
    sgd, _, kfac = summary.lines
    assert sgd.reached is None
    assert sgd.earliest is None
    assert kfac.tuning_runs == 2
    assert kfac.best is not None
    assert kfac.best.setting == KFAC
    assert kfac.best.final_error == 0.8
    assert kfac.reached is not None
    assert (kfac.reached.step, kfac.reached.seconds) == (80, 120)
    assert kfac.earliest is not None
    assert (kfac.earliest[0].stage, kfac.earliest[1].seconds) == ("grid", 75)


def test_markdown_says_what_was_measured(tmp_path: Path) -> None:
    write_race(tmp_path)
    text = markdown(read(tmp_path, "grid", 4), read(tmp_path, "final", 10))
    assert "error to reach is 2, the lowest final error of the first-order methods (Adam), reached after 300 s" in text
    row = next(line for line in text.splitlines() if line.startswith("| K-FAC | 2 |"))
    assert row.endswith("| 0.8 | 400 | 570 | 120 | 0.40 | 80 | 0.133 |")
    assert "| SGD + Nesterov | 0 | batch 200, lr 0.01, max_momentum 0.99 | 3 |" in text
    assert "not reached" in text
    assert "K-FAC: 75 s and 50 steps, in a grid run of 4 minutes" in text
    assert "| K-FAC | batch 1000, lr 0.1, kl_clip None | 0 | diverged |" in text
    assert "a processor, avx2 kernels, 2 threads, torch 2.13.0, kronfac 0.1.0" in text
    assert "Disturbed" not in text


def test_markdown_without_final_runs(tmp_path: Path) -> None:
    write_record(tmp_path, KFAC, [(0, 0, 270), (50, 75, 1.7)])
    text = markdown(read(tmp_path, "grid", 4), [])
    assert "nothing to reach" in text
    assert "| K-FAC | 1 | no final run |" in text


def test_disturbed_runs_are_named(tmp_path: Path) -> None:
    write_race(tmp_path)
    write_record(tmp_path, SGD, [(0, 0, 270), (80, 240, 4)], planned=100)
    write_record(tmp_path, ADAM, [(0, 0, 270), (80, 600, 2)], stage="final", minutes=10, waited=100)
    write_record(tmp_path, OTHER, [(0, 0, 270), (9, 60, 4)], seconds=60)
    text = markdown(read(tmp_path, "grid", 4), read(tmp_path, "final", 10))
    assert f"grid {SGD.key} (batch 200, lr 0.01, max_momentum 0.99): its time was over after 80 of 100" in text
    assert f"{OTHER.key} (batch 1000, lr 0.1, kl_clip None): its plan filled 60 s of 240 s" in text
    assert "its threads waited 100.0 s for a processor in 570.0 s" in text
    assert "lr 0.001 (disturbed)" in text


def test_best_leaves_out_what_diverged(tmp_path: Path) -> None:
    write_race(tmp_path)
    tuning = read(tmp_path, "grid", 4)
    assert sorted(record.final_error for record in tuning) == [1.0, math.inf]
    assert [record.setting for record in best(tuning, 2)] == [KFAC]


@pytest.mark.parametrize(
    ("cpu", "waited", "threads", "text"),
    [
        (190, 0, 2, None),
        (110, 9, 2, None),
        (110, 11, 2, "waited 11.0 s"),
        (90, 0, 2, "90.0 s of processor time"),
        (90, 0, 1, None),
    ],
)
def test_disturbance(cpu: float, waited: float, threads: int, text: str | None) -> None:
    found = disturbance(100.0, cpu, waited, threads)
    assert found is None if text is None else text in (found or "")


def test_clock_counts_what_it_is_put_around() -> None:
    clock = Clock(10.0, 5.0, 1.0)
    with clock.running():
        sum(range(200_000))
    state = clock.state()
    assert state["wall"] > 10
    assert state["cpu"] > 5
    assert state["waited"] >= 1
    assert Clock(**state).state() == state


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_figure_is_drawn_for_light_and_dark(tmp_path: Path, ending: str) -> None:
    figure = pytest.importorskip("bench.autoencoder.figure")
    write_race(tmp_path)
    tuning, final = read(tmp_path, "grid", 4), read(tmp_path, "final", 10)
    paths = figure.draw(tuning, final, tmp_path / "images" / f"race.{ending}")
    assert [path.name for path in paths] == [f"race.{ending}", f"race-dark.{ending}"]
    light, dark = (path.read_bytes() for path in paths)
    assert light[:4] == (b"\x89PNG" if ending == "png" else b"<?xm")
    assert light != dark


def test_figure_refuses_other_endings_and_an_empty_race(tmp_path: Path) -> None:
    figure = pytest.importorskip("bench.autoencoder.figure")
    with pytest.raises(ValueError, match=r"ends in \.svg or \.png"):
        figure.draw([], [], tmp_path / "race.gif")
    with pytest.raises(ValueError, match="no finished final run"):
        figure.draw([], [], tmp_path / "race.png")
