"""top_eigenvalue against dense Hessians of exactly the examples that it says it takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

from kronfac.schedules import top_eigenvalue
from tests.schedules.runs import adaptive, sgd

CHOICE = torch.randperm(60, generator=torch.Generator().manual_seed(5))[:24]


def problem() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    x, y = torch.randn(60, 3).double(), torch.randint(3, (60,))
    model(2 * x + 1)  # running statistics that are not those of the data
    return model.train(), x, y


def dense(model: nn.Module, x: Tensor, y: Tensor) -> tuple[np.ndarray, dict[str, slice]]:
    """The Hessian in eval mode, and where each parameter lies in it."""
    names = [name for name, _ in model.named_parameters()]
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    places, at = {}, 0
    for name in names:
        places[name] = slice(at, at + shapes[name].numel())
        at += shapes[name].numel()
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])

    def loss(vector: Tensor) -> Tensor:
        values = {name: vector[places[name]].reshape(shapes[name]) for name in names}
        return functional.cross_entropy(functional_call(model, values, (x,)), y)

    was = model.training
    model.eval()
    matrix = hessian(loss)(flat).numpy()
    model.train(was)
    return matrix, places


def largest(matrix: np.ndarray) -> float:
    return float(np.linalg.eigvalsh(matrix)[-1])


def test_it_is_the_dense_eigenvalue_of_its_examples() -> None:
    model, x, y = problem()
    compute = top_eigenvalue(model, functional.cross_entropy, (x, y), examples=24, seed=5, tolerance=1e-6)
    for _ in range(2):
        found = compute()
        assert found.value == pytest.approx(largest(dense(model, x[CHOICE], y[CHOICE])[0]), rel=1e-9)
        assert found.residual <= 1e-6 * found.value
        assert bool(found.converged[0])
        assert found.examples == 24
        assert found.products >= 2
        assert found.blocks == {}
        with torch.no_grad():  # the function follows the parameters, on the same examples
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))


def test_a_rough_eigenvalue_lies_within_its_residual() -> None:
    model, x, y = problem()
    eigenvalues = np.linalg.eigvalsh(dense(model, x[CHOICE], y[CHOICE])[0])
    for products in (2, 3, 4, 6):
        found = top_eigenvalue(model, functional.cross_entropy, (x, y), examples=24, seed=5, products=products)()
        assert np.abs(eigenvalues - found.value).min() <= found.residual * (1 + 1e-9)
        assert found.products <= products
        assert bool(found.converged[0]) == (found.residual <= 0.1 * abs(found.value))


def test_it_leaves_no_trace() -> None:
    model, x, y = problem()
    functional.cross_entropy(model(x), y).backward()
    before = [tensor.clone() for tensor in (*model.parameters(), *model.buffers())]
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    stream = torch.get_rng_state()
    top_eigenvalue(model, functional.cross_entropy, (x, y), examples=24)()
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(module.training for module in model.modules())
    for old, new in zip(before, (*model.parameters(), *model.buffers()), strict=True):
        assert torch.equal(old, new)
    for old, parameter in zip(gradients, model.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.equal(old, parameter.grad)


def test_blocks() -> None:
    model, x, y = problem()
    matrix, places = dense(model, x[CHOICE], y[CHOICE])
    options: Any = {"examples": 24, "seed": 5, "tolerance": 1e-6}

    def block(*names: str) -> float:
        where = np.concatenate([np.arange(places[name].start, places[name].stop) for name in names])
        return largest(matrix[np.ix_(where, where)])

    def found(blocks: Any) -> Any:
        return top_eigenvalue(model, functional.cross_entropy, (x, y), blocks=blocks, **options)()

    assert found(["4"]).value == pytest.approx(block("4.weight", "4.bias"), rel=1e-9)
    assert found(["0.weight", "4"]).value == pytest.approx(block("0.weight", "4.weight", "4.bias"), rel=1e-9)
    layers = {str(index): block(f"{index}.weight", f"{index}.bias") for index in (0, 1, 4)}
    mean = found("layers")
    assert mean.blocks == pytest.approx(layers, rel=1e-9)
    assert mean.value == pytest.approx(sum(layers.values()) / 3, rel=1e-9)
    named = found({"first": ["0"], "rest": ["1", "4.weight"]})
    expected = {"first": layers["0"], "rest": block("1.weight", "1.bias", "4.weight")}
    assert named.blocks == pytest.approx(expected, rel=1e-9)


class Items(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.read = x, y, 0

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.read += 1
        return self.x[index] + (self.read > 24), self.y[index]


def test_all_forms_of_data() -> None:
    model, x, y = problem()
    options: Any = {"examples": 24, "seed": 5, "tolerance": 1e-6}
    chosen = largest(dense(model, x[CHOICE], y[CHOICE])[0])
    items = Items(x, y)
    compute = top_eigenvalue(model, functional.cross_entropy, items, **options)
    assert [compute().value, compute().value] == pytest.approx([chosen] * 2, rel=1e-9)
    assert items.read == 24  # read once, so that nothing random in it can change
    first = largest(dense(model, x[:24], y[:24])[0])
    batches = [(x[at : at + 10], y[at : at + 10]) for at in range(0, 60, 10)]
    loader = DataLoader(TensorDataset(x, y), batch_size=7)
    for data in (batches, loader):
        value = top_eigenvalue(model, functional.cross_entropy, data, **options)().value
        assert value == pytest.approx(first, rel=1e-9)
    chunked = top_eigenvalue(model, functional.cross_entropy, (x, y), chunk_size=5, **options)().value
    assert chunked == pytest.approx(chosen, rel=1e-9)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3).double()

    def forward(self, wide: Tensor, scale: Tensor) -> Tensor:
        return self.layer(wide * scale)  # type: ignore[no-any-return]


def test_inputs_by_name() -> None:
    _, x, y = problem()
    model, scale = Named(), torch.rand(60, 1).double()
    inputs = {"wide": x, "scale": scale}
    found = top_eigenvalue(model, functional.cross_entropy, (inputs, y), examples=24, seed=5, tolerance=1e-6)()
    plain = nn.Sequential(model.layer)
    assert found.value == pytest.approx(largest(dense(plain, (x * scale)[CHOICE], y[CHOICE])[0]), rel=1e-9)
    batches = [({"wide": x[:20], "scale": scale[:20]}, y[:20]), ({"wide": x[20:], "scale": scale[20:]}, y[20:])]
    found = top_eigenvalue(model, functional.cross_entropy, batches, examples=24, tolerance=1e-6)()
    assert found.value == pytest.approx(largest(dense(plain, (x * scale)[:24], y[:24])[0]), rel=1e-9)


@pytest.mark.parametrize("how", ["parameters", "loss", "product"])
def test_a_run_that_diverged_gives_nan(how: str) -> None:
    model, x, y = problem()
    compute = top_eigenvalue(model, functional.cross_entropy, (x, y), examples=24)
    with torch.no_grad():
        if how == "parameters":
            model[0].weight[0, 0] = float("nan")
        elif how == "loss":
            model[4].weight.fill_(1e308)
        else:
            model[0].weight.mul_(1e160)
            model[4].weight.mul_(1e300)
    found = compute()
    assert np.isnan(found.value) or not bool(found.converged[0])
    schedule = adaptive(sgd(), [8.0, found])
    for _ in range(2):
        for _ in schedule.steps():
            pass
        row = schedule.end_epoch()
    assert row["next_batch_size"] == 4
    assert str(row["reason"]).startswith("eigenvalue not ")


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "too few": ({"examples": 61}, ValueError, "examples: expected at most the 60 examples that the data have, got 61"),
    "none": ({"examples": 0}, ValueError, "examples: expected an integer >= 1"),
    "products": ({"products": 1}, ValueError, "products: expected an integer >= 2"),
    "tolerance": ({"tolerance": 0.0}, ValueError, "tolerance: expected a number > 0"),
    "seed": ({"seed": -1}, ValueError, "seed: expected an integer >= 0"),
    "block": ({"blocks": ["nowhere"]}, ValueError, "nowhere"),
    "word": ({"blocks": "4"}, ValueError, "blocks: expected None"),
    "empty": ({"blocks": []}, ValueError, "blocks: expected None"),
    "data": ({"data": torch.zeros(60, 3)}, TypeError, "data: expected .inputs, targets., a Dataset"),
    "uneven": ({"data": (torch.zeros(60, 3), torch.zeros(59))}, ValueError, "leading dimension"),
    "short list": ({"data": [(torch.zeros(9, 3).double(), torch.zeros(9).long())]}, ValueError, "at most the 9"),
    "infinite": ({"data": (torch.full((60, 3), torch.inf), torch.zeros(60))}, ValueError, "expected finite examples"),
    "model": ({"model": "model"}, TypeError, "model: expected a torch.nn.Module"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_cannot_be_is_refused_at_once(what: str) -> None:
    changed, error, message = REFUSED[what]
    model, x, y = problem()
    arguments: dict[str, Any] = {"model": model, "data": (x, y), "examples": 24, **changed}
    with pytest.raises(error, match=message):
        top_eigenvalue(arguments.pop("model"), functional.cross_entropy, arguments.pop("data"), **arguments)
