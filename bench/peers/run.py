"""Trains the same steps with kronfac and with every peer that is there, by turns, and prints what each costs.

python bench/peers/run.py [--path kfac=/src/kfac-pytorch ...] [--network resnet20] [--threads 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.peers.makers import PEERS, UnsupportedError
from kronfac.cli.bench import machine, report
from kronfac.cli.bench.steps import SCHEDULES, WORKLOADS, MakeTrainer, Schedule, Workload, kfac, run_steps, step_lines
from kronfac.cli.output import to_json, write_atomically


def pin(threads: int) -> list[int]:
    """Keep this process on as many processors as it has threads, so that the scheduler moves nothing meanwhile."""
    if not hasattr(os, "sched_setaffinity"):
        return []
    available = sorted(os.sched_getaffinity(0))
    if threads > len(available):
        raise SystemExit(f"peers: --threads {threads}: only {len(available)} processors are available to this process")
    os.sched_setaffinity(0, available[:threads])
    return available[:threads]


def usable_makers(workload: Workload, schedule: Schedule, absent: dict[str, str]) -> dict[str, MakeTrainer]:
    """The makers whose peer takes three steps of this network; the others are entered into `absent` with the reason."""
    makers: dict[str, MakeTrainer] = {"kronfac": kfac}
    for peer in PEERS:
        if not peer.present():
            absent[peer.name] = "not installed, no --path given"
            continue
        try:
            run_steps(
                workload, Schedule(1, 1), torch.get_num_threads(), makers={peer.name: peer.make}, periods=2, batch=4
            )
        except UnsupportedError as reason:
            absent[peer.name] = str(reason)
        except Exception as error:  # a peer may fail in any way; the others are still worth their line
            absent[peer.name] = (
                f"fails on {workload.name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            )
        else:
            makers[peer.name] = peer.make
    return makers


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", action="append", default=[], metavar="MODULE=DIRECTORY", help="where a peer lies")
    parser.add_argument("--network", action="append", choices=list(WORKLOADS), help="default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--periods", type=int, default=7, help="whole periods of the inverses' frequency")
    parser.add_argument("--quick", action="store_true", help="small batches, one period: checks the harness")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    for item in options.path:
        module, separator, directory = item.partition("=")
        if not separator or not Path(directory).is_dir():
            parser.error(f"--path: expected MODULE=DIRECTORY with a directory that exists, got {item!r}")
        sys.path.insert(1, directory)
        if not any(peer.module == module for peer in PEERS):
            parser.error(f"--path: unknown module {module!r}; expected one of {', '.join(p.module for p in PEERS)}")

    processors = pin(options.threads)
    torch.set_num_threads(options.threads)
    facts = machine.describe() | {"pinned_to": processors}
    print(f"{facts['cpu']}; kernels {facts['instruction_set']}; torch {facts['torch']}; pinned to {processors}")
    entries: list[dict[str, Any]] = []
    with tempfile.NamedTemporaryFile() as rendezvous:
        # One process is a group too: peers that reduce over the group then find it, and kronfac pays for it as well.
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{rendezvous.name}.group", rank=0, world_size=1
        )
        try:
            for name in options.network or WORKLOADS:
                for schedule in [Schedule(1, 4)] if options.quick else SCHEDULES:
                    entries.append(_run(WORKLOADS[name], schedule, options))
        finally:
            torch.distributed.destroy_process_group()
            Path(f"{rendezvous.name}.group").unlink(missing_ok=True)
    if options.json is not None:
        write_atomically(options.json, to_json(report.document(facts, vars(options) | {"json": None}, [], [], entries)))


def _run(workload: Workload, schedule: Schedule, options: argparse.Namespace) -> dict[str, Any]:
    absent: dict[str, str] = {}
    makers = usable_makers(workload, schedule, absent)
    entry = run_steps(
        workload,
        schedule,
        options.threads,
        makers=makers,
        periods=1 if options.quick else options.periods,
        batch=max(4, workload.batch // 16) if options.quick else None,
    )
    entry["absent"] = absent
    entry["notes"] = {peer.name: peer.note for peer in PEERS if peer.name in makers}
    for line in step_lines(entry):
        print(line)
    for peer, note in entry["notes"].items():
        print(f"  {peer}: {note}")
    for peer, reason in absent.items():
        print(f"  {peer}: not measured: {reason}")
    return entry


if __name__ == "__main__":
    main()
