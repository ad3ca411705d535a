from __future__ import annotations

import numpy as np
import pytest
import torch

from kronfac.operators import CurvatureOperator, hessian
from kronfac.spectrum import block_traces
from tests.operators.cases import make_case


def setup() -> tuple[CurvatureOperator, torch.Tensor, dict[str, slice]]:
    case = make_case("convnet")
    operator = hessian(case.model, case.loss_fn, (case.inputs, case.targets))
    places, first = {}, 0
    for name, block in operator.blocks().items():
        places[name] = slice(first, first + block.shape[0])
        first += block.shape[0]
    return operator, operator.to_dense(), places


@pytest.mark.parametrize("restricted", [False, True])
def test_traces_and_norms_of_all_layers(restricted: bool) -> None:
    operator, dense, places = setup()
    names = list(places)
    scores: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for seed in range(40):
        found = block_traces(operator, probes=40, restricted=restricted, seed=seed)
        assert list(found) == names
        for name, result in found.items():
            own = places[name]
            rows = dense[own, own] if restricted else dense[own]
            scores[name].append(
                (
                    (result.trace - float(dense[own, own].trace())) / result.trace_stderr,
                    (result.squared_frobenius - float(rows.square().sum())) / result.squared_frobenius_stderr,
                )
            )
            assert result.size == own.stop - own.start
            assert result.mean_eigenvalue == result.trace / result.size
    both = np.array([scores[name] for name in names])
    assert 0.58 <= float((np.abs(both[..., 0]) <= 1).mean()) <= 0.78
    assert 0.5 <= float((np.abs(both[..., 1]) <= 1).mean()) <= 0.8  # of a skew distribution
    # a block that was left out or misplaced would be off at every seed
    assert float(np.abs(both.mean(1)).max()) < 1.0


def test_until_every_trace_is_precise() -> None:
    operator, dense, places = setup()
    spent: list[tuple[int, int | None]] = []
    found = block_traces(operator, target_relative=0.2, progress=lambda *counts: spent.append(counts))
    largest = max(abs(result.trace) for result in found.values())
    for name, result in found.items():
        assert result.trace_stderr <= 0.2 * largest
        assert abs(result.trace - float(dense[places[name], places[name]].trace())) <= 5 * result.trace_stderr
    counts = {result.products for result in found.values()}
    assert len(counts) == 1
    assert spent[-1] == (counts.copy().pop(), None)
    # Hardly more than asked for: what half the probes gave was not enough.
    fewer = block_traces(operator, probes=counts.pop() // 2)
    assert any(result.trace_stderr > 0.2 * largest for result in fewer.values())


def test_a_target_beyond_the_budget() -> None:
    operator, _, _ = setup()
    found = block_traces(operator, target_relative=1e-6, max_products=20)
    assert {result.products for result in found.values()} == {20}
    assert any(result.trace_stderr > 1e-6 * abs(result.trace) for result in found.values())


def test_groups_of_the_users_own() -> None:
    operator, dense, places = setup()
    names = list(places)
    groups = {"ends": [names[0], names[-1]], "one": [f"{names[1]}.weight"]}
    found = block_traces(operator, groups, probes=400)
    ends = torch.cat([dense.diagonal()[places[names[0]]], dense.diagonal()[places[names[-1]]]])
    assert abs(found["ends"].trace - float(ends.sum())) < 4 * found["ends"].trace_stderr
    assert found["one"].size == dict(make_case("convnet").model.named_parameters())[f"{names[1]}.weight"].numel()


def test_a_block_of_entries_apart_is_the_same_matrix() -> None:
    operator, dense, places = setup()
    names = list(places)
    block = operator.blocks({"ends": [names[-1], names[0]]})["ends"]
    index = operator.entries_of(block)
    torch.testing.assert_close(block.to_dense(), dense[index][:, index])


def test_same_seed_same_result() -> None:
    operator, _, _ = setup()
    one, two, other = (block_traces(operator, probes=4, seed=seed) for seed in (3, 3, 4))
    assert one == two
    assert one != other


def test_refusals() -> None:
    operator, dense, _ = setup()
    with pytest.raises(TypeError, match=r"op: expected an operator of kronfac\.operators, got Tensor"):
        block_traces(dense)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="probes: expected at least 2, got 1"):
        block_traces(operator, probes=1)
    with pytest.raises(ValueError, match="probes, target_relative: give one of them"):
        block_traces(operator, probes=10, target_relative=0.1)
    with pytest.raises(ValueError, match="target_relative: expected a finite number greater than 0, got 0"):
        block_traces(operator, target_relative=0)
    with pytest.raises(ValueError, match="target_relative: expected None with restricted=True"):
        block_traces(operator, target_relative=0.1, restricted=True)
    with pytest.raises(ValueError, match="max_products: expected at least 16, got 8"):
        block_traces(operator, target_relative=0.1, max_products=8)
    with pytest.raises(ValueError, match=r"blocks: groups\['a'\]: 'nowhere' names none of the operator's parameters"):
        block_traces(operator, {"a": ["nowhere"]})
    with pytest.raises(TypeError, match="expected a list of names, got '0'; wrap it in a list"):
        block_traces(operator, {"a": "0"})
    with pytest.raises(ValueError, match="expected distinct parameters"):
        block_traces(operator, {"a": ["0", "0.weight"]})
    with pytest.raises(ValueError, match="expected distinct parameters"):
        block_traces(operator, {"a": []})
    other, _, _ = setup()
    with pytest.raises(ValueError, match="expected one of this operator's blocks"):
        operator.entries_of(other.blocks()["0"])
