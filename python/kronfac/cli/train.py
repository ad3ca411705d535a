"""`kronfac train`: train a network, with checkpoints that continue exactly."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from kronfac.cli.errors import RunError, UsageError
from kronfac.cli.options import (
    DataDir,
    Device,
    Fisher,
    Json,
    LikelihoodName,
    OptimizerName,
    ProblemArgument,
    Quiet,
    Solve,
    was_given,
)

CHECKPOINT = "checkpoint.pt"
HISTORY = "history.json"

_KFAC_ONLY = ("damping", "kl_clip", "fisher", "likelihood", "solve", "factor_every", "inverse_every")
_RESUMABLE = ("problem", "optimizer", "lr", "momentum", "weight_decay", *_KFAC_ONLY, "batch_size", "seed")
_DEFAULT_LR = {"kfac": 0.1, "sgd": 0.03}


def train(
    context: typer.Context,
    problem: ProblemArgument = "digits",
    optimizer: Annotated[OptimizerName, typer.Option(help="K-FAC, or SGD with momentum.")] = OptimizerName.KFAC,
    lr: Annotated[float | None, typer.Option(help="Learning rate (default: 0.1 for kfac, 0.03 for sgd).")] = None,
    momentum: Annotated[float, typer.Option(help="Momentum.")] = 0.9,
    weight_decay: Annotated[float, typer.Option(help="L2 coefficient.")] = 0.0,
    damping: Annotated[float, typer.Option(help="K-FAC: damping.")] = 1e-2,
    kl_clip: Annotated[float, typer.Option(help="K-FAC: bound on the KL divergence of a step; 0 for none.")] = 1e-4,
    fisher: Annotated[Fisher, typer.Option(help="K-FAC: which output gradients.")] = Fisher.MC,
    likelihood: Annotated[LikelihoodName, typer.Option(help="K-FAC: what the loss is the negative log of.")] = (
        LikelihoodName.CATEGORICAL
    ),
    solve: Annotated[Solve, typer.Option(help="K-FAC: damped inverses or eigenbases.")] = Solve.INVERSE,
    factor_every: Annotated[int, typer.Option(min=1, help="K-FAC: steps between statistics.")] = 1,
    inverse_every: Annotated[int, typer.Option(min=1, help="K-FAC: steps between inversions.")] = 10,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs in all, also with --resume.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per batch (built-in datasets).")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of the initialisation, the batch order and K-FAC's sampler.")] = 0,
    data_dir: DataDir = None,
    device: Device = "cpu",
    out: Annotated[
        Path | None, typer.Option(help=f"Directory for {CHECKPOINT} (every epoch, atomically) and {HISTORY}.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue OUT's checkpoint exactly; options not given are taken from it.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Start anew although OUT holds a checkpoint.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a network with K-FAC or SGD and report loss and accuracy per epoch."""
    given = {name for name in context.params if was_given(context, name)}
    config: dict[str, Any] = {
        "problem": problem,
        "optimizer": optimizer.value,
        "lr": lr,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "damping": damping,
        "kl_clip": kl_clip,
        "fisher": fisher.value,
        "likelihood": likelihood.value,
        "solve": solve.value,
        "factor_every": factor_every,
        "inverse_every": inverse_every,
        "batch_size": batch_size,
        "seed": seed,
    }
    checkpoint = _open_checkpoint(out, resume=resume, force=force)
    if checkpoint is not None:
        config = _merge(config, checkpoint["config"], given)
    if config["lr"] is None:
        config["lr"] = _DEFAULT_LR[config["optimizer"]]
    _check(config, given)
    result = _run(config, given, checkpoint, epochs=epochs, data_dir=data_dir, device=device, out=out, quiet=quiet)
    from kronfac.cli.output import to_json

    typer.echo(to_json(result) if as_json else _summary(result))


