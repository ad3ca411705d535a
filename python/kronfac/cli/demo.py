"""`kronfac demo`: SGD against K-FAC on the digits, and the Hessian spectra of both results, as a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kronfac.cli.options import Json, Quiet

if TYPE_CHECKING:
    from kronfac.cli.comparison import Candidate
    from kronfac.cli.optimizers import Settings
    from kronfac.datasets import Dataset

TOP = 10
ACCURACY_TARGET = 0.97
RESIDUAL_TARGET = 1e-3

PROTOCOL = (
    "Both optimizers start from the same parameters and see the same batches in the same order. Every setting of a "
    "grid is trained from every seed; for both alike, the setting with the lowest median loss on the whole training "
    "set after the last epoch is chosen, and the curves shown are those of its runs. SGD has momentum 0.9, and its "
    "grid of rates is extended for as long as the best lies at an end of it; K-FAC has the same momentum and no "
    "more settings. Rates stay constant within a run. Test images play no part in these choices. Fixed by hand when "
    "this demo was written, with trials of both optimizers in view: the network, the batch size, the ranges of the "
    "grids and K-FAC's KL clip. Other choices of these give other ratios."
)


def demo(
    out: Annotated[Path, typer.Option(help="Directory for report.html, report.json and the figures.")] = Path(
        "demo-report"
    ),
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of every run.")] = 20,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds; the medians are over these.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch; the layers are too small for more.")] = 1,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train on digits with SGD and with K-FAC, look at both Hessian spectra, and write a report."""
    import torch

    from kronfac import datasets
    from kronfac.cli.errors import UsageError
    from kronfac.cli.output import make_directory, plain, to_json, write_atomically
    from kronfac.cli.report import figures, page

    make_directory(out)
    try:
        data = datasets.load("digits")
    except datasets.DatasetError as error:
        raise UsageError(str(error)) from None
    # One by default: for layers this small a second thread costs more than it brings, and a great deal more where the
    # machine is busy with something else, since each of the many short parallel loops then waits for a core.
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        report = plain(build_report(data, epochs=epochs, seeds=list(range(seeds)), quiet=quiet))
    finally:
        torch.set_num_threads(before)
    light, dark = figures.draw_all(report, figures.LIGHT), figures.draw_all(report, figures.DARK)
    for name, png in light.items():
        write_atomically(out / f"{name}.png", png)
    write_atomically(out / "report.json", to_json(report) + "\n")
    write_atomically(out / "report.html", page.render(report, light, dark))
    typer.echo(to_json(report["summary"] | {"report": str(out / "report.html")}) if as_json else _summary(report, out))


def build_report(data: Dataset, *, epochs: int, seeds: list[int], quiet: bool = False) -> dict[str, Any]:
    """Do all the work and return the contents of report.json.

    Args:
        data: what to train on.
        epochs: of every run.
        seeds: of the initialisations and batch orders.
        quiet: no progress bars.
    """
    from kronfac.cli import comparison, info
    from kronfac.cli.analysis import SpectrumOptions, analyse
    from kronfac.cli.output import StagedProgress

    trainer = _Trainer(data, epochs, seeds, quiet)
    sgd_candidates = comparison.search_rates(comparison.sgd_grid(), trainer.try_out)
    trainer.start("K-FAC", len(comparison.kfac_grid()))
    kfac_candidates = [trainer.try_out(settings) for settings in comparison.kfac_grid()]
    trainer.finish()
    chosen = {"sgd": comparison.best(sgd_candidates), "kfac": comparison.best(kfac_candidates)}
    summary = comparison.compare(chosen["sgd"], chosen["kfac"])
    # No search for repeated eigenvalues: nothing makes those of a trained network's Hessian coincide exactly.
    options = SpectrumOptions(
        top=TOP, multiplicity=False, trace_probes=60, density_probes=4, density_steps=50, double=True
    )
    spectra = []
    for optimizer, candidate in chosen.items():
        run = candidate.representative
        problem = comparison.final_problem(data, run)
        with StagedProgress(unit="product", quiet=quiet, prefix=f"{optimizer}: ") as progress:
            found = analyse(problem, options, report=progress.report)
        spectra.append({"optimizer": optimizer, "seed": run.seed, "train_loss": run.final_loss, **found.as_dict()})
    reached = summary["kfac_epochs_to_sgd_final_loss"]
    summary["targets"] = {
        "half_the_epochs": reached is not None and 2 * reached <= epochs,
        "test_accuracy": min(summary["sgd_test_accuracy"], summary["kfac_test_accuracy"]) >= ACCURACY_TARGET,
        "residuals": all(max(s["relative_residuals"]) <= RESIDUAL_TARGET for s in spectra),
    }
    facts = info.collect()
    return {
        "format": "kronfac demo",
        "version": 1,
        "summary": summary,
        "config": {
            "dataset": data.name,
            "train_examples": len(data.train),
            "test_examples": len(data.test),
            "parameters": spectra[0]["parameters"],
            "epochs": epochs,
            "batch_size": comparison.BATCH_SIZE,
            "seeds": seeds,
            "protocol": PROTOCOL,
            "best_sgd_rate_at_grid_edge": comparison.at_edge(sgd_candidates),
        },
        "chosen": {optimizer: candidate.as_dict() for optimizer, candidate in chosen.items()},
        "grid": [candidate.as_dict() for candidate in [*sgd_candidates, *kfac_candidates]],
        "runs": [run.as_dict() for candidate in chosen.values() for run in candidate.runs],
        "spectra": spectra,
        "environment": {
            key: facts[key]
            for key in ("kronfac", "torch", "numpy", "python", "platform", "cpu", "instruction_set", "threads")
        },
    }


