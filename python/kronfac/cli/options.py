"""Options that several commands take, declared once."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, TypeAlias

import typer


class Fisher(str, Enum):
    """How K-FAC's output gradients are taken."""

    MC = "mc"
    EXACT = "exact"
    EMPIRICAL = "empirical"


class LikelihoodName(str, Enum):
    """Likelihoods that need no further argument."""

    CATEGORICAL = "categorical"
    GAUSSIAN = "gaussian"
    BERNOULLI = "bernoulli"


class Solve(str, Enum):
    """How the damped factors are inverted."""

    INVERSE = "inverse"
    EIGEN = "eigen"


class Rule(str, Enum):
    """Rules for the radius of a trust region."""

    XU = "xu"
    CLASSICAL = "classical"


class Blocks(str, Enum):
    """Of which parts of the Hessian the top eigenvalue is taken."""

    NONE = "none"
    LAYERS = "layers"


class OperatorName(str, Enum):
    """Curvature matrices that `kronfac spectrum` looks at."""

    HESSIAN = "hessian"
    GGN = "ggn"
    FISHER = "fisher"


class TraceMethod(str, Enum):
    """Estimators of the trace."""

    HUTCHINSON = "hutchinson"
    HUTCH_PP = "hutch++"
    XTRACE = "xtrace"
    NONE = "none"


class Which(str, Enum):
    """Which eigenvalues."""

    MAGNITUDE = "magnitude"
    LARGEST = "largest"
    BOTH = "both"


class DensityAxis(str, Enum):
    """Axes of the spectral density."""

    LINEAR = "linear"
    LOG = "log"
    NONE = "none"


class Landscape(str, Enum):
    """Along how many eigenvectors to look at the loss."""

    NONE = "none"
    LINE = "1d"
    PLANE = "2d"


ProblemArgument: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="PROBLEM",
        help="digits, mnist, cifar10, or your own module:function returning (model, loss_fn, loaders), "
        "loaders being a training loader or (training, test), or a kronfac.cli.UserProblem.",
    ),
]
DataDir: TypeAlias = Annotated[
    Path | None, typer.Option("--data-dir", help="Directory of the original MNIST or CIFAR-10 files.")
]
Device: TypeAlias = Annotated[str, typer.Option("--device", help="torch device, such as cpu or cuda:0.")]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Quiet: TypeAlias = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


def was_given(context: typer.Context, name: str) -> bool:
    """Whether a parameter was typed by the user, as opposed to taken from its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
