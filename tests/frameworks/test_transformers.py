"""The Trainer of Hugging Face transformers on small models with random weights: it is the plain loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kronfac
from kronfac.curvature import TransposedLinearAdapter, adapter_for
from kronfac.optim import KFAC
from tests.frameworks.replay import chunks, recorded_calls, same_parameters, twins

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

WORDS = 20


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)  # type: ignore[no-any-return]


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=WORDS,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=12,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)  # type: ignore[no-any-return]


def sentences(count: int) -> list[dict[str, Tensor]]:
    ids = torch.randint(WORDS, (count, 8))
    lengths = 4 + torch.arange(count) % 5
    masks = (torch.arange(8) < lengths[:, None]).long()
    return [{"input_ids": i, "attention_mask": m, "labels": i[0] % 3} for i, m in zip(ids, masks, strict=True)]


def texts(count: int) -> list[dict[str, Tensor]]:
    rows = sentences(count)
    return [{**row, "labels": row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)} for row in rows]


def logits(out: Any) -> Tensor:
    return out.logits  # type: ignore[no-any-return]


def predicted(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Tensor:
    """Position t predicts token t + 1; the last one predicts nothing, and padding is not predicted."""
    return functional.pad(kwargs["labels"][:, 1:] != -100, (0, 1), value=False)


def classifier_optimizer(model: nn.Module) -> KFAC:
    return KFAC(model, 0.05, output=logits, seed=0)


def language_optimizer(model: nn.Module) -> KFAC:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tied embedding trains as SGD
        return KFAC(model, 0.05, output=logits, likelihood=kronfac.Categorical(dim=-1), mask=predicted, seed=0)


def schedule(optimizer: KFAC) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 6)


def trainer(model: nn.Module, optimizer: KFAC, data: list[dict[str, Tensor]], folder: Path, accumulate: int) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulate,
        max_steps=6,
        save_steps=3,
        max_grad_norm=0.5,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        seed=0,
    )
    return transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, schedule(optimizer)))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("make", "made", "data"),
    [(bert, classifier_optimizer, sentences), (gpt2, language_optimizer, texts)],
    ids=["BERT", "GPT-2"],
)
def test_the_trainer_is_the_plain_loop(
    make: Callable[[], nn.Module],
    made: Callable[[nn.Module], KFAC],
    data: Callable[[int], list[dict[str, Tensor]]],
    accumulate: int,
    tmp_path: Path,
) -> None:
    """With accumulation, clipping, a schedule and padding; the forwards that the Trainer made are made again."""
    model, twin = twins(make)
    calls = recorded_calls(model)
    optimizer = made(model)
    trainer(model, optimizer, data(24), tmp_path, accumulate).train()
    assert len(calls) == 6 * accumulate
    assert optimizer.skipped_steps == 0
    own = made(twin)
    scheduler = schedule(own)
    twin.train()
    for step in chunks(calls, accumulate):
        for args, kwargs in step:
            loss = twin(*args, **kwargs).loss
            (loss if "num_items_in_batch" in kwargs else loss / accumulate).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        own.step()
        scheduler.step()
        own.zero_grad()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    for name, pair in own.factors().items():
        torch.testing.assert_close(optimizer.factors()[name], pair, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("make", [bert, gpt2], ids=["BERT", "GPT-2"])
def test_the_trainer_resumes_bit_for_bit(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    made, data = (classifier_optimizer, sentences(24)) if make is bert else (language_optimizer, texts(24))
    model, twin = twins(make)
    trainer(model, made(model), data, tmp_path, 1).train()
    assert (tmp_path / "checkpoint-3" / "optimizer.pt").exists()
    optimizer = made(twin)
    trainer(twin, optimizer, data, tmp_path, 1).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert optimizer.state_dict()["kronfac"]["counters"]["step"] == 6
    assert same_parameters(model, twin)


def test_bert_is_covered_whole_and_of_gpt2_all_but_the_tied_embedding() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = classifier_optimizer(bert())
    assert len(optimizer.layers) == 22
    with pytest.warns(UserWarning, match=r"^KFAC: 1 of the model's parameters .*wte\.weight \(shared by .*lm_head"):
        optimizer = KFAC(gpt2(), 0.05, output=logits, likelihood=kronfac.Categorical(dim=-1))
    assert "transformer.h.0.attn.c_attn" in optimizer.layers


def test_conv1d_is_a_linear_layer_with_its_weight_turned_round() -> None:
    """Two models that compute the same, one of Conv1D, one of Linear: the same steps."""
    Conv1D = transformers.pytorch_utils.Conv1D
    turned = nn.Sequential(Conv1D(5, 4), nn.Tanh(), Conv1D(3, 5)).double()
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    for own, other in zip(turned, plain, strict=True):
        if isinstance(other, nn.Linear):
            other.load_state_dict({"weight": own.weight.detach().T, "bias": own.bias.detach()})
    assert isinstance(adapter_for(turned[0]), TransposedLinearAdapter)
    one, two = (KFAC(model, 0.1, fisher="exact", weight_decay=0.01, inverse_every=2) for model in (turned, plain))
    for _ in range(4):
        x, y = torch.randn(6, 2, 4, dtype=torch.float64), torch.randint(3, (6,))
        for model, optimizer in ((turned, one), (plain, two)):
            model.zero_grad()
            optimizer.zero_grad()
            functional.cross_entropy(model(x.flatten(0, 1)), y.repeat_interleave(2)).backward()
            optimizer.step()
    for own, other in zip(turned, plain, strict=True):
        if isinstance(other, nn.Linear):
            torch.testing.assert_close(own.weight.mT, other.weight)
            torch.testing.assert_close(own.bias, other.bias)
