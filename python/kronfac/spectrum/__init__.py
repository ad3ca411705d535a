"""Eigenvalues, trace and density of symmetric operators, with the error of each estimate, and loss landscapes."""

from __future__ import annotations

from kronfac.spectrum.block_densities import BlockDensityResult as BlockDensityResult
from kronfac.spectrum.block_densities import block_densities as block_densities
from kronfac.spectrum.block_traces import block_traces as block_traces
from kronfac.spectrum.density import density as density
from kronfac.spectrum.diagonal import diagonal as diagonal
from kronfac.spectrum.directions import random_directions as random_directions
from kronfac.spectrum.eigsh import eigsh as eigsh
from kronfac.spectrum.landscape import landscape as landscape
from kronfac.spectrum.landscape_result import LandscapeResult as LandscapeResult
from kronfac.spectrum.log_density import LogDensityResult as LogDensityResult
from kronfac.spectrum.results import BlockTraceResult as BlockTraceResult
from kronfac.spectrum.results import DensityChecks as DensityChecks
from kronfac.spectrum.results import DensityResult as DensityResult
from kronfac.spectrum.results import DiagonalResult as DiagonalResult
from kronfac.spectrum.results import EigenResult as EigenResult
from kronfac.spectrum.results import TraceResult as TraceResult
from kronfac.spectrum.through_training import through_training as through_training
from kronfac.spectrum.trace import trace as trace
from kronfac.spectrum.training_result import TrainingSpectrumResult as TrainingSpectrumResult
