"""nn.MultiheadAttention: the same factors as the same attention written with four Linear layers."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from kronfac.curvature import Categorical, Recorder, factors, find_layers
from kronfac.curvature import attention as attention_module
from tests.curvature.models import relative

E, HEADS, N, T, S = 6, 2, 4, 5, 3
NAMES = ("q_proj", "k_proj", "v_proj", "out_proj")


class Written(nn.Module):
    """Attention from Linear layers and scaled_dot_product_attention, batch first."""

    def __init__(self, kdim: int = E, vdim: int = E, bias: bool = True) -> None:
        super().__init__()
        self.q_proj, self.out_proj = nn.Linear(E, E, bias=bias), nn.Linear(E, E, bias=bias)
        self.k_proj, self.v_proj = nn.Linear(kdim, E, bias=bias), nn.Linear(vdim, E, bias=bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        heads = [
            projected.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for projected in (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        ]
        out = functional.scaled_dot_product_attention(*heads, attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Net(nn.Module):
    """Queries attend to themselves, or to a memory, between two Linear layers."""

    def __init__(self, attention: nn.Module, how: str, batch_first: bool = True) -> None:
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(3, E), attention, nn.Linear(E, 4)
        self.memory, self.values = nn.Linear(3, E), nn.Linear(3, E)
        self.how, self.batch_first = how, batch_first

    def forward(self, x: Tensor, memory: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits of every token (N, T, 4)."""
        q = self.embed(x)
        k = {"self": q, "memory": self.memory(memory), "three": self.memory(memory)}.get(self.how)
        v = self.values(memory) if self.how == "three" else k
        if self.how == "kdim":
            k, v = memory, torch.cat([memory, memory], -1)
        assert k is not None
        assert v is not None
        if isinstance(self.attention, Written):
            mask = None if keep is None else keep[:, None, None, :]
            out = self.attention(q, k, v, mask)
        elif self.batch_first:
            out = self.attention(q, k, v, key_padding_mask=None if keep is None else ~keep, need_weights=False)[0]
        else:
            flipped = q.transpose(0, 1)
            others = (flipped, flipped) if self.how == "self" else (k.transpose(0, 1), v.transpose(0, 1))
            out = self.attention(flipped, *others)[0].transpose(0, 1)
        return self.head(torch.tanh(q + out))  # type: ignore[no-any-return]


