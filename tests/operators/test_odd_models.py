"""Models with a structure that a naive substitution of parameters or a second derivative gets wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

import kronfac
from kronfac.operators import fisher, ggn, hessian
from tests.operators.cases import relative_error
from tests.operators.state import unchanged


def row_by_row(model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any) -> Tensor:
    """The Hessian by plain autograd on the model's own parameters, a row at a time."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def flat(parts: Any) -> Tensor:
        filled = [torch.zeros_like(p) if g is None else g for g, p in zip(parts, parameters, strict=True)]
        return torch.cat([part.reshape(-1) for part in filled])

    loss = loss_fn(model(inputs), targets)
    gradient = flat(torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True))
    rows = [flat(torch.autograd.grad(g, parameters, retain_graph=True, allow_unused=True)) for g in gradient]
    for module, mode in modes:
        module.training = mode
    return torch.stack(rows)


class Twice(nn.Module):
    """One module in two places, in the tree and in the forward."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh())
        self.first, self.second = shared, nn.ModuleList([shared])
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second[0](self.first(x)))  # type: ignore[no-any-return]


class Tokens(nn.Module):
    """Integer inputs, weights tied between an embedding and the head."""

    def __init__(self, tied: bool, padding: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, padding_idx=padding)
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)).mean(1))  # type: ignore[no-any-return]


class ThroughBuffer(nn.Module):
    """A buffer is written in the forward and then used: the derivative goes through it."""

    scale: Tensor

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.in_place = in_place
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        if self.in_place:
            self.scale.detach_().copy_(torch.tanh(h.mean(0)))
        else:
            self.scale = torch.tanh(h.mean(0))
        return h * self.scale


class Empty(nn.Module):
    """Parameters without entries, and one with no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.nothing = nn.Parameter(torch.zeros(0, 3))
        self.no_outputs = nn.Linear(3, 0)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.linear(x) + self.nothing.sum() + self.no_outputs(x).sum()  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cells = kind(3, 2, num_layers=2, bidirectional=True, batch_first=True, dropout=0.3)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x[:, None, :].expand(-1, 3, -1))[0][:, -1])  # type: ignore[no-any-return]


