"""On an accelerator a step between factorisations never makes the host wait, and is the step that the CPU takes.

Here `reading.at_hand` is told that nothing may be read, so that the CPU goes the accelerator's way.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kronfac.curvature import Categorical
from kronfac.optim import KFAC, reading
from kronfac.optim.structures.base import per_layer
from kronfac.optim.update import apply_update
from tests.optim.available import IDS, STRUCTURES
from tests.optim.models import equal, mlp, same_tree, snapshot, train_step, vectors
from tests.optim.test_structures import Everything, through_a_file, tokens


@pytest.fixture(autouse=True)
def _small_layers_are_doubly_factored_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kronfac.optim.structures.LARGEST_A_IF_ASKED", 3)


@pytest.fixture
def out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be read, as on an accelerator."""
    monkeypatch.setattr(reading, "at_hand", lambda tensor: False)


WAITING = (
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "masked_select", "unique2",
    "_unique2", "allclose",
)  # fmt: skip
READING = {
    getattr(Tensor, name)
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__contains__")
} | {torch.tensor, torch.as_tensor, torch.from_numpy}


class Operators(TorchDispatchMode):
    """Notes operators that wait for the device that their arguments are on."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITING or by_mask:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class Readings(TorchFunctionMode):
    """Notes functions that read a tensor, or copy numbers to where one is."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READING:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waits() -> Iterator[None]:
    seen: list[str] = []
    with Readings(seen), Operators(seen):
        yield
    assert not seen, seen


def test_what_waits_is_noticed() -> None:
    x = torch.arange(3.0)
    for wait in (
        lambda: x[0].item(),
        lambda: bool(x[0] == 0),
        lambda: x.tolist(),
        lambda: x[x > 0],
        lambda: torch.tensor([1.0]),
        lambda: x.nonzero(),
        lambda: torch.equal(x, x),
    ):
        with pytest.raises(AssertionError), no_waits():
            wait()


