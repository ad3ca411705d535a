"""What every structure must do: all layer types, checkpoints, ranks, mixed precision, skipped steps, real training."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed, nn
from torch.nn import functional

from kronfac.optim import KFAC
from tests.optim.models import convnet, equal, frozen_state, images, mlp, same_tree, snapshot, train_step, vectors
from tests.optim.test_distributed import SIZES, Branching, batch, share
from tests.processes import run_ranks

JOINT = ("ekfac", "diagonal", "mini_block")
structures = pytest.mark.parametrize("structure", JOINT)
ALL = [*JOINT, "doubly_factored", "tridiagonal"]
every = pytest.mark.parametrize("structure", ALL)


@pytest.fixture(autouse=True)
def _small_layers_are_doubly_factored_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kronfac.optim.structures.LARGEST_A_IF_ASKED", 3)


class Everything(nn.Module):
    """One layer of each kind that the registry knows, and one that is not always used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.one = nn.Conv1d(4, 4, 3, padding=1, groups=2)
        self.depthwise = nn.Conv1d(4, 4, 3, padding="same", groups=4)
        self.up = nn.ConvTranspose1d(4, 3, 2, stride=2)
        self.channels = nn.BatchNorm1d(3)
        self.wide = nn.Linear(3, 20)
        self.rare = nn.Linear(20, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor, rare: bool = True) -> Tensor:
        """Logits (N, 5) of tokens (N, T)."""
        h = self.embed(x)
        h = self.norm(h + self.attention(h, h, h, need_weights=False)[0]).transpose(1, 2)
        h = self.channels(self.up(torch.tanh(self.one(h) + self.depthwise(h)))).transpose(1, 2)
        h = torch.tanh(self.wide(h))
        if rare:
            h = torch.tanh(self.rare(h))
        return self.head(h.mean(1))  # type: ignore[no-any-return]


