"""Two processes with a share of the data each have the operator of all the data."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

from kronfac.operators import fisher, ggn, hessian
from kronfac.operators.ranks import bits
from kronfac.spectrum import block_traces, eigsh, trace
from tests.operators.cases import dense_ggn, dense_hessian, make_case, relative_error
from tests.operators.state import unchanged
from tests.processes import run_ranks

SPLIT = 4  # examples of rank 0; rank 1 has the other seven


def _share(rank: int, inputs: Tensor, targets: Tensor, first: int = SPLIT) -> tuple[Tensor, Tensor]:
    half = slice(0, first) if rank == 0 else slice(first, None)
    return inputs[half], targets[half]


def _outcome(run: Callable[[], object]) -> str:
    try:
        run()
    except (ValueError, RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def _work(rank: int, folder: Path) -> None:
    case = make_case("mlp")
    loss, whole = case.loss_fn, (case.inputs, case.targets)
    share = _share(rank, *whole)
    found: dict[str, Any] = {}

    def summed(output: Tensor, target: Tensor) -> Tensor:
        return loss(output, target) * len(output)

    with unchanged(case.model):
        operator = hessian(case.model, loss, share)
        found["hessian"] = operator.to_dense()
        found["block"] = operator.blocks()["2"].to_dense()
        eigen = eigsh(operator, 4, tol=1e-10)
        found["values"], found["vectors"] = eigen.values, eigen.vectors
        found["trace"] = trace(operator, probes=8).value
        found["block trace"] = block_traces(operator, probes=4)["0"].trace
    found["chunked"] = hessian(case.model, loss, share, chunk_size=2).to_dense()
    found["summed"] = hessian(case.model, summed, share, reduction="sum").to_dense()
    found["ggn"] = ggn(case.model, loss, [share] if rank else [share, share][:1]).to_dense()
    found["nothing"] = hessian(case.model, loss, _share(rank, *whole, first=0)).to_dense()
    rows = [(x[None], y[None]) for x, y in zip(*share, strict=True)]
    found["mc"] = fisher(case.model, "categorical", rows).to_dense()
    found["alone"] = hessian(case.model, loss, share, distributed=False).to_dense()
    found["group"] = hessian(case.model, loss, share, distributed=distributed.group.WORLD).to_dense()
    groups = [distributed.new_group([single]) for single in range(2)]
    found["own group"] = hessian(case.model, loss, share, distributed=groups[rank]).to_dense()
    found["foreign group"] = _outcome(lambda: hessian(case.model, loss, share, distributed=groups[1 - rank]))

    # What must not differ between the ranks, and what must not happen to one alone.
    size = operator.shape[0]
    torch.manual_seed(rank)
    found["other vectors"] = _outcome(lambda: operator @ torch.randn(size, dtype=torch.float64))
    found["other counts"] = _outcome(lambda: operator @ torch.ones(size, 1 + rank, dtype=torch.float64))
    found["other seeds"] = _outcome(lambda: eigsh(operator, 2, seed=rank))
    found["other params"] = _outcome(lambda: hessian(case.model, loss, share, ["0.weight"] if rank else ["0.bias"]))
    broken = (share[0] * (float("nan") if rank else 1.0), share[1])
    found["nan on a rank"] = _outcome(lambda: hessian(case.model, loss, broken))
    found["no data"] = _outcome(lambda: hessian(case.model, loss, []))
    with torch.no_grad():
        case.model[0].weight.mul_(1.0 + 1e-9 * rank)  # type: ignore[index,union-attr,operator]
    found["other model"] = _outcome(lambda: operator @ torch.ones(size, dtype=torch.float64))
    norm = make_case("batchnorm")
    found["batch_norm"] = _outcome(
        lambda: hessian(norm.model, norm.loss_fn, _share(rank, norm.inputs, norm.targets), batch_norm="batch")
    )

    # A call that the other rank does not make, last, since the group is of no use afterwards.
    hasty = distributed.new_group(timeout=timedelta(milliseconds=300))
    if rank == 0:
        found["left alone"] = _outcome(lambda: hessian(case.model, loss, share, distributed=hasty))
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(_work, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_shares_add_up_to_the_whole(ranks: list[dict[str, Any]]) -> None:
    case = make_case("mlp")
    exact = dense_hessian(case.model, case.loss_fn, case.inputs, case.targets)
    for found in ranks:
        assert relative_error(found["hessian"], exact) < 1e-12
        assert relative_error(found["chunked"], exact) < 1e-12
        assert relative_error(found["nothing"], exact) < 1e-12
        assert relative_error(found["group"], exact) < 1e-12
        assert relative_error(found["block"], exact[-21:, -21:]) < 1e-12
        assert relative_error(found["summed"], exact * len(case.inputs)) < 1e-12
        assert relative_error(found["ggn"], dense_ggn(case.model, case.loss_fn, case.inputs, case.targets)) < 1e-12
    for name in ("hessian", "block", "chunked", "summed", "ggn", "mc"):
        assert torch.equal(ranks[0][name], ranks[1][name])


def test_draws_are_those_of_the_whole_list(ranks: list[dict[str, Any]]) -> None:
    case = make_case("mlp")
    rows = [(x[None], y[None]) for x, y in zip(case.inputs, case.targets, strict=True)]
    assert relative_error(ranks[0]["mc"], fisher(case.model, "categorical", rows).to_dense()) < 1e-12


def test_methods_take_the_same_steps_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    case = make_case("mlp")
    operator = hessian(case.model, case.loss_fn, (case.inputs, case.targets))
    exact = torch.linalg.eigvalsh(operator.to_dense())
    expected = exact[exact.abs().argsort(descending=True)][:4]
    for found in ranks:
        assert relative_error(found["values"], expected) < 1e-9
        assert found["trace"] == pytest.approx(trace(operator, probes=8).value, rel=1e-10)
        assert found["block trace"] == pytest.approx(block_traces(operator, probes=4)["0"].trace, rel=1e-10)
    assert torch.equal(ranks[0]["vectors"], ranks[1]["vectors"])


def test_opting_out(ranks: list[dict[str, Any]]) -> None:
    case = make_case("mlp")
    for rank, found in enumerate(ranks):
        expected = dense_hessian(case.model, case.loss_fn, *_share(rank, case.inputs, case.targets))
        assert relative_error(found["alone"], expected) < 1e-12
        assert relative_error(found["own group"], expected) < 1e-12
        assert "no member of the given process group" in found["foreign group"]


def test_differences_between_ranks_are_errors_on_all(ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(ranks):
        assert found["other vectors"].startswith("ValueError: kronfac.operators.hessian: v: not the same on all ranks")
        assert "number of vectors, v: not the same" in found["other counts"]
        assert "v: not the same" in found["other seeds"]
        assert "params: not the same" in found["other params"]
        assert "model: not the same" in found["other model"]
        assert "expected at least one example, got none on any rank" in found["no data"]
        assert "nor shared between processes" in found["batch_norm"]
        here = "ValueError: kronfac.operators.hessian: loss_fn: the loss is nan"
        there = "RuntimeError: kronfac.operators.hessian: another rank of the process group failed"
        assert found["nan on a rank"].startswith(here if rank else there)


def test_a_rank_that_is_left_alone_is_told_why(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["left alone"].startswith("RuntimeError: kronfac.operators.hessian: the ranks of the process group")
    assert "Every rank must make the same calls" in ranks[0]["left alone"]


def test_without_a_group_the_option_is_checked_and_does_nothing() -> None:
    model = nn.Linear(3, 2)
    batch = (torch.randn(4, 3), torch.randint(0, 2, (4,)))
    first, second = (
        hessian(model, functional.cross_entropy, batch, distributed=value).to_dense() for value in (True, False)
    )
    assert torch.equal(first, second)
    with pytest.raises(TypeError, match="distributed: expected True, False or a torch"):
        hessian(model, functional.cross_entropy, batch, distributed="nccl")


def test_a_sampler_that_repeats_examples_is_refused() -> None:
    model = nn.Linear(3, 2)
    dataset = TensorDataset(torch.randn(7, 3), torch.randint(0, 2, (7,)))
    loss = functional.cross_entropy
    shares = []
    for rank in range(2):
        uneven = DistributedSampler(dataset, 2, rank, shuffle=False)
        with pytest.raises(ValueError, match="DistributedSampler repeats 1 examples"):
            hessian(model, loss, DataLoader(dataset, batch_size=2, sampler=uneven))
        hessian(model, loss, DataLoader(dataset, sampler=DistributedSampler(dataset, 7, rank)))
        share = Subset(dataset, range(rank, len(dataset), 2))  # what the message advises
        shares.append(hessian(model, loss, DataLoader(share, batch_size=2), reduction="mean").to_dense() * len(share))
    whole = hessian(model, loss, dataset.tensors).to_dense()
    assert relative_error((shares[0] + shares[1]) / 7, whole) < 1e-5


def test_bits_tell_tensors_apart() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex128):
        ones = torch.ones(5, 3).to(dtype)
        assert bits(ones) == bits(ones.clone()) == bits(ones.mT.clone().mT)
        changed = ones.clone()
        changed[2, 1] = 0
        assert bits(ones) != bits(changed)
        assert bits(ones, changed) != bits(changed, ones)
    assert bits(torch.full((1000,), -1, dtype=torch.int64)) >= 0
