"""Showing K-FAC's diagnostics while it trains: in a progress bar, in TensorBoard, or wherever a function takes them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch.optim import Optimizer

from kronfac.optim import options
from kronfac.optim.diagnostics import flatten
from kronfac.optim.kfac import KFAC


@runtime_checkable
class ProgressBar(Protocol):
    """What tqdm's bars have."""

    def set_postfix(self, ordered_dict: Mapping[str, Any], refresh: bool = True) -> Any:
        """Show values behind the bar."""


@runtime_checkable
class ScalarWriter(Protocol):
    """What TensorBoard's SummaryWriter has, and others that imitate it."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write one value of one curve."""


Sink: TypeAlias = "ProgressBar | ScalarWriter | Callable[[dict[str, Any]], Any]"


class Monitor:
    """Hands the diagnostics of an optimizer to a sink, every so many steps; nothing in the training loop changes.

        monitor = kronfac.optim.Monitor(optimizer, SummaryWriter(), every=50)

    It follows `optimizer.step` by a hook of torch's, until `close` or the end of a `with` block. It lives as long as
    the optimizer and does not keep that alive. Skipped steps are not shown.

    Args:
        optimizer: whose steps are followed.
        sink: a progress bar (anything with ``set_postfix``, tqdm's), a writer (``add_scalar``, TensorBoard's
            SummaryWriter), or a callable that is given the dict of `KFAC.diagnostics`.
        every: steps between two looks, >= 1; each waits for the device and costs some matrix-vector products.
        fields: which numbers a bar or writer shows, by their joined names such as "layers/0/pi"; a name that ends in
            "/" stands for all below it. None for all of them in a writer, and damping, clip and skipped steps in a bar.
        prefix: in front of the names in a writer.
        time_phases: measure where time goes as well; the monitor then switches `KFAC.time_phases` on.

    Raises:
        TypeError: `optimizer` is no KFAC, or `sink` is none of these.
        ValueError: `every` is below 1.
    """

    BAR_FIELDS = ("groups/0/damping", "groups/0/clip_scale", "skipped_steps")

    def __init__(
        self,
        optimizer: KFAC,
        sink: Sink,
        *,
        every: int = 10,
        fields: Sequence[str] | None = None,
        prefix: str = "kfac/",
        time_phases: bool = False,
    ) -> None:
        if not isinstance(optimizer, KFAC):
            raise TypeError(f"Monitor: optimizer: expected a kronfac.KFAC, got a {type(optimizer).__name__}")
        if not (isinstance(sink, (ProgressBar, ScalarWriter)) or callable(sink)):
            raise TypeError(
                f"Monitor: sink: expected a progress bar, a writer with add_scalar or a callable, "
                f"got a {type(sink).__name__}"
            )
        if isinstance(fields, str):
            raise TypeError(f"Monitor: fields: expected a sequence of names or None, got {fields!r}; pass [{fields!r}]")
        self._optimizer = weakref.ref(optimizer)
        self._sink, self._prefix = sink, prefix
        self._every = options.integer("Monitor: every", every)
        self._fields = None if fields is None else tuple(fields)
        if options.flag("Monitor: time_phases", time_phases):
            optimizer.time_phases()
        self._seen = optimizer.steps
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def show(self) -> None:
        """Hand the diagnostics over now."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        diagnostics = optimizer.diagnostics()
        if isinstance(self._sink, ProgressBar):
            chosen = _choose(flatten(diagnostics), self.BAR_FIELDS if self._fields is None else self._fields)
            self._sink.set_postfix({name.rpartition("/")[2]: value for name, value in chosen.items()}, refresh=False)
        elif isinstance(self._sink, ScalarWriter):
            chosen = flatten(diagnostics)
            if self._fields is not None:
                chosen = _choose(chosen, self._fields)
            for name, value in chosen.items():
                self._sink.add_scalar(self._prefix + name, value, diagnostics["step"])
        else:
            self._sink(diagnostics)

    def close(self) -> None:
        """Follow the optimizer no longer."""
        self._handle.remove()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        assert isinstance(optimizer, KFAC)
        taken = optimizer.steps
        if taken != self._seen and taken % self._every == 0:
            self.show()
        self._seen = taken

    def __enter__(self) -> Monitor:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Calls `close`."""
        self.close()


def _choose(values: Mapping[str, float], fields: Sequence[str]) -> dict[str, float]:
    return {
        name: value
        for name, value in values.items()
        if any(name == wanted or (wanted.endswith("/") and name.startswith(wanted)) for wanted in fields)
    }
