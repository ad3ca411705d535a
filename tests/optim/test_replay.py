"""J v of a closure's forwards against torch's own, and that running them again leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from kronfac.curvature import Recorder
from kronfac.operators.isolation import RandomStreams
from kronfac.optim.replay import Pushed, Replayer, reevaluated


class References(nn.Module):
    """Uses a parameter through a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.again = [self.layer.weight]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.again[0]) @ self.layer.weight


class PartlyConstant(nn.Module):
    """A part that is computed under no_grad is a constant of the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.layer(x).abs().mean().exp()
        return torch.tanh(self.layer(x)) * scale + self.layer(x).detach()


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return checkpoint(lambda z: torch.tanh(self.layer(z)), x, use_reentrant=False)


class Double(torch.autograd.Function):
    """Has no forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * ctx.saved_tensors[0].cos()


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused = nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return Double.apply(self.layer(x))  # type: ignore[no-any-return, no-untyped-call]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]  # type: ignore[no-any-return]


def encoder(train: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.2 if train else 0.0).train(train)


rows, tokens = (5, 4), (3, 2, 4)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)), rows),
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True)), rows),
    "conv": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.GELU(), nn.MaxPool2d(2), nn.Flatten()), (2, 2, 6, 6)),
    "norms": (lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.SiLU()), rows),
    "encoder": (lambda: encoder(True), tokens),
    "encoder in eval mode": (lambda: encoder(False), tokens),
    "lstm": (Recurrent, tokens),
    "references": (References, rows),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), rows),
    "no_grad": (PartlyConstant, rows),
    "checkpointing": (Checkpointed, rows),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), rows),
    "custom function": (Custom, rows),
}


def remembered(model: nn.Module, *args: Any, **options: Any) -> tuple[Replayer, Tensor]:
    replayer = Replayer(model, **options)
    with replayer.listening(Recorder(model, {})):
        out = model(*args)
    return replayer, out


def directions(model: nn.Module, count: int = 2) -> list[dict[Tensor, Tensor]]:
    return [{p: torch.randn_like(p) for p in model.parameters()} for _ in range(count)]


