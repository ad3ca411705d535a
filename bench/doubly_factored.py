"""A layer whose input factor is too large: time and memory of the doubly factored block, and of the ordinary one.

python bench/doubly_factored.py [--inputs 9216] [--outputs 4096] [--batch 128] [--threads 1] [--ordinary]

Each run is one layer through KFAC's own code (statistics, inverses, direction), so that its peak of resident memory is
its own; --ordinary takes A ⊗ G instead. Ba, Grosse & Martens (2017) name 15 s for inverting this layer on a CPU.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from kronfac.curvature import GradientRows, adapter_for
from kronfac.curvature.forward import Call, OutputView
from kronfac.optim.structures import Averages, structure_for

_T = TypeVar("_T")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--inputs", type=int, default=9216)
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--solve", choices=("inverse", "eigen"), default="inverse")
    parser.add_argument("--ordinary", action="store_true", help="A ⊗ G, with a dense A")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    with torch.no_grad():
        layer = nn.Linear(options.inputs, options.outputs)
        x, g = torch.randn(options.batch, options.inputs).relu(), torch.randn(options.batch, options.outputs)
        layer.weight.grad, layer.bias.grad = g.mT @ x, g.sum(0)
        start = peak()
        adapter = adapter_for(layer)
        assert adapter is not None
        structure = structure_for("kfac" if options.ordinary else "doubly_factored", options.solve)
        if not options.ordinary:
            structure.prepare(adapter)
        call = Call(adapter, torch.Size((options.batch, options.outputs)))
        name = f"{options.inputs} x {options.outputs}, {adapter.block}, {adapter.input_shape}, {options.solve}"
        print(f"{name}: batch {options.batch}, {options.threads} thread(s), float32")
        A = timed("input statistics", lambda: call.input_statistics(None, x, None).div_(options.batch))
        G = timed("output statistics", lambda: adapter.output_statistics(None, g, None).div_(options.batch))
        own = structure.of(adapter)
        done = timed("inverses", lambda: own.factorise([Averages(A, G, {})], [1e-3]))
        (value,) = done.values
        assert value is not None
        V = adapter.gradient()
        out, dots = timed("direction", lambda: own.apply([V], [value], [1e-3]))
        print(f"  finite: {bool(out[0].isfinite().all())}, <P, V> = {float(dots[0]):.6g}, retried: {done.retried}")
        kept = sum(t.numel() * t.element_size() for t in (A, G, *value.values()))
        print(f"  kept: {kept / 2**20:.0f} MiB, of which input side {(kept - output_side(G)) / 2**20:.2f} MiB")
        more = (peak() - start) / 2**20
        print(f"  peak resident memory: {peak() / 2**20:.0f} MiB, {more:.0f} MiB above the layer's own")
        if own.by_rows:
            rows = GradientRows(adapter, x, OutputView(g.shape, None), 0)
            rows.g = g
            P, _ = timed("direction from the rows of the batch", lambda: own.apply_rows(rows, value))
            error = (P - out[0]).abs().max() / out[0].abs().max()
            print(f"  largest difference of the two directions: {float(error):.1e} of the largest entry")


def output_side(G: torch.Tensor) -> int:
    """Bytes of G and of its inverse."""
    return 2 * G.numel() * G.element_size()


def timed(label: str, function: Callable[[], _T]) -> _T:
    """Call once and print the seconds."""
    start = time.perf_counter()
    result = function()
    print(f"  {label}: {time.perf_counter() - start:.3f} s", flush=True)
    return result


def peak() -> int:
    """Peak of resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
