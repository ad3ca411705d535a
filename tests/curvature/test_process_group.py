"""Statistics of several processes are those of all their examples together."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from kronfac.curvature import Recorder, find_layers
from tests.processes import run_ranks


class Routed(nn.Module):
    """Uses `rare` only for inputs that ask for it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.rare, self.never, self.head = (
            nn.Linear(5, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        h = torch.tanh(self.body(x))
        if bool((x[:, 0] > 10).any()):
            h = self.rare(h)
        return self.head(h)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 5, dtype=torch.float64, generator=generator)
    x[5:, 0] = 20.0  # the second process alone needs the rare layer
    return x, torch.randint(4, (9,), generator=generator)


def model() -> Routed:
    torch.manual_seed(0)
    return Routed().double()


def _work(rank: int, folder: Path) -> None:
    x, y = data()
    x, y = (x[:5], y[:5]) if rank == 0 else (x[5:], y[5:])
    saved = {}
    for fisher in ("exact", "empirical"):
        for wrapped in (False, True):
            net: nn.Module = model()
            layers = find_layers(net)
            root = DistributedDataParallel(net, find_unused_parameters=True) if wrapped else net
            recorder = Recorder(root, layers, fisher=fisher)
            for part in range(2):
                if wrapped and part == 1:  # the first step of DDP differs from the following ones
                    recorder.clear()
                elif part == 1:
                    continue
                functional.cross_entropy(root(x), y).backward()
            pending = recorder.collect()
            pending.all_reduce()
            factors = pending.factors()
            saved[fisher, wrapped] = (
                {name: (pair.A, pair.G) for name, pair in factors.items()},
                (pending.terms, pending.examples),
            )
            if rank == 1:
                recorder.due = False
            root(x)  # one process without any statistics
            pending = recorder.collect()
            pending.all_reduce()
            if fisher == "exact":
                assert pending.terms == 5
            recorder.remove()
    torch.save(saved, folder / f"{rank}.pt")


def test_two_processes(tmp_path: Path) -> None:
    run_ranks(_work, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    x, y = data()
    for fisher in ("exact", "empirical"):
        net = model()
        recorder = Recorder(net, find_layers(net), fisher=fisher)
        # each rank's loss is the mean over its own examples; here the sum over all, as one process would see it
        for rows in (slice(0, 5), slice(5, 9)):
            (functional.cross_entropy(net(x[rows]), y[rows], reduction="sum") / 9).backward()
        expected = recorder.collect().factors()
        assert set(expected) == {"body", "rare", "head"}
        for wrapped in (False, True):
            for got, counts in (rank[fisher, wrapped] for rank in ranks):
                assert counts == (9, 9)
                assert set(got) == set(expected)
                for name, (A, G) in got.items():
                    torch.testing.assert_close(A, expected[name].A)
                    torch.testing.assert_close(G, expected[name].G)
            for name, pair in ranks[0][fisher, wrapped][0].items():
                assert all(torch.equal(a, b) for a, b in zip(pair, ranks[1][fisher, wrapped][0][name], strict=True))


def test_one_process_needs_no_group() -> None:
    net = model()
    recorder = Recorder(net, find_layers(net))
    net(data()[0])
    pending = recorder.collect()
    before = {name: layer.A_sum.clone() for name, layer in pending.layers.items()}
    pending.all_reduce()
    assert all(torch.equal(pending.layers[name].A_sum, value) for name, value in before.items())
