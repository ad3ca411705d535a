"""matplotlib, imported only when something is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def axes_or_new(ax: Axes | None, caller: str) -> Any:
    """Return `ax`, or the axes of a new figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(f"{caller}: plots need matplotlib; install it with `pip install kronfac[plot]`") from error
    _, new = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    return new
