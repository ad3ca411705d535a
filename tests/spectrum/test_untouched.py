"""Whatever is public in operators, spectrum and linalg leaves the model, its surroundings and the data as they were.

Every public function, and every public method and property of the classes beside them, has to have a use here: one that
is missing fails the test. Each runs on a model as after a training step, with everything that can be left behind.
"""

from __future__ import annotations

import inspect
import os
import signal
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from kronfac import linalg, operators, spectrum
from tests.operators.state import unchanged

ROOMS: dict[str, types.ModuleType] = {"operators": operators, "spectrum": spectrum, "linalg": linalg}


@dataclass
class Subject:
    """A model after a training step, and its data.

    Attributes:
        model: in train mode but for one layer, with gradients, hooks of all kinds and a frozen parameter.
        batch: inputs and targets.
        loader: the same in three batches, from a generator of its own.
        generator: that.
    """

    model: nn.Sequential
    batch: tuple[Tensor, Tensor]
    loader: DataLoader[Any]
    generator: torch.Generator

    @property
    def op(self) -> Any:
        """The Hessian of a batch."""
        return operators.hessian(self.model, functional.cross_entropy, self.batch)

    @property
    def ggn(self) -> Any:
        """A positive definite one, of the loader."""
        return operators.ggn(self.model, functional.cross_entropy, self.loader)

    @property
    def kfac(self) -> operators.KroneckerOperator:
        """K-FAC of it."""
        return operators.kfac(self.model, "categorical", self.loader)

    @property
    def checked(self) -> linalg.CheckedOperator:
        """As the methods of linalg take it."""
        return linalg.check_operator(self.op, "test")

    @property
    def factors(self) -> list[Tensor]:
        """Two buffers of the model, symmetric and positive definite."""
        return [self.model.get_buffer("first"), self.model.get_buffer("second")]

    def vector(self) -> Tensor:
        """A buffer of the model itself, as long as `op` is wide, to see that it is not written to."""
        return self.model.get_buffer("vector")

    def parts(self) -> list[Tensor]:
        """The parameters themselves, to see the same."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def make_subject() -> Subject:
    torch.manual_seed(17)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 4),
        nn.BatchNorm1d(4),
        nn.Tanh(),
        nn.Linear(4, 3),
    ).double()
    model[6].bias.requires_grad_(False)  # type: ignore[union-attr]
    inputs, targets = torch.randn(9, 1, 4, 4, dtype=torch.float64), torch.randint(0, 3, (9,))
    for name, size in (("first", 5), ("second", 3)):
        root = torch.randn(size, size, dtype=torch.float64)
        model.register_buffer(name, root @ root.mT + torch.eye(size, dtype=torch.float64))
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    model.register_buffer("vector", torch.randn(size, dtype=torch.float64))
    functional.cross_entropy(model(inputs), targets).backward()
    model[7].eval()
    model[0].register_forward_pre_hook(lambda module, args: None)
    model[0].register_forward_hook(lambda module, args, output: None)
    model[2].register_full_backward_hook(lambda module, inward, outward: None)
    model[6].register_full_backward_pre_hook(lambda module, outward: None)
    model.register_state_dict_post_hook(lambda module, state, prefix, metadata: None)
    model[9].weight.register_hook(lambda grad: 100 * grad)
    model[9].bias.register_post_accumulate_grad_hook(lambda parameter: None)  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=4, generator=generator)
    return Subject(model, (inputs, targets), loader, generator)


@contextmanager
def untouched(subject: Subject) -> Iterator[None]:
    """`unchanged`, and what is not of the operators alone: bits, handlers, hooks on gradients, the data."""

    def bits(tensor: Tensor | None) -> bytes | None:
        return None if tensor is None else tensor.detach().numpy().tobytes()

    def state() -> list[Any]:
        module = nn.modules.module
        named = [*subject.model.named_parameters(), *subject.model.named_buffers()]
        return [
            [(name, bits(tensor), bits(tensor.grad)) for name, tensor in named],
            [list((getattr(tensor, "_post_accumulate_grad_hooks", None) or {}).items()) for _, tensor in named],
            [
                list(getattr(module, name))
                for name in sorted(vars(module))
                if name.startswith("_global_") and isinstance(getattr(module, name), dict)
            ],
            [bits(tensor) for tensor in subject.batch],
            [tensor.grad for tensor in subject.batch],
            signal.getsignal(signal.SIGINT),
            np.geterr(),
            dict(os.environ),
        ]

    before = state()
    with unchanged(subject.model, subject.generator):
        yield
    for was, now in zip(before, state(), strict=True):
        assert was == now


def press(done: int, total: int | None) -> None:
    """Ctrl-C as soon as some products are done."""
    if done >= 4 and signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        signal.raise_signal(signal.SIGINT)


def columns(operator: Any, count: int = 2) -> Tensor:
    return torch.ones(operator.shape[0], count, dtype=operator.dtype)


def refused_product(operator: Any, subject: Subject) -> None:
    fails(lambda: operator @ subject.vector()[:3], ValueError)


def matrix_free(subject: Subject) -> linalg.MatrixFree:
    operator = subject.op
    return linalg.MatrixFree(operator.shape, lambda v: operator @ v, lambda v: operator @ v, dtype=torch.float64)


def axes() -> Any:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    return Figure().subplots()


def fails(run: Callable[[], object], error: type[Exception]) -> None:
    with pytest.raises(error):
        run()


def grown(subspace: linalg.KrylovSubspace) -> linalg.KrylovSubspace:
    for _ in range(4):
        subspace.expand()
    return subspace


def krylov(subject: Subject) -> linalg.KrylovSubspace:
    return grown(linalg.KrylovSubspace(subject.checked, 6, linalg.make_generator(0, "test")))


def ritz(subject: Subject) -> tuple[linalg.KrylovSubspace, Any, Any]:
    subspace = krylov(subject)
    values, coordinates, _ = subspace.ritz()
    return subspace, values, coordinates


def restarted(subject: Subject) -> object:
    subspace, values, coordinates = ritz(subject)
    subspace.restart(values[-2:], coordinates[:, -2:])
    return grown(subspace)


def afresh(subject: Subject) -> object:
    subspace, values, coordinates = ritz(subject)
    subspace.start_afresh(values[-2:], coordinates[:, -2:])
    return grown(subspace)


def by_closure(subject: Subject) -> operators.ClosureOperator:
    inputs, targets = subject.batch

    def closure(indices: Tensor | None) -> Tensor:
        chosen = slice(None) if indices is None else indices
        return functional.cross_entropy(subject.model(inputs[chosen]), targets[chosen])

    named = {name: p for name, p in subject.model.named_parameters() if p.requires_grad}
    return operators.ClosureOperator(closure, list(named.values()), names=list(named), examples=len(targets))


def ball(subject: Subject) -> linalg.TrustRegionResult:
    return linalg.trust_region_cg(subject.op, subject.vector(), 1.0, keep=4)


def cubic(subject: Subject) -> linalg.CubicResult:
    return linalg.cubic_regularised(subject.op, subject.vector(), 1.0, explore=True, keep=True)


def along(subject: Subject, **options: Any) -> spectrum.LandscapeResult:
    return spectrum.landscape(
        subject.model, functional.cross_entropy, subject.batch, subject.vector(), points=9, **options
    )


def through(subject: Subject, **options: Any) -> spectrum.TrainingSpectrumResult:
    states = [subject.model.state_dict()] * 2
    return spectrum.through_training(subject.model, states, functional.cross_entropy, subject.batch, **options)


Use = Callable[[Subject], object]
S, L, K = "spectrum.", "linalg.", "operators.KroneckerOperator."

# The operators of each class, and a use of each of their members.
OPERATORS: dict[str, Callable[[Subject], Any]] = {
    "CurvatureOperator": lambda s: s.op,
    "ParameterOperator": lambda s: 2 * s.op - s.kfac.shift(0.1) @ s.ggn,
    "KroneckerOperator": lambda s: s.kfac,
    "ClosureOperator": by_closure,
}
MEMBERS: dict[str, Callable[[Any, Subject], object]] = {
    "__matmul__": lambda op, s: [op @ s.vector(), op @ columns(op, 5), op @ s.parts(), refused_product(op, s)],
    "shape": lambda op, s: op.shape,
    "dtype": lambda op, s: op.dtype,
    "device": lambda op, s: op.device,
    "blocks": lambda op, s: [
        block.to_dense() for block in [*op.blocks().values(), op.blocks({"ends": ["0", "9"]})["ends"]]
    ],
    "entries_of": lambda op, s: op.entries_of(op.blocks()["9"]),
    "to_dense": lambda op, s: op.to_dense(),
    "to_scipy": lambda op, s: op.to_scipy() @ np.ones(op.shape[0]),
    "release": lambda op, s: (op @ s.vector(), op.release()),
    "__repr__": lambda op, s: repr(op),
    "label": lambda op, s: op.label,
    "caller": lambda op, s: op.caller,
    "symmetric": lambda op, s: op.symmetric,
    "mT": lambda op, s: op.mT @ s.vector(),
    "shift": lambda op, s: op.shift(0.5) @ s.vector(),
    "__add__": lambda op, s: (op + s.op) @ s.vector(),
    "__radd__": lambda op, s: sum([op, s.op]) @ s.vector(),
    "__sub__": lambda op, s: (op - s.op) @ s.vector(),
    "__neg__": lambda op, s: -op @ s.vector(),
    "__mul__": lambda op, s: (op * 0.5) @ s.vector(),
    "__rmul__": lambda op, s: (0.5 * op) @ s.vector(),
    "__truediv__": lambda op, s: (op / 3.0) @ s.vector(),
}

USES: dict[str, dict[str, Use]] = {
    "operators.hessian": {
        "batch": lambda s: s.op @ columns(s.op),
        "list": lambda s: operators.hessian(s.model, functional.cross_entropy, [s.batch, s.batch]).to_dense(),
        "loader": lambda s: operators.hessian(s.model, functional.cross_entropy, s.loader) @ s.vector(),
        "params": lambda s: operators.hessian(s.model, functional.cross_entropy, s.batch, ["9.weight"]).to_dense(),
        "refused": lambda s: fails(lambda: operators.hessian(s.model, lambda output, y: output, s.batch), ValueError),
    },
    "operators.ggn": {
        "batch": lambda s: operators.ggn(s.model, functional.cross_entropy, s.batch).to_dense(),
        "loader": lambda s: s.ggn @ columns(s.ggn),
        "refused": lambda s: fails(lambda: operators.ggn(s.model, None, s.batch), TypeError),  # type: ignore[arg-type]
    },
    "operators.fisher": {
        kind: lambda s, kind=kind: operators.fisher(s.model, "categorical", s.loader, kind=kind).to_dense()  # type: ignore[misc]
        for kind in ("mc", "exact", "empirical")
    },
    "operators.kfac": {
        kind: lambda s, kind=kind: operators.kfac(s.model, "categorical", s.loader, kind=kind) @ s.vector()  # type: ignore[misc]
        for kind in ("mc", "exact", "empirical")
    },
    "operators.ekfac": {
        kind: lambda s, kind=kind: operators.ekfac(s.model, "categorical", s.loader, kind=kind) @ s.vector()  # type: ignore[misc]
        for kind in ("mc", "exact", "empirical")
    },
    "operators.identity": {"": lambda s: operators.identity(s.op) @ s.vector()},
    K + "inverse": {"": lambda s: s.kfac.inverse(0.1) @ s.vector()},
    K + "inverse_sqrt": {"": lambda s: s.kfac.inverse_sqrt(0.1) @ s.vector()},
    K + "factors": {"": lambda s: s.kfac.factors()},
    K + "trace": {"": lambda s: s.kfac.trace()},
    K + "logdet": {"": lambda s: s.kfac.logdet(0.1)},
    K + "diagonal": {"": lambda s: s.kfac.diagonal()},
    S + "eigsh": {
        **{
            method: lambda s, m=method: spectrum.eigsh(s.op, 2, method=m, tol=1e-3)  # type: ignore[misc]
            for method in ("lanczos", "block_lanczos", "lobpcg", "power")
        },
        **{which: lambda s, w=which: spectrum.eigsh(s.op, 2, w) for which in ("largest", "both")},  # type: ignore[misc]
        "loader": lambda s: spectrum.eigsh(s.ggn, 2, progress=True),
        "preconditioner": lambda s: spectrum.eigsh(
            s.op, 2, "smallest", method="lobpcg", preconditioner=lambda v: v.mul_(0.5), max_products=60
        ),
        "interrupted": lambda s: spectrum.eigsh(s.op, 2, progress=press),
        "refused": lambda s: fails(lambda: spectrum.eigsh(s.op, 10_000), ValueError),
    },
    S + "trace": {
        **{
            method: lambda s, m=method: spectrum.trace(s.op, m, probes=8)  # type: ignore[misc]
            for method in ("hutchinson", "hutch++", "xtrace")
        },
        "target": lambda s: spectrum.trace(s.ggn, target_relative=0.5, max_products=20, progress=True),
        "gaussian": lambda s: spectrum.trace(s.op, probes=4, distribution="gaussian"),
        "interrupted": lambda s: spectrum.trace(s.op, progress=press),
        "refused": lambda s: fails(lambda: spectrum.trace(s.op, probes=1), ValueError),
    },
    S + "diagonal": {
        **{
            method: lambda s, m=method: spectrum.diagonal(s.op, m, probes=8)  # type: ignore[misc]
            for method in ("hutchinson", "xdiag")
        },
        "interrupted": lambda s: spectrum.diagonal(s.op, probes=40, progress=press),
    },
    S + "block_traces": {
        "": lambda s: spectrum.block_traces(s.ggn, probes=2),
        "restricted": lambda s: spectrum.block_traces(s.op, {"ends": ["0", "9"]}, probes=2, restricted=True),
        "interrupted": lambda s: spectrum.block_traces(s.op, probes=40, progress=press),
    },
    S + "density": {
        "": lambda s: spectrum.density(s.ggn, probes=2, steps=5),
        "batch": lambda s: spectrum.density(s.op, probes=2, steps=5, grid=torch.linspace(-9, 9, 50)),
        "log": lambda s: spectrum.density(s.ggn, axis="log", probes=2, steps=5, checks=2, progress=True),
        "interrupted": lambda s: spectrum.density(s.op, probes=2, steps=8, progress=press),
    },
    S + "block_densities": {
        "": lambda s: spectrum.block_densities(s.ggn, probes=2, steps=3, checks=2),
        "log": lambda s: spectrum.block_densities(s.op, {"ends": ["0", "9"]}, probes=2, steps=3, axis="log"),
        "interrupted": lambda s: spectrum.block_densities(s.op, probes=2, steps=6, progress=press),
    },
    S + "random_directions": {
        "": lambda s: spectrum.random_directions(s.model),
        "plain": lambda s: spectrum.random_directions(s.model, 1, filter_normalised=False),
    },
    S + "landscape": {
        "line": lambda s: spectrum.landscape(s.model, functional.cross_entropy, s.loader, s.vector(), points=3),
        "plane": lambda s: spectrum.landscape(
            s.model,
            functional.cross_entropy,
            {"train": s.batch, "test": s.loader},
            spectrum.random_directions(s.model),
            points=3,
            curvature=True,
            progress=True,
        ),
        "interrupted": lambda s: along(s, progress=press),
        "refused": lambda s: fails(lambda: along(s, radius=-1.0), ValueError),
    },
    S + "through_training": {
        "": lambda s: through(s, trace_probes=2),
        "loader": lambda s: spectrum.through_training(
            s.model, {3: s.model.state_dict()}, functional.cross_entropy, s.loader, operator="ggn", progress=True
        ),
        "refused": lambda s: fails(lambda: through(s, k=10_000), ValueError),
    },
    S + "EigenResult.plot": {"": lambda s: spectrum.eigsh(s.op, 3).plot(axes())},
    S + "EigenResult.status": {"": lambda s: spectrum.eigsh(s.op, 3).status},
    S + "EigenResult.interrupted": {"": lambda s: spectrum.eigsh(s.op, 3).interrupted},
    S + "TraceResult.plot": {"": lambda s: spectrum.trace(s.op, probes=4).plot(axes())},
    S + "DiagonalResult.plot": {"": lambda s: spectrum.diagonal(s.op, probes=4).plot(axes())},
    S + "BlockTraceResult.mean_eigenvalue": {"": lambda s: spectrum.block_traces(s.op, probes=2)["9"].mean_eigenvalue},
    S + "DensityChecks.agree": {"": lambda s: spectrum.density(s.op, probes=2, steps=3, checks=2).checks.agree},  # type: ignore[union-attr]
    S + "LogDensityResult.plot": {"": lambda s: spectrum.density(s.op, axis="log", steps=5).plot(axes())},
    S + "LogDensityResult.products": {"": lambda s: spectrum.density(s.op, axis="log", steps=2).products},
    S + "LogDensityResult.interrupted": {"": lambda s: spectrum.density(s.op, axis="log", steps=2).interrupted},
    S + "BlockDensityResult.plot": {"": lambda s: spectrum.block_densities(s.op, steps=3).plot(axes())},
    S + "BlockDensityResult.__getitem__": {"": lambda s: spectrum.block_densities(s.op, steps=2)["9"]},
    S + "BlockDensityResult.__iter__": {"": lambda s: list(spectrum.block_densities(s.op, steps=2))},
    S + "BlockDensityResult.__len__": {"": lambda s: len(spectrum.block_densities(s.op, steps=2))},
    S + "LandscapeResult.plot": {"": lambda s: along(s).plot(axes())},
    S + "TrainingSpectrumResult.plot": {"": lambda s: through(s).plot(axes())},
    S + "TrainingSpectrumResult.rows": {"": lambda s: through(s).rows()},
    S + "DensityResult.plot": {"": lambda s: spectrum.density(s.op, probes=2, steps=5).plot(axes())},
    L + "cg": {
        "": lambda s: linalg.cg(s.ggn, s.vector(), shift=0.1, x0=s.vector()),
        "preconditioner": lambda s: linalg.cg(s.ggn, s.vector(), shift=0.1, preconditioner=lambda v: v),
        "indefinite": lambda s: linalg.cg(s.op, s.vector(), max_iterations=20),
    },
    L + "lsmr": {"": lambda s: linalg.lsmr(s.op, s.vector(), damping=0.1, max_iterations=10)},
    L + "LeastSquaresResult.converged": {"": lambda s: linalg.lsmr(s.op, s.vector(), max_iterations=5).converged},
    L + "MatrixFree.__matmul__": {"": lambda s: matrix_free(s) @ s.vector()},
    L + "MatrixFree.mT": {"": lambda s: matrix_free(s).mT @ s.vector()},
    L + "cg_shifts": {"": lambda s: linalg.cg_shifts(s.ggn, s.vector(), [0.1, 1.0])},
    L + "minres": {
        "": lambda s: linalg.minres(s.op, s.vector(), max_iterations=20),
        "reorthogonalised": lambda s: linalg.minres(s.op, s.vector(), reorthogonalize=True, max_iterations=20),
    },
    L + "newton_minres": {
        "": lambda s: linalg.newton_minres(s.op, s.vector(), max_iterations=20),
        "preconditioner": lambda s: linalg.newton_minres(s.op, s.vector(), preconditioner=lambda v: v.mul_(0.5)),
    },
    L + "trust_region_cg": {
        "": lambda s: ball(s),
        "preconditioner": lambda s: linalg.trust_region_cg(s.op, s.vector(), 1.0, preconditioner=lambda v: v.mul_(0.5)),
        "refused": lambda s: fails(lambda: linalg.trust_region_cg(s.op, s.vector(), -1.0), ValueError),
    },
    L + "TrustRegionResult.at_boundary": {"": lambda s: ball(s).at_boundary},
    L + "TrustRegionResult.shortened": {"": lambda s: ball(s).shortened(0.5)},
    L + "cubic_regularised": {"": cubic},
    L + "CubicResult.converged": {"": lambda s: cubic(s).converged},
    L + "CubicResult.regularised": {"": lambda s: cubic(s).regularised(2.0)},
    L + "SolveResult.converged": {"": lambda s: linalg.cg(s.ggn, s.vector(), shift=1.0).converged},
    L + "damped_inverses": {"": lambda s: linalg.damped_inverses(s.factors, torch.full((2,), 0.1).double())},
    L + "eigenbases": {"": lambda s: linalg.eigenbases(s.factors)},
    L + "factored_damping": {
        "": lambda s: linalg.factored_damping(s.factors[:1], s.factors[1:], torch.ones(1, dtype=torch.float64))
    },
    L + "lanczos_quadratures": {"": lambda s: linalg.lanczos_quadratures(s.checked, s.vector()[:, None], 5)},
    L + "draw_probes": {
        kind: lambda s, kind=kind: linalg.draw_probes(  # type: ignore[misc]
            9, 2, kind, s.generator.clone_state(), dtype=torch.float64, device=torch.device("cpu")
        )
        for kind in ("rademacher", "gaussian")
    },
    L + "make_generator": {"": lambda s: torch.randn(3, generator=linalg.make_generator(5, "test"))},
    L + "check_operator": {
        "": lambda s: s.checked,
        "matrix": lambda s: linalg.check_operator(s.factors[0], "test").matvec(torch.ones(5, dtype=torch.float64)),
    },
    L + "CheckedOperator.matvec": {"": lambda s: s.checked.matvec(s.vector()).zero_()},
    L + "CheckedOperator.matmat": {"": lambda s: s.checked.matmat(columns(s.op))},
    L + "CheckedOperator.epsilon": {"": lambda s: s.checked.epsilon},
    L + "KrylovSubspace.expand": {"": krylov},
    L + "KrylovSubspace.directions": {"": lambda s: krylov(s).directions},
    L + "KrylovSubspace.forgetful": {"": lambda s: krylov(s).forgetful},
    L + "KrylovSubspace.width": {"": lambda s: krylov(s).width},
    L + "KrylovSubspace.coupling": {"": lambda s: ritz(s)[0].coupling(ritz(s)[2])},
    L + "KrylovSubspace.restart": {"": restarted},
    L + "KrylovSubspace.forget_direction": {"": lambda s: krylov(s).forget_direction()},
    L + "KrylovSubspace.full": {"": lambda s: krylov(s).full},
    L + "KrylovSubspace.complete": {"": lambda s: krylov(s).complete},
    L + "KrylovSubspace.ritz": {"": lambda s: ritz(s)},
    L + "KrylovSubspace.vectors": {"": lambda s: krylov(s).vectors(ritz(s)[2])},
    L + "KrylovSubspace.forgotten": {"": lambda s: krylov(s).forgotten(ritz(s)[2])},
    L + "KrylovSubspace.start_afresh": {"": afresh},
    L + "KrylovSubspace.random_direction": {"": lambda s: krylov(s).random_direction()},
}
"""Ways to use each public function, method and property, by `room.function` or `room.Class.member`."""

for _name, _make in OPERATORS.items():
    for _member, _use in MEMBERS.items():
        USES[f"operators.{_name}.{_member}"] = {"": lambda s, make=_make, use=_use: use(make(s), s)}  # type: ignore[misc]

_OPERATORS = (
    "__matmul__",
    "__rmatmul__",
    "__add__",
    "__radd__",
    "__sub__",
    "__rsub__",
    "__mul__",
    "__rmul__",
    "__truediv__",
    "__neg__",
    "__pos__",
    "__pow__",
    "__call__",
    "__getitem__",
    "__len__",
    "__iter__",
    "__repr__",
)


def public_names() -> set[str]:
    """All that can be called or read: of a class what it, or a class of kronfac below it, defines."""
    names: set[str] = set()
    for room, module in ROOMS.items():
        for name, value in vars(module).items():
            if name.startswith("_") or not getattr(value, "__module__", "").startswith("kronfac"):
                continue
            if inspect.isclass(value):
                if not getattr(value, "_is_protocol", False):
                    names |= {f"{room}.{member}" for member in _members(value)}
            elif callable(value):
                names.add(f"{room}.{name}")
    return names


def _members(public: type) -> Iterator[str]:
    taken: set[str] = set()
    for owner in public.__mro__:
        if not owner.__module__.startswith("kronfac"):
            continue
        generated = getattr(owner, "__dataclass_fields__", {})
        for name, value in vars(owner).items():
            used = isinstance(value, property) or (
                name not in generated and callable(getattr(value, "__func__", value))
            )
            if name in taken or not used:
                continue
            if name == "__repr__" and generated:
                continue
            if not name.startswith("_") or name in _OPERATORS:
                taken.add(name)
                yield f"{public.__name__}.{name}"


def test_every_public_name_has_a_use() -> None:
    names = public_names()
    assert len(names) > 40
    missing, stale = names - USES.keys(), USES.keys() - names
    assert not missing, f"public, but not run here: {sorted(missing)}; add a use of each to USES"
    assert not stale, f"run here, but not public any more: {sorted(stale)}"


@pytest.mark.parametrize(("name", "variant"), [(name, variant) for name, uses in USES.items() for variant in uses])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_untouched(name: str, variant: str) -> None:
    subject = make_subject()
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with untouched(subject):
            USES[name][variant](subject)
    finally:
        signal.signal(signal.SIGINT, found)


def test_the_check_notices() -> None:
    changes: list[Callable[[Subject], object]] = [
        lambda s: s.model[0].weight.data.mul_(1.0 + 2.0**-52),  # type: ignore[operator,union-attr]
        lambda s: s.model[0].weight.grad.neg_(),  # type: ignore[operator,union-attr]
        lambda s: s.factors[0].add_(0.0),
        lambda s: s.model.eval(),
        lambda s: s.model.requires_grad_(True),
        lambda s: s.model[9].bias.register_post_accumulate_grad_hook(print),  # type: ignore[operator,union-attr]
        lambda s: s.model[3].register_forward_pre_hook(print),
        lambda s: nn.modules.module.register_module_forward_hook(lambda module, args, output: None),
        lambda s: torch.rand(1),
        lambda s: np.random.rand(),
        lambda s: torch.rand(1, generator=s.generator),
        lambda s: s.batch[0].mul_(2.0),
        lambda s: signal.signal(signal.SIGINT, signal.SIG_IGN),
    ]
    for change in changes:
        subject = make_subject()
        handler, result = signal.getsignal(signal.SIGINT), None
        try:
            with pytest.raises(AssertionError), untouched(subject):
                result = change(subject)
        finally:
            signal.signal(signal.SIGINT, handler)
            if isinstance(result, torch.utils.hooks.RemovableHandle):
                result.remove()
