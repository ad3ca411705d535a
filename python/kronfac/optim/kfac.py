"""KFAC: a torch optimizer that preconditions gradients with Kronecker-factored curvature."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn, TypeAlias, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, StateDict

from kronfac.curvature import Likelihood
from kronfac.curvature.clock import Clock
from kronfac.curvature.precision import without_autocast
from kronfac.optim import adaptive as control
from kronfac.optim import options, state_check
from kronfac.optim import state as checkpoint
from kronfac.optim.averaging import IterateAverage
from kronfac.optim.capture import capturing, lacks_buffers, refuse_capture
from kronfac.optim.copying import rebuild
from kronfac.optim.diagnostics import diagnose
from kronfac.optim.layers import check_layers
from kronfac.optim.memory import MemoryReport, held
from kronfac.optim.options import Schedule
from kronfac.optim.replay import Replayer
from kronfac.optim.settings import check_arguments
from kronfac.optim.step import Outcome, advance, unscale
from kronfac.optim.watching import WatchingOptimizer

Number: TypeAlias = "float | Schedule"
Count: TypeAlias = "int | Schedule"


class KFAC(WatchingOptimizer):
    """K-FAC: natural gradient descent with one Kronecker-factored Fisher block per layer.

    Used like `torch.optim.SGD`, except that it is given the model, whose forward it watches:

        optimizer = kronfac.KFAC(model, lr=0.1)
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    For a layer with inputs ā = [a; 1], output gradients g and gradient matrix V (out, in+1), the direction is
    P = (G + √λ/π I)⁻¹ V (A + π√λ I)⁻¹ with A = E[ā āᵀ] and G = E[g gᵀ] (Martens & Grosse, arXiv:1503.05671;
    convolutions: Grosse & Martens, arXiv:1602.01407), or with exact damping (A ⊗ G + λI)⁻¹ in the eigenbasis. P is
    scaled by the KL clip and goes through momentum as the gradient does in SGD.

    Step k (0-based) takes new statistics when k % factor_every == 0 and new inverses when k % inverse_every == 0, and
    earlier where a layer has none. A step whose gradients, statistics or preconditioned gradients are not finite is
    skipped whole: nothing but `skipped_steps` changes, and with `adaptive` λ, which rises. On an accelerator steps
    between factorisations never wait for the device; see docs/cuda.md.

    Parameters that no layer adapter covers (recurrent layers, weights shared between modules, ...) train as SGD with
    the same lr, momentum and weight decay, after one warning that names them. A layer of which some parameters are in
    `params` and others are not is refused. Weight and bias of a layer may lie in different groups as long as damping,
    kl_clip, norm_constraint, factor_every, inverse_every and sharing agree; the layer then counts with the weight's
    decay in λ and the larger lr in the KL clip.

    Args:
        model: the module to train. Statistics are taken in its training-mode forwards under grad mode.
        lr: learning rate, >= 0. While the KL clip is active the step length does not depend on it. Left out with
            `adaptive`.
        params: what to train, as in torch: tensors, (name, tensor) pairs, or dicts of groups; None for all parameters
            of the model. Groups may set lr, momentum, nesterov, weight_decay, decoupled, damping, kl_clip,
            norm_constraint, factor_every, inverse_every and sharing.
        momentum: in [0, 1), acts on the preconditioned gradient.
        nesterov: Nesterov's form of momentum.
        weight_decay: η >= 0. L2: V + ηW is preconditioned and η joins λ.
        decoupled: apply the decay to the weights instead, θ ← (1 - lr·η) θ.
        damping: λ > 0.
        likelihood: "categorical", "gaussian", "bernoulli" or a `kronfac.curvature.Likelihood`: what the loss is the
            negative logarithm of.
        output: callable(model output) -> logits, for models that return more than logits.
        mask: callable(args, kwargs, model output) -> bool tensor that is False on padding.
        fisher: "mc" (targets drawn from the model), "exact" (type-2/GGN) or "empirical" (the training targets).
        fisher_samples: draws per example of "mc", >= 1.
        reduction: "mean" or "sum": what `.grad` is over all examples since the last step. Only "empirical" needs it.
        structure: of the blocks of Linear, convolution and attention layers; embeddings, norms and adapters without
            `pairs` keep what they have with "kfac".

            - "kfac": A ⊗ G.
            - "ekfac": the eigenvalues in the eigenbasis of A ⊗ G are measured there, as second moments of the rotated
              per-example gradients, at every statistics step (George et al., arXiv:1806.03884).
            - "diagonal": D = E[(per-example gradient)²], P = V ⊘ (D + λ).
            - "mini_block": for each slice of a layer's outputs a Kronecker product in the tensor-normal form (Ren &
              Goldfarb, arXiv:2106.02925).
            - "doubly_factored": K ⊗ Ψ ⊗ G for layers with more than 1024 inputs (Ba, Grosse & Martens 2017); a layer in
              groups, or with a prime number of inputs, keeps its A. All but "diagonal" do so above 8192 inputs, where A
              alone would exceed 256 MiB.
            - "tridiagonal": A ⊗ G and the blocks between consecutive Linear layers, with an inverse that is
              block-tridiagonal (Martens & Grosse, section 4.3); needs solve="inverse".
        sharing: how the positions of a shared layer (tokens, pixels) enter the factors: "expand" counts each as an
            example, "reduce" averages the inputs and sums the gradients over those of an example (Eschenhagen et al.,
            arXiv:2311.00636), whose axis is then the first.
        solve: "inverse" (factored Tikhonov damping) or "eigen" (exact damping). "ekfac" is in the eigenbasis with exact
            damping, whatever this says.
        factor_decay: long-run decay of the running averages, in [0, 1].
        factor_every: steps between statistics, >= 1.
        inverse_every: steps between inverses, >= 1.
        kl_clip: κ > 0, directions are scaled by min(1, √(κ / Σ_l lr_l² ⟨P_l, V_l⟩)); None switches the clip off. Groups
            with different κ share the sum; parameters that train as SGD are neither in it nor scaled.
        norm_constraint: c > 0, the clipped directions are scaled by min(1, c / √(Σ_l ‖P_l‖²)), Euclidean norms over all
            layers together; the lr is not in it. Groups and SGD parameters as for kl_clip. None switches it off.
            (kfac-jax's option of this name is `kl_clip` here.)
        averaging: weight in [0, 1) of a running average of the iterates, 0.99 in Martens & Grosse; None keeps none. See
            `averaged_parameters`.
        max_staleness: s >= 0. With s > 0 inverses are made by a background thread, on a CUDA device on a stream of
            its own: those of step k come into use at step k + s exactly, which waits for them if need be, so that
            training depends on s but never on the speed of the machine. A layer's first inverse is made at once.
            Layers on the CPU and on CUDA devices only; not with `adaptive` nor with structure="tridiagonal".
        adaptive: choose learning rate, momentum and both dampings at every step (Martens & Grosse, sections 6.4-6.6 and
            7). `step` then needs a closure. lr, momentum, nesterov, decoupled, the clips and callables for damping are
            to be left alone; damping is where λ starts. See docs/step_control.md.
        grad_scaler: the `torch.amp.GradScaler` in use; only needed for fisher="empirical" when gradients are unscaled
            (`unscale_`) before the step.
        seed: of the sampler's own generator; None takes `torch.initial_seed()`. Under a process group the rank is
            added.

    `copy.deepcopy((model, optimizer))` and pickle give an optimizer that watches the copied model and continues
    exactly; copy between steps, and a `grad_scaler` along with them. Pass the result of `torch.compile` as the model
    where it is compiled: forwards of which statistics are taken then run uncompiled.

    lr, momentum, damping, kl_clip, norm_constraint, factor_every and inverse_every may be callables of the step; they
    are evaluated at every step and are not part of a checkpoint.

    Attributes:
        clip_scales: per param group, the factor ν that the KL clip applied in the last step (0-dimensional tensor on
            the device), None where nothing was clipped.
        norm_scales: per param group, the factor that the norm constraint applied in the last step, likewise.
        adaptation: with `adaptive`, what is adapted and measured, as plain numbers: `damping` (λ), `gamma` (γ), `alpha`
            and `mu` (α, μ of the last step), `rho` (last reduction ratio), `model_change`; None without.
        skipped_steps: steps that were skipped for non-finite values, GradScaler's included.
        inverse_failures: layers whose inverse could not be renewed, so that the last good one was kept.
        inverse_retries: factors that needed more damping than asked for; with structure="tridiagonal" also links of a
            chain that were left out because nothing positive definite remained.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option outside its range or unknown, a model without parameters, a layer split as described
            above; a model that cannot be watched (scripted, compiled in place, replicated, sharded), parameters on the
            meta device.
    """

    # GradScaler then hands over grad_scale and found_inf instead of waiting for the device and leaving step() out.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        model: nn.Module,
        lr: Number | None = None,
        *,
        params: ParamsT | None = None,
        momentum: Number = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        damping: Number = 1e-3,
        likelihood: str | Likelihood = "categorical",
        output: Callable[[Any], Tensor] | None = None,
        mask: Callable[[Any, Any, Any], Tensor] | None = None,
        fisher: str = "mc",
        fisher_samples: int = 1,
        reduction: str = "mean",
        structure: str = "kfac",
        sharing: str = "expand",
        solve: str = "inverse",
        factor_decay: float = 0.95,
        factor_every: Count = 1,
        inverse_every: Count = 10,
        kl_clip: Number | None = 1e-3,
        norm_constraint: Number | None = None,
        averaging: float | None = None,
        max_staleness: int = 0,
        adaptive: bool = False,
        grad_scaler: torch.amp.GradScaler | None = None,
        seed: int | None = None,
    ) -> None:
        own = ("self", "__class__", "model", "params")
        arguments = {key: value for key, value in locals().items() if key not in (*own, "own")}
        settings = check_arguments(model, params, arguments)
        self._arguments = arguments
        self.factor_decay = settings.factor_decay
        self.adaptation: control.Adaptation | None = None
        self._averaging = None if settings.averaging is None else IterateAverage(settings.averaging)
        self._replayer = Replayer(model, output, mask)
        super().__init__(model, settings)
        self.register_state_dict_post_hook(_add_own_part)  # the first one: later hooks see the whole checkpoint
        if self._adaptive:
            self.adaptation = control.Adaptation.start(self.param_groups)
        self.clip_scales: list[Tensor | None] = [None] * len(self.param_groups)
        self.norm_scales: list[Tensor | None] = [None] * len(self.param_groups)
        self._cover()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as in torch. Call it between steps: statistics not yet committed by `step` are dropped.

        Args:
            param_group: "params" and any of the options a group may set.

        Raises:
            TypeError, ValueError: as at construction; the optimizer is then as it was.
        """
        if self._adaptive and isinstance(param_group, dict):
            control.check_options(f"KFAC: params[{len(self.param_groups)}]", param_group)
            if self.adaptation is not None:
                param_group = {"damping": self.adaptation.damping, **param_group}
        super().add_param_group(param_group)
        if self._recorder is not None:  # else under construction
            self.clip_scales.append(None)
            self.norm_scales.append(None)

    @overload
    def step(self, closure: None = ...) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Commit pending statistics, renew inverses when due, and update the parameters.

        Args:
            closure: re-evaluates the model and returns the loss, as in torch; called once, under grad mode. With
                `adaptive` it is called again after every fifth step, from the same random numbers, and its forwards are
                run again; of the model's and the optimizer's state only what the first call did stays.

        Returns:
            What the closure returned first, None without one.

        Raises:
            RuntimeError: no statistics were ever recorded; the message names the likely causes. A covered layer's
                parameters are no longer the model's.
            TypeError, ValueError: an option that a scheduler or callable has moved out of its range.
            ValueError: a sparse gradient; fisher="empirical" with gradients unscaled by a GradScaler that was not
                passed; `adaptive` without a closure, under a GradScaler or under an lr scheduler.
            RuntimeError, TypeError: with `adaptive`, a closure that does not call the model or returns no loss, a model
                that cannot be differentiated in forward mode or twice.
        """
        if self._averaging is not None and self._averaging.swapped:
            raise RuntimeError("KFAC.step: inside averaged_parameters() the parameters are not those to be trained")
        loss: float | None = None
        trial: control.Trial | None = None
        if self._adaptive:
            trial = control.Trial(closure, self._replayer, self._live_recorder(), self.model, self._parameters())
            loss = trial.returned
        elif closure is not None:
            with torch.enable_grad():
                loss = closure()
        timing = nullcontext() if self._clock is None else self._clock.active()
        try:
            with torch.no_grad(), without_autocast(self._home()), timing:
                self._step(trial)
        finally:
            self._replayer.calls = []  # they hold the batch
        if self._clock is not None:
            if self._background is not None:
                self._clock.add("background", self._background.seconds)
            self._clock.finish()
        return loss

    def count_replay(self) -> None:
        """Count a step that a CUDA graph has taken; call it after each replay. See docs/cuda.md.

        Raises:
            RuntimeError: the step was not one that a graph can take the place of: `next_step_is_plain` is False.
        """
        if not self.next_step_is_plain:
            raise RuntimeError(
                "KFAC.count_replay: statistics or inverses are due at this step, which a CUDA graph does not take; "
                "replay only while next_step_is_plain is True, and take the other steps with step()"
            )
        self._counters["step"] += 1
        self._announce_due()

    def _refuse_capture(self) -> None:
        background = self._background
        refuse_capture(
            {
                "statistics or inverses are due": not self.next_step_is_plain,
                "averaging= counts the iterates on the host": self._averaging is not None,
                "phases are being timed": self._clock is not None,
                "inverses are being made in the background": background is not None and bool(background.pending),
                "no plain step was taken before": not self._ledger.is_open
                or lacks_buffers(self.param_groups, self.state),
            }
        )

    def _step(self, trial: control.Trial | None) -> None:
        if capturing(self._home()):
            self._refuse_capture()
        self._check_before_step()
        # Set by GradScaler for the duration of the call.
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None and not isinstance(found_inf, Tensor):
            found_inf = torch.as_tensor(found_inf)  # the sum over no devices, when there is no gradient, is the int 0
        if self.adaptation is not None:
            control.check_groups(self.param_groups, self.adaptation)
            control.check_scale(scale, found_inf)
        collected = self._collect(scale, found_inf)
        if scale is not None:
            unscale(self.param_groups, scale)
        arguments: dict[str, Any] = {
            "structure": self.structure,
            "layers": self._coverage.layers,
            "groups": self.param_groups,
            "state": self.state,
            "fresh": collected.fresh,
            "factor_decay": self.factor_decay,
            "step": self._counters["step"],
        }
        if self.adaptation is None or trial is None:
            outcome = advance(**arguments, found_inf=found_inf, rows=collected.rows, background=self._background)
            if outcome.verdict is not None:
                self._ledger.note(outcome.verdict, probing=found_inf is not None)
        else:
            outcome = control.advance_adaptively(self.adaptation, **arguments, likelihood=self.likelihood, trial=trial)
        if capturing(self._home()):  # nothing was run; `count_replay` counts
            self._show(outcome)
            return
        if outcome.applied:
            self._eager = self._eager and not collected.fresh
            self._count(outcome)
        else:
            self._counters["skipped_steps"] += 1
        self._report_unseen(collected, outcome.applied)
        self._announce_due()
        if outcome.applied or found_inf is None:  # GradScaler probes for overflow on purpose
            self._reporter.outcome(outcome, self.model, self._parameters())

    def _count(self, outcome: Outcome) -> None:
        """Take note of a step that was taken."""
        self._counters["step"] += 1
        self._counters["inverse_retries"] += outcome.retries
        self._counters["inverse_failures"] += outcome.failures
        if self._averaging is not None:
            self._averaging.update(self._parameters(), outcome.verdict)
        self._show(outcome)

    def _show(self, outcome: Outcome) -> None:
        self.clip_scales[:] = outcome.clip_scales  # in place: wrappers of frameworks share the list
        self.norm_scales[:] = outcome.norm_scales

    def diagnostics(self) -> dict[str, Any]:
        """What the optimizer did last and what it holds, as plain numbers. Waits for the device; nothing changes.

        Returns:
            `step` (steps taken), `skipped_steps`, `inverse_failures`, `inverse_retries`; `groups`: lr, momentum,
            damping, weight_decay, kl_clip and `clip_scale`, the factor that the KL clip applied, per param group;
            `layers`: per layer `damping` (λ with the decay that joins it), `pi` and `condition` (below), `updates`
            (statistics in its averages), `inverse_age` (steps since the statistics that its inverse is made of) and
            `bytes`; `max_staleness` and `pending`, the steps whose inverses are not in use yet; `bytes` of all;
            `seconds` by phase of the last step, None unless `time_phases` was called; `adaptation`, the attribute of
            that name as a dict, and its `rho`, both None without `adaptive`.

            π is that of the factors as they are now, of a layer in groups the geometric mean. The condition number is
            that of the damped block, of the worst group: exact from the eigenvalues with solve="eigen"; with "inverse"
            the norms of the damped factors now times those of the inverses in use, estimated from below by 20 steps of
            the power method. None before the first inverse, and π where the block has only one factor.
        """
        return diagnose(
            layers=self._coverage.layers,
            groups=self.param_groups,
            state=self.state,
            counters=self._counts(),
            clip_scales=self.clip_scales,
            background=self._background,
            clock=self._clock,
            adaptation=self.adaptation,
        )

    def time_phases(self, enabled: bool = True) -> None:
        """Measure from now on where a step's time goes, for `diagnostics`; off again with False.

        Phases are "statistics" (also inside the forward, and for fisher="empirical" the backward), "factorise",
        "precondition", "update", with `max_staleness` "wait" and "background", the time that the thread took for the
        inverses now in use. On an accelerator the host then waits for the device at the borders of each phase.

        Args:
            enabled: whether to measure.
        """
        self._clock = Clock(self._home()) if options.flag("KFAC.time_phases: enabled", enabled) else None
        self._live_recorder().clock = self._clock

    def memory(self) -> MemoryReport:
        """Bytes that the optimizer holds at present, by layer; `kronfac.optim.predict_memory` knows beforehand."""
        return held(self._coverage.layers, self.state, self._background)

    def averaged_parameters(self) -> AbstractContextManager[None]:
        """The parameters hold their averages inside, and afterwards, also after an exception, what they held before.

        For evaluation and for saving the averaged model; `step` is refused inside. Buffers, such as the running
        statistics of batch norm, are not averaged.

        Returns:
            A context manager. Entering it raises RuntimeError before the first step, and when nested.

        Raises:
            RuntimeError: the optimizer was made without `averaging`.
        """
        if self._averaging is None:
            raise RuntimeError("KFAC.averaged_parameters: no averages are kept; make the optimizer with averaging=0.99")
        return self._averaging.swap(self._parameters())

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Continue from a checkpoint; it is checked whole before anything is changed.

        ``state_dict()`` holds everything needed to continue bit for bit, as tensors and plain types
        (``torch.load(weights_only=True)``). Callables of the step are not stored, only the values they had last, and
        neither are statistics that no step has committed yet: save between steps. A checkpoint loads on another device
        too; on another kind of device the sampler's stream cannot be continued and is seeded from the checkpoint's seed
        and step.

        Args:
            state_dict: what `state_dict` returned.

        Raises:
            ValueError: what does not fit, by its path in the checkpoint; the optimizer is then as it was.
        """
        hooks = self._optimizer_load_state_dict_pre_hooks
        for hook in hooks.values():  # before the check: they exist to make a checkpoint fit
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        loaded = state_check.check(
            state_dict,
            structure=self.structure,
            generator=self._generator,
            layers=self._coverage.layers,
            groups=self.param_groups,
            averaging=self._averaging is not None,
            adaptive=None if self.adaptation is None else [field.name for field in dataclasses.fields(self.adaptation)],
        )
        if loaded.adaptive is not None:
            self.adaptation = control.Adaptation(**loaded.adaptive)  # type: ignore[arg-type]
        checkpoint.restore(
            loaded,
            generator=self._generator,
            layers=self._coverage.layers,
            parameters=self._parameters(),
            averaging=self._averaging,
            background=self._background,
        )
        self._eager = loaded.eager
        self._counters.update(loaded.counters)  # in place: wrappers of frameworks share it
        self._counters["step"] += loaded.unsettled
        self._counters["skipped_steps"] -= loaded.unsettled
        self._ledger.start(loaded.unsettled, self._home())
        self._live_recorder().clear()
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        try:
            super().load_state_dict(loaded.base)
        finally:
            self._optimizer_load_state_dict_pre_hooks = hooks
        check_layers(self._coverage.layers, self.param_groups)
        self._announce_due()

    def __reduce__(self) -> tuple[Any, ...]:
        """For copy.deepcopy and pickle: a copy watches the copied model and continues exactly. Copy between steps."""
        groups = [{**group, **schedules} for group, schedules in zip(self.param_groups, self._schedules, strict=True)]
        return rebuild, (type(self), self.model, groups, self._arguments, self.state_dict(), self._reporter.said)

    def __copy__(self) -> NoReturn:
        raise TypeError(
            "KFAC: a shallow copy would be a second optimizer of the same parameters; use copy.deepcopy((model, "
            "optimizer)), whose optimizer watches the copied model"
        )

    def __repr__(self) -> str:
        """Layers covered and the options of each group; callables are shown with the value they had last."""
        head = (
            f"KFAC (\nstructure: {self.structure.name}, fisher: {self.fisher}, likelihood: {self.likelihood!r}, "
            f"layers: {len(self._coverage.layers)}, uncovered parameters: {len(self._coverage.uncovered)}"
        )
        return super().__repr__().replace("KFAC (", head, 1)


def _add_own_part(optimizer: Optimizer, state_dict: StateDict) -> None:
    assert isinstance(optimizer, KFAC)
    state_dict[checkpoint.KEY] = checkpoint.pack(
        structure=optimizer.structure,
        counters=optimizer._counts(),
        unsettled=optimizer._ledger.look(),
        eager=optimizer._eager,
        generator=optimizer._generator,
        layers=optimizer._coverage.layers,
        parameters=optimizer._parameters(),
        averaging=optimizer._averaging,
        background=optimizer._background,
        adaptive=None if optimizer.adaptation is None else dataclasses.asdict(optimizer.adaptation),
    )
