"""The overload `detached` that the typed functions call where no graph is wanted, and when they do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kronfac import ops

NAMES = ops.__all__


def factor(n: int) -> Tensor:
    root = torch.randn(n, n)
    return root @ root.mT + torch.eye(n)


def arguments(name: str) -> tuple[Any, ...]:
    """A call of each operator, with all positional arguments that have no default and some that have."""
    x, image = torch.randn(6, 4), torch.randn(2, 3, 5, 5)
    window = ([3, 3], [1, 1], [1, 1], [1, 1])
    grads, left, right = [torch.randn(3, 4), torch.randn(2, 5)], [factor(3), factor(2)], [factor(4), factor(5)]
    calls: dict[str, tuple[Any, ...]] = {
        "covariance": (x, True, 0.5),
        "covariance_": (factor(5), x, True, 0.5, 0.5),
        "conv_covariance": (image, *window),
        "conv_covariance_": (factor(27), image, *window),
        "damped_inverse": (left, torch.tensor(0.1)),
        "damped_eigh": (left, torch.tensor(0.1)),
        "kron_precondition": (grads, left, right),
        "eigen_precondition": (grads, left, right, [grad.abs() for grad in grads], torch.tensor(0.1)),
        "second_moment_": (torch.rand(3, 5), torch.randn(2, 6, 3), torch.randn(2, 6, 4), True, 0.5),
        "orthogonalize_": (torch.randn(9), torch.linalg.qr(torch.randn(9, 2)).Q.mT),
    }
    return calls[name]


class Calls(TorchDispatchMode):
    """Records the operators that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "kronfac":
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


def leaves(value: Any) -> list[Tensor]:
    found, _ = torch.utils._pytree.tree_flatten(value)
    return [leaf for leaf in found if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", NAMES)
def test_schemas_agree(name: str) -> None:
    packet = getattr(torch.ops.kronfac, name)
    assert set(packet.overloads()) == {"default", "detached"}
    signature = str(packet.default._schema).split("(", 1)[1]
    assert str(packet.detached._schema).split("(", 1)[1] == signature


@pytest.mark.parametrize("name", NAMES)
def test_functions_call_it_without_a_graph(name: str) -> None:
    packet = getattr(torch.ops.kronfac, name)
    function: Callable[..., Any] = getattr(ops, name)
    outcomes = []
    for call in (function, packet.default):
        torch.manual_seed(3)
        values = arguments(name)
        with Calls() as calls:
            result = call(*values)
        outcomes.append(leaves((result, values)))
        assert calls.seen == [packet.detached if call is function else packet.default]
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


DIFFERENTIABLE = ("covariance", "conv_covariance", "kron_precondition", "eigen_precondition")


@pytest.mark.parametrize("name", NAMES)
def test_functions_call_the_operator_for_a_graph(name: str) -> None:
    """Where an input requires grad, a result has a graph or the call is refused."""
    for position in range(len(leaves(arguments(name)))):
        values = arguments(name)
        leaves(values)[position].requires_grad_()
        with Calls() as calls:
            if name in DIFFERENTIABLE:
                assert any(leaf.requires_grad for leaf in leaves(getattr(ops, name)(*values)))
            else:
                with pytest.raises(RuntimeError, match="expected a tensor that does not require grad"):
                    getattr(ops, name)(*values)
        assert calls.seen == ([getattr(torch.ops.kronfac, name).default] if name in DIFFERENTIABLE else [])


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("_")])
def test_no_graph_under_no_grad(name: str) -> None:
    values = arguments(name)
    for leaf in leaves(values):
        leaf.requires_grad_()
    with torch.no_grad():
        assert not any(leaf.requires_grad for leaf in leaves(getattr(ops, name)(*values)))


@pytest.mark.parametrize("name", NAMES)
def test_fakes(name: str) -> None:
    values = arguments(name)
    expected = leaves(getattr(torch.ops.kronfac, name).detached(*values))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, values)
        results = leaves(getattr(torch.ops.kronfac, name).detached(*fakes))
    assert [(r.shape, r.dtype, r.stride()) for r in results] == [(r.shape, r.dtype, r.stride()) for r in expected]


def test_it_cuts_the_graph() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    assert not torch.ops.kronfac.covariance.detached(x).requires_grad


def test_compiled_graphs_hold_the_operator_itself() -> None:
    targets: list[Any] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        targets.extend(node.target for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    @torch.compile(fullgraph=True, backend=backend)
    def step(x: Tensor, out: Tensor) -> Tensor:
        ops.covariance_(out, x)
        return ops.covariance(x)

    step(torch.randn(4, 3), torch.zeros(3, 3))
    assert torch.ops.kronfac.covariance.default in targets
    assert torch.ops.kronfac.covariance_.default in targets


def test_functional_transforms_see_the_operator() -> None:
    """torch.func does not differentiate operators like these; it must say so and not return zeros."""
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: ops.covariance(x).square().sum())(torch.randn(5, 3))
