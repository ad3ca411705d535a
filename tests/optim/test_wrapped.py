"""Models inside wrappers (compiled, replicated, sharded, averaged), and optimizers inside loops of other kinds."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import lr_scheduler, swa_utils

from kronfac.optim import KFAC
from tests.optim.models import convnet, equal, images, mlp, same_tree, snapshot, train_step, vectors


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


class Counting:
    """A backend that counts how often a graph it was given runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        def run(*args: Tensor) -> object:
            self.runs += 1
            return graph(*args)

        return run


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole model", "a part"])
def test_a_compiled_model_trains_as_it_does_uncompiled(whole: bool, fisher: str) -> None:
    """Forwards of which statistics are taken run uncompiled, the others compiled."""
    torch._dynamo.reset()
    model, twin = convnet(), convnet()
    twin.load_state_dict(model.state_dict())
    backend = Counting()
    if whole:
        compiled: nn.Module = torch.compile(model, backend=backend, fullgraph=True)
    else:
        compiled = model
        model[2] = torch.compile(model[2], backend=backend)
        model[5].compile(backend=backend)
    one = KFAC(compiled, 0.1, fisher=fisher, factor_every=3, inverse_every=3, seed=0)
    other = KFAC(twin, 0.1, fisher=fisher, factor_every=3, inverse_every=3, seed=0)
    for step in range(7):
        x, y = images(5)
        before = backend.runs
        train_step(compiled, one, x, y)
        assert (backend.runs == before) == (step % 3 == 0)
        train_step(twin, other, x, y)
    assert equal(snapshot(compiled), snapshot(twin))
    assert {pair.A.shape for pair in one.factors().values()} == {pair.A.shape for pair in other.factors().values()}


def test_a_failing_forward_of_a_compiled_model_leaves_the_compiler_as_it_was() -> None:
    torch._dynamo.reset()
    backend = Counting()
    compiled = torch.compile(mlp(3, 4, 2), backend=backend)
    optimizer = KFAC(compiled, 0.1)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        compiled(torch.randn(5, 7))
    compiled.eval()(torch.randn(5, 3))
    assert backend.runs == 1
    compiled.train()
    train_step(compiled, optimizer, *vectors(5, 3, 2))
    assert backend.runs == 1
    assert len(optimizer.factors()) == 2


def test_a_model_compiled_in_place_is_refused() -> None:
    model = mlp(3, 4, 2)
    optimizer = KFAC(model, 0.1)
    train_step(model, optimizer, *vectors(5, 3, 2))
    model.compile(backend="eager")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"compiled = torch\.compile\(model\)"):
        train_step(model, optimizer, *vectors(5, 3, 2))
    assert equal(before, snapshot(model))
    with pytest.raises(ValueError, match=r"together with its hooks"):
        KFAC(model, 0.1)


