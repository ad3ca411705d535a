"""LoRA by the peft package: the adapters are preconditioned, as they are when written by hand."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from kronfac.optim import KFAC
from tests.optim.models import equal, mlp
from tests.optim.test_reparametrised import Adapted

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
peft = pytest.importorskip("peft")


def test_lora_is_what_is_written_by_hand() -> None:
    config = peft.LoraConfig(target_modules=["0", "2"], r=2, lora_alpha=2, lora_dropout=0.0)
    base = mlp(4, 5, 3, dtype=torch.float64)
    hand = nn.Sequential(Adapted(nn.Linear(4, 5), 2), nn.Tanh(), Adapted(nn.Linear(5, 3), 2)).double()
    for index in (0, 2):
        hand[index].base.load_state_dict(base[index].state_dict())
    model = peft.get_peft_model(base, config).double()
    for index in (0, 2):
        layer = model.base_model.model[index]
        hand[index].down.load_state_dict(layer.lora_A["default"].state_dict())
        hand[index].up.load_state_dict(layer.lora_B["default"].state_dict())
    frozen = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = {"fisher": "exact", "damping": 1e-2, "inverse_every": 2}
        one, other = KFAC(model, 0.1, **options), KFAC(hand, 0.1, **options)
        assert len(one.layers) == len(other.layers) == 4
        assert all("lora_" in name for name in one.layers)
        for _ in range(5):
            x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
            for net, optimizer in ((model, one), (hand, other)):
                optimizer.zero_grad()
                functional.cross_entropy(net(x), y).backward()
                optimizer.step()
    for index in (0, 2):
        layer = model.base_model.model[index]
        torch.testing.assert_close(hand[index].down.weight, layer.lora_A["default"].weight)
        torch.testing.assert_close(hand[index].up.weight, layer.lora_B["default"].weight)
    assert equal(frozen, [p.detach() for p in model.parameters() if not p.requires_grad])
