"""The parts that the pages of all reports are made of."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any


def document(title: str, body: Sequence[str]) -> str:
    """A page that refers to nothing outside itself.

    Args:
        title: of the window.
        body: HTML, one part a line.
    """
    style = files("kronfac.cli.report").joinpath("style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{style}</style></head>\n"
        f"<body><main>\n{chr(10).join(body)}\n</main></body></html>\n"
    )


def figure_in_both(light: bytes, dark: bytes, text: str, caption: str, wide: bool = False) -> str:
    """A figure that follows the reader's colour scheme.

    Args:
        light: PNG file for light screens.
        dark: the same for dark ones.
        text: in place of the picture.
        caption: below it.
        wide: over the whole width of the page.
    """
    return (
        f"<figure{' class=wide' if wide else ''}><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{_data_url(dark)}">'
        f'<img src="{_data_url(light)}" alt="{escape(text)}"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def card(label: str, value: str, note: str, met: bool | None = None) -> str:
    """A figure worth a box of its own.

    Args:
        label: text above.
        value: HTML.
        note: text below.
        met: whether a target was met, where there is one.
    """
    verdict = "" if met is None else ('<b class="met"> ✓ met</b>' if met else '<b class="missed"> ✗ missed</b>')
    return (
        f"<div class=card><div class=label>{escape(label)}</div><div class=value>{value}</div>"
        f"<div class=note>{escape(note)}{verdict}</div></div>"
    )


def table(head: Sequence[str], rows: Iterable[tuple[Sequence[str], str]]) -> str:
    """A table of text.

    Args:
        head: names of the columns.
        rows: cells and class of each row.
    """
    lines = ["<table><thead><tr>", *[f"<th>{escape(cell)}</th>" for cell in head], "</tr></thead><tbody>"]
    for cells, kind in rows:
        lines.append(f'<tr class="{kind}">' if kind else "<tr>")
        lines += [f"<td>{escape(cell)}</td>" for cell in cells]
        lines.append("</tr>")
    return "".join([*lines, "</tbody></table>"])


def facts(environment: Mapping[str, Any]) -> str:
    """A table of names and values, which may be mappings or lists themselves."""
    rows = []
    for key, value in environment.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {item}" for name, item in value.items())
        elif isinstance(value, list | tuple):
            value = " ".join(map(str, value))
        rows.append(f"<tr><td>{escape(key.replace('_', ' '))}</td><td>{escape(str(value))}</td></tr>")
    return f"<table class=facts><tbody>{''.join(rows)}</tbody></table>"


def number(value: float | None, digits: int = 3) -> str:
    """A number for a reader, a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}g}"


def with_error(value: float, error: float | None) -> str:
    """A value to the digits that its error leaves, two of the error; None where that is not known."""
    if error is None:
        return f"{value:.3g} ± ?"
    if not 0 < error < math.inf:
        return f"{value:.5g} ± {error:.2g}"
    places = 1 - math.floor(math.log10(error))
    if -3 <= places <= 7:
        return f"{value:.{max(0, places)}f} ± {error:.{max(0, places)}f}"
    return f"{value:.4g} ± {error:.2g}"


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
