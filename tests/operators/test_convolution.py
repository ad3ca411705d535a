"""Convolutions of bilinear parts against torch's own, to the third derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kronfac.operators import hessian
from kronfac.operators.convolution import BilinearConvolutions

CASES: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "2d": lambda: (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 6)),
    "2d, no bias": lambda: (nn.Conv2d(3, 4, (3, 1), bias=False), (2, 3, 5, 4)),
    "2d, stride that does not fit": lambda: (nn.Conv2d(2, 3, 3, stride=2, padding=(1, 0)), (2, 2, 6, 8)),
    "2d, dilation and groups": lambda: (nn.Conv2d(4, 6, 2, dilation=(2, 1), groups=2), (2, 4, 5, 5)),
    "2d, reflected": lambda: (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 4, 4)),
    "1d": lambda: (nn.Conv1d(3, 4, 3, padding=2), (2, 3, 6)),
    "3d": lambda: (nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (2, 2, 3, 4, 3)),
    "transposed 1d": lambda: (nn.ConvTranspose1d(3, 2, 3, stride=2), (2, 3, 4)),
    "transposed 2d": lambda: (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2, dilation=2), (2, 4, 3, 3)),
    "transposed 3d": lambda: (nn.ConvTranspose3d(2, 3, 2), (1, 2, 2, 3, 2)),
    # These stay torch's.
    "padding by name": lambda: (nn.Conv2d(2, 3, 2, padding="same"), (2, 2, 4, 4)),
    "one image": lambda: (nn.Conv2d(2, 3, 3), (2, 5, 5)),
    "empty": lambda: (nn.Conv2d(2, 3, 3), (0, 2, 5, 5)),
}


def derivatives(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and the first three derivatives of a scalar of it along fixed directions."""
    generator = torch.Generator().manual_seed(3)
    leaves = [x, *module.parameters()]
    result = [module(x)]
    scalar = (torch.tanh(result[0]) * torch.randn(result[0].shape, generator=generator, dtype=x.dtype)).sum()
    for _ in range(3):
        parts = torch.autograd.grad(scalar, leaves, create_graph=True)
        result += parts
        directions = [torch.randn(part.shape, generator=generator, dtype=x.dtype) for part in parts]
        scalar = sum(((part * v).sum() for part, v in zip(parts, directions, strict=True)), torch.zeros(()).double())
    return [part.detach() for part in result]


@pytest.mark.parametrize("case", list(CASES))
def test_three_derivatives_are_those_of_torch(case: str) -> None:
    torch.manual_seed(0)
    module, shape = CASES[case]()
    module.double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = derivatives(module, x)
    with BilinearConvolutions():
        found = derivatives(module, x)
    for part, other in zip(found, expected, strict=True):
        torch.testing.assert_close(part, other, rtol=1e-9, atol=1e-11)


def test_output_padding_of_a_transposed_convolution() -> None:
    """There torch 2.13 raises in its double backward ("output_padding is not supported for non-transposed")."""
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((1, 2, 3), (2, 2, 3), (2,))
    )

    def upsample(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv_transpose1d(x, weight, bias, stride=2, output_padding=1)

    with BilinearConvolutions():
        assert upsample(x, weight, bias).shape == F.conv_transpose1d(x, weight, stride=2, output_padding=1).shape
        assert torch.autograd.gradcheck(upsample, (x, weight, bias))
        assert torch.autograd.gradgradcheck(upsample, (x, weight, bias))


def nodes_of(output: Tensor) -> set[str]:
    names, stack = set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None:
            names.add(type(node).__name__)
            stack += [parent for parent, _ in node.next_functions]
    return names


@pytest.mark.parametrize("options", [{}, {"stride": [2]}, {"padding": (1, 1), "groups": 1}])
def test_what_is_replaced(options: dict[str, Any]) -> None:
    x, weight = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3, requires_grad=True)
    with BilinearConvolutions():
        output = F.conv2d(x, weight, **options)
        assert "_ConvolutionBackward" in nodes_of(output)
        torch.testing.assert_close(output, torch.conv2d(x, weight.detach(), **options))
        # Nothing to differentiate, a function transform, mixed precision, no batch: torch's own.
        assert F.conv2d(x, weight.detach()).grad_fn is None
        mapped = torch.func.vmap(lambda image: F.conv2d(image[None], weight))(x)
        assert "_ConvolutionBackward" not in nodes_of(mapped)
        with torch.autocast("cpu", torch.bfloat16):
            assert F.conv2d(x, weight).dtype == torch.bfloat16
        assert "_ConvolutionBackward" not in nodes_of(F.conv2d(x[0], weight))
    assert "_ConvolutionBackward" not in nodes_of(F.conv2d(x, weight))


def test_wrong_shapes_raise_as_without() -> None:
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    with BilinearConvolutions(), pytest.raises(RuntimeError, match="channels"):
        F.conv2d(torch.randn(2, 2, 5, 5), weight)


class Checkpointed(nn.Module):
    """Runs its layers again in every backward."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = checkpoint(self.layers, x, use_reentrant=False)
        return output


def test_a_hessian_with_gradient_checkpointing() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 2, 2), nn.Flatten(), nn.Linear(2, 3)).double()
    data = torch.randn(4, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    parameters = list(layers.parameters())
    flat = torch.cat([part.reshape(-1) for part in parameters])
    v = torch.randn(flat.shape, dtype=torch.float64)
    gradient = torch.autograd.grad(F.cross_entropy(layers(data[0]), data[1]), parameters, create_graph=True)
    inner = torch.cat([part.reshape(-1) for part in gradient]) @ v
    expected = torch.cat([part.reshape(-1) for part in torch.autograd.grad(inner, parameters)])
    for model in (layers, Checkpointed(layers)):
        torch.testing.assert_close(hessian(model, F.cross_entropy, data) @ v, expected, rtol=1e-9, atol=1e-12)