class _Trainer:
    """Trains settings from every seed and shows progress over the whole grid."""

    def __init__(self, data: Dataset, epochs: int, seeds: list[int], quiet: bool) -> None:
        from kronfac.cli.comparison import BATCH_SIZE, kfac_grid, run_settings, sgd_grid

        self._data, self._epochs, self._seeds, self._quiet = data, epochs, seeds, quiet
        self._steps = epochs * -(-len(data.train) // BATCH_SIZE) * len(seeds)
        self._progress: Any = None
        # The first run of either kind pays for what torch sets up once; it is not one of those that are timed.
        for settings in (sgd_grid()[0], kfac_grid()[0]):
            run_settings(data, settings, seed=0, epochs=1)
        self.start("SGD", len(sgd_grid()))

    def start(self, label: str, settings: int) -> None:
        """Begin a new progress bar."""
        from kronfac.cli.output import Progress

        self.finish()
        self._progress = Progress(self._steps * settings, label, quiet=self._quiet)

    def finish(self) -> None:
        """End the progress bar."""
        if self._progress is not None:
            self._progress.__exit__()

    def try_out(self, settings: Settings) -> Candidate:
        """Train one setting from every seed."""
        from kronfac.cli.comparison import Candidate, run_settings

        damping = "" if settings.damping is None else f", damping {settings.damping:g}"
        self._progress.note(f"lr {settings.lr:g}{damping}")
        runs = []
        taken = 0

        def on_step(loss: float) -> None:
            nonlocal taken
            taken += 1
            self._progress.advance()

        for seed in self._seeds:
            runs.append(run_settings(self._data, settings, seed, self._epochs, on_step=on_step))
        self._progress.advance(self._steps - taken)  # those that a diverged run did not take
        return Candidate(settings, runs)


def _summary(report: dict[str, Any], out: Path) -> str:
    summary, chosen = report["summary"], report["chosen"]
    reached, epochs = summary["kfac_epochs_to_sgd_final_loss"], summary["epochs"]
    lines = [
        f"SGD    lr {chosen['sgd']['lr']:g}: training loss {summary['sgd_final_train_loss']:.3g}, "
        f"test accuracy {summary['sgd_test_accuracy']:.1%}, {summary['sgd_seconds']:.2f} s",
        f"K-FAC  lr {chosen['kfac']['lr']:g}, damping {chosen['kfac']['damping']:g}: training loss "
        f"{summary['kfac_final_train_loss']:.3g}, test accuracy {summary['kfac_test_accuracy']:.1%}, "
        f"{summary['kfac_seconds']:.2f} s",
    ]
    if reached is None:
        lines.append(f"K-FAC did not reach SGD's final training loss in {epochs} epochs")
    else:
        lines.append(
            f"K-FAC reached SGD's final training loss after {reached} of {epochs} epochs "
            f"({summary['epoch_ratio']:.0%}; {summary['seconds_ratio']:.2f} times the time of SGD's whole run)"
        )
    for spectrum in report["spectra"]:
        lines.append(
            f"Hessian after {spectrum['optimizer']}: top eigenvalue {spectrum['top_eigenvalues'][0]:.4g}, "
            f"worst relative residual {max(spectrum['relative_residuals']):.1g}, "
            f"trace {spectrum['trace']:.4g} ± {spectrum['trace_stderr']:.2g}"
        )
    lines.append(f"report: {out / 'report.html'}")
    return "\n".join(lines)
