"""Spectral densities of the blocks of an operator, one layer beside the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kronfac._plotting import axes_or_new
from kronfac.linalg.lanczos import Float64Array
from kronfac.linalg.symmetric import check_operator
from kronfac.linalg.trace import StoppedError
from kronfac.operators import ParameterOperator
from kronfac.spectrum._interrupt import interruptible
from kronfac.spectrum._options import Progress
from kronfac.spectrum._progress import shown
from kronfac.spectrum.density import estimate
from kronfac.spectrum.log_density import LogDensityResult
from kronfac.spectrum.results import DensityResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CALLER = "kronfac.spectrum.block_densities"


@dataclass(frozen=True, eq=False)
class BlockDensityResult(Mapping[str, DensityResult | LogDensityResult]):
    """Densities by the name of the block: a mapping.

    Attributes:
        blocks: the densities; where `interrupted`, of the blocks that were reached, the last one perhaps with fewer
            steps or probes.
        products: products with single vectors that were spent, all blocks together.
        interrupted: whether a KeyboardInterrupt ended the work.
    """

    blocks: Mapping[str, DensityResult | LogDensityResult]
    products: int
    interrupted: bool

    def __getitem__(self, name: str) -> DensityResult | LogDensityResult:
        """The density of a block."""
        return self.blocks[name]

    def __iter__(self) -> Iterator[str]:
        """The names of the blocks, in the model's order."""
        return iter(self.blocks)

    def __len__(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the densities one above the other over a common axis, the first block on top.

        Heights are logarithmic, five decades from the peak of each block: single eigenvalues would not show otherwise.
        On a logarithmic axis dashed lines are negative eigenvalues, over |λ|.

        Args:
            ax: axes to draw on; a new figure by default.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        axes: Any = axes_or_new(ax, "BlockDensityResult.plot")
        names = list(self.blocks)
        for row, name in enumerate(names):
            base, found = float(len(names) - 1 - row), self.blocks[name]
            colour = f"C{row % 10}"
            for places, heights, style in _curves(found):
                axes.fill_between(places, base, base + heights, color=colour, alpha=0.25, linewidth=0.0)
                axes.plot(places, base + heights, color=colour, linewidth=1.0, linestyle=style)
        if any(isinstance(found, LogDensityResult) for found in self.blocks.values()):
            axes.set_xscale("log")
            axes.set_xlabel("|eigenvalue|")
        else:
            axes.set_xlabel("eigenvalue")
        axes.set_yticks(range(len(names) - 1, -1, -1), [name or "(model)" for name in names])
        axes.set_ylim(-0.1, len(names))
        axes.set_ylabel("block")
        return axes  # type: ignore[no-any-return]


def _curves(found: DensityResult | LogDensityResult) -> list[tuple[Float64Array, Float64Array, str]]:
    """Places and heights between 0 and 0.9, with a line style."""
    if not isinstance(found, LogDensityResult):
        return [(found.grid.numpy(), _height(found.values.numpy(), float(found.values.max())), "-")]
    places = 10.0 ** found.grid.numpy()
    highest = max(float(found.positive.max()), float(found.negative.max()))
    sides = [(found.positive, found.positive_mass, "-"), (found.negative, found.negative_mass, "--")]
    return [(places, _height(values.numpy(), highest), style) for values, mass, style in sides if mass > 0.0]


def _height(values: Float64Array, highest: float) -> Float64Array:
    height: Float64Array = 0.9 * (1.0 + np.log10(np.maximum(values / highest, 1e-5)) / 5.0)
    return height


def block_densities(
    op: ParameterOperator,
    groups: Mapping[str, Iterable[str]] | None = None,
    *,
    probes: int = 10,
    steps: int = 80,
    axis: str = "linear",
    sigma: float | None = None,
    threshold: float | None = None,
    checks: int = 0,
    seed: int = 0,
    progress: Progress | bool | None = None,
) -> BlockDensityResult:
    """Estimate the eigenvalue density of each diagonal block of a curvature matrix: of every layer, for instance.

    The density of each of `op.blocks(groups)` by `density`, with the same options; a block's products differentiate
    with respect to its own parameters only.

    Args:
        op: an operator of `kronfac.operators`.
        groups: names of parameters or modules by group name; None for one block per module.
        probes: random probes per block, at least 2.
        steps: Lanczos steps per probe.
        axis: "linear" or "log".
        sigma: standard deviation of the broadening (default: 0.5 % of the width of each block's own spectrum, or 0.05
            decades).
        threshold: on the logarithmic axis: what is smaller in magnitude counts as zero.
        checks: further probes per block for independent estimates of its trace and Frobenius norm.
        seed: of the probes, the same for every block.
        progress: called as progress(products, products in all), the first fewer at the end where a Krylov space was
            exhausted; True for a progress bar.

    Returns:
        The densities by block name. An interrupt (Ctrl-C) ends the work with those that were reached.

    Raises:
        KeyboardInterrupt: before the first step was done.
        TypeError: `op` is no operator of `kronfac.operators`, or an option has the wrong type.
        ValueError: an option out of range, an unknown name in `groups`, or a product that is not finite.
    """
    if not callable(getattr(op, "blocks", None)):
        raise TypeError(f"{_CALLER}: op: expected an operator of kronfac.operators, got {type(op).__name__}")
    blocks = op.blocks(groups)
    operators = {name: check_operator(block, _CALLER) for name, block in blocks.items() if block.shape[0] > 0}
    found: dict[str, DensityResult | LogDensityResult] = {}
    spent, expected = 0, {name: one.size for name, one in operators.items()}
    total = 0
    if isinstance(probes, int) and isinstance(steps, int) and isinstance(checks, int):  # else they are refused below
        total = sum(probes * min(steps, size) + checks for size in expected.values())
    with interruptible() as stop, shown(progress, _CALLER) as tell:
        for name, operator in operators.items():
            if stop.stops(len(found)):
                break

            def report(done: int, _: int | None, spent: int = spent) -> None:
                if tell is not None:
                    tell(spent + done, total)

            try:
                found[name] = estimate(
                    operator,
                    probes=probes,
                    steps=steps,
                    axis=axis,
                    sigma=sigma,
                    grid=None,
                    threshold=threshold,
                    checks=checks,
                    seed=seed,
                    progress=report,
                )
            except StoppedError:
                if stop.stops(len(found)):
                    break
                raise
            spent += found[name].products
        interrupted = len(found) < len(operators) or any(one.interrupted for one in found.values())
    return BlockDensityResult(found, spent, interrupted)
