"""Operators over the parameters of a model: blocks, sums, scaling, shifts, products of them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor

from kronfac.operators.parameters import ParameterLayout
from kronfac.operators.vectors import Parts, VectorProducts, check_same_parameters


class ParameterOperator(VectorProducts):
    """A square matrix over the chosen parameters of a model as a linear operator.

    `op @ v` takes and returns a flat vector (n,), several as columns (n, k), or a list of tensors shaped like the
    chosen parameters; flat vectors are laid out parameter by parameter in the order of `op.names`. Operators over the
    same parameters can be added, subtracted, scaled by numbers (`2 * op`, `op / 3`, `-op`), shifted and multiplied
    (`op @ other`). Nothing is computed before a product with a vector: it costs one with each term or factor.

    Attributes:
        names: the parameters it acts on, as in `model.named_parameters()`.
    """

    # A numpy number on the left would otherwise take the operator for an array of objects.
    __array_ufunc__ = None

    @property
    def mT(self) -> ParameterOperator:  # noqa: N802, as torch calls it
        """The transpose; a symmetric operator is its own."""
        return self

    def _restricted(self, positions: Sequence[int]) -> ParameterOperator:
        """The diagonal block of the parameters at some positions among `names`."""
        return Restricted(self, positions)

    @overload
    def __matmul__(self, vectors: Tensor) -> Tensor: ...

    @overload
    def __matmul__(self, vectors: ParameterOperator) -> ParameterOperator: ...

    @overload
    def __matmul__(self, vectors: Parts) -> list[Tensor]: ...

    def __matmul__(
        self, vectors: Tensor | list[Tensor] | tuple[Tensor, ...] | ParameterOperator
    ) -> Tensor | list[Tensor] | ParameterOperator:
        """Multiply with a vector (n,), with the columns of a matrix (n, k), or with tensors shaped like the parameters.

        Several columns cost less than as many products: they share one pass over the data. With another operator the
        result is the operator of the product, which is symmetric only where it reads the same from both ends.

        Raises:
            TypeError: not tensors of the operator's type.
            ValueError: wrong shape or device, other parameters, changed data, or a product that is not finite.
        """
        return _product(self, vectors) if isinstance(vectors, ParameterOperator) else super().__matmul__(vectors)

    # ------------------------------------------------------------------ blocks

    def blocks(self, groups: Mapping[str, Iterable[str]] | None = None) -> dict[str, ParameterOperator]:
        """Diagonal blocks of the matrix.

        Args:
            groups: names of parameters, or of modules for all chosen parameters below them, by the name of the block;
                None for one block per module that owns chosen parameters with entries.

        Returns:
            Operators by block name, for None the module names of `model.named_modules()` (the empty name is the model
            itself). They share data and graphs with this operator.

        Raises:
            TypeError: a group is a string instead of a list of them.
            ValueError: a name of no chosen parameter, one that is twice in a group, or an empty group.
        """
        owned: dict[str, list[int]] = {}
        if groups is None:
            for position, (name, shape) in enumerate(zip(self.names, self._layout.shapes, strict=True)):
                if shape.numel():  # nn.Linear(3, 0) has nothing to take a block of
                    owned.setdefault(name.rpartition(".")[0], []).append(position)
        else:
            owned = {group: self._positions_of(group, wanted) for group, wanted in groups.items()}
        blocks = {name: self._restricted(positions) for name, positions in owned.items()}
        for block in blocks.values():
            block._origin = self._origin
        return blocks

    def entries_of(self, block: ParameterOperator) -> Tensor:
        """Where the entries of a block lie in this operator's vectors.

        Args:
            block: one of `blocks`.

        Returns:
            Indices (size of the block,), int64.

        Raises:
            ValueError: the block has parameters that this operator has not, or is of another operator.
        """
        if block._origin is not self._origin or not set(block.names) <= set(self.names):
            raise ValueError(
                f"{self.caller}: entries_of: block: expected one of this operator's blocks(), got one of "
                f"{', '.join(block.names)}"
            )
        return _entries(self._layout, [self.names.index(name) for name in block.names])

    def _positions_of(self, group: str, wanted: Iterable[str]) -> list[int]:
        where = f"{self.caller}: blocks: groups[{group!r}]"
        if isinstance(wanted, str):
            raise TypeError(f"{where}: expected a list of names, got {wanted!r}; wrap it in a list")
        found: list[int] = []
        for entry in wanted:
            some = [
                position for position, name in enumerate(self.names) if name == entry or name.startswith(f"{entry}.")
            ]
            if not some:
                raise ValueError(f"{where}: {entry!r} names none of the operator's parameters; see op.names")
            found += some
        if not found or len(set(found)) < len(found):
            raise ValueError(f"{where}: expected distinct parameters, at least one, got {list(wanted)}")
        if not any(self._layout.shapes[position].numel() for position in found):
            raise ValueError(f"{where}: expected parameters with entries, got {list(wanted)}, which have none")
        return found

    # ------------------------------------------------------------------ arithmetic

    def shift(self, amount: float) -> ParameterOperator:
        """The operator plus `amount` times the identity: damping.

        Raises:
            TypeError: `amount` is no number.
            ValueError: it is not finite.
        """
        return _combination([(1.0, self), (_number(amount, "shift: amount", self.caller), Identity(self._layout))])

    def __add__(self, other: Any) -> ParameterOperator:
        """The sum; the operators must act on the same parameters."""
        return _added(self, other, 1.0)

    def __radd__(self, other: Any) -> ParameterOperator:
        """What `sum` of a list of operators begins with: 0 + op."""
        if isinstance(other, int) and not isinstance(other, bool) and other == 0:
            return self
        return _added(self, other, 1.0)

    def __sub__(self, other: Any) -> ParameterOperator:
        """The difference; the operators must act on the same parameters."""
        return _added(self, other, -1.0)

    def __neg__(self) -> ParameterOperator:
        """The operator times -1."""
        return _combination([(-1.0, self)])

    def __mul__(self, factor: Any) -> ParameterOperator:
        """The operator times a number."""
        if isinstance(factor, ParameterOperator):
            raise TypeError(f"{self.caller}: expected a number to multiply with, got an operator; use @ for a product")
        return _combination([(_number(factor, "factor", self.caller), self)])

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> ParameterOperator:
        """The operator divided by a number."""
        number = _number(divisor, "divisor", self.caller)
        if not number:
            raise ValueError(f"{self.caller}: divisor: expected a number other than 0, got {divisor!r}")
        return _combination([(1.0 / number, self)])


class Identity(ParameterOperator):
    """The identity over some parameters."""

    @property
    def label(self) -> str:
        """Its name."""
        return "identity"

    def _multiply(self, rows: Tensor) -> Tensor:
        return rows.clone()

    def _restricted(self, positions: Sequence[int]) -> ParameterOperator:
        return Identity(self._layout.subset(positions))


class Combination(ParameterOperator):
    """A sum of operators with coefficients; made by arithmetic on operators."""

    def __init__(self, layout: ParameterLayout, terms: Sequence[Term]) -> None:
        super().__init__(layout)
        self._terms = tuple(terms)

    @property
    def label(self) -> str:
        """The sum as a formula."""
        text = ""
        for coefficient, operator in self._terms:
            size = "" if abs(coefficient) == 1 else f"{abs(coefficient):.6g} * "
            sign = ("-" if coefficient < 0 else "") if not text else " - " if coefficient < 0 else " + "
            text += f"{sign}{size}{operator.label}"
        return f"({text or '0'})"

    @property
    def symmetric(self) -> bool:
        """Whether every term is, or comes with its transpose."""
        transposed = {_key(operator.mT): coefficient for coefficient, operator in self._terms}
        return transposed == {_key(operator): coefficient for coefficient, operator in self._terms}

    @property
    def mT(self) -> ParameterOperator:  # noqa: N802, as torch calls it
        """The transpose."""
        return self if self.symmetric else _combination([(value, operator.mT) for value, operator in self._terms])

    def _multiply(self, rows: Tensor) -> Tensor:
        out = torch.zeros_like(rows)
        for coefficient, operator in self._terms:
            out.add_(operator._multiply(rows), alpha=coefficient)
        return out

    def _restricted(self, positions: Sequence[int]) -> ParameterOperator:
        terms = [(coefficient, operator._restricted(positions)) for coefficient, operator in self._terms]
        return Combination(self._layout.subset(positions), terms)

    def release(self) -> None:
        """Free what the terms keep."""
        for _, operator in self._terms:
            operator.release()


class Product(ParameterOperator):
    """A product of operators; made by `@` on operators."""

    def __init__(self, layout: ParameterLayout, factors: Sequence[ParameterOperator]) -> None:
        super().__init__(layout)
        self._factors = tuple(factors)

    @property
    def label(self) -> str:
        """The product as a formula."""
        return f"({' @ '.join(operator.label for operator in self._factors)})"

    @property
    def symmetric(self) -> bool:
        """Whether it reads the same from both ends, like B A B; other products are symmetric by chance only."""
        return _key(self) == tuple(part for operator in reversed(self._factors) for part in _key(operator.mT))

    @property
    def mT(self) -> ParameterOperator:  # noqa: N802, as torch calls it
        """The transpose: the factors' in reverse."""
        if self.symmetric:
            return self
        return Product(self._layout, [operator.mT for operator in reversed(self._factors)])

    def _multiply(self, rows: Tensor) -> Tensor:
        for operator in reversed(self._factors):
            rows = operator._multiply(rows)
        return rows

    def release(self) -> None:
        """Free what the factors keep."""
        for operator in self._factors:
            operator.release()


