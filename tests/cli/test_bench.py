"""The benchmark harness: that it pairs, counts, judges and refuses as it says. No test here looks at a clock."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.compare import RefusedError, Side, Worker, compare, export, main, run_tests
from kronfac import _host
from kronfac.cli.bench import measure, report
from kronfac.cli.bench.case import OURS, relative_error, verdict, worst
from kronfac.cli.bench.cases import CASES, OPERATORS, select
from kronfac.cli.bench.cases.vectors import BLOCK, SHAPES, walsh_rows
from kronfac.cli.bench.measure import Timing, by_turns, calls_per_sample, quartiles, ratio
from kronfac.cli.bench.networks import NETWORKS, factor_sizes, layer_shapes
from kronfac.cli.bench.operators import prepare
from kronfac.cli.bench.peak import Peak, measure_peak
from kronfac.cli.bench.steps import WORKLOADS, OptimizerTrainer, Schedule, cycle_times, kfac, run_steps, summarise
from kronfac.cli.errors import RunError
from tests.cli.conftest import Kronfac

PEAK = Peak("avx2", 1, 100e9, 50e9, 10e9, 20e9)


class FakeClock:
    """Time passes only when a side says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, seconds: float, log: list[str], name: str) -> Callable[[], None]:
        def call() -> None:
            log.append(name)
            self.now += seconds

        return call


# --- timing -------------------------------------------------------------------------------------------------


def test_sides_are_timed_by_turns_and_repeated_to_fill_a_sample() -> None:
    clock = FakeClock()
    log: list[str] = []
    sides = {"a": clock.taking(1.0, log, "a"), "b": clock.taking(0.25, log, "b")}
    timings = by_turns(sides, rounds=3, sample_seconds=1.0, clock=clock)
    assert log[:4] == ["a", "a", "b", "b"]  # once unseen, once to choose the number of calls
    assert log[4:] == ["a", "b", "b", "b", "b"] * 3
    assert timings["a"] == Timing((1.0,) * 3, 1)
    assert timings["b"] == Timing((0.25,) * 3, 4)
    with pytest.raises(ValueError, match="rounds: expected at least 1"):
        by_turns(sides, rounds=0, clock=clock)


def test_calls_per_sample_has_a_floor_and_a_ceiling() -> None:
    assert calls_per_sample(3.0, 1.0) == 1
    assert calls_per_sample(0.3, 1.0) == 4
    assert calls_per_sample(0.0, 1.0) == calls_per_sample(1e-12, 1.0) == measure.MAX_CALLS


def test_ratio_is_of_medians_with_quartiles_of_pairs() -> None:
    # A slow middle of the run hits both sides of a pair: the pairs do not see it.
    found = ratio(Timing((2.0, 20.0, 4.0)), Timing((1.0, 10.0, 2.0)))
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0)
    with pytest.raises(ValueError, match="no pairs"):
        ratio(Timing((1.0,)), Timing((1.0, 2.0)))


def test_thread_count_is_set_and_restored() -> None:
    before = torch.get_num_threads()
    with measure.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_peak_memory_counts_what_was_touched() -> None:
    array, extra = measure.peak_memory(lambda: torch.ones(16 << 20))
    assert float(array[-1]) == 1.0
    if extra is None:
        pytest.skip("this system keeps no high-water mark that can be reset")
    assert 60 << 20 <= extra <= 96 << 20  # 64 MiB, and what the allocator adds
    _, extra = measure.peak_memory(lambda: None)
    assert extra is not None
    assert extra < 16 << 20


def test_peak_loops_run_on_every_instruction_set() -> None:
    for isa in _host.instruction_sets():
        peak = measure_peak(isa, 2, seconds=1e-3, rounds=1, array_bytes=1 << 20)
        assert peak.isa == isa
        assert peak.threads == 2
        assert all(rate > 0 and math.isfinite(rate) for rate in (peak.float32, peak.float64, peak.copy, peak.read))
        assert peak.memory == max(peak.copy, peak.read)
    with pytest.raises(ValueError, match=r"isa: expected one of .*'z80'"):
        _host.peak_flops("z80", "float32", 1e-3)
    with pytest.raises(ValueError, match="dtype: expected 'float32' or 'float64', got 'int8'"):
        _host.peak_flops("portable", "int8", 1e-3)
    with pytest.raises(ValueError, match="seconds: expected a positive number"):
        _host.copy_bandwidth("portable", 1 << 20, 0.0)
    with pytest.raises(ValueError, match="bytes: expected at least 65536, got 8"):
        _host.read_bandwidth("portable", 8, 1e-3)


# --- cases --------------------------------------------------------------------------------------------------


def test_every_operator_has_cases_and_a_quick_one() -> None:
    import kronfac.ops

    assert len({case.key for case in CASES}) == len(CASES)
    # The accumulating forms share their kernels with the others.
    assert set(OPERATORS) == set(kronfac.ops.__all__) - {"covariance_", "conv_covariance_"}
    assert {case.op for case in select(quick=True)} == set(OPERATORS)
    assert {case.op for case in select(["covariance"])} == {"covariance"}
    with pytest.raises(ValueError, match="unknown operator 'gemm'; expected one of covariance"):
        select(["gemm"])


@pytest.mark.parametrize("case", select(quick=True), ids=lambda case: case.key)
def test_quick_cases_agree_with_their_rivals_and_notice_a_wrong_result(case: Any) -> None:
    contest = prepare(case)
    results = {name: side() for name, side in contest.sides.items()}
    errors = {name: contest.error(result) for name, result in results.items()}
    assert next(iter(errors)) == OURS
    assert len(errors) > 1
    assert max(errors.values()) < 1e-4
    assert verdict(errors, contest.tolerance)
    wrong = contest.error(_spoiled(results[OURS]))
    assert not verdict(errors | {OURS: wrong}, contest.tolerance)
    # The second call of a side must be as good as the first: the timing loop makes many.
    assert contest.error(contest.sides[OURS]()) < 1e-4


def _spoiled(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return result * 1.01
    return type(result)(_spoiled(item) for item in result)


def test_verdict() -> None:
    assert verdict({OURS: 1e-7, "torch": 1e-8})  # both are rounding
    assert verdict({OURS: 1e-3, "torch": 5e-4})
    assert not verdict({OURS: 1e-1, "torch": 5e-4})
    assert not verdict({OURS: math.nan, "torch": 5e-4})
    assert not verdict({OURS: 1e-3, "torch": math.nan})
    assert not verdict({OURS: 1e-3, "torch": 1.0}, tolerance=1e-4)
    assert math.isnan(worst([0.0, math.nan, 1.0]))
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.0], dtype=torch.float64)) == 5.0


def test_walsh_rows_are_orthonormal() -> None:
    assert all(n % BLOCK == 0 and m <= BLOCK for n, m in SHAPES)
    rows = walsh_rows(640, 50).double()
    torch.testing.assert_close(rows @ rows.mT, torch.eye(50, dtype=torch.float64), atol=1e-6, rtol=0)


def test_network_shapes() -> None:
    assert [sum(p.numel() for p in NETWORKS[name]().parameters()) for name in ("resnet20", "autoencoder")] == [
        272474,
        2837314,
    ]
    with torch.device("meta"):
        assert sum(p.numel() for p in NETWORKS["resnet50"]().parameters()) == 25557032
    assert layer_shapes("mlp") == [(1024, 785), (1024, 1025), (1024, 1025), (1024, 1025), (10, 1025)]
    assert factor_sizes("mlp")[:3] == [785, 1024, 1025]
    assert layer_shapes("resnet20")[0] == (16, 27)
    for name, workload in WORKLOADS.items():
        x, target = workload.data(2)
        assert torch.isfinite(workload.loss(NETWORKS[name]()(x), target))


# --- steps --------------------------------------------------------------------------------------------------


def test_schedule() -> None:
    schedule = Schedule(2, 6)
    assert [schedule.kind(step) for step in range(7)] == [
        "inverse", "plain", "factor", "plain", "factor", "plain", "inverse",
    ]  # fmt: skip
    assert schedule.shares() == {"inverse": 1 / 6, "plain": 3 / 6, "factor": 2 / 6}
    with pytest.raises(ValueError, match="multiple of factor_every"):
        Schedule(4, 6)


def test_amortised_step_weighs_the_medians_of_each_kind() -> None:
    records = [("plain", {"step": 1.0})] * 3 + [("plain", {"step": 100.0})] + [("inverse", {"step": 9.0})]
    found = summarise(records, {"plain": 0.8, "inverse": 0.2}, base=2.0)
    assert found["amortised"] == pytest.approx(0.8 * 1.0 + 0.2 * 9.0)
    assert found["ratio"] == pytest.approx(found["amortised"] / 2.0)
    assert found["mean"] == pytest.approx(112 / 5)
    assert found["kinds"]["plain"]["count"] == 4


def test_time_of_a_cycle_counts_every_step_of_it() -> None:
    records = [("plain", {"forward": 1.0, "step": 2.0}), ("inverse", {"forward": 1.0, "step": 10.0})]
    records += [("plain", {"forward": 1.0, "step": 4.0}), ("inverse", {"forward": 1.0, "step": 20.0})]
    assert cycle_times(records, 2) == [7.0, 13.0]


