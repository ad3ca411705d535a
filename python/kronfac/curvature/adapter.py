"""What a layer contributes: the one interface between a layer type and everything that uses curvature."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.ops import covariance, covariance_


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
        in_features: columns of W without the bias.
        out_features: rows of W.
        has_bias: whether W's last column is the bias.
        groups: independent factor pairs; 1 for every layer that is covered so far.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        weight = self.weight
        self.out_features: int = weight.shape[0]
        self.in_features: int = weight[0].numel() if weight.shape[0] else 0
        self.has_bias: bool = self.bias is not None and self.bias.requires_grad
        self.groups: int = 1

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
    def weight(self) -> Tensor:
        """The module's weight."""
        weight = self.module._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The module's bias."""
        return self.module._parameters.get("bias")

    @property
    def factor_dtype(self) -> torch.dtype:
        """Of the statistics: float64 for a float64 layer, float32 for every other."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @property
    def factor_sizes(self) -> tuple[int, int]:
        """Sizes of A, in[+1], and of G, out."""
        return self.in_features + int(self.has_bias), self.out_features

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

    @abstractmethod
    def input_statistics(self, out: Tensor | None, x: Tensor, mask: Tensor | None) -> Tensor:
        """Add Σ [a; 1][a; 1]ᵀ over the shared positions.

        Args:
            out: sums so far (in[+1], in[+1]), updated in place; None for zeros.
            x: the module's input, detached.
            mask: bool; where it covers the leading dimensions of `x`, positions that are False are left out.

        Returns:
            The sums, unscaled.
        """

    @abstractmethod
    def output_statistics(self, out: Tensor | None, g: Tensor, mask: Tensor | None, scale: float = 1.0) -> Tensor:
        """Add scale·Σ g gᵀ over the shared positions.

        Args:
            out: sums so far (out, out), updated in place; None for zeros.
            g: gradient at the module's output, detached.
            mask: as in `input_statistics`.
            scale: factor on what is added.

        Returns:
            The sums.
        """

    @abstractmethod
    def positions(self, shape: torch.Size, mask: Tensor | None) -> int:
        """How many shared positions an output has.

        Args:
            shape: of the module's output.
            mask: as in `input_statistics`.

        Returns:
            R of this call.
        """

    # ------------------------------------------------------------------ the layer as a matrix

    def parameters(self) -> tuple[Tensor, ...]:
        """What the adapter covers at present: weight and bias, the weight alone, or nothing when that is frozen."""
        if not self.weight.requires_grad:
            return ()
        bias = self.bias
        return (self.weight,) if bias is None or not bias.requires_grad else (self.weight, bias)

    def gradient(self) -> Tensor:
        """V (out, in[+1]), from ``.grad``.

        Raises:
            ValueError: a covered parameter has no gradient.
        """
        return self._matrix([_gradient_of(p, self.module) for p in self._covered()])

    def weight_matrix(self) -> Tensor:
        """W (out, in[+1]), detached; a view of the weight where there is no bias."""
        return self._matrix([p.detach() for p in self._covered()])

    def split(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """The inverse of `gradient` and `weight_matrix`.

        Args:
            matrix: (out, in[+1]).

        Returns:
            Views of it, shaped like the covered parameters in their order.

        Raises:
            ValueError: the shape is another.
        """
        expected = (self.out_features, self.in_features + int(self.has_bias))
        if tuple(matrix.shape) != expected:
            raise ValueError(
                f"{type(self).__name__}.split: matrix: expected shape {expected}, got {tuple(matrix.shape)}"
            )
        weight = matrix[:, : self.in_features].unflatten(1, self.weight.shape[1:])  # type: ignore[no-untyped-call]
        return (weight, matrix[:, -1]) if self.has_bias else (weight,)

    def _covered(self) -> tuple[Tensor, ...]:
        bias = self.bias
        return (self.weight, bias) if self.has_bias and bias is not None else (self.weight,)

    def _matrix(self, parts: list[Tensor]) -> Tensor:
        weight = parts[0].reshape(self.out_features, self.in_features)
        return weight if len(parts) == 1 else torch.cat([weight, parts[1].unsqueeze(1)], 1)

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


def _gradient_of(parameter: Tensor, module: nn.Module) -> Tensor:
    if parameter.grad is None:
        raise ValueError(
            f"LayerAdapter.gradient: a parameter of {module} has no .grad; run backward first, or leave the layer out "
            "of this step"
        )
    return parameter.grad.detach()
