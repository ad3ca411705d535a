"""Lifetime of the hooks: they never outlive the recorder, never keep it alive, and are inert on copies."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.curvature import Recorder, find_layers, unrecorded
from tests.curvature.models import mlp


def count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 5)


def test_remove(x: Tensor) -> None:
    model = mlp()
    recorder = Recorder(model, find_layers(model))
    assert count_hooks(model) == 5
    model(x)
    recorder.remove()
    recorder.remove()
    assert count_hooks(model) == 0
    assert recorder.removed
    model(x)
    assert recorder.collect().layers == {}


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_collecting_the_recorder_removes_the_hooks(x: Tensor, fisher: str) -> None:
    model = mlp()
    recorder = Recorder(model, find_layers(model), fisher=fisher)
    dead = weakref.ref(recorder)
    logits = model(x)  # for "empirical" the graph carries hooks
    gc.disable()
    try:
        del recorder
        assert dead() is None  # there is no cycle: reference counts suffice
    finally:
        gc.enable()
    assert count_hooks(model) == 0
    logits.sum().backward()
    model(x)


def test_collecting_the_model(x: Tensor) -> None:
    model = mlp()
    recorder = Recorder(model, find_layers(model))
    model(x).sum().backward()
    dead = weakref.ref(model)
    del recorder, model
    assert dead() is None


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save", "copy"])
def test_copies_of_a_watched_model_work_and_are_inert(x: Tensor, how: str) -> None:
    model = mlp()
    recorder = Recorder(model, find_layers(model))
    other: nn.Module
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "copy":
        other = copy.copy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    torch.testing.assert_close(other(x), model(x))
    recorder.clear()
    other(x).sum().backward()
    assert recorder.collect().layers == {}
    if how != "copy":  # a shallow copy shares the layers
        second = Recorder(other, find_layers(other))
        other(x)
        assert second.collect().terms == 6
        assert recorder.collect().layers == {}
    model(x)
    assert recorder.collect().terms == 6


def test_a_deepcopy_does_not_keep_the_recorder_alive(x: Tensor) -> None:
    model = mlp()
    recorder = Recorder(model, find_layers(model))
    other = copy.deepcopy(model)
    dead = weakref.ref(recorder)
    for module in other.modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            assert not vars(hook)
    del recorder
    assert dead() is None
    other(x)


def test_nothing_of_the_model_or_its_gradients_changes(x: Tensor) -> None:
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    plain = mlp()
    watched = copy.deepcopy(plain)
    for fisher in ("mc", "exact", "empirical"):
        recorder = Recorder(watched, find_layers(watched), fisher=fisher)
        outputs = []
        for model in (plain, watched):
            model.zero_grad()
            out = model(x)
            functional.cross_entropy(out, y).backward()
            outputs.append(out)
        assert torch.equal(*outputs)
        for p, q in zip(plain.parameters(), watched.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
        recorder.remove()


def test_the_extra_pass_never_reaches_the_parameters(x: Tensor) -> None:
    model = mlp()
    calls: list[str] = []
    for name, p in model.named_parameters():
        p.register_hook(lambda g, name=name: calls.append(name))
        p.register_post_accumulate_grad_hook(lambda p, name=name: calls.append(name))
    recorder = Recorder(model, find_layers(model), fisher="exact")
    model(x)
    assert calls == []
    assert all(p.grad is None for p in model.parameters())
    assert recorder.collect().terms == 6


def test_a_users_hook_may_replace_a_layers_output(x: Tensor) -> None:
    """Statistics belong to the layer's own output, whenever the other hook was registered."""
    model, scale = mlp().double(), 3.0
    x = x.double()

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            h = self.net[0](x) * scale
            return self.net[1:](h)

    root = Scaled()
    recorder = Recorder(root, find_layers(root), fisher="exact")
    root(x)
    expected = recorder.collect().layers["net.0"]
    recorder.remove()
    for early in (True, False):
        handles = [model[0].register_forward_hook(lambda m, a, out: out * scale)] if early else []
        recorder = Recorder(model, find_layers(model), fisher="exact")
        if not early:
            handles.append(model[0].register_forward_hook(lambda m, a, out: out * scale))
        model(x)
        torch.testing.assert_close(recorder.collect().layers["0"].G_sum, expected.G_sum)
        recorder.remove()
        handles[0].remove()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_full_backward_hooks_of_the_user(x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
    seen: list[int] = []
    model[0].register_full_backward_hook(lambda m, gin, gout: seen.append(1))
    recorder = Recorder(model, find_layers(model), fisher="mc")
    model(x).sum().backward()
    assert recorder.collect().terms == 6
    assert seen


def test_two_recorders_on_one_model(x: Tensor) -> None:
    model = mlp().double()
    one, two = (Recorder(model, find_layers(model), fisher="exact") for _ in range(2))
    model(x.double())
    first, second = one.collect().factors(), two.collect().factors()
    assert all(torch.equal(first[name].G, second[name].G) for name in first)
    with unrecorded(except_for=one):
        model(x.double())
    assert one.collect().terms == 6
    assert two.collect().layers == {}


def test_a_root_that_is_a_layer(x: Tensor) -> None:
    model = nn.Linear(5, 4)
    recorder = Recorder(model, find_layers(model))
    model(x)
    assert set(recorder.collect().layers) == {""}
    with torch.no_grad():
        model(x)
    assert recorder.collect().layers == {}
