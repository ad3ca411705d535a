"""The Fisher matrix of a model's own distribution as a linear operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.curvature import Likelihood, resolve_likelihood
from kronfac.operators.base import BatchGraph, CurvatureOperator, Engine
from kronfac.operators.data import Batch, BatchSize
from kronfac.operators.ggn import pushforward_graph
from kronfac.operators.options import EngineOptions
from kronfac.operators.program import refuse_constant

KINDS = ("mc", "exact", "empirical")

_CALLER = "kronfac.operators.fisher"


def fisher(
    model: nn.Module,
    likelihood: str | Likelihood,
    data: Any,
    params: Iterable[str | Tensor] | None = None,
    *,
    kind: str = "mc",
    samples: int = 1,
    seed: int = 0,
    output: Callable[[Any], Tensor] | None = None,
    mask: Callable[[Any, Any], Tensor] | None = None,
    reduction: str = "mean",
    batch_size: BatchSize | None = None,
    keep_graph: bool | None = None,
    chunk_size: int | None = None,
    memory_limit: int | None = None,
    batch_norm: str = "running",
    dtype: torch.dtype | str | None = None,
    distributed: Any = True,
) -> CurvatureOperator:
    """The Fisher matrix (1/M) Σ_n E[∇log p(y|x_n) ∇log p(y|x_n)ᵀ], with respect to the chosen parameters.

    The gradient is that of a whole example, summed over its terms (tokens, pixels), and M counts the terms of all
    examples. "mc" draws y from the model's own distribution, "exact" takes the expectation, which makes it the
    generalised Gauss-Newton matrix of the loss (Martens, arXiv:1412.1193, section 9), and "empirical" takes the targets
    of the data, which is no Fisher matrix but is often called one. The draws depend on the seed and the number of the
    batch (and of the chunk, where batches are cut) alone, so that all products are of one matrix. The model is run and
    left as by `kronfac.operators.hessian`.

    Args:
        model: the model.
        likelihood: as in `kronfac.KFAC`: what the loss is the negative logarithm of.
        data: as in `kronfac.operators.hessian`; only "empirical" and `mask` look at the targets.
        params: as in `kronfac.operators.hessian`.
        kind: "mc", "exact" or "empirical".
        samples: draws per example of "mc", >= 1; the matrix is their average.
        seed: of the draws of "mc".
        output: callable(model output) -> logits, for models that return more than logits.
        mask: callable(inputs, targets) -> bool tensor that is False on padding.
        reduction: "mean", as above, or "sum": without the 1/M.
        batch_size: as in `kronfac.operators.hessian`: what several batches are weighted by (with a mask: the number of
            terms that are left).
        keep_graph: as in `kronfac.operators.hessian`.
        chunk_size: as in `kronfac.operators.hessian`.
        memory_limit: as in `kronfac.operators.hessian`.
        batch_norm: as in `kronfac.operators.hessian`.
        dtype: as in `kronfac.operators.hessian`.
        distributed: as in `kronfac.operators.hessian`.

    Returns:
        The operator, at the parameters the model has at each product.

    Raises:
        TypeError: an argument or the model's output of the wrong type, an iterator that can be read only once.
        ValueError: as `kronfac.operators.hessian`; an unknown kind or likelihood, an output that does not fit it.
        RuntimeError: the model cannot be differentiated twice.
    """
    if kind not in KINDS:
        raise ValueError(f"{_CALLER}: kind: expected one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    for name, value, least in (("samples", samples, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{_CALLER}: {name}: expected an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{_CALLER}: {name}: expected at least {least}, got {value}")
    for name, function in (("output", output), ("mask", mask)):
        if function is not None and not callable(function):
            raise TypeError(f"{_CALLER}: {name}: expected a callable or None, got {type(function).__name__}")
    scores = _Scores(resolve_likelihood(likelihood), kind, samples, seed, output)
    engine = _FisherEngine(
        scores,
        mask,
        model,
        scores,
        data,
        params,
        EngineOptions(reduction, batch_size, keep_graph, chunk_size, memory_limit, batch_norm, dtype, distributed),
        caller=_CALLER,
    )
    return CurvatureOperator(engine, tuple(range(len(engine.chosen))))


class _Scores:
    """Stands where a loss does: z_sn = Σ u_sn · logits_n, whose derivative is that of example n's -log p at draw s."""

    def __init__(
        self, likelihood: Likelihood, kind: str, samples: int, seed: int, output: Callable[[Any], Tensor] | None
    ) -> None:
        self.likelihood, self.kind, self.samples, self.seed, self.output = likelihood, kind, samples, seed, output
        self.stream = (0, 0)
        self.comparing = False
        self.mask: Tensor | None = None
        self.z: list[Tensor] = []
        self.terms = 0.0

    def __call__(self, out: Any, targets: Any) -> Tensor:
        logits = out if self.output is None else self.output(out)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"{_CALLER}: model: expected a tensor of logits, got a {type(logits).__name__}; pass output=lambda "
                "out: ... to pick the logits from what the model returns"
            )
        fixed = logits.detach()
        mask = None if self.mask is None else self.mask.to(fixed.device)
        self.likelihood.check(fixed)
        if mask is not None:
            self.likelihood.check_mask(fixed, mask)
        self.terms = float(self.likelihood.terms(fixed, mask))
        # Where the mask is False, logits may be anything: 0 · inf would be NaN.
        self.z = []
        remaining = self._gradients(fixed, targets, mask)
        while True:
            with torch.no_grad():  # around the whole loop it would be in force for z as well
                u = next(remaining, None)
            if u is None:
                return torch.stack(self.z).sum()
            products = torch.where(u == 0, torch.zeros_like(logits), u.to(logits.dtype) * logits)
            self.z.append(products.reshape(len(products), -1).sum(1))

    def _gradients(self, logits: Tensor, targets: Any, mask: Tensor | None) -> Iterator[Tensor]:
        if self.comparing:
            yield self._comparable(logits, mask)
        elif self.kind == "exact":
            yield from self.likelihood.exact_gradients(logits, mask)
        elif self.kind == "empirical":
            yield self.likelihood.target_gradients(logits, targets, mask)
        else:
            # A stream for every batch: a block, a rebuilt graph and a later pass draw the same.
            number, part = self.stream
            seed = (self.seed + number * _PRIME + part * _SECOND_PRIME) % 2**63
            generator = torch.Generator(logits.device).manual_seed(seed)
            for _ in range(self.samples):
                yield self.likelihood.sample_gradients(logits, generator, mask)

    def _comparable(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        """Stands for draws in a comparison: a matter of each example alone, with neither chance nor targets."""
        entries = torch.arange(logits[0].numel(), dtype=logits.dtype, device=logits.device)
        vector = torch.cos(entries).view(logits.shape[1:]).expand_as(logits)
        # With a mask through the likelihood, which knows where it applies.
        return vector if mask is None else self.likelihood.fisher_product(logits, vector, mask)


# They keep the streams of (seed, batch, chunk) apart from those of (seed + 1, batch - 1, chunk) and the like.
_PRIME = 2_654_435_761
_SECOND_PRIME = 4_294_967_291


class _FisherEngine(Engine):
    def __init__(self, scores: _Scores, mask: Callable[[Any, Any], Tensor] | None, *args: Any, **kwargs: Any) -> None:
        self._scores, self._mask = scores, mask
        super().__init__(*args, **kwargs)

    def build(self, batch: Batch, chosen: Mapping[str, Tensor]) -> BatchGraph:
        scores = self._scores
        scores.stream = (batch.number, batch.part)
        scores.mask = None if self._mask is None else self._mask(batch.inputs, batch.targets)
        evaluation = self._program.evaluate(batch, chosen)
        z, scores.z = scores.z, []
        if len(chosen) == len(self.chosen):
            refuse_constant(evaluation.loss, self.caller)
        draws = scores.samples if scores.kind == "mc" and not scores.comparing else 1
        count = draws * (scores.terms if self._reduction == "mean" else 1.0)
        scale = 1.0 / count if count else 0.0  # a batch of which the mask leaves nothing
        return pushforward_graph(z, evaluation.leaves, lambda pushed: [part * scale for part in pushed])

    def comparable(self, batch: Batch) -> BatchGraph:
        """The matrix of each example's gradient at one fixed direction of its logits."""
        self._scores.comparing = True
        try:
            return self.build(batch, self.chosen)
        finally:
            self._scores.comparing = False
