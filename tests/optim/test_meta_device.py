"""Steps of KFAC on a device without data: what reads a tensor, or brings two devices together, fails there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.optim import KFAC, reading, state_check
from tests.optim.available import IDS, STRUCTURES
from tests.optim.models import convnet, images, train_step, tree_map
from tests.optim.test_structures import Everything, tokens

NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "convnet": (convnet, lambda: images(12)),
    "tokens": (Everything, lambda: tokens(12)),
}


def fused_sgd(parameters: Sequence[Tensor], moves: Sequence[Tensor], buffers: Sequence[Tensor], **options: Any) -> None:
    """Asks for what torch's kernel for CUDA tensors asks for."""
    for some in zip(parameters, moves, *([buffers] if buffers else []), strict=True):
        assert len({(t.shape, t.stride(), t.dtype, t.device) for t in some}) == 1
    assert options["found_inf"].dtype == torch.float32
    assert options["found_inf"].shape == ()
    assert {t.device for t in (*parameters, options["found_inf"])} == {torch.device("meta")}


@pytest.fixture(autouse=True)
def _meta_is_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kronfac.optim.structures.LARGEST_A_IF_ASKED", 3)
    monkeypatch.setattr("kronfac.optim.watching.refuse_parameters", lambda model, groups: None)
    monkeypatch.setattr("kronfac.optim.watching.refuse_replaced", lambda model, layers: None)
    monkeypatch.setattr(reading, "deferrable", lambda tensor: True)
    monkeypatch.setattr(state_check, "_checked", lambda where, value, shape: value)  # it reads the values
    monkeypatch.setattr(torch, "_fused_sgd_", fused_sgd)
    for module in ("curvature.recorder", "optim.kfac"):
        monkeypatch.setattr(f"kronfac.{module}.without_autocast", lambda device: nullcontext())
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator("cpu"))
    monkeypatch.setattr("kronfac.curvature.recorder.Generator", lambda device="cpu": generator("cpu"))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("structure", "solve"), STRUCTURES, ids=IDS)
def test_a_step_between_factorisations_reads_nothing_and_stays_on_the_device(
    structure: str, solve: str, network: str
) -> None:
    make, draw = NETWORKS[network]
    options: dict[str, Any] = {
        "structure": structure, "solve": solve, "inverse_every": 100, "norm_constraint": 0.1, "averaging": 0.9,
        "weight_decay": 0.01, "decoupled": network == "convnet", "fisher": "exact",
    }  # fmt: skip
    model = make()
    optimizer = KFAC(model, 0.1, seed=0, **options)
    for _ in range(2):
        train_step(model, optimizer, *draw())
    twin = make().to("meta")
    other = KFAC(twin, 0.1, seed=0, **options)
    other.load_state_dict(tree_map(lambda t: t if t.dtype == torch.uint8 else t.to("meta"), optimizer.state_dict()))
    for _ in range(2):
        x, y = (tensor.to("meta") for tensor in draw())
        other.zero_grad()
        functional.cross_entropy(twin(x), y).backward()
        other.step()
    assert other._counters["step"] == 4
    assert other._ledger.is_open
    for layer in other._coverage.layers:
        assert layer.factors is not None
        assert layer.factorisation is not None
        assert layer.updates == 4
        assert {t.device.type for t in (*layer.factors[:2], *layer.factorisation.values())} == {"meta"}
    with pytest.raises((RuntimeError, NotImplementedError)):
        _ = other.steps
