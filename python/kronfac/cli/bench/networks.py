"""Networks that operators and steps are measured on, and the sizes of their Kronecker factors."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut, which projects where sizes change (He et al., arXiv:1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolution beside a shortcut; the middle one strides."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, 4 width, H / stride, W / stride)."""
        y = functional.relu(self.norm1(self.conv1(x)))
        y = functional.relu(self.norm2(self.conv2(y)))
        return functional.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def resnet20() -> nn.Module:
    """ResNet-20 for 10 classes of 3×32×32 images: three groups of three basic blocks of width 16, 32, 64."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    inputs = 16
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        for block in range(3):
            layers.append(BasicBlock(inputs, width, stride if block == 0 else 1))
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def resnet50() -> nn.Module:
    """ResNet-50 for 1000 classes of 3×224×224 images."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inputs = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(inputs, width, stride if block == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def autoencoder() -> nn.Module:
    """784-1000-500-250-30-250-500-1000-784, linear in the code and at the end (Martens & Grosse, arXiv:1503.05671)."""
    widths = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh() if outputs not in (30, 784) else nn.Identity()]
    return nn.Sequential(*layers)


def wide_mlp() -> nn.Module:
    """784 inputs, four hidden layers of 1024, 10 classes."""
    layers: list[nn.Module] = []
    for inputs in (784, 1024, 1024, 1024):
        layers += [nn.Linear(inputs, 1024), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(1024, 10))


class EncoderLayer(nn.Module):
    """Self-attention and a two-layer network, each after a norm and beside a shortcut; every projection is a Linear."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries, self.keys, self.values = (nn.Linear(width, width) for _ in range(3))
        self.merge = nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) to the same."""
        y = self.norm1(x)
        parts = (
            part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.queries, self.keys, self.values)
        )
        attended = functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(-2)
        x = x + self.merge(attended)
        out: Tensor = x + self.narrow(functional.gelu(self.widen(self.norm2(x))))
        return out


class Encoder(nn.Module):
    """Tokens to logits per token: embedding, learned positions, four layers of width 256, a linear head."""

    def __init__(
        self, vocabulary: int = 1000, width: int = 256, layers: int = 4, heads: int = 4, length: int = 64
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.layers = nn.Sequential(*(EncoderLayer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T) of token numbers to (N, T, vocabulary)."""
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.layers(x)))
        return logits


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": resnet20,
    "resnet50": resnet50,
    "autoencoder": autoencoder,
    "mlp": wide_mlp,
    "transformer": Encoder,
}


def layer_shapes(name: str) -> list[tuple[int, int]]:
    """(out, in) of the gradient matrix of every Linear and Conv2d, the bias counted as a column of its own."""
    with torch.device("meta"):
        network = NETWORKS[name]()
    return [
        (module.weight.shape[0], module.weight[0].numel() + (module.bias is not None))
        for module in network.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]


def factor_sizes(name: str) -> list[int]:
    """The orders of all Kronecker factors, layer by layer: of the inputs, then of the outputs."""
    return [size for outputs, inputs in layer_shapes(name) for size in (inputs, outputs)]