@pytest.mark.filterwarnings("ignore")  # a test's own warnings of torch: deprecations inside fall-backs
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_the_tangents_are_those_of_torch(name: str, dtype: torch.dtype) -> None:
    make, shape = MODELS[name]
    model, x = make().to(dtype), torch.randn(shape, dtype=dtype)
    vectors = directions(model)
    names = {p: n for n, p in model.named_parameters()}

    def of(*values: Tensor) -> Tensor:
        torch.set_rng_state(stream)
        model.load_state_dict(state)
        out: Tensor = functional_call(model, dict(zip(names.values(), values, strict=True)), x)
        return out

    state = {key: value.clone() for key, value in model.state_dict().items()}
    stream = torch.get_rng_state()
    replayer, out = remembered(model, x)
    model.load_state_dict(state)  # where the forward changed buffers, those that it read are wanted
    pushed = replayer.push(replayer.calls[0], vectors)
    torch.testing.assert_close(pushed.logits, out.detach())
    if name == "references":  # functional_call does not reach those
        of = lambda w, b: torch.tanh(x @ w) @ w + 0 * b.sum()  # noqa: E731
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
        for vector, tangent in zip(vectors, pushed.tangents, strict=True):
            ordered = tuple(vector[p] for p in names)
            _, expected = torch.autograd.functional.jvp(of, tuple(p.detach() for p in names), ordered)
            torch.testing.assert_close(tangent, expected, rtol=1e-3 if dtype == torch.float32 else 1e-7, atol=1e-5)
    assert float(pushed.tangents[0].abs().sum()) > 0
    assert replayer._forward_mode == (name not in ("weight norm", "custom function"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("forward_mode", [True, False])
def test_both_modes_agree_and_parameters_without_direction_stand_still(forward_mode: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    replayer, _ = remembered(model, x)
    replayer._forward_mode = forward_mode
    vector = {model[2].weight: torch.randn(3, 5, dtype=torch.float64)}
    pushed = replayer.push(replayer.calls[0], [vector, {}])
    torch.testing.assert_close(pushed.tangents[0], torch.tanh(model[0](x)).detach() @ vector[model[2].weight].T)
    assert float(pushed.tangents[1].abs().sum()) == 0


def test_a_parameter_outside_the_model_takes_part() -> None:
    scale = nn.Parameter(torch.tensor([2.0, 3.0, 4.0]))
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    x = torch.randn(6, 4)
    replayer, _ = remembered(model, x, output=lambda out: out * scale)
    vector: dict[Tensor, Tensor] = {scale: torch.ones(3)}
    pushed = replayer.push(replayer.calls[0], [vector])
    torch.testing.assert_close(pushed.tangents[0], model(x).detach())
    assert scale.requires_grad
    replayer._forward_mode = False
    with pytest.raises(RuntimeError, match="through references"):
        replayer.push(replayer.calls[0], [vector])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("forward_mode", [True, False])
def test_a_replay_leaves_no_trace(forward_mode: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    model[1].eval()
    x = torch.randn(6, 4)
    replayer, out = remembered(model, x)
    replayer._forward_mode = forward_mode
    out.sum().backward()
    vectors = directions(model)
    model.eval()  # the forward ran in train mode, and that is how it is run again
    before = trace(model)
    pushed = replayer.push(replayer.calls[0], vectors)
    torch.testing.assert_close(pushed.logits, out.detach())  # dropout included
    assert same(before, trace(model))


def trace(model: nn.Module) -> list[Any]:
    """Everything about a model and the random streams that must stay, identities of tensors included."""
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    return [
        [None if t is None else (id(t), t.detach().clone(), t.requires_grad) for t in tensors],
        [m.training for m in model.modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()],  # type: ignore[index]
        torch.backends.mha.get_fastpath_enabled(),
    ]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_a_reevaluation_leaves_no_trace_and_sees_the_same_random_numbers() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    x = torch.randn(6, 4)
    recorder = Recorder(model, {})

    def closure() -> float:
        model.zero_grad()
        loss = (model(x + torch.randn(6, 4) * random.random()) ** 2).mean()
        loss.backward()
        return loss.item()

    start = RandomStreams(())
    first = closure()
    before = trace(model)
    with reevaluated(model, list(model.parameters()), recorder, start):
        assert closure() == first
    assert same(before, trace(model))

    def failing() -> None:
        with reevaluated(model, [], recorder, start):
            closure()
            raise KeyError("in the closure")

    with pytest.raises(KeyError):
        failing()
    assert same(before, trace(model))


def test_only_forwards_that_a_loss_can_come_from_are_remembered() -> None:
    model = nn.Linear(4, 3)
    replayer, recorder = Replayer(model), Recorder(model, {})
    x = torch.randn(2, 4)
    with replayer.listening(recorder):
        model(x)
        model.eval()
        model(x)
        with torch.no_grad():
            model(x)
        torch.func.vmap(model)(x)
    assert len(replayer.calls) == 2
    assert len(model._forward_pre_hooks) == 1  # the recorder's
    model(x)
    assert len(replayer.calls) == 2


def test_an_input_that_was_overwritten_is_refused() -> None:
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    replayer, _ = remembered(model, x)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified in place after the forward"):
        replayer.push(replayer.calls[0], directions(model))


def test_a_model_that_cannot_be_differentiated_is_refused_with_both_reasons() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * 2

    class Model(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(super().forward(x))  # type: ignore[no-any-return, no-untyped-call]

    model = Model(4, 3)
    replayer, _ = remembered(model, torch.randn(2, 4))
    with pytest.raises(
        RuntimeError, match=r"neither in forward mode \(You must implement the jvp.*once_differentiable"
    ):
        replayer.push(replayer.calls[0], directions(model))


def test_output_mask_and_keyword_arguments_go_through() -> None:
    class Model(nn.Linear):
        def forward(self, x: Tensor, *, shift: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"logits": super().forward(x) + shift}

    model, x, shift = Model(4, 3), torch.randn(2, 4), torch.ones(3)
    options: dict[str, Any] = {
        "output": lambda out: out["logits"],
        "mask": lambda args, kwargs, out: (args[0] > 0) & (kwargs["shift"][0] > 0),
    }
    replayer = Replayer(model, **options)
    with replayer.listening(Recorder(model, {})):
        model(x, shift=shift)
    vector: dict[Tensor, Tensor] = {model.bias: torch.ones(3)}
    pushed: Pushed = replayer.push(replayer.calls[0], [vector])
    assert pushed.tangents[0].tolist() == torch.ones(2, 3).tolist()
    assert pushed.mask is not None
    assert torch.equal(pushed.mask, x > 0)
    replayer = Replayer(model)
    with replayer.listening(Recorder(model, {})):
        model(x, shift=shift)
    with pytest.raises(TypeError, match="expected a tensor of logits, got a dict"):
        replayer.push(replayer.calls[0], [vector])
