"""Cases of `kron_precondition`, `eigen_precondition` and `second_moment_`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kronfac import ops
from kronfac.cli.bench.case import OURS, Case, Contest, relative_error, worst
from kronfac.cli.bench.networks import layer_shapes

DAMPING = 1e-3
JUDGED = 12  # layers compared with float64: the largest

# name, examples, positions, outputs, inputs
MOMENTS = (
    ("resnet20 16x144", 128, 1024, 16, 144),
    ("resnet20 64x576", 128, 64, 64, 576),
    ("autoencoder 1000x784", 500, 1, 1000, 784),
    ("transformer 256x1024", 32, 64, 256, 1024),
    ("small 32x64", 64, 4, 32, 64),
)


def cases() -> Iterator[Case]:
    """All cases of this module."""
    layers = {name: layer_shapes(name) for name in ("resnet20", "resnet50", "autoencoder", "mlp", "transformer")}
    layers["8 of 32x64"] = [(32, 64)] * 8
    for name, shapes in layers.items():
        work = float(sum(2 * o * i * (o + i) for o, i in shapes))
        small = name == "8 of 32x64"
        yield Case("kron_precondition", name, partial(_kron, shapes), work, quick=small)
        yield Case("eigen_precondition", name, partial(_eigen, shapes), 2 * work, quick=small)
    for name, examples, positions, outputs, inputs in MOMENTS:
        yield Case(
            op="second_moment_",
            name=name,
            prepare=partial(_moment, examples, positions, outputs, inputs),
            work=2.0 * examples * positions * outputs * inputs,
            quick=name.startswith("small"),
        )


def _symmetric(n: int) -> Tensor:
    x: Tensor = torch.randn(n, n) / n**0.5
    return x + x.T


def _largest(shapes: list[tuple[int, int]]) -> list[int]:
    return sorted(range(len(shapes)), key=lambda i: -shapes[i][0] * shapes[i][1])[:JUDGED]


def _kron(shapes: list[tuple[int, int]]) -> Contest:
    grads = [torch.randn(shape) for shape in shapes]
    left = [_symmetric(o) for o, _ in shapes]
    right = [_symmetric(i) for _, i in shapes]
    truths = {i: left[i].double() @ grads[i].double() @ right[i].double() for i in _largest(shapes)}
    return Contest(
        {
            OURS: lambda: ops.kron_precondition(grads, left, right)[0],
            "torch": lambda: [a @ g @ b for a, g, b in zip(left, grads, right, strict=True)],
        },
        partial(_list_error, truths),
    )


def _eigen(shapes: list[tuple[int, int]]) -> Contest:
    grads = [torch.randn(shape) for shape in shapes]
    # Any matrices will do for the time; well-conditioned ones make the comparison with float64 sharp.
    left = [_symmetric(o) for o, _ in shapes]
    right = [_symmetric(i) for _, i in shapes]
    values = [torch.rand(shape) for shape in shapes]
    damping = torch.tensor(DAMPING)

    def apply(g: Tensor, a: Tensor, b: Tensor, e: Tensor) -> Tensor:
        return a @ ((a.mT @ g @ b) / (e + DAMPING)) @ b.mT

    truths = {
        i: apply(grads[i].double(), left[i].double(), right[i].double(), values[i].double()) for i in _largest(shapes)
    }
    return Contest(
        {
            OURS: lambda: ops.eigen_precondition(grads, left, right, values, damping)[0],
            "torch": lambda: [apply(*layer) for layer in zip(grads, left, right, values, strict=True)],
        },
        partial(_list_error, truths),
    )


def _moment(examples: int, positions: int, outputs: int, inputs: int) -> Contest:
    g = torch.randn(examples, positions, outputs)
    x = torch.randn(examples, positions, inputs)
    out = torch.zeros(outputs, inputs)

    def ours() -> Tensor:
        ops.second_moment_(out, g, x)
        return out

    def rival() -> Tensor:
        if positions == 1:  # what a user who knows the identity writes
            return g[:, 0].square().T @ x[:, 0].square()
        return torch.bmm(g.mT, x).square_().sum(dim=0)

    truth = torch.zeros(outputs, inputs, dtype=torch.float64)
    for part_g, part_x in zip(torch.split(g, 16), torch.split(x, 16), strict=True):
        truth += torch.bmm(part_g.double().mT, part_x.double()).square().sum(dim=0)
    return Contest({OURS: ours, "torch": rival}, lambda result: relative_error(result, truth))


def _list_error(truths: dict[int, Tensor], result: Any) -> float:
    return worst([relative_error(result[i], truth) for i, truth in truths.items()])