class Structured(nn.Module):
    """An output of nested containers with things besides tensors, and one tensor in it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        b = torch.tanh(self.b(x))
        return {"a": [self.a(x), None], "b": (b, 3, "word"), "again": b, "part": b[:, :2]}


def structured_loss(output: dict[str, Any], targets: Tensor) -> Tensor:
    product = output["a"][0] * output["b"][0] * output["again"]
    return functional.cross_entropy(product, targets) + output["part"].square().mean()


class Transposed(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 4)
        self.weight = nn.Parameter(torch.randn(3, 4).mT)  # not contiguous


MODELS: dict[str, Callable[[], nn.Module]] = {
    "twice": Twice,
    "tied": lambda: Tokens(True),
    "tokens": lambda: Tokens(False),
    "padding": lambda: Tokens(False, 0),
    "buffer": lambda: ThroughBuffer(False),
    "buffer in place": lambda: ThroughBuffer(True),
    "empty": Empty,
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "structured": Structured,
    "transposed": Transposed,
    "spectral norm": lambda: nn.Sequential(spectral_norm(nn.Linear(3, 5)), nn.Tanh(), nn.Linear(5, 4)),
    "group norm": lambda: nn.Sequential(nn.Linear(3, 6), nn.GroupNorm(2, 6), nn.SiLU(), nn.Linear(6, 4)),
}


def _subject(name: str) -> tuple[nn.Module, Callable[[Any, Any], Tensor], Tensor, Tensor]:
    torch.manual_seed(4)
    model = MODELS[name]().double()
    inputs = torch.randn(6, 3, dtype=torch.float64)
    if isinstance(model, Tokens):
        inputs = torch.randint(0, 7, (6, 5))
    return model, structured_loss if name == "structured" else functional.cross_entropy, inputs, torch.arange(6) % 4


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("keep_graph", [True, False])
def test_hessian_is_that_of_plain_autograd(name: str, keep_graph: bool) -> None:
    model, loss_fn, inputs, targets = _subject(name)
    with unchanged(model):
        operator = hessian(model, loss_fn, [(inputs, targets)], keep_graph=keep_graph)
        dense = operator.to_dense()
        blocks = operator.blocks()
        for block in blocks.values():
            index = operator.entries_of(block)
            assert relative_error(block.to_dense(), dense[index][:, index]) < 1e-12
    assert sum(block.shape[0] for block in blocks.values()) == operator.shape[0]
    assert float(dense.abs().max()) > 1e-3
    # After the operator, on the model itself: what it left must still be the parameters that a forward uses.
    assert relative_error(dense, row_by_row(model, loss_fn, inputs, targets)) < 1e-12


@pytest.mark.parametrize("name", [name for name in MODELS if name != "structured"])
def test_ggn_is_the_exact_fisher_matrix(name: str) -> None:
    model, loss_fn, inputs, targets = _subject(name)
    with unchanged(model):
        gauss_newton = ggn(model, loss_fn, (inputs, targets)).to_dense()
        exact = fisher(model, "categorical", (inputs, targets), kind="exact").to_dense()
    assert relative_error(exact, gauss_newton) < 1e-12
    assert float(torch.linalg.eigvalsh(gauss_newton).min()) > -1e-12


def test_parameters_of_a_shared_module_stay_the_models_own() -> None:
    """Training goes on after an analysis, with the very same parameters."""
    model, loss_fn, inputs, targets = _subject("twice")
    before = list(model.parameters())
    hessian(model, loss_fn, (inputs, targets)) @ torch.ones(sum(p.numel() for p in before), dtype=torch.float64)
    assert all(new is old for new, old in zip(model.parameters(), before, strict=True))
    loss_fn(model(inputs), targets).backward()
    assert all(parameter.grad is not None for parameter in before)


def test_parameters_without_entries_are_in_no_block() -> None:
    model, loss_fn, inputs, targets = _subject("empty")
    operator = hessian(model, loss_fn, (inputs, targets))
    assert list(operator.blocks()) == ["", "linear"]
    assert operator.blocks()[""].names == ("scale",)
    with pytest.raises(ValueError, match=r"groups\['none'\]: expected parameters with entries, got \['no_outputs'\]"):
        operator.blocks({"none": ["no_outputs"]})


def test_complex_parameters_are_refused_or_left_out() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.complex128))
            self.bias = nn.Parameter(torch.zeros(4, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return (x.to(self.weight.dtype) @ self.weight).abs() + self.bias

    model, inputs, targets = Complex(), torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 4
    with unchanged(model), pytest.raises(TypeError, match="parameter weight: expected a real floating-point type"):
        hessian(model, functional.cross_entropy, (inputs, targets))
    with unchanged(model):
        dense = hessian(model, functional.cross_entropy, (inputs, targets), ["bias"]).to_dense()
    p = model(inputs).detach().softmax(1)
    assert relative_error(dense, torch.diag(p.mean(0)) - p.mT @ p / 6) < 1e-12


@pytest.mark.parametrize("make", [hessian, ggn])
def test_losses_without_curvature_have_none(make: Any) -> None:
    model, _, inputs, targets = _subject("transposed")
    for loss_fn in (lambda o, t: o.sum(), lambda o, t: functional.l1_loss(o, torch.zeros_like(o))):
        assert make(model, loss_fn, (inputs, targets)).to_dense().count_nonzero() == 0


@pytest.mark.parametrize("where", ["weights", "data", "weights later"])
def test_nan_is_an_error(where: str) -> None:
    model, loss_fn, inputs, targets = _subject("group norm")
    if where == "data":
        inputs[2, 1] = float("nan")
    elif where == "weights":
        model[0].weight.data[0, 0] = float("nan")  # type: ignore[index,union-attr,operator]
    makers: list[Callable[[], Any]] = [
        lambda: hessian(model, loss_fn, (inputs, targets)),
        lambda: ggn(model, loss_fn, (inputs, targets)),
        lambda: fisher(model, "categorical", (inputs, targets)),
    ]
    for make in makers:
        if where == "weights later":
            operator = make()
            weight = model[0].weight  # type: ignore[index]
            good = weight.detach().clone()
            weight.data[0, 0] = float("nan")  # type: ignore[union-attr,index]
            with pytest.raises(ValueError, match="nan"):
                operator @ torch.ones(operator.shape[0], dtype=torch.float64)
            with pytest.raises(ValueError, match="nan"):
                kronfac.spectrum.eigsh(operator)
            weight.data.copy_(good)  # type: ignore[union-attr,arg-type]
        else:
            with pytest.raises(ValueError, match="nan"):
                make()
