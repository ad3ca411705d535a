"""The driver: which runs are still missing, one process after the other, and what is done with how they end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.autoencoder.settings import WIDTHS, Setting, grid
from bench.autoencoder.summary import FINAL, GRID, Record, best, read
from bench.process import DONE, STOPPED, UNAVAILABLE, RunError, last_line, only_one, start_worker

EVALUATIONS = {GRID: 8, FINAL: 40}
KEPT = 2
"""Settings per method that are run again for longer."""

LEAST_SECONDS = 60.0
"""With less of the budget left no process is started."""

GRACE_SECONDS = 10.0
"""Of the budget's end, for the last evaluation and the checkpoint."""


RaceError = RunError


@dataclass(frozen=True)
class Options:
    """How runs are made.

    Attributes:
        results: folder of the records.
        data_dir: of MNIST.
        minutes: of training per run.
        threads: per run, which is pinned to as many processors.
        deadline: in seconds since the epoch, when the invocation has to be over.
        retries: how often a disturbed run is repeated.
        checkpoint_every: seconds of training between checkpoints.
        widths: of the network.
        dry: only say what would be run.
    """

    results: Path
    data_dir: Path
    minutes: float
    threads: int
    deadline: float
    retries: int = 1
    checkpoint_every: float = 30.0
    widths: Sequence[int] = WIDTHS
    dry: bool = False


def finals(results: Path, methods: Sequence[str], minutes: float) -> list[Setting]:
    """The best settings of each method's tuning runs.

    Args:
        results: folder of the records.
        methods: whose.
        minutes: length of the tuning runs.

    Raises:
        RaceError: a method has tuning runs, but not all of them yet.
    """
    chosen: list[Setting] = []
    done = {record.setting.key: record for record in read(results, GRID, minutes)}
    for method in methods:
        wanted = [setting.key for setting in grid([method])]
        missing = [key for key in wanted if key not in done]
        if len(missing) == len(wanted):
            print(f"{method}: no tuning runs, so no final ones", flush=True)
            continue
        if missing:
            raise RaceError(f"{method}: {len(missing)} of {len(wanted)} tuning runs are missing; run `grid` first")
        chosen += [record.setting for record in best([done[key] for key in wanted], KEPT)]
    return chosen


def run_all(stage: str, settings: Sequence[Setting], options: Options) -> bool:
    """Make the runs of a stage that have no record yet.

    Returns:
        Whether all of them are there now (methods that kronfac does not have set aside).

    Raises:
        RaceError: another driver is at work in the same folder, or a run failed.
    """
    if options.dry:
        for setting in settings:
            state = "missing"
            if _record_path(options.results, stage, setting, options.minutes).exists():
                state = "done"
            elif _checkpoint_path(options.results, stage, setting, options.minutes).exists():
                state = "to be continued"
            print(f"{stage} {setting.key:<24} {state:<16} {setting.describe()}")
        return True
    for folder in (options.results, options.results / "state"):
        folder.mkdir(parents=True, exist_ok=True)
    with only_one(options.results):
        return _run_all(stage, settings, options)


def _run_all(stage: str, settings: Sequence[Setting], options: Options) -> bool:
    refused: dict[str, str] = {}
    for setting in settings:
        record = _record_path(options.results, stage, setting, options.minutes)
        while setting.method not in refused and (not record.exists() or _set_aside(record, options.retries)):
            left = options.deadline - time.time()
            if left < LEAST_SECONDS:
                print(f"out of budget before {stage} {setting.key}; start again to go on", flush=True)
                return False
            print(f"{stage} {setting.key}: {setting.describe()}", flush=True)
            status, said = _run_one(stage, setting, options)
            if status == UNAVAILABLE:
                refused[setting.method] = said
                print(f"  not available in this build: {said}", flush=True)
            elif status == STOPPED:
                print(f"  {said}; start again to go on", flush=True)
                return False
            elif status != DONE:
                raise RaceError(
                    f"{stage} {setting.key} ended with status {status}: {said} (to start the run anew, remove "
                    f"{_checkpoint_path(options.results, stage, setting, options.minutes)})"
                )
            else:
                _tell(record)
    return True


def _run_one(stage: str, setting: Setting, options: Options) -> tuple[int, str]:
    request = {
        "parent": os.getpid(),
        "stage": stage,
        "setting": setting.to_json(),
        "seconds": 60 * options.minutes,
        "evaluations": EVALUATIONS[stage],
        "threads": options.threads,
        "data_dir": str(options.data_dir.resolve()),
        "record": str(_record_path(options.results, stage, setting, options.minutes).resolve()),
        "checkpoint": str(_checkpoint_path(options.results, stage, setting, options.minutes).resolve()),
        "widths": options.widths,
        "checkpoint_every": options.checkpoint_every,
        "deadline": options.deadline - GRACE_SECONDS,
    }
    process = start_worker("bench.autoencoder.worker", request, options.threads)
    try:
        said, _ = process.communicate()
    except KeyboardInterrupt:
        process.terminate()  # it writes its checkpoint
        process.communicate()
        raise
    return process.returncode, last_line(said)


def _tell(path: Path) -> None:
    record = _read(path)
    error = "diverged" if record.diverged else f"error {record.final_error:.4g}"
    print(f"  {error}, {record.steps} steps in {record.seconds:.0f} s of training", flush=True)
    if record.disturbed is not None:
        print(f"  disturbed: {record.disturbed}", flush=True)


def _set_aside(path: Path, retries: int) -> bool:
    """Rename the record of a disturbed run, so that the run is made again; False where it stays."""
    tries = len(list(path.parent.glob(f"{path.stem}.disturbed-*")))
    if _read(path).disturbed is None or tries >= retries:
        return False
    # Not ending in .json: nothing that reads records takes it for one.
    path.rename(path.with_name(f"{path.stem}.disturbed-{tries + 1}"))
    return True


def _read(path: Path) -> Record:
    return Record.from_json(json.loads(path.read_text(encoding="utf-8")))


def _record_path(results: Path, stage: str, setting: Setting, minutes: float) -> Path:
    return results / f"{stage}-{minutes:g}min-{setting.key}.json"


def _checkpoint_path(results: Path, stage: str, setting: Setting, minutes: float) -> Path:
    return results / "state" / f"{stage}-{minutes:g}min-{setting.key}.pt"
