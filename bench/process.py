"""What runs that are processes of their own have in common: one driver per folder, pinning, and how they end."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

DONE, BROKEN, UNAVAILABLE, STOPPED = 0, 1, 3, 4
"""Exit statuses: the record is written; failed; kronfac refuses the method; the checkpoint waits to be continued."""


class RunError(Exception):
    """What keeps a series of runs from going on; one line."""


def default_results(bench: str, threads: int) -> Path:
    """`bench/results/<bench>/<machine>`: runs of different machines are never compared."""
    name = "unknown"
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        facts = ""
    found = dict(re.findall(r"^(model name|model)\s*:\s*(.+)$", facts, re.MULTILINE))
    if found:
        name = f"{found.get('model name', 'cpu')} {found.get('model', '')}"
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\([^)]*\)", "", name).lower()).strip("-")
    return ROOT / "bench" / "results" / bench / f"{slug}-{threads}-threads"


@contextmanager
def only_one(results: Path) -> Iterator[None]:
    """Hold the lock of a folder of results.

    Raises:
        RunError: another driver holds it.
    """
    with (results / "state" / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"another driver is at work in {results}") from None
        yield


def thread_environment(threads: int) -> dict[str, str]:
    """The environment of a process that is to use so many threads."""
    count = str(threads)
    return os.environ | {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count}


def start_worker(module: str, request: Mapping[str, Any], threads: int) -> subprocess.Popen[str]:
    """A process that runs a module with a request, in JSON, as its only argument; what it says can be read."""
    return subprocess.Popen(
        [sys.executable, "-m", module, json.dumps(request)],
        cwd=ROOT,
        env=thread_environment(threads),
        stdout=subprocess.PIPE,
        text=True,
    )


def last_line(said: str) -> str:
    """What a process said last, or that it said nothing."""
    lines = said.strip().splitlines()
    return lines[-1] if lines else "no message; see above"


def end_with_parent(parent: int) -> None:
    """Die when the driver is killed: a run that nobody waits for would disturb the next one. Only on Linux."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it was killed before the line above
        raise SystemExit(BROKEN)


def pin(threads: int) -> list[int]:
    """Pin this process to as many of its processors as it has threads; they are returned, none where that cannot be.

    Raises:
        SystemExit: there are fewer.
    """
    if not hasattr(os, "sched_setaffinity"):
        return []
    available = sorted(os.sched_getaffinity(0))
    if threads > len(available):
        raise SystemExit(f"--threads {threads}: only {len(available)} processors are available to this process")
    return pin_to(available[:threads])


def pin_to(processors: Sequence[int]) -> list[int]:
    """Pin this process to some processors; they are returned, none where that cannot be."""
    if not processors or not hasattr(os, "sched_setaffinity"):
        return []
    os.sched_setaffinity(0, processors)
    return list(processors)


def stop_on_signals() -> list[int]:
    """Collect SIGTERM and SIGINT instead of ending: the list holds the signals that came."""
    came: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: came.append(received))
    return came
