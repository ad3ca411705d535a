"""What a layer contributes: the one interface between a layer type and everything that uses curvature."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kronfac.ops import covariance, covariance_

Block: TypeAlias = Literal["kronecker", "doubly_factored", "diagonal_input", "dense"]
"""What a layer's Fisher block A ⊗ G is made of.

"kronecker": A (in, in) and G (out, out), or one pair per group, (groups, in, in) and (groups, out, out).
"doubly_factored": A ≈ K ⊗ Ψ, kept as one vector that `InputFactors` reads; G (out, out). Never an adapter's own choice.
"diagonal_input": A is diagonal and kept as the vector (in,); G (out, out).
"dense": A is 1 and the block is G, (out, out) or (groups, out, out): the second moment of the gradient itself.
"""


class LayerAdapter(ABC):
    """Base class of layer adapters: how one module yields Kronecker factors and its gradient as a matrix.

    The layer computes s = W [a; 1] at every shared position (Martens & Grosse, arXiv:1503.05671, section 2.1); W
    and its gradient V are (out, in[+1]) matrices with the bias as last column. A subclass says how the module's
    input turns into rows a and the gradient at its output into rows g; the matrix side works for every module whose
    parameters are a ``weight`` of out rows and an optional ``bias``. Register it with
    `kronfac.curvature.register_adapter`.

    Whether the bias belongs to the layer is settled when the adapter is made: it does when it is trainable then.

    Args:
        module: the layer. `supports` has been asked before.

    Attributes:
        module: the layer.
        in_features: columns of W without the bias, of one group.
        out_features: rows of W, of one group.
        has_bias: whether W's last column is the bias.
        groups: independent factor pairs; 1 for a layer with one pair, whose tensors have no axis for groups.
        sharing: "expand" or "reduce", how the positions of a shared layer enter the statistics. Set by whoever takes
            them.
        block: what the Fisher block is made of.
        sharings: the values of `sharing` that the adapter follows.
        keeps_input: whether `layer_gradient` wants the input.
        has_pairs: whether there is `pairs`. A structure that needs it does without for other layers.
        leading_positions: whether all leading dimensions of input and output are positions, so that the examples may
            be the second one: (T, N, ...). Where whole examples count, a Linear is refused then, and a norm follows.
        slices: the rows of each of its `owners` that the layer has, None for all of them.
        input_shape: (d1, d2) of an input as a matrix, where `block` is "doubly_factored".
        input_offsets: how many consecutive entries of an input belong together: the kernel offsets of a channel.
    """

    block: Block = "kronecker"
    input_shape: tuple[int, int] | None = None
    input_offsets: int = 1
    sharings: tuple[str, ...] = ("expand",)
    keeps_input: bool = False
    has_pairs: bool = False
    leading_positions: bool = False
    slices: tuple[slice, ...] | None = None

    def __init_subclass__(cls) -> None:
        """Pairs of a base class do not describe a layer with statistics of its own."""
        super().__init_subclass__()
        own = vars(cls)
        if "pairs" not in own and "has_pairs" not in own and {"input_statistics", "output_statistics"} & own.keys():
            cls.has_pairs = False

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        weight = self.weight
        self.out_features: int = weight.shape[0]
        self.in_features: int = weight[0].numel() if weight.shape[0] else 0
        owner = self.owners[1]
        self.has_bias: bool = owner is not None and owner.requires_grad
        self.groups: int = 1
        self.sharing: str = "expand"

    @classmethod
    def layers_of(cls, module: nn.Module) -> dict[str, LayerAdapter]:
        """The adapters of a module, by the name that each adds to the module's.

        Args:
            module: supported.

        Returns:
            By default one adapter under the module's own name. A module that is several layers at once returns
            several.
        """
        return {"": cls(module)}

    @classmethod
    def supports(cls, module: nn.Module) -> bool:
        """Whether this very module can be covered; one that cannot is trained by the optimizer's fall-back.

        Args:
            module: an instance of the type that the adapter is registered for, with that type's own forward.

        Returns:
            By default: ``weight`` and ``bias`` are the module's own plain floating-point parameters (not computed
            from others, as under weight normalisation or pruning) and not empty.
        """
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if weight is None or getattr(module, "bias", None) is not bias:
            return False
        return all(
            type(p) is nn.Parameter and p.is_floating_point() and p.layout is torch.strided and p.numel() > 0
            for p in (weight, bias)
            if p is not None
        )

    @property
    def owners(self) -> tuple[Tensor, Tensor | None]:
        """The module's parameters that weight and bias are, or are `slices` of."""
        weight = self.module._parameters.get("weight")
        if weight is None:
            raise KeyError("weight")
        return weight, self.module._parameters.get("bias")

    @property
    def weight(self) -> Tensor:
        """The layer's weight."""
        return self._slice(0, self.owners[0])

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias."""
        bias = self.owners[1]
        return None if bias is None else self._slice(1, bias)

    @property
    def factor_dtype(self) -> torch.dtype:
        """Of the statistics: float64 for a float64 layer, float32 for every other."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @property
    def factor_sizes(self) -> tuple[int, int]:
        """Sizes of A, in[+1], and of G, out; of one group."""
        return self.in_features + int(self.has_bias), self.out_features

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and G."""
        inputs, outputs = self.factor_sizes
        A: tuple[int, ...] = (inputs,) if self.block == "diagonal_input" else (inputs, inputs)
        if self.input_shape is not None:
            A = (self.input_shape[0] ** 2 + self.input_shape[1] ** 2 + 1,)
        return self._grouped(A), self._grouped((outputs, outputs))

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Shape of W and V, (out, in[+1]) or (groups, out, in[+1])."""
        inputs, outputs = self.factor_sizes
        return self._grouped((outputs, inputs))

    @property
    def parts(self) -> tuple[tuple[int, ...], int]:
        """How many entries of an axis of W each covered parameter takes, and which axis."""
        return ((self.in_features, 1) if self.has_bias else (self.in_features,)), -1

    @property
    def reduces(self) -> bool:
        """Whether the statistics are one row per example: A averages over rows, G over loss terms."""
        return self.sharing == "reduce"

    def _grouped(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape if self.groups == 1 else (self.groups, *shape)

    def listen(self, hook: Any) -> list[RemovableHandle]:
        """Call a hook after each call of the layer, as ``hook(module, args, kwargs, output)``.

        Args:
            hook: a `LayerHook`. It must come first of the module's forward hooks: later ones may replace or modify the
                output.

        Returns:
            Handles that take it off again.
        """
        return [self.module.register_forward_hook(hook, prepend=True, with_kwargs=True)]

    # ------------------------------------------------------------------ statistics

    def layer_input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The input of a call of the module: its first argument."""
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{type(self).__name__}: input of {type(self.module).__name__}: expected a tensor, "
                f"got a {type(x).__name__}"
            )
        return x

    def restrict(self, mask: Tensor | None, x: Tensor) -> Tensor | None:
        """The mask for one call of the layer.

        Args:
            mask: the user's, None for none.
            x: the module's input, detached.

        Returns:
            By default the user's mask.
        """
        del x
        return mask

    def layer_gradient(self, g: Tensor, x: Tensor) -> Tensor:
        """What `output_statistics` is given instead of `g`, where ``keeps_input`` is set.

        Args:
            g: gradient at the module's output, detached.
            x: the module's input, detached, which the layer's own graph keeps unchanged.

        Returns:
            By default `g`.
        """
        del x
        return g

    def kept_by(self, output: Tensor) -> Any:
        """What the layer's forward left in its graph and `layer_gradient_with` has a use for; None for nothing.

        Args:
            output: of the module, right after its forward.
        """
        del output
        return None

    def layer_gradient_with(self, g: Tensor, x: Tensor, kept: Any) -> Tensor:
        """`layer_gradient`, where `kept_by` has found something."""
        del kept
        return self.layer_gradient(g, x)

    @abstractmethod
    def input_statistics(self, out: Tensor | None, x: Tensor, mask: Tensor | None) -> Tensor:
        """Add Σ ā āᵀ, ā = [a; 1], over the shared positions; with sharing="reduce" over the means of each example.

        Args:
            out: sums so far, shaped like A, updated in place; None for zeros.
            x: the module's input, detached.
            mask: bool; where it covers the leading dimensions of `x`, positions that are False are left out.

        Returns:
            The sums, unscaled.
        """

    def input_rows(self, x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        """The rows a that `input_statistics` sums over, in pieces; needed only where A is doubly factored.

        Args:
            x: as in `input_statistics`.
            mask: as in `input_statistics`.

        Yields:
            (rows, in) each, without the bias's one.

        Raises:
            NotImplementedError: by default; such layers keep their A.
        """
        raise NotImplementedError(f"{type(self).__name__}.input_rows: not implemented")

    @abstractmethod
    def output_statistics(self, out: Tensor | None, g: Tensor, mask: Tensor | None, scale: float = 1.0) -> Tensor:
        """Add scale·Σ g gᵀ over the shared positions; with sharing="reduce" over the sums of each example.

        Args:
            out: sums so far, shaped like G, updated in place; None for zeros.
            g: gradient at the module's output, detached.
            mask: as in `input_statistics`.
            scale: factor on what is added.

        Returns:
            The sums.
        """

    @abstractmethod
    def positions(self, shape: torch.Size, mask: Tensor | None) -> int:
        """How many shared positions an output has; with sharing="reduce" how many examples.

        Args:
            shape: of the module's output.
            mask: as in `input_statistics`.

        Returns:
            R of this call: how many rows the statistics were taken of.
        """

    def pairs(self, x: Tensor, g: Tensor, mask: Tensor | None, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and gradients at every shared position, some examples at a time.

        Where the mask leaves a position out, its gradient is zero and its input finite, or both are absent.

        Args:
            x: the module's input, detached, the examples first.
            g: gradient at the module's output, detached, the examples first.
            mask: as in `input_statistics`.
            rows: how many positions to hand over at a time, roughly; at least one example.

        Returns:
            Pairs (examples, positions, in) and (examples, positions, out), the inputs without the bias's one; for a
            layer in groups (examples, groups, positions, ·). Any strides.
        """
        raise NotImplementedError(f"{type(self).__name__}.pairs: has_pairs is {self.has_pairs}")

    # ------------------------------------------------------------------ the layer as a matrix

    def parameters(self) -> tuple[Tensor, ...]:
        """What the adapter covers now: weight and bias, the weight alone, or nothing when that is frozen or gone."""
        try:
            weight, bias = self.owners
        except KeyError:  # computed from other parameters since the adapter was made: parametrize, weight_norm, pruning
            return ()
        if not weight.requires_grad:
            return ()
        return (weight,) if bias is None or not bias.requires_grad else (weight, bias)

    def gradient(self) -> Tensor:
        """V, shaped `matrix_shape`, from ``.grad``.

        Raises:
            ValueError: a covered parameter has no gradient.
        """
        grads = [_gradient_of(p, self.module) for p in self._covered()]
        if self.slices is not None:
            grads = [self._slice(index, grad) for index, grad in enumerate(grads)]
        return self._matrix(grads)

    def weight_matrix(self) -> Tensor:
        """W, shaped `matrix_shape`, detached; may be a view of the weight."""
        return self._matrix([self._slice(index, p.detach()) for index, p in enumerate(self._covered())])

    def split(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """The inverse of `gradient` and `weight_matrix`.

        Args:
            matrix: shaped `matrix_shape`.

        Returns:
            The covered parameters in their order, shaped like them (like their ``slices``); views where they can be.

        Raises:
            ValueError: the shape is another.
        """
        if matrix.shape != self.matrix_shape:
            raise ValueError(
                f"{type(self).__name__}.split: matrix: expected shape {self.matrix_shape}, got {tuple(matrix.shape)}"
            )
        return self._split(matrix)

    def _split(self, matrix: Tensor) -> tuple[Tensor, ...]:
        weight, bias = self.owners
        if self.slices is not None:
            weight, bias = self.weight, self.bias
        if not self.has_bias:
            return (_shaped(matrix, weight),)
        part = _shaped(matrix[..., :-1], weight)
        return (part,) if bias is None else (part, _shaped(matrix[..., -1], bias))

    def _covered(self) -> tuple[Tensor, ...]:
        weight, bias = self.owners
        return (weight, bias) if self.has_bias and bias is not None else (weight,)

    def _slice(self, index: int, tensor: Tensor) -> Tensor:
        return tensor if self.slices is None else tensor[self.slices[index]]

    def _matrix(self, parts: list[Tensor]) -> Tensor:
        weight = parts[0].reshape(self._grouped((self.out_features, self.in_features)))
        return weight if len(parts) == 1 else torch.cat((weight, parts[1].reshape(*weight.shape[:-1], 1)), -1)

    def __repr__(self) -> str:
        """Type and sizes."""
        return (
            f"{type(self).__name__}(in_features={self.in_features}, out_features={self.out_features}, "
            f"has_bias={self.has_bias}, groups={self.groups})"
        )


def accumulate(out: Tensor | None, rows: Tensor, bias: bool, scale: float = 1.0) -> Tensor:
    """Add scale·[x 1]ᵀ[x 1] over the rows x (m, d), in place where `out` is given."""
    if out is None:
        return covariance(rows, bias=bias, scale=scale)
    covariance_(out, rows, bias=bias, decay=1.0, scale=scale)
    return out


def _shaped(tensor: Tensor, like: Tensor) -> Tensor:
    """As `reshape_as`, without a call where there is nothing to do."""
    return tensor if tensor.shape == like.shape else tensor.reshape_as(like)


def _gradient_of(parameter: Tensor, module: nn.Module) -> Tensor:
    grad = parameter.grad
    if grad is None:
        raise ValueError(
            f"LayerAdapter.gradient: a parameter of {module} has no .grad; run backward first, or leave the layer out "
            "of this step"
        )
    return grad.detach()
