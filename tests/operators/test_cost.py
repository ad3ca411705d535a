"""What is not asked for is not computed: frozen and unused parameters, and those outside a block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from kronfac.operators import ggn, hessian
from kronfac.operators.memory import measure
from tests.operators.cases import relative_error


class _Net(nn.Module):
    def __init__(self, unused: bool) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.head = nn.Sequential(nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 3))
        if unused:
            self.unused = nn.Linear(1000, 100)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))  # type: ignore[no-any-return]


class _Count(TorchDispatchMode):
    """Floating-point operations of matrix products; torch's own counter has hooks that autograd.grad forbids."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def _flops(run: Any) -> int:
    with _Count() as counter:
        run()
    assert counter.flops > 0
    return counter.flops


def _net(*, unused: bool = False) -> tuple[_Net, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = _Net(unused).double()
    return model, (torch.randn(32, 16, dtype=torch.float64), torch.randint(0, 3, (32,)))


@pytest.mark.parametrize("make", [hessian, ggn])
@pytest.mark.parametrize("how", ["frozen", "not chosen"])
def test_a_frozen_trunk_costs_nothing(make: Any, how: str) -> None:
    model, (inputs, targets) = _net()
    params = ["head"] if how == "not chosen" else None
    if how == "frozen":
        model.trunk.requires_grad_(False)
    operator = make(model, functional.cross_entropy, (inputs, targets), params)
    alone = make(model.head, functional.cross_entropy, (model.trunk(inputs).detach(), targets))
    vector = torch.randn(operator.shape[0], dtype=torch.float64)
    assert relative_error(operator @ vector, alone @ vector) < 1e-12
    assert _flops(lambda: operator @ vector) == _flops(lambda: alone @ vector)
    # Without the graph kept: one forward through the trunk, and nothing else.
    forward = _flops(lambda: model.trunk(inputs))
    operator, alone = (
        make(part, functional.cross_entropy, (batch, targets), chosen, keep_graph=False)
        for part, batch, chosen in ((model, inputs, params), (model.head, model.trunk(inputs).detach(), None))
    )
    assert _flops(lambda: operator @ vector) == _flops(lambda: alone @ vector) + forward


@pytest.mark.parametrize("make", [hessian, ggn])
def test_unused_parameters_cost_nothing(make: Any) -> None:
    (used, batch), (padded, _) = _net(), _net(unused=True)
    padded.load_state_dict(used.state_dict(), strict=False)
    first, second = (make(model, functional.cross_entropy, batch) for model in (used, padded))
    vector = torch.randn(second.shape[0], dtype=torch.float64)
    product = second @ vector
    assert relative_error(product[: first.shape[0]], first @ vector[: first.shape[0]]) < 1e-12
    assert product[first.shape[0] :].count_nonzero() == 0
    assert _flops(lambda: second @ vector) == _flops(lambda: first @ vector[: first.shape[0]])


@pytest.mark.parametrize("make", [hessian, ggn])
def test_a_block_costs_its_own_share(make: Any) -> None:
    model, batch = _net()
    for keep_graph in (True, False):
        operator = make(model, functional.cross_entropy, batch, keep_graph=keep_graph)
        block = operator.blocks({"head": ["head"]})["head"]
        alone = make(model, functional.cross_entropy, batch, ["head"], keep_graph=keep_graph)
        vector = torch.randn(block.shape[0], dtype=torch.float64)
        assert relative_error(block @ vector, alone @ vector) < 1e-12
        assert _flops(lambda: block @ vector) == _flops(lambda: alone @ vector)  # noqa: B023 - run at once


def test_frozen_parameters_are_followed_without_being_read_through() -> None:
    model, batch = _net()
    frozen = nn.Linear(16, 16).double()
    frozen.weight = nn.Parameter(torch.eye(16, dtype=torch.float64).repeat(100, 1)[:16].clone(), requires_grad=False)
    whole = nn.Sequential(frozen, model)
    frozen.requires_grad_(False)
    operator = hessian(whole, functional.cross_entropy, batch)
    vector = torch.randn(operator.shape[0], dtype=torch.float64)
    operator @ vector
    for change in (lambda: frozen.weight.data.mul_(1.5), lambda: frozen.bias.requires_grad_(False).add_(1.0)):
        change()
        fresh = hessian(whole, functional.cross_entropy, batch) @ vector
        assert torch.equal(operator @ vector, fresh)


def test_what_a_frozen_embedding_takes_in_memory() -> None:
    embedding = nn.Embedding(20_000, 16).requires_grad_(False)
    model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(32, 3))
    batch = (torch.randint(0, 20_000, (8, 2)), torch.randint(0, 3, (8,)))
    operator = hessian(model, functional.cross_entropy, batch)
    vector = torch.randn(operator.shape[0])
    assert measure(lambda: operator @ vector).peak < 100_000 < embedding.weight.nbytes
