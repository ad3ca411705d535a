"""Keeping apart what forwards write to the buffers of modules, whichever modules a function of the user's calls."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from kronfac.curvature.hooks import in_backward


@dataclass(frozen=True, eq=False)
class _Slot:
    """Where a module holds a buffer."""

    module: nn.Module
    name: str
    own: Tensor


class SeparateBuffers:
    """Copies that stand in for the buffers of every module that is called, until they are written back or dropped.

    A forward in train mode moves the running statistics of batch normalisation. Inside `kept` what it writes is seen
    by all later forwards, inside `dropped` by nobody; the modules' own tensors change at `write_back` alone. Graphs
    hold the copies, so that nothing they need is ever written over.

    Modules are recognised when they are called: buffers that a function uses without calling their module, and those
    of scripted modules, are not covered.
    """

    def __init__(self) -> None:
        # By the identity of the module's own tensor, which the slots keep alive.
        self._values: dict[int, Tensor] = {}
        self._kept_slots: dict[tuple[int, str], _Slot] = {}
        self._slots: list[_Slot] = []
        self._depth = self._thread = 0
        self._keep = self._keeping = False

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What forwards inside write to buffers is what later ones begin with."""
        with self._watching(keep=True):
            yield

    @contextmanager
    def dropped(self) -> Iterator[None]:
        """What forwards inside write to buffers is forgotten after each."""
        with self._watching(keep=False):
            yield

    def write_back(self) -> None:
        """Give the modules what was kept."""
        with torch.no_grad():
            for slot in self._kept_slots.values():
                value, own = self._values[id(slot.own)], slot.own
                if (value.shape, value.dtype, value.device) == (own.shape, own.dtype, own.device):
                    own.copy_(value)
                else:  # a buffer that grows, like a cache
                    slot.module._buffers[slot.name] = value
        self._values.clear()
        self._kept_slots.clear()

    @contextmanager
    def _watching(self, *, keep: bool) -> Iterator[None]:
        self._keep, self._thread, self._depth = keep, threading.get_ident(), 0
        handles = [
            register_module_forward_pre_hook(self._before),
            register_module_forward_hook(self._after, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._restore()

    def _before(self, module: nn.Module, args: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        self._depth += 1
        if self._depth == 1:
            self._replace(module)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        self._depth -= 1
        if self._depth == 0:
            self._restore()

    def _replace(self, root: nn.Module) -> None:
        # Checkpointing runs layers again in a backward: they have written once already.
        self._keeping = keep = self._keep and not in_backward()
        copies: dict[int, Tensor] = {}
        for module in root.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            for name, own in module._buffers.items():
                if own is None:
                    continue
                if id(own) not in copies:
                    value = self._values.get(id(own))
                    copies[id(own)] = value if keep and value is not None else (own if value is None else value).clone()
                module._buffers[name] = copies[id(own)]
                self._slots.append(_Slot(module, name, own))

    def _restore(self) -> None:
        slots, self._slots = self._slots, []
        for slot in slots:
            written = slot.module._buffers.get(slot.name)
            slot.module._buffers[slot.name] = slot.own
            if self._keeping and written is not None:
                self._values[id(slot.own)] = written.detach()
                self._kept_slots[id(slot.module), slot.name] = slot
