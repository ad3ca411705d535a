"""Lightning: automatic and manual optimization, against the plain loop."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from kronfac.optim import KFAC
from tests.frameworks.replay import recorded_calls, same_parameters
from tests.optim.models import equal, mlp, same_tree, snapshot

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*:UserWarning:lightning"
    ),
]
lightning = pytest.importorskip("lightning.pytorch")


def data() -> TensorDataset:
    torch.manual_seed(5)
    return TensorDataset(torch.randn(48, 6), torch.randint(3, (48,)))


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return mlp(6, 8, 3)


def made(model: nn.Module) -> KFAC:
    return KFAC(model, 0.1, inverse_every=3, seed=0)


class Automatic(lightning.LightningModule):  # type: ignore[misc]
    """The usual module; K-FAC watches the network inside it, or the module itself."""

    def __init__(self, itself: bool = False) -> None:
        super().__init__()
        self.net, self.itself = network(), itself
        self.kfac: list[KFAC] = []

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.net(x)  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss."""
        x, y = batch
        return functional.cross_entropy(self(x) if self.itself else self.net(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss; not recorded."""
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """K-FAC with a schedule by steps."""
        optimizer = made(self if self.itself else self.net)
        self.kfac.append(optimizer)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 6)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Manual(Automatic):
    """Steps by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:  # type: ignore[override]
        """One step."""
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(functional.cross_entropy(self.net(batch[0]), batch[1]))
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        optimizer.step()
        self.lr_schedulers().step()


def trainer(folder: Path, **options: Any) -> Any:
    return lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{"max_steps": 6, "enable_checkpointing": False, **options},
    )


def plain(accumulate: int, clip: float | None) -> tuple[nn.Module, KFAC]:
    model = network()
    optimizer = made(model)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 6)
    for index, (x, y) in enumerate(list(DataLoader(data(), 8)) * accumulate):
        (functional.cross_entropy(model(x), y) / accumulate).backward()
        if (index + 1) % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("itself", [False, True], ids=["the network", "the module itself"])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, None), (2, 0.5)])
def test_automatic_optimization_is_the_plain_loop(
    accumulate: int, clip: float | None, itself: bool, tmp_path: Path
) -> None:
    """Validation in between does not enter the statistics."""
    module = Automatic(itself)
    loop = trainer(tmp_path, accumulate_grad_batches=accumulate, gradient_clip_val=clip, val_check_interval=2)
    loop.fit(module, DataLoader(data(), 8), DataLoader(data(), 16))
    model, optimizer = plain(accumulate, clip)
    assert equal(snapshot(module.net), snapshot(model))
    assert module.kfac[0].state_dict()["kronfac"]["counters"] == optimizer.state_dict()["kronfac"]["counters"]
    assert module.kfac[0].skipped_steps == 0


def test_manual_optimization_is_the_plain_loop(tmp_path: Path) -> None:
    module = Manual()
    trainer(tmp_path).fit(module, DataLoader(data(), 8))
    model, optimizer = plain(1, 0.5)
    assert same_parameters(module.net, model)
    assert same_tree(module.kfac[0].state_dict(), optimizer.state_dict())
    wrapped = module.optimizers()
    assert isinstance(wrapped, KFAC)
    assert set(wrapped.factors()) == {"0", "2"}
    assert torch.equal(wrapped.clip_scales[0], module.kfac[0].clip_scales[0])


@pytest.mark.parametrize("kind", [Automatic, Manual])
def test_its_checkpoints_continue_bit_for_bit(kind: type[Automatic], tmp_path: Path) -> None:
    """Against a plain loop from the same checkpoint on the batches that Lightning then gives."""
    saved = tmp_path / "half.ckpt"
    first = trainer(tmp_path, max_steps=6)
    first.fit(kind(), DataLoader(data(), 8))
    first.save_checkpoint(saved)
    resumed = kind()
    calls = recorded_calls(resumed.net)
    trainer(tmp_path, max_steps=12).fit(resumed, DataLoader(data(), 8), ckpt_path=saved)
    assert len(calls) == 6

    content = torch.load(saved, weights_only=True)
    module = Automatic()
    module.load_state_dict(content["state_dict"])
    optimizer = made(module.net)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 6)
    optimizer.load_state_dict(content["optimizer_states"][0])
    scheduler.load_state_dict(content["lr_schedulers"][0])
    x, y = data().tensors
    for (batch,), _ in calls:
        labels = torch.stack([y[(x == row).all(1)][0] for row in batch])
        optimizer.zero_grad()
        functional.cross_entropy(module.net(batch), labels).backward()
        if kind is Manual:
            nn.utils.clip_grad_norm_(module.net.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
    assert optimizer.state_dict()["kronfac"]["counters"]["step"] == 12
    assert same_parameters(module.net, resumed.net)
    assert same_tree(optimizer.state_dict(), resumed.kfac[0].state_dict())


def test_mixed_precision(tmp_path: Path) -> None:
    module = Automatic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path, precision="bf16-mixed", max_steps=30).fit(module, DataLoader(data(), 8))
    x, y = data().tensors
    with torch.no_grad():
        trained, fresh = (functional.cross_entropy(net(x), y) for net in (module.net, network()))
    assert trained < 0.9 * fresh
    assert all(factor.dtype == torch.float32 for pair in module.kfac[0].factors().values() for factor in pair)
