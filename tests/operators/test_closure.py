from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import kronfac
from kronfac.operators import ClosureOperator, identity
from tests.operators.cases import CASES, Case, dense_ggn, difference_hessian, make_case, relative_error
from tests.operators.state import unchanged


class Counting:
    """The closure of a case, which counts its calls and the examples it was asked for."""

    def __init__(self, case: Case, *, outputs: bool = True) -> None:
        self.case, self.outputs = case, outputs
        self.calls: list[Tensor | None] = []

    @property
    def examples(self) -> int:
        return sum(len(self.case.inputs) if indices is None else len(indices) for indices in self.calls)

    def __call__(self, indices: Tensor | None) -> Any:
        self.calls.append(indices)
        case = self.case
        chosen = slice(None) if indices is None else indices
        out = case.model(case.inputs[chosen])
        loss = case.loss_fn(out, case.targets[chosen])
        return (loss, out) if self.outputs else loss


def operator_of(case: Case, indices: Tensor | None = None, **options: Any) -> ClosureOperator:
    return ClosureOperator(Counting(case), case.model.parameters(), indices, examples=len(case.inputs), **options)


def eval_case(name: str, dtype: torch.dtype = torch.float64) -> Case:
    case = make_case(name, dtype)
    case.model.eval()
    return case


@pytest.mark.parametrize("name", CASES)
def test_hessian_is_the_dense_one(name: str) -> None:
    case = eval_case(name)
    expected = difference_hessian(case.model, case.loss_fn, case.inputs, case.targets)
    with unchanged(case.model):
        actual = operator_of(case).to_dense()
    assert relative_error(actual, expected) < 1e-7


@pytest.mark.parametrize("name", CASES)
def test_ggn_is_the_dense_one(name: str) -> None:
    case = eval_case(name)
    expected = dense_ggn(case.model, case.loss_fn, case.inputs, case.targets)
    with unchanged(case.model):
        actual = operator_of(case, curvature="ggn").to_dense()
    assert relative_error(actual, expected) < 1e-12


def _output_fisher(likelihood: str, out: Tensor) -> Tensor:
    if likelihood == "categorical":
        p = out.softmax(0)
        return p.diag() - torch.outer(p, p)
    if likelihood == "bernoulli":
        p = out.sigmoid()
        return (p * (1 - p)).diag()
    return torch.eye(len(out), dtype=out.dtype)


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_fisher_is_the_mean_of_those_of_the_examples(likelihood: str) -> None:
    case = eval_case("mlp")
    model = case.model
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def run(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, values, (x,))

    expected = torch.zeros(operator_of(case).shape, dtype=torch.float64)
    for x in case.inputs:
        parts = jacrev(run)(parameters, x)
        jacobian = torch.cat([part.flatten(1) for part in parts.values()], dim=1)
        expected += jacobian.mT @ _output_fisher(likelihood, run(parameters, x)) @ jacobian / len(case.inputs)
    actual = operator_of(case, curvature="fisher", likelihood=likelihood).to_dense()
    assert relative_error(actual, expected) < 1e-12


@given(
    curvature=st.sampled_from(["hessian", "ggn", "fisher"]),
    chunk_size=st.integers(1, 12),
    chosen=st.lists(st.integers(0, 10), min_size=1, max_size=11, unique=True) | st.none(),
    columns=st.integers(1, 3),
    keep=st.sampled_from([None, True, False]),
)
def test_chunks_are_weighted_by_their_examples(
    curvature: str, chunk_size: int, chosen: list[int] | None, columns: int, keep: bool | None
) -> None:
    case = eval_case("mlp")
    indices = None if chosen is None else torch.tensor(chosen)
    likelihood = "categorical" if curvature == "fisher" else None
    whole = operator_of(case, indices, curvature=curvature, likelihood=likelihood)
    cut = operator_of(case, indices, curvature=curvature, likelihood=likelihood, chunk_size=chunk_size, keep_graph=keep)
    V = torch.randn(whole.shape[0], columns, dtype=torch.float64)
    expected = torch.stack([whole @ v for v in V.unbind(1)], dim=1)
    for _ in range(2):  # the second time from kept graphs, where they are
        assert relative_error(cut @ V, expected) < 1e-11
    count = 11 if indices is None else len(indices)
    assert cut.propagations == 2 * whole.propagations == 2 * 2 * count * columns


