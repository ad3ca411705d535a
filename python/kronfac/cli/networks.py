"""The small convolutional networks that the commands train on the built-in datasets."""

from __future__ import annotations

from torch import nn


def network_for(dataset: str) -> nn.Sequential:
    """A freshly initialised network (torch's default initialisation, from the global random stream).

    Plain convolutions and linear layers without normalisation and dropout: the Hessian is that of one fixed function.

    Args:
        dataset: "digits" (1×8×8, 6,930 parameters), "mnist" (1×28×28, 21,310) or "cifar10" (3×32×32, 75,818).
    """
    return {"digits": _digits, "mnist": _mnist, "cifar10": _cifar10}[dataset]()


def _digits() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(24 * 2 * 2, 10),
    )


def _mnist() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 20),
        nn.ReLU(),
        nn.Linear(20, 10),
    )


def _cifar10() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )
