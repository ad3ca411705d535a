"""The options of `kronfac train`; defaults and applicability are those of the table of optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from kronfac.cli.optimizers import OPTIMIZERS
from kronfac.cli.options import Fisher, LikelihoodName, Solve

CHECKPOINT = "checkpoint.pt"
HISTORY = "history.json"


def _names() -> str:
    return "; ".join(f"{name}: {entry.summary}" for name, entry in OPTIMIZERS.items())


def _option(name: str, text: str, **more: Any) -> Any:
    """An option of some optimizers; its help says of which, and their defaults."""
    takers: dict[str, list[str]] = {}
    for optimizer, entry in OPTIMIZERS.items():
        if name in entry.options:
            default = entry.options[name]
            takers.setdefault(f"{default:g}" if isinstance(default, float) else str(default), []).append(optimizer)
    defaults = "; ".join(f"{', '.join(optimizers)}: {default}" for default, optimizers in takers.items())
    return typer.Option(help=f"{text} ({defaults}).", show_default=False, rich_help_panel="Optimizer", **more)


OptimizerName: TypeAlias = Annotated[
    str, typer.Option(metavar="NAME", help=f"{_names()}.", rich_help_panel="Optimizer")
]
LearningRate: TypeAlias = Annotated[float | None, _option("lr", "Learning rate")]
Momentum: TypeAlias = Annotated[float | None, _option("momentum", "Momentum")]
WeightDecay: TypeAlias = Annotated[float | None, _option("weight_decay", "L2 coefficient")]
Alpha: TypeAlias = Annotated[float | None, _option("alpha", "Decay of the mean square")]
Beta1: TypeAlias = Annotated[float | None, _option("beta1", "Decay of the mean gradient")]
Beta2: TypeAlias = Annotated[float | None, _option("beta2", "Decay of the mean square")]
Eps: TypeAlias = Annotated[float | None, _option("eps", "Added to the root of the mean square")]
MomentumDecay: TypeAlias = Annotated[float | None, _option("momentum_decay", "Decay of the momentum's schedule")]
Damping: TypeAlias = Annotated[float | None, _option("damping", "Damping")]
KLClip: TypeAlias = Annotated[float | None, _option("kl_clip", "Bound on the KL divergence of a step; 0 for none")]
FisherKind: TypeAlias = Annotated[Fisher | None, _option("fisher", "Which output gradients")]
Likelihood: TypeAlias = Annotated[LikelihoodName | None, _option("likelihood", "What the loss is the negative log of")]
SolveKind: TypeAlias = Annotated[Solve | None, _option("solve", "Damped inverses or eigenbases")]
FactorEvery: TypeAlias = Annotated[int | None, _option("factor_every", "Steps between statistics", min=1)]
InverseEvery: TypeAlias = Annotated[int | None, _option("inverse_every", "Steps between inversions", min=1)]

Epochs: TypeAlias = Annotated[
    int | None, typer.Option(min=1, help="Epochs in all, also with --resume (20).", show_default=False)
]
BatchSize: TypeAlias = Annotated[
    int | None, typer.Option(min=1, help="Examples per batch (built-in datasets: 128).", show_default=False)
]
Seed: TypeAlias = Annotated[
    int | None,
    typer.Option(
        min=0, help="Of the initialisation, the batch order and the optimizer's own draws (0).", show_default=False
    ),
]
Out: TypeAlias = Annotated[
    Path | None, typer.Option(help=f"Directory for {CHECKPOINT} (every epoch, atomically) and {HISTORY}.")
]
Resume: TypeAlias = Annotated[
    bool, typer.Option("--resume", help="Continue OUT's checkpoint exactly; options not given are taken from it.")
]
Force: TypeAlias = Annotated[bool, typer.Option("--force", help="Start anew although OUT holds a checkpoint.")]