def test_steps_of_both_sides_are_counted_by_kind() -> None:
    entry = run_steps(WORKLOADS["resnet20"], Schedule(2, 4), 1, periods=1, batch=2)
    assert {kind: found["count"] for kind, found in entry["sides"]["kronfac"]["kinds"].items()} == {
        "inverse": 1,
        "plain": 2,
        "factor": 1,
    }
    assert entry["sides"]["sgd"]["kinds"]["plain"]["count"] == 4
    assert entry["sides"]["sgd"]["ratio"] == pytest.approx(1.0)
    assert entry["sides"]["sgd"]["cycle_ratio"] == 1.0
    assert entry["sides"]["kronfac"]["cycle_ratio"] > 0
    json.dumps(entry, allow_nan=False)


def test_steps_that_did_no_work_are_refused() -> None:
    workload = WORKLOADS["mlp"]
    layer = torch.nn.Linear(784, 10)
    model = torch.nn.Sequential(layer)
    x, target = workload.data(2)
    trainer = kfac(model, workload, (x * math.inf, target), Schedule(1, 1))
    assert isinstance(trainer, OptimizerTrainer)
    with pytest.warns(UserWarning, match="not finite"):
        trainer.step()
    with pytest.raises(RunError, match="steps were skipped"):
        trainer.check()
    layer.weight.data.fill_(math.nan)
    with pytest.raises(RunError, match=r"parameter 0\.weight is not finite"):
        trainer.check()


# --- reports ------------------------------------------------------------------------------------------------


def result(**changes: Any) -> dict[str, Any]:
    entry = {
        "op": "covariance",
        "case": "16x8",
        "threads": 1,
        "correct": True,
        "work": 2e9,
        "unit": "FLOP",
        "rate": 2e9,
        "fraction_of_peak": 0.02,
        "rival": "torch",
        "ratio": 2.0,
        "ratio_quartiles": [1.5, 2.5],
        "sides": {
            OURS: {"median": 1.0, "error": 1e-7, "ratio": 1.0},
            "torch": {"median": 2.0, "error": 1e-7, "ratio": 2.0, "peak_memory": 3 << 20},
        },
    }
    return entry | changes


def document(**changes: Any) -> dict[str, Any]:
    machine = {"cpu": "a", "instruction_set": "avx2", "torch": "2.13.0"}
    return report.document(machine, {"rounds": 7}, [PEAK], [result(**changes)], [])


def test_command_writes_a_report_that_it_can_compare_with(kronfac: Kronfac, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    first = kronfac("bench", "--quick", "--op", "covariance", "--threads", "1", "--json", file)
    assert first.status == 0, first.err
    content = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["schema"] == report.SCHEMA
    assert content["machine"]["cpu"]
    assert content["machine"]["instruction_set"] == content["peaks"][0]["isa"] == _host.instruction_set()
    assert "executable" not in content["machine"]
    for entry in content["results"]:
        sides = entry["sides"]
        assert {len(side["samples"]) for side in sides.values()} == {content["settings"]["rounds"]}
        assert entry["rate"] == pytest.approx(entry["work"] / sides[OURS]["median"])
        assert entry["ratio"] == pytest.approx(sides[entry["rival"]]["median"] / sides[OURS]["median"])
        assert entry["fraction_of_peak"] == pytest.approx(entry["rate"] / content["peaks"][0]["float32"])
        assert entry["correct"]
    second = kronfac("bench", "--quick", "--op", "covariance", "--threads", "1", "--compare", file)
    assert second.status == 0, second.err
    assert "ratio to rival: then, now" in second.out
    assert "warning" not in second.out


def test_command_lists_cases(kronfac: Kronfac) -> None:
    listed = kronfac("bench", "--list", "--op", "orthogonalize_").out.splitlines()
    assert listed == [case.key for case in CASES if case.op == "orthogonalize_"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "gemm"], "--op: unknown operator 'gemm'; expected one of covariance"),
        (["--threads", "0"], "--threads: expected numbers >= 1"),
        (["--threads", "two"], "--threads: expected numbers >= 1"),
        (["--steps", "--op", "covariance"], "--op: not together with --steps"),
        (["--network", "mlp"], "--network: only together with --steps"),
        (["--steps", "--network", "vgg"], "unknown network 'vgg'; expected one of resnet20"),
        (["--compare", "/nonexistent.json"], "--compare /nonexistent.json: cannot be read"),
        (["--json", "/nonexistent/x.json"], "--json /nonexistent/x.json: no such directory"),
    ],
)
def test_bad_command_lines_are_refused_before_anything_runs(
    kronfac: Kronfac, arguments: list[str], message: str
) -> None:
    outcome = kronfac("bench", "--quick", *arguments)
    assert outcome.status == 2
    assert message in outcome.message
    assert not outcome.out


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "not JSON"),
        ("[]", "no report"),
        ('{"schema": 0}', "schema 0, this version reads 1"),
        ('{"schema": 1, "results": []}', "results or machine are missing"),
        ('{"schema": 1, "machine": {}, "results": [{"op": "covariance"}]}', "a result without 'case'"),
    ],
)
def test_what_is_no_report_is_refused(kronfac: Kronfac, tmp_path: Path, content: str, problem: str) -> None:
    file = tmp_path / "old.json"
    file.write_text(content)
    outcome = kronfac("bench", "--quick", "--compare", file)
    assert outcome.status == 2
    assert problem in outcome.message


