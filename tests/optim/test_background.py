"""`max_staleness`: inverses made by a thread, taken into use at the step that the rule names and at no other."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed, nn

from kronfac.optim import KFAC, background
from kronfac.optim.background import Background
from tests.optim.models import convnet, equal, frozen_state, images, mlp, same_tree, snapshot, train_step, vectors
from tests.optim.test_state import DELETE, set_in, through_a_file
from tests.processes import run_ranks

THREAD = "kronfac-inverses"


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join(10)
            assert not thread.is_alive()


class Gate:
    """Stands in for `factorise`: in the background it waits until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.calls = 0
        self._inner: Callable[..., Any] = background.factorise
        monkeypatch.setattr(background, "factorise", self)

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        assert threading.current_thread().name == THREAD
        assert self.open.wait(20)
        return self._inner(*args)


def batches(count: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    return [vectors(6, 4, 3, dtype) for _ in range(count)]


def made(staleness: int, **options: Any) -> tuple[nn.Module, KFAC]:
    torch.manual_seed(1)
    model = mlp(4, 5, 3)
    return model, KFAC(model, 0.1, max_staleness=staleness, seed=0, **options)


@pytest.mark.parametrize(("staleness", "every"), [(1, 3), (3, 3), (5, 2)])
@pytest.mark.parametrize("solve", ["inverse", "eigen"])
def test_a_step_uses_what_a_synchronous_run_used_so_many_steps_before(solve: str, staleness: int, every: int) -> None:
    model, optimizer = made(staleness, solve=solve, inverse_every=every, damping=lambda step: 0.1 / (1 + step))
    history = []
    for step, batch in enumerate(batches(12)):
        train_step(model, optimizer, *batch)
        history.append((optimizer.factors(), optimizer.param_groups[0]["damping"]))
        asked = max(step - staleness, 0) // every * every
        factors, damping = history[asked]
        for layer in optimizer._coverage.layers:
            own = optimizer.structure.by_block[layer.block]
            (expected,) = own.factorise([factors[layer.name]], [damping]).values
            assert layer.made == asked
            assert same_tree(layer.factorisation, expected)


def test_zero_is_todays_code_and_keeps_no_thread() -> None:
    _, optimizer = made(0)
    assert optimizer._background is None


def test_the_speed_of_the_thread_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    data, results = batches(9), []
    inner = background.factorise
    for delay in (0.0, 0.03):

        def slow(*args: Any, delay: float = delay) -> Any:
            time.sleep(delay)
            return inner(*args)

        monkeypatch.setattr(background, "factorise", slow)
        model, optimizer = made(2, inverse_every=1)
        for batch in data:
            train_step(model, optimizer, *batch)
        results.append((snapshot(model), frozen_state(optimizer)))
    assert equal(results[0][0], results[1][0])
    assert same_tree(results[0][1], results[1][1])


def test_training_goes_on_meanwhile_and_waits_when_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    model, optimizer = made(2, inverse_every=3)
    data = batches(7)
    for batch in data[:5]:  # asked for at step 3, due at step 5
        train_step(model, optimizer, *batch)
    assert optimizer._background is not None
    assert optimizer._background.pending == (3,)
    assert gate.calls == 1
    due = threading.Thread(target=train_step, args=(model, optimizer, *data[5]))
    due.start()
    due.join(0.2)
    assert due.is_alive(), "the step did not wait for the inverses that are due"
    gate.open.set()
    due.join(20)
    assert not due.is_alive()
    assert optimizer._background.pending == ()
    assert optimizer._coverage.layers[0].made == 3


def test_the_first_inverse_is_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    model, optimizer = made(3, inverse_every=5)
    train_step(model, optimizer, *vectors(6, 4, 3))
    assert gate.calls == 0
    assert all(layer.made == 0 and layer.factorisation is not None for layer in optimizer._coverage.layers)


@given(
    staleness=st.integers(1, 4),
    every=st.integers(1, 3),
    at=st.integers(0, 6),
    solve=st.sampled_from(["inverse", "eigen"]),
    structure=st.sampled_from(["kfac", "ekfac", "doubly_factored"]),
    conv=st.booleans(),
)
@settings(max_examples=9)
def test_training_continues_bit_for_bit(
    staleness: int, every: int, at: int, solve: str, structure: str, conv: bool
) -> None:
    def make() -> tuple[nn.Module, KFAC]:
        model = convnet() if conv else mlp(4, 5, 3)
        return model, KFAC(model, 0.1, structure=structure, solve=solve, inverse_every=every, max_staleness=staleness)

    data = [images(6) if conv else vectors(6, 4, 3) for _ in range(11)]
    model, optimizer = make()
    for batch in data[:at]:
        train_step(model, optimizer, *batch)
    saved = through_a_file([model.state_dict(), optimizer.state_dict()])
    twin, other = make()
    train_step(twin, other, *data[0])  # what it had asked for is dropped
    twin.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for batch in data[at:]:
        train_step(model, optimizer, *batch)
        train_step(twin, other, *batch)
    assert equal(snapshot(model), snapshot(twin))
    assert same_tree(optimizer.state_dict(), other.state_dict())


def test_a_checkpoint_stores_what_is_in_use_and_what_is_pending() -> None:
    model, optimizer = made(2, inverse_every=2)
    for batch in batches(4):
        train_step(model, optimizer, *batch)
    own = optimizer.state_dict()["kronfac"]
    assert [entry["made"] for entry in own["pending"]] == [2]
    assert own["layers"]["0"]["made"] == 0
    # An optimizer with another limit takes them by its own rule, a synchronous one has them in use already.
    for staleness, pending in ((0, None), (1, (2,)), (5, (2,))):
        other = KFAC(mlp(4, 5, 3), 0.1, max_staleness=staleness)
        other.load_state_dict(frozen_state(optimizer))
        layer = other._coverage.layers[0]
        if pending is None:
            assert layer.made == 2
            assert same_tree(layer.factorisation, own["pending"][0]["layers"]["0"])
        else:
            assert layer.made == 0
            assert other._background is not None
            assert other._background.pending == pending


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (set_in("kronfac/pending", DELETE), "'pending' is missing"),
        (set_in("kronfac/pending", 3), "pending: expected a list, got int 3"),
        (set_in("kronfac/pending", [3]), r"pending\[0\]: expected a dict"),
        (
            set_in("kronfac/pending", [{"made": 9, "retries": 0, "layers": {}}]),
            "expected a step from 0 to below 3, got 9",
        ),
        (set_in("kronfac/pending", [{"made": 0, "retries": 0, "layers": {}}] * 2), "expected a step from 1 to below 3"),
        (
            set_in("kronfac/pending", [{"made": 2, "retries": 0, "layers": {"x": None}}]),
            "have an inverse in use, got 'x'",
        ),
        (
            set_in("kronfac/pending", [{"made": 2, "retries": 0, "layers": {"0": {}}}]),
            r"pending\[0\]\.layers\.0: .*'left'",
        ),
        (set_in("kronfac/layers/0/made", -1), r"layers\.0\.made: expected an integer >= 0"),
    ],
)
def test_a_checkpoint_whose_pending_part_does_not_fit_is_refused(change: Callable[[Any], None], match: str) -> None:
    model, optimizer = made(2, inverse_every=2)
    for batch in batches(3):
        train_step(model, optimizer, *batch)
    before = frozen_state(optimizer)
    bad = frozen_state(optimizer)
    change(bad)
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(bad)
    assert same_tree(before, optimizer.state_dict())


