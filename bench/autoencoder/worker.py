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

from bench.process import BROKEN, DONE, STOPPED, UNAVAILABLE, end_with_parent, pin, stop_on_signals


def main(text: str) -> int:
    """Run the request; returns the exit status."""
    request: dict[str, Any] = json.loads(text)
    end_with_parent(request["parent"])
    processors = pin(request["threads"])
    stopped = stop_on_signals()

    import torch

    from bench.autoencoder import methods, problem, train
    from bench.autoencoder.settings import Setting
    from kronfac.cli.bench import machine
    from kronfac.cli.output import to_json, write_atomically
    from kronfac.datasets import DatasetError

    torch.set_num_threads(request["threads"])
    # Saturated sigmoids send gradients below the normal range, where a step takes three times as long; for all methods.
    torch.set_flush_denormal(True)
    load_at_start = os.getloadavg()
    job = train.Job(
        Setting.from_json(request["setting"]),
        request["seconds"],
        request["evaluations"],
        widths=request["widths"],
        checkpoint_every=request["checkpoint_every"],
    )
    try:
        images = problem.load_images(Path(request["data_dir"]))
        record = train.run(
            job, images, Path(request["checkpoint"]), lambda: bool(stopped) or time.time() >= request["deadline"]
        )
    except methods.UnavailableError as reason:
        print(reason)
        return UNAVAILABLE
    except (DatasetError, ValueError, TypeError) as error:
        print(f"{type(error).__name__}: {error}")
        return BROKEN
    if record is None:
        print("stopped; its checkpoint waits")
        return STOPPED
    record |= {
        "stage": request["stage"],
        "minutes": request["seconds"] / 60,
        "threads": request["threads"],
        "pinned_to": processors,
        "load_at_start": list(load_at_start),
        "machine": machine.describe(),
    }
    write_atomically(Path(request["record"]), to_json(record))
    Path(request["checkpoint"]).unlink(missing_ok=True)
    return DONE


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
