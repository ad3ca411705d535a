"""KFAC on a GPU: the steps of the CPU, without a wait, inside a CUDA graph, beside a stream for inverses.

Everything here needs a GPU and the operators for it; `make gpu-check` runs it where there is one.
"""

from __future__ import annotations

import functools
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac import _library
from kronfac.optim import KFAC, background, predict_memory
from kronfac.optim.update import apply_update
from tests.optim.available import IDS, STRUCTURES
from tests.optim.models import convnet, equal, images, mlp, same_tree, snapshot, tree_map, vectors
from tests.optim.test_structures import Everything, through_a_file, tokens
from tests.optim.test_waits import LAYOUTS

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or "_ops_cuda" not in _library.LOADED, reason="needs a GPU and the operators for it"
)
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _small_layers_are_doubly_factored_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kronfac.optim.structures.LARGEST_A_IF_ASKED", 3)


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def no_waits() -> Iterator[None]:
    """The driver raises where the host would wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[..., tuple[Tensor, Tensor]]]] = {
    "mlp": (lambda: mlp(4, 8, 6, 3), lambda: vectors(16, 4, 3)),
    "convnet": (convnet, lambda: images(16)),
    "tokens": (Everything, lambda: tokens(16)),
}


def built(network: str, dtype: torch.dtype = torch.float32, device: Any = CUDA, **options: Any) -> tuple[Any, KFAC]:
    torch.manual_seed(0)
    model = NETWORKS[network][0]().to(device, dtype)
    return model, KFAC(model, options.pop("lr", 0.05), seed=0, **{"damping": 0.03, **options})


def batches(network: str, count: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """On the CPU, so that both devices see the same."""
    torch.manual_seed(1)
    drawn = [NETWORKS[network][1]() for _ in range(count)]
    return [(x.to(dtype) if x.is_floating_point() else x, y) for x, y in drawn]


def take(model: nn.Module, optimizer: KFAC, x: Tensor, y: Tensor) -> None:
    device = next(model.parameters()).device
    optimizer.zero_grad()
    functional.cross_entropy(model(x.to(device)), y.to(device)).backward()
    optimizer.step()


def parts(model: nn.Module, optimizer: KFAC) -> list[Any]:
    return [dict(model.state_dict()), optimizer.state_dict()]


def on_the_cpu(model: nn.Module) -> list[Tensor]:
    return [tensor.cpu() for tensor in snapshot(model)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("structure", "solve"), STRUCTURES, ids=IDS)
def test_the_steps_are_those_of_the_cpu(structure: str, solve: str, network: str, dtype: torch.dtype) -> None:
    """fisher="exact": the draws of different devices differ."""
    options = {"structure": structure, "solve": solve, "fisher": "exact", "inverse_every": 3, "weight_decay": 0.01}
    runs = []
    for device in ("cpu", CUDA):
        model, optimizer = built(network, dtype, device, norm_constraint=0.5, averaging=0.9, **options)
        for x, y in batches(network, 10, dtype):
            take(model, optimizer, x, y)
        assert (optimizer.steps, optimizer.skipped_steps, optimizer.inverse_failures) == (10, 0, 0)
        averages = optimizer.state_dict()["kronfac"]["averages"]
        runs.append([*on_the_cpu(model), *(entry["value"].cpu() for entry in averages.values())])
    tolerance = {"rtol": 1e-8, "atol": 1e-8} if dtype == torch.float64 else {"rtol": 2e-3, "atol": 2e-4}
    torch.testing.assert_close(*runs, **tolerance)


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_factors_are_those_of_the_cpu(network: str, fisher: str) -> None:
    runs = []
    for device in ("cpu", CUDA):
        model, optimizer = built(network, torch.float64, device, fisher=fisher, lr=0.0)
        for x, y in batches(network, 40 if fisher == "mc" else 3, torch.float64):
            take(model, optimizer, x, y)
        runs.append({name: [factor.cpu() for factor in pair] for name, pair in optimizer.factors().items()})
    ours, theirs = runs
    for name, (A, G) in ours.items():
        torch.testing.assert_close(theirs[name][0], A, rtol=1e-9, atol=1e-12)
        if fisher == "mc":  # other draws of the same distribution
            assert (
                0.5 < float(theirs[name][1].diagonal(dim1=-2, dim2=-1).sum() / G.diagonal(dim1=-2, dim2=-1).sum()) < 2
            )
        else:
            torch.testing.assert_close(theirs[name][1], G, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("structure", "solve"), STRUCTURES, ids=IDS)
def test_a_step_without_factorisation_does_not_wait(structure: str, solve: str, network: str) -> None:
    model, optimizer = built(
        network, structure=structure, solve=solve, inverse_every=100, norm_constraint=0.5, averaging=0.9
    )
    data = [(x.to(CUDA), y.to(CUDA)) for x, y in batches(network, 5)]
    for batch in data[:2]:
        take(model, optimizer, *batch)
    with no_waits():
        for x, y in data[2:]:
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert (optimizer.steps, optimizer.skipped_steps) == (5, 0)


def test_a_step_that_is_not_finite_changes_nothing_and_is_found_out_later() -> None:
    model, optimizer = built("convnet", inverse_every=4, momentum=0.9)
    data = batches("convnet", 8)
    for batch in data[:2]:
        take(model, optimizer, *batch)
    before, state = snapshot(model), tree_map(lambda tensor: tensor.clone(), optimizer.state_dict())
    x, y = (tensor.to(CUDA) for tensor in data[2])
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    model[0].weight.grad[0, 0, 0, 0] = float("nan")
    with no_waits():
        optimizer.step()
    assert equal(before, snapshot(model))
    after = optimizer.state_dict()
    assert same_tree(state["state"], after["state"])
    assert all(bool(layer["G"].isfinite().all()) for layer in after["kronfac"]["layers"].values())
    assert (optimizer.steps, optimizer.skipped_steps) == (2, 1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for batch in data[3:]:
            take(model, optimizer, *batch)
    assert [one for one in said if "of an earlier step were not finite" in str(one.message)]
    assert (optimizer.steps, optimizer.skipped_steps) == (7, 1)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}, {"nesterov": True}, {"decoupled": True}], ids=str)
def test_an_update_under_a_condition(options: dict[str, Any]) -> None:
    group = {"lr": 0.3, "momentum": 0.9, "nesterov": False, "weight_decay": 0.1, "decoupled": False, **options}
    pairs = [make() for make in LAYOUTS.values()]
    ours, theirs = [p.to(CUDA) for p, _ in pairs], [p.clone() for p, _ in pairs]
    one: dict[Tensor, dict[str, Tensor]] = {p: {} for p in ours}
    other: dict[Tensor, dict[str, Tensor]] = {p: {} for p in theirs}
    for good in (False, True, True, False, True):
        if not good:
            kept = [p.clone() for p in ours]
            nothing = [torch.full_like(p, float("nan")) for p in ours]
            apply_update(group, ours, nothing, one, good=torch.tensor(False, device=CUDA))
            assert equal(kept, ours)
            continue
        apply_update(group, ours, [d.to(CUDA) for _, d in pairs], one, good=torch.tensor(True, device=CUDA))
        apply_update(group, theirs, [d for _, d in pairs], other)
    for a, b in zip(ours, theirs, strict=True):
        tolerance = 2e-2 if a.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("structure", "solve"), STRUCTURES, ids=IDS)
def test_training_resumes_bit_for_bit(structure: str, solve: str) -> None:
    staleness = 0 if structure == "tridiagonal" else 2
    options = {"structure": structure, "solve": solve, "inverse_every": 3, "max_staleness": staleness}
    data = batches("tokens", 12)
    # Attention's backward and the embedding's may add in any order.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            model, optimizer = built("tokens", **options)
            for batch in data[:5]:
                take(model, optimizer, *batch)
            saved = through_a_file([model.state_dict(), optimizer.state_dict()])
            twin, other = built("tokens", **options)
            twin.load_state_dict(saved[0])
            other.load_state_dict(saved[1])
            for batch in data[5:]:
                take(model, optimizer, *batch)
                take(twin, other, *batch)
    finally:
        torch.use_deterministic_algorithms(False)
    assert equal(snapshot(model), snapshot(twin))
    assert same_tree(optimizer.state_dict(), other.state_dict())


def test_a_checkpoint_goes_to_the_other_device_and_back() -> None:
    data = batches("convnet", 9, torch.float64)
    options = {"fisher": "exact", "inverse_every": 2}
    reference, plain = built("convnet", torch.float64, "cpu", **options)
    for batch in data:
        take(reference, plain, *batch)
    model, optimizer = built("convnet", torch.float64, "cpu", **options)
    for start, device in enumerate((torch.device("cpu"), CUDA, torch.device("cpu"))):
        to_device = functools.partial(Tensor.to, device=device)  # as torch.load(map_location=device)
        saved = [tree_map(lambda tensor, to=to_device: to(tensor), part) for part in parts(model, optimizer)]
        model, optimizer = built("convnet", torch.float64, device, **options)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        for batch in data[3 * start : 3 * start + 3]:
            take(model, optimizer, *batch)
    torch.testing.assert_close(on_the_cpu(model), on_the_cpu(reference), rtol=1e-8, atol=1e-8)


def test_a_model_that_moves_takes_everything_along() -> None:
    data = batches("convnet", 8, torch.float64)
    options = {"fisher": "exact", "inverse_every": 2, "averaging": 0.9, "max_staleness": 1}
    reference, plain = built("convnet", torch.float64, "cpu", **options)
    model, optimizer = built("convnet", torch.float64, "cpu", **options)
    for step, batch in enumerate(data):
        if step == 3:
            model.to(CUDA)
        take(reference, plain, *batch)
        take(model, optimizer, *batch)
    assert all(pair.A.device == CUDA for pair in optimizer.factors().values())
    torch.testing.assert_close(on_the_cpu(model), on_the_cpu(reference), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solve", ["inverse", "eigen"])
def test_inverses_beside_the_training_are_those_of_the_rule(solve: str) -> None:
    """What is made on the other stream is what the CPU makes, at the same steps."""
    runs = []
    for device in ("cpu", CUDA):
        model, optimizer = built(
            "convnet", torch.float64, device, solve=solve, fisher="exact", max_staleness=2, inverse_every=3
        )
        for batch in batches("convnet", 14, torch.float64):
            take(model, optimizer, *batch)
        runs.append(on_the_cpu(model))
    torch.testing.assert_close(*runs, rtol=1e-8, atol=1e-8)


def test_inverses_are_made_on_another_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    inner, seen = background.factorise, []

    def factorise(*arguments: Any) -> Any:
        seen.append((threading.current_thread().name, torch.cuda.current_stream(CUDA).cuda_stream))
        return inner(*arguments)

    monkeypatch.setattr(background, "factorise", factorise)
    model, optimizer = built("mlp", max_staleness=2, inverse_every=3)
    for batch in batches("mlp", 12):
        take(model, optimizer, *batch)
    assert [name for name, _ in seen] == ["kronfac-inverses"] * 3
    assert len({stream for _, stream in seen}) == 1
    assert seen[0][1] != torch.cuda.current_stream(CUDA).cuda_stream


def test_a_busy_stream_and_a_busy_allocator_make_no_difference() -> None:
    """Memory that is handed over is not given away while the other stream works with it."""
    runs = []
    for busy in (False, True):
        model, optimizer = built("convnet", max_staleness=1, inverse_every=2, fisher="exact")
        for batch in batches("convnet", 20):
            take(model, optimizer, *batch)
            if busy:
                torch.cuda._sleep(2_000_000)
                for size in (16, 64, 256, 1024, 4096, 65536):  # whatever was freed is written over
                    for _ in range(20):
                        torch.full((size,), float("nan"), device=CUDA)
        runs.append(on_the_cpu(model))
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-5)


def test_another_current_stream() -> None:
    runs = []
    for side in (False, True):
        model, optimizer = built("convnet", torch.float64, fisher="exact", inverse_every=3)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream() if side else torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            for batch in batches("convnet", 8, torch.float64):
                take(model, optimizer, *batch)
        stream.synchronize()
        runs.append(on_the_cpu(model))
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-9)


def test_bfloat16_autocast() -> None:
    model, optimizer = built("convnet", lr=0.1, inverse_every=3)
    x, y = (tensor.to(CUDA) for tensor in batches("convnet", 1)[0])
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.skipped_steps == 0
    assert all(factor.dtype == torch.float32 for pair in optimizer.factors().values() for factor in pair)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models(dtype: torch.dtype) -> None:
    model, optimizer = built("mlp", dtype, lr=0.1, inverse_every=3)
    (batch,) = batches("mlp", 1, dtype)
    before = snapshot(model)
    for _ in range(8):
        take(model, optimizer, *batch)
    assert optimizer.skipped_steps == 0
    assert not equal(before, snapshot(model))
    assert all(p.dtype == dtype for p in model.parameters())


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_a_grad_scaler_with_float16(fisher: str, unscale: bool) -> None:
    model, optimizer = built("mlp", fisher=fisher, lr=0.1, inverse_every=4)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40, growth_interval=1000)  # overflows at first
    optimizer._grad_scaler = scaler
    x, y = (tensor.to(CUDA) for tensor in batches("mlp", 1)[0])
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        with nullcontext() if optimizer._refreshes() else no_waits():
            scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert optimizer.skipped_steps > 0
    assert optimizer.steps + optimizer.skipped_steps == 50
    assert losses[-1] < 0.9 * losses[0]
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_channels_last() -> None:
    runs = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model, optimizer = built("convnet", torch.float64, fisher="exact", inverse_every=3, weight_decay=0.01)
        model.to(memory_format=layout)
        for x, y in batches("convnet", 6, torch.float64):
            take(model, optimizer, x.to(memory_format=layout), y)
        runs.append(on_the_cpu(model))
    torch.testing.assert_close(*runs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal"])
def test_a_captured_step_is_the_step(structure: str) -> None:
    """Forward, backward and step in one graph, replayed between steps that take statistics and make inverses."""
    options = {"structure": structure, "factor_every": 4, "inverse_every": 8, "fisher": "exact"}
    data = [(x.to(CUDA), y.to(CUDA)) for x, y in batches("convnet", 26, torch.float64)]
    reference, plain = built("convnet", torch.float64, **options)
    model, optimizer = built("convnet", torch.float64, **options)
    static = [tensor.clone() for tensor in data[0]]
    graph: torch.cuda.CUDAGraph | None = None

    def whole(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    replays = 0
    for step, (x, y) in enumerate(data):
        take(reference, plain, x, y)
        for place, tensor in zip(static, (x, y), strict=True):
            place.copy_(tensor)
        if not optimizer.next_step_is_plain or step < 4:
            whole(*static)
            continue
        if graph is None:
            counted = optimizer.steps
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                whole(*static)
            assert optimizer.steps == counted
        graph.replay()
        optimizer.count_replay()
        replays += 1
        torch.testing.assert_close(on_the_cpu(model), on_the_cpu(reference), rtol=1e-9, atol=1e-9)
    assert replays > 10
    assert optimizer.steps == plain.steps == len(data)
    # A replay with a batch that is not finite leaves everything alone, and is counted.
    assert graph is not None
    before = snapshot(model)
    static[0].fill_(float("nan"))
    graph.replay()
    optimizer.count_replay()
    assert equal(before, snapshot(model))
    assert optimizer.skipped_steps == 1


def test_a_step_that_is_not_plain_is_not_captured() -> None:
    model, optimizer = built("mlp", inverse_every=2)
    take(model, optimizer, *batches("mlp", 1)[0])
    graph = torch.cuda.CUDAGraph()
    x, y = (tensor.to(CUDA) for tensor in batches("mlp", 1)[0])
    optimizer.zero_grad(set_to_none=True)
    functional.cross_entropy(model(x), y).backward()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"), torch.cuda.graph(graph):
        optimizer.step()


def test_nothing_leaks() -> None:
    model, optimizer = built("tokens", max_staleness=2, inverse_every=3)
    data = [(x.to(CUDA), y.to(CUDA)) for x, y in batches("tokens", 6)]
    sizes = []
    for _ in range(7):
        for batch in data:
            take(model, optimizer, *batch)
        gc.collect()
        torch.cuda.synchronize()
        sizes.append(torch.cuda.memory_allocated())
    assert max(sizes[1:]) - min(sizes[1:]) < 64 << 10, sizes


def test_what_is_held_is_what_was_predicted() -> None:
    model, optimizer = built("tokens")
    for batch in batches("tokens", 2):
        take(model, optimizer, *batch)
    assert optimizer.memory().total == predict_memory(model).total


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_two_devices() -> None:
    class Split(nn.Module):
        def __init__(self, *devices: Any) -> None:
            super().__init__()
            self.devices = devices
            self.first, self.second = nn.Linear(4, 6).to(devices[0]), nn.Linear(6, 3).to(devices[1])

        def forward(self, x: Tensor) -> Tensor:
            """Through both."""
            return self.second(torch.tanh(self.first(x.to(self.devices[0]))).to(self.devices[1]))

    runs = []
    for devices in (("cuda:0", "cuda:0"), ("cuda:0", "cuda:1")):
        torch.manual_seed(0)
        model = Split(*devices).double()
        optimizer = KFAC(model, 0.1, fisher="exact", inverse_every=3, norm_constraint=0.5)
        for x, y in batches("mlp", 7, torch.float64):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y.to(devices[1])).backward()
            optimizer.step()
        runs.append(on_the_cpu(model))
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-9)
