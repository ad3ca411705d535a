"""Checkpoints of `kronfac train`: one file with all that an exact continuation needs."""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kronfac._archives import DamagedError, load_archive
from kronfac.cli.errors import UsageError, one_line
from kronfac.cli.output import write_atomically

_FORMAT = "kronfac train"
_VERSION = 1
_FIELDS = {"config": dict, "epoch": int, "model": dict, "optimizer": dict, "history": dict, "random": dict}


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically: an interrupted run leaves the previous one."""
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, "version": _VERSION, **content}, buffer)
    write_atomically(path, buffer.getvalue())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of `kronfac train`; nothing in the file is executed.

    Raises:
        UsageError: missing, damaged, or not such a checkpoint.
    """
    content = _load(path)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise UsageError(f"{path}: not a checkpoint of `kronfac train`")
    if content.get("version") != _VERSION:
        raise UsageError(f"{path}: checkpoint version {content.get('version')} is not known here (expected {_VERSION})")
    for name, kind in _FIELDS.items():
        if not isinstance(content.get(name), kind):
            raise UsageError(f"{path}: damaged checkpoint, {name!r} is missing or not a {kind.__name__}")
    return content


def read_parameters(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The model's state dict in a file, and the run's configuration where `kronfac train` wrote the file.

    Accepts a checkpoint of `kronfac train` and a bare `torch.save(model.state_dict())`.

    Raises:
        UsageError: missing, damaged, or neither.
    """
    content = _load(path)
    if isinstance(content, dict) and content.get("format") == _FORMAT:
        content = read_checkpoint(path)
        return content["model"], content["config"]
    if isinstance(content, Mapping) and content and all(isinstance(v, torch.Tensor) for v in content.values()):
        return dict(content), None
    raise UsageError(f"{path}: neither a checkpoint of `kronfac train` nor a model's state dict")


def load_parameters(model: nn.Module, state: Mapping[str, Any], origin: Path) -> None:
    """Load a state dict, all of it or nothing.

    Raises:
        UsageError: names or shapes differ from the model's.
    """
    own = model.state_dict()
    for name in own.keys() | state.keys():
        if name not in state or name not in own:
            where = "file" if name in state else "model"
            raise UsageError(f"{origin}: does not fit the model, {name!r} is only in the {where}")
        if not isinstance(state[name], torch.Tensor) or state[name].shape != own[name].shape:
            got = tuple(getattr(state[name], "shape", ()))
            raise UsageError(f"{origin}: does not fit the model, {name!r} is {got}, expected {tuple(own[name].shape)}")
    model.load_state_dict(dict(state))


def random_state(*sources: Any) -> dict[str, Any]:
    """The global random streams (torch, CUDA, numpy, random) and the generators of the given loaders."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(words), gauss],
        "numpy": [[int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "loaders": [generator.get_state() for generator in _generators(sources)],
    }


def restore_random_state(state: Mapping[str, Any], *sources: Any) -> None:
    """Undo everything that was drawn since `random_state`.

    Raises:
        UsageError: the loaders are not those of the checkpoint.
    """
    generators = _generators(sources)
    if len(generators) != len(state["loaders"]):
        raise UsageError("--resume: the loaders have other random generators than those of the checkpoint")
    for generator, saved in zip(generators, state["loaders"], strict=True):
        generator.set_state(saved)
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))


def _generators(sources: tuple[Any, ...]) -> list[torch.Generator]:
    found: list[torch.Generator] = []
    for source in sources:
        for holder in (source, getattr(source, "sampler", None), getattr(source, "batch_sampler", None)):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator) and not any(generator is other for other in found):
                found.append(generator)
    return found


def _load(path: Path) -> Any:
    try:
        return load_archive(path)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or one_line(error)})") from None
    except pickle.UnpicklingError:
        raise UsageError(f"{path}: not a checkpoint, or one that holds more than tensors and plain values") from None
    except DamagedError as error:
        raise UsageError(f"{path}: damaged checkpoint ({one_line(error)[:120]})") from None
