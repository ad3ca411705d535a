"""report.html of `kronfac spectrum`: one file with its style and figures inside, made from spectrum.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from kronfac.cli.report.html import card, document, facts, figure_in_both, number, table, with_error
from kronfac.cli.report.spectrum_figures import MOST_LAYERS

MATRICES = {"hessian": "Hessian", "ggn": "Gauss-Newton matrix", "fisher": "Fisher matrix"}

_WHICH = {
    "magnitude": "Eigenvalues of largest magnitude",
    "largest": "Largest eigenvalues",
    "both": "Eigenvalues of both ends",
}

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
            f"<h2>{_WHICH[report['which']]}</h2>",
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
        if report["density"]["log"] is not None:
            body += [
                "<h2>Density over the decades</h2>",
                f"<p>{escape(_decades_text(report))}</p>",
                figures(
                    "decades",
                    "Spectral density over the decades of the eigenvalues' magnitude",
                    "Both axes are logarithmic; positive and negative eigenvalues apart.",
                ),
            ]
    if report["landscape"] is not None:
        body += [
            "<h2>The loss around the parameters</h2>",
            f"<p>{escape(_landscape_text(report))}</p>",
            figures("landscape", "The loss along the first eigenvectors", _landscape_caption(report)),
        ]
    body += ["<h2>How it was computed</h2>", *_how(report)]
    return document(f"kronfac spectrum: {report['problem']}", body)


def _headline(report: Report) -> str:
    parts = []
    if report["top_eigenvalues"]:
        parts.append(
            f"The {_first(report)} is <b>{number(report['top_eigenvalues'][0], 5)}</b> "
            f"<span class=soft>(residual {number(report['residuals'][0], 2)})</span>"
        )
    if report["trace"] is not None:
        parts.append(f"the trace <b>{with_error(report['trace'], report['trace_stderr'])}</b>")
    return (", ".join(parts) or "No eigenvalue and no trace had been computed") + "."


def _first(report: Report) -> str:
    """What the eigenvalue at the head of the list is."""
    return "largest eigenvalue" if report["top_eigenvalues"][0] >= 0 else "eigenvalue of largest magnitude"


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
        cards.append(card(_first(report).capitalize(), number(values[0], 5), note))
        note = f"relative to the first eigenvalue; tolerance {report['tol']:g}"
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
        if values and value > 0 and min(values) > 0 and report["which"] != "both":
            top = "The largest eigenvalue" if len(values) == 1 else f"The {len(values)} largest eigenvalues"
            note = f"of the trace; the other {size - len(values):,} have the rest"
            cards.append(card(top, f"{sum(values) / value:.0%}", note))
    if values and min(values) < 0:
        note = f"among the {len(values)} {'of largest magnitude' if report['which'] == 'magnitude' else 'found'}"
        cards.append(card("Most negative found", number(min(values), 5), note))
    found = report["density"]
    if found is not None:
        norm = found["squared_frobenius"] ** 0.5
        square = found["squared_frobenius_stderr"]
        error = None if square is None else square / (2 * norm) if norm else 0.0
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
    columns = (report["top_eigenvalues"], report["residuals"], report["relative_residuals"], report["status"])
    rows = []
    for rank, (value, residual, relative, status) in enumerate(zip(*columns, strict=True), start=1):
        outcome = status if status == "converged" else f"not converged ({status})"
        rows.append(([str(rank), number(value, 6), f"{residual:.1e}", f"{relative:.1e}", outcome], ""))
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


def _decades_text(report: Report) -> str:
    found = report["density"]["log"]
    return (
        "The same Ritz values on the axis log₁₀|λ|. Lanczos resolves the ends of a spectrum and what lies apart, and "
        f"smears a bulk around zero over the decades below its own width: {found['uncertain_mass']:.1%} of the "
        "eigenvalues are of uncertain decade or sign. More Lanczos steps push that limit down."
    )


def _landscape_text(report: Report) -> str:
    found = report["landscape"]
    where = "the eigenvector" if len(found["coordinates"]) == 1 else "the plane of the eigenvectors"
    centre = ", ".join(f"{name} {number(value, 4)}" for name, value in found["centre"].items())
    return (
        f"The loss itself on a grid along {where}, {found['evaluations']:,} passes over a data set, evaluation mode. "
        f"Distances are Euclidean, in the space of the parameters. In the middle: {centre}."
    )


def _landscape_caption(report: Report) -> str:
    if len(report["landscape"]["coordinates"]) == 1:
        return "Dashed: what slope and curvature in the middle predict."
    both = " Both data sets have the same scale." if len(report["landscape"]["losses"]) > 1 else ""
    return f"The cross marks the parameters.{both}"


def _checks(report: Report) -> str:
    """The trace as the density implies it beside that which was estimated directly."""
    if report["trace"] is None:
        return ""
    found = report["density"]
    if found["trace_stderr"] is None:  # of one probe, where Ctrl-C came early
        return ""
    spread = (report["trace_stderr"] ** 2 + found["trace_stderr"] ** 2) ** 0.5
    apart = abs(report["trace"] - found["trace"])
    verdict = f"{number(apart / spread, 2)} standard errors apart" if spread else f"{number(apart)} apart"
    return (
        "<div class=box><h3>Do the estimates agree?</h3>"
        f"<p>Trace {with_error(report['trace'], report['trace_stderr'])} estimated directly, "
        f"{with_error(found['trace'], found['trace_stderr'])} implied by the density: {verdict}.</p></div>"
    )


def _how(report: Report) -> list[str]:
    rows = []
    for stage in report["stages"]:
        name = stage["name"] if stage["status"] == "done" else f"{stage['name']} ({stage['status']})"
        rows.append(([name, f"{stage['products']:,}", _seconds(stage["seconds"])], ""))
    total = ["together", f"{sum(stage['products'] for stage in report['stages']):,}", _seconds(report["seconds"])]
    cost = table(["stage", "products", "time"], [*rows, (total, "chosen")])
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