def test_stale_statistics_are_reported_once() -> None:
    model = mlp(3, 4, 2)
    optimizer = KFAC(model, 0.1, factor_every=2)
    x, y = vectors(5, 3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_step(model, optimizer, x, y)
        model.eval()
        train_step(model, optimizer, x, y)  # none are due
        optimizer.zero_grad()
        optimizer.step()  # nothing has a gradient
        train_step(model, optimizer, x, y)
    with pytest.warns(
        UserWarning, match=r"statistics were due .* 1 forward\(s\) were passed over: .*eval mode"
    ) as caught:
        train_step(model, optimizer, x, y)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            train_step(model, optimizer, x, y)


def test_training_the_compiled_form_of_a_model_that_is_watched_itself_is_reported_with_the_remedy() -> None:
    """Steps before it was compiled, or a checkpoint, hide that nothing arrives any more."""
    torch._dynamo.reset()
    model = mlp(3, 4, 2)
    optimizer = KFAC(model, 0.1)
    x, y = vectors(5, 3, 2)
    train_step(model, optimizer, x, y)
    saved = optimizer.state_dict()
    resumed = mlp(3, 4, 2)
    other = KFAC(resumed, 0.1)
    other.load_state_dict(saved)
    for net, own in ((model, optimizer), (resumed, other)):
        compiled = torch.compile(net, backend="eager")
        with pytest.warns(UserWarning, match=r"statistics were due .* make KFAC for the result of torch\.compile"):
            train_step(compiled, own, x, y)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train_step(compiled, own, x, y)


def test_statistics_on_demand_are_not_reported_as_missing() -> None:
    model = mlp(3, 4, 2).eval()
    optimizer = KFAC(model, 0.1)
    x, y = vectors(5, 3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with optimizer.record_statistics(update_only=True):
            model(x)
        for _ in range(3):
            train_step(model, optimizer, x, y)


def test_distributed_data_parallel_is_looked_through(group: None) -> None:
    model, twin = mlp(3, 4, 2), mlp(3, 4, 2)
    twin.load_state_dict(model.state_dict())
    wrapped = DistributedDataParallel(model)
    one, other = KFAC(wrapped, 0.1, seed=0), KFAC(twin, 0.1, seed=0)
    for _ in range(3):
        x, y = vectors(5, 3, 2)
        train_step(wrapped, one, x, y)
        train_step(twin, other, x, y)
    assert equal(snapshot(model), snapshot(twin))
    assert one.layers == ("module.0", "module.2")


def test_compiling_comes_before_distributing(group: None) -> None:
    torch._dynamo.reset()
    model = mlp(3, 4, 2)
    with pytest.raises(ValueError, match=r"DistributedDataParallel\(torch\.compile\(module\)\)"):
        KFAC(torch.compile(DistributedDataParallel(model), backend="eager"), 0.1)
    wrapped = DistributedDataParallel(torch.compile(model, backend="eager"))
    optimizer = KFAC(wrapped, 0.1)
    train_step(wrapped, optimizer, *vectors(5, 3, 2))
    assert len(optimizer.factors()) == 2
    model.compile(backend="eager")
    in_place = DistributedDataParallel(model)
    with pytest.raises(ValueError, match="together with its hooks"):
        KFAC(in_place, 0.1)


@pytest.mark.filterwarnings("ignore:FSDP is switching")
def test_sharded_parameters_are_refused(group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    model = mlp(3, 4, 2)
    optimizer = KFAC(model, 0.1)
    train_step(model, optimizer, *vectors(5, 3, 2))
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match=r"'0\.weight' is a DTensor .* Use DistributedDataParallel"):
        KFAC(model, 0.1)
    with pytest.raises(RuntimeError, match=r"no longer the model's.*fully_shard"):
        optimizer.step()
    extra = nn.Parameter(distribute_tensor(torch.zeros(3), mesh))
    with pytest.raises(ValueError, match="is a DTensor"):
        KFAC(mlp(3, 2), 0.1, params=[extra])
    sharded = FullyShardedDataParallel(mlp(3, 4, 2), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="sharded by FullyShardedDataParallel"):
        KFAC(nn.Sequential(sharded), 0.1)


def test_data_parallel_is_refused_where_it_makes_replicas() -> None:
    model = DataParallel(mlp(3, 4, 2))
    optimizer = KFAC(model, 0.1)  # without a GPU it calls the model itself
    train_step(model, optimizer, *vectors(5, 3, 2))
    assert optimizer.layers == ("module.0", "module.2")
    model.device_ids = [0, 1]
    with pytest.raises(ValueError, match=r"DataParallel on devices \[0, 1\] .* use DistributedDataParallel"):
        KFAC(model, 0.1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_and_traced_modules_are_refused() -> None:
    for model in (torch.jit.script(mlp(3, 2)), torch.jit.trace(mlp(3, 2), torch.randn(5, 3))):
        with pytest.raises(ValueError, match="runs as one program; make KFAC for the original module"):
            KFAC(model, 0.1)


def test_a_symbolic_trace_is_a_model_like_any_other() -> None:
    model, twin = mlp(3, 4, 2), mlp(3, 4, 2)
    twin.load_state_dict(model.state_dict())
    traced = torch.fx.symbolic_trace(model)
    one, other = KFAC(traced, 0.1, seed=0), KFAC(twin, 0.1, seed=0)
    for _ in range(3):
        x, y = vectors(5, 3, 2)
        train_step(traced, one, x, y)
        train_step(twin, other, x, y)
    assert equal(snapshot(traced), snapshot(twin))


@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_averaged_models_are_copies_that_are_not_watched(kind: str) -> None:
    def norms() -> nn.Sequential:
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    average = None if kind == "swa" else swa_utils.get_ema_multi_avg_fn(0.9)
    model, twin = norms(), norms()
    one, other = KFAC(model, 0.1, seed=0), KFAC(twin, 0.1, seed=0)
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=average)
    schedulers = (
        swa_utils.SWALR(one, swa_lr=0.02, anneal_epochs=2),
        swa_utils.SWALR(other, swa_lr=0.02, anneal_epochs=2),
    )
    for step in range(4):
        x, y = vectors(8, 3, 2)
        train_step(model, one, x, y)
        averaged.update_parameters(model)
        averaged(x)
        swa_utils.update_bn([x], averaged)
        swa_utils.update_bn([], model)
        train_step(twin, other, x, y)
        for scheduler in schedulers:
            scheduler.step()
        for name, buffer in model.named_buffers():  # update_bn resets them
            twin.get_buffer(name).copy_(buffer)
        assert step == 0 or one.param_groups[0]["lr"] < 0.1
    assert equal(snapshot(model), snapshot(twin))
    assert not equal(snapshot(model), snapshot(averaged.module))


@pytest.mark.parametrize("name", ["ReduceLROnPlateau", "CyclicLR", "OneCycleLR", "SequentialLR", "ChainedScheduler"])
def test_schedulers_and_their_checkpoints(name: str) -> None:
    """The schedule is torch's own, step by step, and resuming both continues bit for bit."""

    def schedule(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        if name == "SequentialLR":
            parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
            return lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])
        if name == "ChainedScheduler":
            return lr_scheduler.ChainedScheduler(
                [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
            )
        if name == "ReduceLROnPlateau":
            return lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        if name == "CyclicLR":
            return lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=2)
        return lr_scheduler.OneCycleLR(optimizer, max_lr=0.4, total_steps=10)

    def advance(scheduler: lr_scheduler.LRScheduler) -> None:
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()

    model = mlp(3, 4, 2)
    optimizer, plain = KFAC(model, 0.1), torch.optim.SGD(mlp(3, 2).parameters(), 0.1, momentum=0.9)
    ours, theirs = schedule(optimizer), schedule(plain)
    for _ in range(3):
        train_step(model, optimizer, *vectors(5, 3, 2))
        plain.step()
        advance(ours)
        advance(theirs)
        for key in ("lr", "momentum"):
            assert optimizer.param_groups[0][key] == pytest.approx(plain.param_groups[0][key])
    twin = copy.deepcopy(model)
    other = KFAC(twin, 0.1)
    resumed = schedule(other)
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(ours.state_dict())
    for _ in range(3):
        batch = vectors(5, 3, 2)
        train_step(model, optimizer, *batch)
        train_step(twin, other, *batch)
        advance(ours)
        advance(resumed)
    assert equal(snapshot(model), snapshot(twin))
    assert same_tree(optimizer.state_dict(), other.state_dict())


def test_beside_adam_each_optimizer_does_what_it_would_do_alone() -> None:
    model, twin = mlp(3, 4, 2), mlp(3, 4, 2)
    twin.load_state_dict(model.state_dict())
    kfac = KFAC(model, 0.1, params=list(model[0].parameters()), kl_clip=None, seed=0)
    adam = torch.optim.Adam(model[2].parameters(), 0.01)
    # The twin: K-FAC over both layers, of which the second stands still, and Adam fed with the gradients.
    still = [{"params": twin[0].parameters()}, {"params": twin[2].parameters(), "lr": 0.0}]
    both = KFAC(twin, 0.1, params=still, kl_clip=None, seed=0)
    other = torch.optim.Adam(twin[2].parameters(), 0.01)
    for _ in range(4):
        x, y = vectors(6, 3, 2)
        for net, optimizers in ((model, (kfac, adam)), (twin, (both, other))):
            functional.cross_entropy(net(x), y).backward()
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
    assert equal(snapshot(model), snapshot(twin))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_clipped_gradients_are_what_is_preconditioned(accumulate: int) -> None:
    """A wide layer with few rows, where the gradient's rows are used while it is unclipped: P is linear in it."""
    model = nn.Sequential(nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 5)).double()
    optimizer = KFAC(model, 1.0, fisher="exact", solve="inverse", momentum=0.0, kl_clip=None, damping=1e-2)
    x, y = vectors(6 * accumulate, 300, 5, torch.float64)
    start, moves = snapshot(model), []
    state = copy.deepcopy(optimizer.state_dict())
    for limit in (float("inf"), 1e-3):
        model.load_state_dict(dict(zip(model.state_dict(), start, strict=True)))
        optimizer.load_state_dict(state)
        optimizer.zero_grad()
        for some, labels in zip(x.split(6), y.split(6), strict=True):
            (functional.cross_entropy(model(some), labels) / accumulate).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
        moves.append([new - old for new, old in zip(snapshot(model), start, strict=True)])
    for free, clipped in zip(*moves, strict=True):
        torch.testing.assert_close(clipped, free * (1e-3 / (norm + 1e-6)), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_autocast_with_a_scaler_and_clipping(dtype: torch.dtype, fisher: str) -> None:
    model = mlp(6, 8, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = KFAC(model, 0.1, fisher=fisher, grad_scaler=scaler)
    x, y = vectors(32, 6, 3)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(factor.dtype == torch.float32 for pair in optimizer.factors().values() for factor in pair)
