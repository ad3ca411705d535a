"""`make gpu-check` without a GPU: it refuses; and what it does with what it would find, on stand-ins of the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.gpu_check import cases, command, machine, measure, parts, report, small_cases, steps
from bench.gpu_check.groups import GROUPS
from bench.gpu_check.peak import Peaks
from kronfac import ops
from kronfac.cli.bench.cases import CASES
from kronfac.cli.bench.measure import Timing
from kronfac.cli.bench.measure import by_turns as turns_on_the_cpu
from kronfac.cli.bench.steps import Schedule

FACTS = {
    "device": "NVIDIA Test 1", "capability": "9.0", "multiprocessors": 1, "memory_bytes": 1 << 30, "l2_bytes": 1,
    "driver": "1", "cuda": "13.0", "nvcc": "13.0", "torch": "2.11", "kronfac": "0", "commit": None, "sources": "abc",
}  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refused_without_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command.main(["--state", str(tmp_path / "state"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "built without CUDA" in said or "sees no GPU" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--parts", "build,tests"], ["--groups", "steps,kfac"]])
def test_unknown_names_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert "expected some of" in capsys.readouterr().err


def run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    found: Mapping[str, Callable[[parts.Place], dict[str, Any]]],
    *arguments: str,
    facts: Mapping[str, Any] = FACTS,
) -> int:
    monkeypatch.setattr(machine, "require_gpu", lambda: None)
    monkeypatch.setattr(machine, "facts", lambda: dict(facts))
    for part, function in found.items():
        monkeypatch.setitem(parts.PARTS, part, function)
    return command.main(["--state", str(tmp_path / "state"), "--out", str(tmp_path / "out"), *arguments])


def passed(place: parts.Place) -> dict[str, Any]:
    return {"tests": {"tests/x": {"tests": 7, "skipped": 2, "message": ""}}}


def failed(place: parts.Place) -> dict[str, Any]:
    raise parts.PartError("three tests are red", {"tests": {}})


def broken(place: parts.Place) -> dict[str, Any]:
    raise OSError("no such program")


def documents(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("*.json"))]


def test_parts_are_joined_and_failures_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path, monkeypatch, {"operators": passed}, "--parts", "operators") == 0
    (content,) = documents(tmp_path)
    assert {part: record["status"] for part, record in content["parts"].items()} == {"operators": "passed"}
    assert run(tmp_path, monkeypatch, {"kfac": failed, "sanitizer": broken}, "--parts", "sanitizer,kfac") == 1
    (content,) = documents(tmp_path)
    found = {part: (record["status"], record["message"]) for part, record in content["parts"].items()}
    assert found == {
        "operators": ("passed", ""),
        "kfac": ("failed", "three tests are red"),
        "sanitizer": ("failed", "OSError: no such program"),
    }
    (table,) = (tmp_path / "out").glob("nvidia-test-1-*.md")
    text = table.read_text()
    assert "| build | not run |" in text
    assert "tests/x: 5 tests, 2 skipped" in text
    assert "| kfac | failed |" in text


def test_records_of_other_sources_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path, monkeypatch, {"operators": passed}, "--parts", "operators") == 0
    (tmp_path / "out" / "nvidia-test-1-2000-01-01.json").write_text("{")  # and what is no document
    other = FACTS | {"sources": "def"}
    assert run(tmp_path, monkeypatch, {"kfac": passed}, "--parts", "kfac", facts=other) == 0
    content = json.loads(max((tmp_path / "out").glob("*-20[2-9]*.json")).read_text())
    assert list(content["parts"]) == ["kfac"]


def test_parts_of_another_run_on_the_same_kind_of_machine_are_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path, monkeypatch, {"operators": passed}, "--parts", "operators") == 0
    (tmp_path / "state" / "operators.json").unlink()  # a machine that starts bare, with the document in its checkout
    assert run(tmp_path, monkeypatch, {"kfac": passed}, "--parts", "kfac") == 0
    (content,) = documents(tmp_path)
    assert list(content["parts"]) == ["operators", "kfac"]


class Watch:
    """As Stopwatch, on the clock of the processor."""

    def by_turns(self, sides: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
        return turns_on_the_cpu(sides, rounds=3, sample_seconds=1e-4)


PEAKS = Peaks(bf16=1e12, tf32=1e12, float32=1e12, float64=1e12, memory=1e12)


def test_measured_cases_make_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smallest = {case.op: case for case in reversed(CASES) if case.quick}
    watch: Any = Watch()
    results = [
        measure.measure(cases.GpuCase(case, "memory" if case.unit == "byte" else "float32", bar=1e9), watch, PEAKS)
        for case in smallest.values()
    ]
    assert len(results) == 8
    assert all(result["correct"] for result in results)
    record = {"results": results, "steps": [], "peaks": vars(PEAKS)}
    assert run(tmp_path, monkeypatch, {"bench": lambda place: record}, "--parts", "bench") == 0
    assert run(tmp_path, monkeypatch, {"bench": lambda place: record}, "--parts", "bench", "--bars") == 1
    (content,) = documents(tmp_path)
    assert len(report.missed_bars(content)) == len(results)
    (table,) = (tmp_path / "out").glob("*.md")
    assert table.read_text().count("**missed**") == len(results)


def test_every_operator_has_cases() -> None:
    assert tuple(parts.PARTS) == report.PARTS
    named = {case.case.op for group in GROUPS if group != "steps" for case in cases.cases(group)}
    assert named == {name for name in ops.__all__ if name not in ("covariance_", "conv_covariance_")}
    for group in GROUPS:
        keys = [(case.case.op, case.name) for case in cases.cases(group)]
        assert len(keys) == len(set(keys))


class Event:
    """As torch.cuda.Event, on the clock of the processor."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) * 1e3


def tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


@pytest.mark.filterwarnings("ignore:.*CUDA is not available.*:UserWarning")
def test_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    configuration = steps.Configuration(network=tiny, shape=(4, 3, 8, 8), classes=5, schedule=Schedule(2, 4))
    entry = steps.measure_steps(configuration)
    assert entry["case"] == "tiny, 4x3x8x8 NCHW, bf16 autocast, factors/inverses every 2/4"
    kinds = entry["sides"]["kronfac"]["kinds"]
    assert {name: kind["count"] for name, kind in kinds.items()} == {"inverse": 3, "factor": 3, "plain": 6}
    assert entry["ratio"] > 0
    record = {"results": [], "steps": [entry], "peaks": None}
    assert run(tmp_path, monkeypatch, {"bench": lambda place: record}, "--parts", "bench") == 0
    (table,) = (tmp_path / "out").glob("*.md")
    assert entry["case"] in table.read_text()


def test_small_cases_are_right_on_the_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Tensor, "cuda", Tensor.clone)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert small_cases.main() == 0
    found = parts.SMALL_CASES.search(capsys.readouterr().out)
    assert found is not None
    assert int(found[1]) == len(list(small_cases.cases())) > 50
    monkeypatch.setattr(ops, "covariance", lambda x, bias, scale: torch.zeros(x.shape[1] + bias, x.shape[1] + bias))
    assert small_cases.main() == 1


def test_what_programs_say_is_read(tmp_path: Path) -> None:
    summary = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    assert parts.SUMMARY.findall(f"x\n{summary}\n") == [summary.strip("= ")]
    file = tmp_path / "junit.xml"
    file.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1"><testcase classname="a" name="b">'
        '<failure message="no"/></testcase><testcase classname="a" name="c"/></testsuite></testsuites>'
    )
    assert parts.counts(file) == {"tests": 3, "failures": 1, "errors": 0, "skipped": 1, "failed": ["a::b: no"]}


def test_the_sanitizer_goes_on_without_options_that_it_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a tool that ends well without having run the cases has not passed."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        """#!/bin/sh
case "$*" in
*--kernel-regex*|*--report-api*) echo unknown option; exit 1;;
*racecheck*--kernel-name*) printf 'small cases: 74 right\\n========= RACECHECK SUMMARY: 0 hazards displayed\\n';;
esac
"""
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(parts, "check_import", lambda place: None)
    with pytest.raises(parts.PartError, match=r"^memcheck: exit status 0:") as caught:
        parts.sanitizer(parts.Place(tmp_path))
    found = caught.value.found["tools"]["racecheck"]
    assert (found["cases"], found["options"], found["message"]) == (74, ["--kernel-name", "kns=kronfac"], "")


def test_a_program_that_does_not_end_is_stopped(tmp_path: Path) -> None:
    place = parts.Place(tmp_path, deadline=time.monotonic() + 0.2)
    done = parts.run(["sh", "-c", "echo begun; sleep 60"], place)
    assert done.status is None
    assert done.reason().startswith("ran past its time: begun")
    assert done.seconds < 30


def test_our_tests_are_found_beside_a_package_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(parts.SITE_CUSTOMIZE)
    foreign = tmp_path / "installed" / "tests"
    foreign.mkdir(parents=True)
    (foreign / "__init__.py").write_text("")
    path = os.pathsep.join(map(str, (tmp_path, parts.ROOT, foreign.parent)))
    program = "import importlib.util; print(importlib.util.find_spec('tests.processes').origin)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(parts.ROOT / "tests" / "processes.py")


def test_sources_name_a_digest() -> None:
    assert machine.sources() == machine.sources()
    assert len(machine.sources()) == 16


def test_groups_that_were_not_asked_for_keep_what_they_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(arguments: list[str], place: parts.Place, **environment: str) -> parts.Run:
        if "bench.gpu_check.measure" in arguments:
            group, target = arguments[-2:]
            content = {"about": ["device", "now"], "results": [], "steps": [], "failed": [], "peaks": {"of": group}}
            Path(target).write_text(json.dumps(content))
        return parts.Run(0, "", 1.0)

    monkeypatch.setattr(parts, "run", measured)
    monkeypatch.setattr(machine, "about", lambda: ["device", "now"])
    (tmp_path / "bench-steps.json").write_text('{"about": ["device", "before"], "failed": []}')
    (tmp_path / "bench-covariance.json").write_text('{"about": ["device", "now"], "failed": []}')
    found = parts.bench(parts.Place(tmp_path, groups=["damped_eigh"]))
    assert {group: entry["seconds"] for group, entry in found["groups"].items()} == {
        "covariance": None,
        "damped_eigh": 1.0,
    }
    assert found["peaks"] == {"of": "damped_eigh"}


def test_a_group_that_dies_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def died(arguments: list[str], place: parts.Place, **environment: str) -> parts.Run:
        broken = arguments[-2] == "covariance"
        return parts.Run(134 if broken else 0, "an illegal memory access", 1.0)

    monkeypatch.setattr(parts, "run", died)
    with pytest.raises(parts.PartError, match=r"^covariance: exit status 134: an illegal memory access$") as caught:
        parts.bench(parts.Place(tmp_path))
    assert len(caught.value.found["groups"]) == len(GROUPS)
