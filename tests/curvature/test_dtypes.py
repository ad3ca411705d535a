"""Half precision, autocast and float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from kronfac.curvature import Categorical, Recorder, find_layers
from tests.curvature.models import Tokens, convnet, mlp, relative


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_type_of_the_factors(dtype: torch.dtype, fisher: str) -> None:
    for model, shape in ((mlp(), (6, 5)), (Tokens(), (6, 5, 3)), (convnet(), (6, 2, 7, 6))):
        model.to(dtype)
        recorder = Recorder(model, find_layers(model), likelihood=Categorical(dim=-1), fisher=fisher)
        model(torch.randn(shape).to(dtype)).float().square().mean().backward()
        pending = recorder.collect()
        assert pending.finite()
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert {t.dtype for pair in pending.factors().values() for t in pair} == {expected}
        for name, adapter in recorder.adapters.items():
            assert adapter.factor_dtype == expected
            assert adapter.factor_sizes == (len(pending.layers[name].A_sum), len(pending.layers[name].G_sum))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_statistics_are_close(dtype: torch.dtype) -> None:
    model, x = mlp(), torch.randn(32, 5)
    results = []
    for kind in (torch.float32, dtype):
        model.to(kind)
        recorder = Recorder(model, find_layers(model), fisher="exact")
        model(x.to(kind))
        results.append(recorder.collect().factors())
        recorder.remove()
    for name, (A, G) in results[0].items():
        assert relative(results[1][name].A, A) < 0.05
        assert relative(results[1][name].G, G) < 0.05


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_autocast(fisher: str) -> None:
    model, x, y = mlp(), torch.randn(32, 5), torch.randint(4, (32,))
    results = []
    for enabled in (False, True):
        recorder = Recorder(model, find_layers(model), fisher=fisher)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model(x)
            assert logits.dtype == (torch.bfloat16 if enabled else torch.float32)
            loss = functional.cross_entropy(logits, y)
        loss.backward()
        results.append(recorder.collect().factors())
        recorder.remove()
    for name, (A, G) in results[0].items():
        assert results[1][name].A.dtype == results[1][name].G.dtype == torch.float32
        assert relative(results[1][name].A, A) < 0.05
        assert relative(results[1][name].G, G) < 0.05


def test_model_moved_to_another_type() -> None:
    model = nn.Linear(5, 4)
    recorder = Recorder(model, find_layers(model))
    model(torch.randn(3, 5))
    assert recorder.collect().factors()[""].A.dtype == torch.float32
    model.double()
    model(torch.randn(3, 5, dtype=torch.float64))
    assert recorder.collect().factors()[""].A.dtype == torch.float64