def test_a_set_of_examples_is_the_operator_of_these_examples() -> None:
    case = eval_case("regression")
    rows = torch.tensor([6, 1, 3])
    part = Case("part", case.model, case.loss_fn, case.inputs[rows], case.targets[rows])
    expected = difference_hessian(part.model, part.loss_fn, part.inputs, part.targets)
    assert relative_error(operator_of(case, rows).to_dense(), expected) < 1e-7


def test_frozen_and_unused_parameters_have_zero_rows() -> None:
    case = eval_case("mlp")
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    frozen = case.model[0].weight  # type: ignore[index]
    full = operator_of(case, curvature="ggn").to_dense()
    frozen.requires_grad_(False)
    parameters = [*case.model.parameters(), unused]
    n = frozen.numel()
    for curvature in ("hessian", "ggn"):
        dense = ClosureOperator(Counting(case), parameters, curvature=curvature).to_dense()
        assert not dense[:n].any()
        assert not dense[-2:].any()
        assert not dense[:, :n].any()
    assert relative_error(dense[n:-2, n:-2], full[n:, n:]) < 1e-12


def test_the_graph_of_one_piece_is_kept_until_release_or_a_change() -> None:
    case = eval_case("mlp")
    closure = Counting(case)
    weight = case.model[0].weight  # type: ignore[index]
    op = ClosureOperator(closure, case.model.parameters(), curvature="hessian")
    v = torch.randn(op.shape[0], dtype=torch.float64)
    first = op @ v
    assert torch.equal(op @ v, first)
    assert len(closure.calls) == 1
    op.release()
    assert torch.equal(op @ v, first)
    assert len(closure.calls) == 2
    with torch.no_grad():
        weight.mul_(1.5)
    second = op @ v
    assert len(closure.calls) == 3
    assert relative_error(second, first) > 1e-3
    weight.data.mul_(1 / 1.5)  # counts no version
    assert relative_error(op @ v, first) < 1e-12
    assert len(closure.calls) == 4


