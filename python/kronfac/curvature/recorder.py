"""Taking curvature statistics from a model's own forward and backward passes."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from kronfac.curvature.adapter import LayerAdapter
from kronfac.curvature.capture import Capture
from kronfac.curvature.clock import Clock, timed
from kronfac.curvature.compiled import uncompiled
from kronfac.curvature.extra import ExtraStatistic
from kronfac.curvature.forward import Call, Forward, OutputEdge, refuse_reentrant
from kronfac.curvature.hooks import CloseHook, LayerHook, OpenHook, obstacle
from kronfac.curvature.likelihood import Likelihood, resolve_likelihood
from kronfac.curvature.precision import without_autocast
from kronfac.curvature.rows import RowKeeper
from kronfac.curvature.sharing import SHARINGS, set_sharing
from kronfac.curvature.statistics import Pending

FISHERS = ("mc", "exact", "empirical")
REDUCTIONS = ("mean", "sum")


class Recorder:
    """Watches a model through hooks and collects the sums that Kronecker factors are made of.

    The root's forward opens a recording; each covered layer adds the second moment of its input at once and leaves
    the gradient edge of its output; when the root's forward returns, targets are drawn from the model's own
    distribution and differentiated back to the layer outputs, never to the weights (fisher="mc", "exact"). With
    fisher="empirical" the sums come from the user's own ``backward()`` instead, and a forward without one
    contributes nothing.

    A recording is taken when the root is in training mode, `due` is true, gradients are enabled and the forward
    runs in plain eager torch; under functorch transforms, export, tracing, compilation, ``inference_mode``,
    ``no_grad`` and inside a backward pass the hooks do nothing. The extra pass runs the backward hooks that the
    user has put on the model's modules and tensors; parameters' ``.grad`` and hooks on them are not touched.

    Args:
        model: the root whose forward counts; a DistributedDataParallel is looked through.
        adapters: of the covered layers, by name.
        likelihood: what the loss is the negative logarithm of.
        output: picks the output that parametrises the likelihood from what the model returns.
        mask: from the root's args, kwargs and output to a bool tensor of the terms that count.
        fisher: "mc" draws targets, "exact" takes their expectation, "empirical" uses the training targets. Of a
            layer that is applied once for the whole batch the first two are right in the mean.
        fisher_samples: draws per example for "mc", averaged.
        reduction: whether ``.grad`` is the "mean" or the "sum" over all examples since the last `collect`;
            "empirical" only.
        sharing: "expand": shared positions count as separate examples; "reduce": inputs are averaged and gradients
            summed over the positions of an example (Eschenhagen et al., arXiv:2311.00636); None leaves the adapters as
            they are.
        extra: further statistics to take of some layers, by layer name and name.
        bare: layers of which nothing else is wanted, neither A nor G.
        generator: source of the draws on the output's device; a new one seeded with 0 when None.

    Attributes:
        due: whether the coming forwards are to be recorded.
        ever_recorded: whether statistics were ever taken.
        idle: whether no forward was recorded between the last two calls of `collect`.
        forced: whether `record` was ever used.
        merged: layers whose statistics of fisher="empirical" were of a sum over the examples: each was applied once for
            the whole batch.
        generator: source of the draws.
        rows: keeps the rows that gradients are products of, once that is enabled.
        clock: counts the time that statistics take, None for none.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an unknown option.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Mapping[str, LayerAdapter],
        *,
        likelihood: str | Likelihood = "categorical",
        output: Callable[[Any], Tensor] | None = None,
        mask: Callable[[tuple[Any, ...], dict[str, Any], Any], Tensor] | None = None,
        fisher: str = "mc",
        fisher_samples: int = 1,
        reduction: str = "mean",
        sharing: str | None = "expand",
        extra: Mapping[str, Mapping[str, ExtraStatistic]] | None = None,
        bare: Collection[str] = (),
        generator: Generator | None = None,
    ) -> None:
        for name, value, known in (
            ("fisher", fisher, FISHERS),
            ("reduction", reduction, REDUCTIONS),
            *([] if sharing is None else [("sharing", sharing, SHARINGS)]),
        ):
            if value not in known:
                raise ValueError(f"Recorder: {name}: expected one of {', '.join(map(repr, known))}, got {value!r}")
        if isinstance(fisher_samples, bool) or not isinstance(fisher_samples, int):
            raise TypeError(f"Recorder: fisher_samples: expected an int, got {fisher_samples!r}")
        if fisher_samples < 1:
            raise ValueError(f"Recorder: fisher_samples: expected at least 1, got {fisher_samples}")
        for name, function in (("output", output), ("mask", mask)):
            if function is not None and not callable(function):
                raise TypeError(f"Recorder: {name}: expected a callable or None, got a {type(function).__name__}")

        # Inside DDP's own forward sit autograd functions that must run once per step; its inner module has none.
        self.model: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        self.adapters = dict(adapters)
        self.extra = {name: dict((extra or {}).get(name, {})) for name in self.adapters}
        self.bare = frozenset(bare)
        self.likelihood = resolve_likelihood(likelihood)
        self.fisher, self.fisher_samples = fisher, fisher_samples
        self.reduction = reduction
        if sharing is not None:
            for name, adapter in self.adapters.items():
                set_sharing(name, adapter, sharing)
        if generator is None:
            home = next((a.weight.device for a in self.adapters.values()), torch.device("cpu"))
            generator = Generator(home).manual_seed(0)
        self.generator = generator
        self.due = True
        self.ever_recorded = False
        self.idle = self.forced = False
        self.merged: set[str] = set()
        self.rows = RowKeeper(self.adapters)
        self.clock: Clock | None = None

        self._output, self._mask = output, mask
        self._from_backward = fisher == "empirical"
        self._forward: Forward | None = None
        self._edges: list[tuple[str, Call, OutputEdge]] = []  # of the open forward
        self._stance: AbstractContextManager[Any] | None = None  # in which the open forward runs uncompiled
        self._pending = self._nothing()
        self._reached: list[Forward] = []  # forwards that a backward has reached, for fisher="empirical"
        self._twice = False
        self._forced = self._update_only = self._replaced = False
        self._suspended = 0
        self._completed = self._completed_before = 0
        self._obstacles: Counter[str] = Counter()
        self._parameters = [(a.module, tuple(a.module._parameters.items())) for a in self.adapters.values()]
        self._install()

    def _install(self) -> None:
        handles: list[RemovableHandle] = []
        for name, adapter in self.adapters.items():
            handles += adapter.listen(LayerHook(self, adapter.module, name))
        root = self.model
        handles.append(root.register_forward_pre_hook(OpenHook(self, root)))
        handles.append(root.register_forward_hook(CloseHook(self, root), with_kwargs=True, always_call=True))
        self._finalizer = weakref.finalize(self, _remove, handles)
        self._finalizer.atexit = False

    def remove(self) -> None:
        """Take all hooks off the model and drop what is pending. Nothing is recorded any more."""
        self._finalizer()
        self.clear()
        self.rows.take()
        self._forward = None
        self._restore_stance()

    # ------------------------------------------------------------------ what the optimizer says

    def collect(self, *, loss_scale: float | Tensor = 1.0) -> Pending:
        """Hand over everything recorded since the last `collect` or `clear`, and begin anew.

        Args:
            loss_scale: factor that the loss carried in backward (a GradScaler's), a tensor () where it is not to be
                waited for; "empirical" only.

        Returns:
            The sums, those of "empirical" rescaled to per-example gradients; empty when nothing was recorded.

        Raises:
            RuntimeError: fisher="empirical" and two backward passes went through one forward.
        """
        pending, reached, twice = self._pending, self._reached, self._twice
        self.clear()
        self.idle, self._completed_before = self._completed == self._completed_before, self._completed
        if twice:
            raise RuntimeError(
                "kronfac: two backward passes went through one recorded forward; the statistics of "
                'fisher="empirical" need the gradient of their sum, which neither shows. Add the losses and call '
                'backward() once, or use fisher="mc"'
            )
        if reached:
            terms = sum(forward.terms for forward in reached)
            # The gradient of a mean over the M terms of this process is 1/M of each example's own.
            scale = (terms if self.reduction == "mean" else 1.0) / loss_scale
            for forward in reached:
                layers = forward.statistics()
                for name, statistics in layers.items():
                    statistics.G_sum.mul_(_beside(scale * scale, statistics.G_sum))
                    for key, total in statistics.extra.items():
                        total.mul_(_beside(scale ** self.extra[name][key].degree, total))
                pending.add(layers, forward.terms, forward.examples)
        return pending

    def clear(self) -> None:
        """Drop what is pending."""
        self._pending = self._nothing()
        for forward in self._reached:
            forward.collected = True
        self._reached = []
        self._twice = False
        self._replaced = False

    def _nothing(self) -> Pending:
        return Pending(adapters=self.adapters, watched=self.extra, bare=self.bare)

    def record(self, update_only: bool = False) -> AbstractContextManager[None]:
        """Record the forwards inside the context whatever the model's mode and `due`.

        Args:
            update_only: they are for statistics alone: their graph is released at once, what training forwards had
                left pending is dropped, and training forwards are not recorded before the next `collect`.

        Returns:
            The context manager. On leaving it raises RuntimeError when no forward could be recorded inside.

        Raises:
            ValueError: update_only with fisher="empirical", whose statistics come from the training backward.
        """
        if update_only and self._from_backward:
            raise ValueError(
                'record: update_only: expected False with fisher="empirical", which needs the backward of the training '
                'loss; use fisher="mc" or "exact"'
            )
        return self._recording(update_only)

    @contextmanager
    def _recording(self, update_only: bool) -> Iterator[None]:
        before, completed, obstacles = (self._forced, self._update_only), self._completed, self._obstacles.copy()
        self._forced, self._update_only, self.forced = True, update_only, True
        try:
            yield
        finally:
            self._forced, self._update_only = before
        if self._completed == completed:
            reasons = ", ".join(self._obstacles - obstacles) or "the model was not called as a module"
            raise RuntimeError(f"kronfac: no statistics were taken inside record(): {reasons}")

    @contextmanager
    def suspend(self) -> Iterator[None]:
        """Record nothing inside, not even under `record`: re-evaluations of a closure."""
        self._suspended += 1
        try:
            yield
        finally:
            self._suspended -= 1

    def explain_missing(self) -> str:
        """Why nothing was ever recorded, for an error: what was observed, then what else it may be."""
        observed = self.observed()
        compiled = hasattr(self.model, "_orig_mod") or getattr(self.model, "_compiled_call_impl", None) is not None
        return (
            "kronfac: no curvature statistics were ever recorded"
            + observed
            + ("; the model is compiled" if compiled else "")
            + ". Possible causes: forward was never called on this very module (call model(x), not model.forward(x), "
            "and not a copy or a DataParallel replica); the model was compiled, so that its hooks do not run (hand the "
            "result of torch.compile to KFAC, or take the statistics from the uncompiled module: "
            "with record_statistics(update_only=True): model(x)); it is in "
            "eval mode (call model.train(), or use record_statistics()); the whole model runs under reentrant "
            "checkpointing (pass use_reentrant=False)"
            + ('; fisher="empirical" and loss.backward() was never called' if self.fisher == "empirical" else "")
        )

    def observed(self) -> str:
        """Which forwards were not recorded so far and why, as a continuation of a sentence; empty when none."""
        return "".join(f"; {count} forward(s) were passed over: {why}" for why, count in self._obstacles.items())

    # ------------------------------------------------------------------ what the hooks say

    @property
    def removed(self) -> bool:
        """Whether `remove` was called."""
        return not self._finalizer.alive

    @property
    def is_open(self) -> bool:
        """Whether a forward is being recorded."""
        return self._forward is not None

    @property
    def update_only(self) -> bool:
        """Whether the forwards that run now are for statistics alone."""
        return self._update_only

    def open(self) -> None:
        """The root's forward begins."""
        self._forward = None  # what an interrupted forward may have left
        self._restore_stance()
        if self._suspended or not (self._forced or self.due):
            return
        reason = obstacle(self)
        if reason is None and not (self._forced or self.model.training):
            reason = "the model was in eval mode"
        if reason is None and not self._owns_parameters():
            reason = "it ran with other parameters than the layers had when the recorder was made (functional_call)"
        if reason is None and self._replaced and not self._forced:
            return
        if reason is not None:
            self._obstacles[reason] += 1
            return
        self._forward = Forward(update_only=self._update_only, watched=self.extra, bare=self.bare)
        self._edges = []
        self._stance = uncompiled(self.model)

    def _restore_stance(self) -> None:
        stance, self._stance = self._stance, None
        if stance is not None:
            stance.__exit__(None, None, None)

    def _owns_parameters(self) -> bool:
        return all(
            module._parameters.get(name) is parameter for module, items in self._parameters for name, parameter in items
        )

    @timed("statistics")
    def see(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
        place: Callable[[Tensor], OutputEdge] = OutputEdge.of,
    ) -> None:
        """A covered layer has run inside the open recording; `place` says where in `output` its own output lies."""
        forward, adapter = self._forward, self.adapters[name]
        if forward is None or not adapter.parameters():
            return
        if not isinstance(output, Tensor):
            raise TypeError(f"kronfac: output of layer {name!r}: expected a tensor, got a {type(output).__name__}")
        with torch.no_grad():
            x = adapter.layer_input(args, kwargs)
        if x.is_nested or output.is_nested:
            raise RuntimeError(
                f"kronfac: layer {name!r} has a nested tensor as input; pass padded tensors and say with mask= what "
                "counts"
            )
        if not (torch.is_grad_enabled() and output.requires_grad):
            forward.ungraphed.append(name)
            return
        edge = place(output)
        with torch.no_grad(), without_autocast(x.device):
            call = forward.enter(name, adapter, x, edge.view.shape, defer=self._mask is not None)
            call.kept = adapter.kept_by(output) if adapter.keeps_input else None
        if self._from_backward:
            edge.edge.node.register_prehook(Capture(self, forward, name, call, edge))
        else:
            self._edges.append((name, call, edge))

    def keep_rows(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """A covered layer has run, inside a recording or not, and the rows of its gradient may be worth keeping."""
        if obstacle(self) is None:
            self.rows.keep(name, self.adapters[name], args[0] if args else next(iter(kwargs.values()), None), output)

    @timed("statistics")
    def close(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        """The root's forward has ended, with an output or with an exception."""
        forward = self._forward
        # Closed before any backward runs: under non-reentrant checkpointing that calls the layers again.
        self._forward = None
        self._restore_stance()
        edges, self._edges = self._edges, []
        if forward is None or forward.failed:
            return
        if not forward.calls and not forward.ungraphed:
            self._obstacles["none of the covered layers ran inside it"] += 1
            return
        logits = self._logits(out)
        if forward.ungraphed:
            refuse_reentrant(forward.ungraphed, [logits])
        if not forward.calls or not logits.requires_grad:
            self._obstacles["its output depends on no trainable parameter"] += 1
            return
        with without_autocast(logits.device):
            with torch.no_grad():
                detached = logits.detach()
                self.likelihood.check(detached)
                if self._mask is not None:
                    forward.mask = self._mask(args, dict(kwargs), out)
                    self.likelihood.check_mask(detached, forward.mask)
                forward.terms = float(self.likelihood.terms(detached, forward.mask))
                forward.examples = logits.shape[0]
                forward.resolve()
            self._completed += 1
            if self._from_backward:
                forward.complete = True
                self.merged.update(forward.surely_merged)
                return
            self._differentiate(forward, logits, edges)
        if forward.update_only and not self._replaced:
            self._pending = self._nothing()
            self._replaced = True
        self._pending.add(forward.statistics(), forward.terms, forward.examples)
        self.ever_recorded = True

    def _logits(self, out: Any) -> Tensor:
        logits = out if self._output is None else self._output(out)
        if not isinstance(logits, Tensor):
            source = "the model" if self._output is None else "output="
            raise TypeError(
                f"kronfac: output: expected a tensor of logits, got a {type(logits).__name__} from {source}; "
                "pass output=lambda out: ... to pick the logits from what the model returns"
            )
        return logits

    def _output_gradients(self, logits: Tensor, forward: Forward) -> Iterator[tuple[Tensor, float]]:
        """Gradients at the output that the output statistics are made of, and the weight of each."""
        mask = forward.mask
        if self.fisher == "exact":
            merges = forward.merges
            for column in self.likelihood.exact_gradients(logits, mask):
                yield column * self._signs(column) if merges else column, 1.0
            return
        self._follow(logits)
        for _ in range(self.fisher_samples):
            # The covariance is averaged over the draws. Scaling the gradients by 1/n would make it 1/n too small.
            yield self.likelihood.sample_gradients(logits, self.generator, mask), 1.0 / self.fisher_samples

    def _follow(self, logits: Tensor) -> None:
        """Keep the generator on the output's device."""
        if self.generator.device != logits.device:
            self.generator = Generator(logits.device).manual_seed(self.generator.initial_seed())

    def _signs(self, column: Tensor) -> Tensor:
        """A random sign for each example.

        Of a layer that was applied once for the whole batch the gradient is a sum over the examples, and its square has
        their cross products, which vanish in the mean over the signs. All other layers see squares and products of one
        example, to which its sign makes no difference, not even in rounding.
        """
        self._follow(column)
        shape = (len(column), *[1] * (column.dim() - 1))
        signs = torch.randint(2, shape, generator=self.generator, device=column.device)
        return (2 * signs - 1).to(column.dtype)

    def _differentiate(self, forward: Forward, logits: Tensor, edges: list[tuple[str, Call, OutputEdge]]) -> None:
        """Propagate gradients from the output to the layer outputs, and no further."""
        with torch.no_grad():
            remaining = self._output_gradients(logits.detach(), forward)
            following = next(remaining, None)
        while following is not None:
            vector, scale = following
            with torch.no_grad():
                following = next(remaining, None)
            gradients = torch.autograd.grad(
                logits,
                [edge.edge for _, _, edge in edges],
                grad_outputs=vector.to(logits.dtype),
                retain_graph=following is not None or not forward.update_only,
                allow_unused=True,
            )
            with torch.no_grad():
                # Last call first, as in a backward pass, whatever the Fisher: see `ExtraStatistic.joins`.
                for (name, call, edge), gradient in reversed(list(zip(edges, gradients, strict=True))):
                    if gradient is not None:
                        forward.add_gradient(name, call, edge.view.gradient(gradient), scale)

    def reach(self, forward: Forward, twice: bool) -> None:
        """The training backward has reached a layer of a recorded forward, for the second time or not."""
        if not any(forward is other for other in self._reached):
            self._reached.append(forward)
        self.ever_recorded = True
        self._twice = self._twice or twice


def _beside(scale: float | Tensor, like: Tensor) -> float | Tensor:
    return scale.to(like) if isinstance(scale, Tensor) else scale


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
