"""Whole K-FAC steps; the SGD step is timed between the rounds. `kronfac bench --steps` says more about each."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch

from kronfac.cli.bench.measure import threads
from kronfac.cli.bench.networks import NETWORKS
from kronfac.cli.bench.steps import SCHEDULES, WORKLOADS, Phases, Schedule, Workload, kfac, sgd, summarise


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per network, schedule and number of threads."""
    config = metafunc.config
    quick = config.getoption("--quick")
    metafunc.parametrize("workload", WORKLOADS.values(), ids=lambda workload: workload.name)
    metafunc.parametrize("schedule", [Schedule(1, 4)] if quick else SCHEDULES, ids=str)
    metafunc.parametrize("thread_count", [int(part) for part in config.getoption("--threads").split(",")])


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_step(
    benchmark: Any, request: pytest.FixtureRequest, workload: Workload, schedule: Schedule, thread_count: int
) -> None:
    quick = request.config.getoption("--quick")
    periods = 1 if quick or schedule.inverse_every > 10 else 7
    with threads(thread_count):
        torch.manual_seed(0)
        batch = workload.data(4 if quick else workload.batch)
        ours = kfac(NETWORKS[workload.name](), workload, batch, schedule)
        rival = sgd(NETWORKS[workload.name](), workload, batch, schedule)
        ours.step()
        rival.step()
        records: list[tuple[str, Phases]] = []
        plain: list[float] = []
        count = periods * schedule.inverse_every

        def before_round() -> None:
            plain.append(sum(rival.step().values()))

        def one_round() -> None:
            records.append((schedule.kind(len(records) + 1), ours.step()))

        benchmark.group = "steps"
        benchmark.pedantic(one_round, setup=before_round, rounds=count)
        ours.check()
        rival.check()
    base = statistics.median(plain)
    benchmark.extra_info.update({"sgd_median": base, **summarise(records, schedule.shares(), base)})
