"""One maker per peer: each turns a model into a trainer, or says why it cannot.

A peer is used as its own documentation says, with its defaults, except for the frequencies; where a peer knows one
frequency only, that of the inverses is given to it and its line in the table says so.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronfac.cli.bench.measure import Clock
from kronfac.cli.bench.steps import (
    LEARNING_RATE,
    MakeTrainer,
    OptimizerTrainer,
    Phases,
    Schedule,
    Trainer,
    Workload,
    check_finite,
)

DAMPING = 1e-3
Batch = tuple[Tensor, Tensor]


class UnsupportedError(Exception):
    """A peer that is installed but cannot train this network; the message says why."""


@dataclass(frozen=True)
class Peer:
    """How a library is found and used.

    Attributes:
        name: as printed.
        module: what to import.
        make: its maker.
        note: what is not like kronfac's step.
    """

    name: str
    module: str
    make: MakeTrainer
    note: str = ""

    def present(self) -> bool:
        """Whether it can be imported from here."""
        return importlib.util.find_spec(self.module) is not None


def import_peer(name: str) -> Any:
    """Import a peer from wherever it lies: a checkout has no version of its own, a CPU build of torch no NVTX."""
    version = importlib.metadata.version

    def version_or_checkout(distribution: str) -> str:
        try:
            return version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return "0+checkout"

    if not torch.cuda.is_available():  # ASDL marks its phases for a profiler, whether there is one or not
        nvtx: Any = torch.cuda.nvtx
        nvtx.range_push = nvtx.range_pop = lambda *_: 0
    importlib.metadata.version = version_or_checkout  # type: ignore[assignment]
    try:
        return importlib.import_module(name)
    finally:
        importlib.metadata.version = version


def _kfac_pytorch(method: str) -> MakeTrainer:
    def make(model: nn.Module, workload: Workload, batch: Batch, schedule: Schedule) -> Trainer:
        preconditioner_module = import_peer("kfac.preconditioner")
        preconditioner = preconditioner_module.KFACPreconditioner(
            model,
            factor_update_steps=schedule.factor_every,
            inv_update_steps=schedule.inverse_every,
            damping=DAMPING,
            lr=LEARNING_RATE,
            compute_method=method,
            compute_eigenvalue_outer_product=method == "eigen",
            loglevel=logging.DEBUG,
        )
        return OptimizerTrainer(model, _sgd(model), workload, batch, before_step=preconditioner.step)

    return make


def _singd(model: nn.Module, workload: Workload, batch: Batch, schedule: Schedule) -> Trainer:
    module = import_peer("singd.optim.optimizer")
    covered = [
        parameter
        for layer in model.modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
        for parameter in layer.parameters(recurse=False)
    ]
    known = {id(parameter) for parameter in covered}
    optimizer = module.SINGD(
        model,
        params=covered,
        lr=LEARNING_RATE,
        damping=DAMPING,
        T=schedule.inverse_every,
        loss_average="batch+sequence" if workload.name == "transformer" else "batch",
        warn_unsupported=False,
    )
    rest = [parameter for parameter in model.parameters() if id(parameter) not in known]
    if not rest:
        return OptimizerTrainer(model, optimizer, workload, batch)
    plain = torch.optim.SGD(rest, lr=LEARNING_RATE, momentum=0.9)

    def step_rest() -> None:
        plain.step()
        plain.zero_grad()

    return OptimizerTrainer(model, optimizer, workload, batch, before_step=step_rest)


class _AsdlTrainer:
    """ASDL calls the model and the loss itself."""

    def __init__(self, model: nn.Module, maker: Any, workload: Workload, batch: Batch, clock: Clock) -> None:
        self.model, self.maker, self.workload, self.clock = model, maker, workload, clock
        self.optimizer = _sgd(model)
        self.input, self.target = batch

    def step(self) -> Phases:
        """Forward, curvature and backward are one call."""
        start = self.clock()
        self.optimizer.zero_grad(set_to_none=True)
        output = self.maker.setup_model_call(self.model, self.input)
        self.maker.setup_loss_call(self.workload.loss, output, self.target)
        self.maker.forward_and_backward()
        backward = self.clock()
        self.optimizer.step()
        return {"forward+backward": backward - start, "step": self.clock() - backward}

    def check(self) -> None:
        """Parameters are finite."""
        check_finite(self.model)


def _asdl(model: nn.Module, workload: Workload, batch: Batch, schedule: Schedule) -> Trainer:
    if workload.name not in ("resnet20", "mlp"):
        raise UnsupportedError("its Fisher sampling knows one categorical target per example only")
    asdl = import_peer("asdl")
    config = asdl.PreconditioningConfig(
        data_size=len(batch[0]),
        damping=DAMPING,
        ema_decay=0.05,
        preconditioner_upd_interval=schedule.inverse_every,
        curvature_upd_interval=schedule.factor_every,
    )
    return _AsdlTrainer(model, asdl.KfacGradientMaker(model, config), workload, batch, time.perf_counter)


def _curvlinops(model: nn.Module, workload: Workload, batch: Batch, schedule: Schedule) -> Trainer:
    """Factors of this batch alone, inverses kept between renewals: what a user writes around the linear operators."""
    if workload.name == "autoencoder":
        loss: nn.Module = nn.BCEWithLogitsLoss(reduction="sum")
    elif workload.name == "transformer":
        raise UnsupportedError("it takes the loss of a batch of vectors only; logits per token need another model")
    else:
        loss = nn.CrossEntropyLoss()
    curvlinops = import_peer("curvlinops")
    inverse_module = import_peer("curvlinops.inverse")
    parameters = [
        parameter
        for layer in model.modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
        for parameter in layer.parameters(recurse=False)
    ]
    state: dict[str, Any] = {"step": 0, "inverse": None}

    def precondition() -> None:
        if schedule.kind(state["step"]) == "inverse":
            operator = curvlinops.KFACLinearOperator(
                model,
                loss,
                parameters,
                [batch],
                fisher_type="mc",
                check_deterministic=False,
                separate_weight_and_bias=False,
            )
            state["inverse"] = inverse_module.KFACInverseLinearOperator(
                operator, damping=DAMPING, use_heuristic_damping=True
            )
        state["step"] += 1
        directions = state["inverse"] @ [parameter.grad for parameter in parameters]
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.grad = direction.detach()

    return OptimizerTrainer(model, _sgd(model), workload, batch, before_step=precondition)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)


PEERS: tuple[Peer, ...] = (
    Peer("kfac-pytorch inverse", "kfac", _kfac_pytorch("inverse"), "empirical Fisher"),
    Peer("kfac-pytorch eigen", "kfac", _kfac_pytorch("eigen"), "empirical Fisher, its default"),
    Peer("SINGD", "singd", _singd, "empirical Fisher, one frequency: everything at that of the inverses"),
    Peer("ASDL", "asdl", _asdl, "Fisher by sampling"),
    Peer(
        "curvlinops", "curvlinops", _curvlinops, "no running average: statistics are taken where inverses are renewed"
    ),
)