def tokens(count: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randint(7, (count, 6)), torch.randint(5, (count,))


def through_a_file(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@every
def test_every_layer_type_learns_and_an_unused_one_rests(structure: str) -> None:
    torch.manual_seed(0)
    model = Everything()
    x, y = tokens(32)
    optimizer = KFAC(model, 0.1, structure=structure, damping=0.01)
    assert {"embed", "attention.q_proj", "norm", "one", "depthwise", "up", "channels", "wide"} <= {*optimizer.layers}
    losses = [train_step(model, optimizer, x, y) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.skipped_steps == optimizer.inverse_failures == 0
    before, kept = snapshot(model.rare), frozen_state(optimizer)["kronfac"]["layers"]["rare"]
    optimizer.param_groups[0]["inverse_every"] = 1000
    optimizer.zero_grad()
    functional.cross_entropy(model(x, rare=False), y).backward()
    optimizer.step()
    layers = optimizer.state_dict()["kronfac"]["layers"]
    assert layers["head"]["updates"] == 13
    assert equal(before, snapshot(model.rare))
    assert same_tree(kept, layers["rare"])


@settings(max_examples=8, deadline=None)
@given(
    structure=st.sampled_from(ALL),
    solve=st.sampled_from(["inverse", "eigen"]),
    fisher=st.sampled_from(["mc", "exact", "empirical"]),
    sharing=st.sampled_from(["expand", "reduce"]),
    at=st.integers(0, 4),
    weight_decay=st.sampled_from([0.0, 1e-2]),
    kl_clip=st.sampled_from([None, 1e-3]),
    everything=st.booleans(),
)
def test_a_checkpoint_continues_bit_for_bit(
    structure: str, solve: str, fisher: str, sharing: str, at: int, weight_decay: float, kl_clip: float | None,
    everything: bool,
) -> None:  # fmt: skip
    solve = "inverse" if structure == "tridiagonal" else solve

    def make() -> tuple[nn.Module, KFAC]:
        model = Everything() if everything else convnet()
        halves = list(model.parameters())
        groups = [{"params": halves[:3], "damping": 0.1}, {"params": halves[3:], "lr": 0.02}]
        options: dict[str, Any] = {} if everything else {"params": groups}
        return model, KFAC(
            model, 0.1, structure=structure, solve=solve, fisher=fisher, sharing=sharing, fisher_samples=2,
            damping=lambda step: 1e-1 / (step + 1), factor_every=2, inverse_every=3, weight_decay=weight_decay,
            kl_clip=kl_clip, **options,
        )  # fmt: skip

    batches = [tokens(6) if everything else images(6) for _ in range(6)]
    model, optimizer = make()
    for some in batches[:at]:
        train_step(model, optimizer, *some)
    saved = through_a_file([model.state_dict(), optimizer.state_dict()])
    twin, other = make()
    twin.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for some in batches[at:]:
        train_step(model, optimizer, *some)
        train_step(twin, other, *some)
    assert optimizer.skipped_steps == 0
    assert equal(snapshot(model), snapshot(twin))
    assert same_tree(optimizer.state_dict(), other.state_dict())


@structures
@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda extra, key: extra.pop(key), "is missing"),
        (lambda extra, key: extra.update(other=extra[key]), "'other'"),
        (lambda extra, key: extra.update({key: extra[key][:1]}), "tensor of shape"),
        (lambda extra, key: extra.update({key: torch.full_like(extra[key], float("nan"))}), "finite values"),
        (lambda extra, key: extra.update({key: "text"}), "tensor of shape"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_whole(structure: str, spoil: Any, match: str) -> None:
    model = mlp(4, 5, 3)
    optimizer = KFAC(model, 0.1, structure=structure)
    train_step(model, optimizer, *vectors(6, 4, 3))
    saved, state = frozen_state(optimizer), frozen_state(optimizer)
    extra = saved["kronfac"]["layers"]["2"]["extra"]
    spoil(extra, next(iter(extra)))
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(saved)
    assert same_tree(state, optimizer.state_dict())
    with pytest.raises(ValueError, match="structure: expected 'kfac/inverse'"):
        KFAC(mlp(4, 5, 3), 0.1).load_state_dict(state)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_has_float32_statistics(structure: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = mlp(6, 8, 3, dtype=dtype)
    optimizer = KFAC(model, 0.1, structure=structure, damping=0.01)
    x, y = vectors(32, 6, 3, dtype)
    losses = [train_step(model, optimizer, x, y) for _ in range(25)]
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.skipped_steps == 0
    for saved in optimizer.state_dict()["kronfac"]["layers"].values():
        assert saved["extra"] or structure not in JOINT
        assert all(tensor.dtype == torch.float32 for tensor in saved["extra"].values())


@every
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_autocast_and_a_scaler_change_nothing_but_rounding(structure: str, fisher: str) -> None:
    torch.manual_seed(0)
    model, twin = convnet(), convnet()
    twin.load_state_dict(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled = KFAC(model, 0.05, structure=structure, fisher=fisher, seed=0, grad_scaler=scaler, damping=0.1)
    plain = KFAC(twin, 0.05, structure=structure, fisher=fisher, seed=0, damping=0.1)
    for _ in range(4):
        x, y = images(16)
        scaled.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(scaled)
        scaler.update()
        train_step(twin, plain, x, y)
    assert scaled.skipped_steps == 0
    for one, other in zip(snapshot(model), snapshot(twin), strict=True):
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.02)

    weights, state = snapshot(model), frozen_state(scaled)["kronfac"]["layers"]
    scaled.zero_grad()
    scaler.scale(functional.cross_entropy(model(x), y)).backward()
    assert model[0].weight.grad is not None
    model[0].weight.grad[0, 0] = float("inf")
    scaler.step(scaled)
    scaler.update()
    assert scaled.skipped_steps == 1
    assert equal(weights, snapshot(model))
    assert same_tree(state, scaled.state_dict()["kronfac"]["layers"])


@every
@pytest.mark.filterwarnings("ignore:KFAC")
def test_statistics_that_are_not_finite_never_enter(structure: str) -> None:
    model = mlp(4, 5, 3)
    optimizer = KFAC(model, 0.1, structure=structure, factor_every=1, inverse_every=5)
    x, y = vectors(6, 4, 3)
    train_step(model, optimizer, x, y)
    state = frozen_state(optimizer)["kronfac"]["layers"]
    x[0, 0] = float("nan")
    train_step(model, optimizer, x, y)
    assert optimizer.skipped_steps == 1
    assert same_tree(state, optimizer.state_dict()["kronfac"]["layers"])


@structures
@pytest.mark.parametrize("solve", ["inverse", "eigen"])
def test_hardly_any_damping_and_fewer_examples_than_weights(structure: str, solve: str) -> None:
    model = mlp(4, 5, 3)
    optimizer = KFAC(model, 0.1, structure=structure, solve=solve, damping=1e-30)
    for _ in range(4):
        train_step(model, optimizer, *vectors(2, 4, 3))
    assert optimizer.skipped_steps == optimizer.inverse_failures == 0


@structures
def test_what_a_layer_has_survives_a_new_group(structure: str) -> None:
    model = mlp(4, 5, 3)
    optimizer = KFAC(model, 0.1, structure=structure, params=list(model[0].parameters()), seed=0)
    train_step(model, optimizer, *vectors(6, 4, 3))
    kept = frozen_state(optimizer)["kronfac"]["layers"]["0"]
    optimizer.add_param_group({"params": list(model[2].parameters())})
    assert same_tree(kept, optimizer.state_dict()["kronfac"]["layers"]["0"])
    for _ in range(3):
        train_step(model, optimizer, *vectors(6, 4, 3))
    layers = optimizer.state_dict()["kronfac"]["layers"]
    assert layers["0"]["updates"] == layers["2"]["updates"] + 1 == 4
    assert not same_tree(kept["extra"], layers["0"]["extra"])


def _worker(rank: int, folder: Path) -> None:
    results: dict[str, Any] = {}
    for structure in JOINT:
        torch.manual_seed(0)
        model = mlp(4, 5, 3, dtype=torch.float64)
        optimizer = KFAC(model, 0.1, fisher="exact", damping=0.01, inverse_every=2, structure=structure)
        for step in range(4):
            x, y = batch(step)
            optimizer.zero_grad()
            functional.cross_entropy(model(x[share(rank)]), y[share(rank)], reduction="sum").div(sum(SIZES)).backward()
            for p in model.parameters():
                distributed.all_reduce(p.grad)
            optimizer.step()
        results[structure] = [p.detach() for p in model.parameters()]

        torch.manual_seed(0)
        branching = Branching()
        other = KFAC(branching, 0.1, fisher="mc", seed=0, kl_clip=None, damping=0.1, structure=structure)
        for step in (7, 8):
            x, y = batch(step)
            other.zero_grad()
            functional.cross_entropy(branching(x, "left" if rank == 0 else "right"), y).backward()
            for p in branching.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                distributed.all_reduce(p.grad)
            other.step()
        results[f"{structure} branching"] = [p.detach() for p in branching.parameters()]
        results[f"{structure} state"] = other.state_dict()["kronfac"]["layers"]
    torch.save(results, folder / f"rank{rank}.pt")


@pytest.mark.skipif(not distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_ranks_are_one_large_batch(tmp_path: Path) -> None:
    run_ranks(_worker, tmp_path)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert same_tree(one, two)
    for structure in JOINT:
        assert one[f"{structure} state"].keys() == {"trunk", "left", "right"}
        torch.manual_seed(0)
        model = mlp(4, 5, 3, dtype=torch.float64)
        optimizer = KFAC(model, 0.1, fisher="exact", damping=0.01, inverse_every=2, structure=structure)
        for step in range(4):
            train_step(model, optimizer, *batch(step))
        for a, b in zip(one[structure], model.parameters(), strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-7, atol=1e-9)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")
    bunch = datasets.load_digits()
    return torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16, torch.tensor(bunch.target)


@every
def test_a_convnet_learns_digits(structure: str, digits: tuple[Tensor, Tensor]) -> None:
    x, y = digits
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 10)
    )
    optimizer = KFAC(model, 0.1, structure=structure, damping=0.01, seed=0)
    with torch.no_grad():
        start = functional.cross_entropy(model(x), y).item()
    for _ in range(2):
        for chunk in torch.randperm(len(x)).split(200):
            train_step(model, optimizer, x[chunk], y[chunk])
    with torch.no_grad():
        logits = model.eval()(x)
    assert functional.cross_entropy(logits, y).item() < 0.25 * start
    assert (logits.argmax(1) == y).float().mean() > 0.85
