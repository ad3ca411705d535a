"""The comparison's certificate and exact traces, and that absent peers are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kronfac
from bench.spectrum import command, sides
from bench.spectrum.problem import Problem, certify


@pytest.fixture(scope="module")
def problem() -> Problem:
    pytest.importorskip("sklearn")
    return Problem.trained("tiny", 40)


def dense(problem: Problem) -> Tensor:
    return torch.stack([problem.reference(row) for row in torch.eye(problem.size, dtype=torch.float64)])


def test_the_certificate_refuses_wrong_pairs(problem: Problem) -> None:
    values, vectors = torch.linalg.eigh(dense(problem))
    order = values.abs().argsort(descending=True)[:4]
    values, vectors = values[order], vectors[:, order]
    exact = problem.exact_eigenvalues(4)
    assert exact == pytest.approx(values.numpy(), rel=1e-8)
    assert certify(problem, exact, values, 3 * vectors).holds(1e-8)
    shuffled = torch.tensor([2, 0, 3, 1])
    assert certify(problem, exact, values[shuffled], vectors[:, shuffled]).holds(1e-8)
    twice = torch.tensor([0, 0, 1, 2])  # a second copy of the first; each residual is small
    found = certify(problem, exact, values[twice], vectors[:, twice])
    assert found.residual is not None
    assert found.residual < 1e-8
    assert not found.holds(1e-3)
    tilted = vectors + 0.01 * torch.roll(vectors, 1, dims=1)
    assert not certify(problem, exact, values, tilted).holds(1e-4)
    assert not certify(problem, exact, values, vectors * float("nan")).holds(1e-4)
    assert certify(problem, exact, values + 1.0, vectors, limit=1e-3).residual is None


def test_the_exact_trace_is_that_of_the_gauss_newton_matrix(problem: Problem) -> None:
    operator = kronfac.operators.ggn(
        problem.in_precision("float64").model, F.cross_entropy, (problem.inputs.double(), problem.targets)
    )
    assert problem.gauss_newton_trace() == pytest.approx(float(operator.to_dense().trace()), rel=1e-10)


def test_without_peers_kronfac_is_measured_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sides.Peer, "present", lambda self: False)
    small = "--network tiny --examples 40 --top 2 --probes 2 --steps 5 --products 12 --seeds 2 --rounds 1"
    assert command.main(["all", *small.split(), "--json", str(tmp_path / "report.json")]) == 0
    text = capsys.readouterr().out
    assert "PyHessian: not measured: not installed" in text
    assert "hessian-eigenthings: not measured: not installed" in text
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["eigenvalues"]) == ["kronfac", "kronfac, all copies"]
    assert report["eigenvalues"]["kronfac"]["certified"]
    assert report["parameters"] == 210
    assert len(report["traces"]) == 2


@pytest.mark.parametrize("peer", sides.PEERS, ids=lambda peer: str(peer.module))
def test_peers_run_and_leave_torch_as_it_was(problem: Problem, peer: sides.Peer) -> None:
    pytest.importorskip(peer.module)
    exact, before, stream = problem.exact_eigenvalues(2), torch.eig, torch.get_rng_state()
    for method in peer.methods.values():
        setting = method.families(2)[0][-1]  # the most accurate
        if "maxIter" in setting or "tol" in setting:
            setting = {**setting, "tol": 1e-5}
        meter = sides.Meter()
        found = method.solve(problem, 2, setting, meter)
        assert meter.products >= 2
        assert certify(problem, exact, found.values, found.vectors).holds(0.02)
        with pytest.raises(sides.GivenUpError, match="after 1 products"):
            method.solve(problem, 2, setting, sides.Meter(deadline=0.0))
    assert torch.eig is before
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(parameter.grad is None for parameter in problem.model.parameters())