def backward(model: nn.Module, optimizer: KFAC, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward()


@pytest.mark.usefixtures("out_of_reach")
@pytest.mark.parametrize(("structure", "solve"), STRUCTURES, ids=IDS)
def test_a_step_without_factorisation_waits_for_nothing(structure: str, solve: str) -> None:
    """Other networks in tests/optim/test_meta_device.py."""
    model = Everything()
    options: dict[str, Any] = {"norm_constraint": 0.1, "averaging": 0.9, "weight_decay": 0.01}
    optimizer = KFAC(model, 0.05, structure=structure, solve=solve, inverse_every=100, seed=0, **options)
    for _ in range(2):
        train_step(model, optimizer, *tokens(12))
    before = snapshot(model)
    for _ in range(3):
        x, y = tokens(12)
        with no_waits():
            backward(model, optimizer, x, y)
            optimizer.step()
    assert optimizer.steps == 5
    assert not equal(before, snapshot(model))


@pytest.mark.usefixtures("out_of_reach")
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0, "kl_clip": None},
        {"nesterov": True, "weight_decay": 0.1, "decoupled": True},
        {"fisher": "exact", "sharing": "reduce"},
        {"fisher": "empirical"},
        {"fisher_samples": 2, "factor_every": 2},
        {"params": "two groups", "norm_constraint": 0.1},
    ],
    ids=str,
)
def test_no_option_makes_it_wait(options: dict[str, Any]) -> None:
    options = dict(options)
    model = Everything()
    if "params" in options:
        own = [*model.head.parameters()]
        rest = [p for p in model.parameters() if all(p is not q for q in own)]
        options["params"] = [{"params": own, "lr": 0.2, "damping": 0.1, "kl_clip": 0.1}, {"params": rest}]
    optimizer = KFAC(model, 0.05, inverse_every=100, seed=0, **options)
    for _ in range(2):
        train_step(model, optimizer, *tokens(12))
    for _ in range(2):
        x, y = tokens(12)
        with no_waits():
            backward(model, optimizer, x, y)
            optimizer.step()


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_mask_is_waited_for_once(sharing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.layers = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 5))

        def forward(self, x: Tensor) -> Tensor:
            """Logits (N, T, 5)."""
            return self.layers(self.embed(x))  # type: ignore[no-any-return]

    mask = torch.rand(8, 6) > 0.4
    mask[2] = False
    runs, waits = [], []
    for at_hand in (True, False):
        monkeypatch.setattr("kronfac.curvature.masks._at_hand", lambda tensor, at_hand=at_hand: at_hand)
        torch.manual_seed(0)
        model = Tokens()
        optimizer = KFAC(model, 0.1, fisher="exact", sharing=sharing, likelihood=Categorical(-1), mask=lambda *_: mask)
        for x in torch.randint(7, (3, 8, 6)):
            seen: list[str] = []
            optimizer.zero_grad()
            with Readings(seen), Operators(seen):
                logits = model(x)
            waits.append(seen)
            functional.cross_entropy(logits[mask], torch.zeros_like(x)[mask]).backward()
            optimizer.step()
        runs.append([*snapshot(model), *(factor for pair in optimizer.factors().values() for factor in pair)])
    assert waits[3:] == [["nonzero"] * 2, [], []], "of the positions, and of the examples, for the norm"
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("out_of_reach")
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_grad_scaler_does_not_make_it_wait(fisher: str, unscale: bool) -> None:
    model = mlp(4, 5, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = KFAC(model, 0.1, fisher=fisher, inverse_every=100, grad_scaler=scaler)

    def scaled(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        scaler.scale(functional.cross_entropy(model(x), y)).backward()
        if unscale:
            scaler.unscale_(optimizer)

    scaled(*vectors(6, 4, 3))
    scaler.step(optimizer)
    scaler.update()
    for spoilt in (False, True, False):
        x, y = vectors(6, 4, 3)
        optimizer.zero_grad()
        scaler.scale(functional.cross_entropy(model(x), y)).backward()
        if spoilt:
            model[0].weight.grad[0, 0] = math.inf  # type: ignore[index, union-attr]
        if unscale:
            scaler.unscale_(optimizer)
        before = snapshot(model)
        with no_waits():
            scaler.step(optimizer)
        scaler.update()
        assert equal(before, snapshot(model)) == spoilt
    assert (optimizer.steps, optimizer.skipped_steps) == (3, 1)


@pytest.mark.parametrize(("structure", "solve"), STRUCTURES, ids=IDS)
def test_the_steps_are_those_of_the_cpu(structure: str, solve: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a step in between that is not finite, of which the accelerator's host learns two steps later."""
    results = []
    for at_hand in (True, False):
        if not at_hand:
            monkeypatch.setattr(reading, "at_hand", lambda tensor: False)
        torch.manual_seed(2)
        model = Everything().double()
        options = {"factor_decay": 0.5, "averaging": 0.5, "norm_constraint": 0.5, "inverse_every": 3}
        optimizer = KFAC(model, 0.05, structure=structure, solve=solve, damping=0.05, seed=0, **options)
        for attempt in range(10):
            backward(model, optimizer, *tokens(12))
            if attempt == 4:
                model.head.bias.grad[1] = math.nan
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                optimizer.step()
            assert [attempt for one in said if "not finite" in str(one.message)] == (
                [attempt] if attempt == (4 if at_hand else 6) else []
            )
        averages = optimizer.state_dict()["kronfac"]["averages"]
        factors = [tensor for pair in optimizer.factors().values() for tensor in pair]
        results.append([*snapshot(model), *factors, *(entry["value"] for entry in averages.values())])
        assert (optimizer.steps, optimizer.skipped_steps) == (9, 1)
        assert [layer.made for layer in optimizer._coverage.layers] == [6] * len(optimizer.layers)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("out_of_reach")
@pytest.mark.parametrize(("structure", "solve"), STRUCTURES, ids=IDS)
def test_what_is_kept_stays_where_it_is(structure: str, solve: str) -> None:
    """For CUDA graphs, which know addresses; across factorisations too."""
    model = Everything()
    optimizer = KFAC(model, 0.05, structure=structure, solve=solve, inverse_every=3, averaging=0.9, seed=0)

    def addresses() -> dict[str, int]:
        kept: dict[str, int] = {}
        for layer in optimizer._coverage.layers:
            assert layer.factors is not None
            assert layer.factorisation is not None
            tensors = {"A": layer.factors.A, "G": layer.factors.G, **layer.factors.extra, **layer.factorisation}
            kept.update({f"{layer.name}.{key}": tensor.data_ptr() for key, tensor in tensors.items()})
        for index, entry in enumerate(optimizer.state.values()):
            kept[f"state.{index}"] = entry["momentum_buffer"].data_ptr()
        return kept

    for _ in range(2):
        train_step(model, optimizer, *tokens(12))
    first = addresses()
    # Rows of A and G that are not there have no address.
    numbers = [pointer for pointer in first.values() if pointer]
    assert len(set(numbers)) == len(numbers), "nothing lies in the memory of something else"
    for _ in range(8):
        train_step(model, optimizer, *tokens(12))
        assert addresses() == first
    assert optimizer.steps == 10


@pytest.mark.usefixtures("out_of_reach")
def test_a_plain_step_launches_the_same_operators_each_time() -> None:
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    model = Everything()
    optimizer = KFAC(model, 0.05, inverse_every=100, factor_every=50, weight_decay=0.1, seed=0)
    runs = []
    for step in range(5):
        names: list[str] = []
        backward(model, optimizer, *tokens(12))
        with Names():
            optimizer.step()
        if step > 1:
            runs.append(names)
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.usefixtures("out_of_reach")
@pytest.mark.filterwarnings("ignore:KFAC. the gradients, curvature")
def test_a_checkpoint_between_a_skipped_step_and_its_discovery_continues_bit_for_bit() -> None:
    def build() -> tuple[nn.Module, KFAC]:
        torch.manual_seed(4)
        model = mlp(4, 6, 3)
        return model, KFAC(model, 0.1, inverse_every=5, averaging=0.9, damping=lambda step: 0.1 / (1 + step), seed=0)

    model, optimizer = build()
    data = [vectors(8, 4, 3) for _ in range(14)]
    for attempt, batch in enumerate(data[:4]):
        backward(model, optimizer, *batch)
        if attempt == 2:
            model[0].weight.grad[0, 0] = math.inf  # type: ignore[index, union-attr]
        optimizer.step()
    assert (optimizer.steps, optimizer.skipped_steps) == (3, 1)
    saved = through_a_file([model.state_dict(), optimizer.state_dict()])
    assert saved[1]["kronfac"]["counters"]["step"] == 3
    twin, other = build()
    twin.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for batch in data[4:]:
        assert train_step(model, optimizer, *batch) == train_step(twin, other, *batch)
    assert same_tree(optimizer.state_dict(), other.state_dict())
    assert (optimizer.steps, optimizer.skipped_steps) == (13, 1)


@pytest.mark.usefixtures("out_of_reach")
def test_a_checkpoint_in_memory_stays_what_it_was() -> None:
    model = mlp(4, 5, 3)
    optimizer = KFAC(model, 0.1, inverse_every=2, structure="ekfac")
    train_step(model, optimizer, *vectors(6, 4, 3))
    own = optimizer.state_dict()["kronfac"]
    kept = through_a_file(own)
    for _ in range(3):
        train_step(model, optimizer, *vectors(6, 4, 3))
    assert same_tree(own, kept)


@pytest.mark.usefixtures("out_of_reach")
def test_what_the_background_works_on_is_not_written_into() -> None:
    for staleness in (0, 2):
        torch.manual_seed(1)
        model = mlp(4, 5, 3, dtype=torch.float64)
        optimizer = KFAC(model, 0.1, max_staleness=staleness, inverse_every=3, factor_decay=0.5, seed=0)
        factors, used = [], []
        for _ in range(9):
            train_step(model, optimizer, *vectors(6, 4, 3, torch.float64))
            factors.append(optimizer.factors())
            used.append([layer.factorisation["left"].clone() for layer in optimizer._coverage.layers])  # type: ignore[index]
        for step in range(5, 9):
            made = (step - staleness) // 3 * 3
            for layer, left in zip(optimizer._coverage.layers, used[step], strict=True):
                (own,) = optimizer.structure.by_block["kronecker"].factorise([factors[made][layer.name]], [1e-3]).values
                assert own is not None
                torch.testing.assert_close(left, own["left"], rtol=1e-9, atol=0)


LAYOUTS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "contiguous": lambda: (torch.randn(5, 4), torch.randn(5, 4)),
    "part of a matrix": lambda: (torch.randn(5, 4), torch.randn(5, 5)[:, :4]),
    "column": lambda: (torch.randn(5), torch.randn(5, 5)[:, 4]),
    "channels last": lambda: (torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.randn(2, 3, 4, 4)),
    "transposed": lambda: (torch.randn(4, 5).T, torch.randn(5, 4)),
    "with gaps": lambda: (torch.randn(5, 8)[:, ::2], torch.randn(5, 4)),
    "double": lambda: (torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)),
    "bfloat16": lambda: (torch.randn(5, dtype=torch.bfloat16), torch.randn(5, dtype=torch.bfloat16)),
    "complex": lambda: (torch.randn(5, dtype=torch.complex64), torch.randn(5, dtype=torch.complex64)),
    "empty": lambda: (torch.randn(0, 3), torch.randn(0, 3)),
}


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.0}, {"nesterov": True}, {"decoupled": True}, {"decoupled": True, "momentum": 0.0}],
    ids=str,
)
def test_an_update_under_a_condition(options: dict[str, Any]) -> None:
    """Where it holds it is the other update; where not, nothing changes, whatever the directions are."""
    group = {"lr": 0.3, "momentum": 0.9, "nesterov": False, "weight_decay": 0.1, "decoupled": False, **options}
    pairs = {name: make() for name, make in LAYOUTS.items()}
    ours = [p.clone() if name != "with gaps" else torch.empty(5, 8)[:, ::2].copy_(p) for name, (p, _) in pairs.items()]
    theirs = [p.clone() for p in ours]
    one: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)
    other: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)
    for step in range(5):
        # torch.randn_like would have the strides of the parameter
        directions = [torch.randn(d.shape, dtype=d.dtype).as_strided(d.shape, d.stride()) if d.is_contiguous() else
                      torch.randn(5, 5)[:, :4] if d.dim() == 2 else torch.randn(5, 5)[:, 4]
                      for _, d in pairs.values()]  # fmt: skip
        good = step not in (0, 3)
        if not good:
            bad = [torch.full_like(d, math.nan) for d in directions]
            kept = [p.clone() for p in ours]
            apply_update(group, ours, bad, one, good=torch.tensor(False))
            assert equal(kept, ours)
            continue
        copies = [d.clone() for d in directions]
        apply_update(group, ours, directions, one, good=torch.tensor(True))
        assert equal(copies, directions)
        apply_update(group, theirs, directions, other)
    for (name, _), a, b in zip(pairs.items(), ours, theirs, strict=True):
        tolerance = 2e-2 if name == "bfloat16" else 1e-6
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
        if group["momentum"]:
            assert one[a]["momentum_buffer"].shape == a.shape


