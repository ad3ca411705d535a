"""`kronfac train`: train a network, with checkpoints that continue exactly."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

import typer

from kronfac.cli import train_options as opt
from kronfac.cli.errors import UsageError
from kronfac.cli.options import DataDir, Device, Json, ProblemArgument, Quiet, was_given

_NOT_OF_THE_RUN = ("data_dir", "device", "out", "save_every", "resume", "force", "as_json", "quiet")


def train(
    context: typer.Context,
    problem: ProblemArgument = "digits",
    optimizer: opt.OptimizerName = "kfac",
    lr: opt.LearningRate = None,
    momentum: opt.Momentum = None,
    weight_decay: opt.WeightDecay = None,
    alpha: opt.Alpha = None,
    beta1: opt.Beta1 = None,
    beta2: opt.Beta2 = None,
    eps: opt.Eps = None,
    momentum_decay: opt.MomentumDecay = None,
    damping: opt.Damping = None,
    kl_clip: opt.KLClip = None,
    fisher: opt.FisherKind = None,
    likelihood: opt.Likelihood = None,
    solve: opt.SolveKind = None,
    factor_every: opt.FactorEvery = None,
    inverse_every: opt.InverseEvery = None,
    steps_per_epoch: opt.StepsPerEpoch = None,
    curvature: opt.Curvature = None,
    gradient_sample: opt.GradientSample = None,
    hessian_sample: opt.HessianSample = None,
    ratio_sample: opt.RatioSample = None,
    chunk_size: opt.ChunkSize = None,
    tolerance: opt.Tolerance = None,
    max_iterations: opt.MaxIterations = None,
    radius: opt.Radius = None,
    max_radius: opt.MaxRadius = None,
    radius_rule: opt.RadiusRule = None,
    sigma: opt.Sigma = None,
    schedule: opt.ScheduleName = "fixed",
    decay_epochs: opt.DecayEpochs = None,
    decay: opt.Decay = None,
    small_batch: opt.SmallBatch = None,
    base_batch_size: opt.BaseBatch = None,
    warmup_epochs: opt.Warmup = None,
    max_batch_size: opt.MaxBatch = None,
    growth: opt.Growth = None,
    threshold: opt.Threshold = None,
    duration: opt.Duration = None,
    adversarial: opt.Adversarial = None,
    adversarial_share: opt.AdversarialShare = None,
    eigenvalue_examples: opt.EigenvalueExamples = None,
    eigenvalue_every: opt.EigenvalueEvery = None,
    eigenvalue_blocks: opt.EigenvalueBlocks = None,
    eigenvalue_tolerance: opt.EigenvalueTolerance = None,
    eigenvalue_products: opt.EigenvalueProducts = None,
    epochs: opt.Epochs = None,
    batch_size: opt.BatchSize = None,
    seed: opt.Seed = None,
    data_dir: DataDir = None,
    device: Device = "cpu",
    out: opt.Out = None,
    save_every: opt.SaveEvery = None,
    resume: opt.Resume = False,
    force: opt.Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a network and report loss and accuracy per epoch."""
    from kronfac.cli.output import to_json
    from kronfac.cli.train_config import new_config, saved_config
    from kronfac.cli.training_run import TrainingRun, summary

    # By name: the tables of optimizers and schedules say what each option is for.
    values = {name: value.value if isinstance(value, Enum) else value for name, value in context.params.items()}
    given = {n: value for n, value in values.items() if n not in _NOT_OF_THE_RUN and was_given(context, n)}
    checkpoint = _open_checkpoint(out, resume=resume, force=force)
    config = new_config(given) if checkpoint is None else saved_config(checkpoint["config"], given)
    run = TrainingRun(config, given, data_dir=data_dir, device=device, out=out, save_every=save_every)
    if checkpoint is not None:
        run.load(checkpoint)
    result = run.train(quiet=quiet)
    typer.echo(to_json(result) if as_json else summary(result))


def _open_checkpoint(out: Path | None, *, resume: bool, force: bool) -> dict[str, Any] | None:
    from kronfac.cli.checkpoint import read_checkpoint

    if resume and out is None:
        raise UsageError("--resume needs --out, the directory that holds the checkpoint")
    if resume and force:
        raise UsageError("--resume continues a checkpoint and --force discards it; give one of them")
    if out is None:
        return None
    path = out / opt.CHECKPOINT
    if resume:
        return read_checkpoint(path)
    if path.exists() and not force:
        raise UsageError(f"{path} exists: continue it with --resume, or start anew with --force")
    return None
