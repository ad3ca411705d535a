"""The problem: MNIST, the network, its initialisation, the loss, and the error that is reported."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.autoencoder.settings import WIDTHS
from kronfac import datasets

CONNECTIONS = 15
"""Incoming weights of a unit that do not start at 0 (Martens 2010, section 5)."""

L2 = 1e-5
"""η of the regulariser η/2 ‖θ‖² (Martens & Grosse, section 13)."""

_PART = 2000


def load_images(data_dir: Path) -> Tensor:
    """The training images as (N, 784) float32 in [0, 1]."""
    data = datasets.load("mnist", data_dir)
    pixels = data.train.inputs.flatten(1) * data.std[0] + data.mean[0]
    return pixels.round_().div_(255)  # the reader standardises; the raw values are whole numbers


def make_network(seed: int, widths: Sequence[int] = WIDTHS) -> nn.Sequential:
    """Sigmoid units but for the code and the output, whose logits are returned; sparse initialisation.

    Args:
        seed: of the initial weights.
        widths: units per layer, symmetric about the code.

    Returns:
        (N, widths[0]) -> logits (N, widths[-1]). The first `CONNECTIONS` inputs of a random order have weights from
        N(0, 1), the others and the biases are 0.
    """
    generator = torch.Generator().manual_seed(seed)
    code, last = len(widths) // 2 - 1, len(widths) - 2
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
        connected = min(CONNECTIONS, inputs)
        with torch.no_grad():
            layer.bias.zero_()
            layer.weight.zero_()
            chosen = torch.stack([torch.randperm(inputs, generator=generator)[:connected] for _ in range(outputs)])
            layer.weight.scatter_(1, chosen, torch.randn(outputs, connected, generator=generator))
        layers.append(layer)
        if index not in (code, last):
            layers.append(nn.Sigmoid())
    return nn.Sequential(*layers)


def loss_of(logits: Tensor, images: Tensor) -> Tensor:
    """Bernoulli cross-entropy in nats, summed over the pixels and averaged over the images."""
    return F.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)


@torch.no_grad()
def error_of(network: nn.Module, images: Tensor) -> float:
    """Squared reconstruction error per image: summed over the pixels, averaged over the images."""
    total = 0.0
    for part in torch.split(images, _PART):
        total += float((network(part).sigmoid_() - part).square_().sum(dtype=torch.float64))
    return total / len(images)


class Order:
    """Which images make the batch of a step: a function of seed and step alone, so that a run can continue anywhere.

    Every epoch is a new permutation; what is left of it after the last whole batch is left out.
    """

    def __init__(self, images: int, batch: int, seed: int) -> None:
        self._images, self._batch, self._seed = images, batch, seed
        self._steps = images // batch
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def at(self, step: int) -> Tensor:
        """Indices of the images of a step (0-based)."""
        epoch, place = divmod(step, self._steps)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * (1 << 31) + epoch)
            self._epoch, self._permutation = epoch, torch.randperm(self._images, generator=generator)
        return self._permutation[place * self._batch : (place + 1) * self._batch]
