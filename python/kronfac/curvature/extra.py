"""Further statistics of a layer beside A and G, taken because a structure asks for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal

from torch import Tensor

if TYPE_CHECKING:
    from kronfac.curvature.forward import Call


class ExtraStatistic(ABC):
    """One further sum over what one layer sees, kept and averaged as A and G are.

    The sum over a batch is added up over calls of the layer, draws, forwards and ranks; a step divides it by the M
    terms or the R positions of the layer and takes it into a running average with the layer's own decay. An instance
    belongs to one layer and to whoever made it, which may change what the next forward takes between two steps.

    Args:
        shape: of the sum.

    Attributes:
        shape: of the sum.
        per: what the sum is divided by: "terms", M of a mean-reduced loss, as A is with sharing="expand"; "positions",
            how many rows the layer's statistics are made of, as G is.
        degree: with which power the gradient enters, that is, with which the scale of a loss does.
        keeps_input: whether a call's input is needed when its gradient arrives. It stays in memory until then, where
            the layer's own graph keeps it as well, mostly.
        joins: whether it is also of the covered call right after: `Call.following` keeps its input and has its gradient
            then. Gradients arrive from the last call to the first.
        available: whether it can be taken now. Where it is not, nothing is, and the running average stays.
    """

    per: Literal["terms", "positions"] = "terms"
    degree: int = 2
    keeps_input: bool = True
    joins: bool = False

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.available = True

    @abstractmethod
    def add(self, out: Tensor | None, call: Call, g: Tensor, scale: float) -> Tensor:
        """Add the statistic of one gradient at the output of one call of the layer.

        Args:
            out: sums so far, shaped `shape`, updated in place; None for zeros.
            call: of the layer; with `keeps_input` its `inputs` are what the layer saw.
            g: gradient at the layer's output, examples first, after `LayerAdapter.layer_gradient`.
            scale: weight of what is added: 1/n for each of n draws, 1 for each column of the exact Fisher.

        Returns:
            The sums, in the layer's `factor_dtype`.
        """
