"""Checkpoints of a training run: the parameters in a file, and at which step they were saved."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kronfac._archives import DamagedError, load_archive

# Where checkpoints keep the state dict, and how far training was: those of `kronfac train`, Lightning and most scripts.
_STATES = ("model", "state_dict", "model_state_dict")
_STEPS = ("global_step", "step", "epoch")
# What wrappers put in front of every name.
_PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True, eq=False)
class Source:
    """Where the parameters of one checkpoint are.

    Attributes:
        name: for messages and tables.
        origin: a path or a mapping.
        step: as the user gave it, or None.
    """

    name: str
    origin: Any
    step: float | None


@dataclass(frozen=True, eq=False)
class Saved:
    """A checkpoint that was read.

    Attributes:
        state: parameters and buffers by name.
        step: how far training was, or None where nothing says so.
        unit: what the step counts.
    """

    state: dict[str, Tensor]
    step: float | None
    unit: str


def list_sources(checkpoints: Any, caller: str) -> list[Source]:
    """Tell files from state dicts, and check that the files exist.

    Raises:
        TypeError: something else.
        ValueError: no checkpoint, or a state dict in place of a list of them.
        FileNotFoundError: a file is missing.
    """
    entries: list[tuple[float | None, Any]]
    if isinstance(checkpoints, Mapping):
        if any(isinstance(value, Tensor) for value in checkpoints.values()):
            raise ValueError(f"{caller}: checkpoints: expected a list of state dicts, got one; wrap it in a list")
        for key in checkpoints:
            if isinstance(key, bool) or not isinstance(key, int | float):
                raise TypeError(
                    f"{caller}: checkpoints: expected steps as keys {{step: checkpoint}}, got the key {key!r}"
                )
        entries = [(float(step), origin) for step, origin in checkpoints.items()]
    elif isinstance(checkpoints, Sequence) and not isinstance(checkpoints, str | bytes):
        entries = [(None, origin) for origin in checkpoints]
    else:
        raise TypeError(
            f"{caller}: checkpoints: expected a list of files or state dicts, or a dict of them by step, "
            f"got {type(checkpoints).__name__}"
        )
    if not entries:
        raise ValueError(f"{caller}: checkpoints: expected at least one, got none")
    sources = []
    for position, (step, origin) in enumerate(entries):
        if isinstance(origin, str | os.PathLike):
            if not Path(origin).is_file():
                raise FileNotFoundError(f"{caller}: checkpoints: {origin}: no such file")
            sources.append(Source(str(origin), Path(origin), step))
        elif isinstance(origin, Mapping):
            sources.append(Source(f"checkpoint {position}", origin, step))
        else:
            raise TypeError(
                f"{caller}: checkpoints: number {position}: expected a path or a state dict, "
                f"got {type(origin).__name__}"
            )
    return sources


def read_source(source: Source, caller: str) -> Saved:
    """Read a checkpoint; nothing in a file is executed.

    Raises:
        ValueError: damaged, or without parameters where they are looked for.
        OSError: the file cannot be read.
    """
    content = _load(source.origin, caller) if isinstance(source.origin, Path) else source.origin
    state, step, unit = content, source.step, "step"
    if isinstance(content, Mapping) and not _is_state(content):
        state = next((content[key] for key in _STATES if _is_state(content.get(key))), None)
        found = next((key for key in _STEPS if _is_number(content.get(key))), None)
        if step is None and found is not None:
            step, unit = float(content[found]), "epoch" if found == "epoch" else "step"
    if not _is_state(state):
        raise ValueError(
            f"{caller}: checkpoints: {source.name}: expected a state dict, alone or as one of "
            f"{', '.join(map(repr, _STATES))} in a dict; load the file and pass the state dict itself"
        )
    return Saved(dict(state), step, unit)


def load_into(model: nn.Module, saved: Saved, source: Source, caller: str) -> None:
    """Put the parameters and buffers of a checkpoint into a model, all of them.

    Raises:
        ValueError: names or shapes differ from the model's.
    """
    own, state = model.state_dict(), saved.state
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state) and not all(name.startswith(prefix) for name in own):
            state = {name[len(prefix) :]: value for name, value in state.items()}
    for name in [*own, *(name for name in state if name not in own)]:
        if name not in state or name not in own:
            where = "checkpoint" if name in state else "model"
            raise ValueError(
                f"{caller}: checkpoints: {source.name}: does not fit the model, {name!r} is only in the {where}"
            )
        if isinstance(own[name], Tensor) and state[name].shape != own[name].shape:
            raise ValueError(
                f"{caller}: checkpoints: {source.name}: does not fit the model, {name!r} has the shape "
                f"{tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
            )
    model.load_state_dict(state)


def first_line(error: Exception) -> str:
    """What went wrong, in one line."""
    return str(error).split("\n", maxsplit=1)[0] or type(error).__name__


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(one, Tensor) for one in value.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _load(path: Path, caller: str) -> Any:
    where = f"{caller}: checkpoints: {path}"
    try:
        return load_archive(path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{where}: no checkpoint, or one that holds more than tensors and plain values, which is not executed "
            "here; load it yourself and pass the state dict"
        ) from error
    except DamagedError as error:
        raise ValueError(f"{where}: damaged ({first_line(error)})") from error