def _open_checkpoint(out: Path | None, *, resume: bool, force: bool) -> dict[str, Any] | None:
    from kronfac.cli.checkpoint import read_checkpoint

    if resume and out is None:
        raise UsageError("--resume needs --out, the directory that holds the checkpoint")
    if resume and force:
        raise UsageError("--resume continues a checkpoint and --force discards it; give one of them")
    if out is None:
        return None
    path = out / CHECKPOINT
    if resume:
        return read_checkpoint(path)
    if path.exists() and not force:
        raise UsageError(f"{path} exists: continue it with --resume, or start anew with --force")
    return None


def _merge(config: dict[str, Any], saved: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """The checkpoint's configuration; what the user typed must agree with it."""
    missing = [name for name in _RESUMABLE if name not in saved]
    if missing:
        raise UsageError(f"--resume: damaged checkpoint, its configuration lacks {', '.join(missing)}")
    for name in _RESUMABLE:
        if name in given and config[name] != saved[name]:
            option = "PROBLEM" if name == "problem" else "--" + name.replace("_", "-")
            raise UsageError(f"--resume: {option} {config[name]} differs from the checkpoint's {saved[name]}")
    return {name: saved[name] for name in _RESUMABLE}


def _check(config: dict[str, Any], given: set[str]) -> None:
    if config["optimizer"] == "sgd":
        for name in _KFAC_ONLY:
            if name in given:
                raise UsageError(f"--{name.replace('_', '-')} applies to --optimizer kfac only")
    if ":" in config["problem"] and "batch_size" in given:
        raise UsageError(f"--batch-size applies to the built-in datasets; {config['problem']} brings its own loaders")
    # The optimizers check their hyper-parameters too; torch's SGD lets NaN and infinity pass.
    for name in ("lr", "momentum", "weight_decay", "damping", "kl_clip"):
        value = config[name]
        if not 0 <= value < float("inf"):
            raise UsageError(f"--{name.replace('_', '-')}: expected a finite number, at least 0, got {value}")


def _run(
    config: dict[str, Any],
    given: set[str],
    checkpoint: dict[str, Any] | None,
    *,
    epochs: int,
    data_dir: Path | None,
    device: str,
    out: Path | None,
    quiet: bool,
) -> dict[str, Any]:
    from kronfac.cli.checkpoint import random_state, restore_random_state, save_checkpoint
    from kronfac.cli.output import Progress, make_directory, to_json, write_atomically
    from kronfac.cli.problems import load_problem, set_epoch
    from kronfac.cli.training import Settings, evaluate, make_optimizer, train_epoch

    problem = load_problem(
        config["problem"], data_dir=data_dir, batch_size=config["batch_size"], seed=config["seed"], device=device
    )
    settings = Settings(
        **{name: config[name] for name in ("optimizer", "lr", "momentum", "weight_decay", *_KFAC_ONLY)}
        | {"kl_clip": config["kl_clip"] or None}
    )
    if ":" in problem.name and problem.likelihood is not None:
        if "likelihood" in given:
            raise UsageError(f"--likelihood: {problem.name} says itself what its likelihood is; leave the option out")
        settings = replace(settings, likelihood=problem.likelihood)
    optimizer = make_optimizer(settings, problem.model, config["seed"])
    history: dict[str, list[Any]] = {"train_loss": [], "test_loss": [], "test_accuracy": [], "seconds": []}
    done = 0
    if checkpoint is not None:
        done, history = checkpoint["epoch"], _continue(checkpoint, problem, optimizer, out)
        restore_random_state(checkpoint["random"], problem.train, problem.test)
    if out is not None:
        make_directory(out)
    result: dict[str, Any] = {
        "problem": problem.name,
        "parameters": problem.parameters,
        "settings": settings.used() | {"batch_size": config["batch_size"], "seed": config["seed"]},
        "epochs": done,
        "skipped_steps": getattr(optimizer, "skipped_steps", 0),
        "resumed_from_epoch": done if checkpoint is not None else None,
        **history,
        "checkpoint": None if out is None else str(out / CHECKPOINT),
    }
    steps = len(problem.train) if isinstance(problem.train, Sized) else None
    total = None if steps is None else steps * max(epochs - done, 0)
    with Progress(total, problem.name, quiet=quiet) as progress:

        def on_step(loss: float) -> None:
            progress.note(f"loss {loss:.3g}{accuracy_note}")
            progress.advance()

        accuracy_note = ""
        for epoch in range(done, epochs):
            progress.label(f"epoch {epoch + 1}/{epochs}")
            set_epoch(problem.train, epoch)
            loss, _, seconds = train_epoch(problem.model, problem.loss_fn, problem.train, optimizer, on_step)
            if not abs(loss) < float("inf"):
                kept = f"; {out / CHECKPOINT} holds epoch {epoch}" if out is not None and epoch > 0 else ""
                raise RunError(
                    f"training diverged in epoch {epoch + 1} (a batch's loss is {loss}) with lr {settings.lr:g}; "
                    f"lower --lr{' or raise --damping' if settings.optimizer == 'kfac' else ''}{kept}"
                )
            test_loss, accuracy = (None, None)
            if problem.test is not None:
                test_loss, accuracy = evaluate(problem.model, problem.loss_fn, problem.test)
            accuracy_note = "" if accuracy is None else f", test accuracy {accuracy:.2%}"
            for name, value in zip(history, (loss, test_loss, accuracy, seconds), strict=True):
                history[name].append(value)
            result["epochs"] = epoch + 1
            result["skipped_steps"] = getattr(optimizer, "skipped_steps", 0)
            if out is not None:
                content = {
                    "config": config,
                    "epoch": epoch + 1,
                    "model": problem.model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "history": history,
                    "random": random_state(problem.train, problem.test),
                }
                save_checkpoint(out / CHECKPOINT, content)
                write_atomically(out / HISTORY, to_json(result) + "\n")
    return result


def _continue(checkpoint: dict[str, Any], problem: Any, optimizer: Any, out: Path | None) -> dict[str, list[Any]]:
    """Load a checkpoint into model and optimizer; returns the history so far."""
    from kronfac.cli.checkpoint import load_parameters
    from kronfac.cli.errors import one_line

    path = (out or Path()) / CHECKPOINT
    load_parameters(problem.model, checkpoint["model"], path)
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: does not fit the optimizer ({one_line(error)})") from None
    history = checkpoint["history"]
    names = ("train_loss", "test_loss", "test_accuracy", "seconds")
    if any(len(history.get(name, ())) != checkpoint["epoch"] for name in names):
        raise UsageError(f"{path}: damaged checkpoint, its history does not have {checkpoint['epoch']} epochs")
    return {name: list(history[name]) for name in names}


def _summary(result: dict[str, Any]) -> str:
    settings = result["settings"]
    lines = [
        f"{result['problem']}, {result['parameters']:,} parameters, {settings['optimizer']} with lr {settings['lr']:g}",
        "epoch  train loss   test loss  test accuracy  seconds",
    ]
    rows = zip(result["train_loss"], result["test_loss"], result["test_accuracy"], result["seconds"], strict=True)
    for epoch, (train_loss, test_loss, accuracy, seconds) in enumerate(rows, start=1):
        test = f"{'-':>10}" if test_loss is None else f"{test_loss:10.4g}"
        correct = f"{'-':>13}" if accuracy is None else f"{accuracy:13.2%}"
        lines.append(f"{epoch:5d}  {train_loss:10.4g}  {test}  {correct}  {seconds:7.2f}")
    if result["skipped_steps"]:
        lines.append(f"{result['skipped_steps']} steps were skipped because something in them was not finite")
    if result["checkpoint"] is not None:
        lines.append(f"checkpoint: {result['checkpoint']}")
    return "\n".join(lines)