def test_a_wrong_result_fails_the_command(kronfac: Kronfac, monkeypatch: pytest.MonkeyPatch) -> None:
    import kronfac.ops as ops

    original = ops.covariance
    monkeypatch.setattr(ops, "covariance", lambda *arguments, **options: 1.01 * original(*arguments, **options))
    outcome = kronfac("bench", "--quick", "--op", "covariance", "--threads", "1")
    assert outcome.status == 1
    assert "wrong results, whose times mean nothing: covariance[16x8]" in outcome.message
    assert "WRONG" in outcome.out


def test_reports_are_compared_by_case_and_threads() -> None:
    faster = {OURS: {"median": 0.5, "error": 1e-7, "ratio": 1.0}, "torch": {"median": 1.5, "error": 0.0, "ratio": 3.0}}
    (change,) = report.compare(document(), document(ratio=3.0, sides=faster))
    assert change["speedup"] == 2.0
    assert change["relative"] == 1.5
    assert change["ratios"] == [2.0, 3.0]
    assert report.compare(document(), document(threads=2)) == []
    assert "nothing to compare" in report.comparison_lines(document(), document(case="other"))[-1]
    other = document()
    other["machine"]["cpu"] = "b"
    assert report.comparison_lines(other, document())[0].startswith("warning: cpu differs (b then, a now)")
    assert "WRONG" in report.comparison_lines(document(correct=False), document())[-1]


def test_lines_for_reading() -> None:
    line = report.result_line(result())
    for part in (
        "covariance",
        "16x8",
        "1 s",
        "2 GFLOP/s",
        "2%",
        "2.00x",
        "1.50-2.50",
        "torch 2 s (2.00x, 1e-07, 3.0 MiB)",
    ):
        assert part in line
    assert "-" in report.result_line(result(fraction_of_peak=None))
    assert [report.seconds(value) for value in (2.0, 0.0125, 3e-6, 5e-10)] == ["2 s", "12.5 ms", "3 us", "0.5 ns"]


# --- two commits --------------------------------------------------------------------------------------------


@pytest.fixture
def side(tmp_path: Path) -> Callable[[str], Side]:
    """Makes a side whose operator tests are the given source."""

    def make(tests: str) -> Side:
        room = tmp_path / "tests" / "ops"
        room.mkdir(parents=True, exist_ok=True)
        (room / "test_some.py").write_text(tests)
        return Side("some", tmp_path, Path(sys.executable))

    return make


def test_red_or_missing_tests_are_seen(side: Callable[[str], Side]) -> None:
    assert run_tests(side("def test_it():\n    assert 1 + 1 == 2\n")) is None
    red = run_tests(side("def test_it():\n    assert 1 + 1 == 3\n"))
    assert red is not None
    assert "1 failed" in red
    assert run_tests(side("# nothing\n")) is not None


def test_no_times_are_taken_where_tests_are_red() -> None:
    sides = [Side("old", Path(), Path()), Side("new", Path(), Path())]

    def timing() -> list[dict[str, Any]]:
        raise AssertionError("must not be reached")

    with pytest.raises(RefusedError, match=r"tests of new are red; no times\n--- new ---\n1 failed"):
        compare(sides, timing, lambda side: "1 failed" if side.name == "new" else None)
    entry = {"case": "covariance[16x8]", "correct": False}
    with pytest.raises(RefusedError, match=r"wrong results, .*: covariance\[16x8\]"):
        compare(sides, lambda: [entry], lambda side: None)
    assert compare(sides, lambda: [entry | {"correct": True}], lambda side: None) == [entry | {"correct": True}]


def test_unknown_revision_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RefusedError, match="git archive"):
        export("no-such-revision", tmp_path / "source")
    assert main(["no-such-revision", "worktree", "--quick"]) == 1
    captured = capsys.readouterr()
    assert "no-such-revision" in captured.err
    assert "speed-up" not in captured.out


@pytest.mark.slow
def test_worker_measures_when_asked() -> None:
    with Worker(Path(sys.executable)) as worker:
        state = worker.ask(prepare="covariance[16x8]", threads=1, sample_seconds=1e-3)
        assert state["correct"]
        assert set(state["errors"]) == {OURS, "torch"}
        assert worker.ask(sample=True)["seconds"] > 0
        with pytest.raises(RefusedError, match="ended with status 1"):
            worker.ask(prepare="no such case", threads=1, sample_seconds=1e-3)