def test_chunks_keep_no_graph_unless_asked() -> None:
    case = eval_case("mlp")
    for keep, calls in ((None, 8), (True, 4)):
        closure = Counting(case)
        op = ClosureOperator(closure, case.model.parameters(), examples=11, chunk_size=3, keep_graph=keep)
        v = torch.randn(op.shape[0], dtype=torch.float64)
        assert relative_error(op @ v, op @ v) < 1e-12
        assert [len(indices) for indices in closure.calls if indices is not None] == [3, 3, 3, 2] * (calls // 4)


def test_all_products_see_the_same_random_numbers_and_leave_the_streams() -> None:
    case = make_case("batchnorm")
    case.model.train()
    with unchanged(case.model):
        op = operator_of(case)
        rebuilt = operator_of(case, chunk_size=None, keep_graph=False)
        v = torch.randn(op.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        first = op @ v
        assert torch.equal(op @ v, first)
        assert torch.equal(rebuilt @ v, first)
        assert torch.equal(rebuilt @ v, first)
    torch.rand(1)
    assert relative_error(operator_of(case) @ v, first) > 1e-3  # another mask


def test_train_mode_differentiates_through_the_statistics_of_the_batch() -> None:
    case = make_case("batchnorm")
    case.model[3].p = 0.0  # type: ignore[index]
    case.model.train()
    expected = kronfac.operators.hessian(
        case.model, case.loss_fn, (case.inputs, case.targets), batch_norm="batch"
    ).to_dense()
    assert relative_error(operator_of(case).to_dense(), expected) < 1e-10


class Odd(nn.Module):
    """Writes its buffers in every way there is, also one that it shares with its child."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("absent", None)
        self.register_buffer("cache", torch.zeros(0))
        self.linear.register_buffer("shared", self.mean)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        self.mean.mul_(0.5).add_(x.detach().mean(0))
        assert self.linear.shared is self.mean
        self.cache = torch.cat([self.cache, torch.ones(1)])
        if self.fails:
            raise RuntimeError("the model failed")
        return self.linear(x) * (1 + self.mean)


def test_buffers_written_in_any_way_are_as_before() -> None:
    model = Odd()
    x = torch.randn(4, 3)

    def closure(_: Tensor | None) -> Tensor:
        functional_call(model, {"count": torch.tensor(7.0)}, (x,))
        return model(x).square().mean()

    op = ClosureOperator(closure, model.parameters())
    v = torch.randn(op.shape[0])
    with unchanged(model):
        assert torch.equal(op @ v, op @ v)
        model.fails = True
        op.release()
        with pytest.raises(RuntimeError, match="the model failed"):
            op @ v
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert not torch.nn.modules.module._global_forward_hooks


def test_checkpointed_layers() -> None:
    case = eval_case("mlp")
    expected = operator_of(case).to_dense()

    def closure(_: Tensor | None) -> Tensor:
        hidden = checkpoint(case.model[:2], case.inputs, use_reentrant=False)  # type: ignore[index]
        return case.loss_fn(case.model[2](hidden), case.targets)  # type: ignore[index]

    with unchanged(case.model):
        assert relative_error(ClosureOperator(closure, case.model.parameters()).to_dense(), expected) < 1e-12


@pytest.mark.slow  # importing the compiler takes seconds
def test_a_compiled_model_runs_as_it_was_written() -> None:
    case = eval_case("batchnorm")
    expected = operator_of(case).to_dense()
    compiled = torch.compile(case.model)

    def closure(_: Tensor | None) -> Tensor:
        return case.loss_fn(compiled(case.inputs), case.targets)

    # Torch warns that hooks on all modules also fire for the wrapper, which does no harm here.
    with warnings.catch_warnings(), unchanged(case.model):
        warnings.simplefilter("ignore")
        assert relative_error(ClosureOperator(closure, case.model.parameters()).to_dense(), expected) < 1e-12


def test_a_penalty_that_differentiates_inside_and_a_linear_loss() -> None:
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)

    def penalty(_: Tensor | None) -> Tensor:
        (gradient,) = torch.autograd.grad((w**4).sum(), w, create_graph=True)
        return gradient.sum()  # 4 Σ w³, of which the Hessian is 24 w

    assert torch.equal(ClosureOperator(penalty, [w]).to_dense(), (24 * w).detach().diag())
    assert not ClosureOperator(lambda _: w.sum(), [w]).to_dense().any()


def test_outputs_that_are_the_parameters_themselves() -> None:
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    op = ClosureOperator(lambda _: ((w**3).sum(), w), [w], curvature="ggn")
    assert torch.equal(op.to_dense(), (6 * w).detach().diag())


def test_it_is_an_operator_like_the_others() -> None:
    case = eval_case("mlp")
    names = [name for name, _ in case.model.named_parameters()]
    op = operator_of(case, curvature="ggn", names=names)
    reference = kronfac.operators.ggn(case.model, case.loss_fn, (case.inputs, case.targets))
    v = torch.randn(op.shape[0], dtype=torch.float64)
    assert relative_error((op + identity(reference)) @ v, reference @ v + v) < 1e-12
    block, expected = op.blocks()["2"], reference.blocks()["2"]
    u = torch.randn(block.shape[0], dtype=torch.float64)
    assert relative_error(block @ u, expected @ u) < 1e-12
    parts = [torch.randn_like(p) for p in case.model.parameters()]
    for got, wanted in zip(op @ parts, reference @ parts, strict=True):
        assert relative_error(got, wanted) < 1e-12


def test_half_precision_parameters_have_float32_vectors() -> None:
    case = eval_case("mlp", torch.float32)
    expected = operator_of(case, curvature="ggn").to_dense()
    half = case.to(torch.bfloat16)
    op = operator_of(half, curvature="fisher", likelihood="categorical")
    assert op.dtype == torch.float32
    assert relative_error(op.to_dense(), expected) < 0.1


W = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    ("closure", "error", "message"),
    [
        (lambda _: W.sum().item(), TypeError, "expected a loss with its graph, a scalar tensor, got float"),
        (lambda _: None, TypeError, "got NoneType; return the loss itself, without .item"),
        (lambda _: W * 2, ValueError, r"expected a real scalar.*shape \(3,\)"),
        (lambda _: W.sum().long(), ValueError, "expected a real scalar"),
        (lambda _: (W.sum(), W, W), ValueError, "a pair .loss, outputs., got 3 values"),
        (lambda _: (W.sum(), [W]), TypeError, "outputs: expected one tensor, got list"),
        (lambda _: W.detach().sum(), ValueError, "depends on none of the optimized parameters"),
        (lambda _: W.sum() * torch.nan, ValueError, "expected a finite loss, got nan; all parameters are finite"),
        (lambda _: W.sum().sqrt() * torch.inf, ValueError, "expected a finite loss, got inf"),
        (lambda _: (W - 1).square().sum().sqrt(), ValueError, "not finite although the loss is"),
    ],
)
def test_what_a_closure_may_not_return(closure: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    op = ClosureOperator(closure, [W])
    with pytest.raises(error, match=f"^kronfac.operators.ClosureOperator: closure: .*{message}"):
        op @ torch.ones(3)


@pytest.mark.parametrize(
    ("closure", "message"),
    [
        (lambda _: W.square().sum(), r"needs the outputs.*return the pair \(loss, outputs\)"),
        (lambda _: (W.square().sum(), W.detach()), "with its graph, got torch.float32, without one"),
        (lambda _: (W.square().sum(), W * 2), "not computed from the outputs"),
        (lambda _: (lambda z: (z.square().sum() + W.square().sum(), z))(W * 2), "other than through the outputs"),
    ],
)
@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
def test_outputs_have_to_be_what_the_loss_was_computed_from(
    curvature: str, closure: Callable[[Any], Any], message: str
) -> None:
    op = ClosureOperator(closure, [W], curvature=curvature, likelihood="gaussian" if curvature == "fisher" else None)
    with pytest.raises(ValueError, match=message):
        op @ torch.ones(3)


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]


def test_what_cannot_be_differentiated_twice_is_refused() -> None:
    op = ClosureOperator(lambda _: OnceDifferentiable.apply(W).sum(), [W])
    with pytest.raises(RuntimeError, match="cannot be differentiated twice: OnceDifferentiableBackward"):
        op @ torch.ones(3)


def test_a_closure_that_calls_backward_is_refused() -> None:
    def closure(_: Tensor | None) -> Tensor:
        loss = W.exp().sum()
        loss.backward()
        return loss

    op = ClosureOperator(closure, [W])
    with pytest.raises(RuntimeError, match="without calling backward"):
        op @ torch.ones(3)
    W.grad = None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"curvature": "newton"}, ValueError, "curvature: expected one of 'hessian', 'ggn', 'fisher', got 'newton'"),
        ({"curvature": "fisher"}, ValueError, "likelihood: expected a likelihood"),
        ({"likelihood": "gaussian"}, ValueError, "likelihood: expected None"),
        ({"examples": 0}, ValueError, "examples: expected at least 1, got 0"),
        ({"chunk_size": 2.0}, TypeError, "chunk_size: expected an integer or None, got 2.0"),
        ({"chunk_size": 2}, ValueError, "chunk_size: .*examples"),
        ({"indices": [1, 2]}, TypeError, "indices: expected an int64 tensor on the CPU"),
        ({"indices": torch.tensor([1.0])}, TypeError, "indices: expected an int64 tensor"),
        ({"indices": torch.zeros(0, dtype=torch.int64)}, ValueError, "indices: expected a vector with entries"),
        ({"indices": torch.tensor([0, 3]), "examples": 3}, ValueError, "indices: expected 0 to 2"),
        ({"parameters": []}, ValueError, "parameters: expected at least one with entries"),
        ({"parameters": [torch.ones(2, dtype=torch.int64)]}, TypeError, "parameter 0: expected a real"),
        ({"closure": 3}, TypeError, "closure: expected a callable of indices, got int"),
        ({"names": ["a", "b"]}, ValueError, "names: expected 1"),
        ({"keep_graph": 1}, TypeError, "keep_graph: expected True, False or None"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"closure": lambda _: W.sum(), "parameters": [W], **arguments}
    with pytest.raises(error, match=f"^kronfac.operators.ClosureOperator: {message}"):
        ClosureOperator(**given)


def test_a_product_that_is_not_finite_says_why() -> None:
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    op = ClosureOperator(lambda _: w.abs().pow(1.5).sum(), [w])
    with pytest.raises(ValueError, match="a product with the hessian is not finite although the loss is"):
        op @ torch.ones(2, dtype=torch.float64)


def test_recorders_take_nothing_from_the_closure() -> None:
    model = nn.Linear(3, 2)
    optimizer = kronfac.KFAC(model, lr=0.1, seed=0)
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
    op = ClosureOperator(lambda _: functional.cross_entropy(model(x), y), model.parameters())
    op @ torch.ones(op.shape[0])
    with pytest.raises(RuntimeError):
        optimizer.step()  # nothing was recorded