class Restricted(ParameterOperator):
    """A diagonal block of an operator by products with the whole of it."""

    def __init__(self, operator: ParameterOperator, positions: Sequence[int]) -> None:
        super().__init__(operator._layout.subset(positions))
        self._operator, self._positions = operator, tuple(positions)
        self._entries = _entries(operator._layout, positions).to(operator.device)

    @property
    def label(self) -> str:
        """Of which operator it is a block."""
        return f"block of {self._operator.label}"

    @property
    def symmetric(self) -> bool:
        """Whether the operator is."""
        return self._operator.symmetric

    @property
    def mT(self) -> ParameterOperator:  # noqa: N802, as torch calls it
        """The transpose."""
        return self if self.symmetric else Restricted(self._operator.mT, self._positions)

    def _multiply(self, rows: Tensor) -> Tensor:
        whole = rows.new_zeros(len(rows), self._operator.shape[0])
        whole[:, self._entries] = rows
        return self._operator._multiply(whole)[:, self._entries]

    def _restricted(self, positions: Sequence[int]) -> ParameterOperator:
        return self._operator._restricted([self._positions[position] for position in positions])

    def release(self) -> None:
        """Free what the operator keeps."""
        self._operator.release()


Term: TypeAlias = "tuple[float, ParameterOperator]"
"""A coefficient and what it multiplies."""


