"""What a training run is made of, from the command line or from the checkpoint that it continues."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kronfac.cli.errors import UsageError
from kronfac.cli.optimizers import OPTIMIZERS

_ALWAYS = {"problem": "digits", "optimizer": "kfac", "epochs": 20, "batch_size": 128, "seed": 0}
_EXTENDED = "epochs"  # may differ from the checkpoint's: a run can be taken further


def options_of(optimizer: str) -> dict[str, Any]:
    """The options that apply, with their defaults.

    Raises:
        UsageError: unknown optimizer.
    """
    if optimizer not in OPTIMIZERS:
        raise UsageError(f"--optimizer {optimizer}: expected {', '.join(OPTIMIZERS)}")
    return dict(OPTIMIZERS[optimizer].options)


def new_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a new run.

    Args:
        given: what the user typed, by the name of the parameter.

    Raises:
        UsageError: unknown, contradictory or out of range.
    """
    config = {name: given.get(name, default) for name, default in _ALWAYS.items()}
    options = options_of(config["optimizer"])
    _check_applicable(given, options, config["optimizer"])
    config |= {name: given.get(name, default) for name, default in options.items()}
    _check_values(config)
    if ":" in config["problem"] and "batch_size" in given:
        raise UsageError(f"--batch-size applies to the built-in datasets; {config['problem']} brings its own loaders")
    return config


def saved_config(saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint's configuration; what the user typed must agree with it.

    Raises:
        UsageError: it does not, or the configuration is damaged.
    """
    missing = [name for name in _ALWAYS if name not in saved and name != _EXTENDED]
    if missing:
        raise UsageError(f"--resume: damaged checkpoint, its configuration lacks {', '.join(missing)}")
    # A checkpoint of an earlier version knows nothing of later options, which were at their defaults then.
    config = {name: saved.get(name, default) for name, default in _ALWAYS.items()}
    config |= {name: saved.get(name, default) for name, default in options_of(config["optimizer"]).items()}
    config[_EXTENDED] = given.get(_EXTENDED, config[_EXTENDED])
    for name, value in given.items():
        if name in config and value != config[name]:
            label = "PROBLEM" if name == "problem" else flag(name)
            raise UsageError(f"--resume: {label} {value} differs from the checkpoint's {config[name]}")
    _check_applicable(given, options_of(config["optimizer"]), config["optimizer"])
    _check_values(config)
    return config


def flag(name: str) -> str:
    """The name of an option on the command line."""
    return "--" + name.replace("_", "-")


def _check_applicable(given: Mapping[str, Any], options: Mapping[str, Any], optimizer: str) -> None:
    for name in given:
        takers = [key for key, entry in OPTIMIZERS.items() if name in entry.options]
        if takers and name not in options:
            among = takers[0] if len(takers) == 1 else ", ".join(takers[:-1]) + f" or {takers[-1]}"
            raise UsageError(f"{flag(name)} applies to --optimizer {among} only, not to {optimizer}")


def _check_values(config: Mapping[str, Any]) -> None:
    # The optimizers check their options too; torch's own let NaN and infinity pass.
    for name, value in config.items():
        if isinstance(value, float) and not 0 <= value < float("inf"):
            raise UsageError(f"{flag(name)}: expected a finite number, at least 0, got {value}")