@pytest.mark.parametrize("values", [[0.1], [0.1, 0.1], [0.1, 0.2, 0.2, 0.1], [1e-300, 2.0]], ids=str)
def test_dampings_by_layer_are_the_same_numbers(values: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    like = [torch.zeros(1)]
    expected = per_layer(values, like)
    monkeypatch.setattr(reading, "at_hand", lambda tensor: False)
    with no_waits():
        got = per_layer(values, like)
    assert torch.equal(got, expected)


@pytest.mark.usefixtures("out_of_reach")
def test_plain_steps_are_announced_and_replays_counted() -> None:
    model = mlp(4, 5, 3)
    optimizer = KFAC(model, 0.1, factor_every=4, inverse_every=6, seed=0)
    plain = []
    for _ in range(13):
        plain.append(optimizer.next_step_is_plain)
        if plain[-1]:
            optimizer.count_replay()
        else:
            train_step(model, optimizer, *vectors(6, 4, 3))
    assert [step for step, one in enumerate(plain) if not one] == [0, 4, 6, 8, 12]
    assert optimizer.steps == 13
    optimizer.param_groups[0]["inverse_every"] = 1
    with pytest.raises(RuntimeError, match=r"count_replay: statistics or inverses are due at this step"):
        optimizer.count_replay()


@pytest.mark.usefixtures("out_of_reach")
def test_what_cannot_be_captured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(reason: str | None, steps: int, time: bool = False, **options: Any) -> None:
        model = mlp(4, 5, 3)
        optimizer = KFAC(model, 0.1, factor_every=10, inverse_every=10, **options)
        for _ in range(steps):
            train_step(model, optimizer, *vectors(6, 4, 3))
        optimizer.time_phases(time)
        backward(model, optimizer, *vectors(6, 4, 3))
        counted, before = optimizer.steps, snapshot(model)
        with monkeypatch.context() as patch:
            patch.setattr("kronfac.optim.kfac.capturing", lambda device: True)
            if reason is None:
                with no_waits():
                    optimizer.step()
            else:
                with pytest.raises(RuntimeError, match=rf"cannot be captured in a CUDA graph: {reason}"):
                    optimizer.step()
        assert optimizer.steps == counted
        assert equal(before, snapshot(model)) == (reason is not None)

    captured(None, 2)
    captured("statistics or inverses are due", 0)
    captured("statistics or inverses are due", 10)
    captured("no plain step was taken before", 1)
    captured("averaging= counts", 2, averaging=0.9)
    captured("phases are being timed", 2, time=True)
    captured("inverses are being made in the background", 11, max_staleness=5)
