"""Small models for the curvature tests, and the Kronecker factors of any model straight from their definition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.curvature import KroneckerFactors


def mlp() -> nn.Sequential:
    """Two hidden layers, one of them without bias, an in-place activation."""
    return nn.Sequential(
        nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6, bias=False), nn.ReLU(inplace=True), nn.Linear(6, 4)
    )


def convnet() -> nn.Sequential:
    """Three convolutions with every option that matters, and a head."""
    return nn.Sequential(
        nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 4, (2, 4), padding="same", dilation=(1, 2), bias=False),
        nn.Tanh(),
        nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


class Tokens(nn.Module):
    """(N, T, 3) to (N, T, 4) with attention, so that every position influences every other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.qkv = nn.Linear(6, 18)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of every token."""
        h = self.act(self.embed(x))
        q, k, v = self.qkv(h).chunk(3, -1)
        return self.head(h + torch.softmax(q @ k.mT, -1) @ v)


NegativeLogLikelihood = Callable[[Tensor], Tensor]


def categorical(dim: int) -> NegativeLogLikelihood:
    """-log p of class 0 everywhere: its Hessian does not depend on the class."""
    return lambda z: functional.cross_entropy(
        z.movedim(dim, -1).reshape(-1, z.shape[dim]),
        torch.zeros(z.numel() // z.shape[dim], dtype=torch.long),
        reduction="sum",
    )


def gaussian(variance: float) -> NegativeLogLikelihood:
    """-log p around a target of zeros."""
    return lambda z: z.square().sum() / (2 * variance)


def bernoulli(z: Tensor) -> Tensor:
    """-log p of labels 0."""
    return functional.binary_cross_entropy_with_logits(z, torch.zeros_like(z), reduction="sum")


def definition(
    model: nn.Module, x: Tensor, nll: NegativeLogLikelihood, terms: int, names: list[str] | None = None
) -> dict[str, KroneckerFactors]:
    """A = (1/M) Σ ā āᵀ and G = (1/R) Σ E[g gᵀ], example by example through dense Jacobians and Hessians.

    Args:
        model: float64.
        x: (N, ...).
        nll: -log p of one example as a function of its output (1, ...), summed over its terms.
        terms: M.
        names: layers; all of type Linear and Conv2d when None.

    Returns:
        Factors by layer.
    """
    result = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or (names is not None and name not in names):
            continue
        A, G, R = 0.0, 0.0, 0
        for example in x:
            rows, shape, logits = _look(model, layer, example.unsqueeze(0))
            if layer.bias is not None:
                rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
            A = A + rows.T @ rows

            def shifted(delta: Tensor, layer: nn.Module = layer, example: Tensor = example) -> Tensor:
                handle = layer.register_forward_hook(lambda m, a, out: out + delta)
                try:
                    return model(example.unsqueeze(0))
                finally:
                    handle.remove()

            J = torch.func.jacrev(shifted)(torch.zeros(shape, dtype=x.dtype)).reshape(logits.numel(), *shape)
            H = torch.func.hessian(nll)(logits).reshape(logits.numel(), logits.numel())
            J = J.squeeze(1) if len(shape) < 3 else J.movedim(2, -1) if isinstance(layer, nn.Conv2d) else J
            J = J.reshape(logits.numel(), -1, rows_out := layer.weight.shape[0])  # (outputs, positions, out)
            G = G + torch.einsum("cro,cd,drp->op", J, H, J)
            R += J.shape[1]
            assert rows_out == G.shape[0]
            assert len(rows) == J.shape[1]
        result[name] = KroneckerFactors(A / terms, G / R)
    return result


def _look(model: nn.Module, layer: nn.Module, example: Tensor) -> tuple[Tensor, torch.Size, Tensor]:
    """Rows of a layer's input, shape of its output, and the logits of one example."""
    seen: list[tuple[Tensor, torch.Size]] = []
    handle = layer.register_forward_hook(lambda m, args, out: seen.append((args[0].detach().clone(), out.shape)))
    with torch.no_grad():
        logits = model(example)
    handle.remove()
    (a, shape), *_ = seen
    if isinstance(layer, nn.Conv2d):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        if layer.padding == "same":
            total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
            pads = [total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2]
        else:
            pads = [layer.padding[1], layer.padding[1], layer.padding[0], layer.padding[0]]
        a = functional.pad(a, pads, mode=mode)
        patches = functional.unfold(a, layer.kernel_size, layer.dilation, 0, layer.stride)
        return patches[0].T, shape, logits
    return a.reshape(-1, a.shape[-1]), shape, logits


def relative(one: Tensor, other: Tensor) -> float:
    """Largest difference relative to the largest entry of `other`."""
    one, other = one.detach(), other.detach()
    return float((one - other).abs().max() / other.abs().max())