def test_errors_in_the_thread_surface_at_the_next_step_with_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*args: Any) -> Any:
        raise MemoryError("no room for the inverses")

    model, optimizer = made(5, inverse_every=2)
    data = batches(6)
    for batch in data[:2]:
        train_step(model, optimizer, *batch)
    with monkeypatch.context() as patch:
        patch.setattr(background, "factorise", out_of_memory)
        train_step(model, optimizer, *data[2])
        assert optimizer._background is not None
        optimizer._background._requests[0].done.wait(10)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"asked for at step 2 could not be made in the background") as caught:
        train_step(model, optimizer, *data[3])
    assert "out_of_memory" in "".join(traceback.format_exception(caught.value))
    assert equal(before, snapshot(model))
    train_step(model, optimizer, *data[3])  # said once; the last good inverse is kept
    assert optimizer._coverage.layers[0].made == 0
    assert not equal(before, snapshot(model))


def test_a_factor_that_resists_keeps_the_last_good_inverse_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = made(1, inverse_every=2)
    data = batches(4)
    inner = background.factorise

    def failing(structure: Any, layers: Any, factors: Any, damping: Any) -> Any:
        values, retries = inner(structure, layers, factors, damping)
        return [None, *values[1:]], retries + 4

    for batch in data[:2]:
        train_step(model, optimizer, *batch)
    monkeypatch.setattr(background, "factorise", failing)
    train_step(model, optimizer, *data[2])
    assert optimizer.inverse_failures == optimizer.inverse_retries == 0
    with pytest.warns(UserWarning, match="last good inverse is kept"):
        train_step(model, optimizer, *data[3])
    assert (optimizer.inverse_failures, optimizer.inverse_retries) == (1, 4)
    assert [layer.made for layer in optimizer._coverage.layers] == [0, 2]


@pytest.mark.filterwarnings("ignore:KFAC. the gradients")
def test_a_skipped_step_neither_asks_nor_takes() -> None:
    model, optimizer = made(1, inverse_every=2)
    data = batches(5)

    def spoiled(batch: tuple[Tensor, Tensor]) -> None:
        handle = model[0].weight.register_hook(lambda grad: grad * float("nan"))  # type: ignore[index, operator]
        train_step(model, optimizer, *batch)
        handle.remove()

    assert optimizer._background is not None
    for batch in data[:2]:
        train_step(model, optimizer, *batch)
    spoiled(data[2])  # this would have asked
    assert optimizer._background.pending == ()
    train_step(model, optimizer, *data[2])
    assert optimizer._background.pending == (2,)
    before = frozen_state(optimizer)
    spoiled(data[3])  # this would have taken
    assert same_tree(before["kronfac"]["pending"], optimizer.state_dict()["kronfac"]["pending"])
    assert optimizer._coverage.layers[0].made == 0
    train_step(model, optimizer, *data[3])
    assert optimizer._coverage.layers[0].made == 2
    assert optimizer.skipped_steps == 2


