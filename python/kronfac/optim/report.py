"""What the optimizer says to its user: each thing once, pointing at the user's own line."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Sequence

from torch import Tensor, nn

from kronfac.optim.layers import Layer
from kronfac.optim.step import Outcome


class Reporter:
    """Warns once per occasion.

    Attributes:
        said: the occasions so far.
    """

    def __init__(self) -> None:
        self.said: set[str] = set()

    def once(self, key: str, text: str) -> None:
        """Warn with `text` unless something was said under `key` before."""
        if key not in self.said:
            self.said.add(key)
            warnings.warn(text, UserWarning, stacklevel=_callers_level())

    def stale(self, layers: Sequence[Layer], observed: str) -> None:
        """Warn that statistics were due, that no forward was recorded, and that there were gradients all the same."""
        if any(all(p.grad is not None for p in layer.parameters) for layer in layers):
            self.once(
                "stale",
                "KFAC: statistics were due at this step, but no forward of the model was recorded since the last one"
                f"{observed}. The last statistics are used until some arrive: call the module that KFAC was made for, "
                "in train mode, or use record_statistics(); where it is compiled, make KFAC for the result of "
                "torch.compile (this is said once)",
            )

    def merged(self, names: Collection[str]) -> None:
        """Warn of layers whose empirical Fisher has products of different examples."""
        if names:
            self.once(
                "merged",
                f"KFAC: fisher='empirical': layers {', '.join(map(repr, sorted(names)[:5]))} are applied once for the "
                "whole batch (position embeddings of ids (1, T) are), so that their G is of a sum over the examples "
                "and too large; expand the input to one row per example, or use fisher='mc' (this is said once)",
            )

    def replaced(self, names: Sequence[str]) -> None:
        """Warn of layers that were taken out of the model: what has come in their place is not trained."""
        if names:
            self.once(
                f"replaced {names}",
                f"KFAC: layers {', '.join(map(repr, names[:5]))} are no longer part of the model; layers that have "
                "replaced them are not trained by this optimizer. Add their parameters (add_param_group), or make a "
                "new optimizer",
            )

    def skipped(self, cause: str) -> None:
        """Warn of a step that was skipped; `cause` is followed by "not finite"."""
        self.once(
            "skip",
            f"KFAC: {cause} not finite; the step was skipped, parameters and statistics are unchanged "
            "(optimizer.skipped_steps counts such steps; this is said once)",
        )

    def outcome(self, outcome: Outcome, model: nn.Module, parameters: Sequence[Tensor]) -> None:
        """Warn of what went wrong in a step: values that are not finite, inverses that failed, missing statistics."""
        if not outcome.applied:
            self.skipped(outcome.cause or _culprit(model, parameters))
        if outcome.failures:
            self.once(
                "inverse",
                f"KFAC: {outcome.failures} layer(s) could not be inverted even with more damping; their last "
                "good inverse is kept (optimizer.inverse_failures counts them; this is said once). "
                "A larger damping may help",
            )
        if outcome.bare:
            names = ", ".join(repr(name) for name in outcome.bare)
            self.once(
                names,
                f"KFAC: layers {names} have gradients but no statistics so far (their forward was not called as a "
                "module's, or not while statistics were due); they train as SGD until statistics arrive",
            )


def _culprit(model: nn.Module, parameters: Sequence[Tensor]) -> str:
    names = {id(p): name for name, p in model.named_parameters()}
    culprits = [
        names.get(id(p), "a parameter outside the model")
        for p in parameters
        if p.grad is not None and not bool(p.grad.isfinite().all())
    ]
    if culprits:
        return f"the gradients of {', '.join(culprits[:5])} are"
    return "the curvature statistics or the preconditioned gradients are"


def _callers_level() -> int:
    """The stacklevel at which `warnings.warn` points to the user's line, past this package and torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("kronfac", "torch"):
        frame, level = frame.f_back, level + 1
    return level
