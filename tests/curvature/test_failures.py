"""What goes wrong in a forward leaves nothing open; what does not fit is refused with the reason."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kronfac.curvature import Categorical, KroneckerFactors, Recorder, find_layers
from tests.curvature.models import mlp
from tests.curvature.recording import same, watch


# torch turns what a hook raises after an exception in forward into a warning.
@pytest.mark.filterwarnings("error")
def test_exception_in_forward_leaves_nothing_open(
    model: nn.Sequential, x: Tensor, expected: dict[str, KroneckerFactors]
) -> None:
    class Sometimes(nn.Module):
        fail: type[BaseException] | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.fail is not None:
                raise self.fail("stop")
            return x

    switch = Sometimes()
    root = nn.Sequential(*model, switch)
    recorder = watch(root)
    for kind in (ValueError, KeyboardInterrupt):
        switch.fail = kind
        with pytest.raises(kind, match="stop"):
            root(x)
        switch.fail = None
        if kind is ValueError:
            assert not recorder.is_open
            model[0](x)  # is not taken for a part of the failed forward
        root(x)
        pending = recorder.collect()
        assert pending.terms == 6
        assert same(pending.factors(), expected)


def test_an_interrupted_forward_is_forgotten(model: nn.Sequential, x: Tensor) -> None:
    """KeyboardInterrupt runs no hooks; the next forward must not close what it left open, when not recorded itself."""
    recorder = watch(model)

    def interrupt(module: nn.Module, args: Any, out: Tensor) -> None:
        raise KeyboardInterrupt

    handle = model[2].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.remove()
    recorder.due = False
    model(x)
    assert recorder.collect().layers == {}


@pytest.mark.filterwarnings("error")
def test_a_failing_hook_of_the_user_drops_the_forward(model: nn.Module, x: Tensor) -> None:
    def fail(module: nn.Module, args: Any, out: Tensor) -> None:
        raise ValueError("mine")

    handle = model.register_forward_hook(fail)
    recorder = watch(model)
    with pytest.raises(ValueError, match="mine"):
        model(x)
    assert not recorder.is_open
    handle.remove()
    assert recorder.collect().layers == {}


def test_recording_while_another_exception_is_handled(model: nn.Module, x: Tensor) -> None:
    """Retrying in an except block is no failure of the forward."""
    recorder = watch(model)
    try:
        raise ValueError
    except ValueError:
        model(x)
    assert recorder.collect().terms == 6


def test_output_that_does_not_fit_is_refused_and_the_recording_closed(x: Tensor) -> None:
    model = mlp().double()
    recorder = watch(model)
    with pytest.raises(ValueError, match=r"Categorical\(dim=None\): output: expected 2 dimensions"):
        model(x.view(2, 3, 5))
    assert not recorder.is_open
    model(x)
    assert recorder.collect().terms == 6


def test_output_callable(model: nn.Module, x: Tensor, expected: dict[str, KroneckerFactors]) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, inputs: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(inputs)}

    root = Wrapped()
    recorder = watch(root)
    with pytest.raises(TypeError, match=r"expected a tensor of logits, got a dict.*output=lambda"):
        root(x)
    recorder.remove()
    recorder = watch(root, output=lambda out: out["logits"])
    root(inputs=x)
    assert same({k.removeprefix("net."): v for k, v in recorder.collect().factors().items()}, expected)


def test_nested_tensors_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    recorder = watch(model, likelihood=Categorical(dim=-1))
    with pytest.raises(RuntimeError, match=r"nested tensor.*mask="):
        model(torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=torch.jagged))
    assert not recorder.is_open


def test_non_finite_statistics_are_noticed() -> None:
    for fisher in ("mc", "exact", "empirical"):
        model = mlp()
        recorder = watch(model, fisher=fisher)
        x = torch.randn(6, 5)
        x[2, 3] = math.nan
        functional.cross_entropy(model(x), torch.zeros(6, dtype=torch.long)).backward()
        assert not recorder.collect().finite()
        model(torch.randn(6, 5)).sum().backward()
        assert recorder.collect().finite()


def test_explanation_names_what_was_seen(model: nn.Module, x: Tensor) -> None:
    recorder = watch(model)
    text = recorder.explain_missing()
    assert "never called on this very module" in text
    assert "compiled" in text
    assert "eval mode" in text
    model.eval()
    model(x)
    model(x)
    assert "2 forward(s) were passed over: the model was in eval mode" in recorder.explain_missing()
    compiled = torch.compile(mlp(), backend="eager")
    assert "; the model is compiled" in watch(compiled).explain_missing()


def test_options() -> None:
    model = mlp()
    layers = find_layers(model)
    with pytest.raises(ValueError, match="fisher: expected one of 'mc', 'exact', 'empirical', got 'true'"):
        Recorder(model, layers, fisher="true")
    with pytest.raises(ValueError, match="reduction: expected one of"):
        Recorder(model, layers, reduction="none")
    with pytest.raises(ValueError, match="sharing: expected one of 'expand', 'reduce', got 'average'"):
        Recorder(model, layers, sharing="average")
    with pytest.raises(ValueError, match="fisher_samples: expected at least 1, got 0"):
        Recorder(model, layers, fisher_samples=0)
    with pytest.raises(TypeError, match=r"fisher_samples: expected an int, got 1\.5"):
        Recorder(model, layers, fisher_samples=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="output: expected a callable or None, got a str"):
        Recorder(model, layers, output="logits")  # type: ignore[arg-type]
    assert not model._forward_hooks
