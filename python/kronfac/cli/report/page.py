"""report.html: one file with its style and figures inside, made from the contents of report.json."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from kronfac.cli.report.figures import NAMES
from kronfac.cli.report.html import card, document, facts, figure_in_both, number, table


def render(report: Mapping[str, Any], light: Mapping[str, bytes], dark: Mapping[str, bytes]) -> str:
    """Lay the report out.

    Args:
        report: the contents of report.json.
        light: PNG files by name.
        dark: the same for dark screens.

    Returns:
        An HTML document that refers to nothing outside itself.
    """

    def figure(name: str, text: str, caption: str, wide: bool = False) -> str:
        return figure_in_both(light[name], dark[name], text, caption, wide=wide)

    config = report["config"]
    curves = [
        figure(
            "loss_steps",
            "Training loss against optimizer steps",
            "Loss on the whole training set after each epoch. Thick: median over the seeds; dashed: where SGD ends.",
        ),
        figure(
            "loss_seconds",
            "Training loss against seconds",
            "The same against the time spent training on this machine. A K-FAC step costs more than one of SGD.",
        ),
        figure("accuracy", "Test accuracy against optimizer steps", "Accuracy on the test images."),
        figure(
            "rates",
            "Final training loss against learning rate for every setting",
            "All settings that were tried. Dots: single seeds; lines: medians; settings that diverged are left out.",
        ),
    ]
    density = figure(
        "density",
        "Spectral density of the Hessian for both results",
        "Stochastic Lanczos quadrature on a logarithmic axis, broadened by 0.5 % of each spectrum's width. The "
        "horizontal axes differ: both networks are shown on their own scale.",
        wide=True,
    )
    body = [
        f"<header><h1>K-FAC and SGD on {escape(config['dataset'])}, and the Hessians they end in</h1>",
        f"<p>{_headline(report)}</p><p class=soft>{escape(_setting(report))}</p></header>",
        _cards(report),
        "<h2>Training</h2>",
        f"<div class=figures>{''.join(curves)}</div>",
        "<h2>How the settings were chosen</h2>",
        f"<p>{escape(config['protocol'])}</p>",
        _grids(report),
        "<h2>Hessian of the training loss at the end</h2>",
        f"<p>{escape(_spectrum_text(report))}</p>",
        f"<div class=figures>{density}</div>",
        '<div class="boxes" style="margin-top:.9rem">',
        *[_spectrum_table(spectrum) for spectrum in report["spectra"]],
        "</div>",
        "<h2>Machine and versions</h2>",
        f"<div class=box>{facts(report['environment'])}</div>",
    ]
    return document(f"kronfac demo: {config['dataset']}", body)


def _headline(report: Mapping[str, Any]) -> str:
    summary = report["summary"]
    reached, epochs = summary["kfac_epochs_to_sgd_final_loss"], summary["epochs"]
    if reached is None:
        return (
            f"In {epochs} epochs <b class=kfac>K-FAC</b> did not reach the training loss that <b class=sgd>SGD with "
            f"momentum</b> ends at (median {number(summary['kfac_final_train_loss'])} against "
            f"{number(summary['sgd_final_train_loss'])})."
        )
    return (
        f"<b class=kfac>K-FAC</b> reaches the training loss at which <b class=sgd>SGD with momentum</b> ends "
        f"({number(summary['sgd_final_train_loss'])}) after <b>{reached} of {epochs} epochs</b>, in "
        f"{number(summary['seconds_ratio'])} times the time of SGD's whole run."
    )


def _setting(report: Mapping[str, Any]) -> str:
    config = report["config"]
    return (
        f"{config['train_examples']} training and {config['test_examples']} test images; a convolutional network with "
        f"{config['parameters']:,} parameters; batches of {config['batch_size']}; {len(config['seeds'])} seeds, each "
        "with the same initialisation and the same batches for every setting; figures are medians over the seeds."
    )


def _cards(report: Mapping[str, Any]) -> str:
    summary, targets = report["summary"], report["summary"]["targets"]
    reached = summary["kfac_epochs_to_sgd_final_loss"]
    worst = max((max(s["relative_residuals"]) for s in report["spectra"]), default=None)
    cards = [
        (
            "K-FAC's epochs to SGD's final loss",
            f"{reached} / {summary['epochs']}" if reached is not None else "not reached",
            "target: at most half",
            targets["half_the_epochs"],
        ),
        (
            "Final training loss",
            f"<span class=kfac>{number(summary['kfac_final_train_loss'])}</span> "
            f"<span class=soft>vs</span> <span class=sgd>{number(summary['sgd_final_train_loss'])}</span>",
            "K-FAC and SGD",
            None,
        ),
        (
            "Test accuracy",
            f"<span class=kfac>{summary['kfac_test_accuracy']:.1%}</span> "
            f"<span class=soft>vs</span> <span class=sgd>{summary['sgd_test_accuracy']:.1%}</span>",
            "target: at least 97 %",
            targets["test_accuracy"],
        ),
        (
            "Worst eigenpair residual",
            number(worst),
            "relative to the top eigenvalue; target: at most 1e-3",
            targets["residuals"],
        ),
    ]
    return "<div class=cards>" + "".join(card(*each) for each in cards) + "</div>"


def _grids(report: Mapping[str, Any]) -> str:
    boxes = []
    for optimizer, name in NAMES.items():
        with_damping = optimizer == "kfac"
        head = ["rate", *(["damping"] if with_damping else []), "median final loss", "per seed"]
        rows = []
        chosen = report["chosen"][optimizer]
        for one in report["grid"]:
            if one["optimizer"] != optimizer:
                continue
            is_chosen = one["lr"] == chosen["lr"] and one.get("damping") == chosen.get("damping")
            cells = [f"{one['lr']:g}", *([f"{one['damping']:g}"] if with_damping else [])]
            losses = [one["median_final_train_loss"], *one["final_train_loss"]]
            median, *each = ["diverged" if loss is None else number(loss) for loss in losses]
            cells += [median, " · ".join(each)]
            rows.append((cells, "chosen" if is_chosen else ""))
        used = ", ".join(
            f"{key.replace('_', ' ')} {_plain(value)}"
            for key, value in chosen.items()
            if key not in ("optimizer", "median_final_train_loss", "final_train_loss", "diverged")
        )
        boxes.append(
            f'<div class=box><h3 class="{optimizer}">{escape(name)}: {len(rows)} settings</h3>{table(head, rows)}'
            f"<p class=soft>Chosen: {escape(used)}</p></div>"
        )
    return f"<div class=boxes>{''.join(boxes)}</div>"


def _spectrum_text(report: Mapping[str, Any]) -> str:
    examples = report["spectra"][0]["examples"] if report["spectra"] else 0
    return (
        f"For each optimizer the run with the median final loss; Hessian over all {examples} training images. "
        "Eigenvalues by Lanczos with full reorthogonalisation in double precision, residual ‖Hv − λv‖; trace by "
        "Hutchinson's estimator ± one standard error. Compare shapes, not sizes: the Hessian of the cross-entropy "
        "shrinks with the loss, so the network that fits its data better has the smaller eigenvalues."
    )


def _spectrum_table(spectrum: Mapping[str, Any]) -> str:
    columns = (spectrum["top_eigenvalues"], spectrum["residuals"], spectrum["relative_residuals"])
    rows = [
        ([str(rank), number(value, 5), number(residual), number(relative)], "")
        for rank, (value, residual, relative) in enumerate(zip(*columns, strict=True), start=1)
    ]
    optimizer = spectrum["optimizer"]
    return (
        f'<div class=box><h3 class="{optimizer}">{escape(NAMES[optimizer])} (seed {spectrum["seed"]})</h3>'
        f"{table(['rank', 'eigenvalue', 'residual', 'relative'], rows)}"
        f"<p>Trace {number(spectrum['trace'], 4)} ± {number(spectrum['trace_stderr'], 2)} "
        f"<span class=soft>({spectrum['trace_probes']} probes)</span></p></div>"
    )


def _plain(value: Any) -> str:
    if value is None:
        return "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
