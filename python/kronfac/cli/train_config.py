"""What a training run is made of, from the command line or from the checkpoint that it continues."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kronfac.cli.errors import UsageError
from kronfac.cli.optimizers import OPTIMIZERS
from kronfac.cli.schedules import SCHEDULES, is_scheduled

_ALWAYS = {"problem": "digits", "optimizer": "kfac", "schedule": "fixed", "epochs": 20, "batch_size": 128, "seed": 0}
_NEW = ("schedule", "epochs")  # not in the checkpoints of earlier versions
_EXTENDED = "epochs"  # may differ from the checkpoint's: a run can be taken further
_SAMPLES = ("gradient_sample", "hessian_sample", "ratio_sample")
_TABLES: dict[str, Mapping[str, Any]] = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES}


def new_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a new run.

    Args:
        given: what the user typed, by the name of the parameter.

    Raises:
        UsageError: unknown, contradictory or out of range.
    """
    given = _read(given)
    config = {name: given.get(name, default) for name, default in _ALWAYS.items()}
    config |= {name: given.get(name, default) for name, default in _options(config).items()}
    _check(config, given)
    if ":" in config["problem"] and "batch_size" in given and not is_scheduled(config):
        raise UsageError(f"--batch-size applies to the built-in datasets; {config['problem']} brings its own loaders")
    return config


def saved_config(saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint's configuration; what the user typed must agree with it.

    Raises:
        UsageError: it does not, or the configuration is damaged.
    """
    given = _read(given)
    missing = [name for name in _ALWAYS if name not in saved and name not in _NEW]
    if missing:
        raise UsageError(f"--resume: damaged checkpoint, its configuration lacks {', '.join(missing)}")
    # A checkpoint of an earlier version knows nothing of later options, which were at their defaults then.
    config = {name: saved.get(name, default) for name, default in _ALWAYS.items()}
    config |= {name: saved.get(name, default) for name, default in _options(config).items()}
    config[_EXTENDED] = given.get(_EXTENDED, config[_EXTENDED])
    for name, value in given.items():
        if name in config and value != config[name]:
            label = "PROBLEM" if name == "problem" else flag(name)
            raise UsageError(f"--resume: {label} {value} differs from the checkpoint's {config[name]}")
    _check(config, given)
    return config


def flag(name: str) -> str:
    """The name of an option on the command line."""
    return "--" + name.replace("_", "-")


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that apply, with their defaults."""
    found: dict[str, Any] = {}
    for kind, table in _TABLES.items():
        if config[kind] not in table:
            raise UsageError(f"--{kind} {config[kind]}: expected {', '.join(table)}")
        found |= table[config[kind]].options
    return found


def _read(given: Mapping[str, Any]) -> dict[str, Any]:
    """What is typed as text and means something else."""
    readers = {"decay_epochs": _epochs, **dict.fromkeys(_SAMPLES, _sample)}
    return {name: readers[name](name, value) if name in readers else value for name, value in given.items()}


def _epochs(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        raise UsageError(f"{flag(name)} {text}: expected whole numbers with commas between, such as 10,15") from None


def _sample(name: str, text: str) -> int | float | str | None:
    if text == "all":
        return None
    if name == "ratio_sample" and text == "gradient":
        return text
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        more = " or gradient" if name == "ratio_sample" else ""
        raise UsageError(
            f"{flag(name)} {text}: expected a number of examples, a share such as 0.05, or all{more}"
        ) from None


def _check(config: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    options = _options(config)
    for name in given:
        for kind, table in _TABLES.items():
            takers = [key for key, entry in table.items() if name in entry.options]
            if takers and name not in options:
                among = takers[0] if len(takers) == 1 else ", ".join(takers[:-1]) + f" or {takers[-1]}"
                raise UsageError(f"{flag(name)} applies to --{kind} {among} only, not to {config[kind]}")
    if OPTIMIZERS[config["optimizer"]].closure:
        _check_closure(config, given)
    if "decay" in given and not config["decay_epochs"]:
        raise UsageError("--decay is applied at the --decay-epochs; give them, too")
    if "adversarial_share" in given and config["adversarial"] is None:
        raise UsageError("--adversarial-share is that of --adversarial EPS; give it, too")
    # The optimizers and schedules check their options too; torch's own optimizers let NaN and infinity pass.
    for name, value in config.items():
        if isinstance(value, float) and not 0 <= value < float("inf"):
            raise UsageError(f"{flag(name)}: expected a finite number, at least 0, got {value}")


def _check_closure(config: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    optimizer = config["optimizer"]
    if "batch_size" in given:
        raise UsageError(f"--batch-size does not apply to --optimizer {optimizer}, which takes --gradient-sample")
    if is_scheduled(config):
        raise UsageError(
            f"--schedule sets batches and learning rates, and --optimizer {optimizer} has neither; leave "
            f"{'--schedule' if config['schedule'] != 'fixed' else '--decay-epochs and --small-batch'} out"
        )
    if "likelihood" in given and config["curvature"] != "fisher":
        raise UsageError(f"--likelihood applies with --curvature fisher only, not with {config['curvature']}")
