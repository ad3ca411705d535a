"""Optimizers that use curvature."""

from __future__ import annotations

from kronfac.optim import search_spaces as search_spaces
from kronfac.optim.kfac import KFAC as KFAC
from kronfac.optim.memory import LayerMemory as LayerMemory
from kronfac.optim.memory import MemoryReport as MemoryReport
from kronfac.optim.memory import predict_memory as predict_memory
from kronfac.optim.monitor import Monitor as Monitor
from kronfac.optim.newton import TRCG as TRCG
from kronfac.optim.newton import CubicAttempt as CubicAttempt
from kronfac.optim.newton import CubicNewton as CubicNewton
from kronfac.optim.newton import CubicStep as CubicStep
from kronfac.optim.newton import GaussNewtonCG as GaussNewtonCG
from kronfac.optim.newton import GaussNewtonStep as GaussNewtonStep
from kronfac.optim.newton import NewtonMINRES as NewtonMINRES
from kronfac.optim.newton import NewtonMINRESStep as NewtonMINRESStep
from kronfac.optim.newton import NewtonOptimizer as NewtonOptimizer
from kronfac.optim.newton import NewtonStep as NewtonStep
from kronfac.optim.newton import TrustRegionAttempt as TrustRegionAttempt
from kronfac.optim.newton import TrustRegionStep as TrustRegionStep
from kronfac.optim.range_finder import RangeResult as RangeResult
from kronfac.optim.range_finder import range_finder as range_finder
