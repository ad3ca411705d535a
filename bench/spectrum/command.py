"""The command line of the comparison."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import bench.spectrum as package
from bench.spectrum import density, eigenvalues, traces
from bench.spectrum.problem import NETWORKS, Problem
from kronfac.cli.bench import machine
from kronfac.cli.output import to_json, write_atomically

PARTS = ("sweep", "eigenvalues", "density", "traces")
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of a call."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.spectrum",
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=(*PARTS, "all"))
    parser.add_argument("--network", choices=list(NETWORKS), default="lenet")
    parser.add_argument("--examples", type=int, default=200, help="images in the batch (default 200)")
    parser.add_argument("--top", type=int, default=20, help="eigenvalues (default 20)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of residuals, relative to |λ₁| (default 1e-4)")
    parser.add_argument("--settings", type=Path, metavar="FILE", help="where the sweep's result is kept (JSON)")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which a run of the sweep is given up")
    parser.add_argument("--probes", type=int, default=10, help="of the density (default 10)")
    parser.add_argument("--steps", type=int, default=60, help="of the density (default 60)")
    parser.add_argument("--products", type=int, default=60, help="of each trace (default 60)")
    parser.add_argument("--seeds", type=int, default=20, help="runs of each trace (default 20)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help='"processor" where other programs share the processor'
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that were asked for; 1 where kronfac's answer is not certified."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    clock = CLOCKS[options.clock]
    facts = machine.describe()
    parts = PARTS if options.part == "all" else (options.part,)
    problem = Problem.trained(options.network, options.examples)
    say(f"{facts['cpu']}; kernels {facts['instruction_set']}; torch {facts['torch']}; {options.threads} thread(s)")
    say(f"{problem.name}: {problem.size} parameters, {len(problem.inputs)} images, {options.clock} seconds")
    report: dict[str, Any] = {
        "machine": facts,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "parameters": problem.size,
    }
    settings: dict[str, Any] | None = None
    if options.settings is not None and "sweep" not in parts and options.settings.exists():
        settings = json.loads(options.settings.read_text(encoding="utf-8"))
    if "sweep" in parts or ("eigenvalues" in parts and settings is None):
        settings = eigenvalues.sweep(problem, options.top, options.tolerance, options.limit, clock, say)
        report["sweep"] = settings
        if options.settings is not None:
            write_atomically(options.settings, to_json(settings))
    certified = True
    if "eigenvalues" in parts:
        assert settings is not None
        found = eigenvalues.race(problem, options.top, options.tolerance, settings, options.rounds, clock, say)
        certified = bool(found["kronfac"]["certified"])
        report["eigenvalues"] = found
    if "density" in parts:
        report["density"] = density.race(problem, options.probes, options.steps, options.rounds, clock, say)
    if "traces" in parts:
        report["traces"] = traces.compare(problem, options.products, options.seeds, 10 * options.products, say)
    if options.json is not None:
        write_atomically(options.json, to_json(report))
    return 0 if certified else 1


def say(line: str) -> None:
    """Print at once: a run takes minutes."""
    print(line, flush=True)
