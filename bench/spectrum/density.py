"""The spectral density: the same probes and Lanczos steps on both sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch.nn.functional as F

import kronfac
from bench.spectrum.problem import Problem
from bench.spectrum.sides import PEERS, SEED, pyhessian_density
from kronfac.cli.bench.measure import Clock, by_turns, ratio

Say = Callable[[str], None]


def race(problem: Problem, probes: int, steps: int, rounds: int, clock: Clock, say: Say) -> dict[str, Any]:
    """Time both by turns; beside each stand the trace and the largest eigenvalue that its quadrature implies.

    Args:
        problem: the Hessian.
        probes: start vectors of each.
        steps: of Lanczos.
        rounds: of each side.
        clock: seconds.
        say: prints.
    """
    moments: dict[str, tuple[float, float, float]] = {}  # trace, its standard error, the largest node

    def ours() -> None:
        operator = kronfac.operators.hessian(problem.model, F.cross_entropy, (problem.inputs, problem.targets))
        result = kronfac.spectrum.density(operator, probes=probes, steps=steps, seed=SEED)
        moments["kronfac"] = result.trace, result.trace_stderr, float(result.nodes[-1])

    def theirs() -> None:
        nodes, weights = (np.array(part, dtype=np.float64) for part in pyhessian_density(problem, probes, steps))
        traces = problem.size * (nodes * weights).sum(axis=1)
        moments["PyHessian"] = float(traces.mean()), float(traces.std(ddof=1) / probes**0.5), float(nodes.max())

    sides: dict[str, Callable[[], None]] = {"kronfac": ours}
    if next(peer for peer in PEERS if peer.name == "PyHessian").present():
        sides["PyHessian"] = theirs
    else:
        say("PyHessian: not measured: not installed")
    timings = by_turns(sides, rounds=rounds, clock=clock)
    result = {}
    for name, timing in timings.items():
        against = ratio(timing, timings["kronfac"])
        trace, stderr, largest = moments[name]
        result[name] = {
            "seconds": timing.median,
            "samples": timing.samples,
            "products": probes * steps,
            "trace": trace,
            "trace_stderr": stderr,
            "largest": largest,
            "ratio": against.value,
            "quartiles": (against.low, against.high),
        }
        say(
            f"density {steps} steps, {probes} probes {name:10} {timing.median:7.2f} s  {probes * steps:5d} products  "
            f"trace {trace:.4g} ± {stderr:.2g}  largest {largest:.5g}  {against.value:.2f}x "
            f"({against.low:.2f}-{against.high:.2f})"
        )
    return result
