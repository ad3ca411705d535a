"""Modes under which nothing is recorded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kronfac.curvature import unrecorded
from tests.curvature.recording import watch


def _export(model: nn.Module, x: Tensor) -> object:
    return torch.export.export(model, (x,), strict=False)


def _strict_export(model: nn.Module, x: Tensor) -> object:
    return torch.export.export(model, (x,), strict=True)


def _functional_call(model: nn.Module, x: Tensor) -> object:
    return torch.func.functional_call(model, {k: v.clone() for k, v in model.named_parameters()}, (x,)).sum().backward()


def _jvp(model: nn.Module, x: Tensor) -> object:
    return torch.func.jvp(model, (x,), (torch.ones_like(x),))


def _dual(model: nn.Module, x: Tensor) -> object:
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        return model(forward_ad.make_dual(x, torch.ones_like(x)))


def _fx(model: nn.Module, x: Tensor) -> object:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(model)(x)


def _symbolic(model: nn.Module, x: Tensor) -> object:
    return torch.fx.symbolic_trace(model)(x)


def _fake(model: nn.Module, x: Tensor) -> object:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return model(mode.from_tensor(x))


def _no_grad(model: nn.Module, x: Tensor) -> object:
    with torch.no_grad():
        return model(x)


def _inference(model: nn.Module, x: Tensor) -> object:
    with torch.inference_mode():
        return model(x)


def _analysis(model: nn.Module, x: Tensor) -> object:
    with unrecorded():
        return model(x)


def _eval(model: nn.Module, x: Tensor) -> object:
    model.eval()
    out = model(x)
    model.train()
    return out


def _compile(model: nn.Module, x: Tensor) -> object:
    torch._dynamo.reset()
    return torch.compile(model, backend="eager", fullgraph=True)(x)


INERT: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "eval": _eval,
    "no_grad": _no_grad,
    "inference_mode": _inference,
    "unrecorded": _analysis,
    "grad": lambda model, x: torch.func.grad(lambda v: model(v).sum())(x),
    "vmap": lambda model, x: torch.func.vmap(model)(x),
    "jvp": _jvp,
    "jacrev": lambda model, x: torch.func.jacrev(model)(x),
    "hessian": lambda model, x: torch.func.hessian(lambda v: model(v).sum())(x[0]),
    "dual numbers": _dual,
    "functional_call": _functional_call,
    "export": _export,
    "strict export": _strict_export,
    "trace": lambda model, x: torch.jit.trace(model, x),
    "make_fx": _fx,
    "symbolic_trace": _symbolic,
    "fake tensors": _fake,
    "compile": _compile,
    "submodule": lambda model, x: model[0](x),
    "forward": lambda model, x: model.forward(x),
}


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("how", INERT)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_nothing_is_recorded(model: nn.Module, x: Tensor, how: str, fisher: str) -> None:
    inplace, model[3] = model[3], nn.ReLU()  # some of these transforms refuse in-place operations
    recorder = watch(model, fisher=fisher)
    INERT[how](model, x)
    assert recorder.collect().layers == {}
    assert not recorder.ever_recorded
    assert not recorder.is_open
    # and the model is recorded again right afterwards
    model[3] = inplace
    model(x).sum().backward()
    assert recorder.collect().terms == 6


def test_the_roots_flag_decides(model: nn.Module, x: Tensor) -> None:
    recorder = watch(model)
    for module in model:
        module.eval()
    model(x)
    assert recorder.collect().terms == 6
    model.train()
    model.training = False
    model(x)
    assert recorder.collect().layers == {}


def test_due(model: nn.Module, x: Tensor) -> None:
    recorder = watch(model)
    recorder.due = False
    model(x)
    assert recorder.collect().layers == {}
    recorder.due = True
    model(x)
    assert recorder.collect().terms == 6


def test_suspend(model: nn.Module, x: Tensor) -> None:
    recorder = watch(model)
    with recorder.suspend():
        model(x)
        with pytest.raises(RuntimeError, match="no statistics were taken"), recorder.record():
            model(x)
    assert recorder.collect().layers == {}
    model(x)
    assert recorder.collect().terms == 6
