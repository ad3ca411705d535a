"""Statistics of a model's layers over data, as the blocks of Kronecker-factored operators."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.curvature import LayerAdapter, Likelihood, Pending, find_layers, resolve_likelihood, unrecorded
from kronfac.curvature.factors import take_statistics
from kronfac.curvature.pairs import RotatedSquares
from kronfac.operators.data import DataSource, to_device
from kronfac.operators.fisher import KINDS
from kronfac.operators.isolation import (
    RandomStreams,
    accelerator_devices,
    differentiable_twice,
    evaluation_mode,
    preserved_streams,
    refuse_batch_statistics,
)
from kronfac.operators.kronecker import BlockForm, EigenForm, KroneckerOperator, LayerBlock, ProductForm
from kronfac.operators.parameters import select_parameters
from kronfac.operators.program import Program, differentiate, refuse_wrapper
from kronfac.operators.ranks import Ranks, bits

_SECOND_MOMENT = "S"
_NAMED = 5  # parameters that an error message names
_PRIME = 2_654_435_761  # keeps the streams of (seed, rank) apart from those of (seed + 1, rank - 1)


class FactorStatistics:
    """Takes what the operators are made of; checks all arguments first.

    Args: as `kronfac.operators.kfac`, with the name of the public function for error messages.
    """

    def __init__(
        self,
        caller: str,
        model: nn.Module,
        likelihood: str | Likelihood,
        data: Any,
        params: Iterable[str | Tensor] | None,
        *,
        mask: Callable[[Any, Any], Tensor] | None,
        reduction: str,
        distributed: bool,
        **options: Any,
    ) -> None:
        self.caller = caller
        self.model = refuse_wrapper(model, caller)
        _check_options(caller, mask=mask, reduction=reduction, **options)
        self._chosen, self._layout = select_parameters(self.model, params, caller)
        if not isinstance(distributed, bool):
            raise TypeError(f"{caller}: distributed: expected True or False, got {distributed!r}")
        self._ranks = Ranks(distributed, self._layout.device, caller)
        with self._ranks.together(self._shared()):
            self._read(data)
        self._mask, self._reduction, self._scale = mask, reduction, 1.0
        self._batch: tuple[Any, Any] = (None, None)
        self._options: dict[str, Any] = {
            "likelihood": resolve_likelihood(likelihood),
            "fisher": options["kind"],
            "fisher_samples": options["samples"],
            "mask": None if mask is None else self._mask_now,
            # Ranks with the same draws for different examples would be less random than one process.
            "seed": (options["seed"] + self._ranks.before(1) * _PRIME) % 2**63,
            **{name: options[name] for name in ("sharing", "output")},
        }
        with _trainable(self.model, self._chosen):
            self._layers = find_layers(self.model)
            self._owners = self._find_owners()

    def _read(self, data: Any) -> None:
        owners = (data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None))
        generators = [getattr(owner, "generator", None) for owner in owners]
        own = {id(found): found for found in generators if isinstance(found, torch.Generator)}
        self._streams = RandomStreams(accelerator_devices(self.model), tuple(own.values()))
        with preserved_streams(self._streams):
            self._source = DataSource(data, None, self.caller)
        if not self._source.single or self._ranks.size > 1:
            refuse_batch_statistics(self.model, self.caller)

    def _shared(self) -> dict[str, int]:
        """What must be the same on all ranks; nothing without others."""
        if self._ranks.size == 1:
            return {}
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return {"params": bits(torch.tensor(self._layout.offsets)), "model": bits(*tensors)}

    def products(self) -> dict[str, BlockForm]:
        """K-FAC's block of every layer."""
        pending = self._take(self._layers)
        if pending.terms <= 0:
            raise ValueError(f"{self.caller}: data, mask: expected at least one term that counts, got none")
        self._scale = pending.terms if self._reduction == "sum" else 1.0
        found = pending.factors()
        forms: dict[str, BlockForm] = {}
        for name, adapter in self._layers.items():
            A, G = found[name] if name in found else _zero_factors(adapter)
            if not bool(A.isfinite().all() and G.isfinite().all()):
                raise ValueError(
                    f"{self.caller}: the factors of layer {name!r} are not finite: NaN or infinity in the data or in "
                    "the weights, or an overflow"
                )
            forms[name] = ProductForm(name, A, G * self._scale)
        with self._ranks.together():
            self._refuse_unseen(set(self._layers) - set(found))
        return forms

    def rescaled(self, forms: dict[str, BlockForm]) -> dict[str, BlockForm]:
        """EKFAC's block of every layer that yields pairs."""
        bases: dict[str, EigenForm] = {}
        watched: dict[str, dict[str, RotatedSquares]] = {}
        for name, adapter in self._layers.items():
            if adapter.block == "kronecker" and adapter.has_pairs:
                bases[name] = forms[name].eigen()
                moment = RotatedSquares(adapter)
                moment.rotate(bases[name].left, bases[name].right)
                watched[name] = {_SECOND_MOMENT: moment}
        if not watched:
            return forms
        # Sums in different bases would be of nothing; other processors may find others.
        vectors = [form.left for form in bases.values()] + [
            form.right for form in bases.values() if form.right is not None
        ]
        with self._ranks.together({"eigenvectors": bits(*vectors)} if self._ranks.size > 1 else None):
            pass
        # The draws are those of the first pass: the same seed, batches and outputs.
        pending = self._take({name: self._layers[name] for name in watched}, extra=watched, bare=list(watched))
        sums = pending.scaled_sums()
        rescaled = dict(forms)
        for name, basis in bases.items():
            if name not in sums:  # the output does not depend on it
                continue
            taken = sums[name].extra.get(_SECOND_MOMENT)
            if taken is None:
                raise ValueError(
                    f"{self.caller}: layer {name!r}: expected inputs and gradients that belong to single examples, "
                    "which a call of it does not show; leave it out with params=[...], or use kronfac.operators.kfac"
                )
            rescaled[name] = EigenForm(basis.left, basis.right, taken[0] * (taken[1] * self._scale))
        return rescaled

    def operator(self, label: str, forms: Mapping[str, BlockForm]) -> KroneckerOperator:
        """The operator of these blocks."""
        blocks = [
            LayerBlock.at(name, adapter, self._owners[name], self._layout, forms[name])
            for name, adapter in self._layers.items()
        ]
        return KroneckerOperator(self._layout, blocks, label)

    def _take(self, layers: Mapping[str, LayerAdapter], **further: Any) -> Pending:
        with self._ranks.together(), ExitStack() as stack:
            stack.enter_context(preserved_streams(self._streams))
            stack.enter_context(differentiable_twice(self.model))
            stack.enter_context(_trainable(self.model, self._chosen))
            pending = take_statistics(self.model, layers, self._batches(), **self._options, **further)
        if self._ranks.size > 1:
            pending.all_reduce()
        return pending

    def _batches(self) -> Iterator[tuple[Any, Any]]:
        """The batches on the model's device; checks between two of them that the forward drew no random numbers."""
        devices = accelerator_devices(self.model)
        home = next(iter(self._layers.values())).weight.device
        for _, batch in self._source.batches():
            self._batch = (batch.inputs, batch.targets)
            before = RandomStreams(devices)
            yield to_device(batch.inputs, home), to_device(batch.targets, home)
            if before.moved():
                raise ValueError(
                    f"{self.caller}: model: random numbers were drawn although the model is in eval mode; make the "
                    "forward deterministic (functional dropout needs training=self.training)"
                )

    def _mask_now(self, args: Any, kwargs: Any, out: Any) -> Tensor:
        del args, kwargs
        assert self._mask is not None
        mask = self._mask(*self._batch)
        return mask.to(out.device) if isinstance(mask, Tensor) and isinstance(out, Tensor) else mask

    def _find_owners(self) -> dict[str, tuple[int, ...]]:
        """Positions of the parameters of each layer among the chosen ones.

        Raises:
            ValueError: a chosen parameter, or some of its rows, belongs to no layer.
        """
        positions = {id(parameter): index for index, parameter in enumerate(self._chosen.values())}
        owners = {
            name: tuple(positions[id(parameter)] for parameter in adapter.parameters())
            for name, adapter in self._layers.items()
        }
        covered = [0] * len(positions)
        for name, adapter in self._layers.items():
            for index, position in enumerate(owners[name]):
                shape = self._layout.shapes[position]
                rows = shape[0] if len(shape) else 1
                some = range(rows) if adapter.slices is None else range(rows)[adapter.slices[index]]
                covered[position] += len(some) * (shape.numel() // rows)
        missing = [
            name
            for name, shape, entries in zip(self._layout.names, self._layout.shapes, covered, strict=True)
            if entries != shape.numel()
        ]
        if missing:
            named = ", ".join(f"{name} ({self._reason(name)})" for name in missing[:_NAMED])
            more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
            raise ValueError(
                f"{self.caller}: params: no layer adapter covers {named}{more}; choose the covered layers with "
                f"params={list(self._layers)[:_NAMED]}{'...' if len(self._layers) > _NAMED else ''}, or register an "
                "adapter (kronfac.curvature.register_adapter)"
            )
        return owners

    def _reason(self, name: str) -> str:
        parameter = self._chosen[name]
        holders = [
            (prefix, module)
            for prefix, module in self.model.named_modules()
            if any(parameter is own for own in module.parameters(recurse=False))
        ]
        if len(holders) > 1:
            return "shared by " + " and ".join(repr(prefix) for prefix, _ in holders)
        (_, module), last = holders[0], name.rpartition(".")[2]
        weight = getattr(module, "weight", None)
        if (
            last == "bias"
            and isinstance(weight, Tensor)
            and not any(weight is other for other in self._chosen.values())
        ):
            return "a bias without its weight"
        return f"of {type(module).__name__}"

    def _refuse_unseen(self, names: Collection[str]) -> None:
        """Refuse layers that were not seen at work although the output depends on them: their block is not zero."""
        owned = {self._layout.names[position]: name for name in names for position in self._owners[name]}
        if not owned:
            return
        chosen = {name: self._chosen[name] for name in owned}
        output = self._options["output"]
        program = Program(self.model, lambda out, _: (out if output is None else output(out)).sum(), self.caller)
        with ExitStack() as stack:
            stack.enter_context(preserved_streams(self._streams))
            stack.enter_context(evaluation_mode(program))
            stack.enter_context(differentiable_twice(self.model))
            stack.enter_context(unrecorded())
            for _, batch in self._source.batches():
                evaluation = program.evaluate(batch, chosen)
                found = differentiate([evaluation.loss], evaluation.leaves, [torch.ones_like(evaluation.loss)])
                used = sorted({owned[name] for name, part in zip(chosen, found, strict=True) if part is not None})
                if used:
                    raise ValueError(
                        f"{self.caller}: model: the output depends on layer {used[0]!r}, but not through a call of it "
                        "as a module, which is where its inputs and gradients are seen; call the module, or leave it "
                        "out with params=[...]"
                    )


def _check_options(
    caller: str,
    *,
    kind: str,
    samples: int,
    seed: int,
    output: Any,
    mask: Any,
    sharing: str,
    reduction: str,
) -> None:
    for name, value, known in (
        ("kind", kind, KINDS),
        ("sharing", sharing, ("expand", "reduce")),
        ("reduction", reduction, ("mean", "sum")),
    ):
        if value not in known:
            raise ValueError(f"{caller}: {name}: expected one of {', '.join(map(repr, known))}, got {value!r}")
    for name, number, least in (("samples", samples, 1), ("seed", seed, 0)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{caller}: {name}: expected an integer, got {number!r}")
        if number < least:
            raise ValueError(f"{caller}: {name}: expected at least {least}, got {number}")
    for name, function in (("output", output), ("mask", mask)):
        if function is not None and not callable(function):
            raise TypeError(f"{caller}: {name}: expected a callable or None, got {type(function).__name__}")


def _zero_factors(adapter: LayerAdapter) -> tuple[Tensor, Tensor]:
    A, G = adapter.factor_shapes
    weight = adapter.weight
    return weight.new_zeros(A, dtype=adapter.factor_dtype), weight.new_zeros(G, dtype=adapter.factor_dtype)


@contextmanager
def _trainable(model: nn.Module, chosen: Mapping[str, Tensor]) -> Iterator[None]:
    """Have exactly the chosen parameters require grad inside: the layers are theirs, and the others cost nothing."""
    wanted = {id(parameter) for parameter in chosen.values()}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    changed = [(parameter, flag) for parameter, flag in flags if flag != (id(parameter) in wanted)]
    try:
        for parameter, flag in changed:
            parameter.requires_grad_(not flag)
        yield
    finally:
        for parameter, flag in changed:
            parameter.requires_grad_(flag)
