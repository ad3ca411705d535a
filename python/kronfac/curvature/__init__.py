"""What a layer contributes to curvature: adapters per layer type, likelihoods, recorders and Kronecker factors."""

from __future__ import annotations

from kronfac.curvature.adapter import LayerAdapter
from kronfac.curvature.attention import ProjectionAdapter
from kronfac.curvature.conv import ConvAdapter
from kronfac.curvature.conv_transpose import ConvTransposeAdapter
from kronfac.curvature.doubly_factored import InputFactors
from kronfac.curvature.embedding import EmbeddingAdapter
from kronfac.curvature.extra import ExtraStatistic
from kronfac.curvature.factors import factors
from kronfac.curvature.hooks import unrecorded
from kronfac.curvature.likelihood import Bernoulli, Categorical, Gaussian, Likelihood, resolve_likelihood
from kronfac.curvature.linear import LinearAdapter
from kronfac.curvature.norm import NormAdapter
from kronfac.curvature.posterior import KroneckerPosterior, to_parameters
from kronfac.curvature.recorder import Recorder
from kronfac.curvature.registry import adapter_for, adapters_for, find_layers, register_adapter
from kronfac.curvature.rows import GradientRows
from kronfac.curvature.statistics import KroneckerFactors, LayerStatistics, Pending, ScaledSums
from kronfac.curvature.transposed_linear import TransposedLinearAdapter

__all__ = [
    "Bernoulli",
    "Categorical",
    "ConvAdapter",
    "ConvTransposeAdapter",
    "EmbeddingAdapter",
    "ExtraStatistic",
    "Gaussian",
    "GradientRows",
    "InputFactors",
    "KroneckerFactors",
    "KroneckerPosterior",
    "LayerAdapter",
    "LayerStatistics",
    "Likelihood",
    "LinearAdapter",
    "NormAdapter",
    "Pending",
    "ProjectionAdapter",
    "Recorder",
    "ScaledSums",
    "TransposedLinearAdapter",
    "adapter_for",
    "adapters_for",
    "factors",
    "find_layers",
    "register_adapter",
    "resolve_likelihood",
    "to_parameters",
    "unrecorded",
]