def pair(how: str, batch_first: bool = True, bias: bool = True) -> tuple[Net, Net]:
    """The packed module and the written one with the same weights."""
    torch.manual_seed(0)
    sizes = {"kdim": 3, "vdim": 6} if how == "kdim" else {}
    packed = nn.MultiheadAttention(E, HEADS, batch_first=batch_first, bias=bias, **sizes).double()
    for p in packed.parameters():
        nn.init.normal_(p, std=0.4)
    written = Written(**sizes, bias=bias).double()
    weights = (
        packed.in_proj_weight.chunk(3)
        if packed.in_proj_weight is not None
        else (packed.q_proj_weight, packed.k_proj_weight, packed.v_proj_weight)
    )
    with torch.no_grad():
        for index, name in enumerate(NAMES):
            linear = written.get_submodule(name)
            linear.weight.copy_(packed.out_proj.weight if name == "out_proj" else weights[index])
            if bias:
                linear.bias.copy_(packed.out_proj.bias if name == "out_proj" else packed.in_proj_bias.chunk(3)[index])
    one, two = Net(packed, how, batch_first).double(), Net(written, how).double()
    two.load_state_dict({k: v for k, v in one.state_dict().items() if "attention" not in k}, strict=False)
    return one, two


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(N, T, 3, dtype=torch.float64), torch.randn(N, S, 3, dtype=torch.float64)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("how", ["self", "memory", "three", "kdim"])
def test_factors_equal_those_of_linear_layers(how: str, batch_first: bool, sharing: str) -> None:
    """Trap 9: out_proj is never called as a module. Exact and empirical, from closed form and from backward."""
    packed, written = pair(how, batch_first, bias=how != "memory")
    x, memory = inputs()
    y = torch.randint(4, (N, T))
    likelihood = Categorical(dim=-1)
    torch.testing.assert_close(packed(x, memory), written(x, memory))

    def check(got: dict[str, Any], expected: dict[str, Any]) -> None:
        assert set(got) == set(expected)
        assert {f"attention.{name}" for name in NAMES} <= set(got)
        for name in expected:
            assert relative(got[name].A, expected[name].A) < 1e-10
            # The sum of a key's gradients over the positions is 0: attention does not see a shift of all keys.
            torch.testing.assert_close(got[name].G, expected[name].G, rtol=1e-10, atol=1e-20)

    both = [
        factors(m, {"x": x, "memory": memory}, likelihood=likelihood, fisher="exact", sharing=sharing)
        for m in (packed, written)
    ]
    check(both[0], both[1])
    both = []
    for model in (packed, written):
        recorder = Recorder(model, find_layers(model), likelihood=likelihood, fisher="empirical", sharing=sharing)
        for part in (slice(0, 3), slice(3, 4)):
            logits = model(x[part], memory[part])
            (functional.cross_entropy(logits.flatten(0, 1), y[part].flatten(), reduction="sum") / y.numel()).backward()
        both.append(recorder.collect().factors())
        recorder.remove()
    check(both[0], both[1])


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_padding_masks(sharing: str) -> None:
    """key_padding_mask beside mask=: what is padded neither is attended to nor counts."""
    packed, written = pair("self")
    x, memory = inputs()
    keep = torch.ones(N, T, dtype=torch.bool)
    keep[0, 3:], keep[2, 1:] = False, False
    options: dict[str, Any] = {"likelihood": Categorical(dim=-1), "fisher": "exact", "sharing": sharing}
    options["mask"] = lambda args, kwargs, out: keep
    one, two = (factors(m, {"x": x, "memory": memory, "keep": keep}, **options) for m in (packed, written))
    for name in two:
        assert relative(one[name].A, two[name].A) < 1e-10
        torch.testing.assert_close(one[name].G, two[name].G, rtol=1e-10, atol=1e-20)
    if sharing == "expand":
        rows = torch.cat([packed.embed(x), x.new_ones(N, T, 1)], -1)[keep]
        assert relative(one["attention.k_proj"].A, rows.T @ rows / keep.sum()) < 1e-10


def test_the_forward_is_bit_for_bit_torchs_own() -> None:
    packed, _ = pair("self")
    x, memory = inputs()
    before = packed(x, memory)
    recorder = Recorder(packed, find_layers(packed), likelihood=Categorical(dim=-1))
    during = packed(x, memory)
    assert set(recorder.collect().layers) >= {f"attention.{name}" for name in NAMES}
    assert torch.equal(before, during)
    assert functional.linear is torch._C._nn.linear
    assert not attention_module._taps()


def test_an_unbatched_attention_is_one_example() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(E, HEADS)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0].mean(0, keepdim=True)  # type: ignore[no-any-return]

    model, x = Alone().double(), torch.randn(T, E, dtype=torch.float64)
    got = factors(model, x, likelihood="gaussian", fisher="exact")
    rows = torch.cat([x, x.new_ones(T, 1)], 1)
    assert relative(got["attention.q_proj"].A, rows.T @ rows) < 1e-10
    torch.testing.assert_close(got["attention.out_proj"].G, torch.eye(E, dtype=torch.float64) / T / T)


def test_two_recorders_see_the_same() -> None:
    packed, _ = pair("self")
    x, memory = inputs()
    recorders = [Recorder(packed, find_layers(packed), likelihood=Categorical(dim=-1), fisher="exact") for _ in "ab"]
    packed(x, memory)
    one, two = (recorder.collect().factors() for recorder in recorders)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name].A, two[name].A)
        assert torch.equal(one[name].G, two[name].G)
    recorders[0].remove()
    packed(x, memory)
    assert len(recorders[1].collect().layers) == len(two)
    recorders[1].remove()
    assert not packed.attention._forward_hooks
    assert not packed.attention._forward_pre_hooks


