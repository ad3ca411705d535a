from __future__ import annotations

import math

import pytest
import torch

from kronfac import datasets
from kronfac.cli.comparison import (
    KFAC_DAMPINGS,
    SGD_RATES,
    Candidate,
    Run,
    at_edge,
    best,
    compare,
    final_problem,
    kfac_grid,
    run_settings,
    search_rates,
    sgd_grid,
)
from kronfac.cli.errors import RunError
from kronfac.cli.optimizers import Settings
from kronfac.cli.training import evaluate


def candidate(settings: Settings, *finals: float) -> Candidate:
    """Runs that end at the given losses."""
    return Candidate(
        settings,
        [
            Run(settings, seed, 2.3, [1.0, final], [1.0, 1.0], [0.9, 0.98], [0.5, 1.0], 46, math.isinf(final))
            for seed, final in enumerate(finals)
        ],
    )


def small_digits() -> datasets.Dataset:
    full = datasets.load("digits")
    return datasets.Dataset("digits", full.train.head(200), full.test.head(60), 10, full.mean, full.std)


def test_grids_are_what_they_claim() -> None:
    assert len(SGD_RATES) >= 6
    assert max(SGD_RATES) / min(SGD_RATES) >= 1e3
    assert len(kfac_grid()) <= len(sgd_grid())
    assert {settings.damping for settings in kfac_grid()} == set(KFAC_DAMPINGS)
    assert {settings.momentum for settings in [*kfac_grid(), *sgd_grid()]} == {0.9}


def test_best_is_by_the_median_and_divergence_counts_as_infinite() -> None:
    lucky = candidate(Settings("sgd", 0.3), 1e-6, math.inf, math.inf)
    steady = candidate(Settings("sgd", 0.1), 0.02, 0.01, 0.03)
    assert best([lucky, steady]) is steady
    assert steady.representative.final_loss == 0.02
    with pytest.raises(RunError, match="every setting tried for sgd diverged"):
        best([lucky])


@pytest.mark.parametrize(("optimum", "expected"), [(0.1, (0.05, 0.2)), (0.8, (0.05, 1.6)), (0.0125, (0.00625, 0.2))])
def test_search_goes_on_until_the_best_is_inside(optimum: float, expected: tuple[float, float]) -> None:
    def try_out(settings: Settings) -> Candidate:
        return candidate(settings, 1 + math.log(settings.lr / optimum) ** 2)

    found = search_rates([Settings("sgd", lr) for lr in (0.05, 0.1, 0.2)], try_out)
    assert not at_edge(found)
    assert best(found).settings.lr == pytest.approx(optimum)
    rates = [one.settings.lr for one in found]
    assert rates == sorted(rates)
    assert (rates[0], rates[-1]) == pytest.approx(expected)


def test_search_ends_and_says_so() -> None:
    found = search_rates([Settings("sgd", 0.1), Settings("sgd", 0.2)], lambda s: candidate(s, 1 / s.lr), 3)
    assert len(found) == 5
    assert at_edge(found)


def test_compare_counts_epochs_of_the_median_curve() -> None:
    def with_curves(optimizer: str, *curves: list[float]) -> Candidate:
        settings = Settings(optimizer, 0.1)
        return Candidate(
            settings,
            [
                Run(settings, i, 2.3, curve, curve, [0.97, 0.975, 0.98, 0.985], [1.0, 2.0, 3.0, 4.0], 92)
                for i, curve in enumerate(curves)
            ],
        )

    sgd = with_curves("sgd", [1, 0.5, 0.3, 0.1], [1, 0.6, 0.4, 0.2], [1, 0.9, 0.8, 0.7])  # median final loss 0.2
    fast = with_curves("kfac", [0.5, 0.2, 0.1, 0.01], [0.1, 0.15, 0.1, 0.01], [1, 1, 1, 1])
    result = compare(sgd, fast)
    assert result["sgd_final_train_loss"] == 0.2
    assert result["kfac_epochs_to_sgd_final_loss"] == 2  # equal counts as reached; one seed that never does is outvoted
    assert result["epoch_ratio"] == 0.5
    assert result["seconds_ratio"] == 0.5
    slow = compare(sgd, with_curves("kfac", [1, 1, 1, 0.21], [1, 1, 1, 0.3], [0.1, 0.1, 0.1, 0.1]))
    assert slow["kfac_epochs_to_sgd_final_loss"] is slow["epoch_ratio"] is slow["seconds_ratio"] is None


def test_all_settings_share_initialisation_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    data = small_digits()
    seen: dict[str, list[torch.Tensor]] = {}
    original = datasets.Batches.__iter__

    for optimizer in (Settings("sgd", 0.1), Settings("kfac", 0.1, damping=0.1)):
        orders = seen.setdefault(optimizer.optimizer, [])

        def spy(self: datasets.Batches, orders: list[torch.Tensor] = orders):  # type: ignore[no-untyped-def]
            for inputs, targets in original(self):
                if self.seed is not None:
                    orders.append(inputs)
                yield inputs, targets

        monkeypatch.setattr(datasets.Batches, "__iter__", spy)
        torch.rand(3)  # the global stream has no say
        before = torch.get_rng_state()
        run = run_settings(data, optimizer, seed=4, epochs=2)
        assert torch.equal(torch.get_rng_state(), before)
        seen[f"{optimizer.optimizer} start"] = [torch.tensor(run.initial_train_loss)]
    assert len(seen["sgd"]) == 8  # four batches of at most 64 in each of two epochs
    assert all(map(torch.equal, seen["sgd"], seen["kfac"]))
    assert torch.equal(seen["sgd start"][0], seen["kfac start"][0])


def test_run_records_what_the_final_network_does() -> None:
    data = small_digits()
    run = run_settings(data, Settings("sgd", 0.1), seed=1, epochs=3)
    assert (len(run.train_loss), len(run.test_accuracy), run.steps, run.diverged) == (3, 3, 12, False)
    assert run.seconds_at_epoch == sorted(run.seconds_at_epoch)
    problem = final_problem(data, run)
    assert problem.ordered is not None
    assert problem.test is not None
    assert evaluate(problem.model, problem.loss_fn, problem.ordered)[0] == pytest.approx(run.train_loss[-1], rel=1e-6)
    assert evaluate(problem.model, problem.loss_fn, problem.test)[1] == run.test_accuracy[-1]
    same = run_settings(data, Settings("sgd", 0.1), seed=1, epochs=3)
    assert same.train_loss == run.train_loss


def test_divergence_is_recorded() -> None:
    run = run_settings(small_digits(), Settings("sgd", 3e38), seed=0, epochs=3)
    assert run.diverged
    assert run.final_loss == math.inf
    assert len(run.train_loss) < 3
