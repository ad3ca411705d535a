"""`KRONFAC_DEVICE=cuda pytest tests/ops`, as far as it can be looked at without a GPU: every tensor goes along."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from kronfac.ops import naive
from tests.ops.device import on_the_cpu

FOLDER = Path(__file__).resolve().parents[1] / "ops"
FILES = [*sorted(FOLDER.glob("test_*.py")), FOLDER / "cases.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_tensor_is_made_elsewhere_than_on_the_default_device(file: Path) -> None:
    """What a module makes when it is imported, and what its parametrizations hold; then what its functions name."""
    spec = importlib.util.spec_from_file_location(f"imported_on_meta_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with torch.device("meta"):
        spec.loader.exec_module(module)
    made: list[Any] = []
    for value in vars(module).values():
        marks = getattr(value, "pytestmark", [])
        arguments = [mark.args for mark in marks if mark.name == "parametrize"] if isinstance(marks, list) else []
        made += [leaf for leaf in tree_leaves((value, arguments)) if isinstance(leaf, Tensor)]
    assert {tensor.device.type for tensor in made} <= {"meta"}
    text = file.read_text(encoding="utf-8")
    assert not re.findall(r"""\.cpu\(\)|\.numpy\(\)|from_numpy|['"]cpu['"]|\.cuda\(|Generator\(\)""", text)


def test_references_get_copies_and_give_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """With copies of the kind that another device makes, results and changes are the same."""
    copied = []

    def cpu(tensor: Tensor) -> Tensor:
        copied.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(Tensor, "cpu", cpu)
    x, out = torch.randn(5, 3, requires_grad=True), torch.ones(4, 4)
    expected = 0.5 * out + naive.covariance(x.detach(), True, 2.0)
    on_the_cpu(naive.covariance_)(out, x.detach(), bias=True, decay=0.5, scale=2.0)
    torch.testing.assert_close(out, expected)
    assert len(copied) == 2
    (gradient,) = torch.autograd.grad(on_the_cpu(naive.covariance)(x).sum(), x)
    (wanted,) = torch.autograd.grad(naive.covariance(x).sum(), x)
    assert torch.equal(gradient, wanted)
    factors = [torch.eye(2), torch.eye(3)]
    inverses, info = on_the_cpu(naive.damped_inverse)(factors, torch.tensor(1.0))
    assert [inverse[0, 0].item() for inverse in inverses] == pytest.approx([0.5, 0.5])
    assert info.tolist() == [0, 0]
    assert len(copied) == 6