def test_an_exception_inside_the_attention_leaves_nothing_behind() -> None:
    packed, _ = pair("self")
    x, memory = inputs()
    recorder = Recorder(packed, find_layers(packed), likelihood=Categorical(dim=-1))
    with pytest.raises(AssertionError, match="key_padd"):
        packed(x, memory, keep=torch.ones(N, T + 1, dtype=torch.bool))
    assert not attention_module._taps()
    assert not torch.overrides._get_current_function_mode_stack()
    packed(x, memory)
    assert "attention.out_proj" in recorder.collect().layers


def test_checkpointing_copies_and_pickles() -> None:
    packed, _ = pair("self")
    x, memory = inputs()
    expected = factors(packed, {"x": x, "memory": memory}, likelihood=Categorical(dim=-1), fisher="exact")

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = packed

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return checkpoint(self.net, x, memory, use_reentrant=False)  # type: ignore[no-any-return]

    model = Checkpointed()
    recorder = Recorder(model, find_layers(model), likelihood=Categorical(dim=-1), fisher="exact")
    model(x, memory).sum().backward()
    got = recorder.collect().factors()
    for name in expected:
        assert relative(got[f"net.{name}"].A, expected[name].A) < 1e-12
        assert relative(got[f"net.{name}"].G, expected[name].G) < 1e-12
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        torch.testing.assert_close(twin(x, memory), packed(x, memory))
        recorder.clear()
        twin(x, memory)
        assert not recorder.collect().layers


@pytest.mark.parametrize("how", ["self", "kdim"])
def test_matrices(how: str) -> None:
    packed, _ = pair(how)
    adapters = {name: a for name, a in find_layers(packed).items() if name.startswith("attention")}
    for p in packed.parameters():
        p.grad = torch.randn_like(p)
    whole = {id(p): torch.full_like(p, math.nan) for p in packed.attention.parameters()}
    for adapter in adapters.values():
        V = adapter.gradient()
        assert tuple(V.shape) == adapter.matrix_shape
        parts = adapter.split(V)
        for index, (p, part) in enumerate(zip(adapter.parameters(), parts, strict=True)):
            whole[id(p)][slice(None) if adapter.slices is None else adapter.slices[index]] = part
    for p in packed.attention.parameters():
        assert torch.equal(whole[id(p)], p.grad)


def _frozen(attention: nn.MultiheadAttention) -> None:
    attention.in_proj_weight.requires_grad_(False)
    attention.in_proj_bias.requires_grad_(False)


def _frozen_bias(attention: nn.MultiheadAttention) -> None:
    attention.in_proj_bias.requires_grad_(False)


@pytest.mark.parametrize(("freeze", "shapes"), [(_frozen, {"out_proj": 7}), (_frozen_bias, dict.fromkeys(NAMES, 6))])
def test_frozen_projections(freeze: Callable[[nn.MultiheadAttention], None], shapes: dict[str, int]) -> None:
    packed, _ = pair("self")
    x, memory = inputs()
    assert isinstance(packed.attention, nn.MultiheadAttention)
    freeze(packed.attention)
    got = factors(packed, {"x": x, "memory": memory}, likelihood=Categorical(dim=-1), fisher="exact")
    sizes = {name.split(".")[1]: len(pair.A) for name, pair in got.items() if "attention." in name}
    assert sizes == {**shapes, "out_proj": 7}


def test_code_that_is_not_torchs_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody has replaced torch's function: nothing is seen, and nothing breaks."""
    packed, _ = pair("self")
    x, memory = inputs()
    expected = packed(x, memory)
    original = functional._in_projection_packed
    monkeypatch.setattr(functional, "_in_projection_packed", lambda *args: original(*args))
    recorder = Recorder(packed, find_layers(packed), likelihood=Categorical(dim=-1))
    assert torch.equal(packed(x, memory), expected)
    assert not any("attention" in name for name in recorder.collect().layers)
