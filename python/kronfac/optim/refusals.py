"""Models that KFAC cannot watch or whose parameters it cannot train, each with the reason and the remedy."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from kronfac.curvature.compiled import hides_hooks
from kronfac.optim.layers import Layer


def refuse_model(model: nn.Module) -> None:
    """Refuse models whose forward no hook can follow.

    Raises:
        ValueError: the model is scripted or traced, compiled in place, replicated or sharded.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"KFAC: model: expected a module with its layers' own forward, got a {type(model).__name__}, which runs as "
            "one program; make KFAC for the original module, and script or trace it after training"
        )
    if isinstance(model, DataParallel) and len(model.device_ids) > 1:
        raise ValueError(
            f"KFAC: model: DataParallel on devices {model.device_ids} runs copies of the model that are not watched; "
            "use DistributedDataParallel, or one device"
        )
    original = getattr(model, "_orig_mod", model)
    if original is not model and isinstance(original, DistributedDataParallel):
        raise ValueError(
            "KFAC: model: torch.compile(DistributedDataParallel(module)) would run DDP's own functions twice; compile "
            "first: DistributedDataParallel(torch.compile(module))"
        )
    for name, module in model.named_modules():
        if _is_fsdp(module):
            raise ValueError(
                f"KFAC: model: {name or 'the model'} is sharded by FullyShardedDataParallel; a layer's curvature needs "
                "its whole gradient. Use DistributedDataParallel"
            )
    refuse_compiled_in_place(model)


def refuse_compiled_in_place(model: nn.Module) -> None:
    """Refuse a root whose hooks run inside compiled code.

    Raises:
        ValueError: ``model.compile()`` was called on it.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    if hides_hooks(model) or hides_hooks(inner):
        raise ValueError(
            "KFAC: model: model.compile() compiles the model together with its hooks, so that nothing can be recorded; "
            "write compiled = torch.compile(model), train compiled, and make KFAC(compiled, ...)"
        )


def refuse_parameters(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse parameters without data, or of which only a part lies here.

    Raises:
        ValueError: a parameter on the meta device, or a DTensor.
    """
    for parameter in (p for group in groups for p in group["params"]):
        if parameter.device.type == "meta":
            raise ValueError(
                f"KFAC: params: {_name(model, parameter)} is on the meta device and has no data; call "
                "model.to_empty(device=...) and initialise it before making KFAC"
            )
        if _is_dtensor(parameter):
            raise ValueError(
                f"KFAC: params: {_name(model, parameter)} is a DTensor (fully_shard, tensor parallelism); a layer's "
                "curvature needs its whole gradient. Use DistributedDataParallel"
            )


def refuse_replaced(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Refuse to go on with parameters that the model no longer has: it would be a training of nothing.

    Raises:
        RuntimeError: a covered layer's parameter is no longer one of the model's.
    """
    names = gone(model, layers)
    if names:
        raise RuntimeError(
            f"KFAC.step: the parameters of layers {', '.join(map(repr, names[:5]))} are no longer the model's: they "
            "were replaced since the optimizer was made (weight_norm, model.to('meta'), to_empty, fully_shard, an "
            "assignment). Make a new optimizer for the model as it is now"
        )


def gone(model: nn.Module, layers: Iterable[Layer]) -> list[str]:
    """Names of the layers of which a parameter is no longer one of the model's."""
    here = {id(p) for p in model.parameters()}
    return [layer.name for layer in layers if any(id(p) not in here for p in layer.parameters)]


def _name(model: nn.Module, parameter: Tensor) -> str:
    return next((repr(name) for name, p in model.named_parameters() if p is parameter), "a parameter")


def _is_dtensor(parameter: Tensor) -> bool:
    tensors = sys.modules.get("torch.distributed.tensor")  # not imported: then there are none
    return tensors is not None and isinstance(parameter, tensors.DTensor)


def _is_fsdp(module: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)
