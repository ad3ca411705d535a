"""What KFAC is made with: the constructor's arguments, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.curvature import Likelihood, resolve_likelihood
from kronfac.optim import adaptive as control
from kronfac.optim import options
from kronfac.optim.refusals import refuse_model
from kronfac.optim.structures import STRUCTURES, Structures, structure_for


@dataclass(frozen=True)
class Settings:
    """Arguments that passed every check which needs no param groups.

    Attributes:
        structure: how factors are inverted and applied.
        likelihood: of the model's output.
        fisher: whose targets the statistics are taken with.
        recording: further arguments of `Recorder`.
        factor_decay: long-run decay of the running averages.
        averaging: weight of the iterates' average, None for none.
        max_staleness: steps between asking for inverses and their use; 0 without a background thread.
        adaptive: whether lr, momentum and damping are chosen at every step.
        grad_scaler: as given.
        seed: of the sampler, before a rank is added.
        trained: parameters or dicts of groups, not empty.
        defaults: of the param groups, unchecked: callables and what a group may override are among them.
    """

    structure: Structures
    likelihood: Likelihood
    fisher: str
    recording: Mapping[str, Any]
    factor_decay: float
    averaging: float | None
    max_staleness: int
    adaptive: bool
    grad_scaler: torch.amp.GradScaler | None
    seed: int
    trained: list[Any]
    defaults: dict[str, Any]


def check_arguments(model: object, params: Any, arguments: Mapping[str, Any]) -> Settings:
    """Check the arguments of `kronfac.KFAC`.

    Args:
        model: the first of them.
        params: as given.
        arguments: all others, by name.

    Raises:
        TypeError, ValueError: see KFAC.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"KFAC: model: expected a torch.nn.Module, got {type(model).__name__}; pass the model itself")
    refuse_model(model)
    structure, max_staleness = _check_structure(arguments)
    for name in ("output", "mask"):
        if arguments[name] is not None and not callable(arguments[name]):
            raise TypeError(f"KFAC: {name}: expected a callable or None, got {arguments[name]!r}")
    grad_scaler, seed, averaging = (arguments[name] for name in ("grad_scaler", "seed", "averaging"))
    if grad_scaler is not None and not isinstance(grad_scaler, torch.amp.GradScaler):
        raise TypeError(f"KFAC: grad_scaler: expected a torch.amp.GradScaler or None, got {grad_scaler!r}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"KFAC: seed: expected an integer or None, got {seed!r}")
    adaptive = options.flag("KFAC: adaptive", arguments["adaptive"])
    factor_decay = options.number("KFAC: factor_decay", arguments["factor_decay"], high=1.0, open_high=False)
    fisher = options.choice("KFAC: fisher", arguments["fisher"], ("mc", "exact", "empirical"))
    likelihood = resolve_likelihood(arguments["likelihood"])
    recording = {
        "likelihood": likelihood,
        "output": arguments["output"],
        "mask": arguments["mask"],
        "fisher": fisher,
        "fisher_samples": options.integer("KFAC: fisher_samples", arguments["fisher_samples"]),
        "reduction": options.choice("KFAC: reduction", arguments["reduction"], ("mean", "sum")),
        "sharing": None,  # each layer follows its group's
    }
    return Settings(
        structure=structure,
        likelihood=likelihood,
        fisher=fisher,
        recording=recording,
        factor_decay=factor_decay,
        averaging=None if averaging is None else options.number("KFAC: averaging", averaging, high=1.0),
        max_staleness=max_staleness,
        adaptive=adaptive,
        grad_scaler=grad_scaler,
        seed=torch.initial_seed() if seed is None else seed,
        trained=_trained(model, params),
        defaults=_defaults(arguments, adaptive),
    )


def _check_structure(arguments: Mapping[str, Any]) -> tuple[Structures, int]:
    """The structure and max_staleness, which do not all go together."""
    structure = options.choice("KFAC: structure", arguments["structure"], STRUCTURES)
    solve = options.choice("KFAC: solve", arguments["solve"], ("inverse", "eigen"))
    max_staleness = options.integer("KFAC: max_staleness", arguments["max_staleness"], low=0)
    if arguments["adaptive"] and max_staleness:
        raise ValueError(
            "KFAC: max_staleness: expected 0 with adaptive=True, which compares the inverses of several dampings "
            f"at the step that they are made for, got {max_staleness}"
        )
    if (structure, solve) == ("tridiagonal", "eigen"):
        raise ValueError(
            "KFAC: solve: expected 'inverse' with structure='tridiagonal', got 'eigen'; a chain of layers has no "
            "eigenbasis of Kronecker products in which damping would be exact"
        )
    if structure == "tridiagonal" and max_staleness:
        raise ValueError(
            "KFAC: max_staleness: expected 0 with structure='tridiagonal', whose layers are coupled at the step "
            f"that their inverses are made for, got {max_staleness}"
        )
    return structure_for(structure, solve), max_staleness


def _trained(model: nn.Module, params: Any) -> list[Any]:
    if isinstance(params, (Tensor, set, frozenset)):
        raise TypeError(f"KFAC: params: expected an ordered collection, got {type(params).__name__}; pass a list")
    chosen: list[Any] = list(model.parameters() if params is None else params)
    if not chosen:
        what = "model: it has no parameters" if params is None else "params: no parameters given"
        raise ValueError(f"KFAC: {what}; expected at least one")
    return chosen


def _defaults(arguments: Mapping[str, Any], adaptive: bool) -> dict[str, Any]:
    """What the param groups do not set themselves."""
    defaults = {name: arguments[name] for name in options.GROUP_OPTIONS}
    if adaptive:
        control.check_options("KFAC", defaults)
        control.check_method(arguments["grad_scaler"], arguments["reduction"])
        return {**defaults, "lr": 1.0}  # of the step δ as a whole, whose learning rate is α
    if defaults["lr"] is None:
        raise TypeError("KFAC: lr: expected a number or a callable of the step; adaptive=True does without")
    return defaults