@pytest.mark.filterwarnings("ignore:KFAC. layers")
def test_layers_that_change_meanwhile_take_nothing_that_was_made_for_others() -> None:
    model, optimizer = made(3, inverse_every=2)
    data = batches(6)
    for batch in data[:3]:
        train_step(model, optimizer, *batch)
    model[0].bias.requires_grad_(False)  # type: ignore[index, union-attr, operator]
    model[0].bias.grad = None  # type: ignore[index, union-attr]
    for batch in data[3:]:
        train_step(model, optimizer, *batch)
    first, second = optimizer._coverage.layers
    assert (first.made, second.made) == (4, 2)  # inverted anew at once, after the step that noticed
    assert first.factorisation is not None
    assert first.factorisation["right"].shape == (4, 4)


def test_deleting_the_optimizer_ends_the_thread_and_lets_everything_go(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    model, optimizer = made(4, inverse_every=1)
    for batch in batches(4):
        train_step(model, optimizer, *batch)
    watched = weakref.ref(optimizer), weakref.ref(model)
    del optimizer, model
    gc.collect()
    assert watched[0]() is None
    gate.open.set()
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join(10)
    assert gate.calls == 1, "what was not begun is not done any more"
    gc.collect()
    assert watched[1]() is None


def test_layers_on_a_device_without_streams_are_refused() -> None:
    layer: Any = SimpleNamespace(device=torch.device("mps", 0), name="head")
    with pytest.raises(ValueError, match=r"max_staleness: expected 0 .*got 2 and layer 'head' on mps:0"):
        Background(2).check([layer])
    Background(2).check([SimpleNamespace(device=torch.device(kind), name="head") for kind in ("cpu", "cuda")])  # type: ignore[misc]


def run_script(body: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    head = """
        import os, sys, threading, time, torch
        torch.set_num_threads(1)
        from kronfac.optim import background
        from tests.optim.models import snapshot, train_step, vectors
        from tests.optim.test_background import made
    """
    script = textwrap.dedent(head) + textwrap.dedent(body)
    return subprocess.run(
        [sys.executable, "-c", script],
        timeout=timeout,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )


def test_an_interpreter_that_exits_waits_for_what_is_under_way_and_no_longer() -> None:
    done = run_script("""
        inner = background.factorise
        def slow(*args):
            time.sleep(0.3)
            print("made", flush=True)
            return inner(*args)
        background.factorise = slow
        model, optimizer = made(9, inverse_every=1)
        for _ in range(6):
            train_step(model, optimizer, *vectors(6, 4, 3))
        assert len(optimizer._background.pending) == 5
        print("end", flush=True)
    """)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["end", "made"]


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork on this system")
def test_a_forked_process_makes_pending_inverses_itself() -> None:
    done = run_script("""
        inner, gate = background.factorise, threading.Event()
        def wait(*args):
            if threading.current_thread() is not threading.main_thread():
                gate.wait(20)
            return inner(*args)
        background.factorise = wait
        model, optimizer = made(2, inverse_every=1)
        data = [vectors(6, 4, 3) for _ in range(8)]
        for batch in data[:3]:
            train_step(model, optimizer, *batch)
        assert len(optimizer._background.pending) == 2
        child = os.fork()
        gate.set()
        for batch in data[3:]:
            train_step(model, optimizer, *batch)
        total = sum(float(p.double().sum()) for p in snapshot(model)).hex()
        os.write(1, (total + chr(10)).encode())  # in one piece: both processes write
        if child == 0:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    """)
    assert (done.returncode, done.stderr) == (0, "")
    one, other = done.stdout.split()
    assert one == other


def delayed_rank(rank: int, folder: Path) -> None:
    inner = background.factorise

    def slow(*args: Any) -> Any:
        time.sleep(0.05 * rank)
        return inner(*args)

    background.factorise = slow  # type: ignore[assignment]
    model, optimizer = made(2, inverse_every=1)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(5):
        x, y = torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        for p in model.parameters():
            assert p.grad is not None
            distributed.all_reduce(p.grad)
        optimizer.step()
    torch.save([snapshot(model), frozen_state(optimizer)["kronfac"]["pending"]], folder / f"rank{rank}.pt")


@pytest.mark.skipif(not distributed.is_available(), reason="torch was built without torch.distributed")
def test_ranks_of_different_speed_take_inverses_at_the_same_step(tmp_path: Path) -> None:
    run_ranks(delayed_rank, tmp_path)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert equal(one[0], two[0])
    assert same_tree(one[1], two[1])
