from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

import kronfac
from kronfac.operators import fisher, ggn
from tests.operators.cases import make_case, relative_error
from tests.operators.state import unchanged


def per_example_gradients(model: nn.Module, inputs: Tensor, targets: Tensor, loss: Any) -> Tensor:
    """(N, n) by torch.func, each of one example's own summed negative log-likelihood."""
    names = list(dict(model.named_parameters()))
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def one(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, values, (x[None],)), y[None])  # type: ignore[no-any-return]

    found = vmap(grad(one), in_dims=(None, 0, 0))(parameters, inputs, targets)
    return torch.cat([found[name].flatten(1) for name in names], dim=1)


def classes_of(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits, targets, reduction="sum")


class Tokens(nn.Module):
    """One distribution for each of several positions of an example."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.second(h + h.mean(1, keepdim=True))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["mlp", "convnet", "batchnorm"])
@pytest.mark.parametrize("form", ["batch", "list"])
def test_exact_is_the_gauss_newton_matrix_of_cross_entropy(name: str, form: str) -> None:
    case = make_case(name)
    data: Any = (case.inputs, case.targets)
    if form == "list":
        data = [(case.inputs[:3], case.targets[:3]), (case.inputs[3:], case.targets[3:])]
    exact = fisher(case.model, "categorical", data, kind="exact").to_dense()
    assert relative_error(exact, ggn(case.model, functional.cross_entropy, data).to_dense()) < 1e-12
    summed = fisher(case.model, "categorical", data, kind="exact", reduction="sum").to_dense()
    assert relative_error(summed, exact * len(case.inputs)) < 1e-12


def test_exact_of_the_other_likelihoods() -> None:
    case = make_case("regression")
    exact = fisher(case.model, kronfac.Gaussian(variance=0.5), (case.inputs, case.targets), kind="exact").to_dense()

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return (output - targets).square().sum() / len(output)  # ½‖·‖² / 0.5, averaged over examples

    assert relative_error(exact, ggn(case.model, loss, (case.inputs, case.targets)).to_dense()) < 1e-12
    labels = (case.targets > 0).double()
    exact = fisher(case.model, "bernoulli", (case.inputs, labels), kind="exact").to_dense()

    def entropy(output: Tensor, targets: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(output, targets, reduction="sum") / len(output)

    assert relative_error(exact, ggn(case.model, entropy, (case.inputs, labels)).to_dense()) < 1e-12


@pytest.mark.parametrize("name", ["mlp", "convnet"])
def test_empirical_is_the_second_moment_of_example_gradients(name: str) -> None:
    case = make_case(name)
    data = [(case.inputs[:3], case.targets[:3]), (case.inputs[3:], case.targets[3:])]
    gradients = per_example_gradients(case.model, case.inputs, case.targets, classes_of)
    expected = gradients.mT @ gradients / len(gradients)
    assert relative_error(fisher(case.model, "categorical", data, kind="empirical").to_dense(), expected) < 1e-12


def test_tokens_with_a_mask() -> None:
    torch.manual_seed(0)
    model = Tokens().double()
    inputs, targets = torch.randn(6, 4, 3, dtype=torch.float64), torch.randint(0, 5, (6, 4))
    mask = torch.rand(6, 4) < 0.7
    ignored = targets.where(mask, torch.tensor(-100))

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(logits.movedim(-1, 1), y, reduction="sum", ignore_index=-100)

    gradients = per_example_gradients(model, inputs, ignored, loss)
    operator = fisher(
        model,
        kronfac.Categorical(dim=-1),
        (inputs, targets),
        kind="empirical",
        mask=lambda x, y: mask,
    )
    assert relative_error(operator.to_dense(), gradients.mT @ gradients / int(mask.sum())) < 1e-12
    exact = fisher(model, kronfac.Categorical(dim=-1), (inputs, targets), kind="exact", mask=lambda x, y: mask)
    mean = ggn(model, lambda out, y: loss(out, y) / int(mask.sum()), (inputs, ignored))
    assert relative_error(exact.to_dense(), mean.to_dense()) < 1e-12


def test_draws_tend_to_the_expectation() -> None:
    case = make_case("mlp")
    data = (case.inputs, case.targets)
    exact = fisher(case.model, "categorical", data, kind="exact").to_dense()
    errors = []
    for samples in (4, 400):
        drawn = fisher(case.model, "categorical", data, samples=samples).to_dense()
        errors.append(float((drawn - exact).norm() / exact.norm()))
    assert errors[1] < 0.1
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.5)


def test_draws_are_of_one_matrix() -> None:
    case = make_case("mlp")
    data = [(case.inputs[:3], case.targets[:3]), (case.inputs[3:], case.targets[3:])]
    state = torch.get_rng_state()
    dense = fisher(case.model, "categorical", data, seed=1).to_dense()
    for keep_graph in (False, True):
        operator = fisher(case.model, "categorical", data, seed=1, keep_graph=keep_graph)
        assert torch.equal(operator.to_dense(), dense)
        operator.release()
        first = operator.blocks()["0"]
        torch.testing.assert_close(first.to_dense(), dense[: first.shape[0], : first.shape[0]])
    assert not torch.equal(fisher(case.model, "categorical", data, seed=2).to_dense(), dense)
    assert torch.equal(torch.get_rng_state(), state)
    assert float(torch.linalg.eigvalsh(dense).min()) > -1e-12


@pytest.mark.parametrize("kind", ["mc", "exact", "empirical"])
def test_model_and_streams_are_left_as_they_were(kind: str) -> None:
    case = make_case("batchnorm")
    case.model.train()
    case.loss_fn(case.model(case.inputs), case.targets).backward()
    with unchanged(case.model):
        operator = fisher(case.model, "categorical", (case.inputs, case.targets), kind=kind)
        operator @ torch.ones(operator.shape[0], dtype=operator.dtype)


def test_output_picks_the_logits() -> None:
    case = make_case("mlp")

    class Verbose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = case.model

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"features": x, "logits": self.inner(x)}

    data = (case.inputs, case.targets)
    dense = fisher(Verbose(), "categorical", data, kind="exact", output=lambda out: out["logits"]).to_dense()
    assert torch.equal(dense, fisher(case.model, "categorical", data, kind="exact").to_dense())
    with pytest.raises(TypeError, match="expected a tensor of logits, got a dict; pass output=lambda"):
        fisher(Verbose(), "categorical", data)


def test_refusals() -> None:
    case = make_case("mlp")
    data = (case.inputs, case.targets)
    for options, error, match in (
        ({"kind": "type2"}, ValueError, "kind: expected one of 'mc', 'exact', 'empirical', got 'type2'"),
        ({"samples": 0}, ValueError, "samples: expected at least 1, got 0"),
        ({"samples": 1.5}, TypeError, "samples: expected an integer, got 1.5"),
        ({"seed": -1}, ValueError, "seed: expected at least 0, got -1"),
        ({"mask": True}, TypeError, "mask: expected a callable or None, got bool"),
        ({"likelihood": "poisson"}, ValueError, "poisson"),
    ):
        arguments: dict[str, Any] = {"likelihood": "categorical", **options}  # type: ignore[dict-item]
        with pytest.raises(error, match=match):
            fisher(case.model, data=data, **arguments)
    with pytest.raises(ValueError, match="mask: expected shape"):
        fisher(case.model, "categorical", data, mask=lambda x, y: torch.ones(2, dtype=torch.bool))
