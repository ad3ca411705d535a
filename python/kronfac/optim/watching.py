"""An optimizer that watches a model: which layers it covers, and the statistics that their forwards leave."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.curvature import GradientRows, KroneckerFactors, Recorder, ScaledSums
from kronfac.curvature.clock import Clock
from kronfac.curvature.statistics import Pending
from kronfac.optim import ledger, reading
from kronfac.optim.background import Background
from kronfac.optim.chains import form_chains
from kronfac.optim.groups import GroupedOptimizer, all_parameters, home_of
from kronfac.optim.layers import Coverage, assign, check_layers, same_tensors
from kronfac.optim.moved import follow, places
from kronfac.optim.ranks import rank, world_size
from kronfac.optim.refusals import gone, refuse_compiled_in_place, refuse_parameters, refuse_replaced
from kronfac.optim.report import Reporter
from kronfac.optim.settings import Settings
from kronfac.optim.state import COUNTERS


@dataclass(frozen=True)
class Collected:
    """What the forwards since the last step have left.

    Attributes:
        fresh: statistics by layer name, of the layers whose group takes them at this step.
        rows: by layer name, what may form the layer's gradient.
        awaited: whether forwards were to be recorded, so that a layer without statistics was not seen.
    """

    fresh: dict[str, ScaledSums]
    rows: Mapping[str, GradientRows]
    awaited: bool


class WatchingOptimizer(GroupedOptimizer):
    """A torch optimizer with layers, and a recorder on the model that takes their statistics.

    Nothing is watched before `_cover`, so that a constructor that fails leaves no hooks on the model.

    Args:
        model: to be watched.
        settings: checked arguments.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model = model
        self.structure = settings.structure
        self.fisher, self.likelihood = settings.fisher, settings.likelihood
        self._adaptive = settings.adaptive
        self._recording = settings.recording
        self._grad_scaler = settings.grad_scaler
        self._background = Background(settings.max_staleness) if settings.max_staleness else None
        if self._background is not None:
            weakref.finalize(self, self._background.forget).atexit = False
        self._clock: Clock | None = None
        self._reporter = Reporter()
        self._counters = dict.fromkeys(COUNTERS, 0)
        self._ledger = ledger.Ledger()
        self._coverage = Coverage([])
        self._places: list[tuple[torch.dtype, torch.device]] = []
        self._recorder: Recorder | None = None
        self._eager = True
        self._finalizer: weakref.finalize[Any, Any] | None = None
        super().__init__(settings.trained, settings.defaults)
        refuse_parameters(model, self.param_groups)
        self._generator = torch.Generator(self._home())
        self._generator.manual_seed((settings.seed + rank()) % 2**64)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the covered layers."""
        return tuple(layer.name for layer in self._coverage.layers)

    @property
    def steps(self) -> int:
        """Steps taken, the skipped ones not counted. On an accelerator a look at it waits for the device."""
        return self._counts()["step"]

    @property
    def skipped_steps(self) -> int:
        """Steps skipped because something was not finite. On an accelerator a look at it waits for the device."""
        return self._counts()["skipped_steps"]

    @property
    def inverse_failures(self) -> int:
        """How often a layer's inverse could not be renewed."""
        return self._counters["inverse_failures"]

    @property
    def inverse_retries(self) -> int:
        """How often a factor needed more damping than asked for."""
        return self._counters["inverse_retries"]

    @property
    def next_step_is_plain(self) -> bool:
        """Whether the coming step takes no statistics and neither makes, asks for nor takes up inverses.

        Such a step never waits for the device, and can be captured in a CUDA graph.
        """
        return not (self._adaptive or self._live_recorder().due or self._refreshes())

    def factors(self) -> dict[str, KroneckerFactors]:
        """Undamped running averages, copied: ``{layer name: KroneckerFactors(A (in[+1], in[+1]), G (out, out))}``.

        Layers that the structures "diagonal" and "mini_block" handle have none and are absent.
        """
        return {
            layer.name: KroneckerFactors(layer.factors.A.clone(), layer.factors.G.clone())
            for layer in self._coverage.layers
            if layer.factors is not None and not layer.bare
        }

    def record_statistics(self, update_only: bool = False) -> AbstractContextManager[None]:
        """Record the forwards inside the context whatever the model's mode and the step.

        Args:
            update_only: the forwards are for statistics alone: no backward follows and, until the next step, training
                forwards are not recorded. Not with fisher="empirical", which needs the training backward.

        Returns:
            A context manager.

        Raises:
            ValueError: update_only with fisher="empirical".
        """
        return self._live_recorder().record(update_only=update_only)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check and add a param group, and watch the layers that come with it.

        Raises:
            TypeError, ValueError: as at construction; the optimizer is then as it was.
        """
        super().add_param_group(param_group)
        if self._recorder is None:  # under construction: the layers are assigned once all groups are there
            return
        try:
            refuse_parameters(self.model, self.param_groups[-1:])
            self._cover()
        except (TypeError, ValueError, RuntimeError):
            self._remove_last_group()
            raise

    def _parameters(self) -> list[Tensor]:
        return all_parameters(self.param_groups)

    def _home(self) -> torch.device:
        return home_of(self.param_groups)

    def _live_recorder(self) -> Recorder:
        assert self._recorder is not None
        return self._recorder

    def _cover(self) -> None:
        """Assign parameters to layers and put a recorder on the model that watches exactly these."""
        refuse_replaced(self.model, self._coverage.layers)
        coverage = assign(self.model, self.param_groups, self.structure, self._coverage.layers)
        check_layers(coverage.layers, self.param_groups)
        if self._background is not None:
            self._background.check(coverage.layers)
            self._background.keep([layer.name for layer in coverage.layers if layer.factorisation is not None])
        if self.structure.chains:
            form_chains(coverage.layers)
        if self._finalizer is not None:
            self._finalizer()
        recorder = Recorder(
            self.model,
            {layer.name: layer.adapter for layer in coverage.layers},
            extra={layer.name: layer.statistics for layer in coverage.layers},
            bare=[layer.name for layer in coverage.layers if layer.bare],
            generator=self._generator,
            **self._recording,
        )
        recorder.ever_recorded = self._recorder is not None and self._recorder.ever_recorded
        for layer in coverage.layers:
            if not self.structure.by_block[layer.block].by_rows:
                recorder.rows.limits.pop(layer.name, None)
        self._coverage, self._recorder = coverage, recorder
        recorder.clock = self._clock
        # Layers that are new should not wait for the next step that is due.
        self._eager = any(layer.factors is None for layer in coverage.layers)
        # The hooks go with the optimizer. The recorder does not know the optimizer, so nothing keeps that alive.
        self._finalizer = weakref.finalize(self, recorder.remove)
        self._finalizer.atexit = False
        self._announce_due()
        text = coverage.warning()
        if text is not None:
            self._reporter.once(text, text)

    def _counts(self) -> dict[str, int]:
        """The counters with what only the device knows so far."""
        skipped = self._ledger.look()
        counters = self._counters
        return {
            **counters,
            "step": counters["step"] - skipped,
            "skipped_steps": counters["skipped_steps"] + skipped,
        }

    def _refreshes(self) -> bool:
        """Whether the coming step makes, asks for or takes up inverses, and waits for that."""
        step = self._counters["step"]
        return (
            any(step % period == 0 for period in self._upcoming("inverse_every", step))
            or any(layer.factors is not None and layer.factorisation is None for layer in self._coverage.layers)
            or (self._background is not None and self._background.is_due(step))
        )

    def _settle(self) -> None:
        """Correct the step number by the steps that were skipped without anybody waiting to learn of it."""
        skipped, surprising = self._ledger.settle()
        self._counters["step"] -= skipped
        self._counters["skipped_steps"] += skipped
        if surprising:
            self._reporter.skipped(ledger.CAUSE)

    def _check_before_step(self) -> None:
        """Evaluate the options for this step and refuse what it could not be taken with."""
        if self._ledger.is_open and self._refreshes():
            self._settle()
        self._resolve(self._counters["step"])
        layers, recorder = self._coverage.layers, self._live_recorder()
        check_layers(layers, self.param_groups)
        self._refuse_sparse()
        if self._background is not None:
            self._background.check(layers)
            self._background.raise_errors()
        refuse_compiled_in_place(self.model)
        if layers and not recorder.ever_recorded and all(layer.factors is None for layer in layers):
            raise RuntimeError(recorder.explain_missing())

    def _collect(self, scale: Tensor | None, found_inf: Tensor | None) -> Collected:
        """Take the pending statistics; layers, and what is held for them, follow where the model has changed since.

        Args:
            scale: GradScaler's, of the gradients as they are.
            found_inf: its verdict; None without one.
        """
        recorder = self._live_recorder()
        awaited = recorder.due
        # To exchange counts the host waits for the device. Between steps that all ranks know to be due, what
        # record_statistics() has taken stays pending on an accelerator.
        if world_size() == 1 or awaited or self._refreshes() or all(map(reading.at_hand, self._parameters())):
            pending = recorder.collect(loss_scale=self._loss_scale(scale, found_inf))
            pending.all_reduce()
        else:
            pending = Pending()
        rows = recorder.rows.take()
        fresh = self._due(pending.scaled_sums())
        if self._coverage.outdated():
            # What the forwards missed is said in other words.
            awaited, rows, fresh = False, {}, self._cover_anew(fresh)
        if (now := places(self.param_groups)) != self._places:
            follow(self._coverage.layers, self.state, self._background)
            self._places = now
        self._generator = recorder.generator  # another one where the model has moved to another device
        return Collected(fresh, rows, awaited)

    def _cover_anew(self, fresh: Mapping[str, ScaledSums]) -> dict[str, ScaledSums]:
        """Assign the layers again, and leave out the statistics of those that are others now."""
        old = {layer.name: layer for layer in self._coverage.layers}
        self._cover()
        kept = {}
        for layer in self._coverage.layers:
            before = old.get(layer.name)
            if layer.name in fresh and before is not None and same_tensors(layer.parameters, before.parameters):
                sums = fresh[layer.name]
                # What a layer shared with one that is no longer its successor is no statistic of anything.
                kept[layer.name] = sums if layer.following == before.following else replace(sums, extra={})
        return kept

    def _due(self, fresh: dict[str, ScaledSums]) -> dict[str, ScaledSums]:
        """Leave out layers whose group takes no statistics at this step, while another group's does."""
        if not fresh:
            return fresh
        step = self._counters["step"]
        due = {
            layer.name
            for layer in self._coverage.layers
            if layer.factors is None or step % self.param_groups[layer.groups[0]]["factor_every"] == 0
        }
        # With no group due, the statistics are there because the user asked for them: record_statistics().
        asked_for = not any(step % group["factor_every"] == 0 for group in self.param_groups)
        return {name: pair for name, pair in fresh.items() if asked_for or name in due}

    def _loss_scale(self, scale: Tensor | None, found_inf: Tensor | None) -> float | Tensor:
        """How the loss was scaled when the statistics were taken; only the training backward carries a scale."""
        if self.fisher != "empirical":
            return 1.0
        if scale is None and self._grad_scaler is not None and self._grad_scaler.is_enabled():
            scale = self._grad_scaler._get_scale_async()
            if scale is None:  # it has scaled nothing so far
                return float(self._grad_scaler.get_scale())
        if scale is not None:
            return float(scale) if reading.at_hand(scale) else scale
        if found_inf is not None:
            raise ValueError(
                "KFAC.step: fisher='empirical': the gradients were unscaled before the step, so the loss scale of the "
                "statistics is unknown; make the optimizer with grad_scaler=<the GradScaler>"
            )
        return 1.0

    def _announce_due(self) -> None:
        """Tell the recorder whether the coming forwards are to be recorded, so that the hooks rest otherwise."""
        step = self._counters["step"]
        due = any(step % period == 0 for period in self._upcoming("factor_every", step))
        recorder = self._live_recorder()
        recorder.due = due or self._eager
        for layer in self._coverage.layers:
            if layer.statistics:
                self.structure.by_block[layer.block].renew(layer.statistics, layer.factorisation)
        # No use for rows that cannot form .grad at the step: decayed, scaled or summed over processes.
        recorder.rows.enabled = (
            self.structure.by_rows
            and not self._adaptive
            and world_size() == 1
            and any(group["decoupled"] or not group["weight_decay"] for group in self.param_groups)
        )

    def _report_unseen(self, collected: Collected, applied: bool) -> None:
        """Warn of statistics that are not a layer's own, and where layers, or the whole model, were not called."""
        layers, fresh, recorder = self._coverage.layers, collected.fresh, self._live_recorder()
        self._reporter.merged(recorder.merged)
        if not collected.awaited:
            return
        if not fresh and applied and recorder.idle and not recorder.forced:
            self._reporter.stale(layers, recorder.observed())
        if len(fresh) < len(layers):  # not looked for where every layer was seen
            self._reporter.replaced(gone(self.model, [layer for layer in layers if layer.name not in fresh]))
