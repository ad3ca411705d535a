"""K-FAC and EKFAC as operators: against curvlinops, dense Kronecker products and dense Fisher matrices, float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import kronfac
from kronfac.curvature import find_layers
from kronfac.curvature.posterior import to_parameters
from kronfac.linalg import cg, minres
from kronfac.operators import KroneckerOperator, ParameterOperator, ekfac, fisher, ggn, kfac
from kronfac.spectrum import block_traces, eigsh
from tests.operators.cases import dense_ggn, relative_error
from tests.operators.state import unchanged

MAKERS = pytest.mark.parametrize("make", [kfac, ekfac])


def mlp() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)).double()


def convnet() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)
    ).double()


def batch(*shape: int, count: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, *shape, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (count,), generator=generator)


class Everything(nn.Module):
    """A layer of every kind of block: tokens to maps and back."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.grouped = nn.Conv1d(4, 4, 2, groups=2)
        self.up = nn.ConvTranspose1d(4, 3, 2, stride=2, bias=False)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.tokens(x)
        out = self.norm(out + self.attention(out, out, out, need_weights=False)[0])
        return self.head(self.up(torch.tanh(self.grouped(out.mT))).mean(-1))


def everything() -> tuple[Everything, tuple[Tensor, Tensor]]:
    torch.manual_seed(5)
    return Everything().double(), (torch.randint(7, (12, 4)), torch.randint(3, (12,)))


