"""report.html of `kronfac spectrum`: one file with its style and figures inside, made from spectrum.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from kronfac.cli.report.html import card, document, facts, figure_in_both, number, table, with_error
from kronfac.cli.report.spectrum_figures import MOST_LAYERS

MATRICES = {"hessian": "Hessian", "ggn": "Gauss-Newton matrix", "fisher": "Fisher matrix"}

_METHODS = {
    "hutchinson": "Hutchinson's estimator with Rademacher probes",
    "hutch++": "Hutch++",
    "xtrace": "XTrace",
}

Report = Mapping[str, Any]


def render(report: Report, light: Mapping[str, bytes], dark: Mapping[str, bytes]) -> str:
    """Lay the report out.

    Args:
        report: the contents of spectrum.json.
        light: PNG files by name.
        dark: the same for dark screens.

    Returns:
        An HTML document that refers to nothing outside itself.
    """

    def figures(name: str, text: str, caption: str) -> str:
        return f"<div class=figures>{figure_in_both(light[name], dark[name], text, caption, wide=True)}</div>"

    matrix = MATRICES[report["operator"]]
    partial = " <span class=partial>partial</span>" if report["interrupted"] else ""
    body = [
        f"<header><h1>{matrix} of {escape(report['problem'])}{partial}</h1>",
        f"<p>{_headline(report)}</p><p class=soft>{escape(_setting(report))}</p></header>",
        _notes(report),
        _cards(report),
    ]
    if report["top_eigenvalues"]:
        body += [
            "<h2>Eigenvalues of largest magnitude</h2>",
            f"<p>{escape(_eigenvalue_text(report))}</p>",
            figures(
                "eigenvalues",
                "Eigenvalues and their residuals against rank",
                "Left: the eigenvalues; the bars are their residuals, hollow marks have not converged. Right: the same "
                "residuals relative to the largest eigenvalue, against the tolerance.",
            ),
            _folded("All eigenvalues", _eigenvalue_table(report), len(report["top_eigenvalues"]) > 10),
        ]
    if report["layers"]:
        more = len(report["layers"]) - MOST_LAYERS
        body += [
            "<h2>Layer by layer</h2>",
            f"<p>{escape(_layer_text(report))}</p>",
            figures(
                "layers",
                "Trace and largest eigenvalue of every layer",
                "Layers by descending trace."
                + (f" The {more} with the smallest traces are in the table only." if more > 0 else ""),
            ),
            _folded("All layers", _layer_table(report), len(report["layers"]) > MOST_LAYERS),
        ]
    if "trace" in light:
        body += [
            "<h2>Trace</h2>",
            f"<p>{escape(_trace_text(report))}</p>",
            figures(
                "trace",
                "The estimate of the trace as samples come in",
                "Dots: single samples. Line: their mean so far.",
            ),
        ]
    if report["density"] is not None:
        body += [
            "<h2>Density of all eigenvalues</h2>",
            f"<p>{escape(_density_text(report))}</p>",
            figures(
                "density",
                "Spectral density",
                "On a logarithmic axis, down to a small part of what one single eigenvalue would give.",
            ),
            _checks(report),
        ]
    body += ["<h2>How it was computed</h2>", *_how(report)]
    return document(f"kronfac spectrum: {report['problem']}", body)


def _headline(report: Report) -> str:
    parts = []
    if report["top_eigenvalues"]:
        parts.append(
            f"The largest eigenvalue is <b>{number(report['top_eigenvalues'][0], 5)}</b> "
            f"<span class=soft>(residual {number(report['residuals'][0], 2)})</span>"
        )
    if report["trace"] is not None:
        parts.append(f"the trace <b>{with_error(report['trace'], report['trace_stderr'])}</b>")
    return (", ".join(parts) or "No eigenvalue and no trace had been computed") + "."


def _setting(report: Report) -> str:
    origin = report["checkpoint"]
    where = f"at the parameters of {origin}" if origin is not None else "at freshly initialised parameters"
    if ":" in report["problem"] and origin is None:
        where = "at the parameters that the function returns"
    return (
        f"{report['parameters']:,} parameters, {report['examples']:,} training examples, {where}. Errors of traces are "
        "one standard error; an exact eigenvalue lies within the residual of each eigenvalue shown."
    )


def _notes(report: Report) -> str:
    if not report["notes"]:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in report["notes"])
    return f"<div class=notes><b>Before you rely on this</b><ul>{items}</ul></div>"


def _cards(report: Report) -> str:
    cards = []
    values, size = report["top_eigenvalues"], report["parameters"]
    if values:
        note = f"± {number(report['residuals'][0], 2)}, its residual"
        cards.append(card("Largest eigenvalue", number(values[0], 5), note))
        note = f"relative to the largest eigenvalue; tolerance {report['tol']:g}"
        worst = number(max(report["relative_residuals"]), 2)
        cards.append(card(f"Worst residual of {len(values)}", worst, note, all(report["converged"])))
    if report["trace"] is not None:
        value, stderr, asked = report["trace"], report["trace_stderr"], report["precision"]
        share = f"standard error {stderr / abs(value):.1%}" if value else "the estimate is 0"
        note = f"{share}; mean eigenvalue {number(value / size)}"
        met = None
        if asked is not None:
            note, met = f"{share}; target {asked:.3g}", stderr <= asked * abs(value)
        cards.append(card("Trace", with_error(value, stderr), note, met))
        if values and value > 0 and min(values) > 0:
            top = "The largest eigenvalue" if len(values) == 1 else f"The {len(values)} largest eigenvalues"
            note = f"of the trace; the other {size - len(values):,} have the rest"
            cards.append(card(top, f"{sum(values) / value:.0%}", note))
    if values and min(values) < 0:
        note = f"among the {len(values)} of largest magnitude"
        cards.append(card("Most negative found", number(min(values), 5), note))
    found = report["density"]
    if found is not None:
        norm = found["squared_frobenius"] ** 0.5
        error = found["squared_frobenius_stderr"] / (2 * norm) if norm else 0.0
        cards.append(card("Frobenius norm", with_error(norm, error), "that the density implies"))
    products = sum(stage["products"] for stage in report["stages"])
    cards.append(card("Cost", f"{products:,} products", f"with vectors, in {_seconds(report['seconds'])}"))
    return f"<div class='cards filled'>{''.join(cards)}</div>"


def _eigenvalue_text(report: Report) -> str:
    precision = "double precision" if report["double"] else "the model's own precision"
    return (
        f"Lanczos with full reorthogonalisation in {precision}, {report['products']:,} products. A residual is "
        "‖Hv − λv‖, measured with a product of its own at the end: an exact eigenvalue lies that close. The error is "
        "usually far smaller, of the order of the residual squared over the distance to the next eigenvalue."
    )


def _eigenvalue_table(report: Report) -> str:
    columns = (report["top_eigenvalues"], report["residuals"], report["relative_residuals"], report["converged"])
    rows = [
        (
            [str(rank), number(value, 6), number(residual), number(relative), "converged" if done else "not converged"],
            "",
        )
        for rank, (value, residual, relative, done) in enumerate(zip(*columns, strict=True), start=1)
    ]
    return table(["rank", "eigenvalue", "residual", "relative", "status"], rows)


def _layer_text(report: Report) -> str:
    probes = next((stage["products"] for stage in report["stages"] if stage["name"] == "trace by layer"), 0)
    return (
        f"The diagonal blocks of the matrix. Traces and norms of all layers come from the same {probes:,} products, "
        "with probes over all parameters; the norm is that of the layer's rows, its couplings with other layers "
        "included. The largest eigenvalue of each block is found by Lanczos on that block alone. The mean eigenvalue, "
        "trace over parameters, is what layers of different sizes are compared by."
    )


def _layer_table(report: Report) -> str:
    whole = report["trace"]
    rows = []
    for layer in report["layers"]:
        name = layer["name"] if layer["kind"] in (None, layer["name"]) else f"{layer['name']} ({layer['kind']})"
        cells = [name, f"{layer['parameters']:,}"]
        if "trace" in layer:
            share = f"{layer['trace'] / whole:.1%}" if whole else "–"
            cells += [
                with_error(layer["trace"], layer["trace_stderr"]),
                share,
                number(layer["mean_eigenvalue"]),
                with_error(layer["frobenius"], layer["frobenius_stderr"]),
            ]
        else:
            cells += ["–"] * 4
        if "top_eigenvalue" in layer:
            flag = "" if layer["converged"] else " (not converged)"
            cells.append(f"{number(layer['top_eigenvalue'], 4)} ± {number(layer['residual'], 1)}{flag}")
        else:
            cells.append("–")
        rows.append((cells, ""))
    head = ["layer", "parameters", "trace", "share", "mean eigenvalue", "Frobenius norm", "largest eigenvalue"]
    return table(head, rows)


def _trace_text(report: Report) -> str:
    return (
        f"{with_error(report['trace'], report['trace_stderr'])} by {_METHODS[report['trace_method']]}, "
        f"{report['trace_probes']:,} products. The truth lies within two standard errors in about 95 % of all cases."
    )


def _density_text(report: Report) -> str:
    found = report["density"]
    return (
        f"Stochastic Lanczos quadrature, {found['products']:,} products. Each Ritz value is broadened by a Gaussian of "
        f"σ = {number(found['sigma'])}: structure finer than that does not show. The curve integrates to 1."
    )


def _checks(report: Report) -> str:
    """The trace as the density implies it beside that which was estimated directly."""
    if report["trace"] is None:
        return ""
    found = report["density"]
    spread = (report["trace_stderr"] ** 2 + found["trace_stderr"] ** 2) ** 0.5
    apart = abs(report["trace"] - found["trace"])
    verdict = f"{number(apart / spread, 2)} standard errors apart" if spread else f"{number(apart)} apart"
    return (
        "<div class=box><h3>Do the estimates agree?</h3>"
        f"<p>Trace {with_error(report['trace'], report['trace_stderr'])} estimated directly, "
        f"{with_error(found['trace'], found['trace_stderr'])} implied by the density: {verdict}.</p></div>"
    )


def _how(report: Report) -> list[str]:
    stages = [
        ([stage["name"], stage["status"], f"{stage['products']:,}", _seconds(stage["seconds"])], "")
        for stage in report["stages"]
    ]
    total = ["together", "", f"{sum(stage['products'] for stage in report['stages']):,}", _seconds(report["seconds"])]
    cost = table(["stage", "status", "products", "time"], [*stages, (total, "chosen")])
    return [
        "<div class='boxes three'>",
        f"<div class=box><h3>Cost</h3>{cost}</div>",
        f"<div class=box><h3>Settings</h3>{facts(report['settings'])}</div>",
        f"<div class=box><h3>Machine and versions</h3>{facts(report['environment'])}</div>",
        "</div>",
        f"<div class='box command'><h3>Again</h3><pre>{escape(report['command'])}</pre></div>",
    ]


def _folded(title: str, content: str, fold: bool) -> str:
    """A box, closed at first where it is long."""
    if fold:
        return f"<details class=box><summary>{escape(title)}</summary>{content}</details>"
    return f'<div class="box below">{content}</div>'


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value < 10 else f"{value:.0f} s" if value < 600 else f"{value / 60:.0f} min"
