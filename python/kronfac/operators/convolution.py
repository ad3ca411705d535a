"""Convolutions whose second derivatives are ordinary convolutions.

torch's own double backward of a convolution forms the gradients with respect to input and weight by convolving with a
kernel of the size of the image over the examples as channels. A convolution y = x * W is bilinear, and so are its two
derivatives; each of the three is the derivative of the others. Written so, a second derivative runs in the kernels
that the first one runs in (`convolution_backward`), at every order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class _Geometry:
    """The arguments of `aten::convolution` behind the bias."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def arguments(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
    """The output (N, O, *) of x (N, C, *) and weight."""
    if _differentiated(x, weight, bias):
        y: Tensor = _Convolution.apply(x, weight, bias, geometry)  # type: ignore[no-untyped-call]
        return y
    plain: Tensor = torch.ops.aten.convolution.default(x, weight, bias, *geometry.arguments())
    return plain


def _input_gradient(g: Tensor, weight: Tensor, x: Tensor, geometry: _Geometry) -> Tensor:
    """The gradient with respect to x, of which only the shape counts."""
    if _differentiated(g, weight):
        gradient: Tensor = _InputGradient.apply(g, weight, x.detach(), geometry)  # type: ignore[no-untyped-call]
        return gradient
    return _backward(g, x, weight, geometry, (True, False, False))[0]


def _weight_gradient(g: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
    """The gradient with respect to the weight, of which only the shape counts."""
    if _differentiated(g, x):
        gradient: Tensor = _WeightGradient.apply(g, x, weight.detach(), geometry)  # type: ignore[no-untyped-call]
        return gradient
    return _backward(g, x, weight, geometry, (False, True, False))[1]


def _backward(g: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry, mask: tuple[bool, ...]) -> Sequence[Tensor]:
    parts: Sequence[Tensor] = torch.ops.aten.convolution_backward.default(
        g, x, weight, None, *geometry.arguments(), mask
    )
    return parts


def _differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return _convolve(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias, _ = ctx.needs_input_grad
        return (
            _input_gradient(g, weight, x, ctx.geometry) if to_x else None,
            _weight_gradient(g, x, weight, ctx.geometry) if to_weight else None,
            g.sum((0, *range(2, g.ndim))) if to_bias else None,
            None,
        )


class _InputGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, weight: Tensor, x: Tensor, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(g, weight)
        ctx.geometry = geometry
        return _input_gradient(g, weight, x, geometry)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        g, weight = ctx.saved_tensors
        to_g, to_weight, _, _ = ctx.needs_input_grad
        return (
            _convolve(u, weight, None, ctx.geometry) if to_g else None,
            _weight_gradient(g, u, weight, ctx.geometry) if to_weight else None,
            None,
            None,
        )


class _WeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(g, x)
        ctx.geometry = geometry
        return _weight_gradient(g, x, weight, geometry)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        g, x = ctx.saved_tensors
        to_g, to_x, _, _ = ctx.needs_input_grad
        return (
            _convolve(x, u, None, ctx.geometry) if to_g else None,
            _input_gradient(g, u, x, ctx.geometry) if to_x else None,
            None,
            None,
        )


def _call(
    dimensions: int,
    transposed: bool,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor | None:
    """`torch.convNd` or `torch.conv_transposeNd` by the functions above; None where it has to be torch's."""
    if not (
        isinstance(input, Tensor)
        and isinstance(weight, Tensor)
        and input.ndim == weight.ndim == dimensions + 2
        # Elsewhere than on the CPU this was not measured; in autocast the derivatives would meet mixed types.
        and input.device.type == weight.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not isinstance(padding, str)
        # Inside a function transform of the model's own.
        and torch._C._functorch.maybe_current_level() is None
        and _differentiated(input, weight, bias)
    ):
        return None
    stride, padding, output_padding, dilation = (
        _each(value, dimensions) for value in (stride, padding, output_padding, dilation)
    )
    return _convolve(input, weight, bias, _Geometry(stride, padding, dilation, transposed, output_padding, groups))


def _each(value: int | Iterable[int], dimensions: int) -> tuple[int, ...]:
    """One number per axis, as torch spreads it."""
    if isinstance(value, int):
        return (value,) * dimensions
    spread = tuple(value)
    return spread * dimensions if len(spread) == 1 else spread


def _plain(dimensions: int) -> Callable[..., Tensor | None]:
    # The order of dilation and groups differs between torch.convNd and torch.conv_transposeNd.
    def call(
        input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ) -> Tensor | None:
        return _call(dimensions, False, input, weight, bias, stride, padding, 0, groups, dilation)

    return call


def _transposed(dimensions: int) -> Callable[..., Tensor | None]:
    def call(*arguments: Any, **options: Any) -> Tensor | None:
        return _call(dimensions, True, *arguments, **options)

    return call


_REPLACED: Mapping[Any, Callable[..., Tensor | None]] = {
    torch.conv1d: _plain(1),
    torch.conv2d: _plain(2),
    torch.conv3d: _plain(3),
    torch.conv_transpose1d: _transposed(1),
    torch.conv_transpose2d: _transposed(2),
    torch.conv_transpose3d: _transposed(3),
}


class BilinearConvolutions(TorchFunctionMode):
    """Within it, convolutions are those of this file."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Replace the calls that lead to `aten::convolution`."""
        options = kwargs or {}
        replacement = _REPLACED.get(func)
        if replacement is not None:
            result = replacement(*args, **options)
            if result is not None:
                return result
        return func(*args, **options)
