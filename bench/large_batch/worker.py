"""The process of one run: pinned, watched for the end of its parent, and ended in an orderly way when time is short.

It is given one JSON object on the command line and says how it went by its exit status and, in one line, on stdout.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from bench.process import BROKEN, DONE, STOPPED, end_with_parent, pin_to, stop_on_signals


def main(text: str) -> int:
    """Make the run that is asked for; returns the exit status."""
    request: dict[str, Any] = json.loads(text)
    end_with_parent(request["parent"])
    processors = pin_to(request["processors"])
    stopped = stop_on_signals()

    import torch

    from bench.large_batch import problem, train
    from bench.large_batch.settings import Plan, Setting
    from kronfac._archives import DamagedError
    from kronfac.cli.bench import machine
    from kronfac.cli.output import to_json, write_atomically
    from kronfac.datasets import DatasetError

    torch.set_num_threads(request["threads"])
    torch.set_flush_denormal(True)  # gradients of fitted examples become denormal, which is slow; for all methods
    load_at_start = os.getloadavg()
    plan = Plan.from_json(request["plan"])
    checkpoint = Path(request["checkpoint"])
    try:
        data = problem.load_data(Path(request["data_dir"]), plan)
        record = train.run(
            Setting(**request["setting"]),
            plan,
            data,
            checkpoint,
            lambda: bool(stopped) or time.time() >= request["deadline"],
            request["checkpoint_every"],
        )
    except (DamagedError, DatasetError, ValueError, TypeError) as error:
        print(f"{type(error).__name__}: {error}")
        return BROKEN
    if record is None:
        print("stopped; its checkpoint waits")
        return STOPPED
    record |= {
        "threads": request["threads"],
        "pinned_to": processors,
        "load_at_start": list(load_at_start),
        "machine": machine.describe(),
    }
    write_atomically(Path(request["record"]), to_json(record))
    checkpoint.unlink(missing_ok=True)
    return DONE


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
