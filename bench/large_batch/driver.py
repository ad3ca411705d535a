"""The driver: which runs are still missing, and as many processes at a time as there are workers."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.large_batch.settings import Plan, Setting
from bench.process import DONE, STOPPED, RunError, last_line, only_one, start_worker

LEAST_SECONDS = 10.0
"""With less of the budget left no process is started."""

GRACE_SECONDS = 5.0
"""Of the budget's end, for the checkpoints."""


@dataclass(frozen=True)
class Options:
    """How runs are made.

    Attributes:
        results: folder of the records.
        data_dir: of MNIST.
        plan: what the runs have in common.
        threads: per run.
        workers: runs at a time, each pinned to processors of its own.
        deadline: in seconds since the epoch, when the invocation has to be over.
        checkpoint_every: seconds between checkpoints.
        dry: only say what would be run.
    """

    results: Path
    data_dir: Path
    plan: Plan
    threads: int = 1
    workers: int = 1
    deadline: float = float("inf")
    checkpoint_every: float = 20.0
    dry: bool = False


def record_path(results: Path, plan: Plan, setting: Setting) -> Path:
    """Where the record of a run lies."""
    return results / f"{plan.key}-{setting.key}.json"


def checkpoint_path(results: Path, plan: Plan, setting: Setting) -> Path:
    """Where the checkpoint of an unfinished run lies."""
    return results / "state" / f"{plan.key}-{setting.key}.pt"


def slots(threads: int, workers: int) -> list[list[int]]:
    """The processors of each worker; empty lists where processes cannot be pinned.

    Raises:
        RunError: there are fewer processors.
    """
    if not hasattr(os, "sched_getaffinity"):
        return [[] for _ in range(workers)]
    available = sorted(os.sched_getaffinity(0))
    if threads * workers > len(available):
        raise RunError(
            f"--workers {workers} --threads {threads}: only {len(available)} processors are available to this process"
        )
    return [available[threads * number : threads * (number + 1)] for number in range(workers)]


def run_all(settings: Sequence[Setting], options: Options) -> bool:
    """Make the runs that have no record yet.

    Returns:
        Whether all of them are there now.

    Raises:
        RunError: another driver is at work in the same folder, too few processors, or a run failed.
    """
    if options.dry:
        for setting in settings:
            state = "missing"
            if record_path(options.results, options.plan, setting).exists():
                state = "done"
            elif checkpoint_path(options.results, options.plan, setting).exists():
                state = "to be continued"
            print(f"{setting.key:<24} {state}")
        return True
    places = slots(options.threads, options.workers)
    for folder in (options.results, options.results / "state"):
        folder.mkdir(parents=True, exist_ok=True)
    with only_one(options.results):
        missing = [one for one in settings if not record_path(options.results, options.plan, one).exists()]
        return _Pool(missing, places, options).finish()


@dataclass
class _Pool:
    """Workers, and the runs that wait for one."""

    waiting: list[Setting]
    free: list[list[int]]
    options: Options
    running: dict[str, tuple[Setting, list[int], subprocess.Popen[str]]] = field(default_factory=dict)
    complete: bool = True

    def finish(self) -> bool:
        total, began = len(self.waiting), time.monotonic()
        try:
            while self.running or self.waiting:
                while self.waiting and self.free and self.complete:
                    if self.options.deadline - time.time() < LEAST_SECONDS:
                        print("out of budget; start again to go on", flush=True)
                        self.complete = False
                    else:
                        self._start(self.waiting.pop(0))
                if not self.running:
                    break
                for key in [key for key, (_, _, process) in self.running.items() if process.poll() is not None]:
                    self._end(key, total, began)
                time.sleep(0.05)
        except BaseException:
            self._stop()
            raise
        return self.complete

    def _start(self, setting: Setting) -> None:
        options, processors = self.options, self.free.pop()
        request = {
            "parent": os.getpid(),
            "setting": setting.to_json(),
            "plan": options.plan.to_json(),
            "threads": options.threads,
            "processors": processors,
            "data_dir": str(options.data_dir.resolve()),
            "record": str(record_path(options.results, options.plan, setting).resolve()),
            "checkpoint": str(checkpoint_path(options.results, options.plan, setting).resolve()),
            "checkpoint_every": options.checkpoint_every,
            "deadline": options.deadline - GRACE_SECONDS,
        }
        process = start_worker("bench.large_batch.worker", request, options.threads)
        self.running[setting.key] = setting, processors, process

    def _end(self, key: str, total: int, began: float) -> None:
        setting, processors, process = self.running.pop(key)
        said = process.communicate()[0]
        self.free.append(processors)
        if process.returncode == STOPPED:
            self.complete = False
            print(f"{key}: {last_line(said)}; start again to go on", flush=True)
        elif process.returncode != DONE:
            checkpoint = checkpoint_path(self.options.results, self.options.plan, setting)
            raise RunError(
                f"{key} ended with status {process.returncode}: {last_line(said)} (to start the run anew, remove "
                f"{checkpoint})"
            )
        else:
            done = total - len(self.waiting) - len(self.running)
            path = record_path(self.options.results, self.options.plan, setting)
            print(f"[{done}/{total}, {time.monotonic() - began:.0f} s] {key}: {_tell(path)}", flush=True)

    def _stop(self) -> None:
        """Let the runs that are under way write their checkpoints."""
        for _, _, process in self.running.values():
            process.terminate()
        for _, _, process in self.running.values():
            process.communicate()


def _tell(path: Path) -> str:
    record = json.loads(path.read_text(encoding="utf-8"))
    said = "diverged, " if record["status"] == "diverged" else ""
    return f"{said}{100 * record['accuracy']:.2f} %, {record['updates']} updates, {record['seconds']:.0f} s"
