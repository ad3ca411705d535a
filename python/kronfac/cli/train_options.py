"""The options of `kronfac train`; defaults and applicability are those of the tables of optimizers and schedules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from kronfac.cli.optimizers import OPTIMIZERS
from kronfac.cli.options import Blocks, Fisher, LikelihoodName, OperatorName, Rule, Solve
from kronfac.cli.schedules import SCHEDULES

CHECKPOINT = "checkpoint.pt"
HISTORY = "history.json"


def _names(table: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}: {entry.summary}" for name, entry in table.items())


def _option(name: str, text: str, none: str = "none", **more: Any) -> Any:
    """An option of some optimizers or schedules; its help says of which, and their defaults.

    Args:
        name: in the tables.
        text: what it is.
        none: what the default None means.
        more: for typer.
    """
    panel = "Optimizer" if any(name in entry.options for entry in OPTIMIZERS.values()) else "Schedule"
    table: Mapping[str, Any] = OPTIMIZERS if panel == "Optimizer" else SCHEDULES
    takers: dict[str, list[str]] = {}
    for taker, entry in table.items():
        if name in entry.options:
            default = entry.options[name]
            label = f"{default:g}" if isinstance(default, float) else none if default in (None, []) else str(default)
            takers.setdefault(label, []).append(taker)
    everybody = sum(map(len, takers.values())) == len(table) and len(takers) == 1
    defaults = "; ".join(f"{'' if everybody else ', '.join(by) + ': '}{label}" for label, by in takers.items())
    return typer.Option(help=f"{text} ({defaults}).", show_default=False, rich_help_panel=panel, **more)


OptimizerName: TypeAlias = Annotated[
    str, typer.Option(metavar="NAME", help=f"{_names(OPTIMIZERS)}.", rich_help_panel="Optimizer")
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

StepsPerEpoch: TypeAlias = Annotated[int | None, _option("steps_per_epoch", "Steps that count as an epoch", min=1)]
Curvature: TypeAlias = Annotated[OperatorName | None, _option("curvature", "Of which the products are")]
GradientSample: TypeAlias = Annotated[
    str | None, _option("gradient_sample", "Examples of the gradient: a number or a share", "all", metavar="N|SHARE")
]
HessianSample: TypeAlias = Annotated[
    str | None, _option("hessian_sample", "Those of the curvature", "all", metavar="N|SHARE")
]
RatioSample: TypeAlias = Annotated[
    str | None,
    _option("ratio_sample", "Those that judge a step, or the gradient's", "all", metavar="N|SHARE|gradient"),
]
ChunkSize: TypeAlias = Annotated[int | None, _option("chunk_size", "Most examples at once", "all", min=1)]
Tolerance: TypeAlias = Annotated[
    float | None, _option("tolerance", "Relative residual that ends the inner solver", "the optimizer's own rule")
]
MaxIterations: TypeAlias = Annotated[int | None, _option("max_iterations", "Most inner iterations", min=1)]
Radius: TypeAlias = Annotated[float | None, _option("radius", "First radius")]
MaxRadius: TypeAlias = Annotated[float | None, _option("max_radius", "Largest radius")]
RadiusRule: TypeAlias = Annotated[Rule | None, _option("radius_rule", "How the radius moves")]
Sigma: TypeAlias = Annotated[float | None, _option("sigma", "First weight of the cubic term")]

ScheduleName: TypeAlias = Annotated[
    str, typer.Option(metavar="NAME", help=f"{_names(SCHEDULES)}.", rich_help_panel="Schedule")
]
DecayEpochs: TypeAlias = Annotated[
    str | None, _option("decay_epochs", "Epochs, counted from 0, before which to decay", metavar="E,E,...")
]
Decay: TypeAlias = Annotated[float | None, _option("decay", "Factor of the learning rate, or of rate over batch")]
SmallBatch: TypeAlias = Annotated[
    int | None, _option("small_batch", "Most examples at once; larger batches accumulate", "the first batch", min=1)
]
BaseBatch: TypeAlias = Annotated[int | None, _option("base_batch_size", "Batch size that --lr is meant for", min=1)]
Warmup: TypeAlias = Annotated[float | None, _option("warmup_epochs", "Epochs from --lr to the full rate")]
MaxBatch: TypeAlias = Annotated[
    int | None, _option("max_batch_size", "Largest batch", "16 times the first, at most all examples", min=1)
]
Growth: TypeAlias = Annotated[int | None, _option("growth", "Factor of batch and rate", min=2)]
Threshold: TypeAlias = Annotated[float | None, _option("threshold", "Fall of the eigenvalue at which to grow")]
Duration: TypeAlias = Annotated[int | None, _option("duration", "Epochs after which it grows anyway", min=1)]
Adversarial: TypeAlias = Annotated[
    float | None,
    _option("adversarial", "FGSM examples of this size, in units of the inputs, in every small batch", metavar="EPS"),
]
AdversarialShare: TypeAlias = Annotated[float | None, _option("adversarial_share", "Their share at first")]
EigenvalueExamples: TypeAlias = Annotated[
    int | None, _option("eigenvalue_examples", "Examples of the Hessian, the same ones always", min=1)
]
EigenvalueEvery: TypeAlias = Annotated[int | None, _option("eigenvalue_every", "Epochs between eigenvalues", min=1)]
EigenvalueBlocks: TypeAlias = Annotated[
    Blocks | None, _option("eigenvalue_blocks", "Of the whole Hessian, or the mean over the layers' blocks")
]
EigenvalueTolerance: TypeAlias = Annotated[
    float | None, _option("eigenvalue_tolerance", "Residual relative to the eigenvalue")
]
EigenvalueProducts: TypeAlias = Annotated[int | None, _option("eigenvalue_products", "Most products for it", min=2)]

Epochs: TypeAlias = Annotated[
    int | None, typer.Option(min=1, help="Epochs in all, also with --resume (20).", show_default=False)
]
BatchSize: TypeAlias = Annotated[
    int | None, typer.Option(min=1, help="Examples per batch, at first (128).", show_default=False)
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
SaveEvery: TypeAlias = Annotated[
    int | None,
    typer.Option(
        min=1, help="Also a checkpoint after every so many updates (not with the plain loader).", show_default=False
    ),
]
Resume: TypeAlias = Annotated[
    bool, typer.Option("--resume", help="Continue OUT's checkpoint exactly; options not given are taken from it.")
]
Force: TypeAlias = Annotated[bool, typer.Option("--force", help="Start anew although OUT holds a checkpoint.")]