def columns(operator: ParameterOperator, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(operator.shape[0], count, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("name", ["KFACLinearOperator", "EKFACLinearOperator"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("network", ["mlp", "convnet"])
@pytest.mark.filterwarnings("ignore")
def test_against_curvlinops(name: str, reduction: str, network: str) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    model, data = (mlp(), batch(4)) if network == "mlp" else (convnet(), batch(2, 7, 5))
    theirs = getattr(curvlinops, name)(
        model,
        nn.CrossEntropyLoss(reduction=reduction),
        list(model.parameters()),
        [(data[0][:15], data[1][:15]), (data[0][15:], data[1][15:])],
        fisher_type=curvlinops.FisherType.TYPE2,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    make = kfac if name == "KFACLinearOperator" else ekfac
    ours = make(model, "categorical", data, kind="exact", reduction=reduction)
    expected = theirs @ torch.eye(ours.shape[0], dtype=torch.float64)
    assert relative_error(ours.to_dense(), expected) < 1e-6


def test_products_are_those_of_the_factors_for_every_kind_of_layer() -> None:
    """G W A of each layer, with the parameters themselves as the vector."""
    model, data = everything()
    operator = kfac(model, "categorical", data, kind="exact")
    factors = kronfac.curvature.factors(model, data, likelihood="categorical", fisher="exact")
    assert operator.factors().keys() == factors.keys()
    products = {}
    for name, adapter in find_layers(model).items():
        A, G = factors[name]
        W = adapter.weight_matrix()
        products[name] = G @ W @ (torch.diag(A) if A.dim() == 1 else A)
    expected = to_parameters(model, products)
    got = operator @ [p.detach() for p in model.parameters()]
    for (name, _), part in zip(model.named_parameters(), got, strict=True):
        torch.testing.assert_close(part, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@MAKERS
@pytest.mark.parametrize("network", ["everything", "convnet"])
def test_closed_forms_and_inverse_against_the_dense_matrix(make: Any, network: str) -> None:
    model, data = everything() if network == "everything" else (convnet(), batch(2, 7, 5))
    operator = make(model, "categorical", data, kind="exact")
    dense = operator.to_dense()
    damped = dense + 1e-2 * torch.eye(len(dense), dtype=torch.float64)
    torch.testing.assert_close(dense, dense.mT)
    assert float(torch.linalg.eigvalsh(dense)[0]) > -1e-12
    assert operator.trace() == pytest.approx(float(dense.trace()))
    torch.testing.assert_close(operator.diagonal(), dense.diagonal())
    assert operator.logdet(1e-2) == pytest.approx(float(torch.logdet(damped)))
    inverse = operator.inverse(1e-2)
    torch.testing.assert_close(inverse.to_dense(), torch.linalg.inv(damped), rtol=1e-9, atol=1e-9)
    assert inverse.logdet() == pytest.approx(-float(torch.logdet(damped)))
    assert inverse.trace() == pytest.approx(float(torch.linalg.inv(damped).trace()))
    torch.testing.assert_close(inverse.diagonal(), torch.linalg.inv(damped).diagonal(), rtol=1e-9, atol=1e-9)
    # the inverse's own inverse: (B⁻¹ + λ)⁻¹
    again = torch.linalg.inv(torch.linalg.inv(damped) + 0.5 * torch.eye(len(dense), dtype=torch.float64))
    torch.testing.assert_close(inverse.inverse(0.5).to_dense(), again, rtol=1e-9, atol=1e-9)
    V = columns(operator)
    torch.testing.assert_close(operator @ V, torch.stack([operator @ v for v in V.mT], 1))
    np.testing.assert_allclose(inverse.to_scipy() @ V.numpy(), inverse @ V)
    for name, block in operator.blocks().items():
        entries = operator.entries_of(block)
        torch.testing.assert_close(block.to_dense(), dense[entries][:, entries])
        assert isinstance(block, KroneckerOperator), name
        own = torch.linalg.inv(damped[entries][:, entries])
        torch.testing.assert_close(block.inverse(1e-2).to_dense(), own, rtol=1e-9, atol=1e-9)


def test_norms_are_exact() -> None:
    model, data = everything()
    dense = dense_ggn(model, functional.cross_entropy, *data, names=["norm.weight", "norm.bias"])
    operator = kfac(model, "categorical", data, ["norm"], kind="exact")
    assert relative_error(operator.to_dense(), dense) < 1e-12


@pytest.mark.parametrize("network", ["mlp", "convnet"])
def test_ekfac_is_the_fisher_block_made_diagonal_in_the_eigenbasis(network: str) -> None:
    model, data = (mlp(), batch(4)) if network == "mlp" else (convnet(), batch(2, 7, 5))
    exact = ggn(model, functional.cross_entropy, data)
    approximation = ekfac(model, "categorical", data, kind="exact")
    plain = kfac(model, "categorical", data, kind="exact")
    assert approximation.trace() == pytest.approx(float(exact.to_dense().trace()))
    for name, (A, G) in plain.factors().items():
        block, bias = exact.blocks()[name].to_dense(), model.get_submodule(name).bias is not None
        # rows of V (out, in[+1]) in the order of the parameters: all of the weight, then the bias
        index = torch.arange(len(block)).view(len(G), len(A))
        order = torch.cat([index[:, :-1].reshape(-1), index[:, -1]]) if bias else index.reshape(-1)
        Q = torch.kron(torch.linalg.eigh(G)[1], torch.linalg.eigh(A)[1])[order]
        expected = (Q * (Q.mT @ block @ Q).diagonal()) @ Q.mT
        got = approximation.blocks()[name].to_dense()
        assert relative_error(got, expected) < 1e-8
        # the nearest of all matrices that are diagonal in this basis, and K-FAC's block is one of them
        assert (got - block).norm() <= (plain.blocks()[name].to_dense() - block).norm() * (1 + 1e-12)


def test_ekfac_of_attention_has_the_trace_of_the_fisher_matrix() -> None:
    """The projections share a parameter; the sum of S is the mean square of whole examples' gradients in any basis."""
    model, data = everything()
    for params in (["attention", "head"], ["attention.in_proj_weight", "grouped"]):
        exact = ggn(model, functional.cross_entropy, data, params)
        approximation = ekfac(model, "categorical", data, params, kind="exact")
        assert approximation.names == exact.names
        assert approximation.trace() == pytest.approx(float(exact.to_dense().trace()))


@MAKERS
def test_chosen_parameters_in_any_order(make: Any) -> None:
    model, data = mlp(), batch(4)
    whole = make(model, "categorical", data, kind="exact")
    dense = whole.to_dense()
    assert whole.names == tuple(name for name, _ in model.named_parameters())
    some = make(model, "categorical", data, ["4.bias", "0", "4.weight"], kind="exact")
    assert some.names == ("4.bias", "0.weight", "0.bias", "4.weight")
    offsets = dict(zip(whole.names, whole._layout.offsets, strict=False))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    entries = torch.cat([torch.arange(offsets[n], offsets[n] + sizes[n]) for n in some.names])
    torch.testing.assert_close(some.to_dense(), dense[entries][:, entries])
    # parts of a layer, and groups of whole ones in another order
    groups = {"weights": ["0.weight", "4.weight"], "turned": ["4.bias", "2", "4.weight"]}
    for block in whole.blocks(groups).values():
        entries = whole.entries_of(block)
        torch.testing.assert_close(block.to_dense(), dense[entries][:, entries])
    assert isinstance(whole.blocks(groups)["turned"], KroneckerOperator)


def test_a_weight_alone_is_that_of_a_layer_without_bias() -> None:
    model, data = mlp(), batch(4)
    A, G = kfac(model, "categorical", data, ["0"], kind="exact").factors()["0"]
    alone = kfac(model, "categorical", data, ["0.weight"], kind="exact").factors()["0"]
    torch.testing.assert_close(alone.A, A[:-1, :-1])
    torch.testing.assert_close(alone.G, G)


@MAKERS
def test_nothing_of_the_model_changes_and_frozen_parameters_can_be_chosen(make: Any) -> None:
    model, data = convnet(), batch(2, 7, 5)
    model.insert(1, nn.BatchNorm2d(3).double())
    model.append(nn.Dropout(0.5))
    model(data[0]).sum().backward()  # leaves gradients, and moves the running statistics
    expected = make(model, "categorical", data, ["0"], kind="exact").to_dense()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    loader = DataLoader(TensorDataset(*data), batch_size=9)
    with unchanged(model):
        operator = make(model, "categorical", loader, ["0"], kind="exact", seed=3)
        operator.inverse(0.1) @ columns(operator)
        rest = make(model, "categorical", data)
    torch.testing.assert_close(operator.to_dense(), expected)
    assert rest.names == ("1.weight", "1.bias", "4.weight", "4.bias")
    with torch.inference_mode():
        inside = make(model, "categorical", data, ["0"], kind="exact").to_dense()
    torch.testing.assert_close(inside, expected)


@MAKERS
def test_kinds(make: Any) -> None:
    model, data = mlp(), batch(4)
    exact = make(model, "categorical", data, kind="exact").to_dense()
    drawn = make(model, "categorical", data, samples=3000, seed=1)
    assert float((drawn.to_dense() - exact).norm() / exact.norm()) < 0.05
    again = make(model, "categorical", data, samples=2, seed=5).to_dense()
    torch.testing.assert_close(make(model, "categorical", data, samples=2, seed=5).to_dense(), again, rtol=0, atol=0)
    assert float((make(model, "categorical", data, samples=2, seed=6).to_dense() - again).norm()) > 0
    empirical = make(model, "categorical", data, kind="empirical")
    # both are right about the trace of a network without shared positions, where G and A are of single examples
    if make is ekfac:
        true = fisher(model, "categorical", data, kind="empirical").to_dense()
        assert empirical.trace() == pytest.approx(float(true.trace()))
    A, G = kronfac.curvature.factors(model, data, likelihood="categorical", fisher="empirical")["2"]
    got = kfac(model, "categorical", data, kind="empirical").factors()["2"]
    torch.testing.assert_close((got.A, got.G), (A, G))


@MAKERS
def test_data_masks_and_reduction(make: Any) -> None:
    """Tokens with padding: cutting into batches changes nothing, padded positions count nowhere."""
    torch.manual_seed(9)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x, y = torch.randn(8, 6, 3, dtype=torch.float64), torch.randint(4, (8, 6))
    kept = torch.arange(6) < torch.tensor([6, 2, 3, 6, 1, 4, 5, 6])[:, None]
    likelihood = kronfac.Categorical(dim=-1)
    options: dict[str, Any] = {"kind": "exact", "mask": lambda inputs, targets: targets >= 0}
    padded = torch.where(kept[..., None], x, 7.0), torch.where(kept, y, -1)
    whole = make(model, likelihood, padded, **options)
    batches = [tuple(part[index : index + 3] for part in padded) for index in (0, 3, 6)]
    torch.testing.assert_close(make(model, likelihood, batches, **options).to_dense(), whole.to_dense())
    summed = make(model, likelihood, padded, reduction="sum", **options)
    torch.testing.assert_close(summed.to_dense(), int(kept.sum()) * whole.to_dense())
    if make is kfac:
        flat = kfac(model, "categorical", (x[kept], y[kept]), kind="exact")
        torch.testing.assert_close(whole.to_dense(), flat.to_dense())
    with pytest.raises(ValueError, match="data, mask: expected at least one term that counts"):
        make(model, likelihood, padded, kind="exact", mask=lambda inputs, targets: targets > 99)


class Careless(nn.Module):
    """Layers that are not used, used as functions, shared, or of no known type."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use = use
        self.body, self.spare, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        if use == "shared":
            self.spare.weight = nn.Parameter(torch.randn(5, 5))
            self.other = nn.Linear(5, 5)
            self.other.weight = self.spare.weight
        if use == "own":
            self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.tanh(self.body(x))
        if self.use == "function":
            out = functional.linear(out, self.spare.weight)
        if self.use == "shared":
            out = self.other(torch.tanh(self.spare(out)))
        out = self.head(functional.dropout(out, 0.5) if self.use == "random" else out)
        return out * self.scale if self.use == "own" else out


@MAKERS
def test_layers_that_cannot_be_seen(make: Any) -> None:
    data = batch(4)
    unused = Careless("not").double()
    operator = make(unused, "categorical", data, kind="exact")
    spare = operator.blocks()["spare"]
    assert spare.to_dense().count_nonzero() == 0
    torch.testing.assert_close(spare.inverse(0.5).to_dense(), 2 * torch.eye(30, dtype=torch.float64))
    cases: list[tuple[str, Any, str]] = [
        ("function", None, "the output depends on layer 'spare', but not through a call of it as a module"),
        ("shared", None, r"no layer adapter covers spare.weight \(shared by 'spare' and 'other'\)"),
        (
            "own",
            None,
            r"covers scale \(of Careless\); choose the covered layers with params=\['body', 'spare', 'head'\]",
        ),
        ("not", ["body.bias", "head"], r"covers body.bias \(a bias without its weight\)"),
        ("random", None, "random numbers were drawn although the model is in eval mode"),
    ]
    for use, params, match in cases:
        model = Careless(use).double()
        with unchanged(model), pytest.raises(ValueError, match=match) as caught:
            make(model, "categorical", data, params)
        assert str(caught.value).startswith(f"kronfac.operators.{make.__name__}: ")
    covered = make(Careless("own").double(), "categorical", data, ["body", "head"])
    assert covered.shape == (25 + 18, 25 + 18)
    with pytest.raises(ValueError, match=r"no layer adapter covers 0.weight_ih_l0 \(of LSTM\)"):
        make(nn.Sequential(nn.LSTM(3, 2)), "categorical", data)


@MAKERS
def test_bad_input(make: Any) -> None:
    model, data = mlp(), batch(4)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"kind": "type2"}, ValueError, "kind: expected one of 'mc', 'exact', 'empirical', got 'type2'"),
        ({"sharing": "sum"}, ValueError, "sharing: expected one of 'expand', 'reduce'"),
        ({"reduction": "none"}, ValueError, "reduction: expected one of 'mean', 'sum'"),
        ({"samples": 0}, ValueError, "samples: expected at least 1, got 0"),
        ({"seed": 1.5}, TypeError, "seed: expected an integer"),
        ({"output": 3}, TypeError, "output: expected a callable or None"),
        ({"params": ["9"]}, ValueError, "no parameter or module '9'"),
        ({"likelihood": functional.cross_entropy}, TypeError, "likelihood: expected a name or an instance"),
        ({"data": DataLoader(TensorDataset(*data), shuffle=True)}, ValueError, "the DataLoader shuffles"),
        ({"data": (data[0] * float("nan"), data[1])}, ValueError, "factors of layer '0' are not finite"),
    ]
    for options, error, match in cases:
        arguments = {"likelihood": "categorical", "data": data, **options}
        with unchanged(model), pytest.raises(error, match=match):
            make(model, arguments.pop("likelihood"), arguments.pop("data"), **arguments)
    operator = make(model, "categorical", data)
    for call, error, match in (
        (lambda: operator.inverse(0.0), ValueError, "inverse: damping: expected a finite number greater than 0"),
        (lambda: operator.inverse("1"), TypeError, "inverse: damping: expected a number"),
        (lambda: operator.logdet(-1.0), ValueError, "logdet: damping: expected a finite number, at least 0"),
    ):
        with pytest.raises(error, match=match):
            call()


def test_arithmetic_and_spectra_of_them() -> None:
    model, data = mlp(), batch(4)
    exact, approximation = ggn(model, functional.cross_entropy, data), kfac(model, "categorical", data, kind="exact")
    difference = exact - approximation
    torch.testing.assert_close(difference.to_dense(), exact.to_dense() - approximation.to_dense())
    values = torch.linalg.eigvalsh(approximation.to_dense()).flip(0)[:4]
    torch.testing.assert_close(eigsh(approximation, 4, tol=1e-8).values, values, rtol=1e-7, atol=1e-9)
    traces = block_traces(approximation, probes=20, restricted=True)
    assert traces["0"].trace == pytest.approx(approximation.blocks()["0"].trace(), abs=5 * traces["0"].trace_stderr)
    with pytest.raises(ValueError, match=r"expected a symmetric operator, got <\(\(kfac \+ 0\.1\)⁻¹ @ ggn\) operator"):
        eigsh(approximation.inverse(0.1) @ exact)


def test_the_root_of_the_inverse_preconditions_minres_and_draws_samples() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    x, y = torch.randn(200, 20, dtype=torch.float64) * torch.logspace(-1.5, 1, 20), torch.randint(3, (200,))
    A = ggn(model, functional.cross_entropy, (x, y)).shift(1e-4)
    approximation = kfac(model, "categorical", (x, y), kind="exact")
    root = approximation.inverse_sqrt(1e-4)
    R = root.to_dense()
    torch.testing.assert_close(R @ R, approximation.inverse(1e-4).to_dense(), rtol=1e-8, atol=1e-6)
    b = torch.randn(A.shape[0], dtype=torch.float64)
    helped = minres(root @ A @ root, root @ b, tolerance=1e-6, max_iterations=1000)
    plain = minres(A, b, tolerance=1e-6, max_iterations=1000)
    assert helped.converged
    assert helped.iterations < 0.7 * plain.iterations
    assert float((A @ (root @ helped.x) - b).norm() / b.norm()) < 1e-3
    variances = (root @ torch.randn(A.shape[0], 4000, dtype=torch.float64)).var(1)
    expected = approximation.inverse(1e-4).diagonal()
    assert float((variances / expected - 1).square().mean().sqrt()) < 0.04  # √(2 / 4000) each


@MAKERS
def test_it_preconditions_conjugate_gradients(make: Any) -> None:
    """Inputs of very different sizes make the Gauss-Newton matrix badly conditioned; K-FAC sees them."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    x, y = torch.randn(200, 20, dtype=torch.float64) * torch.logspace(-1.5, 1, 20), torch.randint(3, (200,))
    operator = ggn(model, functional.cross_entropy, (x, y))
    loss = functional.cross_entropy(model(x), y)
    b = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
    damping, tolerance = 1e-4, 1e-4
    preconditioner = make(model, "categorical", (x, y), kind="exact").inverse(damping)
    plain = cg(operator, b, shift=damping, tolerance=tolerance, max_iterations=1000)
    helped = cg(operator, b, shift=damping, tolerance=tolerance, preconditioner=preconditioner, max_iterations=1000)
    assert helped.converged
    assert helped.iterations < 0.6 * plain.iterations
    residual = (b - operator @ helped.x - damping * helped.x).norm() / b.norm()
    assert float(residual) <= 1.01 * tolerance
    # the same solution without iterations where the curvature is the approximation itself
    approximation = make(model, "categorical", (x, y), kind="exact")
    direct = cg(approximation, b, shift=damping, tolerance=1e-9, preconditioner=preconditioner)
    assert direct.iterations <= 2
    torch.testing.assert_close(direct.x, preconditioner @ b, rtol=1e-6, atol=1e-9)