def identity(like: ParameterOperator) -> ParameterOperator:
    """Make the identity over the parameters of another operator: `op.shift(c)` adds c times that.

    Args:
        like: an operator of `kronfac.operators`.

    Returns:
        The operator.

    Raises:
        TypeError: `like` is no such operator.
    """
    if not isinstance(like, ParameterOperator):
        raise TypeError(
            f"kronfac.operators.identity: like: expected an operator of kronfac.operators, got {type(like).__name__}"
        )
    return Identity(like._layout)


def _terms(operator: ParameterOperator) -> Sequence[Term]:
    return operator._terms if isinstance(operator, Combination) else [(1.0, operator)]


def _key(operator: ParameterOperator) -> tuple[object, ...]:
    """Equal for operators that are surely the same matrix, as long as all of them are alive."""
    if isinstance(operator, Identity):
        return ("identity",)
    return tuple(map(id, operator._factors)) if isinstance(operator, Product) else (id(operator),)


def _combination(terms: Sequence[Term]) -> ParameterOperator:
    """The sum of some terms, with sums among them written out and equal operators taken together."""
    found: dict[object, Term] = {}
    for outer, combined in terms:
        for inner, operator in _terms(combined):
            before = found.get(_key(operator), (0.0, operator))
            found[_key(operator)] = (before[0] + outer * inner, before[1])
    return Combination(terms[0][1]._layout, [term for term in found.values() if term[0]])


def _product(first: ParameterOperator, second: ParameterOperator) -> ParameterOperator:
    check_same_parameters(first, second, "@")
    coefficient, factors = 1.0, list[ParameterOperator]()
    for operand in (first, second):
        terms = _terms(operand)
        # Numbers go to the front: (2A)B is 2(AB), and 2A @ B @ 2A is as symmetric as A @ B @ A.
        value, operator = terms[0] if len(terms) == 1 else (1.0, operand)
        coefficient *= value
        if not isinstance(operator, Identity):
            factors += operator._factors if isinstance(operator, Product) else [operator]
    layout = first._layout
    whole = Identity(layout) if not factors else factors[0] if len(factors) == 1 else Product(layout, factors)
    return whole if coefficient == 1 else _combination([(coefficient, whole)])


def _added(first: ParameterOperator, second: Any, sign: float) -> ParameterOperator:
    if isinstance(second, ParameterOperator):
        check_same_parameters(first, second, "+" if sign > 0 else "-")
        return _combination([(1.0, first), (sign, second)])
    where = f"{first.caller}: sum"
    if isinstance(second, numbers.Number):
        raise TypeError(f"{where}: expected an operator, got {second!r}; op.shift(c) adds c times the identity")
    hint = "; add dense matrices to op.to_dense()" if hasattr(second, "shape") else ""
    raise TypeError(f"{where}: expected an operator of kronfac.operators, got {type(second).__name__}{hint}")


def _number(value: Any, name: str, caller: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        hint = "; use .item() for a tensor of one number" if isinstance(value, Tensor) else ""
        raise TypeError(f"{caller}: {name}: expected a number, got {type(value).__name__}{hint}")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{caller}: {name}: expected a finite number, got {value!r}")
    return number


def _entries(layout: ParameterLayout, positions: Sequence[int]) -> Tensor:
    """Indices of the entries of the parameters at some positions, int64."""
    return torch.cat([torch.arange(layout.offsets[each], layout.offsets[each + 1]) for each in positions])
