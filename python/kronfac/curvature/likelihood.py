"""What a loss is the negative logarithm of: the distribution that a model's output parametrises.

K-FAC's Fisher matrix is an expectation over targets drawn from the model's own distribution (Martens & Grosse,
arXiv:1503.05671, section 2). All it needs is the gradient of -log p with respect to the output, which every
likelihood here has in closed form.
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Generator, Tensor

from kronfac.curvature.masks import number, of_examples


class Likelihood(ABC):
    """Base class of likelihoods; subclass it for a loss that kronfac does not know.

    A subclass defines `terms` and `sample_gradients`, `exact_gradients` where fisher="exact" or KFAC's adaptive mode is
    wanted (a `fisher_product` of its own makes that cheaper) and `target_gradients` where
    `kronfac.curvature.factors(..., fisher="empirical")` is. Dimension 0 of the output
    counts the examples, which are independent. `mask`, when given, is a bool tensor over the leading dimensions of
    the output: False marks terms that the loss leaves out; their gradients must come back as zeros.
    """

    def check(self, logits: Tensor) -> None:
        """Refuse an output that does not fit.

        Args:
            logits: the model's output (after ``output=``).

        Raises:
            ValueError: the output is not floating point or has no dimension for the examples.
        """
        if not logits.is_floating_point():
            raise ValueError(f"{self!r}: output: expected floating-point numbers, got {logits.dtype}")
        if logits.dim() < 1:
            raise ValueError(
                f"{self!r}: output: expected dimension 0 to count the examples, got a scalar; "
                "pass output= to pick the model's prediction rather than its loss"
            )

    def check_mask(self, logits: Tensor, mask: Tensor) -> None:
        """Refuse a mask that does not fit.

        Args:
            logits: the model's output.
            mask: bool; its shape must be a prefix of that of `logits`.

        Raises:
            TypeError: `mask` is not a bool tensor.
            ValueError: its shape does not fit.
        """
        _check_bool(self, mask)
        if mask.dim() < 1 or mask.shape != logits.shape[: mask.dim()]:
            raise ValueError(
                f"{self!r}: mask: expected the leading dimensions of the output {tuple(logits.shape)}, "
                f"got shape {tuple(mask.shape)}"
            )

    @abstractmethod
    def terms(self, logits: Tensor, mask: Tensor | None) -> float:
        """How many terms a mean-reduced loss averages over.

        Args:
            logits: the model's output for one batch.
            mask: terms that count, all when None.

        Returns:
            M of the batch: the number of examples, or of tokens for a loss per token.
        """

    @abstractmethod
    def sample_gradients(self, logits: Tensor, generator: Generator | None, mask: Tensor | None) -> Tensor:
        """Draw one target for every term from the model's distribution and differentiate.

        Args:
            logits: the model's output.
            generator: source of randomness on the output's device.
            mask: terms that count, all when None.

        Returns:
            d(-log p(ŷ | x))/d logits, shape of `logits`, float32 (float64 for float64 logits), summed over nothing:
            each example's own gradient.
        """

    def exact_gradients(self, logits: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        """Columns of a square root of the covariance of `sample_gradients`.

        Args:
            logits: the model's output.
            mask: terms that count, all when None.

        Yields:
            Tensors of the shape of `logits`, such that for each example the sum of their outer products is the
            expectation of the outer product of `sample_gradients`; a column never mixes independent terms.

        Raises:
            ValueError: the likelihood has none.
        """
        raise ValueError(f'{self!r}: has no exact_gradients; use fisher="mc" or define the method')

    def fisher_product(self, logits: Tensor, vector: Tensor, mask: Tensor | None) -> Tensor:
        """Output-space Fisher matrix of each example times a vector; by default through `exact_gradients`.

        Args:
            logits: the model's output.
            vector: of its shape.
            mask: terms that count, all when None.

        Returns:
            Σ_c b_c ⟨b_c, v⟩ per example over the columns b_c of `exact_gradients`, shape of `logits`, float32 (float64
            for float64 logits).

        Raises:
            ValueError: the likelihood has neither this nor `exact_gradients`.
        """
        if type(self).exact_gradients is Likelihood.exact_gradients:
            raise ValueError(f"{self!r}: has neither fisher_product nor exact_gradients; define one of them")
        wide = _wide(vector)
        result = torch.zeros_like(wide)
        for column in self.exact_gradients(logits, mask):
            coefficients = (column * wide).flatten(1).sum(1)
            result += column * coefficients.view(-1, *[1] * (column.dim() - 1))
        return result

    def target_gradients(self, logits: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        """d(-log p(y | x))/d logits at given targets.

        Args:
            logits: the model's output.
            targets: as the matching torch loss takes them.
            mask: terms that count, all when None.

        Returns:
            Each example's own gradient, shape of `logits`, float32 (float64 for float64 logits).

        Raises:
            ValueError: the likelihood has none, or the targets do not fit.
        """
        raise ValueError(f"{self!r}: has no target_gradients; define the method")


class Categorical(Likelihood):
    """Softmax over classes: the likelihood of `torch.nn.functional.cross_entropy`.

    Every position outside the class dimension is a term: M is N for an output (N, C) and N·T for (N, T, C).

    Args:
        dim: the class dimension. Required for outputs with more than two dimensions: 1 for the layout of
            `cross_entropy` (N, C, *), -1 for that of language models (N, T, C).

    Raises:
        TypeError: `dim` is not an int.
    """

    def __init__(self, dim: int | None = None) -> None:
        if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int)):
            raise TypeError(f"Categorical: dim: expected an int or None, got {dim!r}")
        self.dim = dim

    def __repr__(self) -> str:
        """As the call that made it."""
        return f"Categorical(dim={self.dim})"

    def _class_dim(self, logits: Tensor) -> int:
        if self.dim is None:
            return 1
        return self.dim + logits.dim() if self.dim < 0 else self.dim

    def check(self, logits: Tensor) -> None:
        """Refuse an output without a class dimension, or one where it is ambiguous (ValueError)."""
        super().check(logits)
        shape = tuple(logits.shape)
        if self.dim is None and logits.dim() != 2:
            raise ValueError(
                f"{self!r}: output: expected 2 dimensions (examples, classes), got shape {shape}; "
                "pass likelihood=Categorical(dim=...) with the class dimension: 1 as cross_entropy has it, "
                "-1 for (N, T, C)"
            )
        if not 1 <= self._class_dim(logits) < logits.dim():
            raise ValueError(
                f"{self!r}: output: expected a class dimension dim={self.dim} after dimension 0, the examples, "
                f"got shape {shape}"
            )
        if logits.shape[self._class_dim(logits)] == 0:
            raise ValueError(f"{self!r}: output: expected at least one class, got shape {shape}")

    def check_mask(self, logits: Tensor, mask: Tensor) -> None:
        """Refuse a mask unless it is bool and has the output's shape without the class dimension."""
        _check_bool(self, mask)
        expected = _without(logits.shape, self._class_dim(logits))
        if tuple(mask.shape) != expected:
            raise ValueError(
                f"{self!r}: mask: expected shape {expected}, the output's without its class dimension, "
                f"got {tuple(mask.shape)}"
            )

    def terms(self, logits: Tensor, mask: Tensor | None) -> float:
        """Positions outside the class dimension, of which the mask leaves those that are True."""
        if mask is not None:
            return number(mask)
        return math.prod(_without(logits.shape, self._class_dim(logits)))

    def sample_gradients(self, logits: Tensor, generator: Generator | None, mask: Tensor | None) -> Tensor:
        """Softmax minus the one-hot vector of a class drawn from it; see `Likelihood.sample_gradients`."""
        dim = self._class_dim(logits)
        probabilities = _wide(logits).softmax(dim)
        classes = _draw(probabilities, generator, dim)
        return _keep(_minus_one_hot(probabilities, classes, dim), mask, dim)

    def exact_gradients(self, logits: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        """√p_c (e_c - p), one column per position and class; see `Likelihood.exact_gradients`."""
        dim = self._class_dim(logits)
        probabilities = _keep(_wide(logits).softmax(dim), mask, dim).movedim(dim, -1)
        rows = probabilities.flatten(1, -2) if probabilities.dim() > 2 else probabilities.unsqueeze(1)
        for position in range(rows.shape[1]):
            p = rows[:, position]
            for c in range(p.shape[1]):
                root = p[:, c].sqrt()
                column = torch.zeros_like(rows)
                column[:, position] = -p * root.unsqueeze(1)
                column[:, position, c] += root
                yield column.view_as(probabilities).movedim(-1, dim)

    def fisher_product(self, logits: Tensor, vector: Tensor, mask: Tensor | None) -> Tensor:
        """(diag p - p pᵀ) v over the classes; see `Likelihood.fisher_product`."""
        dim = self._class_dim(logits)
        probabilities = _wide(logits).softmax(dim)
        weighted = probabilities * _wide(vector)
        return _keep(weighted - probabilities * weighted.sum(dim, keepdim=True), mask, dim)

    def target_gradients(self, logits: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax minus the targets: class indices, or class probabilities in the output's shape."""
        dim = self._class_dim(logits)
        probabilities = _wide(logits).softmax(dim)
        if targets.is_floating_point():
            _check_targets(self, targets, logits.shape)
            share = targets.to(probabilities.dtype)
            return _keep(probabilities * share.sum(dim, keepdim=True) - share, mask, dim)
        _check_targets(self, targets, _without(logits.shape, dim))
        valid = (targets >= 0) & (targets < logits.shape[dim])
        if not bool((valid if mask is None else valid | ~mask).all()):
            raise ValueError(
                f"{self!r}: targets: expected classes from 0 to {logits.shape[dim] - 1}, got values from "
                f"{int(targets.min())} to {int(targets.max())}; leave ignored terms out with mask="
            )
        classes = targets.where(valid, 0).to(torch.int64).unsqueeze(dim)
        return _keep(_minus_one_hot(probabilities, classes, dim), mask, dim)


class _Elementwise(Likelihood):
    """A likelihood whose output elements are independent; those of one example are summed."""

    def __init__(self, terms: int | None) -> None:
        name = type(self).__name__
        if terms is not None:
            if isinstance(terms, bool) or not isinstance(terms, int):
                raise TypeError(f"{name}: terms: expected an int or None, got {terms!r}")
            if terms < 1:
                raise ValueError(f"{name}: terms: expected at least 1, got {terms}")
        self.terms_per_example = terms

    def terms(self, logits: Tensor, mask: Tensor | None) -> float:
        """Examples times ``terms``; under a mask its share of that, or the examples with anything left when None."""
        if mask is None:
            return logits.shape[0] * (self.terms_per_example or 1)
        if mask.numel() == 0:
            return 0
        if self.terms_per_example is None:
            return number(of_examples(mask))
        return number(mask) * mask.shape[0] / mask.numel() * self.terms_per_example

    @abstractmethod
    def _deviation(self, logits: Tensor) -> Tensor:
        """√ of the second derivative of -log p, elementwise."""

    def exact_gradients(self, logits: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        """One column per element of an example; see `Likelihood.exact_gradients`."""
        roots = _keep(self._deviation(logits), mask)
        rows = roots.reshape(roots.shape[0], math.prod(roots.shape[1:]))
        for element in range(rows.shape[1]):
            column = torch.zeros_like(rows)
            column[:, element] = rows[:, element]
            yield column.view_as(roots)

    def fisher_product(self, logits: Tensor, vector: Tensor, mask: Tensor | None) -> Tensor:
        """The second derivative of -log p times v, elementwise; see `Likelihood.fisher_product`."""
        return _keep(self._deviation(logits).square() * _wide(vector), mask)


class Gaussian(_Elementwise):
    """Independent normal distributions around the outputs: -log p = ‖z - y‖² / (2·variance), elements summed.

    `mse_loss` averaged over the C outputs of an example is ``Gaussian(variance=C / 2)``.

    Args:
        variance: of every element, in squared output units, positive.
        terms: loss terms per example, 1 when None. A loss that averages over elements too counts them: `mse_loss`
            over (N, T, C) is ``Gaussian(variance=C / 2, terms=T)``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `variance` or `terms` is not positive and finite.
    """

    def __init__(self, variance: float = 1.0, terms: int | None = None) -> None:
        super().__init__(terms)
        if isinstance(variance, bool) or not isinstance(variance, numbers.Real):
            raise TypeError(f"Gaussian: variance: expected a number, got {variance!r}")
        if not (math.isfinite(variance) and variance > 0):
            raise ValueError(f"Gaussian: variance: expected a positive finite number, got {variance!r}")
        self.variance: float = float(variance)

    def __repr__(self) -> str:
        """As the call that made it."""
        return f"Gaussian(variance={self.variance}, terms={self.terms_per_example})"

    def _deviation(self, logits: Tensor) -> Tensor:
        return torch.full_like(_wide(logits), self.variance**-0.5)

    def sample_gradients(self, logits: Tensor, generator: Generator | None, mask: Tensor | None) -> Tensor:
        """Standard normal noise divided by the standard deviation; see `Likelihood.sample_gradients`."""
        noise = torch.empty_like(_wide(logits)).normal_(std=self.variance**-0.5, generator=generator)
        # A non-finite output must show in the gradients, which the drawn noise alone would hide.
        return _keep(noise + 0.0 * _wide(logits), mask)

    def target_gradients(self, logits: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        """(z - y) / variance."""
        _check_targets(self, targets, logits.shape)
        wide = _wide(logits)
        return _keep((wide - targets.to(wide.dtype)) / self.variance, mask)


class Bernoulli(_Elementwise):
    """Independent binary labels with logits as outputs, elements summed: `binary_cross_entropy_with_logits`.

    Args:
        terms: loss terms per example, 1 when None. A loss that averages over the C elements of an example has C.

    Raises:
        TypeError: `terms` is not an int.
        ValueError: `terms` is not positive.
    """

    def __init__(self, terms: int | None = None) -> None:
        super().__init__(terms)

    def __repr__(self) -> str:
        """As the call that made it."""
        return f"Bernoulli(terms={self.terms_per_example})"

    def _deviation(self, logits: Tensor) -> Tensor:
        wide = _wide(logits)
        # σ(z)σ(-z), not p(1 - p): the difference 1 - p loses all its digits for large z.
        return (wide.sigmoid() * (-wide).sigmoid()).sqrt()

    def sample_gradients(self, logits: Tensor, generator: Generator | None, mask: Tensor | None) -> Tensor:
        """Probability minus a label drawn from it; see `Likelihood.sample_gradients`."""
        probabilities = _wide(logits).sigmoid()
        draws = torch.empty_like(probabilities).uniform_(generator=generator)
        return _keep(probabilities - (draws < probabilities).to(probabilities.dtype), mask)

    def target_gradients(self, logits: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        """σ(z) - y."""
        _check_targets(self, targets, logits.shape)
        probabilities = _wide(logits).sigmoid()
        return _keep(probabilities - targets.to(probabilities.dtype), mask)


_NAMED: dict[str, Callable[[], Likelihood]] = {"categorical": Categorical, "gaussian": Gaussian, "bernoulli": Bernoulli}


def resolve_likelihood(likelihood: str | Likelihood) -> Likelihood:
    """The likelihood that a user asked for.

    Args:
        likelihood: "categorical", "gaussian", "bernoulli", or an object.

    Returns:
        The object.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a likelihood.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if isinstance(likelihood, str):
        if likelihood not in _NAMED:
            raise ValueError(
                f"likelihood: expected one of {', '.join(map(repr, _NAMED))} or an object, got {likelihood!r}"
            )
        return _NAMED[likelihood]()
    called = f"; call it: {likelihood.__name__}()" if isinstance(likelihood, type) else ""
    raise TypeError(
        f"likelihood: expected a name or an instance of kronfac.curvature.Likelihood, got {likelihood!r}{called}"
    )


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _without(shape: torch.Size, dim: int) -> tuple[int, ...]:
    return (*shape[:dim], *shape[dim + 1 :])


def _keep(gradients: Tensor, mask: Tensor | None, dim: int | None = None) -> Tensor:
    """Zeros where the mask is False; where(), because 0 times a non-finite gradient of padding would be NaN."""
    if mask is None:
        return gradients
    mask = mask.unsqueeze(dim) if dim is not None else mask.reshape(*mask.shape, *[1] * (gradients.dim() - mask.dim()))
    return gradients.where(mask, 0.0)


def _draw(probabilities: Tensor, generator: Generator | None, dim: int) -> Tensor:
    """A class along `dim`, which stays with size 1, drawn with the given probabilities.

    Unlike torch.multinomial this takes any layout, and NaN logits give NaN gradients instead of an error or, on CUDA,
    an assertion that kills the process.
    """
    if not probabilities.is_cpu:
        # The first of independent exponential clocks with rates p rings at class c with probability p_c. Cumulative
        # sums are not deterministic on every device.
        clocks = torch.empty_like(probabilities).exponential_(generator=generator)
        return (probabilities / clocks).argmax(dim, keepdim=True)
    # One uniform number in place of as many logarithms as there are classes, which took ten times as long.
    cumulative = probabilities.movedim(dim, -1).contiguous().cumsum(-1)
    total = cumulative[..., -1:]
    place = torch.empty_like(total).uniform_(generator=generator).mul_(total)
    # Below the total whatever the rounding: the last class may be an impossible one.
    place = torch.minimum(place, total.nextafter(torch.zeros_like(total))).contiguous()
    classes = torch.searchsorted(cumulative, place, right=True)
    return classes.clamp_(max=probabilities.shape[dim] - 1).movedim(-1, dim)  # NaN lies beyond the last


def _minus_one_hot(probabilities: Tensor, classes: Tensor, dim: int) -> Tensor:
    return probabilities.scatter_add(dim, classes, torch.full_like(classes, -1, dtype=probabilities.dtype))


def _check_bool(likelihood: Likelihood, mask: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = f"a tensor of {mask.dtype}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise TypeError(f"{likelihood!r}: mask: expected a bool tensor, True for the terms that count, got {got}")


def _check_targets(likelihood: Likelihood, targets: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(targets.shape) != tuple(expected):
        raise ValueError(f"{likelihood!r}: targets: expected shape {tuple(expected)}, got {tuple(targets.shape)}")
